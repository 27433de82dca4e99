"""The transport against servers that fail, lie and stop; with the real server in tests/server."""

import datetime as dt
import hashlib
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import builders
from fedmosaic.client.transport import connection
from fedmosaic.client.transport.connection import Patience
from fedmosaic.client.transport.grpc import GrpcTransport
from fedmosaic.privacy.federation import identity
from fedmosaic.protos import bounds, wire
from fedmosaic.protos.errors import IdentityError, TransportError, WireError
from fedmosaic.protos.messages import (
    Aggregate,
    AggregateSection,
    Enrolment,
    KeyMessage,
    Phase,
    Profile,
    Receipt,
    ReceiptStatus,
    RoundStatus,
    Section,
    WeightRow,
)
from fedmosaic.protos.refusal import Refusal, RefusalKind, to_status
from fedmosaic.protos.signing import sign_upload
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc

ENROLMENT = Enrolment(1, "fed", bytes(32), bytes(32), "", "test")
PAYLOAD = np.random.default_rng(0).integers(0, 256, 700_000, dtype=np.uint8).tobytes()
ROW = WeightRow(("a", "b", "c"), (2, 3, 3), 3)
AGGREGATE = Aggregate(2, (AggregateSection("shared", ROW, PAYLOAD),), 1, 1)
STATUS = RoundStatus(1, Phase.OPEN, ("a",), ("b",), 5.0, "round 1: 1 of 2 uploads, waiting for b, 5 s left")


class Servicer:
    """Does what a test tells it: every call takes the next entry of its script."""

    def __init__(self) -> None:
        self.script: dict[str, list[Callable[..., Any]]] = {}
        self.calls: list[tuple[str, Any]] = []

        for method in pb.DESCRIPTOR.services_by_name["Federation"].methods:
            setattr(self, method.name, partial(self._next, method.name))

    def _next(self, name: str, request: Any, context: Any) -> Any:
        self.calls.append((name, request))
        steps = self.script[name]
        found = (steps.pop(0) if len(steps) > 1 else steps[0])(request, context)
        return iter(found) if isinstance(found, list) else found

    def named(self, name: str) -> list[Any]:
        return [request for called, request in self.calls if called == name]


def fail(code: grpc.StatusCode) -> Callable[..., Any]:
    def step(_: Any, context: Any) -> Any:
        context.abort(code, "as the test wants it")

    return step


def refuse(refusal: Refusal) -> Callable[..., Any]:
    def step(_: Any, context: Any) -> Any:
        context.abort_with_status(to_status(refusal))

    return step


def answer(message: Any) -> Callable[..., Any]:
    return lambda *_: message


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
def transport(servicer: Servicer, serving: Any, dial: Any) -> Any:
    port = serving(servicer=servicer)
    return dial(f"127.0.0.1:{port}", retry_seconds=30.0, wait_seconds=1.0)


ENROLLED = pb.EnrolResponse(
    run_id="0" * 32, round=1, rounds=3, key_epoch=1, members=["a", "b"], head=bytes(32)
)


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_what_time_cures_is_repeated(
    servicer: Servicer, transport: GrpcTransport, code: grpc.StatusCode
) -> None:
    servicer.script["Enrol"] = [fail(code), fail(code), answer(ENROLLED)]
    assert transport.enrol(ENROLMENT).members == ("a", "b")
    assert len(servicer.calls) == 3


def test_a_refusal_is_not_tried_again(servicer: Servicer, transport: GrpcTransport) -> None:
    sent = Refusal(RefusalKind.PRECONDITION, "ROSTER_DIFFERS", "roster is a, expected b", "get the newest")
    servicer.script["Enrol"] = [refuse(sent)]
    with pytest.raises(Refusal, match="roster is a, expected b; get the newest") as error:
        transport.enrol(ENROLMENT)
    assert error.value.reason == "ROSTER_DIFFERS"
    assert len(servicer.calls) == 1


