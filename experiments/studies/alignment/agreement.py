"""Why cores move well from one model to another, or do not: agreements that need no training of the target.

    python -m fedmosaic.experiments.studies.alignment.agreement --bases LABEL=DIR --pair SOURCE TARGET \
        --task NAME=TRAIN.jsonl,TEST.jsonl

What is compared, on examples of the task, which the alignment has not seen:

    inputs      correlation of P A x of both models at aligned positions, P random or as the source learnt it
    size        root mean square of P A x in the source over that in the target
    gradients   cosine of ∂L/∂(P, Q) of both models at P = Q = 0, L the loss of the answer, or that of
                choosing among the answers alone, which knows nothing of how an answer is written
    core        cosine of the core that the source learnt and the target's steepest descent at P = Q = 0

Beside the gradients stands what random orthonormal bases of the target give, and what two halves of the
examples give in the target itself, which no alignment can exceed.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch
import tyro
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers.utils import logging

from fedmosaic.alignment.activations import ModuleKey, collect, open_side
from fedmosaic.alignment.anchor import BasisPair
from fedmosaic.alignment.checkpoint import Manifest
from fedmosaic.alignment.evaluate import (
    LoadedModel,
    find_manifest,
    find_model,
    parse_labelled,
    read_task,
    scramble,
)
from fedmosaic.alignment.moments import Moments
from fedmosaic.alignment.pairing import Reading
from fedmosaic.alignment.subspace import latent_scale
from fedmosaic.alignment.tokens import PublicText
from fedmosaic.client.colora import get_basis
from fedmosaic.client.colora.state import shared_modules
from fedmosaic.client.model.examples import Example, collate, encode_examples, padding_token
from fedmosaic.client.model.loss import example_losses, on_device_of, training_mode
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.protos.errors import ConfigurationError

_AT_ONCE: Final = 16

Bases = Mapping[ModuleKey, BasisPair]
Objective = Callable[[LoadedModel, PeftModel, Sequence[Example], int], torch.Tensor]
"""Sum of the losses of some examples, cut to a number of tokens."""


@dataclass(frozen=True)
class Arguments:
    """Compare two aligned models on a task: their latents, their gradients, and what one of them learns."""

    bases: tyro.conf.UseAppendAction[tuple[str, ...]]
    """LABEL=DIR of a finished `fedmosaic align`; repeat the option to compare alignments."""
    task: str
    """NAME=TRAIN.jsonl,TEST.jsonl with prompt, answer and choices."""
    pair: tuple[str, str]
    """Names of two models of the alignments, source and target."""
    out: Path | None = None
    """File for the figures, as JSON."""
    examples: int = 32
    """Examples per gradient; twice as many are read."""
    steps: int = 64
    """Optimizer steps on the source."""
    learning_rate: float = 5e-3
    """Of P and Q."""
    max_length: int = 96
    """Most tokens per example."""
    seed: int = 0
    """Seed of the training, of random cores and of random bases."""


def _losses(model: LoadedModel, adapted: PeftModel, examples: Sequence[Example], length: int) -> torch.Tensor:
    encoded = encode_examples(model.tokenizer, examples, length)
    return example_losses(adapted, on_device_of(adapted, collate(encoded, padding_token(model.tokenizer))))


def answer_loss(
    model: LoadedModel, adapted: PeftModel, examples: Sequence[Example], length: int
) -> torch.Tensor:
    """Sum of the mean losses of the answers' tokens."""
    return _losses(model, adapted, examples, length).sum()


def choice_loss(
    model: LoadedModel, adapted: PeftModel, examples: Sequence[Example], length: int
) -> torch.Tensor:
    """Sum of the losses of choosing the answer, the choices' mean log-likelihoods taken as logits."""
    rows = [replace(example, answer=choice) for example in examples for choice in example.choices]
    sizes = [len(example.choices) for example in examples]
    parts = torch.split(-_losses(model, adapted, rows, length), sizes)
    chosen = [
        functional.log_softmax(part, dim=0)[example.choices.index(example.answer)]
        for part, example in zip(parts, examples, strict=True)
    ]
    return -torch.stack(chosen).sum()


