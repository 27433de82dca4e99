"""`fedmosaic align evaluate`: does a core trained in one model work in another that never trained?

P and Q are trained on the source model for a task and moved, alone, to the target model. Its loss and
accuracy on that task's test examples are compared between alignments, a target with random orthonormal bases
(the very same P and Q, unaligned), and the target without any adapter.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import torch
import tyro
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from scipy.stats import sem, t
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fedmosaic.alignment.checkpoint import Finished, Manifest, read_manifest
from fedmosaic.alignment.sources import parse_source
from fedmosaic.client.colora import (
    get_basis,
    read_shared,
    set_active_branches,
    set_basis,
    set_trainable,
    write_shared,
)
from fedmosaic.client.colora.basis import draw_orthonormal
from fedmosaic.client.model.examples import Example, collate, encode_examples, padding_token, read_examples
from fedmosaic.client.model.load import without_rename_notice
from fedmosaic.client.model.loss import example_losses, on_device_of, training_mode
from fedmosaic.client.model.scoring import most_likely_choices
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.protos.errors import ConfigurationError, StateError

_SCORED_AT_ONCE: Final = 16
UNALIGNED: Final = "unaligned"
ZERO_SHOT: Final = "zero-shot"
SOURCE: Final = "source itself"


@dataclass(frozen=True)
class Arguments:
    """Train P and Q on one model, move them to another without training, and score it there.

    The first --bases is the one whose cores the unaligned control uses.
    """

    bases: tyro.conf.UseAppendAction[tuple[str, ...]]
    """LABEL=DIR of a finished `fedmosaic align`; repeat the option to compare alignments."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]]
    """NAME=TRAIN.jsonl,TEST.jsonl with prompt, answer and choices; repeat the option for several."""
    pair: tuple[str, str]
    """Names of two models of the alignments, source and target."""
    out: Path | None = None
    """File for every single score, as JSON."""
    one_way: bool = False
    """Only from the first to the second model, not back."""
    source_only: bool = False
    """Only train and score on the source, to compare what bases can learn."""
    seeds: int = 5
    """Number of runs; each has its own order of examples and its own random bases of the control."""
    steps: int = 100
    """Optimizer steps on the source."""
    learning_rate: float = 5e-3
    """Of P and Q."""
    batch_size: int = 8
    """Examples per step."""
    max_length: int = 96
    """Most tokens per example."""
    test_examples: int = 200
    """Most test examples per task."""
    core_scales: tuple[float, ...] = (1.0,)
    """Factors on P and Q in the target: below 1, the target takes only part of what the source learnt."""


@dataclass(frozen=True)
class Score:
    """One score of a trained or untrained target on one task.

    The variant is the label of the alignment, or `unaligned`, `zero-shot`, or `source itself: LABEL`; the
    loss is a mean in nats per answer token, the accuracy a share of right choices.
    """

    task: str
    source: str
    target: str
    variant: str
    seed: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Task:
    """A task's examples."""

    name: str
    train: tuple[Example, ...] = field(repr=False)
    test: tuple[Example, ...] = field(repr=False)


