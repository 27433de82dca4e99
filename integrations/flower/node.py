"""The server's end of the pipe to one SuperNode: records in, calls of the federation's service out."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any, Final, NoReturn

import grpc
from google.rpc import status_pb2  # type: ignore[import-untyped]  # googleapis-common-protos has no stubs

from fedmosaic.integrations.flower.secured import Kind, Secured
from fedmosaic.protos.errors import WireError
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.server.network.peers import Gate
from fedmosaic.server.network.service import FederationService

log = logging.getLogger(__name__)
_HELLO: Final = b"\x16"
"""Type of the record that begins a session: the only one of a client that is not encrypted (RFC 8446, §5)."""


async def methods_of(service: FederationService) -> Mapping[str, Any]:
    """The service's handlers by path, behind its gate, which makes every call a stream of requests."""
    found: dict[str, Any] = {}
    server: Any = SimpleNamespace(
        add_generic_rpc_handlers=lambda _: None,
        add_registered_method_handlers=lambda name, handlers: found.update(
            {f"/{name}/{method}": handler for method, handler in handlers.items()}
        ),
    )
    rpc.add_FederationServicer_to_server(service, server)
    gate: Any = Gate(service.audit)

    async def handler_of(path: str) -> Any:
        return found[path]

    return {path: await gate.intercept_service(handler_of, path) for path in found}


class _EndedError(Exception):
    def __init__(self, status: Any) -> None:
        self.status = status


class _Context:
    """What the service uses of `grpc.aio.ServicerContext`."""

    def __init__(self, auth: Mapping[str, list[bytes]], peer: str) -> None:
        self.auth_context, self.peer = lambda: auth, lambda: peer
        self.callbacks: list[Any] = []
        self.add_done_callback = self.callbacks.append

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        raise _EndedError(status_pb2.Status(code=code.value[0], message=details))

    async def abort_with_status(self, status: Any) -> NoReturn:
        details = dict(status.trailing_metadata)["grpc-status-details-bin"]
        raise _EndedError(status_pb2.Status.FromString(details))


class Node:
    """One SuperNode. It carries one session at a time, and a session one call at a time."""

    def __init__(self, context: ssl.SSLContext, methods: Mapping[str, Any], name: str, member: str) -> None:
        """`member` is the SPIFFE URI of the only one whose calls it may carry; empty: any member's."""
        self._tls, self._methods, self._name, self._member = context, methods, name, member
        self._secured = Secured(context)
        self._requests: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._call: asyncio.Task[None] | None = None

    async def answer(self, records: bytes) -> bytes:
        """What to say next, once there is something or the call needs more; empty asks for the next call."""
        if records[:1] == _HELLO:
            await self.close()
        try:
            for kind, payload in self._secured.receive(records) if records else ():
                self._take(kind, payload)
        except (ssl.SSLError, WireError) as error:
            log.warning("SuperNode %s: the session ends: %s", self._name, error)
            farewell = self._secured.take()
            await self.close()
            return farewell
        if self._call is not None:
            all_read = asyncio.ensure_future(self._requests.join())
            await asyncio.wait({self._call, all_read}, return_when=asyncio.FIRST_COMPLETED)
            all_read.cancel()
        return self._secured.take()

    async def close(self) -> None:
        """End the session, and the call in it."""
        if self._call is not None:
            self._call.cancel()
            await asyncio.wait({self._call})
            self._requests.put_nowait(None)  # ends a read that the call had begun
        self._call, self._secured = None, Secured(self._tls)

    def _take(self, kind: Kind, payload: bytes) -> None:
        running = self._call is not None and not self._call.done()
        if kind is Kind.CALL and not running:
            self._requests = asyncio.Queue()
            self._call = asyncio.create_task(self._run(payload.decode(errors="replace")))
        elif kind in (Kind.CALL, Kind.STATUS):
            raise WireError(f"a frame {kind.name} in the middle of a call")
        elif running:  # else it is the rest of a call that has been answered
            self._requests.put_nowait(payload if kind is Kind.MESSAGE else None)

    async def _messages(self) -> AsyncIterator[bytes]:
        """What the caller sends; a message counts as read when the next one is wanted."""
        while (request := await self._requests.get()) is not None:
            yield request
            self._requests.task_done()

    async def _run(self, path: str) -> None:
        secured, status = self._secured, status_pb2.Status()
        context: Any = _Context(secured.peer(), f"SuperNode {self._name}")
        try:
            names = context.auth_context()["x509_subject_alternative_name"]
            if self._member and names != [self._member.encode()]:
                log.warning("SuperNode %s brought a call of %s, expected %s", self._name, names, self._member)
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this SuperNode is another member's")
            if path not in self._methods:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no such method")
            handler, requests = self._methods[path], self._messages()
            if handler.response_streaming:
                async for message in handler.stream_stream(requests, context):
                    secured.send(Kind.MESSAGE, handler.response_serializer(message))
            else:
                message = await handler.stream_unary(requests, context)
                secured.send(Kind.MESSAGE, handler.response_serializer(message))
        except _EndedError as ended:
            status = ended.status
        finally:
            for callback in context.callbacks:
                callback(context)
        secured.send(Kind.STATUS, status.SerializeToString())
