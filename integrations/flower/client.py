"""`python -m fedmosaic.integrations.flower.client CONFIG SOCKET`: a client whose calls Flower carries."""

import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, cast

import grpc
import tyro
from google.protobuf.message import DecodeError
from google.rpc import status_pb2  # type: ignore[import-untyped]  # googleapis-common-protos has no stubs

from fedmosaic.client.__main__ import take_part
from fedmosaic.client.client import Client
from fedmosaic.integrations.flower.secured import TURN_BYTES, Frames, Kind, Secured, tls_context
from fedmosaic.privacy.federation.identity import check_certificate, check_pair
from fedmosaic.privacy.terminal import guarded
from fedmosaic.protos.errors import ConfigurationError, WireError
from fedmosaic.protos.refusal import Refusal, from_status

_PATIENCE_SECONDS: Final = 90.0
"""What Flower's queues may add to the time of a call."""
_NOBODY: Final = "nobody asked in time; check that the run, the SuperLink and this client's SuperNode are up"


class PipeChannel:
    """What stubs use of `grpc.Channel`: one call at a time, said to whoever asks at a Unix socket."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext, server_name: str) -> None:
        self._listener, self._context, self._server_name = listener, context, server_name
        self._secured: Secured | None = None
        self._asking: Connection | None = None
        self._one_call = threading.Lock()

    def unary_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        """A method whose request is a message or an iterator of them, and whose answer is an iterator.

        All is heard before the first message is given: who reads them may call again. A call that fails with
        a `grpc.RpcError`, after the messages that came, may be repeated; a `Refusal` is the server's.
        """

        def call(request: Any, timeout: float) -> Iterator[Any]:
            requests = request if isinstance(request, Iterator) else (request,)
            deadline, heard = time.monotonic() + timeout + _PATIENCE_SECONDS, list[bytes]()
            fault: Exception | None = None
            with self._one_call:
                try:
                    self._converse(path, map(request_serializer, requests), deadline, heard)
                except (Refusal, grpc.RpcError) as error:
                    fault = error
            yield from (_parsed(response_deserializer, answer) for answer in heard)
            if fault is not None:
                raise fault

        return call

    def unary_unary(self, path: str, **serializers: Any) -> Callable[..., Any]:
        """A method whose answer is one message."""
        method = self.unary_stream(path, **serializers)

        def call(request: Any, timeout: float) -> Any:
            answers = list(method(request, timeout))
            if len(answers) != 1:
                raise grpc.RpcError(f"{path} was answered with {len(answers)} messages, expected one")
            return answers[0]

        return call

    stream_unary = unary_unary

    def close(self) -> None:
        """Leave whoever is asking; the socket stays as long as the process."""
        if self._asking is not None:
            self._asking.close()
            self._asking = None

    def _converse(self, path: str, requests: Iterable[bytes], deadline: float, heard: list[bytes]) -> None:
        """Make a call, and add to `heard`. One that does not come to its status ends the session."""
        secured, self._secured = self._secured or Secured(self._context, self._server_name), None
        answers: Frames = []
        while not secured.agreed:
            self._exchange(secured, deadline)
        secured.send(Kind.CALL, path.encode())
        for request in requests:
            secured.send(Kind.MESSAGE, request)
            while secured.outgoing.pending >= TURN_BYTES and not answers:
                answers = self._exchange(secured, deadline, more=True)
            if answers:
                break
        secured.send(Kind.END)
        while True:
            for kind, payload in answers:
                if kind is Kind.STATUS:
                    self._secured = secured
                    return _check(payload, path)
                heard.append(payload)
            answers = self._exchange(secured, deadline)

    def _exchange(self, secured: Secured, deadline: float, more: bool = False) -> Frames:
        """Say a turn to whoever asks, and hear what the next one brings: something, or the wish for more."""
        try:
            # Who asked while nothing was called has given up since, if there is something to read: its end.
            while self._asking is None or self._asking.poll():
                self._await_question(deadline)
            self._asking.send_bytes(secured.take())
            records = self._await_question(deadline)
            if not records and not more and not secured.outgoing.pending:
                raise grpc.RpcError("a message was lost")
            return secured.receive(records)
        except TimeoutError:
            raise grpc.RpcError(_NOBODY) from None
        except ssl.SSLCertVerificationError as error:
            raise grpc.RpcError(str(error)) from None
        except (OSError, EOFError, WireError) as error:  # an SSLError is an OSError
            # In capitals OpenSSL's other errors would read as a wrong port, which no patience cures.
            raise grpc.RpcError(f"a message was lost, or changed on its way: {str(error).lower()}") from None

    def _await_question(self, deadline: float) -> bytes:
        """The server's records, brought by who is now `_asking`."""
        self.close()
        self._listener.settimeout(max(0.001, deadline - time.monotonic()))
        self._asking = Connection(self._listener.accept()[0].detach())
        return self._asking.recv_bytes(TURN_BYTES)


def _parsed(parse: Callable[[bytes], Any], content: bytes) -> Any:
    try:
        return parse(content)
    except DecodeError:
        raise grpc.RpcError(f"{len(content)} bytes came that are no answer of this call") from None


def _check(status: bytes, path: str) -> None:
    found = _parsed(status_pb2.Status.FromString, status)
    code = next((known for known in grpc.StatusCode if known.value[0] == found.code), grpc.StatusCode.UNKNOWN)
    if code is not grpc.StatusCode.OK:
        problem = from_status(code, found.message, found.details, path)
        raise problem if isinstance(problem, Refusal) else grpc.RpcError(str(problem))


def connector(path: Path) -> Callable[[str, Path, Path, Path], grpc.Channel]:
    """Make a socket for its owner and group, and what opens a channel over it; ConfigurationError if none."""
    listener, mask = socket.socket(socket.AF_UNIX), os.umask(0o117)
    try:
        if path.is_socket():
            path.unlink()
        listener.bind(str(path))
    except OSError as error:
        raise ConfigurationError(f"{path}: no socket can be made there: {error}") from None
    finally:
        os.umask(mask)
    listener.listen(1)

    def connect(address: str, authority: Path, certificate: Path, private_key: Path) -> grpc.Channel:
        check_pair(certificate, private_key)
        check_certificate(certificate, authority)
        context = tls_context(ssl.PROTOCOL_TLS_CLIENT, authority, certificate, private_key)
        return cast(grpc.Channel, PipeChannel(listener, context, address.rpartition(":")[0].strip("[]")))

    return connect


def take_part_over_flower(config: tyro.conf.Positional[Path], socket: tyro.conf.Positional[Path]) -> int:
    """Take part in a federation whose calls a SuperNode on this machine carries over a Unix socket.

    The configuration is that of `fedmosaic client`; the host in `server` is checked, not dialled. The socket
    is made; the SuperNode's user needs the right to it, and to nothing else.
    """
    return take_part(Client(config, connect=connector(socket)))


if __name__ == "__main__":
    sys.exit(guarded("fedmosaic over Flower", lambda: tyro.cli(take_part_over_flower)))
