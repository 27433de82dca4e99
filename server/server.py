"""A server of a federation, put together and run: settings, coordinator, network and clockwork."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmosaic.protos.errors import ConfigurationError
from fedmosaic.server.settings import ServerSettings, settings_from_kit

if TYPE_CHECKING:
    from fedmosaic.server.network.service import FederationService

log = logging.getLogger(__name__)
_THREADS = 32


class Server:
    """The server of one federation.

    `Server("federation/server").serve()` is what `fedmosaic server --kit federation/server` does.
    """

    def __init__(self, source: str | Path | ServerSettings) -> None:
        """Read what the server has to know, from its kit or complete settings; nothing is opened yet.

        Raises:
            ConfigurationError: the kit's `server.toml` or roster is not valid.
            IdentityError: the roster is not signed by the pinned consortium key.
        """
        self._kit = None if isinstance(source, ServerSettings) else Path(source)
        self.settings = source if isinstance(source, ServerSettings) else settings_from_kit(Path(source))

    def serve(self) -> int:
        """Serve until the run is over and all have reported, or until SIGTERM or SIGINT.

        Takes over these signals, so it belongs in the main thread; elsewhere use `background`. Returns 0, or
        3 (`NOTHING_EXCHANGED`) when the run is over and nothing was exchanged. Raises as `running`, and
        StateError when another server takes the database over.
        """
        return asyncio.run(self._until_over())

    async def _until_over(self) -> int:
        loop = asyncio.get_running_loop()
        over: asyncio.Future[int] = loop.create_future()

        def stop() -> None:
            if not over.done():
                log.info("stopping")
                over.set_result(0)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        # A terminal that closes, or a rotation of logs that means well, is no reason to stop.
        text = (
            "SIGHUP is ignored; certificates and the roster are read when they change, all else at the start"
        )
        loop.add_signal_handler(signal.SIGHUP, log.info, text)
        async with self.running(over):
            # Answers make many objects and no cycles: the collector would look through all others for them.
            gc.freeze()
            gc.set_threshold(20_000)
            return await over

    @asynccontextmanager
    async def running(
        self,
        over: "asyncio.Future[int] | None" = None,
        beside: "Callable[[FederationService], AbstractAsyncContextManager[object]] | None" = None,
    ) -> AsyncIterator[int]:
        """Serve while the context is open.

        Args:
            over: gets the exit status when there is nothing left to serve: the run is over, or the database
                belongs to another server now.
            beside: brings calls another way than through the port, while its context is open.

        Yields:
            The port that is listened on.

        Raises:
            ConfigurationError: no TLS files, or the address cannot be listened on.
            IdentityError: a certificate or the key is missing or damaged, or they are no pair.
            StateError: the state is in use or of another run.
        """
        # Read by gRPC when it is first imported, hence the imports below. TLS 1.3 suites are not chosen by
        # this list; for TLS 1.2 it leaves only one that a P-256 certificate cannot serve, so that nobody
        # falls back.
        os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
        # Below an error, gRPC's lines quote what a peer says in parting, signs that command a terminal too.
        os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
        from fedmosaic.server.clockwork import Clockwork
        from fedmosaic.server.coordinator import Coordinator
        from fedmosaic.server.network.review import WitnessService
        from fedmosaic.server.network.service import FederationService
        from fedmosaic.server.network.serving import Listener, server_credentials
        from fedmosaic.server.network.waiting import Changes
        from fedmosaic.server.renewal import Renewal

        settings = self.settings
        if settings.tls is None:
            raise ConfigurationError("the server needs tls.certificate, tls.private_key and tls.authority")
        credentials = server_credentials(settings.tls)
        # Uploads that come together wait for the disk together, each in a thread.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, "fedmosaic-work"))
        coordinator = await asyncio.to_thread(Coordinator, settings)
        async with AsyncExitStack() as ending:  # from the last line to the first
            ending.push_async_exit(lambda *how: asyncio.to_thread(coordinator.__exit__, *how))
            changes = Changes()
            coordinator.subscribe(changes.notify)
            service = FederationService(coordinator, changes)
            review = WitnessService(service, coordinator, changes)
            renewal = Renewal(coordinator, self._kit)
            listener = Listener(service, review, settings.listen, credentials, len(settings.members))
            await listener.open()
            ending.push_async_callback(listener.close)
            self._say_hello(listener.port)
            beat = asyncio.create_task(Clockwork(coordinator, changes, over).run())
            ending.push_async_callback(lambda: beat)
            ending.callback(changes.stop)  # without which the beat goes on until the run is over
            looking = asyncio.create_task(renewal.run())
            ending.callback(looking.cancel)
            ending.push_async_callback(listener.take_leave)
            if beside is not None:
                await ending.enter_async_context(beside(service))
            yield listener.port
        if coordinator.available_round <= settings.terms.schedule.rounds:
            log.info("stopped; the run goes on when the server starts again with the same state_dir")
        else:
            log.info("stopped; all rounds are over")

    def _say_hello(self, port: int) -> None:
        settings = self.settings
        log.info("listening on %s, port %d", settings.listen, port)
        if len(settings.members) == settings.minimum_epoch_members:
            log.warning(
                "%d members are as few as the policy needs: while one is away, nobody receives anything",
                len(settings.members),
            )

    @contextmanager
    def background(self) -> Iterator[int]:
        """Serve on the port that is yielded, in a thread, for notebooks, simulations and tests.

        The server stays after the last round, until the context is left. Raises as `running`.
        """
        started: Future[tuple[int, Callable[[], object]]] = Future()

        async def main() -> None:
            loop, told = asyncio.get_running_loop(), asyncio.Event()
            async with self.running() as port:
                started.set_result((port, lambda: loop.call_soon_threadsafe(told.set)))
                await told.wait()

        with ThreadPoolExecutor(1, "fedmosaic-server") as pool:
            work = pool.submit(lambda: asyncio.run(main()))
            either: tuple[Future[Any], ...] = (started, work)
            wait(either, return_when=FIRST_COMPLETED)
            if work.done():
                work.result()
            port, stop = started.result()
            try:
                yield port
            finally:
                stop()
                work.result()
