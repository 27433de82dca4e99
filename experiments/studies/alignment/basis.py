"""Which subspace of the anchor lets P and Q learn most: random, weights, activations or gradients.

    python -m fedmosaic.experiments.studies.alignment.basis \
        --model MODEL --public TEXT --task NAME=PREFIX --out FILE

Every basis has its own learning rate per task, the best of a grid on the validation part with the first seed.
The test part is scored at that rate only. What FILE holds already is not run again.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from peft import PeftModel
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from fedmosaic.alignment.activations import Reading, Side, collect, open_side
from fedmosaic.alignment.anchor import ANCHOR_BASES, anchor_basis
from fedmosaic.alignment.checkpoint import Bases
from fedmosaic.alignment.evaluate import Task, interval, score_model
from fedmosaic.alignment.public_text import read_public_text
from fedmosaic.alignment.sources import parse_source
from fedmosaic.client.colora import (
    CoLoraConfig,
    find_decoder_layers,
    read_shared,
    set_active_branches,
    set_basis,
    set_trainable,
    target_layers,
    write_shared,
)
from fedmosaic.client.model.examples import encode_examples, padding_token, read_examples
from fedmosaic.client.model.load import adapt
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.protos.errors import ConfigurationError


@dataclass(frozen=True)
class Arguments:
    """Compare bases of one model at equal rank."""

    model: str
    """PATH_OR_HUB_ID[@LAYERS]."""
    public: Path
    """Public text for activations and gradients, as for `fedmosaic align`."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]]
    """NAME=PREFIX of PREFIX.train.jsonl, PREFIX.valid.jsonl and PREFIX.test.jsonl."""
    out: Path
    """File of all runs, as JSON; gone on with if it exists."""
    bases: tuple[str, ...] = ANCHOR_BASES
    """Which to compare."""
    learning_rates: tuple[float, ...] = (1e-2, 3e-2)
    """Grid."""
    seeds: int = 3
    """Runs at the chosen rate."""
    steps: int = 100
    """Optimizer steps of 8 examples."""
    test_examples: int = 80
    """Most test and most validation examples."""
    samples: int = 300
    """Public texts."""
    max_length: int = 64
    """Most tokens per text."""
    rank: int = 16
    """r."""
    blocks: int = 4
    """Shared layers."""


class Run(BaseModel):
    """One training: what was trained how, and both scores (loss in nats per token, accuracy)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    basis: str
    learning_rate: float
    seed: int
    valid: tuple[float, float]
    test: tuple[float, float]


@dataclass(frozen=True)
class _Split:
    """A task's parts."""

    name: str
    valid: Task
    test: Task


class Study:
    """A model on which all bases and tasks take turns."""

    def __init__(self, arguments: Arguments) -> None:
        """Load the model, find the bases, and read what an earlier run has done.

        Raises:
            ConfigurationError: an option or a file is not usable.
            ModelError: the model cannot be loaded, or a module is narrower than the rank.
        """
        _check(arguments)
        self._arguments = arguments
        self._tasks = [_read_task(text, arguments.test_examples) for text in arguments.task]
        self.runs = _read_runs(arguments)
        base, self._tokenizer = parse_source(arguments.model).load()
        layers = target_layers(len(find_decoder_layers(base)[1]), arguments.blocks, "relative_depth")
        side = open_side(base, self._tokenizer, layers)
        self._bases = _bases(side, arguments)
        self._names = side.names
        config = CoLoraConfig(
            r=arguments.rank, alpha=2.0 * arguments.rank, blocks=arguments.blocks, other_layers="none"
        )
        self._model: PeftModel = adapt(base, config)
        set_active_branches(self._model, {"local"})
        set_trainable(self._model, {"local"})

    def run(self, console: Console) -> list[Run]:
        """Run what is missing; returns the runs at the chosen learning rates."""
        chosen: list[Run] = []
        for split in self._tasks:
            for basis in self._arguments.bases:
                grid = [self._of(split, basis, rate, 0) for rate in self._arguments.learning_rates]
                best = min(grid, key=lambda run: run.valid[0])
                seeds = range(1, self._arguments.seeds)
                found = [best, *(self._of(split, basis, best.learning_rate, seed) for seed in seeds)]
                chosen += found
                for run in found:
                    console.print(
                        f"{run.task}, {run.basis}, rate {run.learning_rate:g}, seed {run.seed}: "
                        f"{run.test[0]:.3f}/{run.test[1]:.3f}"
                    )
        return chosen

    def _of(self, split: _Split, basis: str, rate: float, seed: int) -> Run:
        for run in self.runs:
            if (run.task, run.basis, run.learning_rate, run.seed) == (split.name, basis, rate, seed):
                return run
        valid, test = self._trained(split, basis, rate, seed)
        run = Run(task=split.name, basis=basis, learning_rate=rate, seed=seed, valid=valid, test=test)
        self.runs.append(run)
        self._write()
        return run

    def _trained(
        self, split: _Split, basis: str, rate: float, seed: int
    ) -> tuple[tuple[float, float], tuple[float, float]]:
        arguments, tokenizer = self._arguments, self._tokenizer
        named = {self._names[key]: (a.float(), b.float()) for key, (a, b) in self._bases[basis].items()}
        set_basis(self._model, named, label=basis)
        write_shared(self._model, np.zeros_like(read_shared(self._model)), "local")
        settings = TrainingSettings(
            shared_learning_rate=rate, steps=arguments.steps, max_length=arguments.max_length, seed=seed
        )
        encoded = encode_examples(tokenizer, split.test.train, arguments.max_length)
        train_local(self._model, encoded, settings, pad_token_id=padding_token(tokenizer))
        return self._score(split.valid), self._score(split.test)

    def _score(self, task: Task) -> tuple[float, float]:
        return score_model(self._model, self._tokenizer, task, self._arguments.max_length)

    def _write(self) -> None:
        content = {
            "arguments": asdict(self._arguments),
            "runs": [run.model_dump(mode="json") for run in self.runs],
        }
        fresh = self._arguments.out.with_suffix(".new")
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        fresh.replace(self._arguments.out)


