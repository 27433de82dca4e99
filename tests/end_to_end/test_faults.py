"""Real servers and clients over mutual TLS, with faults: the others finish and nothing is lost.

What is killed is a process; the other clients are threads, which spares each the import of the accountants.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from end_to_end import federation_of_vectors as fv
from end_to_end.ports import free_port
from end_to_end.vector_client import take_part
from fedmosaic.client.transport import connection
from fedmosaic.server.summary import with_rounds

pytestmark = pytest.mark.timeout(1200)
CLIENT = Path(__file__).with_name("vector_client.py")
PATIENCE = 300
"""Seconds that end a test which hangs; a process may take long to start on a busy machine."""
FOREIGN = "unable to get local issuer certificate"
"""What gRPC says of a certificate of another authority."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "INFO"}


STARTED: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _a_server_that_is_back_is_soon_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_LONGEST_DELAY_SECONDS", 1.0)


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        STARTED.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT))
    return STARTED[-1]


class Federation:
    def __init__(self, directory: Path, backend: str, **schedule: Any) -> None:
        self.port = free_port()
        self.directory = fv.make_federation(directory / "f", fv.terms(backend, **schedule))
        self.log = directory / "server.log"
        (self.directory / "server" / "server.toml").write_text(
            f'listen = "127.0.0.1:{self.port}"\nstate_dir = "state"\n'
        )
        self.server = self.start_server()
        self.pool = ThreadPoolExecutor(len(fv.MEMBERS))

    def start_server(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "fedmosaic.server", "--kit", str(self.directory / "server")]
        return started(command, self.log)

    def start_client(self, name: str, fault: str = "none") -> subprocess.Popen[bytes]:
        command = [sys.executable, str(CLIENT), str(self.directory), name, f"localhost:{self.port}", fault]
        return started(command, self.directory / f"{name}.log")

    def in_thread(self, name: str, fault: str = "none") -> "Future[int]":
        return self.pool.submit(take_part, self.directory, name, f"localhost:{self.port}", fault)

    def server_lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def summary(self) -> dict[str, Any]:
        state = self.directory / "server" / "state"
        return with_rounds(json.loads((state / "run.json").read_text()), state)

    def stop(self) -> None:
        self.server.send_signal(signal.SIGTERM)
        assert self.server.wait(PATIENCE) == 0


def one_line(lines: list[str], *words: str) -> str:
    found = [line for line in lines if all(word in line for word in words)]
    assert len(found) == 1, f"expected one log line with {words}, found {found}"
    return found[0]


def test_of_four_clients_two_are_faulty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wrong certificate and NaN: each is refused by name, and the others finish."""
    # However short, a deadline below the quorum is extended: no round closes without the two that contribute.
    run = Federation(tmp_path, "plain", rounds=2, quorum=2, round_deadline_seconds=2)
    faults = {"ada": "none", "ben": "foreign", "cid": "nan", "eva": "none"}
    clients = {name: run.in_thread(name, fault) for name, fault in faults.items()}
    codes = {name: client.result(PATIENCE) for name, client in clients.items()}
    assert codes == {"ada": 0, "ben": 3, "cid": 3, "eva": 0}
    run.stop()
    results = run.summary()["results"]
    assert [result["uploaded"] for result in results] == [["ada", "eva"], ["ada", "eva"]]
    lines = run.server_lines()
    one_line(lines, "cid", "NaN")
    assert FOREIGN in run.log.read_text()
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    one_line(told, "NaN")


def test_an_encrypted_run_survives_a_killed_server_and_a_killed_client(tmp_path: Path) -> None:
    """Both are killed with SIGKILL in mid-run; every round is closed with every upload."""
    schedule = {"round_deadline_seconds": 120, "gathering_seconds": 120, "key_patience_seconds": 120}
    run = Federation(tmp_path, "mask", rounds=3, quorum=4, **schedule)
    eva = run.start_client("eva", "kill")
    clients = {name: run.in_thread(name) for name in fv.MEMBERS if name != "eva"}
    assert eva.wait(PATIENCE) == -signal.SIGKILL
    run.server.kill()
    run.server.wait()
    time.sleep(0.5)
    run.server = run.start_server()
    clients["eva"] = run.in_thread("eva", "kill")
    codes = {name: client.result(PATIENCE) for name, client in clients.items()}
    assert codes == dict.fromkeys(fv.MEMBERS, 0)
    run.stop()
    results = run.summary()["results"]
    assert [result["uploaded"] for result in results] == [sorted(fv.MEMBERS)] * 3
    assert all(len(result["weights"]["shared"]) == 5 for result in results)
