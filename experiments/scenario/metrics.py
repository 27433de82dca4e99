"""Self and Others, A_last and A_AUC, intervals over seeds, areas and tables. Pure functions.

a_ijk(t) is the score of client i's model after its local training of round t on task k of client j:

    Self(t)   = mean over i of the mean over k of a_iik(t)
    Others(t) = mean over i of the mean over j ≠ i of the mean over k of a_ijk(t)
    A_last    = the value after the last round,   A_AUC = the mean over the scored rounds

All tasks count in every scored round, also those that have not arrived yet, so that in a dynamic stream
A_AUC lies below A_last. Round 0, before any training, belongs to neither.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, sem, t

from fedmosaic.protos.errors import ConfigurationError


class Pair(NamedTuple):
    """Self and Others, each in [0, 1]; NaN where nothing of the kind was scored."""

    own: float
    others: float


@dataclass(frozen=True)
class Interval:
    """A mean over seeds ± half of its 95 % interval; no interval follows from a single value."""

    mean: float
    half_width: float | None
    count: int


def client_scores(client: str, scores: Mapping[str, float]) -> Pair:
    """Self and Others of one client in one round, of scores by "owner/task".

    `ConfigurationError` if nothing finite was scored.
    """
    if not scores or not all(math.isfinite(value) for value in scores.values()):
        raise ConfigurationError(f"client {client!r} has no scores, or some not finite; score it again")
    of_owner: dict[str, list[float]] = {}
    for label, value in scores.items():
        of_owner.setdefault(label.partition("/")[0], []).append(value)
    own = of_owner.pop(client, [])
    return Pair(_mean(own), _mean(map(fmean, of_owner.values())))


def mean_pair(pairs: Collection[Pair]) -> Pair:
    """Mean over clients or rounds, each with the same weight; a figure that one lacks is left out."""
    return Pair(_mean(pair.own for pair in pairs), _mean(pair.others for pair in pairs))


def interval(values: Sequence[float]) -> Interval | None:
    """Student's interval for the mean of independent runs, one value per seed; None if a value is missing."""
    if not values or any(map(math.isnan, values)):
        return None
    mean, count = fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, 1)
    return Interval(mean, float(t.ppf(0.975, count - 1) * sem(values)), count)


def placements(these: npt.ArrayLike, others: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Share of the (N,) finite others below each of (P,) finite values, ties counting half."""
    own = np.ravel(these)
    below = rankdata(np.concatenate([own, np.ravel(others)]))[: own.size] - rankdata(own)
    return np.asarray(below / np.size(others))


def area_under_curve(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann and Whitney 1947)."""
    return float(placements(positive, negative).mean())


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> list[str]:
    """Lines of a Markdown table; with `numbers` all columns but the first are set to the right."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(heads) - 1))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan
