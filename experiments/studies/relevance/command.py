"""`fedmosaic experiments relevance`: how well task profiles find related clients, at what ε.

Two clients per task hold disjoint halves of its examples. Each makes one release of n examples through the
product's own mechanism, the server's corrected cosine compares them, and two figures tell whether clients of
one task find each other: the area under the ROC curve of same-task pairs against the others (AUC), and how
often a client's most similar peer is the one of its own task (top-1). Noise is seeded, so the study
can be repeated; its releases are for measurement and carry no guarantee.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
import tyro

from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.profile.probe import gradient_factors, open_probe
from fedmosaic.experiments.scenario.metrics import area_under_curve
from fedmosaic.experiments.studies.relevance import designs
from fedmosaic.experiments.studies.relevance.designs import DESIGNS, encode, reduced_rows
from fedmosaic.experiments.studies.relevance.tables import Cell, draw, markdown
from fedmosaic.experiments.tasks.relevance_sets import load_public, load_task_set
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.mechanism.gaussian import ClippedSum, clip
from fedmosaic.privacy.mechanism.noise import Float64Array, IntArray, SeededTestNoise
from fedmosaic.privacy.mechanism.profile import ProfileMechanism, release
from fedmosaic.privacy.mechanism.projection import PublicMap
from fedmosaic.server.round.relevance import corrected_cosine

logger = logging.getLogger(__name__)
_DELTA: Final = 1e-5
_POOL: Final = 600
"""Examples per task, halved between its two clients; larger n are drawn with replacement and marked."""
_PUBLIC: Final = 30
"""Public examples for the basis from each BIG-bench Hard task; ten times as many from other sources."""
_MAX_LENGTH: Final = 64
_SEED: Final = 0
"""Of everything random here."""


@dataclass(frozen=True)
class Settings:
    """Measure relevance against ε and write results.json, table.md and figure.svg."""

    data: Path
    """Folder with the data sets."""
    probes: tuple[Path, ...]
    """Folders of the probe models."""
    output_dir: Path = Path("runs/relevance")
    """Where results go."""
    task_sets: tuple[str, ...] = ("easy", "hard_news", "hard_intents")
    """What to compare clients on."""
    epsilons: tuple[float, ...] = (math.inf, 8.0, 3.0, 1.0, 0.5)
    """ε of the one release; inf is no noise."""
    sizes: tuple[int, ...] = (100, 300, 1000)
    """Examples n per release."""
    trials: int = 20
    """Repetitions with other subsets and other noise."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The probe's forward pass; the gradient is float32 in any case."""
    threads: int = 2
    """Threads for the forward pass."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study from the command line."""
    settings = tyro.cli(Settings, args=arguments, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    print(markdown(run(settings)))
    return 0


def run(settings: Settings) -> list[Cell]:
    """Measure every cell and write the results."""
    torch.set_num_threads(settings.threads)
    cells = [cell for path in settings.probes for cell in _probe_cells(path, settings)]
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    record = {"settings": asdict(settings), "cells": [asdict(cell) for cell in cells]}
    # Infinity is no JSON: ε without noise is written as null.
    text = json.dumps(record, indent=1, default=str).replace("Infinity", "null")
    (settings.output_dir / "results.json").write_text(text + "\n", encoding="utf-8")
    (settings.output_dir / "table.md").write_text(markdown(cells) + "\n", encoding="utf-8")
    draw(cells, settings.output_dir / "figure.svg")
    return cells


def _probe_cells(path: Path, settings: Settings) -> Iterator[Cell]:
    model, tokenizer = load_base_model(path, settings.dtype)
    probe, name = open_probe(model), path.stem
    public = load_public(settings.data, _PUBLIC, _SEED)
    logger.info("%s: fitting the basis on %d public examples", name, len(public))
    public_factors = list(gradient_factors(probe, encode(tokenizer, public, _MAX_LENGTH)))
    sides = designs.fit_sides(probe, public_factors, designs.SIDES)
    public_rows = reduced_rows(probe, public_factors, DESIGNS.values(), sides)
    for task_set in settings.task_sets:
        rows = []
        tasks = load_task_set(task_set, settings.data, _POOL, _SEED)
        for task, examples in tasks.items():
            logger.info("%s, %s: probing %d examples of %s", name, task_set, len(examples), task)
            factors = list(gradient_factors(probe, encode(tokenizer, examples, _MAX_LENGTH)))
            rows.append(reduced_rows(probe, factors, DESIGNS.values(), sides))
        for title, design in DESIGNS.items():
            logger.info("%s, %s: measuring %s", name, task_set, title)
            public_map = designs.complete_map(design, probe, name, sides, public_rows[design.rows_name])
            k, task_rows = public_map.mechanism.dimensions, [task[design.rows_name] for task in rows]
            for n, epsilon, figures in _of_design(public_map, task_rows, settings):
                yield Cell(name, task_set, title, k, n, epsilon, *figures)


def _of_design(
    public_map: PublicMap, rows_by_task: Sequence[Float64Array], settings: Settings
) -> Iterator[tuple[int, float, tuple[float, float, bool]]]:
    own = public_map.mechanism
    units = [clip(public_map.standardise(rows), own.clipping_norm)[0] for rows in rows_by_task]
    sigmas = [
        0.0 if math.isinf(epsilon) else noise_multiplier_for(epsilon, _DELTA, (), 1.0, 1)
        for epsilon in settings.epsilons
    ]
    mechanisms = [own.model_copy(update={"noise_multiplier": sigma}) for sigma in sigmas]
    for n in settings.sizes:
        found = measure(units, mechanisms, n, settings.trials, _SEED)
        for epsilon, figures in zip(settings.epsilons, found, strict=True):
            yield n, epsilon, figures


def measure(
    units_by_task: Sequence[IntArray], mechanisms: Sequence[ProfileMechanism], n: int, trials: int, seed: int
) -> list[tuple[float, float, bool]]:
    """Release profiles of n examples for two clients per task, compare them, and average over trials.

    A task's two clients hold its even and its odd rows, clipped as `clip` gives them. Gives, per mechanism,
    the AUC of same-task pairs against all others, the share of clients whose most similar peer is of their
    task, and whether n exceeded a client's examples, so that they were drawn with replacement.
    """
    pools = [units[half::2] for units in units_by_task for half in range(2)]
    tasks = np.arange(len(pools)) // 2
    rows, columns = np.triu_indices(len(pools), 1)
    same = tasks[rows] == tasks[columns]
    generator = np.random.default_rng([seed, n])
    noise = SeededTestNoise(int(generator.integers(2**63)))
    found: list[list[tuple[float, float]]] = [[] for _ in mechanisms]
    for _ in range(trials):
        sums = [
            pool[generator.choice(len(pool), n, replace=n > len(pool))].sum(axis=0, dtype=np.int64)
            for pool in pools
        ]
        for trial, mechanism in zip(found, mechanisms, strict=True):
            released = np.array([release(ClippedSum(total, 0, 0, n), mechanism, noise) for total in sums])
            variances = np.full(len(pools), mechanism.noise_variance)
            similarity = corrected_cosine(released.astype(np.float64), variances).similarity
            pairs = similarity[rows, columns]
            trial.append((area_under_curve(pairs[same], pairs[~same]), top_match(similarity, tasks)))
    replaced = any(n > len(pool) for pool in pools)
    return [(*np.mean(trial, axis=0).tolist(), replaced) for trial in found]


def top_match(similarity: Float64Array, labels: IntArray) -> float:
    """Share of rows whose largest entry off the diagonal belongs to the row's own label."""
    without_self = similarity.copy()
    np.fill_diagonal(without_self, -np.inf)
    return float(np.mean(labels[without_self.argmax(axis=1)] == labels))
