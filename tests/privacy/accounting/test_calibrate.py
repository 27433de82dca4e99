"""From budgets to noise: certified, close to the target, and refused where nothing fits."""

import math

import pytest

from fedmosaic.privacy.accounting.calibrate import noise_factor_for, noise_multiplier_for
from fedmosaic.privacy.accounting.epsilon import epsilon
from fedmosaic.privacy.accounting.events import GaussianEvent
from fedmosaic.protos.errors import AccountingError

DELTA = 1e-5
PROFILE = GaussianEvent(8.0, 1.0, 1)


@pytest.mark.parametrize(
    ("target", "expected"),
    [(3.0, 0.907), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1.0, 1.852), (8.0, 0.628)))],
)
def test_the_adapter_noise_for_a_total_budget_is_the_studys(target: float, expected: float) -> None:
    sigma = noise_multiplier_for(target, DELTA, [PROFILE], 0.016, 600)
    assert sigma == pytest.approx(expected, rel=0.015)
    spent = epsilon([PROFILE, GaussianEvent(sigma, 0.016, 600)], DELTA)
    assert target * 0.995 <= spent <= target


def test_the_noise_is_certified_by_prv_and_wastes_little() -> None:
    sigma = noise_multiplier_for(2.0, DELTA, [], 1.0, 5)
    assert 1.98 <= epsilon([GaussianEvent(sigma, 1.0, 5)], DELTA) <= 2.0


def test_a_factor_scales_several_releases_together() -> None:
    releases = [GaussianEvent(8.0, 1.0, 2), GaussianEvent(4.0, 1.0, 1)]
    factor = noise_factor_for(1.0, DELTA, [], releases)
    scaled = [GaussianEvent(e.noise_multiplier * factor, 1.0, e.steps) for e in releases]
    assert 0.99 <= epsilon(scaled, DELTA) <= 1.0
    assert noise_factor_for(epsilon(releases, DELTA) + 1e-3, DELTA, [], releases) == pytest.approx(
        1.0, abs=5e-3
    )


def test_what_cannot_be_reached_is_refused_with_the_reason() -> None:
    with pytest.raises(AccountingError, match=r"settled releases alone cost ε = 0\.44"):
        noise_multiplier_for(0.3, DELTA, [PROFILE], 0.016, 600)
    with pytest.raises(AccountingError, match=r"resolution is 0\.01"):
        noise_multiplier_for(0.005, DELTA, [], 1.0, 1)
    for target in (0.0, -1.0, math.nan, math.inf, 101.0):
        with pytest.raises(AccountingError, match="target ε"):
            noise_multiplier_for(target, DELTA, [], 0.016, 600)
    with pytest.raises(AccountingError, match="steps"):
        noise_multiplier_for(1.0, DELTA, [], 0.016, 0)
    with pytest.raises(AccountingError, match="no noise to scale"):
        noise_factor_for(1.0, DELTA, [PROFILE], [GaussianEvent(0.0, 1.0, 1)])


def test_full_batch_noise_beside_a_settled_release_is_the_closed_form() -> None:
    # Full-batch Gaussians add up in 1/σ²: 1/16² + 3/σ² = 1/3.731² at ε = 1, less PRV's margin of 0.01.
    sigma = noise_multiplier_for(1.0, DELTA, [GaussianEvent(16.0, 1.0, 1)], 1.0, 3)
    assert sigma == pytest.approx((3 / (3.731**-2 - 16.0**-2)) ** 0.5, rel=0.015)


def test_so_many_steps_that_no_tight_accountant_follows_are_planned_with_the_looser_bound() -> None:
    # 100,000 rounds of 20 steps, all of a small data set each: RDP has a closed form then.
    sigma = noise_multiplier_for(8.0, 0.01, [PROFILE], 1.0, 2_000_000)
    events = [PROFILE, GaussianEvent(sigma, 1.0, 2_000_000)]
    assert 7.9 < epsilon(events, 0.01, "rdp") <= 8.0, "by a tight accountant it would be more"
