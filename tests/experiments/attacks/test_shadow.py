"""Shadow runs of the real training on a tiny model: far too long training is seen, DP keeps its ceiling."""

from pathlib import Path

import numpy as np
import pytest

from fedmosaic.client.model.examples import read_examples
from fedmosaic.client.model.training import TrainingSettings
from fedmosaic.client.settings import ModelSettings
from fedmosaic.experiments.attacks import shadow as attack_shadow
from fedmosaic.experiments.attacks.shadow import Shadow, shadow_results
from fedmosaic.privacy.federation.roster import AdapterTerms


@pytest.fixture
def shadow(tiny_folder: Path) -> Shadow:
    training = TrainingSettings(
        steps=10, per_device_train_batch_size=8, max_length=16, learning_rate=3e-2, shared_learning_rate=1e-1
    )
    return Shadow(
        ModelSettings(path=str(tiny_folder / "small")),
        AdapterTerms(rank=4, blocks=2),
        read_examples(tiny_folder / "train-0.jsonl")[:16],
        read_examples(tiny_folder / "train-2.jsonl")[:30],
        training,
    )


def test_members_are_found_without_protection_and_stay_below_the_ceiling_with_dp(
    shadow: Shadow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attack_shadow, "EPSILONS", (1.0,))
    monkeypatch.setattr(attack_shadow, "_OTHER_CONTRIBUTORS", 3)
    results = list(shadow_results(shadow, runs=10, seed=0))
    assert [result.setting for result in results] == ["no_sanitiser"] * 2 + ["product"] * 2 + ["variant"] * 2
    alone, _, _, mixed_along, _, private_along = (result.figures[0] for result in results)
    assert alone.value > 0.55
    assert mixed_along.value > 0.5
    assert private_along.bound is not None
    assert private_along.bound < 0.65
    assert not any(result.broken for result in results)


def test_every_run_starts_from_the_public_point(shadow: Shadow) -> None:
    trainer = attack_shadow._Trainer(shadow, private=False)
    everybody = trainer.chosen(np.ones(16, dtype=bool))
    first = trainer.plain(everybody, 1)
    trainer.confidence(5.0 * first)
    np.testing.assert_array_equal(first, trainer.plain(everybody, 1))
    assert (first != trainer.start).any()
