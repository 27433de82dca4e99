"""Accounting: against closed forms, an independent integral, Google's PLD, and composition laws."""

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from fedmosaic.privacy.accounting import epsilon as accounting
from fedmosaic.privacy.accounting.epsilon import (
    check_delta,
    check_order,
    cross_checked_epsilon,
    default_delta,
    epsilon,
    epsilon_bound,
    person_epsilon,
)
from fedmosaic.privacy.accounting.events import UNPROTECTED, GaussianEvent, merge_events
from fedmosaic.protos.errors import AccountingError

DELTA = 1e-5
PROFILE = GaussianEvent(8.0, 1.0, 1)
ADAPTER = GaussianEvent(1.0, 0.016, 600)
FAST_GRID = [(8.0, 1.0, 1), (2.0, 0.1, 20), (1.0, 0.01, 500), (0.6, 0.001, 20)]
FULL_GRID = list(
    itertools.product((0.6, 0.8, 1.0, 2.0, 5.0, 20.0, 50.0), (1.0, 0.1, 0.01, 0.001), (1, 20, 500))
)


def gaussian_delta(epsilon_value: float, mu: float) -> float:
    """Balle and Wang 2018, theorem 8."""
    second = math.exp(epsilon_value + log_ndtr(-epsilon_value / mu - mu / 2))
    return float(ndtr(-epsilon_value / mu + mu / 2) - second)


def gaussian_epsilon(mu: float, delta: float) -> float:
    return float(brentq(lambda value: gaussian_delta(value, mu) - delta, 0.0, 500.0, xtol=1e-12))


def subsampled_log_ratio(x: np.ndarray, sigma: float, q: float) -> np.ndarray:
    return np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2)))


def integrated_delta(epsilon_value: float, sigma: float, q: float, mu: float) -> float:
    """δ of one subsampled Gaussian step beside a full-batch Gaussian with μ, by quadrature.

    P = ((1-q) N(0, σ²) + q N(1, σ²)) × N(μ, 1) against Q = N(0, σ²) × N(0, 1), removal direction. Given the
    first coordinate, the second is a Gaussian mechanism, so the inner integral is closed.
    """
    x = np.linspace(-12 * sigma, 1 + 12 * sigma, 100_001)
    weight = (x[1] - x[0]) / (sigma * math.sqrt(2 * math.pi))
    log_ratio = subsampled_log_ratio(x, sigma, q)
    density_q = weight * np.exp(-(x**2) / (2 * sigma**2))
    density_p = density_q * np.exp(log_ratio)
    threshold = (epsilon_value - log_ratio) / mu
    return float(
        np.sum(density_p * ndtr(mu / 2 - threshold))
        - math.exp(epsilon_value) * np.sum(density_q * ndtr(-mu / 2 - threshold))
    )


@pytest.mark.parametrize(
    ("sigma", "steps"), [(1.391, 1), (8.0, 1), (20.0, 25), pytest.param(0.6, 1, marks=pytest.mark.slow)]
)
def test_every_accountant_bounds_the_exact_full_batch_gaussian(sigma: float, steps: int) -> None:
    exact = gaussian_epsilon(math.sqrt(steps) / sigma, DELTA)
    events = [GaussianEvent(sigma, 1.0, steps)]
    assert exact <= epsilon(events, DELTA, "pld") <= exact + 1e-3
    assert exact <= epsilon(events, DELTA, "prv") <= exact + 0.0115
    assert exact <= epsilon(events, DELTA, "rdp") <= 1.15 * exact + 1e-3


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.1), (2.0, 0.5)])
def test_one_subsampled_step_matches_its_closed_form(sigma: float, q: float) -> None:
    def delta_at(value: float) -> float:
        # The loss exceeds ε exactly where x is above the threshold.
        x = sigma**2 * math.log1p(math.expm1(value) / q) + 0.5
        above_p = q * ndtr((1 - x) / sigma) + (1 - q) * ndtr(-x / sigma)
        return float(above_p - math.exp(value) * ndtr(-x / sigma))

    exact = brentq(lambda value: delta_at(value) - DELTA, 1e-9, 50.0)
    events = [GaussianEvent(sigma, q, 1)]
    assert exact - 1e-6 <= epsilon(events, DELTA, "pld") <= exact + 1e-3
    assert exact <= epsilon(events, DELTA, "prv") <= exact + 0.0115
    assert epsilon(events, DELTA, "rdp") >= exact


