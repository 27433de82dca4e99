"""One-run audit: many canaries in one training run, each included by a fair coin of its own.

The auditor guesses for some canaries whether they were included and abstains on the others. If the run is
(ε, δ)-private, guesses are hardly better than randomised response: with q = e^ε / (e^ε + 1),

    P[at least v of r guesses right] ≤ P[X ≥ v] + 2 m δ max_{1≤i≤v} P[v > X ≥ v - i] / i,  X ~ Binomial(r, q),

so a large number of right guesses certifies a lower bound of ε. The bound is written from the theorem, and
tests hold it against the truth by simulation: public implementations of audits have certified far more
than was there.

Reference:
    Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run" (arXiv:2305.08846),
    theorem 5.2.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from fedmosaic.experiments.attacks.statistics.results import ALARM_LEVEL, CONFIDENCE, Figure

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

GUESSED_SHARES = (0.02, 0.05, 0.1, 0.3)
"""Shares of the canaries that are guessed, fixed before the run; every one of them costs confidence."""

_LARGEST_EPSILON = 50.0


def one_run_p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Upper bound on the chance of so many right guesses against an (ε, δ)-private run.

    Args:
        canaries: m, each included with probability 1/2.
        guesses: r ≤ m, the others are abstentions.
        right: v ≤ r.
        epsilon: ε ≥ 0 of the null hypothesis.
        delta: δ in [0, 1] of it.

    Returns:
        The bound, at most 1.

    Raises:
        ValueError: the counts contradict each other.
    """
    if not 0 <= right <= guesses <= canaries or epsilon < 0.0 or not 0.0 <= delta <= 1.0:
        raise ValueError(
            f"{right} right of {guesses} guesses on {canaries} canaries is no outcome of an audit"
        )
    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, accuracy))
    if right == 0 or delta == 0.0:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, accuracy))
    slope = float(np.max(below / np.arange(1, right + 1)))
    return min(1.0, tail + 2.0 * canaries * delta * slope)


def one_run_epsilon(canaries: int, guesses: int, right: int, delta: float, confidence: float) -> float:
    """Largest ε that so many right guesses refute.

    Args:
        canaries: m.
        guesses: r, fixed in advance.
        right: v.
        delta: δ.
        confidence: one-sided.

    Returns:
        Lower confidence bound of ε at δ; 0 if nothing can be said.
    """
    level = 1.0 - confidence
    if one_run_p_value(canaries, guesses, right, 0.0, delta) > level:
        return 0.0
    low, high = 0.0, _LARGEST_EPSILON
    for _ in range(30):
        middle = (low + high) / 2.0
        refuted = one_run_p_value(canaries, guesses, right, middle, delta) <= level
        low, high = (middle, high) if refuted else (low, middle)
    return low


def right_guesses(scores: FloatArray, included: BoolArray, guesses: int) -> int:
    """Guess "in" for the highest scores and "out" for the lowest, half of the guesses each, and count."""
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(np.count_nonzero(~included[order[:half]]) + np.count_nonzero(included[order[-half:]]))


def one_run_lower_bound(
    scores: FloatArray,
    included: BoolArray,
    delta: float,
    confidence: float,
    shares: Sequence[float] = GUESSED_SHARES,
) -> float:
    """The best certified ε over a few numbers of guesses, each at its part of the level.

    Args:
        scores: (m,) larger where a canary looks included.
        included: (m,) the coins.
        delta: δ.
        confidence: one-sided, of the result.
        shares: shares of canaries to guess, fixed before the run.

    Returns:
        Lower confidence bound of ε.
    """
    each = 1.0 - (1.0 - confidence) / len(shares)
    found = [0.0]
    for share in shares:
        guesses = 2 * max(1, round(share * scores.size / 2.0))
        right = right_guesses(scores, included, guesses)
        found.append(one_run_epsilon(scores.size, guesses, right, delta, each))
    return max(found)


def one_run_ceiling(canaries: int, delta: float, confidence: float) -> float:
    """The most that so many canaries can certify, reached if every guess is right."""
    perfect = np.arange(canaries, dtype=np.float64)
    included = perfect >= canaries // 2
    return one_run_lower_bound(perfect, included, delta, confidence)


def one_run_figure(
    scores: FloatArray, included: BoolArray, claimed_epsilon: Callable[[float], float], delta: float
) -> Figure:
    """The certified ε with the claimed one as its bound; see `audit_figures` for low and high.

    Args:
        scores: (m,) larger where a canary looks included.
        included: (m,) the coins.
        claimed_epsilon: the claimed ε at any δ. The theorem's δ term is as large as 2mδ, more than the
            level of an alarm, so the alarm compares both at a far smaller δ.
        delta: δ of what is shown.
    """
    strict = ALARM_LEVEL / (len(GUESSED_SHARES) * 100.0 * scores.size)
    shown = one_run_lower_bound(scores, included, delta, CONFIDENCE)
    sure = one_run_lower_bound(scores, included, strict, 1.0 - ALARM_LEVEL)
    most = one_run_ceiling(scores.size, delta, CONFIDENCE)
    return Figure(
        name="certified ε, one run",
        value=shown,
        low=min(shown, sure),
        high=max(shown, most),
        bound=claimed_epsilon(delta),
        broken=sure > claimed_epsilon(strict) * (1.0 + 1e-9),
    )
