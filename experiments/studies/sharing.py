"""`fedmosaic experiments sharing`: what sharing brings under DP, against the number of members.

One group of members with one task, rank-r cores at the leading singular vectors of W on every layer, one
noisy step per round. Releases, all of them the product's own mechanism and accounting:

    sum     the group's noise is added once (`adapter.protection = "distributed-dp"`)
    own     every member adds its own (`dp` with one step per round)
    alone   one member by itself, without privacy

ε = inf is no noise. Gradients are taken in padded batches here, and the sums in the clear: that changes the
last bits, and no figure. Noise is seeded, so the releases carry no guarantee.
"""

import json
import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure
from peft import PeftModel
from torch import nn

from fedmosaic.client.colora import CoLoraConfig, read_shared, set_basis, write_shared
from fedmosaic.client.colora.state import shared_modules
from fedmosaic.client.dp.branch import only_shared_branch
from fedmosaic.client.dp.group_steps import GroupSum, mixed_gradient, shared_branch
from fedmosaic.client.model.examples import EncodedExample, Example, collate, encode_examples, padding_token
from fedmosaic.client.model.load import adapt, load_base_model
from fedmosaic.client.model.loss import example_losses
from fedmosaic.client.model.scoring import score_examples
from fedmosaic.experiments.scenario.metrics import Interval, interval
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.accounting.leverage import noise_share
from fedmosaic.privacy.mechanism.gaussian import ClippedSum, clipped_sum
from fedmosaic.privacy.mechanism.noise import SeededTestNoise, poisson_sample
from fedmosaic.privacy.mechanism.shares import ShareGrid, noisy_share, plan_grid

logger = logging.getLogger(__name__)

Release = Literal["sum", "own", "alone"]
FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_MODULES = (
    "self_attn.q_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_BATCH = 48
_MAX_LENGTH = 96


@dataclass(frozen=True)
class Settings:
    """Measure accuracy on one task for releases, ε and numbers of members; goes on where it stopped."""

    data: Path
    """Folder with clinc150/data_full.json."""
    model: Path
    """Folder of a pretrained model."""
    out: Path = Path("runs/sharing")
    """Cells are appended to cells.jsonl here; table.md and figure.svg are made of all of them."""
    members: tuple[int, ...] = (6, 12, 24, 48, 96)
    epsilons: tuple[float, ...] = (math.inf, 8.0, 3.0, 1.0)
    releases: tuple[Release, ...] = ("sum", "own", "alone")
    seeds: tuple[int, ...] = (0, 1, 2)
    examples: int = 45
    """Examples n of each member, all different."""
    intents: int = 40
    rank: int = 8
    steps: int = 100
    learning_rate: float = 0.03
    sampling_rate: float = 0.2
    clipping_norm: float = 1.0
    tests: int = 200
    tuning: bool = False
    """Score validation rows, which no member trains on, in place of test rows."""


@dataclass(frozen=True)
class Cell:
    """One measured cell.

    Attributes:
        release: who adds noise.
        members: m of the group; 1 for a member alone.
        epsilon: of each member, at δ = 1 / (examples of the group); inf for none.
        seed: of data, samples and noise.
        noise_multiplier: σ that protects each member.
        noise_over_signal: length of the noise over that of the last step's sum.
        accuracy: share of right answers.
        settings: everything else that it depends on.
    """

    release: Release
    members: int
    epsilon: float
    seed: int
    noise_multiplier: float
    noise_over_signal: float
    accuracy: float
    settings: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study from the command line."""
    settings = tyro.cli(Settings, args=arguments, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cells = run(settings)
    table = markdown(cells)
    (settings.out / "table.md").write_text(table + "\n", encoding="utf-8")
    draw(cells, settings.out / "figure.svg")
    print(table)
    return 0


def run(settings: Settings) -> list[Cell]:
    """Measure what is missing and return all cells of these settings."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path, label = settings.out / "cells.jsonl", _label(settings)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = {
        _key(cell): cell for cell in (Cell(**json.loads(line)) for line in lines) if cell.settings == label
    }
    bench: _Bench | None = None
    for release, members, epsilon, seed in _wanted(settings):
        if (release, members, epsilon, seed) in done:
            continue
        bench = bench or _Bench(settings)
        sigma, ratio, accuracy = bench.measure(release, members, epsilon, seed)
        cell = Cell(release, members, epsilon, seed, sigma, ratio, accuracy, label)
        done[_key(cell)] = cell
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
        logger.info("%s, m = %d, ε = %g, seed %d: %.3f", release, members, epsilon, seed, accuracy)
    return list(done.values())


def _wanted(settings: Settings) -> Iterator[tuple[Release, int, float, int]]:
    for seed in settings.seeds:
        for release in settings.releases:
            if release == "alone":
                yield release, 1, math.inf, seed
                continue
            for members, epsilon in product(settings.members, settings.epsilons):
                if release == "sum" or math.isfinite(epsilon):
                    yield release, members, epsilon, seed