@pytest.mark.parametrize(
    ("sigma", "q", "profile_sigma"), [(1.5, 0.2, 2.0), pytest.param(0.8, 0.05, 3.731, marks=pytest.mark.slow)]
)
def test_two_channels_match_an_independent_integral(sigma: float, q: float, profile_sigma: float) -> None:
    exact = brentq(lambda value: integrated_delta(value, sigma, q, 1 / profile_sigma) - DELTA, 0.01, 50.0)
    events = [GaussianEvent(sigma, q, 1), GaussianEvent(profile_sigma, 1.0, 1)]
    assert exact - 1e-4 <= epsilon(events, DELTA, "pld") <= exact + 2e-3
    assert exact - 1e-4 <= epsilon(events, DELTA, "prv") <= exact + 0.0115
    assert epsilon(events, DELTA, "rdp") >= exact


def check_grid_point(point: tuple[float, float, int]) -> None:
    found = cross_checked_epsilon([GaussianEvent(*point)], DELTA)
    assert 0.0 <= found.prv - found.pld <= (0.0115 if found.pld < 20 else 0.0125)
    assert found.rdp >= found.pld


@pytest.mark.parametrize("point", FAST_GRID)
def test_prv_lies_its_margin_above_pld_and_rdp_never_below(point: tuple[float, float, int]) -> None:
    check_grid_point(point)


@pytest.mark.slow
def test_full_grid() -> None:
    points = [p for p in FULL_GRID if epsilon([GaussianEvent(*p)], DELTA, "rdp") <= 100]
    assert len(points) == 80
    for point in points:
        check_grid_point(point)


def test_joint_epsilon_of_both_channels_is_below_their_naive_sum() -> None:
    joint = cross_checked_epsilon([PROFILE, ADAPTER], DELTA)
    assert joint.prv == pytest.approx(2.44, abs=0.005)
    assert joint.pld == pytest.approx(2.431, abs=0.002)
    assert joint.rdp == pytest.approx(2.761, abs=0.005)
    naive = epsilon([PROFILE], DELTA / 2, "pld") + epsilon([ADAPTER], DELTA / 2, "pld")
    assert naive == pytest.approx(2.95, abs=0.01)
    assert joint.prv < naive


@settings(max_examples=5)
@given(
    sigma=st.floats(0.7, 20.0), q=st.floats(0.001, 1.0), steps=st.integers(1, 50), delta=st.floats(1e-8, 0.05)
)
def test_more_steps_more_data_and_less_noise_never_cost_less(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    base = epsilon([GaussianEvent(sigma, q, steps)], delta, "rdp")
    assert epsilon([GaussianEvent(sigma, q, steps + 1)], delta, "rdp") >= base
    assert epsilon([GaussianEvent(sigma, min(1.0, q * 1.1), steps)], delta, "rdp") >= base - 1e-9
    assert epsilon([GaussianEvent(sigma * 1.1, q, steps)], delta, "rdp") <= base + 1e-9
    assert epsilon([GaussianEvent(sigma, q, steps)], delta / 2, "rdp") >= base


@pytest.mark.parametrize("accountant", ["prv", "rdp", "pld"])
def test_degenerate_histories_have_their_limits(accountant: str) -> None:
    assert epsilon([], DELTA, accountant) == 0.0
    assert epsilon([GaussianEvent(0.0, 1.0, 0), GaussianEvent(1.0, 0.1, 0)], DELTA, accountant) == 0.0
    assert epsilon([UNPROTECTED], DELTA, accountant) == math.inf
    assert epsilon([PROFILE, GaussianEvent(0.0, 0.01, 1)], DELTA, accountant) == math.inf
    assert epsilon([GaussianEvent(1e-200, 1.0, 1)], DELTA, accountant) == math.inf
    assert epsilon([GaussianEvent(1e300, 1e-300, 1)], DELTA, accountant) <= 0.0101
    assert epsilon([PROFILE], 0.9, accountant) >= 0.0


def test_extended_orders_lift_the_floor_of_rdp() -> None:
    # With Opacus's own orders, up to 63, nothing below 0.103 can come out at this δ.
    assert epsilon([GaussianEvent(1000.0, 1.0, 1)], DELTA, "rdp") < 0.003
    assert epsilon([GaussianEvent(1000.0, 0.01, 1)], DELTA, "rdp") < 0.004


def test_the_gaussian_dp_accountant_is_refused_and_for_good_reason() -> None:
    with pytest.raises(AccountingError, match=r"central-limit approximation.*13 times"):
        epsilon([PROFILE], DELTA, "gdp")
    from opacus.accountants import GaussianAccountant

    with pytest.warns(UserWarning, match="GDP accounting"):
        gdp = GaussianAccountant()
    gdp.history = [(0.6, 0.01, 1)]
    assert gdp.get_epsilon(DELTA) * 10 < epsilon([GaussianEvent(0.6, 0.01, 1)], DELTA, "pld")


@pytest.mark.parametrize(
    ("sigma", "q", "steps"),
    [
        (-1.0, 1.0, 1),
        (math.nan, 1.0, 1),
        (math.inf, 1.0, 1),
        (1.0, 0.0, 1),
        (1.0, 1.0001, 1),
        (1.0, math.nan, 1),
        (1.0, 0.5, -1),
        (1.0, 0.5, 1.5),
        (True, 0.5, 1),
        ("1", 0.5, 1),
    ],
)
def test_events_outside_their_domain_are_refused(sigma: float, q: float, steps: int) -> None:
    with pytest.raises(AccountingError):
        GaussianEvent(sigma, q, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, True, "1e-5"])
