"""Empirical ε: repeat a release with and without a canary, and certify how much the two differ.

The canary has the norm C of the clipping bound, so it is the worst example that the guarantee covers. Two
lower bounds of ε are certified, which must not pass the claimed upper bound. `gaussian` assumes what the
mechanism claims, Gaussian scores of one variance, and is nearly tight. `clopper_pearson` assumes nothing, and
cannot certify more than what it would give if no guess were ever wrong.

Reference: Jagielski, Ullman and Oprea 2020, "Auditing differentially private machine learning"; Nasr et al.
2023, "Tight auditing of differentially private machine learning".
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import norm

from fedmosaic.experiments.attacks.statistics import results
from fedmosaic.privacy.accounting.tradeoff import gaussian_delta

FloatArray = npt.NDArray[np.float64]

_LARGEST_EPSILON = 1e3


class CanaryScores(NamedTuple):
    """Scores of repeated releases with the canary, (n,), and without it, (m,)."""

    inside: FloatArray
    outside: FloatArray


def repeat_releases(
    release: Callable[[bool], npt.NDArray[np.floating]], direction: FloatArray, releases: int
) -> CanaryScores:
    """Release again and again, in turn with (True) and without the canary, by the code under test.

    Scores are projections on the (k,) direction, the canary's row, in units of its norm.
    """
    unit = direction / np.linalg.norm(direction)
    scores = np.array([float(release(number % 2 == 0) @ unit) for number in range(releases)])
    return CanaryScores(scores[0::2], scores[1::2])


def gaussian_mu(scores: CanaryScores, confidence: float) -> float:
    """Lower one-sided confidence bound, ≥ 0, of μ: the distance of two Gaussians of one variance over it.

    Reference: Hedges and Olkin 1985, "Statistical methods for meta-analysis", chapter 5: the variance of the
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


def gaussian_epsilon(mu: float, delta: float = results.DELTA) -> float:
    """ε at δ of N(0, 1) against N(μ, 1), from the closed form of δ(ε)."""

    def excess(epsilon: float) -> float:
        return float(gaussian_delta(mu, np.array(epsilon))) - delta

    if mu <= 0.0 or (math.isfinite(mu) and excess(0.0) <= 0.0):
        return 0.0
    if math.isinf(mu) or excess(2.0 * _LARGEST_EPSILON) > 0.0:
        return math.inf
    return float(brentq(excess, 0.0, 2.0 * _LARGEST_EPSILON, xtol=1e-12))


def epsilon_of_noise(noise_multiplier: float) -> float:
    """ε at `DELTA` of one full-batch release with this σ; ∞ for 0."""
    return gaussian_epsilon(1.0 / noise_multiplier if noise_multiplier else math.inf)


def clopper_pearson_lower_bound(scores: CanaryScores, delta: float, confidence: float) -> float:
    """ε that repeated releases certify without any assumption on their scores.

    The threshold comes from the first half of the scores and is judged on the second. The confidence is
    one-sided, for both error rates together.
    """
    inside, outside = scores.inside.size // 2, scores.outside.size // 2
    first = CanaryScores(scores.inside[:inside], scores.outside[:outside])
    second = CanaryScores(scores.inside[inside:], scores.outside[outside:])
    candidates = np.quantile(np.concatenate([first.inside, first.outside]), np.linspace(0.0, 1.0, 41))
    threshold = max(candidates.tolist(), key=lambda each: _certified(first, each, delta, confidence))
    return max(0.0, _certified(second, threshold, delta, confidence))


def clopper_pearson_ceiling(releases: int, delta: float, confidence: float) -> float:
    """The most that this number of releases can certify, reached if no guess is wrong."""
    judged = releases // 4
    perfect = CanaryScores(np.ones(judged), np.zeros(judged))
    return max(0.0, _certified(perfect, 0.5, delta, confidence))


def audit_figures(scores: CanaryScores, claimed_epsilon: float) -> tuple[results.Figure, results.Figure]:
    """Both lower bounds as figures, with the claimed ε at `DELTA` as their bound.

    `value` is the 95 % lower bound; `low` is the bound at the confidence of the alarm, which decides
    whether the claim is broken; `high` is the most that the method could have certified.
    """

    def figure(name: str, certified: Callable[[float], float], most: float) -> results.Figure:
        levels = (results.CONFIDENCE, 1.0 - results.ALARM_LEVEL)
        shown, sure = (min(certified(level), _LARGEST_EPSILON) for level in levels)
        low, high = min(sure, shown), max(shown, min(most, _LARGEST_EPSILON))
        broken = sure > claimed_epsilon * (1.0 + 1e-9)
        return results.Figure(
            name=name, value=shown, low=low, high=high, bound=claimed_epsilon, broken=broken
        )

    most = clopper_pearson_ceiling(
        scores.inside.size + scores.outside.size, results.DELTA, results.CONFIDENCE
    )
    gaussian = figure(
        "certified ε, Gaussian scores", lambda level: gaussian_epsilon(gaussian_mu(scores, level)), math.inf
    )
    return gaussian, figure(
        "certified ε, no assumption", partial(clopper_pearson_lower_bound, scores, results.DELTA), most
    )


def _certified(scores: CanaryScores, threshold: float, delta: float, confidence: float) -> float:
    true = float(np.count_nonzero(scores.inside > threshold))
    false = float(np.count_nonzero(scores.outside > threshold))
    # Two one-sided bounds at (1 - confidence)/2 each are the two ends of two-sided ones at `confidence`.
    true_low, _ = results.clopper_pearson(true, scores.inside.size, confidence)
    _, false_high = results.clopper_pearson(false, scores.outside.size, confidence)
    options = [-math.inf]
    if true_low > delta and false_high > 0.0:
        options.append(math.log((true_low - delta) / false_high))
    if 1.0 - false_high > delta and 1.0 - true_low > 0.0:
        options.append(math.log((1.0 - false_high - delta) / (1.0 - true_low)))
    return max(options)
