"""Servers on loopback that a test scripts, and clients that dial them with the files of a kit."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

import builders
from fedmosaic.client.transport import connection
from fedmosaic.client.transport.grpc import GrpcTransport
from fedmosaic.privacy.federation import identity
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc


def pem(authority: identity.Authority) -> bytes:
    return authority.certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="session")
def authority() -> identity.Authority:
    return identity.create_authority("fed")


@pytest.fixture(scope="session")
def foreign() -> identity.Authority:
    """Another authority, of the same name."""
    return identity.create_authority("fed")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_FIRST_DELAY_SECONDS", 0.02)
    for variable in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def serving(authority: identity.Authority) -> Iterator[Callable[..., int]]:
    """Starts a gRPC server on loopback, by default the right one; in plain text if it shows nothing."""
    right = builders.issue_server(authority, ["127.0.0.1"])
    with ExitStack() as started:

        def start(
            shown: builders.TlsIdentity | None = right,
            trusted: identity.Authority = authority,
            servicer: Any = None,
        ) -> int:
            server = grpc.server(ThreadPoolExecutor(4))
            unasked = rpc.FederationServicer()  # type: ignore[abstract]  # nothing is called
            rpc.add_FederationServicer_to_server(servicer or unasked, server)
            if shown is None:
                port = server.add_insecure_port("127.0.0.1:0")
            else:
                pair = [(shown.key_pem, shown.certificate_pem)]
                credentials = grpc.ssl_server_credentials(pair, pem(trusted), True)
                port = server.add_secure_port("127.0.0.1:0", credentials)
            server.start()
            started.callback(server.stop, 0)
            return port

        yield start


@pytest.fixture
def kit(tmp_path: Path, authority: identity.Authority) -> Path:
    """A folder with the TLS files of a client of the federation."""
    client = builders.issue_client(authority, "fed", "clinic-a")
    (tmp_path / "authority.pem").write_bytes(pem(authority))
    (tmp_path / "tls.pem").write_bytes(client.certificate_pem)
    identity.write_private(tmp_path / "tls.key", client.key_pem)
    return tmp_path


@pytest.fixture
def dial(kit: Path) -> Iterator[Callable[..., GrpcTransport]]:
    """Opens a transport to an address as that client."""
    with ExitStack() as opened:

        def make(address: str, **options: Any) -> GrpcTransport:
            options |= {"certificate": kit / "tls.pem", "private_key": kit / "tls.key"}
            transport = GrpcTransport(address, authority=kit / "authority.pem", **options)
            opened.callback(transport.close)
            return transport

        yield make


@pytest.fixture
def listening() -> Iterator[Callable[[Callable[[socket.socket], None]], int]]:
    """Opens a port whose connections are handed to a function, one after the other, and closed then."""
    with ExitStack() as opened:

        def start(meet: Callable[[socket.socket], None]) -> int:
            listener = opened.enter_context(socket.create_server(("127.0.0.1", 0)))
            opened.callback(listener.shutdown, socket.SHUT_RDWR)

            def run() -> None:
                while True:
                    try:
                        peer = listener.accept()[0]
                    except OSError:
                        return
                    with suppress(OSError), peer:
                        meet(peer)

            threading.Thread(target=run, daemon=True).start()
            port: int = listener.getsockname()[1]
            return port

        yield start
