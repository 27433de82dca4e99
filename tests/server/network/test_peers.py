"""Who is calling is read from a verified certificate alone; and one peer cannot take all of a server."""

import contextlib
import logging
import queue
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from waiting import wait_until

from builders import tls_key
from fedmosaic.privacy.federation.identity import certify_client
from fedmosaic.protos.refusal import Refusal, from_rpc_error
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.server.network import peers
from fedmosaic.server.network.peers import CALLS_PER_PEER, channel_options, identify


@pytest.fixture
def server(federation: Any, authority: Any, tmp_path: Any, start_server: Any) -> Any:
    tls = authority.server()
    return start_server(federation.settings(tmp_path / "state", tls=tls, listen="127.0.0.1:0"))


@pytest.fixture
def connections(server: Any, authority: Any) -> Iterator[Any]:
    """Makes connections of their own, not shared between channels."""
    with contextlib.ExitStack() as stack:
        own = ("grpc.use_local_subchannel_pool", 1)
        yield lambda client: stack.enter_context(authority.channel(server, client, own))


def waiting_pull(channel: grpc.Channel) -> Any:
    """A call that the server holds open, and that has been admitted."""
    call = rpc.FederationStub(channel).Pull(pb.PullRequest(round=2, wait_milliseconds=60_000))
    assert next(call).HasField("waiting")
    return call


def is_served(channel: grpc.Channel) -> bool:
    try:
        rpc.FederationStub(channel).RoundStatus(pb.RoundStatusRequest(), timeout=30)
    except grpc.RpcError:
        return False
    return True


def test_one_member_has_so_many_calls_open_and_no_more_over_all_its_connections(
    federation: Any, connections: Any
) -> None:
    first = connections("clinic-a")
    rpc.FederationStub(first).RoundStatus(pb.RoundStatusRequest(), timeout=30)
    # Watching the server's health is a call as any other.
    calls = [health_pb2_grpc.HealthStub(first).Watch(health_pb2.HealthCheckRequest(), timeout=120)]
    assert next(calls[0]).status == health_pb2.HealthCheckResponse.SERVING
    calls += [
        waiting_pull(connections("clinic-a") if n % 4 == 0 else first) for n in range(1, CALLS_PER_PEER)
    ]
    for channel in (first, connections("clinic-a")):
        with pytest.raises(grpc.RpcError) as error:
            rpc.FederationStub(channel).RoundStatus(pb.RoundStatusRequest(), timeout=30)
        refusal = from_rpc_error(error.value, "call")
        assert isinstance(refusal, Refusal)
        assert refusal.reason == "TOO_MANY_CALLS"
        assert f"{CALLS_PER_PEER} calls with this certificate are open already" in str(refusal)
        with pytest.raises(grpc.RpcError) as error:
            list(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30))
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    # Another member is served meanwhile, and this one again as soon as a call has ended.
    rpc.FederationStub(connections("clinic-b")).RoundStatus(pb.RoundStatusRequest(), timeout=30)
    calls.pop().cancel()
    wait_until(lambda: is_served(first))
    for call in calls:
        call.cancel()


def test_a_call_is_admitted_before_anything_of_its_request_is_read(connections: Any) -> None:
    channel, open_ended = connections("clinic-a"), queue.SimpleQueue[bytes]()
    # On the wire a single request and a stream of one are the same; this one never comes.
    status = channel.stream_unary("/fedmosaic.v1.Federation/RoundStatus")
    calls = [status.future(iter(open_ended.get, b""), timeout=60) for _ in range(CALLS_PER_PEER + 1)]
    wait_until(lambda: any(call.done() for call in calls), lambda: "the call too many waits for its request")
    (answered,) = [call for call in calls if call.done()]
    refusal = from_rpc_error(answered.exception(), "call")
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "TOO_MANY_CALLS"
    for call in calls:
        call.cancel()
        open_ended.put(b"")


def test_a_call_whose_request_never_comes_is_ended_and_its_place_is_free_again(
    connections: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peers, "MESSAGE_SECONDS", 0.05)
    channel = connections("clinic-a")
    for name in ["RoundStatus"] * CALLS_PER_PEER + ["Push"]:
        open_ended = queue.SimpleQueue[bytes]()  # its own: what ends one call is not read by the next
        call = channel.stream_unary(f"/fedmosaic.v1.Federation/{name}").future(
            iter(open_ended.get, b""), timeout=60
        )
        assert "nothing came for 0 s" in str(call.exception(timeout=30))
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        open_ended.put(b"")
    monkeypatch.setattr(peers, "MESSAGE_SECONDS", 30.0)
    rpc.FederationStub(channel).RoundStatus(pb.RoundStatusRequest(), timeout=30)
    assert "a call of spiffe://fedmosaic/fed/client/clinic-a: nothing came" in caplog.text
    assert "Traceback" not in caplog.text


