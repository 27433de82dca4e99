"""A real gRPC server with mutual TLS: calls, waiting, resuming, refusals, hostile clients."""

import asyncio
import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from waiting import at_once, wait_until

from end_to_end.ports import free_port
from fedmosaic.privacy.encryption.parameters import MaskParameters
from fedmosaic.protos import bounds, wire
from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.protos.messages import KeyMessage, Phase, ReceiptStatus
from fedmosaic.protos.refusal import Refusal, from_rpc_error
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.network import peers, service
from fedmosaic.server.network.service import _next, _SupersededError
from fedmosaic.server.network.serving import SERVICE


@pytest.fixture
def settings(federation: Any, authority: Any, tmp_path: Path) -> Any:
    return federation.settings(tmp_path / "state", tls=authority.server(), listen="127.0.0.1:0")


@pytest.fixture
def server(settings: Any, start_server: Any) -> Any:
    return start_server(settings)


@pytest.fixture
def dial(authority: Any) -> Iterator[Callable[..., Any]]:
    """Opens a stub without the care of a transport, to send what a transport would not."""
    with contextlib.ExitStack() as opened:
        yield lambda server, client="clinic-a": rpc.FederationStub(
            opened.enter_context(authority.channel(server, client))
        )


@pytest.fixture
def stub(server: Any, dial: Any) -> Any:
    return dial(server)


def refusal_of(call: Any) -> Refusal:
    with pytest.raises(grpc.RpcError) as error:
        call()
    found = from_rpc_error(error.value, "call")
    assert isinstance(found, Refusal), found
    return found


def run_id_of(federation: Any, *transports: Any) -> str:
    """Enrol all and return the id of the run."""
    (run_id,) = {transport.enrol(federation.enrolment()).run_id for transport in transports}
    return str(run_id)


def test_a_run_of_five_clients(federation: Any, server: Any, connect: Any) -> None:
    def live(client: str) -> Any:
        transport = connect(server, client)
        enrolled = transport.enrol(federation.enrolment())
        for number in range(1, enrolled.rounds + 1):
            assert transport.pull(number).round == number
            upload = federation.upload(enrolled.run_id, client, number)
            assert transport.push(upload).status is ReceiptStatus.ACCEPTED
            assert transport.push(upload).status is ReceiptStatus.DUPLICATE
        last = transport.pull(enrolled.rounds + 1)
        transport.report(federation.statement(enrolled.run_id, client))
        return last, transport.status(), transport.traffic().as_dict()

    for last, status, traffic in at_once(live, federation.clients):
        (section,) = last.sections
        uploads = np.stack([federation.vector(c, 3) for c in section.row.contributors])
        expected = np.array(section.row.weights) / 2**section.row.bits @ uploads
        np.testing.assert_allclose(federation.values(section.payload), expected, atol=1e-6)
        assert status.phase is Phase.FINISHED
        assert traffic["adapter"]["sent"] > 3 * 4 * federation.dimensions
        assert traffic["profile"]["sent"] > 3 * 4 * 8
    server.stop()
    summary = json.loads((server.settings.state_dir / "run.json").read_text())
    assert set(summary["statements"]) == set(federation.clients)
    assert all(t["received"] > 0 < t["sent"] for t in summary["traffic"].values())


def test_a_waiting_client_is_told_for_whom_and_is_served_at_once(
    federation: Any, server: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "STATUS_SECONDS", 600.0)  # only the opening of the round can wake it
    transports = {client: connect(server, client, wait_seconds=60.0) for client in federation.clients}
    run_id = run_id_of(federation, *transports.values())
    heard: list[str] = []
    opened: list[int] = []

    def wait() -> None:
        opened.append(transports["clinic-a"].pull(2, lambda status: heard.append(status.message)).round)

    for client in federation.clients[:4]:
        transports[client].push(federation.upload(run_id, client, 1))
    waiting = threading.Thread(target=wait)
    waiting.start()
    wait_until(lambda: heard)
    transports["clinic-e"].push(federation.upload(run_id, "clinic-e", 1))
    waiting.join(40)
    assert "round 1: 4 of 5 uploads, waiting for clinic-e" in heard[0]
    assert opened == [2], "the call would have ended of itself after a minute"


