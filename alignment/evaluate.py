"""`fedmosaic align evaluate`: how much of what a core learnt in one model does it know in another?

P and Q are trained in both models for every task. Each core is moved, alone, to the other model and scored on
the task's test examples, beside what that model knows without any, and what its own core knows: the transfer
ratio of `fedmosaic.alignment.transfer`. Controls: a random core of the same norm, the very same core on
random bases, and the target trained on a few labels, from nothing and from the moved core.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import tyro
from peft import PeftModel
from rich.console import Console
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fedmosaic.alignment.activations import collect, open_side
from fedmosaic.alignment.checkpoint import Manifest, read_manifest
from fedmosaic.alignment.pairing import Reading
from fedmosaic.alignment.report import line_of, print_transfer
from fedmosaic.alignment.sources import parse_source
from fedmosaic.alignment.tokens import PublicText
from fedmosaic.alignment.transfer import (
    FEW,
    MOVED,
    RANDOM_BASES,
    RANDOM_CORE,
    RETRAINED,
    TUNED,
    ZERO_SHOT,
    Score,
    gradient_agreement,
    loss_and_accuracy,
    random_core,
    ratios,
    reading_agreement,
    summary,
)
from fedmosaic.client.colora import (
    get_basis,
    read_shared,
    set_active_branches,
    set_basis,
    set_trainable,
    write_shared,
)
from fedmosaic.client.colora.linear import draw_orthonormal
from fedmosaic.client.colora.state import shared_modules
from fedmosaic.client.model.examples import Example, collate, encode_examples, padding_token, read_examples
from fedmosaic.client.model.load import without_rename_notice
from fedmosaic.client.model.loss import example_losses, on_device_of, training_mode
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.client.model.training import TrainingSettings, train_local
from fedmosaic.protos.errors import ConfigurationError, StateError

_SCORED_AT_ONCE: Final = 16


@dataclass(frozen=True)
class Arguments:
    """Train P and Q in two models, move each core to the other without training, and score it there."""

    bases: tyro.conf.UseAppendAction[tuple[str, ...]]
    """LABEL=DIR of a finished `fedmosaic align`; repeat the option to compare alignments."""
    task: tyro.conf.UseAppendAction[tuple[str, ...]]
    """NAME=TRAIN.jsonl,TEST.jsonl with prompt, answer and choices; repeat the option for several."""
    pair: tuple[str, str]
    """Names of two models of the alignments."""
    out: Path | None = None
    """File for every single score, as JSON."""
    one_way: bool = False
    """Only from the first to the second model, not back."""
    seeds: int = 5
    """Number of runs; each has its own order of examples, random cores and random bases."""
    steps: int = 64
    """Optimizer steps in each model."""
    learning_rate: float = 3e-2
    """Of P and Q."""
    batch_size: int = 8
    """Examples per step."""
    few_labels: int = 32
    """Labelled examples of the control that trains the target on few, for a quarter of the steps."""
    max_length: int = 96
    """Most tokens per example."""
    test_examples: int = 200
    """Most test examples per task."""
    compared: int = 16
    """Examples per task on which the gradients of both models are compared."""
    dtype: str = "float32"
    """Weights of the models in memory: float32, bfloat16 or float16."""


@dataclass(frozen=True)
class Task:
    """A task's examples."""

    name: str
    train: tuple[Example, ...] = field(repr=False)
    test: tuple[Example, ...] = field(repr=False)


