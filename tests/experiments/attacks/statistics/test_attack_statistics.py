"""ROC figures, ceilings and empirical ε: closed forms, and truths that are never passed."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from fedmosaic.experiments.attacks.statistics import empirical, membership, roc
from fedmosaic.experiments.attacks.statistics.collusion import (
    equations,
    independent_equations,
    recovery_error,
    solve,
)
from fedmosaic.experiments.attacks.statistics.results import Figure, clopper_pearson
from fedmosaic.privacy.accounting.epsilon import epsilon
from fedmosaic.privacy.accounting.events import GaussianEvent

DELTA = 1e-5


def gaussian_scores(mu: float, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    members = np.arange(2 * size) < size
    return generator.standard_normal(2 * size) + mu * members, members


def test_the_standard_error_of_the_area_is_that_of_repetitions_with_shared_noise() -> None:
    """50 releases of 20 scores with a common part: ignoring the groups would halve the error."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(50), 20)
    members = np.tile(np.arange(20) < 10, 50)
    # The common part moves members only, so that it does not cancel between the two classes.
    areas, errors = [], []
    for _ in range(200):
        common = generator.standard_normal(50)[groups] * members
        scores = generator.standard_normal(1000) + common + members
        area, error = roc.area_with_error(scores, members, groups)
        areas.append(area)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.15)
    _, naive = roc.area_with_error(scores, members, np.arange(1000))
    assert np.mean(errors) > 1.3 * naive


@pytest.mark.parametrize("mu", [0.2, 0.72, 1.667])
def test_figures_of_the_gaussian_mechanism_lie_at_their_ceiling_and_are_not_broken(mu: float) -> None:
    scores, members = gaussian_scores(mu, 50_000, 1)
    area, one, tenth = roc.membership_figures(scores, members, roc.Ceiling(mu=mu))
    assert (area.name, one.name, tenth.name) == ("AUC", "TPR at 1 % FPR", "TPR at 0.1 % FPR")
    assert area.value == pytest.approx(norm.cdf(mu / math.sqrt(2)), abs=0.006)
    assert one.bound == pytest.approx(norm.cdf(norm.ppf(0.01) + mu))
    assert tenth.bound == pytest.approx(norm.cdf(norm.ppf(0.001) + mu))
    for figure in (area, one, tenth):
        assert figure.value == pytest.approx(figure.bound, rel=0.25, abs=1e-3)
        assert not figure.broken


def test_the_interval_of_a_rate_covers_the_truth_although_its_threshold_is_estimated() -> None:
    truth = norm.cdf(norm.ppf(0.01) + 1.0)
    covered = []
    for seed in range(60):
        figure = roc.membership_figures(*gaussian_scores(1.0, 3000, seed), roc.Ceiling(mu=1.0))[1]
        covered.append(figure.low <= truth <= figure.high)
    assert np.mean(covered) > 0.85


