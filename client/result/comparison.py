"""Does sharing help me? Three models on a client's own test rows, compared pair by pair, in words.

Nothing of it leaves the client: scores on private rows are releases that no ledger has charged.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.special import bdtr

from fedmosaic.privacy.configuration import Frozen

if TYPE_CHECKING:
    from fedmosaic.client.model.scoring import Score

_RESAMPLES: Final = 10_000
_LEVEL: Final = 0.95
BASE, ALONE, FEDERATED = "base", "alone", "federated"


class Difference(Frozen):
    """How much better one model is than another on the same rows, with its 95 % interval.

    The p-value is that of the exact sign test on the rows that only one of both has right (McNemar).
    """

    mean: float
    low: float
    high: float
    p_value: float
    rows: int

    @property
    def decided(self) -> bool:
        """Whether the rows tell which model is better. Few rows make a bootstrap too sure, hence both."""
        return (self.low > 0 or self.high < 0) and self.p_value < 1 - _LEVEL

    def __str__(self) -> str:
        return f"{self.mean:+.2f} (95 % interval {self.low:+.2f} to {self.high:+.2f})"


def paired_difference(one: Sequence[bool], other: Sequence[bool]) -> Difference:
    """Compare two models, right or wrong on each of the same rows, by a paired bootstrap.

    A row's difference is -1, 0 or 1, so resampling rows is resampling the counts of these three.

    Reference:
        B. Efron and R. Tibshirani, "An Introduction to the Bootstrap", 1993, §13.3 (percentile interval).
    """
    rows = len(one)
    better = sum(a and not b for a, b in zip(one, other, strict=True))
    worse = sum(b and not a for a, b in zip(one, other, strict=True))
    shares = np.array([worse, rows - better - worse, better]) / rows
    counts = np.random.default_rng(0).multinomial(rows, shares, size=_RESAMPLES)
    means = (counts[:, 2] - counts[:, 0]) / rows
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    # Both tails are alike where each row is as likely to favour one model as the other.
    p_value = min(1.0, 2 * float(bdtr(min(better, worse), better + worse, 0.5)))
    return Difference(
        mean=(better - worse) / rows, low=float(low), high=float(high), p_value=p_value, rows=rows
    )


class Comparison(Frozen):
    """Shares of right answers of base, alone and federated on the client's own test rows.

    `commonest` is what the commonest answer alone would score, None where rows have no choices; `over_alone`
    is None where no model was trained alone.
    """

    measure: str
    commonest: float | None
    scores: dict[str, float]
    over_base: Difference
    over_alone: Difference | None

    def verdict(self) -> str:
        """Which is better and by how much, or that the rows cannot tell."""
        if self.over_alone is None:
            words = _verdict(self.over_base, "Training in the federation", "the base model")
            return f"{words} To learn what sharing adds to training alone, set compare_alone = true."
        return _verdict(self.over_alone, "Sharing", "training alone")

    def warning(self) -> str:
        """That the score is no better than one answer to everything; empty where it is."""
        if self.commonest is None or self.scores[FEDERATED] > self.commonest:
            return ""
        return f"No better than always giving the commonest answer, which scores {self.commonest:.2f}."


def _verdict(found: Difference, what: str, than: str) -> str:
    if not found.decided:
        return f"{found.rows} rows cannot tell {what.lower()} from {than}: {found}."
    words = "helps" if found.mean > 0 else "hurts"
    return f"{what} {words} you: {found} against {than}, on {found.rows} rows."


def compare(scores: "Mapping[str, Score]") -> Comparison:
    """Compare `base`, `federated` and, where it was trained, `alone` on the rows that all were scored on."""
    federated, alone = scores[FEDERATED], scores.get(ALONE)
    return Comparison(
        measure=federated.measure,
        commonest=federated.commonest,
        scores={name: score.value for name, score in scores.items()},
        over_base=paired_difference(federated.right, scores[BASE].right),
        over_alone=None if alone is None else paired_difference(federated.right, alone.right),
    )
