"""What a run says about the time that is left, on a clock of the test's."""

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from fedmosaic.experiments.simulation import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def _told(console: Console) -> list[tuple[int, float | None]]:
    """Per cent and minutes left of every line."""
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # a StringIO
    found = [re.search(r"(\d+)% of the training(?:, about ([\d.]+) min left)?$", line) for line in lines]
    return [(int(m[1]), float(m[2]) if m[2] else None) for m in found if m]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_time_left_is_right_within_a_third_though_the_first_round_is_slow_and_turns_are_unlike(
    clock: Callable[[float], None], processes: int
) -> None:
    console = Console(file=io.StringIO(), width=200)
    run = progress.RunProgress(console, 12 * 4 * 10)
    # Turns of minutes, each told at its end, as those on a cluster are; with two processes in pairs.
    turns = [
        seconds * (3 if number == 1 else 1) if index % processes == processes - 1 else 0
        for number in range(1, 13)
        for index, seconds in enumerate((40, 40, 90, 200))
    ]
    lines = 0
    for index, seconds in enumerate(turns):
        clock(seconds)
        run.add(10, f"client-{index % 4}", 1 + index // 4)
        (share, estimate), left = _told(console)[-1], sum(turns[index + 1 :]) / 60
        if len(_told(console)) > lines and 30 <= share <= 70:
            assert estimate == pytest.approx(left, rel=0.3), share
        assert estimate != 0.0 or not left, share
        lines = len(_told(console))
    assert lines == 21
    assert _told(console)[-1] == (100, 0.0)


def test_steps_of_an_earlier_process_say_nothing_about_the_pace_and_few_steps_give_no_estimate(
    clock: Callable[[float], None],
) -> None:
    console = Console(file=io.StringIO(), width=200)
    run = progress.RunProgress(console, 1000)
    run.skip(500)
    clock(60.0)
    run.add(0, "ada", 2)
    run.add(10, "ada", 2)
    clock(240.0)
    run.add(40, "ada", 2)
    clock(300.0)
    run.add(50, "ada", 3)
    assert _told(console) == [(50, None), (55, 45.0), (60, 40.0)]