def test_delta_outside_its_domain_is_refused(delta: float) -> None:
    with pytest.raises(AccountingError, match="δ is"):
        epsilon([PROFILE], delta)


def test_merging_adds_steps_of_equal_noise_and_rate_only() -> None:
    merged = merge_events([ADAPTER, PROFILE, GaussianEvent(1, 0.016, 5), GaussianEvent(1.0, 0.02, 3)])
    assert merged == (GaussianEvent(1.0, 0.016, 605), GaussianEvent(1.0, 0.02, 3), PROFILE)


def test_figures_that_contradict_each_other_are_refused() -> None:
    assert check_order(1.01, 1.2, 1.0).prv == 1.01
    with pytest.raises(AccountingError, match=r"PRV gives ε = 0\.9900, below PLD"):
        check_order(0.99, 1.2, 1.0)
    with pytest.raises(AccountingError, match="RDP gives"):
        check_order(1.01, 0.9, 1.0)
    with pytest.raises(AccountingError, match="failed"):
        check_order(math.nan, 1.0, 1.0)


def test_a_broken_prv_is_found_by_the_cross_check(monkeypatch: pytest.MonkeyPatch) -> None:
    accounting._evaluate.cache_clear()
    real = accounting._prv
    monkeypatch.setattr(accounting, "_prv", lambda events, delta: real(events, delta) - 0.05)
    with pytest.raises(AccountingError, match="neither is reported"):
        cross_checked_epsilon([PROFILE], DELTA)
    accounting._evaluate.cache_clear()


def test_a_prv_that_is_no_number_is_not_told_as_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opacus.accountants.PRVAccountant.get_epsilon", lambda *_, **__: math.nan)
    with pytest.raises(AccountingError, match="prv returned no number"):
        epsilon([GaussianEvent(7.77, 1.0, 1)], DELTA)


@pytest.mark.slow
def test_the_pld_grid_follows_the_number_of_steps() -> None:
    # On dp-accounting's fixed grid of 1e-4 this comes out at 0.750, above PRV: rounding, not privacy.
    found = cross_checked_epsilon([GaussianEvent(5.0, 0.001, 1_000_000)], DELTA)
    assert found.pld == pytest.approx(0.734, abs=1e-3)
    assert 0.0 <= found.prv - found.pld <= 0.0115


def test_where_a_tight_accountant_cannot_the_rdp_bound_is_named(caplog: pytest.LogCaptureFixture) -> None:
    loud = [GaussianEvent(0.03, 1.0, 1)]
    with pytest.raises(AccountingError, match="nothing is promised"):
        epsilon(loud, DELTA)
    found = epsilon_bound(loud, DELTA)
    assert found.accountant == "rdp"
    assert gaussian_delta(600.0, 1 / 0.03) > DELTA
    assert found.epsilon > 600
    assert "falling back from prv" in caplog.text
    tiny = epsilon_bound([PROFILE], 1e-14)
    assert tiny.accountant == "rdp"
    assert tiny.epsilon >= gaussian_epsilon(1 / 8, 1e-14)
    assert epsilon_bound([PROFILE], DELTA).accountant == "prv"