def _check(arguments: Arguments) -> None:
    unknown = sorted(set(arguments.bases) - set(ANCHOR_BASES))
    if unknown or not arguments.bases or not arguments.learning_rates or not arguments.task:
        raise ConfigurationError(
            f"give bases of {', '.join(ANCHOR_BASES)}, learning rates and tasks; got {arguments.bases}"
        )
    for name in ("seeds", "steps", "test_examples"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"{name} is {getattr(arguments, name)}; give at least 1")


def _read_task(text: str, limit: int) -> _Split:
    name, equals, prefix = text.partition("=")
    if not equals:
        raise ConfigurationError(f"{text!r} should be NAME=PREFIX")
    train, valid, test = (
        read_examples(Path(f"{prefix}.{part}.jsonl")) for part in ("train", "valid", "test")
    )
    return _Split(name, Task(name, train, valid[:limit]), Task(name, train, test[:limit]))


def _read_runs(arguments: Arguments) -> list[Run]:
    if not arguments.out.exists():
        return []
    content: dict[str, Any] = json.loads(arguments.out.read_text(encoding="utf-8"))
    of_all = ("model", "public", "steps", "test_examples", "samples", "max_length", "rank", "blocks")
    for name in of_all:
        if content["arguments"][name] != json.loads(json.dumps(getattr(arguments, name), default=str)):
            raise ConfigurationError(
                f"{arguments.out} holds runs with {name} {content['arguments'][name]!r}; choose another --out"
            )
    return [Run.model_validate(run) for run in content["runs"]]


def _bases(side: Side, arguments: Arguments) -> dict[str, Bases]:
    texts = read_public_text(arguments.public, arguments.samples)
    reading = Reading(max_length=arguments.max_length, batch_size=16)
    needed = set(arguments.bases) - {"random", "weights"}
    moments = collect(side, side, texts, reading, outputs=True, gradients=True) if needed else None
    return {
        kind: anchor_basis(side, arguments.rank, kind, moments=moments)
        for kind in dict.fromkeys(arguments.bases)
    }


def rows(runs: Sequence[Run]) -> Iterator[tuple[str, str, float, int, str, str]]:
    """Task, basis, learning rate, seeds, and mean ± half of the 95 % interval of loss and accuracy."""
    for task, basis in dict.fromkeys((run.task, run.basis) for run in runs):
        members = [run for run in runs if (run.task, run.basis) == (task, basis)]
        figures = [interval([run.test[part] for run in members]) for part in (0, 1)]
        loss, accuracy = (f"{mean:.3f} ± {half:.3f}" for mean, half in figures)
        yield task, basis, members[0].learning_rate, len(members), loss, accuracy


def main(arguments: Sequence[str]) -> int:
    """Run `python -m fedmosaic.experiments.studies.alignment.basis`."""
    parsed = tyro.cli(Arguments, args=list(arguments))
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    runs = Study(parsed).run(Console(stderr=True))
    table = Table(
        title="Test part at the rate chosen on the validation part (mean ± half of the 95 % interval)"
    )
    for heading in ("task", "basis", "rate", "seeds", "loss", "accuracy"):
        table.add_column(heading)
    for task, basis, rate, seeds, loss, accuracy in rows(runs):
        table.add_row(task, basis, f"{rate:g}", str(seeds), loss, accuracy)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
