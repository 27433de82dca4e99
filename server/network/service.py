"""The gRPC servicer: bytes in and out, and waiting. Every decision is the coordinator's.

CPU and disk work runs in threads; waiting costs none, so hundreds of clients may wait at once.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from functools import partial
from typing import Final, TypeVar

import grpc
from google.protobuf.message import Message

from fedmosaic.privacy.files import private_opener
from fedmosaic.protos import bounds, wire
from fedmosaic.protos.errors import FedMosaicError, WireError
from fedmosaic.protos.messages import Enrolment, KeyMessage, Receipt, UploadHeader
from fedmosaic.protos.refusal import Refusal, RefusalKind
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.network.peers import (
    Context,
    identify,
    malformed,
    next_message,
    nothing_came,
    refuse,
)
from fedmosaic.server.network.waiting import Changes
from fedmosaic.server.round.aggregates import Download
from fedmosaic.server.storage.blobs import MissingBlobError
from fedmosaic.server.uploads import Ticket

log = logging.getLogger(__name__)
STATUS_SECONDS: Final = 2.0
"""How often a waiting client is told what it waits for; where more than 200 wait, less often."""
_STATUS_AGE_SECONDS: Final = 0.5
"""How old that may be, so that a thousand waiting clients cost one look."""
_SMALL_BYTES: Final = 1 << 16
"""Aggregates that are read and hashed in less time than a thread takes to begin."""
_AROUND_KEY_MESSAGE_BYTES: Final = 96
"""Its sender's name, and the lengths."""
T = TypeVar("T")
M = TypeVar("M", bound=Message)
_Requests = Callable[[], Awaitable[pb.PushRequest | None]]


