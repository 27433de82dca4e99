"""Where a client tells a person, the process that started it, or a tracker, how far it is.

Losses and scores are functions of private examples and no ledger charges them. So each tracker (TensorBoard,
MLflow, Weights & Biases) writes below the state directory and nowhere else, whatever server its own
environment variables name.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from fedmosaic.privacy.files import private_opener
from fedmosaic.protos.messages import RoundStatus

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_WAIT_LINES = 15.0
_SECONDS_BETWEEN_RECORDS = 0.2


class Progress:
    """What a session and a learner report, nothing private; this one tells nobody."""

    def stage(self, round_number: int, name: str, total: int = 0) -> None:
        """A new stage begins; `total` steps are expected, 0 if unknown."""

    def advance(self, done: int) -> None:
        """`done` steps of the current stage are finished."""

    def waiting(self, status: RoundStatus) -> None:
        """The server is waited for; `status` says for whom, and how long at most."""


class LoggedProgress(Progress):
    """Writes log lines for a person and, if a file is given, JSON lines for whoever follows it."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._current: dict[str, object] = {}
        self._last_record = 0.0
        self._last_wait_line = 0.0

    def stage(self, round_number: int, name: str, total: int = 0) -> None:
        """See `Progress.stage`."""
        log.info("round %d: %s", round_number, name) if round_number else log.info("%s", name)
        self._current = {"round": round_number, "stage": name, "done": 0, "total": total}
        self._record(force=True)

    def advance(self, done: int) -> None:
        """See `Progress.advance`."""
        self._current["done"] = done
        self._record(force=done == self._current.get("total"))

    def waiting(self, status: RoundStatus) -> None:
        """See `Progress.waiting`."""
        self._current["waiting_for"] = list(status.waiting_for)
        self._record(force=False)
        now = time.monotonic()
        if now - self._last_wait_line >= _SECONDS_BETWEEN_WAIT_LINES:
            self._last_wait_line = now
            # The server's words name the round themselves.
            log.info("%s", status.message)

    def _record(self, *, force: bool) -> None:
        now = time.monotonic()
        if self._file is None or not (force or now - self._last_record >= _SECONDS_BETWEEN_RECORDS):
            return
        self._last_record = now
        with open(self._file, "a", encoding="utf-8", opener=private_opener) as file:
            file.write(json.dumps({"time": time.time(), **self._current}) + "\n")


_Log = Callable[[Mapping[str, float], int], object]
FOLDER: Final = "tracking"


class Tracker:
    """Writes figures to every tracker that `report_to` names; to none where it is empty."""

    def __init__(self, names: Sequence[str], state_dir: Path) -> None:
        """Open the trackers, whose packages `ClientSettings.check_complete` has looked for."""
        open_ = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb}
        self._open = [open_[name](state_dir / FOLDER / name) for name in names]
        self._step = 0

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write figures by name, at a number of optimizer steps since the first round."""
        self._step = step
        for log, _ in self._open:
            log(figures, step)

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Write the shares of right answers by test set, at the last step."""
        self.log({f"score/{name}": value for name, value in scores.items()}, self._step)

    def close(self) -> None:
        """Write what is left to write."""
        for _, close in self._open:
            close()


def _tensorboard(place: Path) -> tuple[_Log, Callable[[], object]]:
    writer: Any = import_module("torch.utils.tensorboard").SummaryWriter(str(place))

    def log(figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _mlflow(place: Path) -> tuple[_Log, Callable[[], object]]:
    mlflow: Any = import_module("mlflow")
    place.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{place.resolve() / 'mlflow.db'}")
    mlflow.start_run()
    return lambda figures, step: mlflow.log_metrics(dict(figures), step=step), mlflow.end_run


def _wandb(place: Path) -> tuple[_Log, Callable[[], object]]:
    place.mkdir(parents=True, exist_ok=True)
    run: Any = import_module("wandb").init(project="fedmosaic", dir=str(place), mode="offline")
    return lambda figures, step: run.log(dict(figures), step=step), run.finish