class LoadedModel:
    """A base model on which adapters are put and taken off again."""

    def __init__(self, name: str, manifest: Manifest) -> None:
        self.name = name
        self.base: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self.base, self.tokenizer = parse_source(find_model(manifest, name).model).load()

    @contextmanager
    def mounted(self, folder: Path) -> Iterator[PeftModel]:
        """The model with the aligned adapter of a folder; only its local cores act and are trained."""
        if not (folder / "adapter_config.json").is_file():
            raise StateError(f"{folder} holds no checkpoint though the manifest names it; align again.")
        with without_rename_notice():
            adapted = PeftModel.from_pretrained(self.base, str(folder), is_trainable=True)
        set_active_branches(adapted, {"local"})
        set_trainable(adapted, {"local"}, layers="shared")
        set_trainable(adapted, set(), layers="family")
        try:
            yield adapted
        finally:
            adapted.unload()

    def train(self, adapted: PeftModel, task: Task, settings: TrainingSettings) -> np.ndarray:
        """Train the mounted adapter's cores on a task, and return them."""
        encoded = encode_examples(self.tokenizer, task.train, settings.max_length)
        train_local(adapted, encoded, settings, pad_token_id=padding_token(self.tokenizer))
        return read_shared(adapted)

    def score(self, model: nn.Module, task: Task, max_length: int) -> tuple[float, float]:
        """Mean loss (nats per token) and accuracy on a task's test examples, with or without an adapter."""
        encoded = encode_examples(self.tokenizer, task.test, max_length)
        pad = padding_token(self.tokenizer)
        total = 0.0
        with training_mode(model, False), torch.no_grad():
            for start in range(0, len(encoded), _SCORED_AT_ONCE):
                batch = on_device_of(model, collate(encoded[start : start + _SCORED_AT_ONCE], pad))
                total += float(example_losses(model, batch).sum())
        rows, test = _SCORED_AT_ONCE, task.test
        chosen = most_likely_choices(model, self.tokenizer, test, rows, max_length=max_length)
        right = sum(e.choices[index] == e.answer for e, index in zip(test, chosen, strict=True))
        return total / len(encoded), right / len(test)


def evaluate(arguments: Arguments, console: Console) -> list[Score]:
    """Measure the transfer; see `Arguments`."""
    for name in ("seeds", "steps", "batch_size", "test_examples"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"{name} is {getattr(arguments, name)}; give at least 1.")
    if not 0.0 < arguments.learning_rate <= 10.0 or arguments.max_length < 8:
        raise ConfigurationError("learning_rate should be above 0 and at most 10, max_length at least 8.")
    folders = {label: Path(folder) for label, folder in map(parse_labelled, arguments.bases)}
    manifests = {label: find_manifest(folder) for label, folder in folders.items()}
    tasks = [read_task(text, arguments.test_examples) for text in arguments.task]
    first = next(iter(manifests.values()))
    for manifest in manifests.values():
        for name in arguments.pair:
            if find_model(manifest, name).model != find_model(first, name).model:
                raise ConfigurationError(f"The alignments were made with different models called {name!r}.")
    loaded = [LoadedModel(name, first) for name in arguments.pair]
    ways = [(0, 1)] if arguments.one_way else [(0, 1), (1, 0)]
    scores: list[Score] = []
    for source, target in ways:
        for task in tasks:
            for found in _transfers(arguments, folders, loaded[source], loaded[target], task):
                scores += found
                # After every run: hours of them must not be lost with the last.
                _write(arguments.out, arguments, scores)
                line = ", ".join(f"{s.variant} {s.loss:.3f}/{s.accuracy:.3f}" for s in found)
                where = f"{task.name}, {loaded[source].name} → {loaded[target].name}, seed {found[0].seed}"
                console.print(f"{where}: {line}", soft_wrap=True)
    return scores


