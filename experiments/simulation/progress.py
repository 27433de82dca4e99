"""How far a run in one process is, and how long it will still take."""

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedmosaic.client import progress
from fedmosaic.experiments.scenario.processes import RunFailedError
from fedmosaic.protos.messages import RoundStatus

_TRAINING = ("training", "private training")
_LINES = 20


class RunProgress:
    """One bar, or about twenty lines where no bar can be drawn, for the training of all clients."""

    def __init__(
        self, console: Console, total_steps: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin to count.

        Args:
            console: where it is shown.
            total_steps: optimizer steps of all clients in all rounds, at least 1.
            clock: seconds, monotonic.
        """
        self._console = console
        self._total = max(1, total_steps)
        self._clock = clock
        self._started: float | None = None
        self._done = 0
        self._skipped = 0
        self._uncounted = 0
        self._shown = -1
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(30), TimeElapsedColumn(), console=console,
            disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=self._total)

    def __enter__(self) -> "RunProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def skip(self, steps: int) -> None:
        """Steps that an earlier process of this run has done."""
        self._skipped += steps

    def add(self, steps: int, client: str, round_number: int) -> None:
        """`steps` more steps are done, by this client."""
        if self._started is None:
            # From the first step on: what came before it, loading and scoring, says nothing about the pace.
            self._started, self._uncounted = self._clock(), steps
        self._done += steps
        done = min(self._total, self._done + self._skipped)
        text = f"round {round_number}, {client}: {done / self._total:.0%} of the training, {self.left()} left"
        self._bar.update(self._task, completed=done, description=text)
        if not self._console.is_terminal and done * _LINES // self._total > self._shown:
            self._shown = done * _LINES // self._total
            self._console.print(text, highlight=False)

    def seconds_left(self) -> float | None:
        """Estimate from the pace since the first step; None before there is one."""
        counted = self._done - self._uncounted
        if self._started is None or not counted:
            return None
        remaining = max(0, self._total - self._done - self._skipped)
        return (self._clock() - self._started) * remaining / counted

    def left(self) -> str:
        """The estimate in words."""
        seconds = self.seconds_left()
        if seconds is None:
            return "unknown time"
        return f"about {seconds:.0f} s" if seconds < 90 else f"about {seconds / 60:.0f} min"


class ClientProgress(progress.Progress):
    """One client's part in it; see `fedmosaic.client.progress.Progress`."""

    def __init__(self, run: RunProgress, client: str, stopped: threading.Event) -> None:
        """Begin.

        Args:
            run: the whole.
            client: whose part this is.
            stopped: once it is set, the next step of this client is its last.
        """
        self._run, self._client, self._stopped = run, client, stopped
        self._round, self._counted, self._trains = 0, 0, False

    def stage(self, round_number: int, name: str, total: int = 0) -> None:
        """A new stage begins.

        Raises:
            RunFailedError: the run was given up.
        """
        self._check()
        self._round, self._counted, self._trains = round_number, 0, name in _TRAINING

    def advance(self, done: int) -> None:
        """`done` steps of the stage are finished.

        Raises:
            RunFailedError: the run was given up.
        """
        self._check()
        if self._trains:
            self._run.add(done - self._counted, self._client, self._round)
            self._counted = done

    def waiting(self, status: RoundStatus) -> None:
        """Waiting for the others is the rule here, and nothing to tell."""

    def _check(self) -> None:
        if self._stopped.is_set():
            raise RunFailedError("the run was given up; the first error that was reported tells why")
