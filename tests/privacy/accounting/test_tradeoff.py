"""Bounds on attackers: against closed forms, and against a real likelihood-ratio attack."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy.special import ndtr, ndtri

from fedmosaic.privacy.accounting import pld, tradeoff
from fedmosaic.privacy.accounting.epsilon import epsilon
from fedmosaic.privacy.accounting.events import UNPROTECTED, GaussianEvent
from fedmosaic.protos.errors import AccountingError

DELTA = 1e-5
RATES = (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 1.0)


@pytest.mark.parametrize(
    ("sigma", "steps"), [(1.391, 1), (20.0, 20), pytest.param(0.6, 1, marks=pytest.mark.slow)]
)
def test_the_curve_from_the_pld_is_the_gaussians_own(sigma: float, steps: int) -> None:
    mu = math.sqrt(steps) / sigma
    curve = tradeoff.privacy_curve([GaussianEvent(sigma, 1.0, steps)])
    for rate in RATES[1:-1]:
        exact = ndtr(ndtri(rate) + mu)
        assert exact <= curve.true_positive_rate(rate) <= exact * 1.002 + 1e-5
    assert curve.advantage == pytest.approx(2 * ndtr(mu / 2) - 1, abs=1e-6)
    np.testing.assert_allclose(curve.deltas, tradeoff.gaussian_delta(mu, curve.epsilons), atol=1e-6)


def test_the_studys_table() -> None:
    for sigma, advantage, at_1, at_01 in (
        (3.731, 0.107, 0.020, 0.0024),
        (1.391, 0.281, 0.054, 0.0089),
        (0.6, 0.595, 0.255, 0.0773),
    ):
        bounds = tradeoff.attack_bounds([GaussianEvent(sigma, 1.0, 1)], DELTA)
        assert bounds.gaussian_mu == pytest.approx(1 / sigma)
        assert bounds.advantage == pytest.approx(advantage, abs=1e-3)
        assert bounds.true_positive_rate_at_1_percent == pytest.approx(at_1, abs=5e-4)
        assert bounds.true_positive_rate_at_0_1_percent == pytest.approx(at_01, abs=2e-4)


def test_one_subsampled_step_matches_the_exact_neyman_pearson_test() -> None:
    sigma, q = 0.8, 0.2
    curve = tradeoff.privacy_curve([GaussianEvent(sigma, q, 1)])
    # With the example: the mixture; without: N(0, σ²). The ratio grows with x, so tests are thresholds.
    for rate in (0.001, 0.01, 0.1):
        x = -sigma * ndtri(rate)
        exact = q * ndtr((1 - x) / sigma) + (1 - q) * rate
        assert exact <= curve.true_positive_rate(rate) + 1e-9
        assert curve.true_positive_rate(rate) <= exact * 1.01 + 1e-4
    exact_advantage = q * (2 * ndtr(1 / (2 * sigma)) - 1)
    assert curve.advantage == pytest.approx(exact_advantage, abs=1e-4)


def test_a_likelihood_ratio_attacker_stays_below_the_bound() -> None:
    sigma, q, steps, trials = 1.0, 0.3, 4, 40_000
    generator = np.random.default_rng(5)
    without = sigma * generator.standard_normal((trials, steps))
    with_it = sigma * generator.standard_normal((trials, steps)) + (generator.random((trials, steps)) < q)

    def score(x: np.ndarray) -> np.ndarray:
        return np.asarray(np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2))).sum(axis=1))

    curve = tradeoff.privacy_curve([GaussianEvent(sigma, q, steps)])
    for rate in (0.01, 0.1):
        found = float((score(with_it) > np.quantile(score(without), 1 - rate)).mean())
        error = 3 * math.sqrt(found * (1 - found) / trials) + 3 * math.sqrt(rate / trials)
        assert found <= curve.true_positive_rate(rate) + error
        assert found >= 0.8 * curve.true_positive_rate(rate)


def test_the_bound_is_a_trade_off_curve() -> None:
    curve = tradeoff.privacy_curve([GaussianEvent(8.0, 1.0, 1), GaussianEvent(2.0, 0.05, 100)])
    rates = np.linspace(0, 1, 101)
    found = np.array([curve.true_positive_rate(rate) for rate in rates])
    assert (np.diff(found) >= -1e-12).all()
    assert (found >= rates - 1e-12).all()
    assert found[-1] == 1.0
    assert (np.diff(found, 2) <= 1e-9).all(), "concave"
    assert (found - rates).max() <= curve.advantage + 1e-9


def test_the_equivalent_gaussian_dominates_the_release_down_to_delta() -> None:
    events = [GaussianEvent(8.0, 1.0, 1), GaussianEvent(1.0, 0.016, 100)]
    bounds = tradeoff.attack_bounds(events, DELTA)
    equivalent = [GaussianEvent(1 / bounds.gaussian_mu, 1.0, 1)]
    assert epsilon(equivalent, DELTA, "pld") >= epsilon(events, DELTA, "pld") - 1e-3
    assert (
        tradeoff.gaussian_true_positive_rate(bounds.gaussian_mu, 0.01)
        >= bounds.true_positive_rate_at_1_percent - 1e-6
    )
    tighter = 0.97 * bounds.gaussian_mu
    curve = tradeoff.privacy_curve(events)
    relevant = (curve.epsilons >= 0) & (curve.deltas >= DELTA)
    assert (tradeoff.gaussian_delta(tighter, curve.epsilons[relevant]) < curve.deltas[relevant]).any()


def test_limits() -> None:
    nothing = tradeoff.attack_bounds([], DELTA)
    assert (nothing.gaussian_mu, nothing.advantage) == (0.0, 0.0)
    assert nothing.true_positive_rate_at_1_percent == pytest.approx(0.01)
    assert tradeoff.attack_bounds([UNPROTECTED], DELTA) == tradeoff.UNBOUNDED
    assert tradeoff.attack_bounds([GaussianEvent(0.03, 0.5, 10)], DELTA) == tradeoff.UNBOUNDED
    with pytest.raises(AccountingError):
        tradeoff.attack_bounds([], 0.0)
    with pytest.raises(AccountingError):
        tradeoff.privacy_curve([UNPROTECTED])
    with pytest.raises(AccountingError):
        tradeoff.privacy_curve([])
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(AccountingError):
            tradeoff.gaussian_true_positive_rate(1.0, rate)


def test_the_fast_forms_of_what_dp_accounting_computes_give_its_values() -> None:
    """The search for a person's losses and the sums of δ, bit for bit as the package has them."""
    event, interval = GaussianEvent(0.9, 0.1, 3), 0.02
    shares = [math.comb(4, count) * 0.1**count * 0.9 ** (4 - count) for count in range(5)]
    package = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        0.9, [0.0, 1.0, 2.0, 3.0, 4.0], shares, value_discretization_interval=interval
    ).self_compose(3)
    ours = pld._for_person(event, 4, interval)
    epsilons = np.linspace(-4.0, 8.0, 40)
    expected = package.get_delta_for_epsilon(epsilons)
    assert (ours.get_delta_for_epsilon(epsilons) == expected).all()
    assert (pld.deltas(ours, epsilons) == expected).all()
