"""Only the owner reads what a client or the server writes: whatever the umask, whoever made the folder."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fedmosaic.client.client import Client
from fedmosaic.client.transport.grpc import GrpcTransport
from fedmosaic.experiments.runs.processes import client_process
from fedmosaic.experiments.scenario.founding import fit_profile, found_federation
from fedmosaic.server.server import Server
from fedmosaic.server.settings import settings_from_kit

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")


@pytest.fixture
def no_umask() -> Iterator[None]:
    """Where nothing is taken away from a mode; with any other umask a file has fewer readers."""
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(place: Path) -> dict[str, str]:
    """Files and folders that somebody else may use, with their modes."""
    found = {}
    for path in (place, *place.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & 0o077:
            found[str(path.relative_to(place))] = f"{mode:04o}"
    return found


def take_part(scenario: Any, directory: Path, port: int) -> list[BaseException]:
    """Run every client as `fedmosaic client` does, each in a thread; returns what they raised."""
    errors: list[BaseException] = []

    def run(entry: Any) -> None:
        client_process(scenario, entry, directory, port)
        path = directory / "federation" / "clients" / entry.id / "client.json"
        try:
            Client(path).run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(entry,), daemon=True) for entry in scenario.clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return errors


@pytest.mark.usefixtures("no_umask")
def test_a_whole_run_leaves_nothing_that_others_can_read(
    tiny_scenario: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = tiny_scenario(
        adapter={"rank": 2, "blocks": 2, "protection": "encrypted"},
        encryption={"backend": "mask"},
        allow_plaintext=False,
        policy={},
    )
    found_federation(
        scenario, fit_profile(scenario, tmp_path, Console(quiet=True), own_process=False), tmp_path, 7443
    )
    kits = tmp_path / "federation"
    states = {c.id: kits / "clients" / c.id / "state" for c in scenario.clients} | {
        "server": kits / "server/state"
    }
    for state in states.values():
        state.mkdir(mode=0o755)
    seen: dict[str, set[str]] = {name: set() for name in states}
    bad: dict[str, dict[str, str]] = {}

    def look() -> None:
        for name, state in states.items():
            seen[name].update(path.name for path in _below(state))
            bad.setdefault(name, {}).update(_while_others_write(state))

    push = GrpcTransport.push

    def watched(self: GrpcTransport, upload: Any) -> Any:
        look()
        return push(self, upload)

    monkeypatch.setattr(GrpcTransport, "push", watched)
    settings = settings_from_kit(kits / "server").model_copy(update={"listen": "127.0.0.1:0"})
    with Server(settings).background() as port:
        errors = take_part(scenario, tmp_path, port)
        assert errors == []
        look()
    for name, state in states.items():
        assert bad[name] == {}, name
        assert open_to_others(state) == {}, name
    kept = "session.json rows.json progress.jsonl result.json statement.json lock ledger.json"
    kept += " profile-average.npz clipping.json counter.json epoch-0000000001.json upload-0002.bin"
    for name in states.keys() - {"server"}:
        assert seen[name] >= {*kept.split(), "adapter_model.safetensors", "adapter_config.json"}
    at_server = "server.db server.db-wal server.db-shm run.json 000001.json all.bin lock client-0.bin"
    assert seen["server"] >= set(at_server.split())


def _below(state: Path) -> list[Path]:
    """All files and folders below; `os.walk`, unlike `rglob`, passes over a folder that goes meanwhile."""
    return [Path(where, name) for where, folders, files in os.walk(state) for name in (*folders, *files)]


def _while_others_write(state: Path) -> dict[str, str]:
    """As `open_to_others`, while files come and go; what PEFT is writing stands in a closed folder."""
    found = {}
    for path in (state, *_below(state)):
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except FileNotFoundError:
            continue
        if mode & 0o077 and "saving" not in path.parts:
            found[str(path.relative_to(state))] = f"{mode:04o}"
    return found
