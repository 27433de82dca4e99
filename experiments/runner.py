"""`fedmosaic run SCENARIO.toml`: a federation of real processes on this machine.

The runner plays the consortium and then only watches: it makes the identities, starts one server and
the clients, which speak gRPC over mutual TLS on loopback, and follows their progress files.
"""

import datetime as dt
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedmosaic.experiments.processes import (
    ManagedProcess,
    ProgressFollower,
    RunFailedError,
    free_port,
    python_module,
    wait_for_port,
)
from fedmosaic.experiments.report import read_run, show
from fedmosaic.experiments.scenario import Scenario, ScenarioClient
from fedmosaic.privacy import federation
from fedmosaic.privacy.configuration import read_configuration
from fedmosaic.privacy.mechanism import ProfileMechanism
from fedmosaic.privacy.roster import Terms

_SERVER_START_SECONDS = 20.0
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Arguments:
    """Run a scenario: one server process, one process per client, real models and data."""

    scenario: tyro.conf.Positional[Path]
    """The scenario file (TOML)."""
    output_dir: Path = Path("runs")
    """Where the run's directory is made."""


def main(arguments: Sequence[str]) -> int:
    """Run `fedmosaic run` with its arguments."""
    parsed = tyro.cli(Arguments, args=list(arguments), prog="fedmosaic run", description=__doc__)
    scenario = read_configuration(parsed.scenario, Scenario)
    console = Console()
    directory = run(scenario, parsed.scenario.parent, parsed.output_dir, console)
    show(read_run(directory), console)
    console.print(f"everything is in {directory}; read it again with: fedmosaic report {directory}")
    return 0


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
    stamp = dt.datetime.now(dt.UTC).strftime("%Y%m%d-%H%M%S")
    directory = (output_dir / f"{scenario.name}-{stamp}").resolve()
    directory.mkdir(parents=True)
    (directory / "scenario.json").write_text(scenario.model_dump_json(indent=2) + "\n")
    profile = _fit_profile(scenario, base, directory, console)
    port = free_port()
    _found_federation(scenario, profile, directory, port)
    console.print(
        f"[bold]{scenario.name}[/]: identities, certificates and roster are in {directory}/federation"
    )
    threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    server = ManagedProcess(
        "server",
        python_module("fedmosaic.server", "--kit", str(directory / "federation" / "server")),
        directory / "server.log",
    )
    clients = [_client_process(scenario, client, base, directory, port) for client in scenario.clients]
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
    (directory / "run.json").write_text(json.dumps({"seconds": seconds, "finished": stamp}) + "\n")
    return directory


def _fit_profile(scenario: Scenario, base: Path, directory: Path, console: Console) -> ProfileMechanism:
    """Fit the public basis in a process of its own, so that its model's memory is given back."""
    fitted = directory / "profile"
    console.print("fitting the public basis of the task profile on public data")
    command = python_module(
        "fedmosaic.experiments.probe",
        "--probe", scenario.probe.path,
        "--dtype", scenario.probe.dtype,
        *(["--keep-layers", str(scenario.probe.keep_layers)] if scenario.probe.keep_layers else []),
        "--public", str(base / scenario.profile.public_data),
        "--kind", scenario.profile.kind,
        "--side", str(scenario.profile.side),
        "--noise-multiplier", str(scenario.profile.noise_multiplier),
        "--max-length", str(scenario.profile.max_length),
        "--out", str(fitted),
    )  # fmt: skip
    process = ManagedProcess("probe", command, directory / "probe.log")
    process.start({})
    process.process.wait()
    if process.process.returncode:
        raise RunFailedError(
            f"fitting the public basis failed; {process.log} ends with:\n{process.last_lines()}"
        )
    return ProfileMechanism.model_validate_json((fitted / "profile.json").read_text())


def _found_federation(scenario: Scenario, profile: ProfileMechanism, directory: Path, port: int) -> None:
    config = federation.FederationConfig(
        federation=scenario.name,
        members=tuple(federation.MemberEntry(id=c.id, family=c.family) for c in scenario.clients),
        server=federation.ServerEntry(port=port),
        terms=Terms(
            adapter=scenario.adapter,
            adapter_privacy=scenario.adapter_privacy,
            profile=profile,
            policy=scenario.policy,
            relevance=scenario.relevance,
            schedule=scenario.schedule,
            encryption=scenario.encryption,
            allow_plaintext=scenario.allow_plaintext,
        ),
    )
    basis = directory / "profile" / federation.BASIS
    federation.create(config, directory / "federation", basis if basis.exists() else None)


def _client_process(
    scenario: Scenario, client: ScenarioClient, base: Path, directory: Path, port: int
) -> ManagedProcess:
    place = directory / "federation" / "clients" / client.id
    others = {c.task: str((base / c.test).resolve()) for c in scenario.clients if c.task != client.task}
    settings = {
        "kit": str(place),
        "server": f"localhost:{port}",
        "state_dir": str(place / "state"),
        "model": client.model.model_dump(exclude_none=True),
        "probe": scenario.probe.model_dump(exclude_none=True),
        "data": {
            "train": str((base / client.train).resolve()),
            "test": str((base / client.test).resolve()),
            "others": others,
            "evaluation_examples": scenario.evaluation_examples,
            "others_examples": scenario.others_examples,
        },
        "training": scenario.training.model_dump(mode="json", exclude_none=True),
        "profile_max_length": scenario.profile.max_length,
        "threads": 1,
    }
    path = place / "client.json"
    path.write_text(json.dumps(settings, indent=2) + "\n")
    return ManagedProcess(
        client.id, python_module("fedmosaic.client", str(path)), directory / f"{client.id}.log"
    )


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
            if not server.running:
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


def _check_clients(clients: Sequence[ManagedProcess]) -> None:
    failed = [c for c in clients if not c.running and c.process.returncode != 0]
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
