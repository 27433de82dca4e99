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
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import tyro

from fedmosaic.client.model.load import load_base_model
from fedmosaic.client.profile.probe import gradient_factors, open_probe
from fedmosaic.experiments.studies.relevance.designs import (
    DESIGNS,
    SIDES,
    Rows,
    complete_map,
    encode,
    fit_sides,
    reduced_rows,
)
from fedmosaic.experiments.studies.relevance.measure import Recovery, measure
from fedmosaic.experiments.studies.relevance.tables import Cell, draw, markdown
from fedmosaic.experiments.tasks.relevance_sets import load_public, load_task_set
from fedmosaic.privacy.accounting.calibrate import noise_multiplier_for
from fedmosaic.privacy.mechanism.gaussian import clip
from fedmosaic.privacy.mechanism.noise import Float64Array
from fedmosaic.privacy.mechanism.projection import PublicMap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Measure relevance against ε and write results.json, table.md and figure.svg."""

    data: Path
    """Folder with the data sets."""
    probes: tuple[Path, ...]
    """Probe models: folders, or GGUF files in a folder with nothing else."""
    output_dir: Path = Path("runs/relevance")
    """Where results go."""
    task_sets: tuple[str, ...] = ("easy", "hard_news", "hard_intents")
    """What to compare clients on."""
    epsilons: tuple[float, ...] = (math.inf, 8.0, 3.0, 1.0, 0.5)
    """ε of the one release; inf is no noise."""
    sizes: tuple[int, ...] = (100, 300, 1000)
    """Examples n per release."""
    delta: float = 1e-5
    """δ of the one release."""
    pool: int = 600
    """Examples per task, halved between its two clients; larger n are drawn with replacement and marked."""
    public_size: int = 30
    """Public examples for the basis from each BIG-bench Hard task; ten times as many from other sources."""
    max_length: int = 64
    """Tokens per example."""
    trials: int = 20
    """Repetitions with other subsets and other noise."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """The probe's forward pass; the gradient is float32 in any case."""
    seed: int = 0
    """Of everything random here."""
    threads: int = 2
    """Threads for the forward pass."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study from the command line."""
    settings = tyro.cli(Settings, args=arguments, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cells = run(settings)
    print(markdown(cells))
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
    is_file = path.suffix == ".gguf"
    model, tokenizer = load_base_model(
        path.parent if is_file else path, settings.dtype, gguf_file=path.name if is_file else None
    )
    probe, name = open_probe(model), path.stem
    public = encode(
        tokenizer, load_public(settings.data, settings.public_size, settings.seed), settings.max_length
    )
    logger.info("%s: fitting the basis on %d public examples", name, len(public))
    public_factors = list(gradient_factors(probe, public))
    sides = fit_sides(probe, public_factors, SIDES)
    public_rows = reduced_rows(probe, public_factors, DESIGNS.values(), sides)
    for task_set in settings.task_sets:
        rows: list[Rows] = []
        tasks = load_task_set(task_set, settings.data, settings.pool, settings.seed)
        for task, examples in tasks.items():
            logger.info("%s, %s: probing %d examples of %s", name, task_set, len(examples), task)
            encoded = encode(tokenizer, examples, settings.max_length)
            factors = list(gradient_factors(probe, encoded))
            rows.append(reduced_rows(probe, factors, DESIGNS.values(), sides))
        for title, design in DESIGNS.items():
            logger.info("%s, %s: measuring %s", name, task_set, title)
            public_map = complete_map(design, probe, name, sides, public_rows[design.rows_name])
            task_rows = [task[design.rows_name] for task in rows]
            for n, epsilon, recovery in _measure(public_map, task_rows, settings):
                yield Cell(name, task_set, title, public_map.mechanism.dimensions, n, epsilon, recovery)


def _measure(
    public_map: PublicMap, rows_by_task: Sequence[Float64Array], settings: Settings
) -> Iterator[tuple[int, float, Recovery]]:
    bound = public_map.mechanism.clipping_norm
    units = [clip(public_map.standardise(rows), bound)[0] for rows in rows_by_task]
    mechanisms = [
        public_map.mechanism.model_copy(
            update={"noise_multiplier": _noise_multiplier(epsilon, settings.delta)}
        )
        for epsilon in settings.epsilons
    ]
    for n in settings.sizes:
        recoveries = measure(units, mechanisms, n, settings.trials, settings.seed)
        for epsilon, recovery in zip(settings.epsilons, recoveries, strict=True):
            yield n, epsilon, recovery


@lru_cache
def _noise_multiplier(epsilon: float, delta: float) -> float:
    return 0.0 if math.isinf(epsilon) else noise_multiplier_for(epsilon, delta, (), 1.0, 1)
