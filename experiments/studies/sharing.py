"""`fedmosaic experiments sharing`: what sharing brings under DP, against the number of members.

One group of members with one task, rank-r cores at the leading singular vectors of W on every layer or
the last ones, one noisy step per round. Releases, all of them the product's own mechanism and accounting:

    sum     the group's noise is added once (`adapter.protection = "distributed-dp"`)
    own     every member adds its own (`dp` with one step per round)
    alone   one member by itself, without privacy

ε = inf is no noise. Gradients are taken in padded batches through merged weights here, and the sums in the
clear: that changes the last bits, and no figure. Noise is seeded, so the releases carry no guarantee.
"""

import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import tyro
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from fedmosaic.client.colora import CoLoraConfig, read_shared, set_basis, write_shared
from fedmosaic.client.colora.linear import CoLoraLinear
from fedmosaic.client.colora.state import shared_modules
from fedmosaic.client.dp.engine import only_shared_branch
from fedmosaic.client.model.examples import (
    IGNORED,
    EncodedExample,
    Example,
    collate,
    encode_examples,
    padding_token,
)
from fedmosaic.client.model.load import adapt, load_base_model
from fedmosaic.client.model.loss import example_losses
from fedmosaic.client.model.scoring import Examiner
from fedmosaic.client.round.group_steps import FloatArray, GroupSum, mixed_gradient, shared_branch
from fedmosaic.experiments.comparison.tables import percent
from fedmosaic.experiments.scenario.metrics import Interval, interval, markdown_table
from fedmosaic.experiments.studies.sharing_figure import draw
from fedmosaic.experiments.tasks.relevance_sets import CLINC_DOMAINS
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.accounting.leverage import noise_share
from fedmosaic.privacy.federation.roster import taking_part
from fedmosaic.privacy.federation.terms import ScheduleTerms
from fedmosaic.privacy.mechanism.gaussian import ClippedSum, clipped_sum
from fedmosaic.privacy.mechanism.noise import SeededTestNoise, poisson_sample
from fedmosaic.privacy.mechanism.shares import ShareGrid, noisy_share, plan_grid

logger = logging.getLogger(__name__)

Release = Literal["sum", "own", "alone"]
Task = Literal["intents", "domains", "shifted", "contradicting"]

