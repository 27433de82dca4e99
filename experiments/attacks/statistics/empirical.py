"""Empirical ε: repeat a release with and without a canary, and certify how much the two differ.

The canary has the norm C of the clipping bound, so it is the worst example that the guarantee covers.
Two lower bounds of ε are certified. `gaussian` assumes what the mechanism claims, Gaussian scores of one
variance, and is nearly tight. `clopper_pearson` assumes nothing, and cannot certify more than its ceiling,
which is what it would give if no guess were ever wrong.

A lower bound stands beside the claimed upper bound and must not pass it.

Reference:
    Jagielski, Ullman and Oprea 2020, "Auditing differentially private machine learning"; Nasr et al. 2023,
    "Tight auditing of differentially private machine learning".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from fedmosaic.experiments.attacks.statistics.results import ALARM_LEVEL, CONFIDENCE, Figure
from fedmosaic.experiments.attacks.statistics.roc import clopper_pearson
from fedmosaic.privacy.accounting.tradeoff import gaussian_delta

FloatArray = npt.NDArray[np.float64]

_LARGEST_EPSILON = 1e3


@dataclass(frozen=True, eq=False)
class CanaryScores:
    """Scores of repeated releases.

    Attributes:
        inside: (n,) of releases with the canary.
        outside: (m,) of releases without it.
    """

    inside: FloatArray
    outside: FloatArray


def repeat_releases(
    release: Callable[[bool], npt.NDArray[np.floating]], direction: FloatArray, releases: int
) -> CanaryScores:
    """Release again and again, in turn with and without the canary.

    Args:
        release: makes one release through the code under test; True puts the canary in.
        direction: (k,) what to correlate releases with, the canary's row.
        releases: number of releases, half of them with the canary.

    Returns:
        Scores in units of the direction's norm.
    """
    unit = direction / np.linalg.norm(direction)
    scores = np.array([float(release(number % 2 == 0) @ unit) for number in range(releases)])
    return CanaryScores(scores[0::2], scores[1::2])


def gaussian_mu(scores: CanaryScores, confidence: float) -> float:
    """Lower confidence bound of μ, the distance of two Gaussians of one variance in standard deviations.

    Args:
        scores: at least 10 on each side.
        confidence: one-sided.

    Returns:
        The bound, at least 0.

    Reference:
        Hedges and Olkin 1985, "Statistical methods for meta-analysis", chapter 5: the variance of the
        standardised mean difference.
    """
    inside, outside = scores.inside, scores.outside
    freedom = inside.size + outside.size - 2
    pooled = (inside.var(ddof=1) * (inside.size - 1) + outside.var(ddof=1) * (outside.size - 1)) / freedom
    if pooled <= 0.0:
        return math.inf if inside.mean() > outside.mean() else 0.0
    distance = float(inside.mean() - outside.mean()) / math.sqrt(pooled)
    variance = 1.0 / inside.size + 1.0 / outside.size + distance**2 / (2.0 * freedom)
    return max(0.0, distance - float(norm.ppf(confidence)) * math.sqrt(variance))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """ε at δ of N(0, 1) against N(μ, 1), by bisection of the closed form."""
    if math.isinf(mu):
        return math.inf
    if mu <= 0.0 or float(gaussian_delta(mu, np.array(0.0))) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while float(gaussian_delta(mu, np.array(high))) > delta:
        if high > _LARGEST_EPSILON:
            return math.inf
        high *= 2.0
    for _ in range(80):
        middle = (low + high) / 2.0
        low, high = (middle, high) if float(gaussian_delta(mu, np.array(middle))) > delta else (low, middle)
    return low


def gaussian_lower_bound(scores: CanaryScores, delta: float, confidence: float) -> float:
    """ε that repeated releases certify if their scores are Gaussian."""
    return gaussian_epsilon(gaussian_mu(scores, confidence), delta)


def clopper_pearson_lower_bound(scores: CanaryScores, delta: float, confidence: float) -> float:
    """ε that repeated releases certify without any assumption on their scores.

    The threshold comes from the first half of the scores and is judged on the second.

    Args:
        scores: at least 4 on each side.
        delta: δ.
        confidence: one-sided, for both error rates together.

    Returns:
        The certified ε, at least 0.
    """
    first, second = _halves(scores)
    best, threshold = -math.inf, math.inf
    for candidate in np.quantile(np.concatenate([first.inside, first.outside]), np.linspace(0.0, 1.0, 41)):
        value = _certified(first, float(candidate), delta, confidence)
        if value > best:
            best, threshold = value, float(candidate)
    return max(0.0, _certified(second, threshold, delta, confidence))


def clopper_pearson_ceiling(releases: int, delta: float, confidence: float) -> float:
    """The most that this number of releases can certify, reached if no guess is wrong."""
    judged = releases // 4
    perfect = CanaryScores(np.ones(judged), np.zeros(judged))
    return max(0.0, _certified(perfect, 0.5, delta, confidence))


def audit_figures(scores: CanaryScores, claimed_epsilon: float, delta: float) -> tuple[Figure, ...]:
    """Both lower bounds as figures, with the claimed ε as their bound.

    `value` is the 95 % lower bound; `low` is the bound at the confidence of the alarm, which decides
    whether the claim is broken; `high` is the most that the method could have certified.
    """
    releases = scores.inside.size + scores.outside.size
    ceiling = clopper_pearson_ceiling(releases, delta, CONFIDENCE)
    methods = (
        ("certified ε, Gaussian scores", gaussian_lower_bound, None),
        ("certified ε, no assumption", clopper_pearson_lower_bound, ceiling),
    )
    return tuple(
        lower_bound_figure(
            name,
            method(scores, delta, CONFIDENCE),
            method(scores, delta, 1.0 - ALARM_LEVEL),
            claimed_epsilon,
            most,
        )
        for name, method, most in methods
    )


def lower_bound_figure(
    name: str, shown: float, sure: float, claimed_epsilon: float, most: float | None
) -> Figure:
    """A certified ε as a figure; see `audit_figures`."""
    shown, sure = min(shown, _LARGEST_EPSILON), min(sure, _LARGEST_EPSILON)
    return Figure(
        name=name,
        value=shown,
        low=min(sure, shown),
        high=max(shown, min(most, _LARGEST_EPSILON)) if most is not None else _LARGEST_EPSILON,
        bound=claimed_epsilon,
        broken=sure > claimed_epsilon * (1.0 + 1e-9),
    )


def _halves(scores: CanaryScores) -> tuple[CanaryScores, CanaryScores]:
    inside, outside = scores.inside.size // 2, scores.outside.size // 2
    return (
        CanaryScores(scores.inside[:inside], scores.outside[:outside]),
        CanaryScores(scores.inside[inside:], scores.outside[outside:]),
    )


def _certified(scores: CanaryScores, threshold: float, delta: float, confidence: float) -> float:
    true = float(np.count_nonzero(scores.inside > threshold))
    false = float(np.count_nonzero(scores.outside > threshold))
    # Two one-sided bounds at (1 - confidence)/2 each are the two ends of two-sided ones at `confidence`.
    true_low, _ = clopper_pearson(true, scores.inside.size, confidence)
    _, false_high = clopper_pearson(false, scores.outside.size, confidence)
    options = [-math.inf]
    if true_low > delta and false_high > 0.0:
        options.append(math.log((true_low - delta) / false_high))
    if 1.0 - false_high > delta and 1.0 - true_low > 0.0:
        options.append(math.log((1.0 - false_high - delta) / (1.0 - true_low)))
    return max(options)
