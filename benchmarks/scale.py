"""`python -m benchmarks.scale`: how time and memory grow with the number of clients, in one process.

Synthetic examples, a small model, plain back end, no scoring: what is measured is the sessions, the server
and the swapping of adapters. Each size runs in a process of its own, so that its peak memory is its own.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks.scale_server import relevance_cost, run_server
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
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError
from fedmosaic.server.summary import with_rounds

_TASKS = 5
_WORDS = (
    "one two red blue cat dog sun sea big small old new left right day night tree house road ship".split()
)


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
    """Run the clients in so many processes of Ray; 0 for this one."""
    server_only: bool = False
    """Random adapters and profiles in place of models: what is left is the server's work."""
    plot: Path | None = None
    """Also draw how the figures grow, as an SVG."""
    only: bool = False
    """Run the first size in this process and print its figures as JSON; used by the command itself."""


@dataclass(frozen=True)
class Figures:
    """What one federation cost.

    Attributes:
        clients: N.
        seconds: of everything, loading and founding included.
        processor_seconds: the same in the processor's time, which other work on the machine does not add to.
        round_seconds: mean of a round, training included.
        server_seconds: mean of closing a round: relevance, weights, sums; the processor's with `server_only`.
        relevance_seconds: of comparing N profiles, all with all.
        product_seconds: of the matrix product in it alone, (N, k) by (k, N).
        peak_megabytes: resident memory of the process at its peak.
    """

    clients: int
    seconds: float
    processor_seconds: float
    round_seconds: float
    server_seconds: float
    relevance_seconds: float
    product_seconds: float
    peak_megabytes: float


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="python -m benchmarks.scale")
    if min(parsed.clients, default=0) < 4:
        raise ConfigurationError(
            f"clients is {parsed.clients}; give at least 4 clients, which the policy needs"
        )
    if parsed.only:
        print(json.dumps(asdict(measure(parsed, parsed.clients[0]))))
        return 0
    figures = [_in_own_process(parsed, count) for count in parsed.clients]
    print("\n".join(as_table(figures)))
    if parsed.plot is not None:
        draw(figures, parsed.plot)
    return 0


def _in_own_process(arguments: Arguments, count: int) -> Figures:
    command = [
        sys.executable, "-m", "benchmarks.scale", "--only",
        "--model", arguments.model, "--clients", str(count), "--rounds", str(arguments.rounds),
        "--steps", str(arguments.steps), "--dimensions", str(arguments.dimensions),
        "--blocks", str(arguments.blocks), "--sampled", str(arguments.sampled),
        "--actors", str(arguments.actors), *(["--server-only"] if arguments.server_only else []),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own module
    if done.returncode:
        raise FedMosaicError(f"{count} clients failed:\n{done.stderr[-2000:]}")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def measure(arguments: Arguments, count: int) -> Figures:
    """Run one federation and read its clock."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        scenario = scale_scenario(arguments, count, place)
        if arguments.server_only:
            seconds, closing = run_server(scenario, place, Console(stderr=True))
            per_round = seconds / arguments.rounds
        else:
            cluster = Cluster(actors=arguments.actors) if arguments.actors else None
            directory = run_here(scenario, place, place, Console(stderr=True), cluster)
            results: Any = with_rounds({}, directory / "federation/server/state")["results"]
            closing = [result["seconds_aggregating"] for result in results]
            seconds = time.monotonic() - started
            # The first round also holds the probing of every client's examples; it is counted from the start.
            rounds = np.diff([result["closed_at"] for result in results])
            per_round = float(rounds.mean()) if rounds.size else seconds
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    relevance_seconds, product_seconds = relevance_cost(count, arguments.dimensions)
    return Figures(
        clients=count,
        seconds=seconds,
        processor_seconds=time.process_time(),
        round_seconds=per_round,
        server_seconds=float(np.mean(closing)),
        relevance_seconds=relevance_seconds,
        product_seconds=product_seconds,
        peak_megabytes=peak,
    )


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
    return Scenario(
        name="scale",
        probe=model,
        profile=ScenarioProfile(
            public_data=place / "public.jsonl", dimensions=arguments.dimensions, max_length=32
        ),
        adapter=AdapterTerms(rank=8, blocks=arguments.blocks, protection="none"),
        schedule=ScheduleTerms(
            rounds=arguments.rounds,
            quorum=arguments.sampled or count,
            sampled_clients=arguments.sampled or None,
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


def as_table(figures: Sequence[Figures]) -> list[str]:
    """The figures as lines of Markdown."""
    return markdown_table(
        [
            *("clients", "all, s", "processor, s", "per round, s", "server per round, s"),
            *("relevance, s", "its product, s", "peak memory, MB"),
        ],
        [
            [
                str(figure.clients),
                f"{figure.seconds:.0f}",
                f"{figure.processor_seconds:.0f}",
                f"{figure.round_seconds:.1f}",
                f"{figure.server_seconds:.3f}",
                f"{figure.relevance_seconds:.4f}",
                f"{figure.product_seconds:.4f}",
                f"{figure.peak_megabytes:.0f}",
            ]
            for figure in figures
        ],
        numbers=True,
    )


def draw(figures: Sequence[Figures], path: Path) -> None:
    """Write a figure of seconds and memory over the number of clients, both axes logarithmic."""
    clients = [figure.clients for figure in figures]
    canvas = Figure(figsize=(9, 3.5), layout="constrained")
    seconds, memory = canvas.subplots(1, 2)
    for name, words in (
        ("round_seconds", "round"), ("server_seconds", "closing it"),
        ("relevance_seconds", "relevance, all with all"), ("product_seconds", "its product"),
    ):  # fmt: skip
        seconds.loglog(clients, [getattr(figure, name) for figure in figures], marker="o", label=words)
    memory.loglog(clients, [figure.peak_megabytes for figure in figures], marker="o")
    seconds.set(xlabel="clients", ylabel="s")
    memory.set(xlabel="clients", ylabel="peak memory, MB")
    seconds.legend()
    canvas.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
