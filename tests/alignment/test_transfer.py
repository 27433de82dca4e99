"""The transfer ratio and what stands beside it, on cases whose answer is known."""

import math

import numpy as np
import pytest
import torch

from fedmosaic.alignment.moments import MomentSums
from fedmosaic.alignment.transfer import (
    MOVED,
    RETRAINED,
    ZERO_SHOT,
    Score,
    calibrated,
    gradient_agreement,
    interval,
    loss_and_accuracy,
    random_core,
    ratio,
    ratios,
    reading_agreement,
)


def scores_of(task: str, seed: int, **variants: tuple[float, float]) -> list[Score]:
    names = {"zero": ZERO_SHOT, "moved": MOVED, "retrained": RETRAINED}
    return [Score(task, "a", "b", "ours", names[name], seed, *values) for name, values in variants.items()]


def test_a_preference_for_some_choices_is_no_knowledge() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(40, 4, generator=generator)
    answers = [int(row) for row in scores.argmax(1)]
    preferring = scores + torch.tensor([0.0, 9.0, -3.0, 1.0])
    assert float((preferring.argmax(1) == torch.tensor(answers)).float().mean()) < 0.5
    # The very same knowledge, whatever is preferred, and whatever is added to a prompt's scores.
    expected = pytest.approx(loss_and_accuracy(scores, answers))
    assert loss_and_accuracy(preferring, answers) == expected
    assert loss_and_accuracy(scores + torch.randn(40, 1, generator=generator), answers) == expected
    torch.testing.assert_close(calibrated(scores).exp().sum(1), torch.ones(40, dtype=torch.float64))


@pytest.mark.parametrize(("moved", "expected"), [((0.2, 0.9), 1.0), ((1.4, 0.3), 0.0), ((0.8, 0.6), 0.5)])
def test_the_ratio_is_one_for_the_targets_own_core_and_zero_for_none(
    moved: tuple[float, float], expected: float
) -> None:
    found = [
        score
        for task in ("x", "y", "z")
        for seed in (0, 1)
        for score in scores_of(task, seed, zero=(1.4, 0.3), moved=moved, retrained=(0.2, 0.9))
    ]
    row = ratios(found)[0]
    assert (row["variant"], row["tasks"], row["seeds"]) == (MOVED, ["x", "y", "z"], 2)
    for name in ("accuracy", "loss"):
        assert row[name] == pytest.approx(expected)
        assert row[f"{name}_half_width"] == pytest.approx(0.0, abs=1e-9)


def test_a_task_that_was_not_learnt_does_not_count() -> None:
    found = scores_of("x", 0, zero=(1.4, 0.3), moved=(0.8, 0.6), retrained=(0.2, 0.9))
    found += scores_of("y", 0, zero=(1.4, 0.3), moved=(5.0, 0.0), retrained=(1.3, 0.35))
    (row,) = [row for row in ratios(found) if row["variant"] == MOVED]
    assert row["tasks"] == ["x"]
    assert row["accuracy"] == pytest.approx(0.5)
    assert row["accuracy_half_width"] == math.inf
    assert math.isnan(ratios(found[3:])[0]["accuracy"])
    # Nor one that the source, the target of the way back, has not learnt.
    back = [Score("x", "b", "a", "ours", name, 0, 1.4, 0.3) for name in (ZERO_SHOT, RETRAINED)]
    assert ratios(found + back)[0]["tasks"] == []


def test_the_interval_of_a_ratio_is_over_tasks() -> None:
    gains = {"x": [0.2, 0.4], "y": [0.1], "z": [0.5]}
    wholes = {"x": [0.5, 0.5], "y": [0.6], "z": [0.4]}
    value, half = ratio(gains, wholes)
    assert value == pytest.approx(0.9 / 1.5)
    left = np.array([0.3 - 0.6 * 0.5, 0.1 - 0.6 * 0.6, 0.5 - 0.6 * 0.4])
    assert half == pytest.approx(4.302652729749464 * left.std(ddof=1) / 3**0.5 / 0.5)


def test_intervals_are_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.302652729749464 / 3**0.5)
    assert interval([1.0])[1] == float("inf")


def test_a_random_core_is_as_long_in_every_part_as_the_one_it_stands_for() -> None:
    core = np.random.default_rng(0).normal(size=2 * 12).astype(np.float32)
    core[:9] *= 50.0
    drawn = random_core(core, 3, 7)
    for start, stop in ((0, 9), (9, 12), (12, 21), (21, 24)):
        assert np.linalg.norm(drawn[start:stop]) == pytest.approx(np.linalg.norm(core[start:stop]), rel=1e-5)
    assert abs(float(drawn @ core)) < 0.9 * float(core @ core)
    assert not np.array_equal(drawn, random_core(core, 3, 8))


def test_agreement_of_gradients_is_not_ruled_by_the_largest_module() -> None:
    gradients = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(3))
    other = gradients.clone()
    other[:, 0] *= -1000.0
    assert gradient_agreement(gradients, gradients) == pytest.approx((1.0, 1.0))
    # One module of two turned round; the cosine of all entries together would be -1.
    assert gradient_agreement(gradients, other) == pytest.approx((0.0, 0.0), abs=1e-6)


@pytest.mark.parametrize("scale", [0.25, -4.0])
def test_a_rotated_model_reads_the_same(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    source = torch.randn(200, 8, generator=generator)
    sums = MomentSums()
    sums.update(source, scale * source @ rotation.float())
    key, b = (0, "mlp"), torch.zeros(8, 3)
    basis = torch.linalg.qr(torch.randn(8, 3, generator=generator, dtype=torch.float64))[0].T
    found = reading_agreement({key: sums.finish()}, {key: (basis, b)}, {key: (basis @ rotation, b)})
    assert found == pytest.approx((math.copysign(1.0, scale), 1 / abs(scale)), rel=1e-4)
