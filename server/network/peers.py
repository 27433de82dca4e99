"""Who is calling, by its certificate and never by a message; and how much of the server one peer may take.

HTTP/2 limits streams per connection, and a peer may open many. So calls are counted by the identity in the
certificate; whoever has none does not get past the handshake, whose time and number are limited instead.
"""

import asyncio
import inspect
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Final, NoReturn, TypeVar

import grpc
from cryptography import x509
from google.protobuf.message import DecodeError
from grpc import aio

from fedmosaic.privacy.audit import AuditLog
from fedmosaic.privacy.federation.identity import parse_spiffe_id, public_key_sha256
from fedmosaic.protos.errors import IdentityError, WireError
from fedmosaic.protos.refusal import Refusal, RefusalKind, to_status
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.server.settings import ServerSettings

log = logging.getLogger(__name__)
CALLS_PER_PEER: Final = 16
"""A client has one or two calls open; a restart leaves the old ones until the server notices."""
MESSAGE_SECONDS: Final = 30.0
"""How long the server waits for a request, or for the next message of an upload."""
_FEWEST_CONNECTIONS: Final = 4096
"""So many who say nothing keep no member out; each is given up after its handshake's time."""
_KINDS: Final = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
_RETURNS_LAST: Final = f"/{pb.DESCRIPTOR.services_by_name['Federation'].full_name}/Pull"
"""A call that writes messages and returns the last one: gRPC sends that with the status, in one piece."""
Context = aio.ServicerContext[Any, Any]
T = TypeVar("T")


def channel_options(members: int, descriptors: int) -> tuple[tuple[str, int], ...]:
    """Limits that gRPC keeps itself, for so many members and free file descriptors.

    A connection too many is closed at once; one for which no descriptor is left would stop all others.
    """
    connections = min(max(4 * members, _FEWEST_CONNECTIONS), descriptors)
    return (
        # Above what is served, so that one call too many is answered and does not wait for ever.
        ("grpc.max_concurrent_streams", 2 * CALLS_PER_PEER),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", 10_000),
        # A connection without a call; a client that is training opens a new one for its next.
        ("grpc.max_connection_idle_ms", 120_000),
    )


async def refuse(context: Context, audit: AuditLog, call: str, who: str, refusal: Refusal) -> NoReturn:
    """End a call with a refusal, and note it; the same again within a minute has no line in the log."""
    level = logging.WARNING if audit.refused(who, call, refusal.reason) else logging.DEBUG
    log.log(level, "refused %s of %s: %s: %s", call, who, refusal.reason, refusal)
    await context.abort_with_status(to_status(refusal))
    raise AssertionError("abort returns by raising")


def malformed(message: str) -> Refusal:
    """The refusal of bytes that are no message, or of a message that breaks a bound."""
    return Refusal(RefusalKind.INVALID, "MALFORMED", message, "")


async def nothing_came(context: Context, call: str, who: str) -> NoReturn:
    """End a call whose next message did not come in time, and give it one line in the log."""
    log.warning("%s of %s: nothing came for %.0f s, so it is ended", call, who, MESSAGE_SECONDS)
    await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"nothing came for {MESSAGE_SECONDS:.0f} s")
    raise AssertionError("abort returns by raising")


async def next_message(coming: Awaitable[T], *instead: "asyncio.Future[Any]") -> T | None:
    """The message of a call that is coming; None once one of `instead` is done.

    A read that gRPC has begun is never cancelled, since it would forget to free what it reads into, some
    hundred bytes each time; it ends with its call. TimeoutError if nothing comes for `MESSAGE_SECONDS`.
    """
    reading = asyncio.ensure_future(coming)
    reading.add_done_callback(lambda read: read.cancelled() or read.exception())
    either = asyncio.FIRST_COMPLETED
    done, _ = await asyncio.wait((reading, *instead), timeout=MESSAGE_SECONDS, return_when=either)
    if not done:
        raise TimeoutError
    return reading.result() if reading in done else None