def parts(start: int = 0, stop: int | None = None, offset: int | None = None) -> list[pb.PullResponse]:
    """Header and chunks of AGGREGATE from byte `start` to `stop`."""
    digest = hashlib.sha256(PAYLOAD).digest()
    header = wire.encode_aggregate_header(
        AGGREGATE, [len(PAYLOAD)], digest, start if offset is None else offset
    )
    found = [pb.PullResponse(header=pb.AggregateHeader.FromString(header))]
    for chunk in wire.chunks([PAYLOAD[:stop]], start, 100_000):
        found.append(pb.PullResponse(chunks=[chunk]))
    return found


def cut(messages: list[pb.PullResponse]) -> Callable[..., Any]:
    def step(_: Any, context: Any) -> Any:
        yield from messages
        context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    return step


def test_a_cut_download_goes_on_where_it_stopped(servicer: Servicer, transport: GrpcTransport) -> None:
    servicer.script["Pull"] = [cut(parts(stop=250_000)), cut(parts(250_000, 350_000)), answer(parts(350_000))]
    assert transport.pull(2) == AGGREGATE
    assert [request.resume_offset for request in servicer.named("Pull")] == [0, 250_000, 350_000]
    received = transport.traffic().as_dict()["adapter"]["received"]
    assert len(PAYLOAD) < received < len(PAYLOAD) + 1000


def test_chunks_beside_the_header_are_taken_and_counted_apart(
    servicer: Servicer, transport: GrpcTransport
) -> None:
    header, *chunks = parts()
    for part in chunks:
        header.MergeFrom(part)
    servicer.script["Pull"] = [answer([header])]
    assert transport.pull(2) == AGGREGATE
    received = transport.traffic().as_dict()
    assert len(PAYLOAD) < received["adapter"]["received"] < len(PAYLOAD) + 100
    assert 32 < received["control"]["received"] < 200


def test_another_aggregate_starts_from_its_first_byte(servicer: Servicer, transport: GrpcTransport) -> None:
    other = parts(stop=250_000)
    other[0].header.sha256 = bytes(32)
    servicer.script["Pull"] = [cut(other), answer(parts())]
    assert transport.pull(2) == AGGREGATE


def test_progress_renews_the_patience(servicer: Servicer, transport: GrpcTransport) -> None:
    def slow(start: int) -> Callable[..., Any]:
        def step(_: Any, context: Any) -> Any:
            yield from parts(start, start + 100_000)
            time.sleep(0.6)
            context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

        return step

    # Six times 0.6 s, with a patience of less.
    transport._patience = replace(transport._patience, seconds=3.5)
    servicer.script["Pull"] = [*(slow(s) for s in range(0, 600_000, 100_000)), answer(parts(600_000))]
    assert transport.pull(2) == AGGREGATE


def test_waiting_is_told_and_repeated(servicer: Servicer, transport: GrpcTransport) -> None:
    waiting = [pb.PullResponse(waiting=wire.encode(STATUS, pb.RoundState))]
    servicer.script["Pull"] = [answer(waiting), answer(waiting), answer(parts())]
    heard: list[RoundStatus] = []
    assert transport.pull(2, heard.append).round == 2
    assert heard == [STATUS, STATUS]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (lambda: parts()[1:], "beyond"),
        (lambda: [parts()[0], parts()[2]], "starts at byte"),
        (lambda: parts(offset=5), "goes on at byte 5"),
        (lambda: [*parts()[:-1], _spoiled(parts()[-1])], "damaged"),
        (lambda: [_huge(parts()[0])], "aggregate size"),
    ],
    ids=["no header", "gap", "wrong offset", "altered", "too large"],
)
def test_a_server_that_sends_nonsense_is_not_believed(
    servicer: Servicer, transport: GrpcTransport, messages: Callable[[], Any], words: str
) -> None:
    servicer.script["Pull"] = [answer(messages())]
    with pytest.raises(WireError, match=words):
        transport.pull(2)


def _spoiled(part: pb.PullResponse) -> pb.PullResponse:
    data = bytearray(part.chunks[0].data)
    data[0] ^= 1
    part.chunks[0].data = bytes(data)
    return part


