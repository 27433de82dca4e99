"""What keeps a server from listening is told apart: its key, its certificate, its port, its address."""

import datetime as dt
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from end_to_end.federation_of_vectors import make_federation, terms
from fedmosaic.client.transport import connection
from fedmosaic.privacy.federation import identity
from fedmosaic.protos.errors import ConfigurationError, FedMosaicError, IdentityError
from fedmosaic.server.network import serving
from fedmosaic.server.server import Server
from fedmosaic.server.settings import ServerSettings


def start(settings: ServerSettings) -> FedMosaicError:
    with pytest.raises(FedMosaicError) as error, Server(settings).background():
        raise AssertionError("the server has started")
    return error.value


@pytest.fixture
def settings(federation: Any, authority: Any, tmp_path: Path) -> Callable[..., ServerSettings]:
    def make(listen: str = "127.0.0.1:0") -> ServerSettings:
        made: ServerSettings = federation.settings(tmp_path / "state", tls=authority.server(), listen=listen)
        return made

    return make


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"-----BEGIN PRIVATE KEY-----\nAAAA\n"], ids=repr)
@pytest.mark.parametrize("part", ["private_key", "certificate", "authority"])
def test_a_damaged_file_is_named_and_the_port_is_not_blamed(
    part: str, content: bytes, settings: Callable[..., ServerSettings]
) -> None:
    made = settings()
    assert made.tls is not None
    path: Path = getattr(made.tls, part)
    path.write_bytes(content)
    error = start(made)
    assert isinstance(error, IdentityError)
    assert str(error).startswith(str(path))


def test_a_key_of_another_certificate_is_named(
    settings: Callable[..., ServerSettings], authority: Any
) -> None:
    made = settings()
    assert made.tls is not None
    certificate = made.tls.certificate.read_bytes()
    authority.server()
    made.tls.certificate.write_bytes(certificate)
    assert "is not the key of" in str(start(made))


@pytest.mark.parametrize(
    ("listen", "words"),
    [("203.0.113.5:7443", "not this machine's"), ("no-such-host.invalid:7443", "no machine has this name")],
)
def test_an_address_that_is_not_this_machine_s_is_named(
    listen: str, words: str, settings: Callable[..., ServerSettings]
) -> None:
    error = start(settings(listen))
    assert isinstance(error, ConfigurationError)
    assert words in str(error)


def test_a_port_that_is_taken_is_named(settings: Callable[..., ServerSettings]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = start(settings(f"127.0.0.1:{taken.getsockname()[1]}"))
    assert "another program uses the port; stop it, or set another port" in str(error)


def shown(port: int, kit: Any) -> bytes:
    """The certificate that a new handshake shows, DER."""
    certificate, key = kit.client("clinic-a")
    context = ssl.create_default_context(cafile=str(kit.certificate))
    context.load_cert_chain(certificate, key)
    with socket.create_connection(("localhost", port)) as plain:
        with context.wrap_socket(plain, server_hostname="localhost") as connection:
            found = connection.getpeercert(binary_form=True)
    assert found is not None
    return found


def test_a_new_certificate_is_shown_at_the_next_handshake_and_half_a_pair_never(
    settings: Callable[..., ServerSettings], authority: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made = settings()
    assert made.tls is not None
    with Server(made).background() as port:
        first = shown(port, authority)
        assert shown(port, authority) == first
        kept = made.tls.private_key.read_bytes()
        authority.server()
        new_key = made.tls.private_key.read_bytes()
        made.tls.private_key.write_bytes(kept)
        assert shown(port, authority) == first
        assert "is not the key of" in caplog.text
        made.tls.private_key.write_bytes(new_key)
        assert shown(port, authority) != first


def test_a_server_whose_state_takes_no_roster_ends_at_once_and_says_so(tmp_path: Path) -> None:
    kit = make_federation(tmp_path / "f", terms("plain")) / "server"
    (kit / "state" / "authority.pem").mkdir(parents=True)
    with pytest.raises(OSError, match=r"authority\.pem"), Server(kit).background():
        raise AssertionError("the server has started")


def test_the_server_announces_its_certificate_in_its_last_days(
    settings: Callable[..., ServerSettings],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(identity, "ANNOUNCED_BEFORE", dt.timedelta(days=91))
    with Server(settings()).background():
        wait_until(lambda: "server.pem: the certificate expires in 89 days" in caplog.text)


class Limits:
    """Of a process that may open so many files."""

    RLIMIT_NOFILE = 7

    def __init__(self, soft: int, hard: int) -> None:
        self.now = (soft, hard)

    def getrlimit(self, which: int) -> tuple[int, int]:
        assert which == self.RLIMIT_NOFILE
        return self.now

    def setrlimit(self, which: int, limits: tuple[int, int]) -> None:
        assert which == self.RLIMIT_NOFILE
        self.now = limits


@pytest.mark.parametrize(("members", "warned"), [(5, False), (1000, True)])
def test_the_limit_of_open_files_is_raised_and_one_that_is_too_low_is_named(
    members: int, warned: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(256, 1024)
    monkeypatch.setattr(serving, "resource", limits)
    free = serving.free_descriptors(members)
    assert limits.now == (1024, 1024)
    assert free == max(16, 1024 - 64 - members)
    assert ("may open 1024 files and 1000 members need 2064" in caplog.text) == warned


@pytest.mark.parametrize("options", [serving._OPTIONS, connection._OPTIONS], ids=["server", "client"])
def test_a_peer_that_vanished_is_noticed_within_a_minute(options: tuple[tuple[str, int], ...]) -> None:
    # gRPC waits 60 s for the answer to a ping unless it is told otherwise.
    found = {"grpc.keepalive_timeout_ms": 20_000, "grpc.http2.ping_timeout_ms": 60_000, **dict(options)}
    patience = max(found["grpc.keepalive_timeout_ms"], found["grpc.http2.ping_timeout_ms"])
    assert found["grpc.keepalive_time_ms"] + patience <= 60_000