def _transfers(
    arguments: Arguments,
    folders: Mapping[str, Path],
    source: LoadedModel,
    target: LoadedModel,
    task: Task,
) -> Iterator[list[Score]]:
    """The scores of one run after the other."""
    settings = TrainingSettings(
        shared_learning_rate=arguments.learning_rate,
        steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
    zero_shot = target.score(target.base, task, arguments.max_length)
    for seed in range(arguments.seeds):
        named = [(ZERO_SHOT, zero_shot)]
        for index, (label, folder) in enumerate(folders.items()):
            with source.mounted(folder / source.name) as adapted:
                core = source.train(adapted, task, settings.model_copy(update={"seed": seed}))
                named.append((f"{SOURCE}: {label}", source.score(adapted, task, arguments.max_length)))
            if arguments.source_only:
                continue
            with target.mounted(folder / target.name) as adapted:
                named += _scaled(arguments, target, adapted, task, core, label)
                if index == 0:
                    scramble(adapted, seed)
                    named += _scaled(arguments, target, adapted, task, core, UNALIGNED)
        yield [
            Score(task.name, source.name, target.name, variant, seed, *values) for variant, values in named
        ]


def _scaled(
    arguments: Arguments,
    target: LoadedModel,
    adapted: PeftModel,
    task: Task,
    core: np.ndarray,
    variant: str,
) -> Iterator[tuple[str, tuple[float, float]]]:
    for factor in arguments.core_scales:
        write_shared(adapted, factor * core, "local")
        name = variant if factor == 1.0 else f"{variant} × {factor:g}"
        yield name, target.score(adapted, task, arguments.max_length)


def scramble(adapted: PeftModel, seed: int) -> None:
    """Replace a mounted adapter's bases by random orthonormal ones, of another draw than any alignment's."""
    fresh = {}
    for index, (name, (a, b)) in enumerate(get_basis(adapted).items()):
        draw = 1_000_003 * (seed + 1) + 2 * index
        rank = a.shape[0]
        fresh[name] = (
            draw_orthonormal(a.shape[1], rank, draw).T,
            draw_orthonormal(b.shape[0], rank, draw + 1),
        )
    set_basis(adapted, fresh, label=UNALIGNED)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; infinite for a single value."""
    count = len(values)
    return fmean(values), float(t.ppf(0.975, count - 1) * sem(values)) if count > 1 else math.inf


def summary(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Mean and interval per task, direction and variant, in the order of the scores."""
    groups: dict[tuple[str, str, str, str], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.task, score.source, score.target, score.variant), []).append(score)
    rows: list[dict[str, Any]] = []
    for key, members in groups.items():
        row: dict[str, Any] = dict(zip(("task", "source", "target", "variant"), key, strict=True))
        row["seeds"] = len(members)
        for name in ("loss", "accuracy"):
            row[name], row[f"{name}_half_width"] = interval([getattr(score, name) for score in members])
        rows.append(row)
    return rows


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Cores moved without training (mean ± half of the 95 % interval)")
    for heading in ("task", "direction", "variant", "loss", "accuracy"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row["task"],
            f"{row['source']} → {row['target']}",
            row["variant"],
            f"{row['loss']:.3f} ± {row['loss_half_width']:.3f}",
            f"{row['accuracy']:.3f} ± {row['accuracy_half_width']:.3f}",
        )
    return table


def find_model(manifest: Manifest, name: str) -> Finished:
    """The checkpoint of a model by the name of its folder."""
    known = {entry.folder: entry for entry in (manifest.anchor, *manifest.models)}
    if name not in known:
        raise ConfigurationError(f"There is no aligned model {name!r}; there are {', '.join(known)}.")
    return known[name]


def find_manifest(folder: Path) -> Manifest:
    """What a folder of `fedmosaic align` holds."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise ConfigurationError(f"{folder} holds no alignment; run `fedmosaic align --out {folder}` first.")
    return manifest


def parse_labelled(text: str) -> tuple[str, str]:
    """Split `LABEL=VALUE`."""
    label, equals, rest = text.partition("=")
    if not equals or not label or not rest:
        raise ConfigurationError(f"{text!r} should be LABEL=VALUE.")
    return label, rest


def read_task(text: str, test_examples: int) -> Task:
    """Read `NAME=TRAIN.jsonl,TEST.jsonl`, with at most so many test examples."""
    name, rest = parse_labelled(text)
    train, comma, test = rest.partition(",")
    if not comma:
        raise ConfigurationError(f"The task {name!r} should be {name}=TRAIN.jsonl,TEST.jsonl.")
    return Task(name, read_examples(Path(train)), read_examples(Path(test))[:test_examples])


def _write(out: Path | None, arguments: Arguments, scores: Sequence[Score]) -> None:
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "arguments": asdict(arguments),
        "summary": summary(scores),
        "scores": [asdict(score) for score in scores],
    }
    out.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic align evaluate` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic align evaluate")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    scores = evaluate(parsed, Console(stderr=True))
    Console().print(_table(summary(scores)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
