"""`fedmosaic demo`: a whole federation on this machine, with a real pretrained model and real data.

Four makers of home devices have SmolLM2-135M cut to its first 8 layers and share LoRA beside P and Q; two
newsrooms have it cut to 10, and share P and Q alone. All have sixty examples, most of them of two classes.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import tyro
from rich.console import Console
from rich.text import Text

from fedmosaic.client.assets import cache_directory
from fedmosaic.client.settings import ModelSettings, TrainingSettings
from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.demo.data import (
    COMMAND_GRAMMAR,
    MODEL_FILES,
    NEWS_CORPUS,
    DemoData,
    build_demo_data,
    is_complete,
    model_folders,
)
from fedmosaic.experiments.demo.ending import command_line, ending
from fedmosaic.experiments.runs.command import run
from fedmosaic.experiments.scenario.children import in_own_process
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient, ScenarioProfile
from fedmosaic.privacy.federation.terms import (
    AdapterPrivacyTerms,
    AdapterTerms,
    RelevanceTerms,
    ScheduleTerms,
)
from fedmosaic.privacy.federation.terms_checks import LARGEST_DELTA
from fedmosaic.privacy.terminal import ending_children

RECIPE: Final = 1
"""Raised whenever the fitting of the profile's basis changes, so that no cache serves an old one."""

ROUNDS: Final = 10
STEPS: Final = 6
_MAX_LENGTH: Final = 64
_LAYERS: Final = {
    "home-east": 8,
    "home-north": 8,
    "home-south": 8,
    "home-west": 8,
    "news-east": 10,
    "news-west": 10,
}
_FAMILY: Final = "smollm2-135m-cut{}"
_FAMILY_SIZE: Final = 4 * 16 * sum((576 + 576, 576 + 192, 576 + 192, 576 + 576, 3 * (576 + 1536)))
"""Values of the LoRA that the makers share: 4 layers of 8, rank 16, inputs and outputs of 7 modules."""


@dataclass(frozen=True)
class Arguments:
    """Run a whole federation on this machine: one server, six clients, ten rounds, about three minutes.

    Everything that is downloaded comes from the Python package index, pinned by version and SHA-256, and is
    kept in ~/.cache/fedmosaic (or $FEDMOSAIC_CACHE).
    """

    output_dir: Path = Path("runs")
    """Where the run's directory is made."""
    rounds: int = ROUNDS
    """Rounds of the federation."""
    steps: int = STEPS
    """Optimizer steps of each client in each round."""
    draw: int = 0
    """Another number gives the clients other texts, another order, and adapters another start."""
    alone: bool = True
    """Afterwards, every client also trains a model without the others, for comparison; about a minute."""


@ending_children()
def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic demo` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic demo")
    console = Console()
    cache = cache_directory()
    console.print(f"models and data come from the package index, cached in {cache}")
    console.print("nine in ten of a client's texts are of two classes; it is tested on all four alike")
    data = build_demo_data(cache, draw=parsed.draw, console=console)
    models = model_folders(cache, sorted(set(_LAYERS.values())))
    if not all(is_complete(folder, MODEL_FILES) for folder in models.values()):
        # In a process of its own, so that the whole model's memory is given back before the clients start.
        in_own_process("cuts the models", _make_models, cache, list(models))
    scenario = demo_scenario(parsed, models, data)
    fitted = cache / "profiles" / _profile_name(scenario)
    place = Path.cwd(), parsed.output_dir
    directory = run(scenario, *place, console, fitted=fitted, compare_alone=parsed.alone)
    console.print(ending(read_run(directory)))
    sources = ", ".join(f"{asset.project} {asset.version}" for asset in (COMMAND_GRAMMAR, NEWS_CORPUS))
    console.print(Text(f"Data: {sources}.", style="dim"))
    report = command_line("report", os.path.relpath(directory))
    console.print(Text(f"Next, every statement and table: {report}"))
    return 0


def _make_models(cache: Path, depths: Sequence[int]) -> None:
    from transformers.utils.logging import disable_progress_bar

    from fedmosaic.experiments.demo.models import shallow_demo_models

    disable_progress_bar()
    shallow_demo_models(cache, depths)


def _profile_name(scenario: Scenario) -> str:
    """Names a fitted profile by all that decides what it holds; the probe's folder carries its recipe."""
    public = hashlib.sha256(scenario.profile.public_data.read_bytes()).hexdigest()
    settings = scenario.profile.model_dump(mode="json", exclude={"public_data"})
    recipe = [RECIPE, public, Path(scenario.probe.path).name, settings]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


def demo_scenario(arguments: Arguments, models: Mapping[int, Path], data: DemoData) -> Scenario:
    """The scenario of the demo, for the folder of the model by its number of layers."""
    return Scenario(
        name="demo",
        description=__doc__ or "",
        probe=ModelSettings(path=str(models[min(models)]), dtype="auto"),
        # With sixty examples the default noise of 8 would hide which clients are alike.
        profile=ScenarioProfile(public_data=data.public, max_length=_MAX_LENGTH, noise_multiplier=2.0),
        adapter=AdapterTerms(basis_seed=arguments.draw, family_dimensions={_FAMILY.format(8): _FAMILY_SIZE}),
        adapter_privacy=AdapterPrivacyTerms(steps_per_round=arguments.steps, largest_delta=LARGEST_DELTA),
        # The models are two depths of one: what one learnt helps the other.
        relevance=RelevanceTerms(temperature=0.2, across_families=True),
        schedule=ScheduleTerms(rounds=arguments.rounds, quorum=4),
        training=TrainingSettings(
            steps=arguments.steps,
            per_device_train_batch_size=4,
            max_length=_MAX_LENGTH,
            learning_rate=4e-3,
            lr_scheduler_type="linear",
            # The gates stay at one half: own texts alone would turn them against what the others know.
            gate_learning_rate=1e-5,
            blend_received=0.5,
            seed=arguments.draw,
        ),
        clients=tuple(
            ScenarioClient(
                id=client.client,
                task=client.task,
                family=_FAMILY.format(_LAYERS[client.client]),
                model=ModelSettings(path=str(models[_LAYERS[client.client]]), dtype="auto"),
                train=client.train,
                test=client.test,
            )
            for client in data.clients
        ),
        evaluation_examples=60,
        others_examples=12,
    )
