"""`python -m fedmosaic.integrations.flower.client CONFIG SOCKET`: a client whose calls Flower carries."""

import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import grpc
import tyro

from fedmosaic.client.client import Client
from fedmosaic.client.command import take_part
from fedmosaic.client.transport.connection import credentials
from fedmosaic.integrations.flower import pipe
from fedmosaic.privacy.terminal import guarded
from fedmosaic.protos.errors import ConfigurationError

log = logging.getLogger(__name__)
_PATIENCE_SECONDS: Final = 90.0
"""What Flower's queues may add to the time of a call."""


class Pipe(threading.Thread):
    """Carries one connection of this process's gRPC, a turn for each question at a Unix socket."""

    def __init__(self, path: Path) -> None:
        """Make the socket, for its owner and group; ConfigurationError if that cannot be."""
        super().__init__(name="fedmosaic-flower", daemon=True)
        self._folder = TemporaryDirectory(prefix="fedmosaic-")
        self._asked, self._dialled = _listening(path), _listening(Path(self._folder.name, "grpc"))
        self._asked.settimeout(_PATIENCE_SECONDS)
        self._line: list[socket.socket] = []  # gRPC's connection, if it has one
        self._number, self._said = b"", b""

    def connect(self, address: str, authority: Path, certificate: Path, private_key: Path) -> grpc.Channel:
        """As `open_channel`, but over the pipe: the address only names the server that is accepted."""
        name = ("grpc.ssl_target_name_override", address.rpartition(":")[0].strip("[]"))
        shown = credentials(authority, certificate, private_key)
        channel = grpc.secure_channel(f"unix:{self._folder.name}/grpc", shown, (*pipe.OPTIONS, name))
        for kind in ("unary_unary", "unary_stream", "stream_unary"):
            setattr(channel, kind, _patient(getattr(channel, kind)))
        return channel

    def run(self) -> None:
        """Answer questions as long as the process lives."""
        while True:
            try:
                with Connection(self._asked.accept()[0].detach()) as asker:
                    self._answer(asker)
            except TimeoutError:
                log.warning("nobody asks; check that run, SuperLink and this client's SuperNode are up")
            except (OSError, EOFError):
                pass  # who asked has left; what was to be said is kept for the next

    def _answer(self, asker: Connection) -> None:
        question = asker.recv_bytes(1 + pipe.TURN_BYTES)
        turn, idle = question[1:], question[:1] == b"\1"
        if turn[: pipe.NUMBER_BYTES] == self._number:
            for line in self._line:
                with suppress(OSError):  # gRPC has hung up, which is found below
                    line.sendall(turn[pipe.NUMBER_BYTES :])
        elif self._number:
            self._hang_up()  # the server knows no more of the connection
        until = time.monotonic() + (pipe.HOLD_SECONDS if idle else pipe.BRIEF_SECONDS)
        while room := pipe.TURN_BYTES - pipe.NUMBER_BYTES - len(self._said):
            seconds = pipe.QUIET_SECONDS if self._said else until - time.monotonic()
            if not (ready := wait([self._dialled, *self._line], seconds)):
                break
            if self._dialled in ready:
                self._hang_up()
                self._line = [self._dialled.accept()[0]]
            elif piece := self._line[0].recv(room):
                self._said += piece
            else:
                self._hang_up()
        number = self._number or (secrets.token_bytes(pipe.NUMBER_BYTES) if self._said else b"")
        asker.send_bytes(number + self._said)
        self._number, self._said = number, b""

    def _hang_up(self) -> None:
        for line in self._line:
            line.close()
        self._line, self._number, self._said = [], b"", b""


def _listening(path: Path) -> socket.socket:
    """A Unix socket for its owner and group."""
    line, mask = socket.socket(socket.AF_UNIX), os.umask(0o117)
    try:
        if path.is_socket():
            path.unlink()
        line.bind(str(path))
    except OSError as error:
        raise ConfigurationError(f"{path}: no socket can be made there: {error}") from None
    finally:
        os.umask(mask)
    line.listen(16)
    return line


def _patient(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Makes methods as a channel does, but for deadlines that leave Flower its time."""

    def method(*arguments: Any, **keywords: Any) -> Any:
        call = factory(*arguments, **keywords)
        return lambda request, timeout: call(request, timeout=timeout + _PATIENCE_SECONDS)

    return method


def take_part_over_flower(config: tyro.conf.Positional[Path], socket: tyro.conf.Positional[Path]) -> int:
    """Take part in a federation whose calls a SuperNode on this machine carries over a Unix socket.

    The configuration is that of `fedmosaic client`. The SuperNode's user needs the right to the socket alone.
    """
    carried = Pipe(socket)
    carried.start()
    return take_part(Client(config, connect=carried.connect))


if __name__ == "__main__":
    sys.exit(guarded("fedmosaic over Flower", lambda: tyro.cli(take_part_over_flower)))