def _huge(part: pb.PullResponse) -> pb.PullResponse:
    part.header.sections[0].size = 2 << 30
    return part


def upload(size: int = 700_000) -> Any:
    sections = (Section("shared", PAYLOAD[:size]), Section("family", PAYLOAD[-1000:]))
    profile = Profile(np.ones(16, dtype=np.float32), 0.0, 1)
    what: dict[str, Any] = {"sections": sections, "profile": profile}
    whose: dict[str, Any] = {"federation": "fed", "run_id": "0" * 32, "client_id": "clinic-a"}
    when: dict[str, Any] = {"round_number": 1, "key_epoch": 1, "attempt_id": "a"}
    return sign_upload(Ed25519PrivateKey.generate(), **whose, **when, **what)


RECEIPT = wire.encode(Receipt(ReceiptStatus.ACCEPTED, 1, bytes(32)), pb.PushResponse)


class Taker:
    """Takes uploads like a server that keeps what it got."""

    def __init__(self) -> None:
        self.got = bytearray()
        self.offsets: list[int] = []

    def take(self, limit: int | None = None) -> Callable[..., Any]:
        def step(messages: Any, context: Any) -> Any:
            first = next(messages)
            self.offsets.append(first.header.resume_offset)
            del self.got[first.header.resume_offset :]
            for message in messages:
                assert message.chunk.offset == len(self.got)
                self.got += message.chunk.data
                if limit is not None and len(self.got) >= limit:
                    context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            return RECEIPT

        return step


def test_an_upload_arrives_whole_counted_by_channel(servicer: Servicer, transport: GrpcTransport) -> None:
    taker = Taker()
    servicer.script["Push"] = [taker.take()]
    sent = upload()
    assert transport.push(sent).status is ReceiptStatus.ACCEPTED
    assert bytes(taker.got) == b"".join(section.payload for section in sent.sections)
    traffic = transport.traffic().as_dict()
    assert 0 < traffic["adapter"]["sent"] - len(taker.got) < 200
    assert 64 <= traffic["profile"]["sent"] < 100
    assert 100 < traffic["control"]["sent"] < 400
    assert not servicer.named("UploadStatus")


def test_a_cut_upload_goes_on_where_the_server_has_it(servicer: Servicer, transport: GrpcTransport) -> None:
    taker = Taker()
    servicer.script["Push"] = [taker.take(200_000), taker.take(500_000), taker.take()]
    servicer.script["UploadStatus"] = [lambda *_: pb.UploadStatusResponse(received=len(taker.got))]
    sent = upload()
    assert transport.push(sent).status is ReceiptStatus.ACCEPTED
    assert taker.offsets[0] == 0
    assert taker.offsets[1] >= 200_000
    assert taker.offsets[2] >= 500_000
    assert bytes(taker.got) == b"".join(section.payload for section in sent.sections)


def test_a_lost_answer_is_asked_for_and_not_resent(servicer: Servicer, transport: GrpcTransport) -> None:
    def lose(messages: Any, context: Any) -> Any:
        for _ in messages:
            pass
        context.abort(grpc.StatusCode.UNAVAILABLE, "the answer got lost")

    duplicate = wire.encode(Receipt(ReceiptStatus.DUPLICATE, 1, bytes(32)), pb.PushResponse)
    servicer.script["Push"] = [lose]
    servicer.script["UploadStatus"] = [answer(pb.UploadStatusResponse(receipt=duplicate))]
    assert transport.push(upload()).status is ReceiptStatus.DUPLICATE
    assert len(servicer.named("Push")) == 1


def test_a_large_upload_asks_first_what_is_there(servicer: Servicer, transport: GrpcTransport) -> None:
    late = wire.encode(Receipt(ReceiptStatus.LATE, 5, bytes(32)), pb.PushResponse)
    servicer.script["UploadStatus"] = [answer(pb.UploadStatusResponse(receipt=late))]
    sections = (Section("shared", PAYLOAD * 2),)
    big = upload().__class__(1, "a", 1, sections, None, bytes(64))
    assert transport.push(big).status is ReceiptStatus.LATE
    assert not servicer.named("Push")


