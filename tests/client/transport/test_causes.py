"""Why a server cannot be reached: every cause is made to happen, is told apart and has its remedy."""

import datetime as dt
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization

from fedmosaic.client.transport import connection
from fedmosaic.client.transport.causes import explain
from fedmosaic.client.transport.grpc import GrpcTransport, TransportOptions
from fedmosaic.privacy.federation import identity
from fedmosaic.privacy.federation.identity import TlsIdentity
from fedmosaic.protos.errors import IdentityError, TransportError
from fedmosaic.protos.messages import Enrolment
from fedmosaic.protos.refusal import Refusal
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc

ENROLMENT = Enrolment(1, "fed", bytes(32), bytes(32), "", "test")
AUTHORITY, FOREIGN = identity.create_authority("fed"), identity.create_authority("fed")
NOW, DAY = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
# An address, not a name: a name may lead to several addresses, and gRPC tells of the last one only.
LONG = 3600.0
"""A patience that no test has: what is final must not wait for it."""


def pem(authority: identity.Authority) -> bytes:
    return authority.certificate.public_bytes(serialization.Encoding.PEM)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_FIRST_DELAY_SECONDS", 0.02)
    for variable in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)


@contextmanager
def serving(shown: TlsIdentity | None, trusted: bytes = b"") -> Iterator[int]:
    """A gRPC server without any call, on loopback; in plain text without a certificate."""
    server = grpc.server(ThreadPoolExecutor(1))
    rpc.add_FederationServicer_to_server(rpc.FederationServicer(), server)
    if shown is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = [(shown.key_pem, shown.certificate_pem)]
        credentials = grpc.ssl_server_credentials(pair, trusted or pem(AUTHORITY), require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(0)


@pytest.fixture
def dial(tmp_path: Path) -> Callable[..., object]:
    """Enrols at an address as a client of the federation and returns what is raised."""
    client = identity.issue_client(AUTHORITY, "fed", "clinic-a")
    (tmp_path / "authority.pem").write_bytes(pem(AUTHORITY))
    (tmp_path / "tls.pem").write_bytes(client.certificate_pem)
    identity.write_private(tmp_path / "tls.key", client.key_pem)

    def attempt(address: str, patience: float) -> Exception:
        transport = GrpcTransport(
            address,
            authority=tmp_path / "authority.pem",
            certificate=tmp_path / "tls.pem",
            private_key=tmp_path / "tls.key",
            options=TransportOptions(retry_seconds=patience),
        )
        try:
            transport.enrol(ENROLMENT)
        except Exception as error:
            return error
        finally:
            transport.close()
        raise AssertionError("nobody answers here")

    return attempt


SERVERS: dict[str, tuple[Callable[[], TlsIdentity | None], str]] = {
    "another name": (
        lambda: identity.issue_server(AUTHORITY, ["fl.example.org", "192.0.2.7"]),
        r"the server's certificate is for fl\.example\.org, 192\.0\.2\.7; set server in client\.toml",
    ),
    "another authority": (
        lambda: identity.issue_server(FOREIGN, ["127.0.0.1"]),
        "no certificate of this federation's authority",
    ),
    "expired": (
        lambda: identity.issue_server(AUTHORITY, ["127.0.0.1"], days=1, now=NOW - 9 * DAY),
        "certificate has expired",
    ),
    "not valid yet": (
        lambda: identity.issue_server(AUTHORITY, ["127.0.0.1"], now=NOW + 9 * DAY),
        "not valid yet; compare the clocks",
    ),
    "a client's certificate": (
        lambda: identity.issue_client(AUTHORITY, "fed", "x"),
        "a certificate that is not a server's",
    ),
    "no TLS": (lambda: None, "does not speak TLS"),
}


@pytest.mark.parametrize(("make", "words"), SERVERS.values(), ids=SERVERS.keys())
def test_what_is_final_is_not_tried_again(
    make: Callable[[], TlsIdentity | None], words: str, dial: Callable[..., object]
) -> None:
    with serving(make()) as port, pytest.raises(IdentityError, match=words):
        raise dial(f"127.0.0.1:{port}", LONG)  # type: ignore[misc]


@contextmanager
def closing() -> Iterator[int]:
    """Something that takes connections and closes them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=run, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_what_time_may_cure_is_tried_and_told(dial: Callable[..., object]) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        error = dial(f"127.0.0.1:{port}", 0.3)
        assert isinstance(error, TransportError)
        assert f"127.0.0.1:{port} could not be reached" in str(error)
        assert "nothing listens there" in str(error)
    with closing() as port:
        assert "closed before TLS was agreed" in str(dial(f"127.0.0.1:{port}", 0.3))
    error = dial("no-such-host.invalid:7443", 0.3)
    assert isinstance(error, TransportError)
    assert "the name cannot be found" in str(error)


def test_a_server_that_refuses_this_certificate_is_suspected(dial: Callable[..., object]) -> None:
    with serving(identity.issue_server(AUTHORITY, ["127.0.0.1"]), trusted=pem(FOREIGN)) as port:
        error = dial(f"127.0.0.1:{port}", 0.5)
    assert isinstance(error, TransportError)
    assert "refuses this client's certificate" in str(error)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_this_machine_is_reached_without_a_proxy(
    variable: str, dial: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with serving(identity.issue_server(AUTHORITY, ["127.0.0.1"])) as port:
        error = dial(f"127.0.0.1:{port}", 2.0)
    # The server has no such call: it was reached.
    assert "Method not implemented" in str(error)


REFUSED = "enrol failed: UNAVAILABLE: last error: UNKNOWN: ipv4:1.2.3.4:1: Connection refused"


def test_a_proxy_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy.example:3128")
    words = explain(REFUSED, "fl.example.org:7443").words
    assert "http_proxy=http://proxy.example:3128 is set" in words
    assert "set no_proxy=fl.example.org" in words
    assert "secret" not in words
    monkeypatch.setenv("no_proxy", "other.example, .example.org")
    assert "proxy" not in explain(REFUSED, "fl.example.org:7443").words
    monkeypatch.delenv("no_proxy")
    assert "proxy" not in explain(REFUSED, "localhost:7443").words
    monkeypatch.setenv("https_proxy", "me:secret@proxy.example:3128")
    assert "https_proxy=proxy.example:3128 is set" in explain(REFUSED, "fl.example.org:7443").words


def test_a_proxy_that_refuses_is_named(dial: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def refuse() -> None:
            while True:
                try:
                    connection_, _ = proxy.accept()
                except OSError:
                    return
                with connection_:
                    connection_.recv(1000)
                    connection_.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                    time.sleep(0.05)

        threading.Thread(target=refuse, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        error = dial("fl.example.org:7443", 0.3)
        proxy.shutdown(socket.SHUT_RDWR)
    assert isinstance(error, TransportError)
    assert "response code 403" in str(error)
    assert "http_proxy=http://127.0.0.1" in str(error)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"-----BEGIN PRIVATE KEY-----\nAAAA\n"], ids=repr)
@pytest.mark.parametrize("name", ["tls.key", "tls.pem", "authority.pem"])
def test_a_damaged_file_of_the_kit_is_named_and_never_given_to_grpc(
    name: str, content: bytes, tmp_path: Path, dial: Callable[..., object]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(IdentityError, match=name.replace(".", r"\.")):
        dial("localhost:1", 0.1)


def test_a_key_of_another_certificate_is_named(tmp_path: Path, dial: Callable[..., object]) -> None:
    (tmp_path / "tls.key").write_bytes(identity.issue_client(AUTHORITY, "fed", "clinic-a").key_pem)
    with pytest.raises(IdentityError, match=r"tls\.key is not the key of .*tls\.pem; take both from one kit"):
        dial("localhost:1", 0.1)


def test_a_refusal_is_passed_on_as_it_is(dial: Callable[..., object]) -> None:
    with serving(identity.issue_server(AUTHORITY, ["127.0.0.1"])) as port:
        assert not isinstance(dial(f"127.0.0.1:{port}", 0.2), Refusal | IdentityError)
