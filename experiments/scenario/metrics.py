"""Self and Others, A_last and A_AUC, intervals over seeds, areas and tables. Pure functions.

a_ijk(t) is the score of client i's model after its local training of round t on task k of client j:

    Self(t)   = mean over i of the mean over k of a_iik(t)
    Others(t) = mean over i of the mean over j ≠ i of the mean over k of a_ijk(t)
    A_last    = the value after the last round,   A_AUC = the mean over the scored rounds

All tasks count in every scored round, also those that have not arrived yet, so that in a dynamic stream
A_AUC lies below A_last. Round 0, before any training, belongs to neither.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit
from scipy.stats import rankdata

from fedmosaic.protos.errors import ConfigurationError

Scores = Mapping[tuple[str, str], float]
"""Of one client's model: score by (owner of the task, name of the task)."""


@dataclass(frozen=True)
class Pair:
    """Self and Others, each in [0, 1]; None where nothing of the kind was scored."""

    own: float | None
    others: float | None


@dataclass(frozen=True)
class Summary:
    """The four figures of one run or of one of its clients."""

    last: Pair
    auc: Pair


@dataclass(frozen=True)
class Interval:
    """A mean over seeds ± half of its confidence interval; no interval follows from a single value."""

    mean: float
    half_width: float | None
    count: int


def client_scores(client: str, scores: Scores) -> Pair:
    """Self and Others of one client in one round.

    Raises:
        ConfigurationError: nothing was scored, or a score is not finite.
    """
    if not scores:
        raise ConfigurationError(f"no score of client {client!r}; give at least one")
    if not all(math.isfinite(value) for value in scores.values()):
        raise ConfigurationError(f"a score of client {client!r} is not finite; score it again")
    of_owner: dict[str, list[float]] = {}
    for (owner, _), value in scores.items():
        of_owner.setdefault(owner, []).append(value)
    own = of_owner.pop(client, None)
    return Pair(fmean(own) if own else None, _mean(fmean(values) for values in of_owner.values()))


def summarise_client(client: str, rounds: Mapping[int, Scores]) -> Summary:
    """A_last and A_AUC of one client, from its scores by round.

    Raises:
        ConfigurationError: no round after training was scored.
    """
    scored = {number: client_scores(client, scores) for number, scores in rounds.items() if number > 0}
    if not scored:
        raise ConfigurationError(f"client {client!r} was never scored after training; score the last round")
    return Summary(
        last=scored[max(scored)],
        auc=Pair(_mean(p.own for p in scored.values()), _mean(p.others for p in scored.values())),
    )


def mean_summary(clients: Sequence[Summary]) -> Summary:
    """Mean over clients, each with the same weight; a figure that a client lacks is left out."""
    return Summary(
        last=Pair(_mean(c.last.own for c in clients), _mean(c.last.others for c in clients)),
        auc=Pair(_mean(c.auc.own for c in clients), _mean(c.auc.others for c in clients)),
    )


def interval(values: Sequence[float]) -> Interval:
    """Student's 95 % interval for the mean of independent runs, one value per seed.

    Raises:
        ConfigurationError: there is no value, or one is not finite.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ConfigurationError(f"an interval over {len(values)} values; give one or more, all finite")
    mean, count = fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, 1)
    return Interval(mean, float(stdtrit(count - 1, 0.975)) * stdev(values) / math.sqrt(count), count)


def area_under_curve(positive: npt.ArrayLike, negative: npt.ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties counting half (Mann and Whitney 1947).

    Args:
        positive: (P,) finite scores.
        negative: (N,) finite scores.
    """
    count = np.size(positive)
    ranks = rankdata(np.concatenate([np.ravel(positive), np.ravel(negative)]))[:count]
    return float((ranks.sum() - count * (count + 1) / 2) / (count * np.size(negative)))


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False
) -> list[str]:
    """Lines of a Markdown table.

    Args:
        heads: of the columns.
        rows: cells, as many in each row as there are heads.
        numbers: whether all columns but the first are set to the right.
    """
    rule = ["---", *(["---:" if numbers else "---"] * (len(heads) - 1))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
