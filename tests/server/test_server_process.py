"""The server as a process: light to start, without a model library, and alive after a kill."""

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from waiting import wait_until

from end_to_end.ports import free_port
from fedmosaic.server.network.serving import SERVICE


class Process:
    """`python -m fedmosaic.server` on a free port, with its log in a file."""

    def __init__(self, settings: Any, folder: Path, *arguments: str) -> None:
        self.port = free_port()
        self._file = folder / "settings.json"
        self._log = folder / "server.log"
        self._arguments = arguments
        self.settings = settings.model_copy(update={"listen": f"127.0.0.1:{self.port}"})
        self._file.write_text(self.settings.model_dump_json())
        self.start()

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def start(self) -> None:
        command = [sys.executable, "-m", "fedmosaic.server", "--settings", str(self._file), *self._arguments]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(120)

    def wait_for(self, pattern: str) -> None:
        wait_until(
            lambda: re.search(pattern, self.log), lambda: f"{pattern!r} is not in the log:\n{self.log}"
        )


@pytest.fixture
def launch(federation: Any, authority: Any, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    started: list[Process] = []

    def make(*arguments: str, **changes: Any) -> Process:
        settings = federation.settings(tmp_path / "state", tls=authority.server(), **changes)
        started.append(Process(settings, tmp_path, *arguments))
        return started[-1]

    yield make
    for process in started:
        process.stop(signal.SIGKILL)


def healthy(process: Process, authority: Any) -> None:
    """Return at the first healthy answer of the process."""
    backoff = [(f"grpc.{name}_reconnect_backoff_ms", 50) for name in ("initial", "max")]
    with authority.channel(process, "monitor", *backoff) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        def serves() -> bool:
            assert process.process.poll() is None, process.log
            try:
                answer = health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

        wait_until(serves, lambda: process.log)


def part(server: Process, authority: Any, text: bytes) -> None:
    """Say these words in parting, and return when the server has heard them."""
    context = ssl.create_default_context(cafile=authority.certificate)
    context.load_cert_chain(*authority.client("clinic-a"))
    context.set_alpn_protocols(["h2"])
    goaway = bytes([0, 0, 8 + len(text), 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]) + text
    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as peer,
    ):
        peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        peer.recv(1000)
        peer.sendall(goaway + bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + b"are here")
        heard = b""
        while b"are here" not in heard:  # the answer to a ping, after the server has read the rest
            heard += peer.recv(1000)


