"""`fedmosaic run SCENARIO.toml`: a federation on this machine, in one process or as real processes.

With processes, the runner plays the consortium and then only watches: it makes the identities, starts
one server and the clients, which speak gRPC over mutual TLS on loopback, and follows their progress files.
"""

import datetime as dt
import json
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers.utils.logging import disable_progress_bar

from fedmosaic.experiments.comparison.report import read_run, show
from fedmosaic.experiments.methods import simulate_method
from fedmosaic.experiments.runs.client_processes import check_as_processes, client_process
from fedmosaic.experiments.scenario.founding import fit_profile, found_federation
from fedmosaic.experiments.scenario.processes import (
    ManagedProcess,
    ProgressFollower,
    RunFailedError,
    free_port,
    python_module,
    wait_for_port,
)
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.configuration import read_configuration, validate
from fedmosaic.privacy.files import hold_directory, write_atomically
from fedmosaic.protos.errors import NOTHING_EXCHANGED, ConfigurationError

_SCENARIO, _RUN = "scenario.json", "run.json"
_SERVER_START_SECONDS = 20.0
_POLL_SECONDS = 0.25
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
    method: str | None = None
    """Run this method in place of the scenario's; `fedmosaic methods` lists them."""
    seed: int | None = None
    """Use this seed in place of the scenario's."""
    rounds: int | None = None
    """Run so many rounds in place of the scenario's."""
    set: tuple[str, ...] = ()
    """Other changes, such as `relevance.temperature=0.2`; they are also the run's name in tables."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic run` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic run", description=__doc__)
    console = Console()
    disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers leaves it untyped
    if parsed.scenario.is_dir():
        if (parsed.method, parsed.seed, parsed.rounds, parsed.processes, parsed.set) != (
            None,
            None,
            None,
            False,
            (),
        ):
            raise ConfigurationError(
                f"{parsed.scenario} is a run to go on with; its method, seed and rounds are in it already"
            )
        directory = resume(parsed.scenario, console)
    else:
        scenario = read_configuration(parsed.scenario, Scenario)
        scenario = _changed(scenario, parsed).resolved(parsed.scenario.parent.resolve())
        start = run if parsed.processes else run_here
        directory = start(scenario, parsed.scenario.parent, parsed.output_dir, console)
    show(read_run(directory), console)
    console.print(f"everything is in {directory}; read it again with: fedmosaic report {directory}")
    return 0


def _changed(scenario: Scenario, arguments: Arguments) -> Scenario:
    changes: dict[str, object] = {"method": arguments.method, "seed": arguments.seed}
    given = [f"{key}={json.dumps(value)}" for key, value in changes.items() if value is not None]
    if arguments.rounds is not None:
        given.append(f"schedule.rounds={arguments.rounds}")
    return with_changes(scenario, (*given, *arguments.set), " ".join(arguments.set) or scenario.variant)


def with_changes(scenario: Scenario, changes: Sequence[str], variant: str) -> Scenario:
    """A scenario with some keys changed.

    Args:
        scenario: to start from.
        changes: each `key.of.a.table=value`, the value in TOML's form.
        variant: words that tell the result from others of its method.

    Raises:
        ConfigurationError: a key is not known, or a value does not fit.
    """
    content = scenario.model_dump(mode="json")
    for change in changes:
        _set(content, change)
    content["variant"] = variant
    return validate(content, Scenario, "the changes")


def _set(content: dict[str, Any], change: str) -> None:
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


def run_here(scenario: Scenario, base: Path, output_dir: Path, console: Console) -> Path:
    """Run a scenario in this process; arguments and result as of `run`."""
    directory = _make_directory(scenario.resolved(base.resolve()), output_dir)
    return resume(directory, console)


def resume(directory: Path, console: Console) -> Path:
    """Go on with a run in one process, or begin it; a finished run is only read.

    Args:
        directory: with the run's `scenario.json`.
        console: where progress is shown.

    Raises:
        ConfigurationError: there is no run, or it runs as processes.
        StateError: another process is running it.
    """
    directory = directory.resolve()
    record = directory / _RUN
    if not record.exists() or json.loads(record.read_text()).get("processes", True):
        raise ConfigurationError(
            f"{directory} is no run of one process; a run as processes goes on when its server and clients "
            "are started again, each on its own kit"
        )
    with hold_directory(directory / "run.lock", "let it end"):
        began = json.loads(record.read_text())
        scenario = read_configuration(directory / _SCENARIO, Scenario)
        started = time.monotonic()
        simulate_method(scenario, directory, console)
        seconds = began.get("seconds", 0.0) + time.monotonic() - started
        write_atomically(record, json.dumps({**began, "seconds": seconds}).encode())
    return directory


def _make_directory(scenario: Scenario, output_dir: Path, *, processes: bool = False) -> Path:
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 1000))):
        directory = (output_dir / f"{scenario.name}-{stamp}{suffix}").resolve()
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        _begin(scenario, directory, processes=processes)
        return directory
    raise ConfigurationError(f"{output_dir} holds a thousand runs of this second; give another output_dir")


def _begin(scenario: Scenario, directory: Path, *, processes: bool) -> None:
    started = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    (directory / _SCENARIO).write_text(scenario.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (directory / _RUN).write_text(json.dumps({"started": started, "processes": processes}) + "\n")


def run_at(scenario: Scenario, directory: Path, console: Console) -> None:
    """Run a scenario in this process in a directory of a given name, or go on with it there.

    Args:
        scenario: paths resolved.
        directory: of this run alone; a run that has ended is left as it is.
        console: where progress is shown.

    Raises:
        ConfigurationError: the directory holds a run of another scenario.
    """
    record, stored = directory / _RUN, directory / _SCENARIO
    if record.exists():
        if read_configuration(stored, Scenario) != scenario:
            raise ConfigurationError(
                f"{directory} holds a run of another scenario or of other settings; give another directory, "
                "or delete it"
            )
        if "seconds" in json.loads(record.read_text()):
            return
    else:
        directory.mkdir(parents=True, exist_ok=True)
        _begin(scenario, directory, processes=False)
    resume(directory, console)


def run(scenario: Scenario, base: Path, output_dir: Path, console: Console) -> Path:
    """Run a scenario with real processes.

    Args:
        scenario: what to run.
        base: directory that relative paths of the scenario start from.
        output_dir: parent of the run's directory.
        console: where progress is shown.

    Returns:
        The run's directory.

    Raises:
        RunFailedError: a process failed; the message names it and shows the end of its log.
    """
    started = time.monotonic()
    scenario = scenario.resolved(base.resolve())
    check_as_processes(scenario)
    directory = _make_directory(scenario, output_dir, processes=True)
    profile = fit_profile(scenario, directory, console, own_process=True)
    port = free_port()
    found_federation(scenario, profile, directory, port)
    console.print(
        f"[bold]{scenario.name}[/]: identities, certificates and roster are in {directory}/federation"
    )
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    server = ManagedProcess(
        "server",
        python_module("fedmosaic.server", "--kit", str(directory / "federation" / "server")),
        directory / "server.log",
    )
    clients = [client_process(scenario, client, directory, port) for client in scenario.clients]
    try:
        server.start({})
        wait_for_port(port, server, _SERVER_START_SECONDS)
        for client in clients:
            client.start(threads)
        _watch(scenario, server, clients, directory, console)
    finally:
        for process in (*clients, server):
            if hasattr(process, "process"):
                process.stop()
    seconds = time.monotonic() - started
    began = json.loads((directory / _RUN).read_text())
    write_atomically(directory / _RUN, json.dumps({**began, "seconds": seconds}).encode())
    return directory


def _watch(
    scenario: Scenario,
    server: ManagedProcess,
    clients: Sequence[ManagedProcess],
    directory: Path,
    console: Console,
) -> None:
    """Follow the processes until every client has ended; stop everything if the server ends."""
    places = {
        c.name: directory / "federation" / "clients" / c.name / "state" / "progress.jsonl" for c in clients
    }
    followers = {name: ProgressFollower(path) for name, path in places.items()}
    columns = (
        TextColumn("{task.fields[name]:<16}"),
        BarColumn(24),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    plain = _PlainLines(console) if not console.is_terminal else None
    with Progress(*columns, console=console, disable=plain is not None) as progress:
        tasks = {c.name: progress.add_task("starting", name=c.name, total=1.0) for c in clients}
        while any(client.running for client in clients):
            if not server.running and server.process.returncode not in _OVER:
                raise RunFailedError(
                    f"the server ended early; {server.log} ends with:\n{server.last_lines()}"
                )
            for name, follower in followers.items():
                _show(progress, tasks[name], follower.poll(), scenario.schedule.rounds)
                if plain:
                    plain.show(name, follower.latest)
            _check_clients(clients)
            time.sleep(_POLL_SECONDS)
    _check_clients(clients)
    alone = [client.name for client in clients if client.process.returncode == NOTHING_EXCHANGED]
    if alone:
        console.print(f"[bold red]received nothing, in any round: {', '.join(alone)}[/]; their logs tell why")


def _check_clients(clients: Sequence[ManagedProcess]) -> None:
    failed = [c for c in clients if not c.running and c.process.returncode not in _OVER]
    if failed:
        client = failed[0]
        raise RunFailedError(
            f"client {client.name} ended with status {client.process.returncode}; {client.log} ends with:\n"
            f"{client.last_lines()}"
        )


def _show(progress: Progress, task: TaskID, record: dict[str, object], rounds: int) -> None:
    if not record:
        return
    number, done, total = int(str(record["round"])), int(str(record["done"])), int(str(record["total"]))
    share = done / total if total else 0.0
    stage = f"round {number} of {rounds}: {record['stage']}" if number else str(record["stage"])
    if total:
        stage += f" {done}/{total}"
    waiting = record.get("waiting_for")
    if isinstance(waiting, list) and waiting:
        stage += f" (for {', '.join(map(str, waiting))})"
    completed = (
        (max(number - 1, 0) + share) / rounds if number else (1.0 if record["stage"] == "done" else 0.0)
    )
    progress.update(task, completed=completed, description=stage)


class _PlainLines:
    """One line per new stage, where no bar can be drawn."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: dict[str, tuple[object, object]] = {}

    def show(self, name: str, record: dict[str, object]) -> None:
        key = (record.get("round"), record.get("stage"))
        if record and self._shown.get(name) != key:
            self._shown[name] = key
            prefix = f"round {record['round']}: " if record["round"] else ""
            self._console.print(f"{name}: {prefix}{record['stage']}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