def test_connections_without_a_handshake_are_limited(
    federation: Any, authority: Any, tmp_path: Any, start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 40
    monkeypatch.setattr(peers, "_FEWEST_CONNECTIONS", most)
    tls = authority.server()
    server = start_server(federation.settings(tmp_path / "state", tls=tls, listen="127.0.0.1:0"))
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            for _ in range(most + 20)
        ]
        refused = 0
        for end in reversed(silent):
            end.settimeout(2.0 if refused < 10 else 0.0)
            try:
                refused += end.recv(1) == b""
            except (ConnectionResetError, TimeoutError, BlockingIOError) as error:
                refused += isinstance(error, ConnectionResetError)
            if refused >= 10:
                break
        assert refused >= 10

    def is_let_in() -> bool:
        with authority.channel(server, "clinic-a", ("grpc.use_local_subchannel_pool", 1)) as channel:
            return is_served(channel)

    wait_until(is_let_in)


@pytest.mark.parametrize(
    ("members", "free", "expected"), [(5, 10**6, 4096), (5, 100, 100), (2000, 10**6, 8000)]
)
def test_connections_leave_descriptors_for_files_and_a_few_hundred_silent_ones_keep_nobody_out(
    members: int, free: int, expected: int
) -> None:
    assert dict(channel_options(members, free))["grpc.max_allowed_incoming_connections"] == expected


@pytest.mark.parametrize(
    ("method", "kind"), [("Enrol", "unary_unary"), ("Pull", "unary_stream"), ("Push", "stream_unary")]
)
def test_bytes_that_are_no_message_are_refused_with_one_line(
    method: str, kind: str, connections: Any, caplog: pytest.LogCaptureFixture
) -> None:
    call = getattr(connections("clinic-a"), kind)(f"/fedmosaic.v1.Federation/{method}")
    noise = b"\xff" * 10
    caplog.set_level(logging.INFO)
    with pytest.raises(grpc.RpcError) as error:
        list(call(iter([noise]) if kind == "stream_unary" else noise, timeout=30))
    refusal = from_rpc_error(error.value, method)
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, "is no request of this call" in refusal.message) == ("MALFORMED", True)
    assert "Traceback" not in caplog.text
    assert caplog.text.count("MALFORMED") == 1


@pytest.fixture
def pem(authority: Any) -> bytes:
    certificate: Path = authority.client("clinic-a")[0]
    return certificate.read_bytes()


def context(pem: bytes, name: str = "spiffe://fedmosaic/fed/client/clinic-a", **changes: list[bytes]) -> Any:
    return {
        "x509_subject_alternative_name": [name.encode()],
        "x509_pem_cert": [pem],
        "ssl_tls_version": [b"TLSv1.3"],
    } | changes


def test_a_member_is_identified_and_a_certificate_of_another_key_than_the_pinned_is_worthless(
    federation: Any, authority: Any, tmp_path: Path, pem: bytes
) -> None:
    settings = federation.settings(tmp_path)
    assert identify(context(pem), settings) == "clinic-a"
    another = certify_client(authority.authority, tls_key("another").public_key(), "fed", "clinic-a")
    with pytest.raises(Refusal, match="another key than the roster pins"):
        identify(context(another), settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x509_pem_cert": []}, "no certificate"),
        ({"x509_subject_alternative_name": []}, "exactly one"),
        ({"x509_subject_alternative_name": [b"spiffe://fedmosaic/fed/client/clinic-a"] * 2}, "exactly one"),
        ({"x509_subject_alternative_name": [b"localhost"]}, "certificate names 'localhost'"),
        ({"x509_subject_alternative_name": [b"spiffe://fedmosaic/fed/client/\xff"]}, "certificate names"),
        ({"x509_subject_alternative_name": [b"spiffe://fedmosaic/fed/client/clinic-a/x"]}, "names"),
        ({"x509_subject_alternative_name": [b"spiffe://fedmosaic/other/client/clinic-a"]}, "'other'"),
        ({"x509_subject_alternative_name": [b"spiffe://fedmosaic/fed/client/mallory"]}, "not on the roster"),
        ({"ssl_tls_version": [b"TLSv1.2"]}, "uses TLSv1.2, expected TLSv1.3"),
    ],
)
def test_everybody_else_is_refused(
    federation: Any, tmp_path: Path, pem: bytes, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(Refusal, match=words):
        identify(context(pem, **changes), federation.settings(tmp_path))
