"""How time and memory grow with the number of clients, on the clients' side and on the server's.

    python -m benchmarks.scale --model FOLDER --clients 10 100 1000 10000 --sampled 16 --rounds 2 --plot X.svg

Synthetic examples, a small model, plain back end, no scoring: what is measured is the sessions, the server
and the swapping of adapters. The server's side alone has random adapters and profiles in place of models.
Each size and side runs in a process of its own, so that its peak memory is its own.
"""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.scale_server import relevance_seconds, run_server, sums_seconds
from benchmarks.timing import in_own_process, peak_megabytes
from fedmosaic.client.model.examples import Example
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.runs.command import run_here
from fedmosaic.experiments.scenario.metrics import markdown_table
from fedmosaic.experiments.scenario.participants import write_examples
from fedmosaic.experiments.scenario.terms import Scenario, ScenarioClient, ScenarioProfile
from fedmosaic.experiments.simulation.cluster import Cluster
from fedmosaic.privacy.encryption.parameters import PlainParameters
from fedmosaic.privacy.federation.terms import AdapterTerms, ScheduleTerms
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.summary import with_rounds

_TASKS = 5
_WORDS = (
    "one two red blue cat dog sun sea big small old new left right day night tree house road ship".split()
)
HEADS = {
    "seconds": ("all, s", ".0f"),
    "processor": ("whole run, processor, s", ".0f"),
    "round": ("per round, s", ".1f"),
    "closing": ("closing it, s", ".3f"),
    "peak": ("clients' side, MB", ".0f"),
    "server_peak": ("server's side, MB", ".0f"),
    "relevance": ("relevance, s", ".4f"),
    "product": ("its product, s", ".4f"),
    "sums": ("sums, s", ".4f"),
}
"""What is told of each size, and how.

``seconds`` and ``processor`` are of everything, founding included, on the clients' side; ``round`` is the
mean of a round there, training included. ``closing`` a round is the processor's time of the server alone:
relevance, weights, sums and writing them. ``relevance`` compares all profiles with all, of which ``product``
is the matrix product (N, k) by (k, N); ``sums`` forms R = 64 weighted sums of N masked adapters of D numbers.
The peaks are of the resident memory, without these three.
"""


@dataclass(frozen=True)
class Arguments:
    """Run federations of several sizes and tell what each costs."""

    model: str
    """Folder of a small model; it is every client's and the probe's."""
    clients: tuple[int, ...] = (10, 100, 500)
    """Numbers of clients."""
    rounds: int = 3
    """Rounds of each federation."""
    steps: int = 4
    """Optimizer steps of each client in each round, of eight examples."""
    blocks: int = 4
    """Co-LoRA layers of the model."""
    dimensions: int = 64
    """Numbers in a task profile."""
    sampled: int = 0
    """Clients that take part in a round; 0 for all."""
    actors: int = 0
    """Run the clients in so many processes of Ray; 0 for one."""
    plot: Path | None = None
    """Also draw how the figures grow, as an SVG."""


Figures = dict[str, float]
"""By the keys of `HEADS`."""


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="python -m benchmarks.scale", description=__doc__)
    if min(parsed.clients, default=0) < 4:
        raise ConfigurationError(f"clients is {parsed.clients}; give at least 4, which the policy needs")
    found: dict[int, Figures] = {}
    for count in parsed.clients:
        figures = (in_own_process(side, parsed, count) for side in (clients_side, server_side))
        found[count] = {key: value for side in figures for key, value in side.items()}
        print(f"{count} clients: {found[count]}", file=sys.stderr, flush=True)
    print("\n".join(as_table(found)))
    if parsed.plot is not None:
        draw(found, parsed.plot)
    return 0


