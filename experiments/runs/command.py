"""`fedmosaic run SCENARIO.toml`: a federation on this machine, in one process or as real processes.

With processes, the runner makes the identities, starts one server and the clients, and follows their
progress.
"""

import datetime as dt
import json
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedmosaic.experiments.runs import processes as managed
from fedmosaic.experiments.runs.processes import ManagedProcess
from fedmosaic.experiments.scenario.children import how_it_ended
from fedmosaic.experiments.scenario.founding import fit_profile, found_federation
from fedmosaic.experiments.scenario.terms import RunFailedError, Scenario
from fedmosaic.privacy.configuration import read_configuration, validate
from fedmosaic.privacy.files import hold_directory, write_atomically
from fedmosaic.privacy.terminal import ending_children
from fedmosaic.protos.errors import NOTHING_EXCHANGED, ConfigurationError

if TYPE_CHECKING:  # whoever only starts processes loads no model's library
    from fedmosaic.experiments.simulation.cluster import Cluster

_SCENARIO, _RUN = "scenario.json", "run.json"
_OVER = (0, NOTHING_EXCHANGED)
"""Statuses with which a process ends when its run is over."""


@dataclass(frozen=True)
class Arguments:
    """Run a scenario, in this process or as one server process and one process per client."""

    scenario: tyro.conf.Positional[Path]
    """The scenario file (TOML), or the directory of a run to go on with where it stopped."""
    output_dir: Path = Path("runs")
    """Where the run's directory is made."""
    processes: bool = False
    """Real processes that speak gRPC over mutual TLS, in place of one process."""
    engine: Literal["local", "ray"] = "local"
    """`ray` runs the clients in processes of a Ray cluster, in place of this one; needs fedmosaic[ray]."""
    address: str | None = None
    """Of a running Ray cluster, such as `auto`, whose machines share the output directory; by default Ray is
    started on this machine."""
    actors: int = 0
    """Processes that hold clients; one per core, or what the GPUs have room for, by default."""
    actors_per_gpu: int = 0
    """Of these on each GPU; 0 uses none."""
    method: str | None = None
    """Run this method in place of the scenario's; `fedmosaic methods` lists them."""
    seed: int | None = None
    """Use this seed in place of the scenario's."""
    set: tuple[str, ...] = ()
    """Other changes, such as `schedule.rounds=2`; they are also the run's name in tables."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic run` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic run", description=__doc__)
    from transformers.utils.logging import disable_progress_bar

    from fedmosaic.experiments.comparison.record import read_run
    from fedmosaic.experiments.comparison.report import show

    console = Console()
    disable_progress_bar()
    if parsed.scenario.is_dir():
        if parsed.method or parsed.seed is not None or parsed.processes or parsed.set:
            raise ConfigurationError(
                f"{parsed.scenario} is a run to go on with; its method, seed and settings are in it already"
            )
        directory = resume(parsed.scenario, console, _cluster(parsed))
    else:
        scenario = _changed(read_configuration(parsed.scenario, Scenario), parsed)
        parts = scenario, parsed.scenario.parent, parsed.output_dir, console
        directory = run(*parts) if parsed.processes else run_here(*parts, _cluster(parsed))
    show(read_run(directory), console)
    console.print(f"everything is in {directory}; read it again with: fedmosaic report {directory}")
    return 0


def _cluster(arguments: Arguments) -> "Cluster | None":
    """The cluster that is asked for; ConfigurationError where the options contradict each other."""
    from fedmosaic.experiments.simulation.cluster import Cluster

    cluster = Cluster(arguments.address, arguments.actors, arguments.actors_per_gpu)
    if arguments.engine == "ray" and not arguments.processes:
        return cluster
    if arguments.engine == "ray" or cluster != Cluster():
        raise ConfigurationError(
            "--address, --actors and --actors-per-gpu go with --engine ray, and that goes without --processes"
        )
    return None


def _changed(scenario: Scenario, arguments: Arguments) -> Scenario:
    changes: dict[str, object] = {"method": arguments.method, "seed": arguments.seed}
    given = [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    return with_changes(scenario, (*given, *arguments.set), " ".join(arguments.set) or scenario.variant)


def with_changes(scenario: Scenario, changes: Sequence[str], variant: str) -> Scenario:
    """A scenario with changes, each `key.of.a.table=value` in TOML's form, and words that tell it apart.

    `ConfigurationError` if a key is not known, or a value does not fit.
    """
    content = scenario.model_dump(mode="json")
    for change in changes:
        key, equals, value = change.partition("=")
        *path, last = key.strip().split(".")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value.strip()
        table: Any = content
        for name in path:
            table = table.get(name) if isinstance(table, dict) else None
        if not equals or not isinstance(table, dict):
            raise ConfigurationError(
                f"--set {change!r}: write key=value with a key of the scenario, such as seed=1"
            )
        table[last] = parsed
    return validate(content | {"variant": variant}, Scenario, "the changes")


def run_here(
    scenario: Scenario, base: Path, output_dir: Path, console: Console, cluster: "Cluster | None" = None
) -> Path:
    """Run a scenario in this process, or on a cluster; arguments and result as of `run`."""
    return resume(_make_directory(scenario.resolved(base.resolve()), output_dir), console, cluster)


def resume(directory: Path, console: Console, cluster: "Cluster | None" = None) -> Path:
    """Go on with a run in one process or on a cluster, or begin it; a finished run is only read.

    `ConfigurationError` if there is none, or it runs as processes; `StateError` if another process runs it.
    """
    directory = directory.resolve()
    if not (directory / _RUN).exists() or _read(directory).get("processes", True):
        raise ConfigurationError(
            f"{directory} is no run of one process; a run as processes goes on when its server and clients "
            "are started again, each on its own kit"
        )
    from fedmosaic.experiments.methods import simulate_method

    with hold_directory(directory / "run.lock", "let it end"):
        scenario = read_configuration(directory / _SCENARIO, Scenario)
        started = time.monotonic()
        simulate_method(scenario, directory, console, cluster)
        _end(directory, time.monotonic() - started)
    return directory


def _read(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / _RUN).read_text()))


def _end(directory: Path, seconds: float) -> None:
    """Write down that a run has ended, and how many seconds it took in all."""
    began = _read(directory)
    ended = began | {"seconds": began.get("seconds", 0.0) + seconds}
    write_atomically(directory / _RUN, json.dumps(ended).encode())


def _make_directory(scenario: Scenario, output_dir: Path, *, processes: bool = False) -> Path:
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    for suffix in chain([""], (f"-{number}" for number in count(2))):
        directory = (output_dir / f"{scenario.name}-{stamp}{suffix}").resolve()
        with suppress(FileExistsError):
            directory.mkdir(parents=True)
            break
    _begin(scenario, directory, processes=processes)
    return directory


def _begin(scenario: Scenario, directory: Path, *, processes: bool) -> None:
    started = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    (directory / _SCENARIO).write_text(scenario.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (directory / _RUN).write_text(json.dumps({"started": started, "processes": processes}) + "\n")


def run_at(scenario: Scenario, directory: Path, console: Console) -> None:
    """Run a scenario, its paths resolved, in a directory of its own, or go on there; one that ended is left.

    `ConfigurationError` if the directory holds a run of another scenario.
    """
    if (directory / _RUN).exists():
        if read_configuration(directory / _SCENARIO, Scenario) != scenario:
            raise ConfigurationError(
                f"{directory} holds a run of another scenario or of other settings; give another directory, "
                "or delete it"
            )
        if "seconds" in _read(directory):
            return
    else:
        directory.mkdir(parents=True, exist_ok=True)
        _begin(scenario, directory, processes=False)
    resume(directory, console)


@ending_children()
def run(
    scenario: Scenario,
    base: Path,
    output_dir: Path,
    console: Console,
    *,
    fitted: Path | None = None,
    compare_alone: bool = False,
) -> Path:
    """Run a scenario with real processes, in a directory below `output_dir`, which is given back.

    Relative paths start from `base`. `fitted` keeps the public basis for the next run of the same probe,
    public data and profile. `RunFailedError` if a process failed; the message shows the end of its log.
    """
    started = time.monotonic()
    scenario = scenario.resolved(base.resolve())
    managed.check_as_processes(scenario)
    directory = _make_directory(scenario, output_dir, processes=True)
    profile = fit_profile(scenario, directory, console, own_process=True, kept=fitted)
    port = managed.free_port()
    found_federation(scenario, profile, directory, port)
    console.print(
        f"[bold]{scenario.name}[/]: identities, certificates and roster are in {directory}/federation"
    )
    command = ("server", "--kit", str(directory / "federation" / "server"))
    server = ManagedProcess("server", command, directory / "server.log")
    clients = [managed.client_process(scenario, c, directory, port, compare_alone) for c in scenario.clients]
    try:
        server.start({})
        managed.wait_for_port(port, server, seconds=20.0)
        for client in clients:
            client.start(managed.CLIENT_ENVIRONMENT)
        _watch(scenario, server, clients, directory, console)
    finally:
        for process in (*clients, server):
            process.stop()
    _end(directory, time.monotonic() - started)
    return directory


def _watch(
    scenario: Scenario,
    server: ManagedProcess,
    clients: Sequence[ManagedProcess],
    directory: Path,
    console: Console,
) -> None:
    """Follow the processes until every client has ended; stop everything if the server ends."""
    kits = directory / "federation" / "clients"
    shown = _Shown(console, scenario.schedule.rounds, [client.name for client in clients])
    with shown.bars:
        going_on = True
        while going_on:
            going_on = any(client.running for client in clients)
            for client in clients:
                shown.show(
                    client.name, managed.newest_record(kits / client.name / "state" / "progress.jsonl")
                )
            for process in (*clients, *([server] if going_on else [])):
                if process.status not in (None, *_OVER):
                    raise RunFailedError(f"{process.name} {how_it_ended(process.status)}; {process.end()}")
            time.sleep(0.25)
    alone = [client.name for client in clients if client.status == NOTHING_EXCHANGED]
    if alone:
        console.print(f"[bold red]received nothing, in any round: {', '.join(alone)}[/]; their logs tell why")


class _Shown:
    """A bar for every client, or a line for each new stage where no bar can be drawn."""

    def __init__(self, console: Console, rounds: int, clients: Sequence[str]) -> None:
        self._console, self._rounds = console, rounds
        self.bars = Progress(
            TextColumn("{task.fields[name]:<16}"),
            BarColumn(24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {name: self.bars.add_task("starting", name=name, total=1.0) for name in clients}
        self._lines: dict[str, str] = {}

    def show(self, name: str, record: Mapping[str, Any]) -> None:
        """Show a client's newest record, if there is one."""
        if not record:
            return
        number, done, total = (int(record[key]) for key in ("round", "done", "total"))
        stage = f"round {number} of {self._rounds}: {record['stage']}" if number else str(record["stage"])
        if self.bars.disable:
            if self._lines.get(name) != stage:
                self._lines[name] = stage
                self._console.print(f"{name}: {stage}")
            return
        share = max(number - 1, 0) + (done / total if total else 0.0)
        completed = share / self._rounds if number else float(record["stage"] == "done")
        waiting = ", ".join(map(str, record.get("waiting_for") or ()))
        words = f"{stage}{f' {done}/{total}' if total else ''}{f' (for {waiting})' if waiting else ''}"
        self.bars.update(self._tasks[name], completed=completed, description=words)