def test_too_many_steps_for_prv_are_refused_before_memory_is_taken() -> None:
    with pytest.raises(AccountingError, match="cells"):
        epsilon([GaussianEvent(1000.0, 0.001, 10**12)], DELTA)


def test_default_delta_is_below_one_over_n_for_every_n() -> None:
    for n in (2, 3, 10, 50, 1000, 10**6, 10**9):
        assert default_delta(n) == pytest.approx(n**-1.1)
        assert 0.0 < default_delta(n) < 1 / n
        check_delta(default_delta(n), n)
    for wrong in (0, 1, -5, True, 2.5):
        with pytest.raises(AccountingError):
            default_delta(wrong)  # type: ignore[arg-type]  # on purpose


def test_a_delta_above_one_over_n_is_refused_without_telling_n() -> None:
    check_delta(1 / 1234, 1234)
    with pytest.raises(AccountingError, match="above 1/n") as refusal:
        check_delta(1e-3, 1234)
    assert "1234" not in str(refusal.value)


def test_plain_data_and_interfaces_import_no_torch() -> None:
    modules = """accounting.events accounting.epsilon accounting.calibrate accounting.tradeoff ledger.ledger
        statement.build statement.render""".split()
    code = "import sys\n" + "\n".join(f"import fedmosaic.privacy.{name}" for name in modules)
    code += "\nheavy = {'torch', 'opacus', 'dp_accounting', 'transformers', 'scipy'} & set(sys.modules)\n"
    code += "assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(("examples", "expected"), [(1, 2.96), (2, 6.46), (5, 19.1), (10, 46.7)])
def test_a_person_with_several_examples_of_a_sampled_run(examples: int, expected: float) -> None:
    # By dp_accounting's MixtureOfGaussiansDpEvent, self-composed, on a finer grid.
    found = person_epsilon([GaussianEvent(0.907, 0.016, 600)], DELTA, examples)
    assert found == pytest.approx(expected, rel=3e-3)


def test_one_example_of_a_person_costs_what_one_example_costs() -> None:
    for events in ([PROFILE], [GaussianEvent(2.0, 0.1, 20)], [PROFILE, GaussianEvent(2.0, 0.1, 20)]):
        pld = epsilon(events, DELTA, "pld")
        assert pld - 1e-3 <= person_epsilon(events, DELTA, 1) <= pld + 0.02


def test_without_sampling_a_person_is_a_gaussian_with_their_own_sensitivity() -> None:
    # k examples move the sum by at most k clipping norms; several releases add their squares.
    events = [PROFILE, GaussianEvent(20.0, 1.0, 5)]
    for examples in (1, 2, 5, 10):
        mu = examples * math.sqrt(1 / 64 + 5 / 400)
        exact = gaussian_epsilon(mu, DELTA)
        assert exact - 1e-6 <= person_epsilon(events, DELTA, examples) <= exact + 0.02


def test_more_examples_of_one_person_never_cost_less_and_both_channels_count() -> None:
    adapter = GaussianEvent(1.5, 0.05, 20)
    alone = [person_epsilon([adapter], DELTA, examples) for examples in (1, 2, 3, 5, 10)]
    both = [person_epsilon([adapter, PROFILE], DELTA, examples) for examples in (1, 2, 3, 5, 10)]
    assert alone == sorted(set(alone))
    assert both == sorted(set(both))
    assert all(more > less for more, less in zip(both, alone, strict=True))


def test_a_person_is_promised_nothing_where_one_example_is_not() -> None:
    assert person_epsilon([], DELTA, 10) == 0.0
    assert person_epsilon([PROFILE, UNPROTECTED], DELTA, 2) == math.inf
    assert person_epsilon([GaussianEvent(0.03, 1.0, 1)], DELTA, 10) == math.inf
    for examples in (0, -1, True):
        with pytest.raises(AccountingError, match="examples"):
            person_epsilon([PROFILE], DELTA, examples)
