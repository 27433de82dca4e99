"""Losses and scores in a tracker of the client's own people: TensorBoard, MLflow or Weights & Biases.

These figures are functions of private examples and no ledger charges them. So each tracker writes below the
state directory and nowhere else, whatever server its own environment variables name.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

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
