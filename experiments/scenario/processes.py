"""Start, watch and stop the real processes of a federation on this machine."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmosaic.protos.errors import FedMosaicError

_STOP_SECONDS = 15.0


class RunFailedError(FedMosaicError):
    """A process of the run ended with an error, or did not start."""


@dataclass
class ManagedProcess:
    """One child process and the log file that it writes to."""

    name: str
    command: Sequence[str]
    log: Path
    _process: subprocess.Popen[bytes] | None = None

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the process; its output goes to the log file only."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603  # our own modules, arguments as a list
                list(self.command),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **environment},
            )

    @property
    def running(self) -> bool:
        """Whether the process was started and has not ended yet."""
        return self._process is not None and self._process.poll() is None

    @property
    def status(self) -> int | None:
        """With which it ended; None before."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """Ask the process to end, and insist after a while."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def end(self) -> str:
        """Where its log is and what that ends with, for an error message."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-12:]
        except OSError:
            lines = ["(no log)"]
        return "\n".join((f"{self.log} ends with:", *lines))


def python_module(module: str, *arguments: str) -> list[str]:
    """Command line that runs one of our modules with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def free_port() -> int:
    """A TCP port on loopback that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: ManagedProcess, seconds: float) -> None:
    """Wait until something listens on a loopback port.

    Raises:
        RunFailedError: the process ended, or nothing listens in time.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not process.running:
            raise RunFailedError(f"{process.name} ended at its start; {process.end()}")
        with socket.socket() as probe:
            probe.settimeout(0.5)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RunFailedError(
        f"{process.name} does not listen on port {port} after {seconds:.0f} s; see {process.log}"
    )


@dataclass
class ProgressFollower:
    """Reads the JSON lines that a client writes about its progress, as they come."""

    path: Path
    _offset: int = 0
    latest: dict[str, Any] = field(default_factory=dict)

    def poll(self) -> dict[str, Any]:
        """The newest record; empty before the first."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._offset)
                complete, newline, _ = file.read().rpartition(b"\n")
            if newline:
                self._offset += len(complete) + 1
                self.latest = json.loads(complete.splitlines()[-1])
        return self.latest