def test_the_server_is_light_and_its_log_in_json_holds_nothing_said_in_parting(
    launch: Any, authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    code = (
        "import time, cryptography.x509, grpc, numpy, sqlalchemy\nlibraries = time.process_time()\n"
        "import sys, json, fedmosaic.server.__main__, fedmosaic.server.network.serving\n"
        "print(json.dumps([libraries, *{name.partition('.')[0] for name in sys.modules}]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    libraries, *loaded = json.loads(result.stdout)
    assert not {*loaded} & {"torch", "transformers", "peft", "opacus", "tenseal", "safetensors"}
    assert {"grpc", "numpy", "sqlalchemy"} <= {*loaded}
    server = launch("--log-format", "json")
    healthy(server, authority)
    used = sum(psutil.Process(server.process.pid).cpu_times()[:2])
    # About twice what its libraries take to import; a model library makes it more than ten times.
    assert used < 6 * libraries, f"{used:.1f} s of the processor; the libraries alone {libraries:.1f} s"
    part(server, authority, b"owned\n\x1b[2J")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for("SIGHUP is ignored")
    assert server.stop() == 0
    assert "owned" not in server.log
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert any("listening on" in line["message"] for line in lines)
    assert {"time", "level", "logger", "message"} <= lines[0].keys()


def test_tls_refuses_other_certificates_and_versions_and_leaves_the_reason_in_the_log(
    launch: Any, authority: Any, make_authority: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRPC_VERBOSITY", "INFO")
    server = launch()
    healthy(server, authority)
    own = server.settings.tls
    for case in (
        make_authority("foreign").client("clinic-a"),
        authority.client("clinic-b", age_days=100),
        (own.certificate, own.private_key),
        None,
    ):
        pair = (None, None) if case is None else (case[1].read_bytes(), case[0].read_bytes())
        credentials = grpc.ssl_channel_credentials(authority.certificate.read_bytes(), *pair)
        with grpc.secure_channel(server.address, credentials) as channel:
            status: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
                "/fedmosaic.v1.Federation/RoundStatus"
            )
            with pytest.raises(grpc.RpcError) as error:
                status(b"", timeout=60)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    server.wait_for("Handshake failed.*unable to get local issuer certificate")
    server.wait_for("Handshake failed.*certificate has expired")
    certificate, key = authority.client("clinic-a")

    def version(highest: ssl.TLSVersion) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(authority.certificate)
        context.load_cert_chain(certificate, key)
        context.set_alpn_protocols(["h2"])
        context.maximum_version = highest
        with socket.create_connection(("localhost", server.port), timeout=60) as plain:
            with context.wrap_socket(plain, server_hostname="localhost") as secure:
                return secure.version()

    assert version(ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    with pytest.raises(OSError, match=r"EOF|handshake|alert|reset"):
        version(ssl.TLSVersion.TLSv1_2)


def play(federation: Any, connect: Any, server: Process, early: tuple[str, ...] = ()) -> Any:
    """Play two rounds over the network; some hand over their statements before the second."""
    transports = {c: connect(server, c, retry_seconds=120.0) for c in federation.clients}
    for transport in transports.values():
        run_id = transport.enrol(federation.enrolment()).run_id
    for number in (1, 2):
        for client, transport in transports.items():
            transport.push(federation.upload(run_id, client, number))
        if number == 1:
            assert transport.pull(2).round == 2
            for client in early:
                transports[client].report(federation.statement(run_id, client))
    return transports, run_id


def test_the_server_ends_with_its_run(federation: Any, launch: Any, connect: Any) -> None:
    server = launch(schedule={"rounds": 2}, grace_seconds=300.0)
    transports, run_id = play(federation, connect, server)
    for client, transport in transports.items():
        transport.report(federation.statement(run_id, client))
    assert server.process.wait(120) == 0
    assert server.log.count("the run is over: 2 rounds with 10 uploads") == 1
    assert "the run goes on" not in server.log
    server.start()
    assert server.process.wait(120) == 0, "a run that is over has nothing to serve"


def test_the_server_waits_for_statements_as_long_as_it_is_told(
    federation: Any, launch: Any, connect: Any
) -> None:
    server = launch(schedule={"rounds": 2}, grace_seconds=0.5)
    play(federation, connect, server, early=tuple(c for c in federation.clients if c != "clinic-b"))
    assert server.process.wait(120) == 0
    assert len(re.findall(r"waiting for the statements of clinic-b, [\d.]+ s left", server.log)) == 1
    assert "statements of 4 members, none of clinic-b" in server.log


def test_a_run_that_exchanged_nothing_and_wrong_settings_end_with_a_message_and_a_status(
    federation: Any, launch: Any, connect: Any
) -> None:
    server = launch(schedule={"rounds": 1}, grace_seconds=0.0)
    transports = {c: connect(server, c, retry_seconds=120.0) for c in federation.clients}
    for client, transport in transports.items():
        run_id = transport.enrol(federation.enrolment()).run_id
        transport.push(federation.upload(run_id, client, 1))
    assert server.process.wait(120) == 3
    assert server.log.count("NOTHING WAS EXCHANGED") == 1
    os.chmod(server.settings.tls.private_key, 0o644)
    server.start()
    assert server.process.wait(120) == 1
    assert "can be read by other users" in server.log
    assert "Traceback" not in server.log
