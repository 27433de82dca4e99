"""What an attacker can at most achieve, from the whole privacy curve and not from ε alone.

(ε, δ)-DP at one point overstates the risk: ε = 1 allows an advantage of 0.46, a Gaussian release with that ε
at δ = 1e-5 allows 0.11. The attacker knows everything but whether one example took part, and sees every
release.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedmosaic.privacy.accounting.epsilon import LARGEST_TIGHT_EPSILON, SMALLEST_NOISE_MULTIPLIER, epsilon
from fedmosaic.privacy.accounting.events import AttackBounds, GaussianEvent, merge_events
from fedmosaic.protos.errors import AccountingError

FloatArray = npt.NDArray[np.float64]

_CURVE_POINTS = 1201
_CURVE_DELTA = 1e-9
# dp-accounting sums up to a million cells in doubles; this covers what cancels.
_ROUNDING = 1e-11


@dataclass(frozen=True, slots=True)
class PrivacyCurve:
    """δ(ε) of a composition on a grid of ε that reaches to both sides of 0.

    `epsilons` are (m,) ascending and symmetric around 0; `deltas` (m,) upper bounds of δ in [0, 1], the
    larger of both neighbour directions.
    """

    epsilons: FloatArray
    deltas: FloatArray

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Upper bound of the true positive rate of any membership test at this false positive rate.

        Reference:
            Kairouz, Oh and Viswanath 2015, theorem 2.1, at every ε; Dong, Roth and Su 2022, proposition 2.12.
        """
        _check_rate(false_positive_rate)
        with np.errstate(over="ignore"):
            direct = np.exp(self.epsilons) * false_positive_rate + self.deltas
            # The same inequality for the complement of the test, solved for the true positive rate.
            dual = 1.0 - np.exp(-self.epsilons) * (1.0 - false_positive_rate - self.deltas)
        bound = min(1.0, float(direct.min()), float(dual.min()))
        return max(false_positive_rate, bound)

    @property
    def advantage(self) -> float:
        """Largest TPR - FPR of any membership test: the total variation distance δ(0)."""
        return float(self.deltas[np.searchsorted(self.epsilons, 0.0)])


UNBOUNDED = AttackBounds(
    gaussian_mu=math.inf,
    advantage=1.0,
    true_positive_rate_at_1_percent=1.0,
    true_positive_rate_at_0_1_percent=1.0,
)
"""Nothing is promised: the attacker may succeed always."""


def attack_bounds(events: Iterable[GaussianEvent], delta: float) -> AttackBounds:
    """Bounds on membership attacks against all events together; `gaussian_mu` holds down to this δ.

    `UNBOUNDED` when a step has no noise or subsampled releases have ε above 100.
    """
    epsilon((), delta)
    merged = merge_events(events)
    if not merged:
        return _gaussian_bounds(0.0)
    if any(event.noise_multiplier < SMALLEST_NOISE_MULTIPLIER for event in merged):
        return UNBOUNDED
    if all(event.sampling_rate == 1.0 for event in merged):
        return _gaussian_bounds(math.sqrt(sum(event.steps / event.noise_multiplier**2 for event in merged)))
    if epsilon(merged, delta, "rdp") > LARGEST_TIGHT_EPSILON:
        return UNBOUNDED
    return _bounds_from_curve(merged, float(delta))


def gaussian_true_positive_rate(mu: float, false_positive_rate: float) -> float:
    """Trade-off curve of the Gaussian mechanism, the largest true positive rate: Φ(Φ⁻¹(FPR) + μ).

    μ ≥ 0 is the distance of the two hypotheses in standard deviations, 1/σ for one full-batch release.

    Reference:
        Dong, Roth and Su 2022, "Gaussian differential privacy", equation 6.
    """
    from scipy.special import ndtr, ndtri

    _check_rate(false_positive_rate)
    return float(ndtr(ndtri(false_positive_rate) + mu))


def gaussian_delta(mu: FloatArray | float, epsilons: FloatArray) -> FloatArray:
    """δ(ε) of the Gaussian mechanism, for one μ > 0 or one per ε: Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2).

    Reference:
        Balle and Wang 2018 (arXiv:1805.06530), theorem 8.
    """
    from scipy.special import log_ndtr, ndtr

    first = ndtr(-epsilons / mu + mu / 2)
    second = np.exp(epsilons + log_ndtr(-epsilons / mu - mu / 2))
    return np.asarray(np.maximum(0.0, first - second), dtype=np.float64)


def privacy_curve(events: Iterable[GaussianEvent]) -> PrivacyCurve:
    """δ(ε) of all events together, wide enough that δ at its ends is below 1e-8; for ε up to about 100."""
    merged = merge_events(events)
    if not merged or any(event.noise_multiplier < SMALLEST_NOISE_MULTIPLIER for event in merged):
        raise AccountingError("a privacy curve needs at least one step, and σ of at least 0.01 in every step")
    return _curve(merged)


@lru_cache(maxsize=256)
def _curve(events: tuple[GaussianEvent, ...]) -> PrivacyCurve:
    from fedmosaic.privacy.accounting import pld

    reach = epsilon(events, _CURVE_DELTA, "rdp") + 0.01
    distribution = pld.compose(events, pld.discretization_interval(events, reach))
    # Denser near 0, where the advantage and the usual rates are decided.
    side = reach * np.linspace(0.0, 1.0, _CURVE_POINTS // 2 + 1)[1:] ** 2
    epsilons = np.concatenate([-side[::-1], [0.0], side])
    return PrivacyCurve(epsilons, np.clip(pld.deltas(distribution, epsilons) + _ROUNDING, 0.0, 1.0))


@lru_cache(maxsize=256)
def _bounds_from_curve(events: tuple[GaussianEvent, ...], delta: float) -> AttackBounds:
    curve = _curve(events)
    return AttackBounds(
        gaussian_mu=_equivalent_mu(curve, delta),
        advantage=curve.advantage,
        true_positive_rate_at_1_percent=curve.true_positive_rate(0.01),
        true_positive_rate_at_0_1_percent=curve.true_positive_rate(0.001),
    )


def _gaussian_bounds(mu: float) -> AttackBounds:
    from scipy.special import ndtr

    return AttackBounds(
        gaussian_mu=mu,
        advantage=float(2.0 * ndtr(mu / 2.0) - 1.0),
        true_positive_rate_at_1_percent=gaussian_true_positive_rate(mu, 0.01),
        true_positive_rate_at_0_1_percent=gaussian_true_positive_rate(mu, 0.001),
    )


def _equivalent_mu(curve: PrivacyCurve, delta: float) -> float:
    epsilons, deltas = curve.epsilons[curve.epsilons >= 0.0], curve.deltas[curve.epsilons >= 0.0]
    # One point more than reach δ, so that the last stretch down to δ is covered as well.
    count = min(epsilons.size, int(np.count_nonzero(deltas >= delta)) + 1)
    epsilons, deltas = epsilons[:count], deltas[:count]
    low, high = np.full(epsilons.shape, 1e-6), np.full(epsilons.shape, 1e3)
    # δ of a Gaussian grows with μ at every ε, so each point is solved on its own and the worst counts.
    for _ in range(80):
        middle = np.sqrt(low * high)
        enough = gaussian_delta(middle, epsilons) >= deltas
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return float(high.max())


def _check_rate(rate: float) -> None:
    if not 0.0 <= rate <= 1.0:
        raise AccountingError(f"false positive rate is {rate}; it must be in [0, 1]")