def test_health_needs_tls_but_no_membership(server: Any, authority: Any) -> None:
    with authority.channel(server, "a-load-balancer") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")(b"", timeout=60)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


def announced(federation: Any, run_id: str, size: int) -> pb.PushRequest:
    header = wire.encode_upload_header(federation.upload(run_id, "clinic-a", 1).header())
    header.sections[0].size = size
    return pb.PushRequest(header=header)


def test_two_gibibytes_are_refused_at_once_with_one_line(
    federation: Any, server: Any, stub: Any, caplog: pytest.LogCaptureFixture
) -> None:
    chunks = 0

    def endless() -> Iterator[pb.PushRequest]:
        nonlocal chunks
        yield announced(federation, "0" * 32, 2 << 30)
        while True:
            chunks += 1
            yield pb.PushRequest(chunk=pb.Chunk(data=bytes(1 << 18)))

    with caplog.at_level(logging.WARNING):
        refusal = refusal_of(lambda: stub.Push(endless(), timeout=60))
    assert chunks << 18 < 1 << 28, "no more than what was under way is sent"
    assert refusal.reason == "UPLOAD_TOO_LARGE"
    assert "2147483648 bytes" in refusal.message
    told = [r for r in caplog.records if r.name.startswith("fedmosaic.server")]
    lines = [r for r in told if r.levelno >= logging.WARNING]
    assert len(lines) == 1
    assert "refused push of clinic-a: UPLOAD_TOO_LARGE" in lines[0].getMessage()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda h, c: [], "must begin with its header"),
        (lambda h, c: [c(0, b"x")], "must begin with its header"),
        (lambda h, c: [h, c(5, b"x" * 10)], "chunk starts at byte 5"),
        (lambda h, c: [h, h], "chunk has 0 bytes"),
        (lambda h, c: [h, c(0, b"x" * 100_000)], "beyond the"),
        (lambda h, c: [h, c(0, b"x" * 10)], "ended after 10 of"),
    ],
    ids=["nothing", "no header", "gap", "two headers", "too much", "too little"],
)
def test_streams_out_of_order_are_refused(
    federation: Any, stub: Any, server: Any, connect: Any, make: Any, words: str
) -> None:
    run_id = run_id_of(federation, connect(server, "clinic-a"))
    header = pb.PushRequest(
        header=wire.encode_upload_header(federation.upload(run_id, "clinic-a", 1).header())
    )

    def chunk(offset: int, data: bytes) -> pb.PushRequest:
        return pb.PushRequest(chunk=pb.Chunk(offset=offset, data=data))

    refusal = refusal_of(lambda: stub.Push(iter(make(header, chunk)), timeout=60))
    assert words in refusal.message


def test_a_message_above_one_mebibyte_is_refused(server: Any, stub: Any) -> None:
    with pytest.raises(grpc.RpcError) as error:
        stub.Report(pb.ReportRequest(statement=bytes(bounds.MAX_MESSAGE_BYTES)), timeout=60)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


LARGE = 1_000


@pytest.fixture
def large(make_federation: Any, authority: Any, tmp_path: Path, start_server: Any) -> tuple[Any, Any]:
    federation = make_federation(rank=LARGE)
    settings = federation.settings(tmp_path / "large", tls=authority.server(), listen="127.0.0.1:0")
    return federation, start_server(settings)


