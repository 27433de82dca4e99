"""How far a run in one process is, and how long it will still take."""

import threading
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedmosaic.client import progress
from fedmosaic.experiments.scenario.terms import RunFailedError
from fedmosaic.protos.messages import RoundStatus

_TRAINING = ("training", "private training")
_LINES = 20
_MARKS = 1000


class RunProgress:
    """One bar, or about twenty lines where no bar can be drawn, for the training steps of all clients."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(30),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar.add_task("starting", total=max(1, total_steps))
        (self._all,) = self.bar.tasks
        self._lines = -1
        self._lock = threading.Lock()
        self._start = time.monotonic(), 0  # when so many steps were done
        self._marks = deque([self._start], _MARKS)

    def skip(self, steps: int) -> None:
        """Steps that an earlier process of this run has done; they say nothing about the pace."""
        self.bar.reset(self._all.id, completed=int(self._all.completed) + steps)
        self._start = time.monotonic(), int(self._all.completed)
        self._marks = deque([self._start], _MARKS)

    def add(self, steps: int, client: str, round_number: int) -> None:
        """`steps` more steps are done, by this client."""
        with self._lock:
            done, total = int(self._all.completed) + steps, int(self._all.total or 1)
            text = f"round {round_number}, {client}: {done / total:.0%} of the training"
            if (left := self._seconds_left(done, total)) is not None:
                text += f", about {left / 60:.1f} min left"
            self.bar.update(self._all.id, advance=steps, description=text)
            if not self._console.is_terminal and done * _LINES // total > self._lines:
                self._lines = done * _LINES // total
                self._console.print(text, highlight=False)

    def _seconds_left(self, done: int, total: int) -> float | None:
        """At the pace of the later half of what was done here, or a quarter of the time; None at first.

        The first turns take longer than others, and those of several processes end at once.
        """
        now, (began, skipped) = time.monotonic(), self._start
        if (done - self._marks[-1][1]) * _MARKS >= total:
            self._marks.append((now, done))
        latest, most = now - (now - began) / 4, (skipped + done) / 2
        while len(self._marks) > 1 and self._marks[1][0] <= latest and self._marks[1][1] <= most:
            self._marks.popleft()
        since, before = self._marks[0]
        enough = (done - skipped) * _LINES >= total
        return (total - done) * (now - since) / (done - before) if enough else None


class ClientProgress(progress.Progress):
    """One client's part in it; see `fedmosaic.client.progress.Progress`."""

    def __init__(self, run: RunProgress, client: str, stopped: threading.Event) -> None:
        """Begin; once `stopped` is set, the next step of this client is its last."""
        self._run, self._client, self._stopped = run, client, stopped
        self._round, self._counted, self._trains = 0, 0, False

    def stage(self, round_number: int, name: str, total: int = 0) -> None:
        """A new stage begins; `RunFailedError` if the run was given up."""
        self._check()
        self._round, self._counted, self._trains = round_number, 0, name in _TRAINING

    def advance(self, done: int) -> None:
        """`done` steps of the stage are finished; `RunFailedError` if the run was given up."""
        self._check()
        if self._trains:
            self._run.add(done - self._counted, self._client, self._round)
            self._counted = done

    def waiting(self, status: RoundStatus) -> None:
        """Waiting for the others is the rule here, and nothing to tell."""

    def _check(self) -> None:
        if self._stopped.is_set():
            raise RunFailedError("the run was given up; the first error that was reported tells why")
