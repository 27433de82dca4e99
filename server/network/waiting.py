"""Waiting without threads: coroutines sleep until the coordinator says that something changed."""

import asyncio
import time
from collections.abc import Callable
from typing import get_args

from fedmosaic.server.run import Topic


class Changes:
    """Wakes coroutines of one event loop from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: dict[Topic, asyncio.Event] = {topic: asyncio.Event() for topic in get_args(Topic)}
        self._work_event = asyncio.Event()
        self.work = 0
        """How many uploads and key messages were stored: what may let a round close."""
        self.stopping = False

    def notify(self, topic: Topic) -> None:
        """Wake everybody who waits for `topic`; callable from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake, topic)

    def _wake(self, topic: Topic) -> None:
        event, self._events[topic] = self._events[topic], asyncio.Event()
        event.set()
        if topic != "round":
            self.work += 1
            self._work_event.set()
            self._work_event = asyncio.Event()

    def stop(self) -> None:
        """Wake everybody, and let nobody wait any more."""
        self.stopping = True
        for topic in tuple(self._events):
            self._wake(topic)

    async def until(self, topic: Topic, ready: Callable[[], bool], seconds: float) -> None:
        """Return once `ready()` holds, asked at every change, after `seconds`, or when the server stops."""
        deadline = time.monotonic() + seconds
        while not self.stopping:
            event = self._events[topic]
            left = deadline - time.monotonic()
            if ready() or left <= 0.0 or not await _wait(event, left):
                return

    async def next_work(self, seen: int, seconds: float) -> None:
        """Return once `work` is above `seen`, after `seconds`, or when the server stops."""
        event = self._work_event
        if self.work == seen and not self.stopping:
            await _wait(event, seconds)


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    # Not `wait_for`: before Python 3.12 it can swallow a cancellation that comes with the event.
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True
