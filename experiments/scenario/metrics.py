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
from statistics import fmean

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, sem, t

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
    """A mean over seeds with its confidence interval.

    Attributes:
        mean: of the values.
        half_width: the interval is mean ± half_width; None for a single value, from which none follows.
        count: number of values.
    """

    mean: float
    half_width: float | None
    count: int


def client_scores(client: str, scores: Scores) -> Pair:
    """Self and Others of one client in one round.

    Args:
        client: whose model was scored.
        scores: of its model; at least one.

    Returns:
        The mean over its own tasks, and the mean over the other clients of the mean over their tasks.

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
    """A_last and A_AUC of one client.

    Args:
        client: whose model was scored.
        rounds: scores by round; round 0 is left out, at least one other is needed.

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


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's t interval for the mean of independent runs.

    Args:
        values: one per seed; at least one, all finite.
        confidence: within (0, 1).

    Raises:
        ConfigurationError: there is no value, one is not finite, or the confidence is out of range.
    """
    if not values or not all(math.isfinite(value) for value in values):
        raise ConfigurationError(f"an interval over {len(values)} values; give one or more, all finite")
    if not 0.0 < confidence < 1.0:
        raise ConfigurationError(f"confidence is {confidence}; give a number within (0, 1)")
    mean, count = fmean(values), len(values)
    if count == 1:
        return Interval(mean, None, 1)
    return Interval(mean, float(t.ppf(0.5 + confidence / 2.0, count - 1) * sem(values)), count)


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
