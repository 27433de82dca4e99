"""Losses and scores in a tracker: below the state directory, and nowhere else."""

import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedmosaic.client import progress as tracking
from fedmosaic.client.progress import Tracker
from fedmosaic.client.settings import ClientSettings
from fedmosaic.protos.errors import ConfigurationError

MODEL = {"path": "m"}
SETTINGS = {"kit": "kit", "server": "here:1", "state_dir": "state", "model": MODEL, "probe": MODEL}


def test_nothing_is_tracked_unless_asked_for(tmp_path: Path) -> None:
    assert ClientSettings.model_validate(SETTINGS).report_to == ()
    tracker = Tracker((), tmp_path)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_not_installed_is_refused_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmosaic.client.settings.find_spec", lambda _: None)
    settings = ClientSettings.model_validate({**SETTINGS, "report_to": ["wandb"]})
    with pytest.raises(
        ConfigurationError, match="'wandb', whose package is not installed: pip install wandb"
    ):
        settings.check_complete()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="fedmosaic[tracking] is not there")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(("tensorboard",), tmp_path)
    tracker.log({"loss": 2.5}, 7)
    tracker.log_scores({"self": 0.75})
    tracker.close()
    found = EventAccumulator(str(tmp_path / "tracking" / "tensorboard"))
    found.Reload()
    values = {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert values == {"loss": [(7, 2.5)], "score/self": [(7, 0.75)]}


def test_no_tracker_follows_its_environment_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLFLOW_TRACKING_URI and WANDB_MODE, set for other work, must not make a private loss a release."""
    monkeypatch.setitem(os.environ, "MLFLOW_TRACKING_URI", "http://shared:5000")
    monkeypatch.setitem(os.environ, "WANDB_MODE", "online")
    told: dict[str, Any] = {}
    run = SimpleNamespace(log=lambda figures, step: told.update(wandb=(figures, step)), finish=lambda: None)
    mlflow = SimpleNamespace(
        set_tracking_uri=lambda uri: told.update(uri=uri),
        start_run=lambda: None,
        end_run=lambda: None,
        log_metrics=lambda figures, step: told.update(mlflow=(figures, step)),
    )
    wandb = SimpleNamespace(init=lambda **how: told.update(how) or run)
    monkeypatch.setattr(tracking, "import_module", {"mlflow": mlflow, "wandb": wandb}.__getitem__)
    tracker = Tracker(("mlflow", "wandb"), tmp_path)
    tracker.log({"loss": 2.0}, 3)
    tracker.close()
    assert told["uri"] == f"sqlite:///{tmp_path}/tracking/mlflow/mlflow.db"
    assert (told["mode"], told["dir"]) == ("offline", str(tmp_path / "tracking" / "wandb"))
    assert told["mlflow"] == told["wandb"] == ({"loss": 2.0}, 3)
