"""The one-run audit against a trade-off curve: closed form, a linear programme, and truths never passed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.stats import binom, norm

from fedmosaic.experiments.attacks.statistics import one_run
from fedmosaic.experiments.attacks.statistics.empirical import gaussian_epsilon
from fedmosaic.experiments.attacks.statistics.results import Figure
from fedmosaic.experiments.attacks.statistics.roc import Ceiling, ceiling_of
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.privacy.accounting.tradeoff import PrivacyCurve

DELTA = 1e-5


def lines(*pairs: tuple[float, float]) -> Ceiling:
    """The (ε, δ) pairs of a claim as a curve."""
    both = sorted([(-e, 1.0 - math.exp(-e) * (1.0 - d)) for e, d in pairs if e] + list(pairs))
    epsilons, deltas = zip(*both, strict=True)
    return Ceiling(curve=PrivacyCurve(np.array(epsilons), np.array(deltas)))


def programme(canaries: int, guesses: int, right: int, claim: Ceiling) -> float:
    """The largest chance of `right` or more right guesses that all the constraints on tails allow."""
    assert claim.curve is not None
    rows, limits = [], []
    counts = np.arange(guesses + 1)
    for count in range(1, guesses + 1):
        hit = np.where(counts >= count, counts, 0) / canaries
        turned = np.where((counts >= count - 1) & (counts < guesses), guesses - counts, 0) / canaries
        for epsilon, delta in zip(claim.curve.epsilons, claim.curve.deltas, strict=True):
            rows.append(hit - math.exp(epsilon) * turned)
            limits.append(delta)
            rows.append(hit - math.exp(-epsilon) * turned)
            limits.append(1.0 - math.exp(-epsilon) * (1.0 - delta))
    found = linprog(
        -(counts >= right).astype(float),
        A_ub=np.array(rows),
        b_ub=np.array(limits),
        A_eq=np.ones((1, guesses + 1)),
        b_eq=[1.0],
        bounds=(0, 1),
    )
    assert found.status == 0
    return float(-found.fun)


def f_dp_p_value(canaries: int, guesses: int, right: int, ceiling: Ceiling) -> float:
    """The largest chance of so many right guesses that `least_total` lets stand."""
    if one_run.least_total(canaries, guesses, right, 1.0, ceiling) <= 1.0:
        return 1.0
    low, high = -700.0, 0.0
    for _ in range(60):
        middle = (low + high) / 2.0
        possible = one_run.least_total(canaries, guesses, right, math.exp(middle), ceiling) <= 1.0
        low, high = (middle, high) if possible else (low, middle)
    return math.exp(high)


def run(mu: float, canaries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    included = generator.random(canaries) < 0.5
    return mu * included + generator.standard_normal(canaries), included


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
def test_one_canary_can_be_guessed_as_well_as_the_two_gaussians_can_be_told_apart(mu: float) -> None:
    assert f_dp_p_value(1, 1, 1, Ceiling(mu=mu)) == pytest.approx(norm.cdf(mu / 2), abs=1e-6)
    assert f_dp_p_value(1, 1, 0, Ceiling(mu=mu)) == 1.0


def test_without_any_information_a_guess_is_a_coin_and_the_bound_is_above_the_binomial_tail() -> None:
    nothing = Ceiling(mu=0.0)
    assert f_dp_p_value(1, 1, 1, nothing) == pytest.approx(0.5, abs=1e-6)
    for right in (55, 65, 80):
        bound = f_dp_p_value(100, 100, right, nothing)
        assert binom.sf(right - 1, 100, 0.5) <= bound
    assert f_dp_p_value(100, 100, 90, nothing) < 1e-4


@pytest.mark.parametrize(
    "claim", [lines((0.5, 0.0)), lines((1.0, 0.01)), lines((0.2, 0.05), (1.0, 0.01), (2.0, 0.001))]
)
@pytest.mark.parametrize(("canaries", "guesses"), [(8, 8), (14, 9)])
def test_the_recursion_is_the_optimum_of_the_linear_programme(
    claim: Ceiling, canaries: int, guesses: int
) -> None:
    for right in range(guesses // 2, guesses + 1):
        expected = programme(canaries, guesses, right, claim)
        assert f_dp_p_value(canaries, guesses, right, claim) == pytest.approx(expected, abs=1e-6)


@given(
    right=st.integers(1, 40), mu=st.floats(0.0, 4.0), more=st.floats(0.01, 1.0), chance=st.floats(1e-6, 1.0)
)
def test_less_private_claims_and_smaller_chances_force_less(
    right: int, mu: float, more: float, chance: float
) -> None:
    total = one_run.least_total(60, 40, right, chance, Ceiling(mu=mu))
    assert total >= chance * (1 - 1e-12)
    # Both may stop at the first tail above 1.
    assert (
        min(1.0, one_run.least_total(60, 40, right, chance, Ceiling(mu=mu + more))) <= min(1.0, total) + 1e-9
    )
    assert min(1.0, one_run.least_total(60, 40, right, chance / 2, Ceiling(mu=mu))) <= min(1.0, total) + 1e-9


def test_a_mechanism_that_sometimes_tells_everything_is_not_called_worse_than_it_is() -> None:
    """With probability δ all coins are revealed at once: the guesses are as dependent as they can be."""
    included = np.random.default_rng(0).random(200) < 0.5
    for delta in (0.02, 0.2):
        claim = lines((0.0, delta))
        # Equal in theory.
        assert f_dp_p_value(50, 50, 50, claim) >= delta * (1 - 1e-9)
        assert not one_run.refutes(included.astype(float), included, claim, delta)
    assert one_run.refutes(included.astype(float), included, lines((0.0, 0.02)), 0.5)


@pytest.mark.parametrize("mu", [0.268, 0.72, 1.667])
def test_a_true_claim_is_refuted_no_more_often_than_the_level_says(mu: float) -> None:
    level, trials = 0.05, 300
    refuted = sum(one_run.refutes(*run(mu, 300, seed), Ceiling(mu=mu), level) for seed in range(trials))
    assert refuted <= level * trials + 3 * math.sqrt(level * trials)


@pytest.mark.parametrize("sigma", [0.6, 1.391, 3.731])
def test_it_never_passes_a_gaussian_release_and_certifies_a_good_part_of_it(sigma: float) -> None:
    truth, found = gaussian_epsilon(1 / sigma, DELTA), []
    for seed in range(20):
        scores, included = run(1 / sigma, 1000, seed)
        factor = one_run.refuted_factor(scores, included, lambda s: Ceiling(mu=1 / (sigma * s)), 0.05)
        found.append(0.0 if math.isinf(factor) else gaussian_epsilon(1 / (sigma * factor), DELTA))
    assert np.mean(np.array(found) > truth) <= 0.05
    assert max(found) < 1.1 * truth
    assert np.median(found) > 0.15 * truth


def test_a_sampled_mechanism_is_held_against_its_own_curve() -> None:
    """A canary moves in a tenth of 20 steps; the audited claim is that of the sampled Gaussian."""
    generator = np.random.default_rng(3)
    event = GaussianEvent(2.5, 0.1, 20)
    included = generator.random(1000) < 0.5
    scores = generator.binomial(20, 0.1, 1000) * included + 2.5 * math.sqrt(20) * generator.standard_normal(
        1000
    )
    assert not one_run.refutes(scores, included, ceiling_of([event]), 0.05)
    quiet = generator.binomial(20, 0.1, 1000) * included + 0.05 * generator.standard_normal(1000)
    assert one_run.refutes(quiet, included, ceiling_of([event]), 1e-4)


def test_the_least_false_positive_rate_is_the_inverse_of_the_largest_true_positive_rate() -> None:
    for ceiling in (Ceiling(mu=1.3), ceiling_of([GaussianEvent(1.5, 0.1, 20)]), lines((1.0, 0.01))):
        for false in (0.003, 0.05, 0.4):
            true = ceiling.true_positive_rate(false)
            assert ceiling.false_positive_rate(true) == pytest.approx(false, rel=1e-6)
    assert Ceiling().false_positive_rate(0.7) == 0.0


def test_far_too_little_noise_breaks_the_figure_and_the_right_noise_does_not() -> None:
    def figure(scale: float) -> Figure:
        scores, included = run(1 / (1.391 * scale), 2000, 5)
        return one_run.one_run_figure(
            scores,
            included,
            lambda s: Ceiling(mu=1 / (1.391 * s)),
            lambda s: gaussian_epsilon(1 / (1.391 * s), DELTA),
        )

    right, quiet = figure(1.0), figure(0.3)
    assert not right.broken
    assert right.bound is not None
    assert quiet.bound is not None
    assert right.value < right.bound
    assert right.low <= right.value
    assert quiet.broken
    assert quiet.low > quiet.bound


def test_guesses_are_counted_at_both_ends() -> None:
    scores = np.array([0.0, 1.0, 2.0, 3.0])
    assert one_run.right_guesses(scores, np.array([False, True, False, True]), 2) == 2
    assert one_run.right_guesses(scores, np.array([True, False, True, False]), 2) == 0


def test_counts_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="no outcome"):
        one_run.least_total(10, 11, 5, 0.1, Ceiling(mu=1.0))
    with pytest.raises(ValueError, match="no outcome"):
        one_run.least_total(10, 5, 6, 0.1, Ceiling(mu=1.0))