def core_gradient(
    model: LoadedModel, adapted: PeftModel, examples: Sequence[Example], objective: Objective, length: int
) -> torch.Tensor:
    """(modules, r² + r) float64 gradient of the mean loss by P and Q, in the order of the shared vector."""
    adapted.zero_grad()
    choices = len(examples[0].choices) if objective is choice_loss else 1
    step = max(1, _AT_ONCE // choices)
    with training_mode(adapted, False):
        for start in range(0, len(examples), step):
            total = objective(model, adapted, examples[start : start + step], length)
            (total / len(examples)).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    cores = [module.core(adapted.active_adapter, "local") for module in shared_modules(adapted)]
    rows = [
        torch.cat([part.grad.flatten() for part in (core.weight, core.bias) if part.grad is not None])
        for core in cores
    ]
    return torch.stack(rows).double().cpu()


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    """Cosine of two tensors taken as vectors; 0 where one of them is 0."""
    scale = float(left.norm() * right.norm())
    return float((left * right).sum()) / scale if scale > 0 else 0.0


def latent_agreement(
    inputs: Mapping[ModuleKey, Moments], source: Bases, target: Bases, cores_MRR: torch.Tensor
) -> tuple[float, float]:
    """Mean correlation of P A x of two models, and geometric mean of the ratio of their sizes.

    There is one P per module, (modules, r, r), modules in the order of the shared vector; sizes are the
    source's over the target's.
    """
    correlations: list[float] = []
    scales: list[float] = []
    for core, key in zip(cores_MRR.double(), sorted(inputs), strict=True):
        moments = inputs[key].centred()
        left, right = core @ source[key][0].double(), core @ target[key][0].double()
        joint = float(((left @ moments.cross_DE) * right).sum())
        own = float(((left @ moments.anchor_DD) * left).sum())
        other = float(((right @ moments.model_EE) * right).sum())
        correlations.append(joint / math.sqrt(own * other) if own > 0 and other > 0 else 0.0)
        scales.append(math.log(latent_scale(moments, left, right)))
    return math.fsum(correlations) / len(correlations), math.exp(math.fsum(scales) / len(scales))


class Pair:
    """Source and target of one comparison, loaded once for all alignments."""

    def __init__(self, arguments: Arguments, manifest: Manifest) -> None:
        """Load both models and the task."""
        self._arguments = arguments
        self._source, self._target = (LoadedModel(name, manifest) for name in arguments.pair)
        self._task = read_task(arguments.task, 1)
        wanted = 2 * arguments.examples
        if len(self._task.train) < wanted:
            raise ConfigurationError(f"the task has {len(self._task.train)} examples; give at least {wanted}")
        self._halves = self._task.train[: arguments.examples], self._task.train[arguments.examples : wanted]

    def compare(self, label: str, folder: Path) -> dict[str, str | float]:
        """Figures of one alignment, in [−1, 1] but for `size_ratio`, means over modules where there are many.

        `loss` is the answer's, `choice` that of choosing; `halves` of the target's examples, `gradient` of
        both models, `unaligned` the same with random bases of the target.
        """
        arguments = self._arguments
        with self._source.mounted(folder / self._source.name) as adapted:
            own = self._gradients(self._source, adapted, 0)
            settings = TrainingSettings(
                shared_learning_rate=arguments.learning_rate,
                steps=arguments.steps,
                max_length=arguments.max_length,
                seed=arguments.seed,
            )
            trained = self._source.train(adapted, self._task, settings)
            core = torch.from_numpy(trained).double().reshape(own[0].shape)
            source = get_basis(adapted)
        with self._target.mounted(folder / self._target.name) as adapted:
            there, other = (self._gradients(self._target, adapted, half) for half in (0, 1))
            target = get_basis(adapted)
            scramble(adapted, arguments.seed)
            random = self._gradients(self._target, adapted, 0)
        figures = self._latents(folder, source, target, core)
        for index, name in enumerate(("loss", "choice")):
            figures[f"{name}_halves"] = cosine(there[index], other[index])
            figures[f"{name}_gradient"] = cosine(own[index], there[index])
            figures[f"{name}_unaligned"] = cosine(own[index], random[index])
            figures[f"core_{name}"] = cosine(core, -there[index])
        figures["core_unaligned"] = cosine(core, -random[1])
        return {"basis": label, **figures}

    def _gradients(
        self, model: LoadedModel, adapted: PeftModel, half: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        examples, length = self._halves[half], self._arguments.max_length
        return (
            core_gradient(model, adapted, examples, answer_loss, length),
            core_gradient(model, adapted, examples, choice_loss, length),
        )

    def _latents(
        self,
        folder: Path,
        source: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        target: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        core: torch.Tensor,
    ) -> dict[str, float]:
        manifest = find_manifest(folder)
        here, there = (
            open_side(model.base, model.tokenizer, find_model(manifest, model.name).layers)
            for model in (self._source, self._target)
        )
        texts = [PublicText(example.answer, example.prompt) for example in self._task.train]
        reading = Reading(max_length=self._arguments.max_length, batch_size=_AT_ONCE)
        inputs = collect(here, there, texts[: 2 * self._arguments.examples], reading, outputs=False).inputs
        left, right = (
            {key: found[name] for key, name in side.names.items()}
            for side, found in zip((here, there), (source, target), strict=True)
        )
        rank = next(iter(left.values()))[0].shape[0]
        learnt = core[:, : rank * rank].reshape(-1, rank, rank)
        generator = torch.Generator().manual_seed(self._arguments.seed)
        drawn = torch.randn(learnt.shape, generator=generator, dtype=torch.float64)
        correlation, size = latent_agreement(inputs, left, right, learnt)
        return {
            "inputs_random": latent_agreement(inputs, left, right, drawn)[0],
            "inputs_core": correlation,
            "size_ratio": size,
        }


def compare_all(arguments: Arguments) -> list[dict[str, str | float]]:
    """Compare the pair under every alignment; see `Arguments`."""
    for name in ("examples", "steps"):
        if getattr(arguments, name) < 1:
            raise ConfigurationError(f"{name} is {getattr(arguments, name)}; give at least 1")
    folders = {label: Path(folder) for label, folder in map(parse_labelled, arguments.bases)}
    pair = Pair(arguments, find_manifest(next(iter(folders.values()))))
    return [pair.compare(label, folder) for label, folder in folders.items()]


def print_table(found: Sequence[Mapping[str, str | float]], console: Console) -> None:
    """One column per alignment, one row per figure."""
    names = [str(column["basis"]) for column in found]
    table = Table("figure", *names, title="Agreement of source and target")
    for name in list(found[0])[1:]:
        table.add_row(name.replace("_", ", "), *(f"{column[name]:.3f}" for column in found))
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    """Run `python -m fedmosaic.experiments.studies.alignment.agreement`."""
    parsed = tyro.cli(Arguments, args=list(arguments))
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    found = compare_all(parsed)
    if parsed.out is not None:
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"arguments": asdict(parsed), "agreements": found}
        parsed.out.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    print_table(found, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
