"""How far a run in one process is, and how long it will still take."""

import threading

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedmosaic.client import progress
from fedmosaic.experiments.scenario.terms import RunFailedError
from fedmosaic.protos.messages import RoundStatus

_TRAINING = ("training", "private training")
_LINES = 20


class RunProgress:
    """One bar, or about twenty lines where no bar can be drawn, for the training steps of all clients."""

    def __init__(self, console: Console, total_steps: int) -> None:
        self._console = console
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(30),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.bar.add_task("starting", total=max(1, total_steps))
        (self._all,) = self.bar.tasks
        self._lines = -1

    def skip(self, steps: int) -> None:
        """Steps that an earlier process of this run has done; they say nothing about the pace."""
        self.bar.reset(self._all.id, completed=int(self._all.completed) + steps)

    def add(self, steps: int, client: str, round_number: int) -> None:
        """`steps` more steps are done, by this client."""
        share = (self._all.completed + steps) / (self._all.total or 1.0)
        text = f"round {round_number}, {client}: {share:.0%} of the training"
        self.bar.update(self._all.id, advance=steps, description=text)
        if not self._console.is_terminal and int(share * _LINES) > self._lines:
            self._lines = int(share * _LINES)
            left = self._all.time_remaining
            estimate = "" if left is None else f", about {left / 60:.1f} min left"
            self._console.print(f"{text}{estimate}", highlight=False)


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