def clients_side(arguments: Arguments, count: int) -> Figures:
    """Run one federation, sessions and server in this process, and read its clock."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        scenario = scale_scenario(arguments, count, place)
        cluster = Cluster(actors=arguments.actors) if arguments.actors else None
        directory = run_here(scenario, place, place, Console(stderr=True), cluster)
        results: Any = with_rounds({}, directory / "federation/server/state")["results"]
    seconds = time.monotonic() - started
    # The first round also holds the probing of every client's examples; it is counted from the start.
    rounds = np.diff([result["closed_at"] for result in results])
    return {
        "seconds": seconds,
        "processor": time.process_time(),
        "round": float(rounds.mean()) if rounds.size else seconds,
        "peak": peak_megabytes(),
    }


def server_side(arguments: Arguments, count: int) -> Figures:
    """Run the rounds of one federation without models, then the arithmetic alone."""
    with tempfile.TemporaryDirectory() as name:
        scenario = scale_scenario(arguments, count, Path(name))
        closing = run_server(scenario, Path(name), Console(stderr=True))
        peak = peak_megabytes()
    relevance, product = relevance_seconds(count, arguments.dimensions)
    sums = sums_seconds(count, scenario.adapter.shared_dimensions)
    told = {"closing": closing, "server_peak": peak}
    return told | {"relevance": relevance, "product": product, "sums": sums}


def scale_scenario(arguments: Arguments, count: int, place: Path) -> Scenario:
    """A scenario over synthetic examples, which are written below `place`; clients share five tasks."""
    examples = {
        kind: [_examples(f"{kind}-{task}", 64, task) for task in range(_TASKS)] for kind in ("train", "test")
    }
    for kind, tasks in examples.items():
        for task, content in enumerate(tasks):
            write_examples(place / f"{kind}-{task}.jsonl", content)
    write_examples(place / "public.jsonl", _examples("public", 256, _TASKS))
    model = ModelSettings(path=arguments.model)
    sampled = arguments.sampled if 0 < arguments.sampled < count else None
    return Scenario(
        name="scale",
        probe=model,
        profile=ScenarioProfile(
            public_data=place / "public.jsonl", dimensions=arguments.dimensions, max_length=32
        ),
        adapter=AdapterTerms(rank=8, blocks=arguments.blocks, protection="none"),
        schedule=ScheduleTerms(
            rounds=arguments.rounds,
            quorum=sampled or count,
            sampled_clients=sampled,
        ),
        encryption=PlainParameters(),
        allow_plaintext=True,
        training=TrainingSettings(steps=arguments.steps, per_device_train_batch_size=8, max_length=32),
        score="nothing",
        clients=tuple(
            ScenarioClient(
                id=f"client-{number:04d}",
                task=f"task-{number % _TASKS}",
                model=model,
                train=place / f"train-{number % _TASKS}.jsonl",
                test=place / f"test-{number % _TASKS}.jsonl",
            )
            for number in range(count)
        ),
    )


def _examples(name: str, count: int, task: int) -> list[Example]:
    seed = np.frombuffer(name.encode(), dtype=np.uint8).astype(np.uint32)
    random = np.random.default_rng(seed)
    answers = (_WORDS[2 * task], _WORDS[2 * task + 1])
    return [
        Example(f"{name}-{i}", f"{name} {i}: " + " ".join(random.choice(_WORDS, 6)), answers[i % 2], answers)
        for i in range(count)
    ]


def as_table(found: Mapping[int, Figures]) -> list[str]:
    """The figures as lines of Markdown."""
    keys = [key for key in HEADS if key in next(iter(found.values()))]
    rows = [[str(count), *(format(row[key], HEADS[key][1]) for key in keys)] for count, row in found.items()]
    return markdown_table(["clients", *(HEADS[key][0] for key in keys)], rows, numbers=True)


def draw(found: Mapping[int, Figures], path: Path) -> None:
    """Write a figure of processor seconds and memory over the number of clients."""
    canvas = Figure(figsize=(9, 3.5), layout="constrained")
    seconds, memory = canvas.subplots(1, 2)
    for axes, keys in (
        (seconds, ("processor", "closing", "relevance", "product", "sums")),
        (memory, ("peak", "server_peak")),
    ):
        for key in keys:
            figures = [row.get(key, np.nan) for row in found.values()]
            axes.plot(list(found), figures, marker="o", label=HEADS[key][0].partition(",")[0])
        axes.set(xlabel="clients", xscale="log")
        axes.legend()
    seconds.set(ylabel="s of the processor", yscale="log")
    memory.set(ylabel="MB at the peak", ylim=(0, None))
    canvas.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
