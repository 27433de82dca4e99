"""Waiting for what must have happened before a test goes on."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], words: Callable[[], object] = str) -> None:
    """Return as soon as the condition holds; a machine is never so slow that it takes two minutes."""
    deadline = time.monotonic() + 120.0
    while not condition():
        assert time.monotonic() < deadline, words()
        time.sleep(0.02)
