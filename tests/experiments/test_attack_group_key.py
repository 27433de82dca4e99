"""One member's key and the server's stored uploads: every upload is read, of a stand-in and of a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedmosaic.experiments.attack_group_key import group_key_results, open_upload
from fedmosaic.experiments.attack_report import markdown
from fedmosaic.experiments.attack_target import Target, read_target
from fedmosaic.experiments.runner import run_here
from fedmosaic.privacy.attacks.results import AttackReport
from fedmosaic.privacy.encryption.ciphers import create_cipher, generate_group_secret
from fedmosaic.privacy.encryption.parameters import CkksParameters, MaskParameters
from fedmosaic.privacy.encryption.records import RoundContext
from fedmosaic.privacy.group_key import GroupKey, commitment_to
from fedmosaic.privacy.policy import AggregationPolicy
from fedmosaic.protos.errors import FedMosaicError


@pytest.fixture(scope="module")
def run_directory(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole encrypted federation, run in this process."""
    from fedmosaic.experiments.scenario import Scenario

    content: dict[str, Any] = {
        "name": "tiny",
        "probe": {"path": "small"},
        "profile": {
            "public_data": "public.jsonl", "dimensions": 4, "left": 2, "noise_multiplier": 1.0,
            "max_length": 16,
        },
        "adapter": {"rank": 2, "blocks": 2, "protection": "encrypted"},
        "encryption": {"backend": "ckks"},
        "policy": {"minimum_contributors": 3, "weight_cap": 0.5},
        "schedule": {"rounds": 2, "quorum": 4},
        "score": "nothing",
        "training": {"steps": 2, "per_device_train_batch_size": 4, "max_length": 16},
        "clients": [
            {
                "id": f"client-{n}",
                "task": f"task-{n}",
                "model": {"path": "small"},
                "train": f"train-{n}.jsonl",
                "test": f"test-{n}.jsonl",
            }
            for n in range(4)
        ],
    }  # fmt: skip
    scenario = Scenario.model_validate(content).resolved(tiny_folder)
    return run_here(scenario, tiny_folder, tmp_path_factory.mktemp("runs"), Console(quiet=True))


def test_the_key_of_one_member_opens_every_other_upload_of_a_run_and_of_both_back_ends(
    run_directory: Path,
) -> None:
    (result,) = group_key_results(read_target(run_directory))
    own, ckks, mask = result.figures
    assert own.name.startswith(
        "server and 1 member that gives it the group key: this run's own uploads, ckks"
    )
    assert "3 uploads read" in own.name
    assert "ckks" in ckks.name
    assert "mask" in mask.name
    for figure in result.figures:
        assert figure.high < 1e-3
    page = markdown(AttackReport(run="r", created="", seconds=1.0, command="", machine="", results=(result,)))
    assert page.index("ONE SINGLE member reads EVERY member's upload") < page.index("| release |")


def test_without_a_run_the_stand_in_speaks_for_both_back_ends(run_directory: Path) -> None:
    found = read_target(run_directory)
    (result,) = group_key_results(Target(found.name, found.scenario, None, found.victims, found.public))
    assert len(result.figures) == 2


@pytest.mark.parametrize("parameters", [CkksParameters(), MaskParameters()])
def test_without_the_epochs_key_an_upload_stays_closed(parameters: Any) -> None:
    """The control: what opens an upload is the key, and not how it is asked for."""

    def key() -> GroupKey:
        transcript, master, secret = (
            bytes(32),
            np.random.default_rng().bytes(32),
            generate_group_secret(parameters),
        )
        fingerprint = commitment_to(transcript, master, secret)
        return GroupKey("f", 1, ("a", "b"), parameters.digest(), transcript, fingerprint, master, secret)

    context, right = RoundContext("f", 1, 1, "shared", 64), key()
    vector = np.linspace(-1, 1, 64)
    cipher = create_cipher(parameters, "b", AggregationPolicy())
    upload = cipher.encrypt(vector, right, context, bytes(16))
    np.testing.assert_allclose(open_upload(parameters, right, "a", "b", upload, context), vector, atol=1e-4)
    with pytest.raises(FedMosaicError):
        open_upload(parameters, key(), "a", "b", upload, context)