def alike(releases: int, count: int, seed: int) -> tuple[Figure, ...]:
    """Figures of the strongest attack on candidates that hardly differ, so that a release's scores agree."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal(64) + 0.35 * generator.standard_normal((40, 64))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    members = membership.draw_members(releases, 40, 0.25, generator)
    inner = membership.simulated_inner_products(rows @ rows.T, members, 0.6, generator)
    scores = membership.likelihood_ratio_scores(inner, rows @ rows.T, members, 0.6)
    return membership.scored(scores, members, roc.Ceiling(mu=1 / 0.6), count)[0]


def test_rare_false_positives_of_dependent_scores_need_many_releases() -> None:
    """200 releases of 40 scores each are not 8,000 trials: one draw of noise would decide the rate."""
    few = alike(200, 40, 0)
    assert [figure.name for figure in few] == ["AUC", "TPR at 1 % FPR"][: len(few)]
    covered = []
    for seed in range(3):
        _, one, tenth = alike(12_000, 8, seed)
        for figure in (one, tenth):
            assert figure.bound is not None
            covered.append(figure.low <= figure.bound <= figure.high)
    assert sum(covered) >= 5


def test_a_correct_mechanism_is_hardly_ever_called_broken() -> None:
    broken = [
        figure.broken
        for seed in range(300)
        for figure in roc.membership_figures(*gaussian_scores(1.0, 1000, seed), roc.Ceiling(mu=1.0))
    ]
    assert sum(broken) == 0


def test_a_mechanism_with_less_noise_than_claimed_is_broken() -> None:
    area, one, _ = roc.membership_figures(*gaussian_scores(1.5, 20_000, 3), roc.Ceiling(mu=1.0))
    assert area.broken
    assert one.broken


def test_too_few_scores_give_no_rate_and_no_promise_gives_no_bound() -> None:
    (area,) = roc.membership_figures(*gaussian_scores(1.0, 30, 0), roc.Ceiling())
    assert area.bound is None
    assert not area.broken
    with pytest.raises(ValueError, match="members and others"):
        roc.membership_figures(np.zeros(4), np.ones(4, dtype=bool), roc.Ceiling())
    with pytest.raises(ValueError, match="NaN"):
        roc.membership_figures(np.full(4, np.nan), np.array([True, False, True, False]), roc.Ceiling())


def test_ceilings_follow_the_events() -> None:
    assert roc.ceiling_of([]).true_positive_rate(0.01) == pytest.approx(0.01)
    assert roc.ceiling_of([GaussianEvent(2.0, 1.0, 4)]).mu == pytest.approx(1.0)
    assert not roc.ceiling_of([GaussianEvent(0.0, 1.0, 1)]).promises
    sampled = roc.ceiling_of([GaussianEvent(1.0, 0.1, 10)])
    whole = roc.ceiling_of([GaussianEvent(1.0, 1.0, 10)])
    for rate in (0.001, 0.1):
        assert rate < sampled.true_positive_rate(rate) < whole.true_positive_rate(rate)
    assert 0.5 < sampled.area < whole.area


def test_the_area_of_a_numerical_curve_is_an_upper_bound_and_close() -> None:
    from fedmosaic.privacy.accounting.tradeoff import privacy_curve

    curve = roc.Ceiling(curve=privacy_curve([GaussianEvent(1.0, 1.0, 1)]))
    exact = roc.Ceiling(mu=1.0).area
    assert exact <= curve.area <= exact + 0.02


def test_intervals_of_a_share_are_exact_and_widen_with_dependence() -> None:
    low, high = clopper_pearson(0, 10, 0.95)
    assert low == 0.0
    assert high == pytest.approx(1 - 0.025 ** (1 / 10))
    hits = np.repeat([True, False], 50)
    alone = roc.rate_interval(hits, np.arange(100), 0.95)
    together = roc.rate_interval(hits, np.repeat(np.arange(10), 10), 0.95)
    assert together[0] < alone[0] < 0.5 < alone[1] < together[1]
    never, groups = np.zeros(100, dtype=bool), np.repeat(np.arange(10), 10)
    assert roc.rate_interval(never, groups, 0.95, cautious=True) == clopper_pearson(0, 10, 0.95)
    assert roc.rate_interval(never, groups, 0.95) == clopper_pearson(0, 100, 0.95)


def test_epsilon_of_mu_is_the_accountants() -> None:
    for sigma in (0.6, 1.391, 3.731):
        found = empirical.gaussian_epsilon(1 / sigma, DELTA)
        assert found == pytest.approx(epsilon([GaussianEvent(sigma, 1.0, 1)], DELTA, "pld"), rel=1e-3)
    assert empirical.gaussian_mu(empirical.CanaryScores(np.arange(4.0), np.arange(4.0)), 0.95) == 0.0
    assert empirical.gaussian_epsilon(0.0, DELTA) == 0.0
    assert empirical.gaussian_epsilon(math.inf, DELTA) == math.inf


@pytest.mark.parametrize("mu", [0.0, 0.27, 1.667])
def test_certified_mu_passes_the_truth_no_more_often_than_it_says(mu: float) -> None:
    generator = np.random.default_rng(5)
    passed = [
        empirical.gaussian_mu(
            empirical.CanaryScores(generator.standard_normal(500) + mu, generator.standard_normal(500)), 0.95
        )
        > mu
        for _ in range(2000)
    ]
    assert np.mean(passed) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)
    if mu:
        assert np.mean(passed) > 0.03, "a bound that is never passed would be a weak one"


def test_certified_epsilon_without_assumptions_stays_below_the_truth_and_its_ceiling() -> None:
    generator = np.random.default_rng(6)
    truth = empirical.gaussian_epsilon(1.667, DELTA)
    found = [
        empirical.clopper_pearson_lower_bound(
            empirical.CanaryScores(generator.standard_normal(1000) + 1.667, generator.standard_normal(1000)),
            DELTA,
            0.95,
        )
        for _ in range(30)
    ]
    assert max(found) < truth
    assert np.median(found) > 1.5
    certain = empirical.CanaryScores(np.ones(1000), np.zeros(1000))
    ceiling = empirical.clopper_pearson_ceiling(2000, DELTA, 0.95)
    assert empirical.clopper_pearson_lower_bound(certain, DELTA, 0.95) == pytest.approx(ceiling)
    assert ceiling == pytest.approx(4.9, abs=0.2)


def test_a_coalition_that_allows_for_movement_loses_nothing_by_more_rounds() -> None:
    generator = np.random.default_rng(12)
    one, many = [], []
    for _ in range(40):
        rounds = [generator.random((5, 5)) * (1 - np.eye(5)) for _ in range(4)]
        over_rounds = [generator.standard_normal((5, 60))]
        for _ in range(3):
            over_rounds.append(over_rounds[-1] + 0.3 * generator.standard_normal((5, 60)))
        first = equations(rounds[:1], over_rounds[:1], [0, 1])
        every = equations(rounds, over_rounds, [0, 1])
        one.append(recovery_error(solve(first, 0.3)[0], over_rounds[0][2]))
        many.append(recovery_error(solve(every, 0.3)[0], over_rounds[0][2]))
    assert np.mean(many) < 0.9 * np.mean(one)


def test_repeated_rows_are_no_new_equations_and_missing_rows_are_none() -> None:
    weights = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    adapters = np.eye(3)
    assert independent_equations(equations([weights] * 4, [adapters] * 4, [0]).weights_EU) == 1
    none = equations([np.zeros((3, 3))], [adapters], [0])
    assert independent_equations(none.weights_EU) == 0
    assert (solve(none) == 0).all()