def test_a_server_that_lost_bytes_gets_all_again(servicer: Servicer, transport: GrpcTransport) -> None:
    taker = Taker()
    differs = Refusal(RefusalKind.INVALID, "PAYLOAD_DIFFERS", "another SHA-256", "send it again")
    servicer.script["Push"] = [taker.take(300_000), refuse(differs), taker.take()]
    servicer.script["UploadStatus"] = [
        answer(pb.UploadStatusResponse(received=300_000)),
        answer(pb.UploadStatusResponse(received=0)),
    ]
    assert transport.push(upload()).status is ReceiptStatus.ACCEPTED
    assert taker.offsets[-1] == 0


def test_a_payload_that_differs_at_once_is_our_fault(servicer: Servicer, transport: GrpcTransport) -> None:
    servicer.script["Push"] = [refuse(Refusal(RefusalKind.INVALID, "PAYLOAD_DIFFERS", "no", ""))]
    with pytest.raises(Refusal):
        transport.push(upload())
    assert len(servicer.named("Push")) == 1


def relayed(**payloads: bytes) -> pb.ReadKeyMessagesResponse:
    made = (pb.RelayedKeyMessage(sender=name, payload=payload) for name, payload in payloads.items())
    return pb.ReadKeyMessagesResponse(messages=made)


def test_key_messages_are_polled_until_enough_are_there(servicer: Servicer, transport: GrpcTransport) -> None:
    def some(*names: str) -> Callable[..., Any]:
        return answer([relayed(**{name: name.encode() for name in names})])

    both = answer([relayed(a=b"a"), relayed(b=b"b")])
    servicer.script["ReadKeyMessages"] = [some(), some("a"), both]
    assert transport.read_key_messages(1, "opening", 2, 10.0) == {"a": b"a", "b": b"b"}
    servicer.script["ReadKeyMessages"] = [some("a")]
    started = time.monotonic()
    assert transport.read_key_messages(1, "opening", 2, 0.7) == {"a": b"a"}
    assert 0.5 < time.monotonic() - started < 60.0


def test_hostile_key_messages_are_refused(servicer: Servicer, transport: GrpcTransport) -> None:
    servicer.script["ReadKeyMessages"] = [answer([relayed(**{"../../x": b""})])]
    with pytest.raises(WireError, match="sender"):
        transport.read_key_messages(1, "opening", 1, 1.0)


def test_relayed_messages_fill_no_memory(
    servicer: Servicer, transport: GrpcTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "MAX_RELAYED_BYTES", 100)
    # Of one sender again and again: the number of senders is no bound then.
    many = [relayed(a=bytes(30))] * 4
    servicer.script["ReadKeyMessages"] = [answer(many)]
    with pytest.raises(WireError, match="more than 100 bytes"):
        transport.read_key_messages(1, "sum-totals", 1, 1.0)


def test_small_calls(servicer: Servicer, transport: GrpcTransport) -> None:
    servicer.script["RoundStatus"] = [
        answer(pb.RoundStatusResponse(state=wire.encode(STATUS, pb.RoundState)))
    ]
    servicer.script["Report"] = [answer(pb.ReportResponse())]
    servicer.script["PostKeyMessage"] = [answer(pb.PostKeyMessageResponse())]
    assert transport.status() == STATUS
    transport.report(b"{}")
    transport.post_key_message(KeyMessage(1, "box", "b", b"x"))
    with pytest.raises(WireError, match="statement"):
        transport.report(bytes(bounds.MAX_STATEMENT_BYTES + 1))
    assert servicer.named("PostKeyMessage")[0].recipient == "b"


