"""Why a server cannot be reached: every cause is made to happen, is told apart and has its remedy."""

import datetime as dt
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import builders
from fedmosaic.client.transport.causes import explain
from fedmosaic.privacy.federation.identity import Authority
from fedmosaic.protos.errors import IdentityError, TransportError
from fedmosaic.protos.messages import Enrolment

ENROLMENT = Enrolment(1, "fed", bytes(32), bytes(32), "", "test")
NOW, DAY = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
# An address, not a name: a name may lead to several addresses, and gRPC tells of the last one only.
LONG = 3600.0
"""A patience that no test has: what is final must not wait for it."""


@pytest.fixture
def fails(dial: Any) -> Callable[[str, float], Exception]:
    """Enrols at an address as a client of the federation and returns what is raised."""

    def attempt(address: str, patience: float) -> Exception:
        try:
            dial(address, retry_seconds=patience).enrol(ENROLMENT)
        except Exception as error:
            return error
        raise AssertionError("nobody answers here")

    return attempt


Shown = Callable[[Authority, Authority], builders.TlsIdentity | None]


def issued(hosts: list[str], now: dt.datetime | None = None, by: int = 0) -> Shown:
    """A server's certificate, by the federation's authority or by the foreign one."""
    return lambda *authorities: builders.issue_server(authorities[by], hosts, now)


HERE = ["127.0.0.1"]
NAMES = r"fl\.example\.org, 192\.0\.2\.7"
SERVERS: dict[str, tuple[Shown, str]] = {
    "another name": (issued(["fl.example.org", "192.0.2.7"]), rf"for {NAMES}; set server in client\.toml"),
    "another authority": (issued(HERE, by=1), "no certificate of this federation's authority"),
    "expired": (issued(HERE, NOW - 99 * DAY), "certificate has expired"),
    "not valid yet": (issued(HERE, NOW + 9 * DAY), "not valid yet; compare the clocks"),
    "a client's": (lambda right, _: builders.issue_client(right, "fed", "x"), "that is not a server's"),
    "no TLS": (lambda *_: None, "does not speak TLS"),
}


@pytest.mark.parametrize(("make", "words"), SERVERS.values(), ids=SERVERS.keys())
def test_what_is_final_is_not_tried_again(
    make: Shown, words: str, fails: Any, serving: Any, authority: Authority, foreign: Authority
) -> None:
    error = fails(f"127.0.0.1:{serving(make(authority, foreign))}", LONG)
    assert isinstance(error, IdentityError)
    assert re.search(words, str(error))


def test_what_time_may_cure_is_tried_and_told(fails: Any, listening: Any) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        error = fails(f"127.0.0.1:{port}", 0.3)
        assert isinstance(error, TransportError)
        assert f"127.0.0.1:{port} could not be reached" in str(error)
        assert "nothing listens there" in str(error)
    closed = f"127.0.0.1:{listening(lambda _: None)}"
    assert "closed before TLS was agreed" in str(fails(closed, 0.3))
    error = fails("no-such-host.invalid:7443", 0.3)
    assert isinstance(error, TransportError)
    assert "the name cannot be found" in str(error)


def test_a_server_that_refuses_us_is_suspected(fails: Any, serving: Any, foreign: Authority) -> None:
    error = fails(f"127.0.0.1:{serving(trusted=foreign)}", 0.5)
    assert isinstance(error, TransportError)
    assert "refuses this client's certificate" in str(error)


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_this_machine_is_reached_without_a_proxy(
    variable: str, fails: Any, serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    error = fails(f"127.0.0.1:{serving()}", 2.0)
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


def test_a_proxy_that_refuses_is_named(fails: Any, listening: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(peer: socket.socket) -> None:
        peer.recv(1000)
        peer.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        time.sleep(0.05)

    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listening(refuse)}")
    error = fails("fl.example.org:7443", 0.3)
    assert isinstance(error, TransportError)
    assert "response code 403" in str(error)
    assert "http_proxy=http://127.0.0.1" in str(error)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"-----BEGIN PRIVATE KEY-----\nAAAA\n"], ids=repr)
@pytest.mark.parametrize("name", ["tls.key", "tls.pem", "authority.pem"])
def test_a_damaged_file_of_the_kit_is_named_and_never_given_to_grpc(
    name: str, content: bytes, kit: Path, dial: Any
) -> None:
    (kit / name).write_bytes(content)
    with pytest.raises(IdentityError, match=name.replace(".", r"\.")):
        dial("localhost:1")


def test_a_key_of_another_certificate_is_named(kit: Path, dial: Any, authority: Authority) -> None:
    (kit / "tls.key").write_bytes(builders.issue_client(authority, "fed", "clinic-b").key_pem)
    with pytest.raises(IdentityError, match=r"tls\.key is not the key of .*tls\.pem; take both from one kit"):
        dial("localhost:1")


DIAL = """
import sys
from pathlib import Path
from fedmosaic.client.transport.grpc import GrpcTransport
kit = Path(sys.argv[1])
files = {"authority": kit / "authority.pem", "certificate": kit / "tls.pem", "private_key": kit / "tls.key"}
GrpcTransport(sys.argv[2], **files, retry_seconds=0.5).status()
"""


def test_what_a_server_says_in_parting_commands_no_terminal(
    kit: Path, authority: Authority, listening: Any, tmp_path: Path
) -> None:
    shown = builders.issue_server(authority, ["127.0.0.1"])
    (tmp_path / "server.pem").write_bytes(shown.certificate_pem + shown.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    context.set_alpn_protocols(["h2"])
    settings, text = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), b"owned\n\x1b[2J"
    goaway = bytes([0, 0, 8 + len(text), 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]) + text

    def part(plain: socket.socket) -> None:
        with context.wrap_socket(plain, server_side=True) as peer:
            peer.sendall(settings)
            peer.recv(1000)
            time.sleep(0.1)
            peer.sendall(goaway)
            time.sleep(0.1)

    command = [sys.executable, "-c", DIAL, str(kit), f"127.0.0.1:{listening(part)}"]
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    said = subprocess.run(command, capture_output=True, env=environment).stderr
    assert b"Debug Text: owned" in said
    assert b"\x1b" not in said