def _key(cell: Cell) -> tuple[Release, int, float, int]:
    return cell.release, cell.members, cell.epsilon, cell.seed


def _label(settings: Settings) -> str:
    kept = (
        "examples",
        "intents",
        "rank",
        "steps",
        "learning_rate",
        "sampling_rate",
        "clipping_norm",
        "tests",
        "tuning",
    )
    return f"{settings.model.name}, " + ", ".join(f"{name} {getattr(settings, name)}" for name in kept)


class _Bench:
    """One model with cores at the singular vectors of its weights."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        torch.set_num_threads(1)
        model, self._tokenizer = load_base_model(settings.model)
        config = CoLoraConfig(
            r=settings.rank,
            alpha=2.0 * settings.rank,
            blocks=int(model.config.num_hidden_layers),
            target_modules=list(_MODULES),
            other_layers="none",
        )
        self._model = adapt(model, config)
        set_basis(self._model, _singular_vectors(self._model, settings.rank), label="weights")
        self._start = read_shared(self._model).astype(np.float64)

    def measure(
        self, release: Release, members: int, epsilon: float, seed: int
    ) -> tuple[float, float, float]:
        """σ, noise over signal at the last step, and accuracy."""
        settings = self._settings
        rows, tests = _rows(settings, members, seed)
        encoded = [encode_examples(self._tokenizer, own, _MAX_LENGTH) for own in rows]
        sigma, share, grid = self._noise(release, members, epsilon)
        source, batch = SeededTestNoise(10_000 + seed), settings.sampling_rate * settings.examples
        gradients: list[FloatArray | None] = []
        ratio = 0.0
        with only_shared_branch(self._model) as cores:
            for _ in range(settings.steps):
                self._write(gradients)
                chosen = [
                    [own[i] for i in poisson_sample(len(own), settings.sampling_rate, source)]
                    for own in encoded
                ]
                total = self._sum(cores, [example for own in chosen for example in own], grid)
                y = total.units.astype(np.float64)
                if share:
                    nothing = ClippedSum.empty(len(y))
                    shares = [noisy_share(nothing, grid, source) for _ in range(members)]
                    noise = np.sum(shares, axis=0).astype(np.float64)
                    ratio = float(np.linalg.norm(noise) / max(1.0, float(np.linalg.norm(y))))
                    y = y + noise
                y *= settings.clipping_norm / grid.steps
                gradients.append(mixed_gradient([GroupSum(y, members * batch)], [1.0]))
            self._write(gradients)
            accuracy = score_examples(self._model, self._tokenizer, tests, 64, max_length=_MAX_LENGTH).value
        return sigma, ratio, accuracy

    def _write(self, gradients: Sequence[FloatArray | None]) -> None:
        settings = self._settings
        theta = shared_branch(self._start, gradients, settings.learning_rate, settings.steps)
        write_shared(self._model, theta.astype(np.float32), "local")

    def _noise(self, release: Release, members: int, epsilon: float) -> tuple[float, float, ShareGrid]:
        """σ of the claim, each member's own noise, and the grid."""
        settings = self._settings
        sigma = 0.0
        if math.isfinite(epsilon):
            delta = 1.0 / (settings.examples * members)
            sigma = noise_multiplier_for(epsilon, delta, [], settings.sampling_rate, settings.steps)
        share = sigma
        if release == "sum" and members > 1:
            share = noise_share(sigma, members, max(1, members // 6))
        batch = math.ceil(settings.sampling_rate * settings.examples)
        return sigma, share, replace(plan_grid(members, batch, share or 1.0, 62), noise=share)

    def _sum(
        self, cores: Mapping[str, nn.Linear], chosen: Sequence[EncodedExample], grid: ShareGrid
    ) -> ClippedSum:
        total = ClippedSum.empty(len(self._start))
        ordered = sorted(chosen, key=lambda example: len(example.input_ids))
        for start in range(0, len(ordered), _BATCH):
            rows = _gradients(
                self._model, cores, ordered[start : start + _BATCH], padding_token(self._tokenizer)
            )
            total = total + clipped_sum(rows, self._settings.clipping_norm, grid.steps)
        return total


def _gradients(
    model: PeftModel, cores: Mapping[str, nn.Linear], batch: Sequence[EncodedExample], padding: int
) -> FloatArray:
    """(B, D) gradients of each example's loss: Σ_t e_t u_tᵀ and Σ_t e_t, of what enters and leaves a core."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = (inputs[0], output)

        return hook

    hooks = [core.register_forward_hook(remember(name)) for name, core in cores.items()]
    try:
        losses = example_losses(model, collate(batch, padding))
    finally:
        for hook in hooks:
            hook.remove()
    back = torch.autograd.grad(losses.sum(), [seen[name][1] for name in cores])
    parts = []
    for name, e_BTR in zip(cores, back, strict=True):
        u_BTR = seen[name][0]
        parts += [torch.einsum("btr,bts->brs", e_BTR, u_BTR).flatten(1), e_BTR.sum(1)]
    return np.asarray(torch.cat(parts, dim=1).detach().double().numpy())


def _singular_vectors(model: PeftModel, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    bases = {}
    for layer in shared_modules(model):
        left, _, right = torch.linalg.svd(
            cast(nn.Linear, layer.get_base_layer()).weight.detach().double(), full_matrices=False
        )
        bases[layer.settings["default"].placement.name] = (
            right[:rank].contiguous(),
            left[:, :rank].contiguous(),
        )
    return bases


def _rows(settings: Settings, members: int, seed: int) -> tuple[list[list[Example]], list[Example]]:
    """Each member's own examples, and test rows (or rows that no member has, for tuning)."""
    content = json.loads((settings.data / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    intents = sorted({label for _, label in content["train"]})
    chosen = random.Random(0).sample(intents, settings.intents)  # noqa: S311 - a choice of data
    choices = tuple(intent.replace("_", " ") for intent in chosen)

    def examples(part: str) -> list[Example]:
        return [
            Example(f"{part}-{index}", f"Request: {text}\nIntent?", label.replace("_", " "), choices)
            for index, (text, label) in enumerate(content[part])
            if label in chosen
        ]

    pool, tests = examples("train") + examples("val"), examples("test")
    random.Random(1).shuffle(tests)  # noqa: S311
    random.Random(2).shuffle(pool)  # noqa: S311
    if settings.tuning:
        tests, pool = pool[: settings.tests], pool[settings.tests :]
    random.Random(seed).shuffle(pool)  # noqa: S311
    if len(pool) < members * settings.examples:
        raise ValueError(f"{len(pool)} examples for {members} members of {settings.examples}")
    own = [pool[i * settings.examples : (i + 1) * settings.examples] for i in range(members)]
    return own, tests[: settings.tests]


def gains(cells: Sequence[Cell]) -> dict[tuple[Release, float, int], Interval]:
    """Accuracy above that of a member alone, paired by seed, by release, ε and number of members."""
    alone = {cell.seed: cell.accuracy for cell in cells if cell.release == "alone"}
    found: dict[tuple[Release, float, int], list[float]] = {}
    for cell in cells:
        if cell.release != "alone" and cell.seed in alone:
            gained = found.setdefault((cell.release, cell.epsilon, cell.members), [])
            gained.append(cell.accuracy - alone[cell.seed])
    measured = {key: interval(values) for key, values in found.items()}
    return {key: value for key, value in measured.items() if value is not None}


def markdown(cells: Sequence[Cell]) -> str:
    """The table: a row per release and ε, a column per number of members, points above a member alone."""
    found = gains(cells)
    members = sorted({m for _, _, m in found})
    lines = [
        "| noise | ε | " + " | ".join(f"m = {m}" for m in members) + " |",
        "| --- | ---: |" + " ---: |" * len(members),
    ]
    for release, epsilon in sorted({(r, e) for r, e, _ in found}, key=lambda key: (key[0] != "sum", -key[1])):
        shown = [_points(found.get((release, epsilon, m))) for m in members]
        words = (
            {"sum": "of the group", "own": "of each member"}[release] if math.isfinite(epsilon) else "none"
        )
        lines.append(
            f"| {words} | {'∞' if math.isinf(epsilon) else f'{epsilon:g}'} | " + " | ".join(shown) + " |"
        )
    alone = interval([cell.accuracy for cell in cells if cell.release == "alone"])
    return "\n".join(
        [
            *lines,
            "",
            f"Points of accuracy above a member alone ({_points(alone)}), ± half of a 95 % interval.",
        ]
    )


def _points(value: Interval | None) -> str:
    if value is None:
        return "–"
    half = "" if value.half_width is None else f" ± {100 * value.half_width:.1f}"
    return f"{100 * value.mean:.1f}{half}"


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw the gain over the number of members, one line per release and ε."""
    found = gains(cells)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for release, epsilon in sorted({(r, e) for r, e, _ in found}, key=lambda key: (key[0] != "sum", -key[1])):
        points = sorted((m, value) for (r, e, m), value in found.items() if (r, e) == (release, epsilon))
        name = (
            "no noise"
            if math.isinf(epsilon)
            else f"ε = {epsilon:g}, noise of {'the group' if release == 'sum' else 'each member'}"
        )
        panel.errorbar(
            [m for m, _ in points],
            [100 * value.mean for _, value in points],
            yerr=[100 * (value.half_width or 0.0) for _, value in points],
            marker="o",
            linestyle="-" if release == "sum" else ":",
            label=name,
        )
    panel.axhline(0.0, color="black", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sorted({m for _, _, m in found}), [str(m) for m in sorted({m for _, _, m in found})])
    panel.set_xlabel("members of the group")
    panel.set_ylabel("points above a member alone")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    # Letters as text keep an SVG small and its words searchable; without a date it repeats byte by byte.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedmosaic"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
