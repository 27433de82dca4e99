"""A client's saved adapter that is damaged, and a client's log that has no warnings of libraries."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import tiny_mechanism
from fedmosaic.client.learner import ModelLearner
from fedmosaic.client.progress import LoggedProgress
from fedmosaic.client.settings import ClientSettings
from fedmosaic.client.state import ClientState
from fedmosaic.privacy.federation.terms import Terms
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import StateError

TERMS = {
    "profile": tiny_mechanism(),
    "adapter": {"rank": 2, "blocks": 2, "protection": "none"},
    "encryption": {"backend": "plain"},
    "allow_plaintext": True,
}


@pytest.fixture
def learner(tiny_folder: Path, tmp_path: Path) -> Callable[[str], ModelLearner]:
    def make(model: str = "small") -> ModelLearner:
        settings: dict[str, Any] = {
            "kit": tmp_path,
            "server": "localhost:1",
            "state_dir": tmp_path / "state",
            "model": {"path": str(tiny_folder / model)},
            "probe": {"path": str(tiny_folder / "small")},
            "data": {"train": tiny_folder / "train-0.jsonl"},
            "training": {"max_length": 16},
        }
        terms = Terms.model_validate(TERMS)
        return ModelLearner(ClientSettings.model_validate(settings), terms, "", LoggedProgress())

    return make


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"[" * 100_000, b"{}"], ids=["0", "ff", "[", "{}"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "sampler.json"])
def test_a_damaged_adapter_is_named_with_its_folder(
    name: str, content: bytes, learner: Callable[[], ModelLearner], tmp_path: Path
) -> None:
    made = learner()
    made.save(tmp_path / "round-0001")
    made.load(tmp_path / "round-0001")
    damaged = tmp_path / "round-0001" / name
    assert damaged.exists()
    damaged.write_bytes(content)
    with pytest.raises(StateError, match=r"round-0001.*delete (it|that file)"):
        made.load(tmp_path / "round-0001")


def test_an_adapter_of_another_model_is_refused(
    learner: Callable[[str], ModelLearner], tmp_path: Path
) -> None:
    learner("large").save(tmp_path / "round-0001")
    with pytest.raises(StateError, match="round-0001: the saved adapter cannot be read"):
        learner("small").load(tmp_path / "round-0001")


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of file sizes")
def test_a_disk_that_takes_no_more_is_named(learner: Callable[[], ModelLearner], tmp_path: Path) -> None:
    import resource

    state = ClientState(tmp_path / "state", "f", "ada")
    made, (soft, hard) = learner(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises((StateError, OSError)) as error:
            state.save_adapter(1, made.save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "state/adapter" in str(error.value)
    state.save_adapter(1, made.save)
    made.load(state.adapter_path(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/upload'"):
            write_atomically(tmp_path / "upload", bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    state.release()


def test_loading_a_model_says_nothing_about_other_people_s_code(learner: Callable[[], ModelLearner]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        learner()