class FederationService(rpc.FederationServicer):
    """Translates calls into the coordinator's methods, and their refusals into status codes."""

    def __init__(self, coordinator: Coordinator, changes: Changes) -> None:
        self._coordinator = coordinator
        self._changes = changes
        self.audit = coordinator.audit
        self._pushing: dict[str, asyncio.Future[None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._status = (-1.0, b"")

    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolResponse:
        """See `Coordinator.enrol`."""

        def enrol(client: str) -> pb.EnrolResponse:
            found = self._coordinator.enrol(client, wire.decode(request, Enrolment))
            return wire.encode(found, pb.EnrolResponse)

        return await self._unary(context, "enrolment", request, enrol)

    async def UploadStatus(
        self, request: pb.UploadStatusRequest, context: Context
    ) -> pb.UploadStatusResponse:
        """Judge a header as `Push` would, and tell how much of its payload is here."""

        def progress(client: str) -> pb.UploadStatusResponse:
            answer = self._coordinator.announce(client, wire.decode_upload_header(request.header))
            if isinstance(answer, Receipt):
                return pb.UploadStatusResponse(receipt=wire.encode(answer, pb.PushResponse))
            return pb.UploadStatusResponse(received=answer.received)

        return await self._unary(context, "upload status", request, progress)

    async def RoundStatus(self, request: pb.RoundStatusRequest, context: Context) -> pb.RoundStatusResponse:
        """See `Coordinator.status`."""

        def status(client: str) -> pb.RoundStatusResponse:
            return pb.RoundStatusResponse(state=wire.encode(self._coordinator.status(client), pb.RoundState))

        return await self._unary(context, "round status", request, status)

    async def Report(self, request: pb.ReportRequest, context: Context) -> pb.ReportResponse:
        """See `Coordinator.report`."""

        def report(client: str) -> pb.ReportResponse:
            self._coordinator.report(client, request.statement)
            return pb.ReportResponse()

        return await self._unary(context, "report", request, report)

    async def PostKeyMessage(
        self, request: pb.PostKeyMessageRequest, context: Context
    ) -> pb.PostKeyMessageResponse:
        """See `Coordinator.post_key_message`."""

        def post(client: str) -> pb.PostKeyMessageResponse:
            self._coordinator.post_key_message(client, wire.decode(request, KeyMessage))
            return pb.PostKeyMessageResponse()

        return await self._unary(context, "key message", request, post)

    async def ReadKeyMessages(
        self, request: pb.ReadKeyMessagesRequest, context: Context
    ) -> AsyncIterator[pb.ReadKeyMessagesResponse]:
        """Wait until as many senders are there as expected, then send what may be read."""
        deadline = time.monotonic() + wait_seconds(request.wait_milliseconds)
        # So many readers ask again after every message; in a large federation they ask less often.
        breath = min(0.5, 0.005 * len(self._coordinator.settings.members))
        settings = None
        while True:
            seen = self._changes.work  # before the look: what is posted during it must not be waited for
            if self._coordinator.settings is not settings:  # at first, and where a roster has come meanwhile
                settings = self._coordinator.settings
                client = await self.identify(context, "key messages")
            left, wanted = deadline - time.monotonic(), max(1, request.expected)
            over = left <= 0.0 or self._changes.stopping
            # Of a thousand who wait for a thousand messages each, nobody reads those that are here in vain.
            fewer = self._coordinator.fewer_key_messages
            if over or not fewer(client, request.epoch, request.stage, wanted):
                read = self._coordinator.read_key_messages
                look = asyncio.to_thread(read, client, request.epoch, request.stage)
                found = await self.guarded(context, "key messages", client, look)
                if len(found) >= wanted or over:
                    break
            await self._changes.until("keys", lambda: self._changes.work > seen, left)  # noqa: B023
            await asyncio.sleep(min(breath, max(0.0, deadline - time.monotonic())))
        sent = 0
        for batch in _batches(found):
            sent += batch.ByteSize()
            yield batch
        self._coordinator.count_traffic(client, request.ByteSize(), sent)

    async def Pull(self, request: pb.PullRequest, context: Context) -> bytes:  # type: ignore[override]  # see `Gate`
        """Tell what is being waited for until the round is open, then send the aggregate; serialised."""
        deadline = time.monotonic() + wait_seconds(request.wait_milliseconds)
        sent = 0

        def opened() -> bool:
            return self._coordinator.available_round >= request.round

        async def send(message: bytes) -> None:
            nonlocal sent
            sent += len(message)
            await context.write(message)

        settings = None
        while True:
            if self._coordinator.settings is not settings:  # at first, and where a roster has come meanwhile
                settings = self._coordinator.settings
                client = await self.identify(context, "pull")
                arriving = asyncio.to_thread(self._coordinator.arrive, client, request.round)
                await self.guarded(context, "pull", client, arriving)
            download = await self.guarded(context, "pull", client, self._open(client, request.round))
            if download is not None:
                with self._coordinator.traces.span("pull", request.round, client):
                    messages = _download_messages(request, download)
                    last = next(messages)
                    for message in messages:
                        await send(last)
                        last = message
                break
            while not (opened() or self._changes.stopping) and time.monotonic() < deadline:
                if self._coordinator.settings is not settings:
                    break
                await send(self._waiting())
                left = deadline - time.monotonic()
                pause = max(STATUS_SECONDS, 0.01 * len(settings.members))
                await self._changes.until("round", opened, min(pause, left))
            if not opened() and self._coordinator.settings is settings:
                last = self._waiting()
                break
        self._coordinator.count_traffic(client, request.ByteSize(), sent + len(last))
        return last

    async def _open(self, client: str, round_number: int) -> Download | None:
        """A download that is whole; a small one without a thread, since a round wakes all clients at once."""
        try:
            download = self._coordinator.open_download(client, round_number)
            if download is None or (download.size <= _SMALL_BYTES and download.whole):
                return download
        except MissingBlobError:
            pass  # found, said and mended below
        return await asyncio.to_thread(self._coordinator.repaired, client, round_number)

    def _waiting(self) -> bytes:
        made, message = self._status
        now = time.monotonic()
        if made < 0.0 or now - made > _STATUS_AGE_SECONDS:
            state = wire.encode(self._coordinator.describe(), pb.RoundState)
            message = pb.PullResponse(waiting=state).SerializeToString()
            self._status = (now, message)
        return message

    async def Push(
        self, request_iterator: AsyncIterator[pb.PushRequest], context: Context
    ) -> pb.PushResponse:
        """Judge the header, then append chunks to the spool file until the upload is complete."""
        client = await self.identify(context, "push")
        newest = asyncio.get_running_loop().create_future()
        earlier, self._pushing[client] = self._pushing.get(client), newest
        if earlier is not None:
            # Its connection is dead, or the client has changed its mind: the newest push counts.
            log.info("an earlier push of %s is superseded by a new one", client)
            earlier.set_result(None)
        try:
            async with self._locks.setdefault(client, asyncio.Lock()):
                receiving = self._receive(client, partial(_next, request_iterator, newest))
                receipt = await self.guarded(context, "push", client, receiving)
        except _SupersededError:
            await context.abort(grpc.StatusCode.ABORTED, "a newer push of this client has begun")
        finally:
            if self._pushing.get(client) is newest:
                del self._pushing[client]
        return wire.encode(receipt, pb.PushResponse)

    async def _receive(self, client: str, next_request: _Requests) -> Receipt:
        first = await next_request()
        if first is None or not first.HasField("header"):
            raise WireError("an upload must begin with its header")
        header = await asyncio.to_thread(wire.decode_upload_header, first.header)
        ticket = await asyncio.to_thread(self._coordinator.announce, client, header)
        if isinstance(ticket, Receipt):
            return ticket
        offset = int(first.header.resume_offset)
        if offset > ticket.received:
            raise Refusal(
                RefusalKind.TOO_LARGE,
                "WRONG_OFFSET",
                f"the upload is resumed at byte {offset}, {ticket.received} bytes are here",
                "ask for the upload status and resume from there",
            )
        with self._coordinator.traces.span("push", header.round, client):
            received = first.ByteSize() + await self._append(ticket, offset, next_request)
            return await self._finish(client, header, ticket, received)

    async def _append(self, ticket: Ticket, offset: int, next_request: _Requests) -> int:
        """Append chunks until the announced size is reached; returns the bytes of their messages."""
        position, counted = offset, 0
        if ticket.size == 0:
            return 0
        with open(ticket.spool, "r+b" if ticket.spool.exists() else "wb", opener=private_opener) as spool:
            spool.truncate(offset)
            spool.seek(offset)
            while position < ticket.size:
                message = await next_request()
                if message is None:
                    raise WireError(f"the upload ended after {position} of {ticket.size} bytes")
                wire.check_chunk(message.chunk, position, ticket.size)
                await asyncio.to_thread(spool.write, message.chunk.data)
                position += len(message.chunk.data)
                counted += message.ByteSize()
        return counted

    async def _finish(self, client: str, header: UploadHeader, ticket: Ticket, received: int) -> Receipt:
        commit = asyncio.ensure_future(
            asyncio.to_thread(self._coordinator.commit, client, header, ticket, received)
        )
        try:
            return await asyncio.shield(commit)
        except asyncio.CancelledError:
            # The connection broke, but the thread goes on with the spool file: keep the lock till then.
            await asyncio.wait({commit})
            raise

    async def _unary(self, context: Context, call: str, request: Message, method: Callable[[str], M]) -> M:
        client = await self.identify(context, call)
        response = await self.guarded(context, call, client, asyncio.to_thread(method, client))
        self._coordinator.count_traffic(client, request.ByteSize(), response.ByteSize())
        return response

    async def identify(self, context: Context, call: str, *, witness: bool = False) -> str:
        """Id of who calls: of a member, or of the witness; whoever else it is is refused."""
        try:
            return identify(context.auth_context(), self._coordinator.settings, witness=witness)
        except Refusal as refusal:
            await refuse(context, self.audit, call, context.peer() or "unknown peer", refusal)

    async def guarded(self, context: Context, call: str, client: str, work: Awaitable[T]) -> T:
        """Await work; answer errors with a status, and give each one line in the log."""
        try:
            return await work
        except Refusal as refusal:
            await refuse(context, self.audit, call, client, refusal)
        except WireError as error:
            await refuse(context, self.audit, call, client, malformed(str(error)))
        except _SupersededError:
            raise
        except TimeoutError:
            await nothing_came(context, call, client)
        except (FedMosaicError, OSError) as error:
            log.error("%s of %s failed: %s", call, client, error)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server has a fault of its own; try again")
        except Exception:  # a peer may have found a fault of ours: it learns no more than that, the log all
            log.exception("%s of %s failed", call, client)
            await context.abort(grpc.StatusCode.INTERNAL, "the server has a fault of its own; see its log")


class _SupersededError(Exception):
    """A newer push of the client has begun."""


async def _next(
    requests: AsyncIterator[pb.PushRequest], newer: "asyncio.Future[None]"
) -> pb.PushRequest | None:
    """The next message of a push, None after the last, until a newer push of the client begins."""
    message = None if newer.done() else await next_message(anext(requests, None), newer)
    if newer.done():
        raise _SupersededError
    return message


def _batches(found: Mapping[str, bytes]) -> Iterator[pb.ReadKeyMessagesResponse]:
    """Key messages by sender, as many in one answer as fit."""
    batch, size = pb.ReadKeyMessagesResponse(), 0
    for sender, payload in sorted(found.items()):
        more = len(payload) + _AROUND_KEY_MESSAGE_BYTES
        if size and size + more > bounds.MAX_MESSAGE_BYTES:
            yield batch
            batch, size = pb.ReadKeyMessagesResponse(), 0
        batch.messages.add(sender=sender, payload=payload)
        size += more
    if size:
        yield batch


def wait_seconds(milliseconds: int) -> float:
    """How long a call waits that asked for so much."""
    return min(milliseconds, bounds.MAX_WAIT_MILLISECONDS) / 1000.0


def _download_messages(request: pb.PullRequest, download: Download) -> Iterator[bytes]:
    """Header and chunks of an aggregate, from where the client left off if it is the same one.

    What is small is in one message with the header, since each takes gRPC a while.
    """
    resumed = request.resume_sha256 == download.sha256 and request.resume_offset <= download.size
    offset = int(request.resume_offset) if resumed else 0
    sizes = [len(payload) for payload in download.payloads]
    header = wire.encode_aggregate_header(download.aggregate, sizes, download.sha256, offset)
    message = wire.field(pb.PullResponse.HEADER_FIELD_NUMBER, header)
    for chunk in wire.chunks(download.payloads, offset):
        part = pb.PullResponse(chunks=[chunk]).SerializeToString()
        if len(message) + len(part) <= _SMALL_BYTES:
            message += part
            continue
        yield message
        message = part
    yield message
