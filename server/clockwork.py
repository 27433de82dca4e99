"""The clockwork of a running server: it closes rounds when it is time, and ends with the run."""

import asyncio
import logging
from typing import Final

from fedmosaic.protos.errors import NOTHING_EXCHANGED, FedMosaicError
from fedmosaic.server.coordinator import Coordinator
from fedmosaic.server.network.waiting import Changes
from fedmosaic.server.storage.store import StoreTakenError

log = logging.getLogger(__name__)
_TICK_SECONDS: Final = 1.0
_RETRY_SECONDS: Final = 5.0
_STATUS_LINE_SECONDS: Final = 30.0
_BREATH_SECONDS: Final = 0.002
"""For each member: those who wait are answered before anything is written about the round."""


class Clockwork:
    """Closes rounds when it is time, says now and then what the server waits for, and ends with the run."""

    def __init__(
        self, coordinator: Coordinator, changes: Changes, over: "asyncio.Future[int] | None"
    ) -> None:
        """Prepare; `over` gets the exit status when nothing is left to serve; None lets the server stay."""
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
                moved = await asyncio.to_thread(self._coordinator.move)
                if moved:
                    await asyncio.sleep(_BREATH_SECONDS * len(self._coordinator.settings.members))
                await asyncio.to_thread(self._coordinator.tidy)
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
