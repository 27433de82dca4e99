"""What is left of a run, read from its directory or from the state of one party."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from fedmosaic.client.data.records import Example, read_examples
from fedmosaic.client.statement import STATEMENT
from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.statement.check import check_received
from fedmosaic.privacy.statement.models import PrivacyStatement
from fedmosaic.protos.errors import ConfigurationError, PrivacyError
from fedmosaic.server.summary import with_rounds

_RESULT, _SERVER_RUN = "result.json", "run.json"


@dataclass(frozen=True)
class RunRecord:
    """Everything that is left of a run, as far as it is here; by client id, and the server's `run.json`."""

    directory: Path
    clients: Mapping[str, Mapping[str, Any]]
    statements: Mapping[str, Mapping[str, Any]]
    server: Mapping[str, Any]
    tasks: Mapping[str, str]
    majority: Mapping[str, float] = field(default_factory=dict)


def read_run(path: Path) -> RunRecord:
    """Read what a run left behind; `ConfigurationError` if there is nothing, `StateError` for damage."""
    majority: Mapping[str, float] = {}
    if (path / "federation").is_dir():
        kits = sorted((path / "federation" / "clients").iterdir())
        states = {kit.name: kit / "state" for kit in kits}
        server = _read_server(path / "federation" / "server" / "state")
        scenario = read_kept(path / "scenario.json")
        tasks = {client["id"]: client["task"] for client in scenario.get("clients", [])}
        majority = majorities(scenario)
    elif (path / _RESULT).exists():
        states = {read_kept(path / "session.json").get("client", path.name): path}
        server, tasks = {}, {}
    elif (path / _SERVER_RUN).exists():
        states, server, tasks = {}, _read_server(path), {}
    else:
        raise ConfigurationError(
            f"{path}: no run here; give the directory that `fedmosaic run` printed, or the state directory "
            "of a client or a server"
        )
    found = {name: read_kept(state / STATEMENT) for name, state in states.items()}
    statements = {name: content for name, content in found.items() if content}
    if not states:
        statements = server.get("statements", {})
    clients = {name: read_kept(state / _RESULT) for name, state in states.items()}
    return RunRecord(path, clients, statements, server, tasks, majority)


def _read_server(state_dir: Path) -> dict[str, Any]:
    run = read_kept(state_dir / _SERVER_RUN)
    return with_rounds(run, state_dir) if run else run


def read_kept(path: Path) -> dict[str, Any]:
    """A JSON object of a run's directory; empty where there is no file."""
    return read_object(path, "restore it, or move it away and see the rest") if path.exists() else {}


def majority_accuracy(examples: Sequence[Example]) -> float:
    """Share in [0, 1] of examples with the most frequent answer; NaN if one has no choices."""
    if not examples or not all(example.choices for example in examples):
        return math.nan
    return Counter(example.answer for example in examples).most_common(1)[0][1] / len(examples)


def majorities(scenario: Mapping[str, Any]) -> dict[str, float]:
    """What always the most frequent answer scores, by client; NaN where the run's test files have gone."""
    limit = scenario.get("evaluation_examples") or None

    def score(client: Mapping[str, Any]) -> float:
        files = [task.get("test") for task in (client.get("tasks") or [client])]
        try:
            return fmean(majority_accuracy(read_examples(Path(file))[:limit]) for file in files if file)
        except (ConfigurationError, ValueError):
            return math.nan

    return {client["id"]: score(client) for client in scenario.get("clients", [])}


def read_object(path: Path, remedy: str = "give directories of finished runs") -> dict[str, Any]:
    """Read a file that holds one JSON object.

    `ConfigurationError` if it is missing, damaged or no object; the message ends with the remedy.
    """
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); {remedy}") from None
    return content


def alone(record: RunRecord) -> list[str]:
    """Who received nothing from the others although the run is over, one line each."""
    lines = [
        f"{name} RECEIVED NOTHING from the others, in any round: it trained alone."
        for name, result in record.clients.items()
        if result.get("received_rounds") == 0
    ]
    received = record.server.get("received_rounds")
    if record.server.get("phase") == "finished" and received is not None and not any(received.values()):
        lines.append("NOTHING WAS EXCHANGED in this run: no member received anything, in any round.")
    return lines


def usable_statements(record: RunRecord) -> tuple[dict[str, PrivacyStatement], dict[str, str]]:
    """The statements of a run that can be shown together, and why the others cannot, by client id."""
    usable: dict[str, PrivacyStatement] = {}
    unreadable = record.server.get("unreadable_statements", ())
    left_out = dict.fromkeys(unreadable, "the server could not read what it had stored")
    for name, content in record.statements.items():
        try:
            usable[name] = check_received(content, name, record.server.get("run_id"))
        except PrivacyError as error:
            left_out[name] = str(error)
    terms = Counter((s.run_id, s.roster_sha256) for s in usable.values())
    for name, statement in list(usable.items()):
        if (statement.run_id, statement.roster_sha256) != terms.most_common(1)[0][0]:
            left_out[name] = "it is about another run or roster than the others"
            del usable[name]
    return usable, left_out
