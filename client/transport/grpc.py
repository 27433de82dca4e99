"""What a session asks of the server, and the gRPC transport that carries it and counts its bytes."""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from fedmosaic.client.transport.connection import Patience, open_channel
from fedmosaic.privacy.configuration import read_own
from fedmosaic.privacy.federation.identity import expires_soon, read_certificate
from fedmosaic.privacy.files import file_marks, write_atomically
from fedmosaic.protos import bounds, wire
from fedmosaic.protos.errors import IdentityError, WireError
from fedmosaic.protos.messages import (
    Aggregate,
    Enrolled,
    Enrolment,
    KeyMessage,
    Receipt,
    RelayedKeyMessage,
    Report,
    RoundStatus,
    Upload,
)
from fedmosaic.protos.refusal import Refusal
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc

Channel = Literal["adapter", "profile", "keys", "control"]
CHANNELS: Final[tuple[Channel, ...]] = ("adapter", "profile", "keys", "control")


class Traffic:
    """Serialised message bytes per channel; what HTTP/2 and TLS add is not in them.

    The channels: `adapter` is chunks of uploads and aggregates, `profile` the task profile, `keys` the key
    agreement, `control` everything else.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Begin to count, or go on with the file that `save` writes; StateError if that is damaged."""
        self._lock = threading.Lock()
        self._sent: Counter[Channel] = Counter()
        self._received: Counter[Channel] = Counter()
        self._path = path
        if path is not None:
            read_own(path, self._go_on, "delete it: only the count of bytes is lost")

    def _go_on(self, stored: dict[str, dict[str, int]]) -> None:
        for channel in CHANNELS:
            self._sent[channel] = int(stored[channel]["sent"])
            self._received[channel] = int(stored[channel]["received"])

    def save(self) -> None:
        """Store the counts, if there is a file for them."""
        if self._path is not None:
            write_atomically(self._path, json.dumps(self.as_dict()).encode())

    def sent(self, channel: Channel, size: int) -> None:
        """Count bytes that were sent."""
        with self._lock:
            self._sent[channel] += size

    def received(self, channel: Channel, size: int) -> None:
        """Count bytes that were received."""
        with self._lock:
            self._received[channel] += size

    def as_dict(self) -> dict[str, dict[str, int]]:
        """Bytes sent and received by channel; JSON-compatible."""
        with self._lock:
            return {c: {"sent": self._sent[c], "received": self._received[c]} for c in CHANNELS}


log = logging.getLogger(__name__)
T = TypeVar("T")
B = TypeVar("B", bound=Message)
OnWait = Callable[[RoundStatus], None]
Connect = Callable[[str, Path, Path, Path], grpc.Channel]
"""Opens the channel to the server: of its address, the authority's certificate, the own one and its key."""
_DAY_SECONDS: Final = 86_400.0
_LARGE_BYTES: Final = 1 << 20
_SHORTEST_POLL_SECONDS: Final = 0.5
_CALL_SECONDS: Final = 30.0
"""Deadline of a call that does not wait; of one that waits, on top of its wait."""


class Transport(Protocol):
    """One client's way to the server. Every call raises `Refusal` where the server refuses."""

    def enrol(self, enrolment: Enrolment) -> Enrolled:
        """Compare the terms of both sides and learn where the run is."""

    def pull(self, round_number: int, on_wait: OnWait | None = None) -> Aggregate:
        """Wait until this round, or a later one, is open and return what to load before it.

        `on_wait` is told now and then what the server waits for.
        """

    def push(self, upload: Upload) -> Receipt:
        """Send an upload; sending the same one again is harmless."""

    def status(self) -> RoundStatus:
        """What the server waits for."""

    def report(self, statement: bytes) -> None:
        """Hand over the privacy statement, a JSON object."""

    def post_key_message(self, message: KeyMessage) -> None:
        """Leave a message of the key agreement; leaving the same one again is harmless."""

    def read_key_messages(
        self, epoch: int, stage: str, expected: int, timeout_seconds: float
    ) -> dict[str, bytes]:
        """Messages of a stage by sender: once there are `expected`, or what is there at the timeout."""

    def traffic(self) -> Traffic:
        """Bytes sent and received so far."""

    def close(self) -> None:
        """Close the connection."""