def test_own_certificates_are_checked_before_the_server_sees_them(
    kit: Path, foreign: identity.Authority, dial: Any
) -> None:
    now, certificate, authority = dt.datetime.now(dt.UTC), kit / "tls.pem", kit / "authority.pem"
    assert identity.check_certificate(certificate, authority).subject
    for then, words in (
        (now + dt.timedelta(days=91), "expired on"),
        (now - dt.timedelta(days=1), "is valid from"),
    ):
        with pytest.raises(IdentityError, match=words):
            identity.check_certificate(certificate, authority, then)
    other = foreign.certificate.public_bytes(serialization.Encoding.PEM)
    authority.write_bytes(other)
    with pytest.raises(IdentityError, match="take all files from one kit"):
        dial("localhost:1")


def test_missing_and_open_key_files_are_named(kit: Path, dial: Callable[..., object]) -> None:
    (kit / "tls.key").chmod(0o644)
    with pytest.raises(IdentityError, match="can be read by other users"):
        dial("localhost:1")
    (kit / "authority.pem").unlink()
    (kit / "tls.key").chmod(0o600)
    with pytest.raises(IdentityError, match=r"authority\.pem"):
        dial("localhost:1")


def test_delays_grow_and_are_jittered(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(connection, "_FIRST_DELAY_SECONDS", 0.25)

    def attempt() -> None:
        raise grpc.RpcError

    with pytest.raises(TransportError, match="could not be reached for"):
        Patience("host:1", 60.0).retry("call", attempt)
    nominal = [min(0.25 * 2**i, 10.0) for i in range(len(slept))]
    assert all(0.5 * n <= s <= n for s, n in zip(slept, nominal, strict=True))
    assert len({round(s / n, 6) for s, n in zip(slept, nominal, strict=True)}) > 3
    assert 40.0 < clock[0] <= 60.0


def test_a_slow_way_has_the_time_for_its_first_handshake(
    servicer: Servicer, serving: Any, dial: Any, listening: Any
) -> None:
    port = serving(servicer=servicer)
    servicer.script["Enrol"] = [answer(ENROLLED)]
    connections = []

    def forward(source: socket.socket, target: socket.socket, seconds: float) -> None:
        with suppress(OSError):
            while content := source.recv(1 << 16):
                time.sleep(seconds)
                target.sendall(content)

    def lead(near: socket.socket) -> None:
        connections.append(near)
        with socket.create_connection(("127.0.0.1", port)) as far:
            threading.Thread(target=forward, args=(far, near, 0.6), daemon=True).start()
            forward(near, far, 0.0)

    assert dial(f"127.0.0.1:{listening(lead)}").enrol(ENROLMENT).round == 1
    assert len(connections) == 1


def test_a_certificate_that_was_installed_meanwhile_is_shown_by_the_next_call(
    kit: Path, authority: identity.Authority, dial: Any, serving: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Half an installation leaves the connection as it is; the whole of it opens another."""
    seen: list[bytes] = []

    class Service(rpc.FederationServicer):
        def Report(self, request: Any, context: Any) -> Any:
            seen.append(context.auth_context()["x509_pem_cert"][0])
            return pb.ReportResponse()

    transport = dial(f"127.0.0.1:{serving(servicer=Service())}")  # type: ignore[abstract]  # one is called
    transport.report(b"{}")
    new = builders.issue_client(authority, "fed", "clinic-a", key=ec.generate_private_key(ec.SECP256R1()))
    (kit / "tls.key").write_bytes(new.key_pem)
    transport.report(b"{}")
    assert "going on with the connection of before" in caplog.text
    (kit / "tls.pem").write_bytes(new.certificate_pem)
    transport.report(b"{}")
    transport.report(b"{}")
    assert [pem == new.certificate_pem for pem in seen] == [False, False, True, True]


def test_a_certificate_in_its_last_days_is_announced_once_a_day(
    dial: Any, serving: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    transport = dial(f"127.0.0.1:{serving()}", retry_seconds=0.0)
    monkeypatch.setattr(identity, "ANNOUNCED_BEFORE", dt.timedelta(days=91))
    for _ in range(2):
        transport._reopen_if_changed()
    assert "expires in" not in caplog.text
    transport._looked -= 90_000.0
    for _ in range(2):
        transport._reopen_if_changed()
    assert caplog.text.count("the certificate expires in 89 days") == 1
