"""Waiting for what must have happened before a test goes on, and for what happens at once."""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def wait_until(condition: Callable[[], object], words: Callable[[], object] = str) -> None:
    """Return as soon as the condition holds; a machine is never so slow that it takes two minutes."""
    deadline = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < deadline, words()
        time.sleep(0.02)


def at_once(work: Callable[[Any], Any], arguments: Iterable[Any]) -> list[Any]:
    """What a function returns of each argument, each in a thread of its own; raises what one has raised."""
    given = list(arguments)
    with ThreadPoolExecutor(len(given)) as pool:
        return list(pool.map(work, given))