def test_a_cut_upload_goes_on_where_it_stopped(large: Any, dial: Any, connect: Any) -> None:
    federation, server = large
    transport = connect(server, "clinic-a")
    upload = federation.upload(run_id_of(federation, transport), "clinic-a", 1)
    header, stub, cut = upload.header(), dial(server), threading.Event()

    def part() -> Iterator[pb.PushRequest]:
        yield pb.PushRequest(header=wire.encode_upload_header(header))
        for chunk in wire.chunks([upload.sections[0].payload[:1_500_000]], 0, 1 << 16):
            yield pb.PushRequest(chunk=chunk)
        cut.wait(60)

    def status() -> pb.UploadStatusResponse:
        request = pb.UploadStatusRequest(header=wire.encode_upload_header(header))
        answer: pb.UploadStatusResponse = stub.UploadStatus(request, timeout=60)
        return answer

    call = stub.Push.future(part(), timeout=60)
    wait_until(lambda: status().received)
    call.cancel()
    cut.set()
    left = status()
    assert 0 < left.received <= 1_500_000
    assert not left.HasField("receipt")
    assert transport.push(upload).status is ReceiptStatus.ACCEPTED
    sent = transport.traffic().as_dict()["adapter"]["sent"]
    assert sent < header.size - left.received + 20_000
    spooled = server.settings.state_dir / "uploads" / "000001" / "clinic-a.bin"
    assert hashlib.sha256(spooled.read_bytes()).digest() == header.sections[0].sha256


def test_a_download_goes_on_where_it_stopped(large: Any, connect: Any, dial: Any) -> None:
    federation, server = large
    transports = {c: connect(server, c) for c in federation.clients}
    run_id = run_id_of(federation, *transports.values())
    for client, transport in transports.items():
        transport.push(federation.upload(run_id, client, 1))
    whole = transports["clinic-a"].pull(2).sections[0].payload
    stub = dial(server)

    def pull(offset: int, digest: bytes) -> list[pb.PullResponse]:
        request = pb.PullRequest(round=2, resume_offset=offset, resume_sha256=digest)
        return list(stub.Pull(request, timeout=60))

    header, *chunks = pull(0, b"")
    digest = header.header.sha256
    assert hashlib.sha256(whole).digest() == digest
    rest = pull(3_000_001, digest)
    assert rest[0].header.resume_offset == 3_000_001
    assert b"".join(chunk.data for part in rest for chunk in part.chunks) == whole[3_000_001:]
    again = pull(77, bytes(32))
    assert again[0].header.resume_offset == 0
    assert len(again) == 1 + len(chunks)
    assert max(part.ByteSize() for part in again) < bounds.MAX_MESSAGE_BYTES


def test_a_small_aggregate_is_one_message_and_so_is_the_word_that_there_is_none_yet(
    federation: Any, server: Any, connect: Any, dial: Any
) -> None:
    transports = {c: connect(server, c) for c in federation.clients}
    run_id = run_id_of(federation, *transports.values())
    for client, transport in transports.items():
        transport.push(federation.upload(run_id, client, 1))
    told = dial(server).Pull(pb.PullRequest(round=2, wait_milliseconds=60_000), timeout=60)
    (answer,) = (part for part in told if not part.HasField("waiting"))
    payload = b"".join(chunk.data for chunk in answer.chunks)
    assert wire.decode_aggregate(answer.header, payload) == transports["clinic-a"].pull(2)
    (answer,) = dial(server).Pull(pb.PullRequest(round=3), timeout=60)
    assert answer.HasField("waiting")


