"""Work in a process of its own, whose memory is given back, and how a process has ended."""

import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from fedmosaic.experiments.scenario.terms import RunFailedError

T = TypeVar("T")


def in_own_process(what: str, work: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module returns in a fresh process, `what` saying what that does.

    RunFailedError if it ends, or never begins, and gives no answer.
    """
    before = set(active_children())
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        answer = pool.submit(work, *arguments)
        found = set(active_children()) - before
        try:
            return answer.result()
        except BrokenProcessPool:
            pass
    status = next((child.exitcode for child in found), None)
    raise RunFailedError(
        f"the process that {what} gave no answer and {how_it_ended(status)}; if it wrote why, it is above"
    )


def how_it_ended(status: int | None) -> str:
    """What the exit status of a process tells, and no more: negative ones are signals."""
    if status is None or status >= 0:
        return "ended" if status is None else f"ended with status {status}"
    name = signal.Signals(-status).name if -status in set(signal.Signals) else "unknown"
    words = f"was ended by signal {-status} ({name})"
    if name == "SIGKILL":
        words += ", which the system sends, too, when memory runs out: its log (dmesg) tells"
    return words