class LoadedModel:
    """A base model on which adapters are put and taken off again."""

    def __init__(self, name: str, manifest: Manifest, dtype: str = "float32") -> None:
        self.name = name
        self.base: PreTrainedModel
        self.tokenizer: PreTrainedTokenizerBase
        self.base, self.tokenizer = parse_source(manifest.of(name).model, dtype).load()

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

    def train(
        self, adapted: PeftModel, examples: Sequence[Example], settings: TrainingSettings
    ) -> np.ndarray:
        """Train the mounted adapter's cores from where they are, and return them."""
        encoded = encode_examples(self.tokenizer, examples, settings.max_length)
        train_local(adapted, encoded, settings, pad_token_id=padding_token(self.tokenizer))
        return read_shared(adapted)

    def score(self, model: nn.Module, task: Task, max_length: int) -> tuple[float, float]:
        """Calibrated loss and accuracy on a task's test examples, with or without an adapter."""
        choices = task.test[0].choices
        scores = Examiner(model, self.tokenizer, _SCORED_AT_ONCE, max_length).choice_scores(task.test)
        answers = [choices.index(example.answer) for example in task.test]
        return loss_and_accuracy(torch.tensor(scores), answers)

    def core_gradients(
        self, adapted: PeftModel, examples: Sequence[Example], max_length: int
    ) -> torch.Tensor:
        """(N, M, r² + r) float64 gradients by P and Q of each example's loss of choosing its answer.

        The choices' mean log-likelihoods are the logits, so how an answer is written does not matter.
        """
        rows = []
        cores = [module.core(adapted.active_adapter, "local") for module in shared_modules(adapted)]
        parameters = [parameter for core in cores for parameter in (core.weight, core.bias)]
        with training_mode(adapted, False):
            for example in examples:
                spoken = [replace(example, answer=choice) for choice in example.choices]
                batch = collate(
                    encode_examples(self.tokenizer, spoken, max_length), padding_token(self.tokenizer)
                )
                logs_C = functional.log_softmax(-example_losses(adapted, on_device_of(adapted, batch)), dim=0)
                answer = example.choices.index(example.answer)
                found = torch.autograd.grad(-logs_C[answer], parameters)
                rows.append(torch.cat([gradient.flatten() for gradient in found]).view(len(cores), -1))
        return torch.stack(rows).double().cpu()


def evaluate(arguments: Arguments, console: Console) -> tuple[list[Score], list[dict[str, Any]]]:
    """Measure the transfer and what both models agree in before training; see `Arguments`."""
    for name in ("seeds", "steps", "batch_size", "test_examples", "few_labels", "compared"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"{name} is {getattr(arguments, name)}; give at least 1.")
    if not 0.0 < arguments.learning_rate <= 10.0 or arguments.max_length < 8:
        raise ConfigurationError("learning_rate should be above 0 and at most 10, max_length at least 8.")
    folders = {label: Path(folder) for label, folder in map(parse_labelled, arguments.bases)}
    manifests = {label: find_manifest(folder) for label, folder in folders.items()}
    tasks = [read_task(text, arguments.test_examples) for text in arguments.task]
    for task in tasks:
        if len(task.train) <= arguments.few_labels:
            raise ConfigurationError(
                f"{task.name} has {len(task.train)} training examples; give more than the "
                f"{arguments.few_labels} of --few-labels, which are kept apart."
            )
    first = next(iter(manifests.values()))
    for manifest in manifests.values():
        for name in arguments.pair:
            if manifest.of(name).model != first.of(name).model:
                raise ConfigurationError(f"The alignments were made with different models called {name!r}.")
    pair = [LoadedModel(name, first, arguments.dtype) for name in arguments.pair]
    scores: list[Score] = []
    agreements: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        for task in tasks:
            for label, folder in folders.items():
                if seed == 0:
                    agreements.append(_agreement(arguments, label, folder, pair, task))
                    console.print(line_of(agreements[-1]), soft_wrap=True, highlight=False)
                found = list(_transfers(arguments, label, folder, pair, task, seed))
                scores += found
                # After every run: hours of them must not be lost with the last.
                if arguments.out is not None:
                    _write(arguments, scores, agreements, arguments.out)
                for score in found:
                    console.print(line_of(asdict(score)), soft_wrap=True, highlight=False)
    return scores, agreements


def _transfers(
    arguments: Arguments, label: str, folder: Path, pair: Sequence[LoadedModel], task: Task, seed: int
) -> Iterator[Score]:
    """All scores of one run: both cores are trained, each is the other direction's retrained one."""
    settings = _training(arguments, seed, arguments.steps)
    cores, own = [], []
    for model in pair:
        with model.mounted(folder / model.name) as adapted:
            cores.append(model.train(adapted, task.train[arguments.few_labels :], settings))
            own.append(model.score(adapted, task, arguments.max_length))
    for source, target in (0, 1), (1, 0):
        model, core = pair[target], cores[source]
        named = {ZERO_SHOT: model.score(model.base, task, arguments.max_length), RETRAINED: own[target]}
        # One way, all that is asked of the source is that it has learnt the task.
        if target == 1 or not arguments.one_way:
            named |= _moved(arguments, folder, model, task, core, seed)
        for variant, values in named.items():
            yield Score(task.name, pair[source].name, model.name, label, variant, seed, *values)


