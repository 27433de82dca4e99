"""How many calls one peer may have open at once, over all its connections.

HTTP/2 limits streams per connection, and a peer may open many. So calls are counted by the identity in the
certificate; whoever has none does not get past the handshake, whose time and number are limited instead.
"""

import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final

import grpc
from grpc import aio

from fedmosaic.protos.refusal import Refusal, RefusalKind, to_status

CALLS_PER_PEER: Final = 16
"""A client has one or two calls open; a restart leaves the old ones until the server notices."""
_SPARE_CONNECTIONS: Final = 256
_KINDS: Final = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
Context = aio.ServicerContext[Any, Any]


def channel_options(members: int) -> tuple[tuple[str, int], ...]:
    """Limits that gRPC keeps itself.

    Args:
        members: of the federation.
    """
    return (
        # Above what is served, so that one call too many is answered and does not wait for ever.
        ("grpc.max_concurrent_streams", 2 * CALLS_PER_PEER),
        ("grpc.max_allowed_incoming_connections", 4 * members + _SPARE_CONNECTIONS),
        ("grpc.server_handshake_timeout_ms", 10_000),
        # A connection without a call; a client that is training opens a new one for its next.
        ("grpc.max_connection_idle_ms", 120_000),
    )


class CallLimit(aio.ServerInterceptor):
    """Refuses a call of a peer that has `CALLS_PER_PEER` open, whatever the service."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the method of a call, so that the call is counted while it is open."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = next(name for name in _KINDS if getattr(handler, name) is not None)
        return handler._replace(**{kind: self._counted(getattr(handler, kind))})

    def _counted(self, method: Callable[[Any, Context], Any]) -> Callable[[Any, Context], Any]:
        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            await self._admit(context)
            async with aclosing(method(request, context)) as messages:
                async for message in messages:
                    yield message

        async def single(request: Any, context: Context) -> Any:
            await self._admit(context)
            return await method(request, context)

        return stream if inspect.isasyncgenfunction(method) else single

    async def _admit(self, context: Context) -> None:
        names = context.auth_context().get("x509_subject_alternative_name", ())
        peer = " ".join(name.decode(errors="replace") for name in names) or context.peer()
        if self._open[peer] >= CALLS_PER_PEER:
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
        self._open[peer] += 1

        def left(_context: Context) -> None:
            self._open[peer] -= 1
            if not self._open[peer]:
                del self._open[peer]

        context.add_done_callback(left)  # type: ignore[arg-type]  # the stubs want a class that exists nowhere
