"""What is said of a process that ended is what is known, and no guess."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

from fedmosaic.experiments.scenario.children import how_it_ended, in_own_process
from fedmosaic.experiments.scenario.terms import RunFailedError


@pytest.mark.parametrize(
    ("work", "argument", "words"),
    [
        (os._exit, 3, r"that adds gave no answer and ended with status 3; if it wrote why, it is above"),
        (
            signal.raise_signal,
            int(signal.SIGKILL),
            r"was ended by signal 9 \(SIGKILL\), which the system sends",
        ),
        (signal.raise_signal, int(signal.SIGSEGV), r"was ended by signal 11 \(SIGSEGV\); if"),
    ],
)
def test_a_child_without_an_answer_is_told_by_how_it_ended(
    work: Callable[[Any], Any], argument: int, words: str
) -> None:
    with pytest.raises(RunFailedError, match=words) as told:
        in_own_process("adds", work, argument)
    assert ("memory" in str(told.value)) == (argument == signal.SIGKILL)


def test_an_answer_and_an_error_come_as_they_are() -> None:
    assert in_own_process("adds", sum, (1, 2)) == 3
    with pytest.raises(ValueError, match="invalid literal"):
        in_own_process("adds", int, "three")
    assert how_it_ended(-200) == "was ended by signal 200 (unknown)"