def test_a_second_push_replaces_one_that_hangs(
    large: Any, connect: Any, dial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The server would wait, and the second push with it.
    monkeypatch.setattr(peers, "MESSAGE_SECONDS", 600.0)
    federation, server = large
    transport = connect(server, "clinic-a")
    upload = federation.upload(run_id_of(federation, transport), "clinic-a", 1)
    hanging = threading.Event()

    def hang() -> Iterator[pb.PushRequest]:
        yield pb.PushRequest(header=wire.encode_upload_header(upload.header()))
        yield pb.PushRequest(chunk=pb.Chunk(data=b"not the payload"))
        hanging.wait(120)

    call = dial(server).Push.future(hang(), timeout=120)
    wait_until(lambda: list(server.settings.state_dir.rglob("clinic-a.*.part")))
    assert transport.push(upload).status is ReceiptStatus.ACCEPTED
    assert not hanging.is_set()
    hanging.set()
    with pytest.raises(grpc.RpcError, match="a newer push of this client has begun"):
        call.result(timeout=60)


def test_a_superseded_push_leaves_its_read_to_grpc_which_would_not_free_a_cancelled_one() -> None:
    async def superseded() -> None:
        comes, ended = asyncio.Event(), []

        async def requests() -> AsyncIterator[pb.PushRequest]:
            try:
                await comes.wait()
            finally:
                ended.append(comes.is_set())
            yield pb.PushRequest()

        newer = asyncio.get_running_loop().create_future()
        push = asyncio.ensure_future(_next(requests(), newer))
        await asyncio.sleep(0.01)
        newer.set_result(None)
        with pytest.raises(_SupersededError):
            await push
        comes.set()
        await asyncio.sleep(0.01)
        assert ended == [True], "the read has ended by itself"

    asyncio.run(superseded())


def test_a_restart_in_the_middle_of_a_round_is_survived_by_waiting_clients(
    federation: Any, settings: Any, start_server: Any, connect: Any
) -> None:
    settings = settings.model_copy(update={"listen": f"127.0.0.1:{free_port()}"})
    first = start_server(settings)
    transports = {c: connect(first, c, retry_seconds=120.0) for c in federation.clients}
    run_id = run_id_of(federation, *transports.values())
    for client in federation.clients[:3]:
        transports[client].push(federation.upload(run_id, client, 1))
    got: list[Any] = []
    waiting = threading.Thread(target=lambda: got.append(transports["clinic-a"].pull(2)))
    waiting.start()
    time.sleep(0.3)
    first.stop()
    second = start_server(settings)
    assert second.port == first.port
    for client in federation.clients[3:]:
        assert transports[client].push(federation.upload(run_id, client, 1)).status is ReceiptStatus.ACCEPTED
    waiting.join(60)
    assert got
    assert got[0].round == 2


def test_two_hundred_clients_wait_at_once(
    make_federation: Any, authority: Any, tmp_path: Path, start_server: Any, dial: Any
) -> None:
    names = tuple(f"c{i:03d}" for i in range(200))
    federation = make_federation(clients=names)
    changes = {"tls": authority.server(), "listen": "127.0.0.1:0"}
    server = start_server(federation.settings(tmp_path / "many", **changes))
    stubs = [dial(server, name) for name in names]
    calls = [s.Pull(pb.PullRequest(round=2, wait_milliseconds=60_000), timeout=120) for s in stubs]
    assert all(next(call).HasField("waiting") for call in calls)
    status = stubs[0].RoundStatus(pb.RoundStatusRequest(), timeout=60)
    assert status.state.round == 1
    assert not any(call.done() for call in calls), "another call is answered while two hundred wait"
    for call in calls:
        call.cancel()


def test_nobody_reads_in_vain_what_is_not_all_there(
    federation: Any, sealed: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    transports = [connect(sealed, client, wait_seconds=60.0) for client in federation.clients]
    read, looks = Coordinator.read_key_messages, []

    def look(self: Coordinator, client: str, epoch: int, stage: str) -> dict[str, bytes]:
        looks.append(client)
        return read(self, client, epoch, stage)

    monkeypatch.setattr(Coordinator, "read_key_messages", look)
    for transport in transports:
        transport.enrol(federation.enrolment())
        transport.post_key_message(KeyMessage(1, "join", "", b"here"))
    assert len(transports[0].read_key_messages(1, "join", 5, 60.0)) == 5
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(transports[0].read_key_messages, 1, "opening", 5, 60.0)
        for client, transport in zip(federation.clients, transports, strict=True):
            transport.post_key_message(KeyMessage(1, "opening", "", client.encode()))
        assert waiting.result(60.0) == {client: client.encode() for client in federation.clients}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(transports[1].read_key_messages, 1, "box", 1, 60.0)
        for client in federation.clients[:1:-1] + federation.clients[1:2]:
            transports[0].post_key_message(KeyMessage(1, "box", client, client.encode()))
        assert waiting.result(60.0) == {federation.clients[0]: federation.clients[1].encode()}
    assert len(looks) == 3
    assert transports[1].read_key_messages(1, "confirmation", 5, 0.1) == {}, "what is here at the deadline"


@pytest.fixture
def sealed(federation: Any, authority: Any, tmp_path: Path, start_server: Any) -> Any:
    """A server of a federation that encrypts."""
    changes = {"tls": authority.server(), "listen": "127.0.0.1:0", "encryption": MaskParameters()}
    return start_server(federation.settings(tmp_path / "sealed", **changes))


def test_key_messages_wait_for_their_readers(federation: Any, sealed: Any, connect: Any) -> None:
    transports = {c: connect(sealed, c) for c in federation.clients}

    def agree(client: str) -> dict[str, bytes]:
        transport = transports[client]
        transport.enrol(federation.enrolment())
        transport.post_key_message(KeyMessage(1, "join", "", b"here"))
        members = transport.read_key_messages(1, "join", 4, 20.0)
        transport.post_key_message(KeyMessage(1, "opening", "", client.encode()))
        found: dict[str, bytes] = transport.read_key_messages(1, "opening", len(members), 20.0)
        return found

    assert at_once(agree, federation.clients) == [{c: c.encode() for c in federation.clients}] * 5
    started = time.monotonic()
    assert transports["clinic-a"].read_key_messages(1, "confirmation", 5, 0.6) == {}
    assert 0.5 < time.monotonic() - started < 60.0
    with pytest.raises(Refusal) as error:
        transports["clinic-a"].post_key_message(KeyMessage(1, "opening", "", b"another"))
    assert error.value.reason == "KEY_MESSAGE_DIFFERS"


def test_key_messages_come_as_many_at_once_as_fit() -> None:
    small = {f"{number:063d}": bytes(272) for number in range(5000)}
    large = {name: bytes(bounds.MAX_CHUNK_BYTES) for name in ("y", "z")}
    batches = list(service._batches({**small, **large}))
    assert len(batches) == 4
    assert all(batch.ByteSize() <= bounds.MAX_MESSAGE_BYTES for batch in batches)
    came = {message.sender: message.payload for batch in batches for message in batch.messages}
    assert came == {**small, **large}
    assert list(service._batches({})) == []


def test_a_key_message_that_comes_during_a_look_is_not_waited_for(
    federation: Any, sealed: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for client in federation.clients:
        transport = connect(sealed, client, wait_seconds=60.0)
        transport.enrol(federation.enrolment())
        transport.post_key_message(KeyMessage(1, "join", "", b"here"))
    assert len(transport.read_key_messages(1, "join", 5, 60.0)) == 5
    read, looks = Coordinator.read_key_messages, []

    def look(self: Coordinator, client: str, epoch: int, stage: str) -> dict[str, bytes]:
        found = read(self, client, epoch, stage)
        looks.append(found)
        if len(looks) == 1:
            self.post_key_message("clinic-a", KeyMessage(1, "box", federation.clients[-1], b"late"))
            time.sleep(0.2)  # the news of it is through before the answer
        return found

    monkeypatch.setattr(Coordinator, "read_key_messages", look)
    # As for sums, and for boxes after a restart.
    monkeypatch.setattr(Coordinator, "fewer_key_messages", lambda *_: False)
    started = time.monotonic()
    assert transport.read_key_messages(1, "box", 1, 60.0) == {"clinic-a": b"late"}
    assert time.monotonic() - started < 30.0
    assert looks[0] == {}


def test_a_server_without_certificates_does_not_start(
    federation: Any, start_server: Any, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=r"needs tls\.certificate"):
        start_server(federation.settings(tmp_path / "bare"))


def test_an_upload_that_is_only_a_header_is_an_abstention(federation: Any, server: Any, connect: Any) -> None:
    transport = connect(server, "clinic-a")
    upload = federation.upload(run_id_of(federation, transport), "clinic-a", 1, sections=())
    assert transport.push(upload).status is ReceiptStatus.ACCEPTED
    assert transport.push(upload).status is ReceiptStatus.DUPLICATE
    assert transport.status().arrived == ("clinic-a",)
