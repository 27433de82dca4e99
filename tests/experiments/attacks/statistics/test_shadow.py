"""Calibration on shadow runs: it sees what a raw statistic hides, and leaks no run's own memberships."""

import numpy as np
import pytest
from scipy.stats import norm

from fedmosaic.experiments.attacks.statistics.shadow import LEAST_RUNS, calibrated_scores
from fedmosaic.experiments.scenario.metrics import area_under_curve


def simulated(
    effect: float, runs: int = 64, candidates: int = 200, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Statistics whose differences between candidates are far larger than what membership does."""
    generator = np.random.default_rng(seed)
    members = generator.random((runs, candidates)) < 0.5
    easiness = 10 * generator.standard_normal(candidates)
    return easiness + effect * members + generator.standard_normal(members.shape), members


def area(scores: np.ndarray, members: np.ndarray) -> float:
    return area_under_curve(scores[members], scores[~members])


def test_calibration_finds_members_that_the_raw_statistic_does_not_tell_from_easy_texts() -> None:
    statistics, members = simulated(effect=1.0)
    assert area(statistics, members) < 0.55
    best = norm.cdf(1.0 / np.sqrt(2))
    assert best - 0.03 < area(calibrated_scores(statistics, members), members) < best + 0.01


def test_without_any_effect_the_scores_tell_nothing() -> None:
    statistics, members = simulated(effect=0.0)
    assert abs(area(calibrated_scores(statistics, members), members) - 0.5) < 0.03


def test_a_runs_own_memberships_do_not_enter_its_scores() -> None:
    statistics, members = simulated(effect=1.0, runs=12, candidates=30)
    changed = members.copy()
    changed[5] = ~changed[5]
    before, after = calibrated_scores(statistics, members), calibrated_scores(statistics, changed)
    np.testing.assert_array_equal(before[5], after[5])
    assert (before[4] != after[4]).any()


def test_a_candidate_that_no_other_run_has_scores_zero_and_constant_statistics_are_no_error() -> None:
    statistics, members = simulated(effect=1.0, runs=LEAST_RUNS, candidates=5)
    members[:, 0] = False
    members[2, 0] = True
    assert calibrated_scores(statistics, members)[2, 0] == 0.0
    flat = calibrated_scores(np.ones_like(statistics), members)
    assert np.isfinite(flat).all()


def test_too_few_runs_or_broken_statistics_are_refused() -> None:
    statistics, members = simulated(effect=1.0, runs=LEAST_RUNS, candidates=5)
    with pytest.raises(ValueError, match="runs"):
        calibrated_scores(statistics[:-1], members[:-1])
    statistics[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        calibrated_scores(statistics, members)