class GrpcTransport:
    """`Transport` over gRPC with mutual TLS. Blocking; one per client process."""

    def __init__(
        self,
        address: str,
        *,
        authority: Path,
        certificate: Path,
        private_key: Path,
        retry_seconds: float = 300.0,
        wait_seconds: float = 25.0,
        traffic: Traffic | None = None,
        connect: Connect = open_channel,
    ) -> None:
        """Prepare a connection with PEM files of a kit; it is opened by the first call.

        One call waits `wait_seconds` at the server, at most 60; without any progress for `retry_seconds` the
        transport gives up. IdentityError if a file is not acceptable.
        """
        self._address, self._files = address, (authority, certificate, private_key)
        self._marks = file_marks(self._files)
        self._connect = connect
        self._channel = connect(address, authority, certificate, private_key)
        self._stub = rpc.FederationStub(self._channel)
        self._looked = time.monotonic()
        self._patience = Patience(address, retry_seconds)
        self._wait = wait_seconds
        self._traffic = traffic or Traffic()

    def _call(self, name: str, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        def fresh() -> T:
            self._reopen_if_changed()
            return attempt()

        try:
            return self._patience.retry(name, fresh, progress)
        finally:
            self._traffic.save()

    def _reopen_if_changed(self) -> None:
        """Show a certificate that was installed meanwhile; once a day, say if the one here expires."""
        if time.monotonic() - self._looked > _DAY_SECONDS:
            self._looked = time.monotonic()
            if words := expires_soon(read_certificate(self._files[1]).not_valid_after_utc):
                log.warning("%s", words)
        if (marks := file_marks(self._files)) == self._marks:
            return
        self._marks = marks
        try:
            channel = self._connect(self._address, *self._files)
        except IdentityError as error:
            # An installation may be in the middle; its last file changes the marks once more.
            log.warning("going on with the connection of before: %s", error)
            return
        log.info("certificate or authority have changed: connecting anew")
        self._channel.close()
        self._channel, self._stub = channel, rpc.FederationStub(channel)

    def _unary(
        self,
        name: str,
        method: Callable[[], Callable[..., B]],
        request: Message,
        channel: Channel = "control",
    ) -> B:
        """One request and its answer, counted; `method` takes it from the stub of the present channel."""
        response = self._call(name, lambda: self._attempt(method(), request, channel))
        self._traffic.received(channel, response.ByteSize())
        return response

    def _attempt(self, method: Callable[..., B], request: Message, channel: Channel) -> B:
        self._traffic.sent(channel, request.ByteSize())
        return method(request, timeout=_CALL_SECONDS)

    def enrol(self, enrolment: Enrolment) -> Enrolled:
        """See `Transport.enrol`."""
        request = wire.encode(enrolment, pb.EnrolRequest)
        return wire.decode(self._unary("enrol", lambda: self._stub.Enrol, request), Enrolled)

    def pull(self, round_number: int, on_wait: OnWait | None = None) -> Aggregate:
        """See `Transport.pull`."""
        download = _Download()

        def attempt() -> bool:
            request = pb.PullRequest(
                round=round_number,
                wait_milliseconds=int(self._wait * 1000),
                resume_offset=len(download.received),
                resume_sha256=download.sha256,
            )
            self._traffic.sent("control", request.ByteSize())
            for part in self._stub.Pull(request, timeout=self._wait + _CALL_SECONDS):
                download.messages += 1
                size = sum(chunk.ByteSize() for chunk in part.chunks)
                self._traffic.received("adapter", size)
                self._traffic.received("control", part.ByteSize() - size)
                if part.HasField("waiting") and on_wait is not None:
                    on_wait(wire.decode(part.waiting, RoundStatus))
                if part.HasField("header"):
                    download.begin(part.header)
                for chunk in part.chunks:
                    download.append(chunk)
            return download.complete

        while True:
            asked = time.monotonic()
            if self._call("pull", attempt, lambda: download.messages):
                return download.aggregate()
            _breathe(asked)

    def push(self, upload: Upload) -> Receipt:
        """See `Transport.push`."""
        header = upload.header()
        payloads = [section.payload for section in upload.sections]
        profile = 0 if upload.profile is None else wire.encode(upload.profile, pb.Profile).ByteSize()
        offset = furthest = 0
        # What a stopped process had sent is worth asking for only if it was much.
        ask = header.size > _LARGE_BYTES

        def messages() -> Iterator[pb.PushRequest]:
            first = pb.PushRequest(header=wire.encode_upload_header(header, offset))
            self._traffic.sent("profile", profile)
            self._traffic.sent("control", first.ByteSize() - profile)
            yield first
            for chunk in wire.chunks(payloads, offset):
                message = pb.PushRequest(chunk=chunk)
                self._traffic.sent("adapter", message.ByteSize())
                yield message

        def attempt() -> pb.PushResponse:
            nonlocal ask, offset, furthest
            if ask:
                request = pb.UploadStatusRequest(header=wire.encode_upload_header(header))
                status = self._attempt(self._stub.UploadStatus, request, "control")
                self._traffic.received("control", status.ByteSize())
                if status.HasField("receipt"):
                    return status.receipt
                if status.received > header.size:
                    raise WireError(f"the server has {status.received} bytes of an upload of {header.size}")
                offset = status.received
                furthest = max(furthest, offset)
            ask = True
            return self._stub.Push(messages(), timeout=_CALL_SECONDS)

        try:
            response = self._call("push", attempt, lambda: furthest)
        except Refusal as refusal:
            if refusal.reason != "PAYLOAD_DIFFERS" or offset == 0:
                raise
            # The server lost part of what had arrived, in a crash of its machine; it starts from nothing.
            response = self._call("push", attempt, lambda: furthest)
        self._traffic.received("control", response.ByteSize())
        return wire.decode(response, Receipt)

    def status(self) -> RoundStatus:
        """See `Transport.status`."""
        response = self._unary("status", lambda: self._stub.RoundStatus, pb.RoundStatusRequest())
        return wire.decode(response.state, RoundStatus)

    def report(self, statement: bytes) -> None:
        """See `Transport.report`."""
        self._unary("report", lambda: self._stub.Report, wire.encode(Report(statement), pb.ReportRequest))

    def post_key_message(self, message: KeyMessage) -> None:
        """See `Transport.post_key_message`."""
        request = wire.encode(message, pb.PostKeyMessageRequest)
        self._unary("post key message", lambda: self._stub.PostKeyMessage, request, "keys")

    def read_key_messages(
        self, epoch: int, stage: str, expected: int, timeout_seconds: float
    ) -> dict[str, bytes]:
        """See `Transport.read_key_messages`."""
        deadline = time.monotonic() + timeout_seconds

        def attempt() -> dict[str, bytes]:
            wait = min(self._wait, max(0.0, deadline - time.monotonic()))
            request = pb.ReadKeyMessagesRequest(
                epoch=epoch, stage=stage, expected=expected, wait_milliseconds=int(wait * 1000)
            )
            self._traffic.sent("keys", request.ByteSize())
            found: dict[str, bytes] = {}
            size = 0
            for part in self._stub.ReadKeyMessages(request, timeout=wait + _CALL_SECONDS):
                self._traffic.received("keys", part.ByteSize())
                for message in (wire.decode(one, RelayedKeyMessage) for one in part.messages):
                    found[message.sender] = message.payload
                    if len(found) > bounds.MAX_MEMBERS:
                        raise WireError(f"key messages of more than {bounds.MAX_MEMBERS} senders came")
                    size += len(message.payload)
                    if size > bounds.MAX_RELAYED_BYTES:
                        raise WireError(f"messages of more than {bounds.MAX_RELAYED_BYTES:,} bytes came")
            return found

        while True:
            asked = time.monotonic()
            found = self._call("read key messages", attempt)
            if len(found) >= max(1, expected) or time.monotonic() >= deadline:
                return found
            _breathe(asked)

    def traffic(self) -> Traffic:
        """See `Transport.traffic`."""
        return self._traffic

    def close(self) -> None:
        """See `Transport.close`."""
        self._channel.close()


def _breathe(asked: float) -> None:
    """A server that is stopping answers at once that it has nothing; ask it no faster than this."""
    time.sleep(max(0.0, _SHORTEST_POLL_SECONDS - (time.monotonic() - asked)))


class _Download:
    """An aggregate that is arriving, over as many calls as it takes."""

    def __init__(self) -> None:
        self._header: pb.AggregateHeader | None = None
        self._size = 0
        self.received = bytearray()
        self.messages = 0

    @property
    def sha256(self) -> bytes:
        return b"" if self._header is None else self._header.sha256

    @property
    def complete(self) -> bool:
        return self._header is not None and len(self.received) == self._size

    def begin(self, header: pb.AggregateHeader) -> None:
        size = wire.announced_size(header)
        if header.sha256 != self.sha256:
            self.received.clear()
        if header.resume_offset > len(self.received):
            raise WireError(
                f"the aggregate goes on at byte {header.resume_offset}, {len(self.received)} are here"
            )
        del self.received[header.resume_offset :]
        self._header, self._size = header, size

    def append(self, chunk: pb.Chunk) -> None:
        wire.check_chunk(chunk, len(self.received), self._size)
        self.received += chunk.data

    def aggregate(self) -> Aggregate:
        if self._header is None:
            raise WireError("the server sent chunks without a header")
        return wire.decode_aggregate(self._header, bytes(self.received))
