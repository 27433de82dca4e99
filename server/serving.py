"""Run the server: TLS, health, the clockwork that closes rounds, and a graceful end."""

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from grpc import aio
from grpc_health.v1 import (  # type: ignore[import-untyped]  # its stubs are a package of their own
    health,
    health_pb2,
    health_pb2_grpc,
)

from fedmosaic.privacy.identity import read_private
from fedmosaic.protos import bounds
from fedmosaic.protos.errors import NOTHING_EXCHANGED, ConfigurationError, FedMosaicError
from fedmosaic.protos.v1 import federation_pb2 as pb
from fedmosaic.protos.v1 import federation_pb2_grpc as rpc
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.service import FederationService
from fedmosaic.server.settings import ServerSettings, TlsFiles
from fedmosaic.server.store import StoreTakenError
from fedmosaic.server.waiting import Changes

log = logging.getLogger(__name__)
T = TypeVar("T")
SERVICE: Final = pb.DESCRIPTOR.services_by_name["Federation"].full_name
_TICK_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 5.0
_GRACE_SECONDS: Final = 5.0
_STATUS_LINE_SECONDS: Final = 30.0
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
        StateError: the state is in use or of another run.
    """
    if settings.tls is None:
        raise ConfigurationError("the server needs tls.certificate, tls.private_key and tls.authority")
    credentials = _credentials(settings.tls)
    coordinator = await asyncio.to_thread(Coordinator, settings)
    changes = Changes()
    coordinator.subscribe(changes.notify)
    server = aio.server(options=_OPTIONS)
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


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    try:
        certificate, authority = tls.certificate.read_bytes(), tls.authority.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename}: cannot read this certificate: {error.strerror}"
        ) from None
    key = read_private(tls.private_key)
    # What gRPC is given here it judges later, and says only that the port cannot be opened.
    own = _parsed(x509.load_pem_x509_certificate, certificate, tls.certificate, "certificate")
    _parsed(x509.load_pem_x509_certificate, authority, tls.authority, "certificate")
    private = _parsed(
        lambda pem: serialization.load_pem_private_key(pem, None), key, tls.private_key, "private key"
    )
    if private.public_key() != own.public_key():
        raise ConfigurationError(
            f"{tls.private_key} is not the key of {tls.certificate}; take both from one kit"
        )
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)


def _parsed(parse: Callable[[bytes], T], pem: bytes, path: Path, what: str) -> T:
    try:
        return parse(pem)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise ConfigurationError(
            f"{path} holds no {what} in PEM; take the newest kit that the consortium handed out"
        ) from None


def _why_not(listen: str) -> str:
    """What the operating system says about an address that cannot be listened on."""
    host, _, port = listen.rpartition(":")
    try:
        for family, kind, _, _, address in socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind) as probe:
                probe.bind(address)
    except (OSError, ValueError, OverflowError) as error:
        number, text = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
        why = "another program uses the port" if number == errno.EADDRINUSE else text
        return f"{why}; change `listen` in the server's configuration"
    return "the address was refused; change `listen` in the server's configuration"


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
