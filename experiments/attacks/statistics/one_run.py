"""One-run audit against a whole trade-off curve: many canaries in one training run, each by a fair coin.

Of m canaries, each included by a fair coin, r are guessed. Let p_c be the chance of exactly c right
guesses, and F(x) the largest true positive rate at the false positive rate x that the claim allows. Take a
random canary. With its coin turned, a right guess on it is a wrong one and there is one right guess less,
so for every c

    Σ_{i≥c} (i/m) p_i  ≤  F( Σ_{i≥c} ((r-i+1)/m) p_{i-1} ),

because F bounds each canary by itself and is concave. In terms of the tails s_c = Σ_{i≥c} p_i both sums have
coefficients of one sign:

    (r-c+1) s_{c-1}  ≥  m F⁻¹( (c s_c + s_{c+1} + … + s_r)/m ) + s_c + … + s_r,        s_{c-1} ≥ s_c.

So the least tails that go with a given s_v, the chance of v or more right guesses, follow one after the
other, from zeros above v downwards, and they grow with s_v. If s_v = level forces s_0 above 1, then v or more
right guesses have a chance below the level under the claim, and v right guesses refute it. Nothing else is
assumed: no δ, no shape.

To name an ε, the claim is embedded in a family of claims with the noise s times as large. The least s that is
refuted is certified: the release is not as private as that member of the family. The ε of it is a lower bound
for a release whose own curve belongs to the family, as the curve of a Gaussian mechanism with another noise
does.

Reference:
    Mahloujifar, Melis and Chaudhuri 2024, "Auditing f-differential privacy in one run" (arXiv:2410.22235).
    The argument above is a proof of the part that is used; tests hold it against a linear programme.
"""

import math
from collections.abc import Callable

import numpy as np

from fedmosaic.experiments.attacks.statistics.results import ALARM_LEVEL, CONFIDENCE, Figure
from fedmosaic.experiments.attacks.statistics.roc import BoolArray, Ceiling, FloatArray

Family = Callable[[float], Ceiling]
"""Maps a factor s > 0 on the noise to the trade-off curve of the claim with s times the noise."""

GUESSED_SHARES = (0.1, 0.2, 0.4)
"""Shares of the canaries that are guessed, fixed before the run; every one of them costs confidence."""

_SMALLEST_FACTOR, _LARGEST_FACTOR = 2.0**-4, 2.0**10


def right_guesses(scores: FloatArray, included: BoolArray, guesses: int) -> int:
    """Guess "in" for the highest scores and "out" for the lowest, half of the guesses each, and count."""
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(np.count_nonzero(~included[order[:half]]) + np.count_nonzero(included[order[-half:]]))


def least_total(canaries: int, guesses: int, right: int, chance: float, ceiling: Ceiling) -> float:
    """Least total probability s_0 that goes with a chance of v or more right guesses, in [0, 1].

    Of m canaries, each included with probability 1/2, r are guessed, a number fixed in advance, and v right.
    Above 1 is impossible; the first tail above 1 is returned then. `ValueError` for counts that contradict
    each other.
    """
    if not 0 <= right <= guesses <= canaries or not 0.0 <= chance <= 1.0:
        raise ValueError(
            f"{right} right of {guesses} guesses on {canaries} canaries is no outcome of an audit"
        )
    # The tail s_c, and the sum of all tails above c; a tail above v is zero.
    tail, above = chance, 0.0
    for count in range(right, 0, -1):
        hit = (count * tail + above) / canaries
        above += tail
        needed = (canaries * ceiling.false_positive_rate(min(1.0, hit)) + above) / (guesses - count + 1)
        if needed <= tail:
            # Nothing forces this tail up, so nothing forces the next one, which has more room still.
            return tail
        tail = needed
        if tail > 1.0:
            return tail
    return tail


def refutes(scores: FloatArray, included: BoolArray, ceiling: Ceiling, level: float) -> bool:
    """Whether the (m,) scores of one run refute a claim, which a true one suffers with chance `level`."""
    each = level / len(GUESSED_SHARES)
    for share in GUESSED_SHARES:
        guesses = 2 * max(1, min(scores.size // 2, round(share * scores.size / 2.0)))
        right = right_guesses(scores, included, guesses)
        if least_total(scores.size, guesses, right, each, ceiling) > 1.0:
            return True
    return False


def refuted_factor(scores: FloatArray, included: BoolArray, family: Family, level: float) -> float:
    """The least factor on the noise whose claim the scores refute.

    To a relative accuracy of 5 %, rounded up; infinity if no claim is refuted. It is below that of the true
    claim with chance `level`.
    """
    low, high, factor = 0.0, math.inf, 1.0
    while high == math.inf or low == 0.0:
        if refutes(scores, included, family(factor), level):
            high = factor
            if factor <= _SMALLEST_FACTOR:
                return high
            factor /= 2.0
        else:
            low = factor
            if factor >= _LARGEST_FACTOR:
                return math.inf
            factor *= 2.0
    while high > 1.05 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refutes(scores, included, family(middle), level) else (middle, high)
    return high


def one_run_figure(
    scores: FloatArray, included: BoolArray, family: Family, epsilon_at: Callable[[float], float]
) -> Figure:
    """The ε that one run certifies, with the claimed one as its bound.

    `value` is certified at 95 %, `low` at the confidence of the alarm, which asks whether the claimed curve
    is refuted and assumes nothing. `family` and `epsilon_at` give curve and ε of the claim with a factor on
    its noise.
    """
    factors = [refuted_factor(scores, included, family, level) for level in (1.0 - CONFIDENCE, ALARM_LEVEL)]
    shown, sure = (0.0 if math.isinf(factor) else epsilon_at(factor) for factor in factors)
    name, low, high = "certified ε, one run, f-DP", min(shown, sure), max(shown, 1e3)
    broken = refutes(scores, included, family(1.0), ALARM_LEVEL)
    return Figure(name=name, value=shown, low=low, high=high, bound=epsilon_at(1.0), broken=broken)
