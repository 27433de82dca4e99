"""Run the server: TLS, health, the clockwork that closes rounds, and a graceful end."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import grpc
from cryptography.hazmat.primitives import serialization
from grpc import aio
from grpc_health.v1 import (  # type: ignore[import-untyped]  # its stubs are a package of their own
    health,
    health_pb2,
    health_pb2_grpc,
)

from fedmosaic.privacy.federation.identity import check_pair, read_certificate
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import NOTHING_EXCHANGED, ConfigurationError, FedMosaicError
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.network.limits import CallLimit, channel_options
from fedmosaic.server.network.service import FederationService
from fedmosaic.server.network.waiting import Changes
from fedmosaic.server.settings import ServerSettings, TlsFiles
from fedmosaic.server.storage.store import StoreTakenError

log = logging.getLogger(__name__)
T = TypeVar("T")
SERVICE: Final = pb.DESCRIPTOR.services_by_name["Federation"].full_name
_TICK_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 5.0
_GRACE_SECONDS: Final = 5.0
_STATUS_LINE_SECONDS: Final = 30.0
_BIND_PROBLEMS: Final = {
    errno.EADDRINUSE: "another program uses the port; stop it, or set another port in server.toml",
    errno.EADDRNOTAVAIL: "the address is not this machine's; set one of its own in server.toml, or 0.0.0.0",
    errno.EACCES: "ports below 1024 are the administrator's; set another port in server.toml",
}
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", bounds.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", bounds.MAX_MESSAGE_BYTES),
    # Two servers on one port would share the connections between them.
    ("grpc.so_reuseport", 0),
    # A client that vanished without a word is noticed within a minute.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
)


@asynccontextmanager
async def running(settings: ServerSettings, over: "asyncio.Future[int] | None" = None) -> AsyncIterator[int]:
    """Serve while the context is open.

    Args:
        settings: of the run; `tls` must be given.
        over: gets the exit status when there is nothing left to serve: the run is over, or the database
            belongs to another server now.

    Yields:
        The port that is listened on.

    Raises:
        ConfigurationError: no TLS files, or the address cannot be listened on.
        IdentityError: a certificate or the key is missing or damaged, or they are no pair.
        StateError: the state is in use or of another run.
    """
    if settings.tls is None:
        raise ConfigurationError("the server needs tls.certificate, tls.private_key and tls.authority")
    credentials = _credentials(settings.tls)
    coordinator = await asyncio.to_thread(Coordinator, settings)
    changes = Changes()
    coordinator.subscribe(changes.notify)
    options = (*_OPTIONS, *channel_options(len(settings.members)))
    server = aio.server(interceptors=(CallLimit(),), options=options)
    checks = health.aio.HealthServicer()
    rpc.add_FederationServicer_to_server(FederationService(coordinator, changes), server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    try:
        port = server.add_secure_port(settings.listen, credentials)
    except RuntimeError:
        await asyncio.to_thread(coordinator.close)
        raise ConfigurationError(f"cannot listen on {settings.listen}: {_why_not(settings.listen)}") from None
    await server.start()
    for name in ("", SERVICE):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    log.info("listening on %s, port %d", settings.listen, port)
    if len(settings.members) == settings.minimum_epoch_members:
        log.warning(
            "%d members are as few as the policy needs: while one is away, nobody receives anything",
            len(settings.members),
        )
    clockwork = asyncio.create_task(_Clockwork(coordinator, changes, over).run())
    try:
        yield port
    finally:
        await checks.enter_graceful_shutdown()
        changes.stop()
        await clockwork
        await server.stop(_GRACE_SECONDS)
        await asyncio.to_thread(coordinator.close)
        if coordinator.available_round <= settings.rounds:
            log.info("stopped; the run goes on when the server starts again with the same state_dir")
        else:
            log.info("stopped; all rounds are over")


async def serve(settings: ServerSettings, ready: Callable[[int], None] | None = None) -> int:
    """Serve until the run is over and all have reported, or until SIGTERM or SIGINT.

    Args:
        settings: of the run.
        ready: called with the port once clients can connect.

    Returns:
        Exit status: 0, or `NOTHING_EXCHANGED`.

    Raises:
        ConfigurationError, StateError: as `running`; StateError too when another server takes the database.
    """
    loop = asyncio.get_running_loop()
    over: asyncio.Future[int] = loop.create_future()

    def stop() -> None:
        if not over.done():
            log.info("stopping")
            over.set_result(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    # A terminal that closes, or a rotation of logs that means well, is no reason to stop.
    loop.add_signal_handler(signal.SIGHUP, log.info, "SIGHUP is ignored; configuration is read at the start")
    async with running(settings, over) as port:
        if ready is not None:
            ready(port)
        return await over


def _why_not(listen: str) -> str:
    """Why an address cannot be listened on, which gRPC does not tell."""
    name, _, port = listen.rpartition(":")
    try:
        found = socket.getaddrinfo(name.strip("[]"), int(port), type=socket.SOCK_STREAM)
        with socket.socket(*found[0][:3]) as attempt:
            attempt.bind(found[0][4])
    except socket.gaierror:
        return "no machine has this name; give an address of this machine, or 0.0.0.0 for all of them"
    except OSError as error:
        return _BIND_PROBLEMS.get(error.errno or 0, str(error.strerror))
    return "the port was taken a moment ago; start again"


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    certificate, key = check_pair(tls.certificate, tls.private_key)
    authority = read_certificate(tls.authority).public_bytes(serialization.Encoding.PEM)
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)


class _Clockwork:
    """Closes rounds when it is time, says now and then what the server waits for, and ends with the run."""

    def __init__(
        self, coordinator: Coordinator, changes: Changes, over: "asyncio.Future[int] | None"
    ) -> None:
        self._coordinator = coordinator
        self._changes = changes
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._last_line = self._loop.time()
        self._finished: float | None = None
        self._silent: tuple[str, ...] | None = None

    async def run(self) -> None:
        """Work until the server stops."""
        while not self._changes.stopping:
            seen = self._changes.work
            try:
                moved = await asyncio.to_thread(self._coordinator.advance)
                silent = await asyncio.to_thread(self._coordinator.silent_members)
            except StoreTakenError as error:
                self._end(error)
                return
            except Exception as error:
                expected = isinstance(error, FedMosaicError | OSError)
                text = "the round could not be closed, trying again in %.0f s: %s"
                log.error(text, _RETRY_SECONDS, error, exc_info=not expected)
                await self._changes.until("round", lambda: False, _RETRY_SECONDS)
                continue
            if silent is not None and self._over is not None and await self._is_over(silent):
                return
            if moved:
                self._last_line = self._loop.time()
                continue
            if silent is None and self._loop.time() - self._last_line >= _STATUS_LINE_SECONDS:
                self._last_line = self._loop.time()
                log.info("%s", self._coordinator.state_line())
            await self._changes.next_work(seen, _TICK_SECONDS)

    async def _is_over(self, silent: tuple[str, ...]) -> bool:
        """All rounds are: whether all have reported too, or have had the time for it."""
        now = self._loop.time()
        self._finished = now if self._finished is None else self._finished
        left = self._finished + self._coordinator.settings.grace_seconds - now
        if silent and left > 0.0:
            if silent != self._silent:
                log.info(
                    "all rounds are over; waiting for the statements of %s, %.0f s left",
                    ", ".join(silent),
                    left,
                )
            self._silent = silent
            return False
        lines, exchanged = await asyncio.to_thread(self._coordinator.last_words)
        for line in lines[:1]:
            log.info("%s", line)
        for line in lines[1:]:
            log.error("%s", line)
        self._end(0 if exchanged else NOTHING_EXCHANGED)
        return True

    def _end(self, how: int | Exception) -> None:
        if self._over is None or self._over.done():
            return
        if isinstance(how, Exception):
            self._over.set_exception(how)
        else:
            self._over.set_result(how)
