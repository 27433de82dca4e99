"""How well scores tell members from others, with intervals, against the ceiling that a guarantee sets.

Scores of one release share its noise, so they are not independent: variances are taken over releases.
Rates are shown for the threshold that has exactly the wanted false positive rate on all scores. Whether a
bound is broken is decided otherwise: a threshold is chosen on one half of the releases and judged on the
other, where both rates have exact intervals.

Ceilings hold for pooled scores too: the trade-off curve of a guarantee is concave, so rates averaged
over candidates and over what else was in the data keep below it.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, ndtri
from scipy.stats import norm

from fedmosaic.experiments.attacks.statistics import results
from fedmosaic.experiments.scenario.metrics import placements
from fedmosaic.privacy.accounting.epsilon import SMALLEST_NOISE_MULTIPLIER
from fedmosaic.privacy.accounting.events import GaussianEvent, merge_events
from fedmosaic.privacy.accounting.tradeoff import PrivacyCurve, gaussian_true_positive_rate, privacy_curve

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

RATES = (0.01, 0.001)
"""False positive rates at which the true positive rate is reported."""


@dataclass(frozen=True)
class Ceiling:
    """The best that any membership test can do against a guarantee; 1 where nothing is promised."""

    mu: float | None = None
    """μ of Gaussian differential privacy, exact for full-batch Gaussian releases."""
    curve: PrivacyCurve | None = None
    """δ(ε) of any other composition."""

    @classmethod
    def of_noise(cls, sigma: float) -> "Ceiling":
        """That of one full-batch release with this noise multiplier; 0 promises nothing."""
        return cls(mu=1.0 / sigma) if sigma else cls()

    @property
    def promises(self) -> bool:
        """Whether there is a ceiling below 1 at all."""
        return self.mu is not None or self.curve is not None

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """Largest true positive rate at a false positive rate in [0, 1]."""
        if self.mu is not None:
            return gaussian_true_positive_rate(self.mu, false_positive_rate)
        if self.curve is not None:
            return self.curve.true_positive_rate(false_positive_rate)
        return 1.0

    def false_positive_rate(self, true_positive_rate: float) -> float:
        """Smallest false positive rate at which a true positive rate in [0, 1] can be reached."""
        if self.mu is not None:
            return float(ndtr(ndtri(true_positive_rate) - self.mu))
        if self.curve is None:
            return 0.0
        # Each line of `PrivacyCurve.true_positive_rate`, solved for the false positive rate.
        with np.errstate(over="ignore", invalid="ignore"):
            direct = (true_positive_rate - self.curve.deltas) * np.exp(-self.curve.epsilons)
            dual = 1.0 - self.curve.deltas - np.exp(self.curve.epsilons) * (1.0 - true_positive_rate)
        return min(true_positive_rate, max(0.0, float(direct.max()), float(dual.max())))

    @property
    def area(self) -> float:
        """Largest area under the ROC curve."""
        if self.mu is not None:
            return float(ndtr(self.mu / math.sqrt(2.0)))
        if self.curve is None:
            return 1.0
        rates = np.concatenate([[0.0], np.geomspace(1e-6, 1.0, 400)])
        heights = np.array([self.curve.true_positive_rate(float(rate)) for rate in rates])
        # Right ends of a rising curve: an upper sum.
        return float(np.sum(np.diff(rates) * heights[1:]))


def ceiling_of(events: Iterable[GaussianEvent]) -> Ceiling:
    """Ceiling of all releases together; one that promises nothing if a release has no noise."""
    merged = merge_events(events)
    if not merged:
        return Ceiling(mu=0.0)
    if any(event.noise_multiplier < SMALLEST_NOISE_MULTIPLIER for event in merged):
        return Ceiling()
    if all(event.sampling_rate == 1.0 for event in merged):
        return Ceiling(mu=math.sqrt(sum(event.steps / event.noise_multiplier**2 for event in merged)))
    return Ceiling(curve=privacy_curve(merged))


def membership_figures(
    scores: FloatArray, members: BoolArray, ceiling: Ceiling, releases: IntArray | None = None
) -> tuple[results.Figure, ...]:
    """AUC and true positive rates at fixed false positive rates, of (n,) scores.

    `releases` says which one a score belongs to; None if every score has noise of its own. A rate is left out
    where too few scores of non-members, or too few releases, are behind it. `ValueError` for NaN, or without
    members or others.
    """
    if np.isnan(scores).any() or not members.any() or members.all():
        raise ValueError("scores must not be NaN, and there must be members and others")
    groups = np.arange(scores.size) if releases is None else releases
    value, error = area_with_error(scores, members, groups)
    reach = float(norm.ppf(0.5 + results.CONFIDENCE / 2.0)) * error
    bound = ceiling.area if ceiling.promises else None
    broken = bound is not None and value - float(norm.isf(results.ALARM_LEVEL)) * error > bound + 1e-9
    low, high = max(0.0, value - reach), min(1.0, value + reach)
    area = results.Figure(name="AUC", value=value, low=low, high=high, bound=bound, broken=broken)
    rates = (_rate_figure(scores, members, groups, ceiling, rate) for rate in RATES)
    return (area, *(figure for figure in rates if figure is not None))


def area_with_error(scores: FloatArray, members: BoolArray, groups: IntArray) -> tuple[float, float]:
    """Area under the ROC curve and its standard error over groups of dependent scores.

    Reference: Obuchowski 1997, "Nonparametric analysis of clustered ROC curve data", Biometrics 53.
    """
    won = placements(scores[members], scores[~members])
    lost = 1.0 - placements(scores[~members], scores[members])
    area = float(won.mean())
    influence = np.zeros(scores.size)
    influence[members] = (won - area) / won.size
    influence[~members] = (lost - area) / lost.size
    return area, math.sqrt(_clustered_variance(influence, groups))


def roc_points(scores: FloatArray, members: BoolArray, count: int = 120) -> tuple[results.CurvePoint, ...]:
    """The empirical ROC curve at false positive rates spread over the logarithmic scale."""
    outside = np.sort(scores[~members])[::-1]
    inside = np.sort(scores[members])
    ranks = np.unique(np.round(np.geomspace(1, outside.size, count)).astype(int)) - 1
    points = {1.0: 1.0}
    for threshold in outside[ranks]:
        false = float(np.count_nonzero(outside > threshold)) / outside.size
        points[false] = 1.0 - float(np.searchsorted(inside, threshold, side="right")) / inside.size
    return tuple(
        results.CurvePoint(false_positive_rate=f, true_positive_rate=t) for f, t in sorted(points.items())
    )


def rate_interval(
    hits: BoolArray, groups: IntArray, confidence: float, *, cautious: bool = False
) -> tuple[float, float]:
    """Clopper-Pearson interval of a share, with the effective number of independent observations.

    Groups say which of n ≥ 1 outcomes may depend on each other. Where all outcomes agree, which tells nothing
    of their dependence, a cautious interval counts groups only.

    Reference: Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of
    positive counts estimated from survey data", Survey Methodology 24.
    """
    share, size = float(hits.mean()), float(hits.size)
    if 0.0 < share < 1.0:
        variance = _clustered_variance((hits - share) / hits.size, groups)
        if variance > 0.0:
            size = min(size, max(1.0, share * (1.0 - share) / variance))
    elif cautious:
        size = float(np.unique(groups).size)
    return results.clopper_pearson(share * size, size, confidence)


def _clustered_variance(influence: FloatArray, groups: IntArray) -> float:
    """Variance of a sum of influences of which those of one group depend on each other."""
    _, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, weights=influence)
    return sums.size / max(1, sums.size - 1) * float(np.sum(sums**2))


def _rate_figure(
    scores: FloatArray, members: BoolArray, groups: IntArray, ceiling: Ceiling, rate: float
) -> results.Figure | None:
    _, index = np.unique(groups, return_inverse=True)
    judged = index % 2 == 1
    reference = np.sort(scores[~judged & ~members])[::-1]
    if reference.size * rate < 1.0 or not (judged & members).any() or not (judged & ~members).any():
        return None
    threshold = reference[int(reference.size * rate)]
    hits, false = scores[judged & members] > threshold, scores[judged & ~members] > threshold
    hit_groups, false_groups = groups[judged & members], groups[judged & ~members]
    bound = ceiling.true_positive_rate(rate) if ceiling.promises else None
    # Both rates are uncertain; each gets half of the level, on one side.
    surely, _ = rate_interval(hits, hit_groups, 1.0 - results.ALARM_LEVEL, cautious=True)
    _, at_most = rate_interval(false, false_groups, 1.0 - results.ALARM_LEVEL, cautious=True)
    broken = bound is not None and surely > ceiling.true_positive_rate(at_most) + 1e-9
    value, low, high = _rate_estimate(scores, members, groups, rate)
    # Where all members, or none, are above every threshold of this kind, it does not matter which one it is.
    if not broken and 0.0 < value < 1.0:
        outside, of_release = scores[~members], groups[~members]
        highest = np.argsort(-outside, kind="stable")[: max(1, int(outside.size * rate))]
        # With few releases behind the false positives, one draw of noise decides the rate.
        if np.unique(of_release[highest]).size < 20:
            return None
    name = f"TPR at {rate:.1%} FPR".replace(".0%", " %").replace("0.1%", "0.1 %")
    return results.Figure(name=name, value=value, low=low, high=high, bound=bound, broken=broken)


def _rate_estimate(
    scores: FloatArray, members: BoolArray, groups: IntArray, rate: float
) -> tuple[float, float, float]:
    """True positive rate at exactly this false positive rate on all scores, and its interval.

    The threshold is an estimate too, so the interval comes from leaving out a block of releases at a time.
    """
    _, index = np.unique(groups, return_inverse=True)
    value = _true_positive_rate(scores, members, rate)
    blocks = min(20, int(index.max()) + 1)
    left_out = [
        _true_positive_rate(scores[index % blocks != b], members[index % blocks != b], rate)
        for b in range(blocks)
    ]
    error = math.sqrt((blocks - 1) * float(np.var(left_out)))
    if error == 0.0:
        hits = np.full(int(members.sum()), value > 0.5)
        return value, *rate_interval(hits, groups[members], results.CONFIDENCE)
    reach = float(norm.ppf(0.5 + results.CONFIDENCE / 2.0)) * error
    return value, max(0.0, value - reach), min(1.0, value + reach)


def _true_positive_rate(scores: FloatArray, members: BoolArray, rate: float) -> float:
    outside = np.sort(scores[~members])[::-1]
    return float(np.mean(scores[members] > outside[min(outside.size - 1, int(outside.size * rate))]))
