"""`fedmosaic demo`: a whole federation on this machine, with a real pretrained model and real data.

Five clients: two film sites, two newsrooms, one maker of home devices. Their models are SmolLM2-135M cut
to its first 8 and its first 10 layers, two architectures that share nothing but P and Q.
"""

import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import tyro
from rich.console import Console

from fedmosaic.client.assets import cache_directory
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.comparison.report import read_run, show
from fedmosaic.experiments.demo.data import DemoData, build_demo_data
from fedmosaic.experiments.demo.models import shallow_demo_models
from fedmosaic.experiments.runs.command import run
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient, ScenarioProfile
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters, PlainParameters
from fedmosaic.privacy.federation.roster import (
    AdapterPrivacyTerms,
    AdapterTerms,
    Protection,
    RelevanceTerms,
    ScheduleTerms,
)

_MAX_LENGTH: Final = 64
_LAYERS: Final = {"film-north": 8, "film-south": 10, "news-east": 8, "news-west": 10, "home": 8}


@dataclass(frozen=True)
class Arguments:
    """Run a whole federation on this machine: one server, five clients, three rounds, about five minutes.

    Everything that is downloaded comes from the Python package index, pinned by version and SHA-256, and is
    kept in ~/.cache/fedmosaic (or $FEDMOSAIC_CACHE).
    """

    output_dir: Path = Path("runs")
    """Where the run's directory is made."""
    rounds: int = 3
    """Rounds of the federation."""
    steps: int = 20
    """Optimizer steps of each client in each round."""
    protection: Protection = "encrypted"
    """How the shared adapter leaves a client: none, encrypted, dp or dp+encrypted."""
    backend: Literal["ckks", "mask"] = "ckks"
    """Encryption back end, where anything is encrypted."""
    target_epsilon: float = 8.0
    """Privacy budget of every client for the whole run."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic demo` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic demo")
    console = Console()
    cache = cache_directory()
    console.print(f"models and data come from the package index, cached in {cache}")
    data = build_demo_data(cache, console=console)
    # In a process of its own, so that the memory of the whole model is given back before the clients start.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        models = pool.submit(shallow_demo_models, cache, sorted(set(_LAYERS.values()))).result()
    directory = run(demo_scenario(parsed, models, data), Path.cwd(), parsed.output_dir, console)
    show(read_run(directory), console)
    _closing_words(console, directory, data)
    return 0


def demo_scenario(arguments: Arguments, models: Mapping[int, Path], data: DemoData) -> Scenario:
    """The scenario of the demo.

    Args:
        arguments: what may be varied from the command line.
        models: folder of the model by its number of layers.
        data: the clients' data.
    """
    encrypted = arguments.protection in ("encrypted", "dp+encrypted")
    backends = {"ckks": CkksParameters(), "mask": MaskParameters()}
    return Scenario(
        name="demo",
        description=__doc__ or "",
        probe=ModelSettings(path=str(models[min(models)]), dtype="auto"),
        profile=ScenarioProfile(public_data=data.public, max_length=_MAX_LENGTH),
        adapter=AdapterTerms(protection=arguments.protection),
        adapter_privacy=AdapterPrivacyTerms(
            target_epsilon=arguments.target_epsilon, steps_per_round=arguments.steps
        ),
        relevance=RelevanceTerms(temperature=0.2),
        schedule=ScheduleTerms(
            rounds=arguments.rounds, quorum=4, round_deadline_seconds=900, gathering_seconds=300
        ),
        encryption=backends[arguments.backend] if encrypted else PlainParameters(),
        allow_plaintext=not encrypted,
        training=TrainingSettings(
            steps=arguments.steps,
            learning_rate=1e-3,
            shared_learning_rate=3e-3,
            gate_learning_rate=3e-3,
            max_length=_MAX_LENGTH,
        ),
        clients=tuple(
            ScenarioClient(
                id=client.client,
                task=client.task,
                family=f"smollm2-135m-cut{_LAYERS[client.client]}",
                model=ModelSettings(path=str(models[_LAYERS[client.client]]), dtype="auto"),
                train=client.train,
                test=client.test,
            )
            for client in data.clients
        ),
        evaluation_examples=60,
        others_examples=30,
    )


def _closing_words(console: Console, directory: Path, data: DemoData) -> None:
    console.print(
        "[bold]What this shows.[/] The parts work together: five processes with two architectures trained, "
        "exchanged protected adapters and profiles, and every release is in a ledger. It does not show how "
        "good the method is: the tasks are small, each score is over 60 test texts (one text is 1.7 points), "
        "and the models are the first layers of a larger one, which know little before training.\n"
    )
    console.print(f"Data: {', '.join(sorted({client.source for client in data.clients}))}.")
    console.print(f"Everything of this run is in {directory}")
    console.print(f"Read it again: fedmosaic report {directory} --at-epsilon 1")