_MODULES = [f"self_attn.{n}_proj" for n in "qvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
_FORMS = ("Request: {}\nIntent?", "A letter says: {}\nIt is about")
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
    task: Task = "intents"
    """Which intent, or which of ten domains; shifted: another form of request, every answer that of the next
    intent; contradicting: every second member and test row is shifted."""
    examples: int = 24
    """Examples n of each member, all different."""
    intents: int = 20
    rank: int = 16
    layers: int | None = None
    """Cores on the last so many layers only, in place of all."""
    form: str | None = None
    """What stands around a request, {}, in place of the task's own form; the answer follows in its line."""
    steps: int = 150
    sampled: int | None = None
    """Members that take part in a step, by turns; all of them if left out."""
    learning_rate: float = 0.015
    sampling_rate: float = 0.2
    clipping_norm: float = 1.0
    tests: int = 400
    tuning: bool = False
    """Score validation rows, which no member trains on, in place of test rows."""


@dataclass(frozen=True)
class Cell:
    """One measured cell; `settings` are what it depends on besides.

    `epsilon` is of each member, at δ = 1 / (examples of the group), or inf; `noise_multiplier` is the σ that
    protects it, and `noise_over_signal` compares lengths in the last step's sum.
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
    draw(gains(cells), settings.out / "figure.svg")
    print(table)
    return 0


def run(settings: Settings) -> list[Cell]:
    """Measure what is missing and return all cells of these settings."""
    settings.out.mkdir(parents=True, exist_ok=True)
    path, label = settings.out / "cells.jsonl", _label(settings)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    cells = [cell for cell in (Cell(**json.loads(line)) for line in lines) if cell.settings == label]
    done = {(cell.release, cell.members, cell.epsilon, cell.seed) for cell in cells}
    bench: _Bench | None = None
    for release, members, epsilon, seed in _wanted(settings):
        if (release, members, epsilon, seed) in done:
            continue
        bench = bench or _Bench(settings)
        sigma, ratio, accuracy = bench.measure(release, members, epsilon, seed)
        cells.append(Cell(release, members, epsilon, seed, sigma, ratio, accuracy, label))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cells[-1])) + "\n")
        logger.info("%s, m = %d, ε = %g, seed %d: %.3f", release, members, epsilon, seed, accuracy)
    return cells


def _wanted(settings: Settings) -> Iterator[tuple[Release, int, float, int]]:
    for seed, release in product(settings.seeds, settings.releases):
        if release == "alone":
            yield release, 1, math.inf, seed
            continue
        for members, epsilon in product(settings.members, settings.epsilons):
            if release == "sum" or math.isfinite(epsilon):
                yield release, members, epsilon, seed


def _label(settings: Settings) -> str:
    swept = ("data", "model", "out", "members", "epsilons", "releases", "seeds")
    # Cells from before there was a choice of layers stay what they were.
    kept = {name: value for name, value in vars(settings).items() if name not in swept and value is not None}
    return f"{settings.model.name}, " + ", ".join(f"{name} {value}" for name, value in kept.items())


def _remember_below(settings: Settings, model: PreTrainedModel, layers: int, padding: int) -> None:
    """Cut a model to its last layers; what comes out of those below, which are not trained, is kept by text.

    A token's output does not depend on what follows it, so a text has the same one in every batch.
    """
    config, decoder = cast(Any, model.config), cast(Any, model).get_decoder()
    below = config.num_hidden_layers - layers
    lower = cast(Any, load_base_model(settings.model, keep_layers=below)[0]).get_decoder()
    lower.norm, decoder.layers, config.num_hidden_layers = nn.Identity(), decoder.layers[below:], layers
    kept: dict[tuple[int, ...], torch.Tensor] = {}

    def remembered(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        texts = [tuple(row[: int((row != padding).nonzero().max()) + 1].tolist()) for row in inputs[0]]
        if new := [index for index, text in enumerate(texts) if text not in kept]:
            with torch.no_grad():
                states = lower(input_ids=inputs[0][new], use_cache=False).last_hidden_state
            kept.update((texts[i], row[: len(texts[i])]) for i, row in zip(new, states, strict=True))
        found = torch.zeros_like(output)
        for row, text in zip(found, texts, strict=True):
            row[: len(text)] = kept[text]
        return found

    decoder.get_input_embeddings().register_forward_hook(remembered)


class _Bench:
    """One model with cores at the singular vectors of its weights."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        torch.set_num_threads(1)
        model, self._tokenizer = load_base_model(settings.model)
        if settings.layers is not None:
            _remember_below(settings, model, settings.layers, padding_token(self._tokenizer))
        if settings.form is not None:
            self._tokenizer.chat_template = "{{ messages[0].content }}"
        rank, blocks = settings.rank, int(model.config.num_hidden_layers)
        config = CoLoraConfig(
            r=rank, alpha=2.0 * rank, blocks=blocks, target_modules=_MODULES, other_layers="none"
        )
        self._model = adapt(model, config)
        set_basis(self._model, _singular_vectors(self._model, rank), label="weights")
        self._start = read_shared(self._model).astype(np.float64)

    def measure(
        self, release: Release, members: int, epsilon: float, seed: int
    ) -> tuple[float, float, float]:
        """σ, noise over signal at the last step, and accuracy."""
        settings = self._settings
        rows, tests = _rows(settings, members, seed)
        encoded = [encode_examples(self._tokenizer, own, _MAX_LENGTH) for own in rows]
        names, present = tuple(map(str, range(members))), min(members, settings.sampled or members)
        sigma, share, grid = self._noise(release, members, present, epsilon)
        source, rate = SeededTestNoise(10_000 + seed), settings.sampling_rate
        gradients: list[FloatArray | None] = []
        ratio = 0.0
        with only_shared_branch(self._model):
            for step in range(settings.steps):
                self._write(gradients)
                drawn = taking_part(names, settings.sampled, str(seed), step + 1)
                giving = [own for name, own in zip(names, encoded, strict=True) if name in drawn]
                chosen = [own[i] for own in giving for i in poisson_sample(len(own), rate, source)]
                y = self._sum(chosen, grid).units.astype(np.float64)
                if share:
                    nothing = ClippedSum.empty(len(y))
                    noise = np.sum([noisy_share(nothing, grid, source) for _ in giving], axis=0)
                    ratio = float(np.linalg.norm(noise) / max(1.0, float(np.linalg.norm(y))))
                    y = y + noise
                y *= settings.clipping_norm / grid.steps
                gradients.append(mixed_gradient([GroupSum(y, present * rate * settings.examples)], [1.0]))
            self._write(gradients)
            accuracy = Examiner(self._model, self._tokenizer, 64, _MAX_LENGTH).score(tests).value
            self._model.unmerge_adapter()
        return sigma, ratio, accuracy

    def _write(self, gradients: Sequence[FloatArray | None]) -> None:
        settings = self._settings
        if gradients:
            self._model.unmerge_adapter()
        theta = shared_branch(self._start, gradients, settings.learning_rate, settings.steps)
        write_shared(self._model, theta.astype(np.float32), "local")
        self._model.merge_adapter()

    def _noise(
        self, release: Release, members: int, present: int, epsilon: float
    ) -> tuple[float, float, ShareGrid]:
        """σ of the claim, each member's own noise, and the grid; so many of the members are in a step."""
        settings = self._settings
        sigma = 0.0
        if math.isfinite(epsilon):
            delta = 1.0 / (settings.examples * members)
            turns = ScheduleTerms(rounds=settings.steps, sampled_clients=settings.sampled).turns(members)
            sigma = noise_multiplier_for(epsilon, delta, [], settings.sampling_rate, turns)
        share = sigma
        if release == "sum" and members > 1:
            share = noise_share(sigma, present, max(1, present // 6))
        batch = math.ceil(settings.sampling_rate * settings.examples)
        return sigma, share, replace(plan_grid(present, batch, share or 1.0, 62), noise=share)

    def _sum(self, chosen: Sequence[EncodedExample], grid: ShareGrid) -> ClippedSum:
        total = ClippedSum.empty(len(self._start))
        # By length of the prompt: answers then stand at few positions of a batch, and logits are dear.
        ordered = sorted(chosen, key=lambda example: int((example.labels == IGNORED).sum()))
        layers, padding = shared_modules(self._model), padding_token(self._tokenizer)
        for start in range(0, len(ordered), _BATCH):
            rows = _gradients(self._model, layers, ordered[start : start + _BATCH], padding)
            total = total + clipped_sum(rows, self._settings.clipping_norm, grid.steps)
        return total


def _gradients(
    model: PeftModel, layers: Sequence[CoLoraLinear], batch: Sequence[EncodedExample], padding: int
) -> FloatArray:
    """(B, D) gradients of each example's loss while the cores are merged into W.

    With x what enters a layer and o the gradient of what leaves it: Σ_t e_t u_tᵀ for P, Σ_t e_t for Q, where
    u = A x and e = s Bᵀ o.
    """
    seen: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        # No weight is trained, so the graph begins where the first layer ends.
        seen[layer] = (inputs[0].detach(), output if output.requires_grad else output.requires_grad_())

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(hook).remove)
        # Padding is on the right, and no token sees what follows it: without a mask attention is faster.
        rows = collate(batch, padding)
        losses = example_losses(model, {name: rows[name] for name in ("input_ids", "labels")})
    parts = []
    back = torch.autograd.grad(losses.sum(), [seen[layer][1] for layer in layers])
    for layer, o_BTK in zip(layers, back, strict=True):
        u_BTR = seen[layer][0] @ layer.colora_A["default"].T
        e_BTR = layer.settings["default"].scaling * (o_BTK @ layer.colora_B["default"])
        parts += [(e_BTR.transpose(1, 2) @ u_BTR).flatten(1), e_BTR.sum(1)]
    return np.asarray(torch.cat(parts, dim=1).double().numpy())


def _singular_vectors(model: PeftModel, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    bases = {}
    for layer in shared_modules(model):
        weight = cast(nn.Linear, layer.get_base_layer()).weight.detach().double()
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        bases[layer.settings["default"].placement.name] = right[:rank], left[:, :rank]
    return bases


def _rows(settings: Settings, members: int, seed: int) -> tuple[list[list[Example]], list[Example]]:
    """Each member's own examples, and test rows (or rows that no member has, for tuning)."""
    content = json.loads((settings.data / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    intents = sorted({label for _, label in content["train"]})
    chosen = random.Random(0).sample(intents, settings.intents)  # noqa: S311 - a choice of data
    place, names = {intent: i for i, intent in enumerate(chosen)}, chosen
    if settings.task == "domains":
        names = list(CLINC_DOMAINS)
        place = {intent: i for i, name in enumerate(names) for intent in CLINC_DOMAINS[name].split()}
    space, forms = ("", _FORMS) if settings.form is None else (" ", (settings.form, settings.form))
    choices = tuple(space + name.replace("_", " ") for name in names)

    def examples(rows: Sequence[tuple[str, str]], member: int) -> list[Example]:
        group = {"shifted": 1, "contradicting": member % 2}.get(settings.task, 0)
        answers = [choices[(place[intent] + group) % len(choices)] for _, intent in rows]
        return [
            Example("", forms[group].format(text), answer, choices)
            for (text, _), answer in zip(rows, answers, strict=True)
        ]

    pool, tests = (
        [(text, intent) for part in parts for text, intent in content[part] if intent in chosen]
        for parts in (("train", "val"), ("test",))
    )
    random.Random(1).shuffle(tests)  # noqa: S311
    random.Random(2).shuffle(pool)  # noqa: S311
    if settings.tuning:
        tests, pool = pool[: settings.tests], pool[settings.tests :]
    random.Random(seed).shuffle(pool)  # noqa: S311
    if len(pool) < members * settings.examples:
        raise ValueError(f"{len(pool)} examples for {members} members of {settings.examples}")
    own = [examples(pool[i * settings.examples : (i + 1) * settings.examples], i) for i in range(members)]
    return own, examples(tests[: settings.tests : 2], 0) + examples(tests[1 : settings.tests : 2], 1)


def gains(cells: Sequence[Cell]) -> dict[str, dict[int, Interval]]:
    """Accuracy above that of a member alone, paired by seed: by release and ε, then by number of members."""
    alone = {cell.seed: cell.accuracy for cell in cells if cell.release == "alone"}
    found = defaultdict[tuple[bool, float, int], list[float]](list)
    for cell in cells:
        if cell.release != "alone" and cell.seed in alone:
            key = (cell.release == "own", -cell.epsilon, cell.members)
            found[key].append(cell.accuracy - alone[cell.seed])
    lines = defaultdict[str, dict[int, Interval]](dict)
    for (own, minus, members), values in sorted(found.items()):
        name = f"ε = {-minus:g}, noise of {'each member' if own else 'the group'}"
        if (gained := interval(values)) is not None:
            lines["no noise" if math.isinf(minus) else name][members] = gained
    return lines


def markdown(cells: Sequence[Cell]) -> str:
    """The table: a row per release and ε, a column per number of members, points above a member alone."""
    found = gains(cells)
    members = sorted({m for line in found.values() for m in line})
    rows = [[name, *(percent(line.get(m)) for m in members)] for name, line in found.items()]
    table = markdown_table(["", *(f"m = {m}" for m in members)], rows, numbers=True)
    alone = percent(interval([cell.accuracy for cell in cells if cell.release == "alone"]))
    return "\n".join([*table, "", f"Points above a member alone ({alone}), ± half of a 95 % interval."])