class Gate(aio.ServerInterceptor):
    """Refuses a call of a peer that has `CALLS_PER_PEER` open, and bytes that are no message.

    Nothing of a call is read before it is admitted, since all are streams of requests here, if only of one:
    so a peer takes the memory of as many messages as it may have calls, however many connections it has. A
    call whose request does not come is ended after `MESSAGE_SECONDS`.
    gRPC itself would read a single request first, answer bytes that are no message with UNKNOWN, and log a
    traceback for each.
    """

    def __init__(self, audit: AuditLog) -> None:
        self.audit = audit
        self.open: Counter[str] = Counter()  # calls that are open, by who calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method of a call, whatever the service, so that the call is counted while it is open."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = next(name for name in _KINDS if getattr(handler, name) is not None)
        parts = getattr(handler, kind), handler.request_deserializer
        method = self._guarded(*parts, streamed=handler.request_streaming)
        answer = "unary" if handler_call_details.method == _RETURNS_LAST else kind.partition("_")[2]
        changes = {kind: None, f"stream_{answer}": method, "response_streaming": answer == "stream"}
        changes |= {"request_streaming": True, "request_deserializer": None}
        serialise = handler.response_serializer
        return handler._replace(
            **changes, response_serializer=lambda told: told if isinstance(told, bytes) else serialise(told)
        )

    def _guarded(
        self, method: Callable[[Any, Context], Any], parse: Callable[[bytes], Any], *, streamed: bool
    ) -> Callable[[Any, Context], Any]:
        async def admitted(request: Any, context: Context) -> Any:
            who = await self.admit(context)
            try:
                if streamed:
                    return method(_parsed(request, parse), context)
                # Not from the iterator, whose generator nobody ends: ending it later costs a task a call.
                content = await next_message(context.read())
                if content is None or content is grpc.aio.EOF:
                    raise WireError("the call ended without a request")
                return method(_message(content, parse), context)
            except WireError as error:
                await refuse(context, self.audit, "a call", who, malformed(str(error)))
            except TimeoutError:
                await nothing_came(context, "a call", who)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with aclosing(await admitted(request, context)) as messages:
                async for message in messages:
                    yield message

        async def single(request: Any, context: Context) -> Any:
            return await (await admitted(request, context))

        return stream if inspect.isasyncgenfunction(method) else single

    async def admit(self, context: Context) -> str:
        """Count a call while it is open, unless there are too many; returns who calls."""
        names = context.auth_context().get("x509_subject_alternative_name", ())
        peer = " ".join(name.decode(errors="replace") for name in names) or context.peer()
        if self.open[peer] >= CALLS_PER_PEER:
            self.audit.refused(peer, "a call", "TOO_MANY_CALLS")
            await context.abort_with_status(
                to_status(
                    Refusal(
                        RefusalKind.EXHAUSTED,
                        "TOO_MANY_CALLS",
                        f"{CALLS_PER_PEER} calls with this certificate are open already",
                        "stop other processes that use the same kit; calls of one that was killed are given "
                        "up within a minute",
                    )
                )
            )
        self.open[peer] += 1

        def left(_context: Context) -> None:
            self.open[peer] -= 1
            if not self.open[peer]:
                del self.open[peer]

        context.add_done_callback(left)  # type: ignore[arg-type]  # the stubs want a class that exists nowhere
        return peer


async def _parsed(contents: AsyncIterator[bytes], parse: Callable[[bytes], T]) -> AsyncIterator[T]:
    async for content in contents:
        yield _message(content, parse)


def _message(content: bytes, parse: Callable[[bytes], T]) -> T:
    try:
        return parse(content)
    except DecodeError:
        raise WireError(f"a message of {len(content)} bytes is no request of this call") from None


def identify(auth: Mapping[str, Iterable[bytes]], settings: ServerSettings, *, witness: bool = False) -> str:
    """Id of the member, or of the witness alone, whose verified certificate opened the connection.

    `auth` is the `auth_context()` of a gRPC call: TLS has verified the certificate in it, and the id is that
    of its SPIFFE URI.

    Raises:
        Refusal: no such certificate, another federation, not on the roster, or another key than pinned.
    """
    names = [name.decode(errors="replace") for name in auth.get("x509_subject_alternative_name", ())]
    pem = next(iter(auth.get("x509_pem_cert", ())), None)
    if pem is None or len(names) != 1:
        raise _unauthenticated("the connection has no certificate with exactly one SPIFFE URI")
    version = next(iter(auth.get("ssl_tls_version", ())), b"TLSv1.3").decode(errors="replace")
    if version != "TLSv1.3":
        raise _unauthenticated(f"the connection uses {version}, expected TLSv1.3")
    try:
        federation, client = parse_spiffe_id(names[0])
    except IdentityError as error:
        raise _unauthenticated(str(error)) from None
    roster = settings.roster
    if federation != roster.federation:
        raise _unauthenticated(
            f"the certificate is for federation {federation!r}, this is {roster.federation!r}"
        )
    party = roster.witness if witness else settings.members.get(client)
    if witness and (party is None or client != party.id):
        raise Refusal(
            RefusalKind.NOT_PERMITTED,
            "NOT_THE_WITNESS",
            f"{client!r} is not the witness of federation {federation!r}",
            "start it with the witness's kit, and the server with the newest roster",
        )
    if party is None:
        raise Refusal(
            RefusalKind.NOT_PERMITTED,
            "NOT_ON_ROSTER",
            f"{client!r} has a valid certificate but is not on the roster of federation {federation!r}",
            "it was revoked, or the server has an old roster: ask the consortium",
        )
    if public_key_sha256(x509.load_pem_x509_certificate(pem)) != party.tls_key_sha256:
        raise _unauthenticated(f"the certificate of {client!r} has another key than the roster pins")
    return client


def _unauthenticated(message: str) -> Refusal:
    return Refusal(
        RefusalKind.UNAUTHENTICATED,
        "WRONG_CERTIFICATE",
        message,
        "install what the consortium has signed last (`fedmosaic keys install`)",
    )