def _training(arguments: Arguments, seed: int, steps: int) -> TrainingSettings:
    return TrainingSettings(
        shared_learning_rate=arguments.learning_rate,
        steps=steps,
        per_device_train_batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        seed=seed,
    )


def _moved(
    arguments: Arguments, folder: Path, model: LoadedModel, task: Task, core: np.ndarray, seed: int
) -> dict[str, tuple[float, float]]:
    """Calibrated loss and accuracy of a core in another model than its own, and of the controls."""
    few = _training(arguments, seed, max(1, arguments.steps // 4))
    named = {}
    with model.mounted(folder / model.name) as adapted:
        rank = next(iter(get_basis(adapted).values()))[0].shape[0]
        for variant, given in ((MOVED, core), (RANDOM_CORE, random_core(core, rank, seed))):
            write_shared(adapted, given, "local")
            named[variant] = model.score(adapted, task, arguments.max_length)
        for variant, given in ((FEW, 0.0 * core), (TUNED, core)):
            write_shared(adapted, given, "local")
            model.train(adapted, task.train[: arguments.few_labels], few)
            named[variant] = model.score(adapted, task, arguments.max_length)
        scramble(adapted, seed)
        write_shared(adapted, core, "local")
        named[RANDOM_BASES] = model.score(adapted, task, arguments.max_length)
    return named


def _agreement(
    arguments: Arguments, label: str, folder: Path, pair: Sequence[LoadedModel], task: Task
) -> dict[str, Any]:
    """How much the two models' reading and core gradients agree on a task, before anything is trained."""
    examples = task.train[: arguments.compared]
    bases, gradients, manifest = [], [], find_manifest(folder)
    for model in pair:
        with model.mounted(folder / model.name) as adapted:
            bases.append(get_basis(adapted))
            gradients.append(model.core_gradients(adapted, examples, arguments.max_length))
            if model is pair[1]:
                scramble(adapted, 0)
                random = model.core_gradients(adapted, examples, arguments.max_length)
    modules = manifest.settings.get("target_modules") or None
    left, right = (
        open_side(model.base, model.tokenizer, manifest.of(model.name).layers, modules) for model in pair
    )
    texts = [PublicText(example.answer, example.prompt) for example in examples]
    inputs = collect(left, right, texts, Reading(arguments.max_length, _SCORED_AT_ONCE), None).inputs
    named = [
        {key: found[name] for key, name in side.names.items()}
        for side, found in zip((left, right), bases, strict=True)
    ]
    rank = next(iter(bases[0].values()))[0].shape[0]
    reading, size = reading_agreement(inputs, *named)
    mean, single = gradient_agreement(*gradients)
    return {
        "task": task.name,
        "bases": label,
        "reading": reading,
        "size": size,
        # What reaches Q is Bᵀ times what comes back to the outputs.
        "writing": gradient_agreement(*(found[..., -rank:] for found in gradients))[1],
        "gradient": mean,
        "gradient per example": single,
        "the same by layer": [
            gradient_agreement(*parts)[1]
            for parts in zip(*(found.chunk(len(left.layers), dim=1) for found in gradients), strict=True)
        ],
        "gradient, random bases": gradient_agreement(gradients[0], random)[0],
    }


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
    set_basis(adapted, fresh, label=RANDOM_BASES)


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


def _write(
    arguments: Arguments, scores: Sequence[Score], agreements: Sequence[Mapping[str, Any]], out: Path
) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "arguments": asdict(arguments),
        "ratios": ratios(scores),
        "agreements": agreements,
        "summary": summary(scores),
        "scores": [asdict(score) for score in scores],
    }
    out.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic align evaluate` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic align evaluate")
    logging.disable_progress_bar()
    scores, agreements = evaluate(parsed, Console(stderr=True))
    print_transfer(agreements, scores, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
