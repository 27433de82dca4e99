"""Does sharing help me? Three models on a client's own test rows, what is kept of it, and the last lines.

Nothing of it leaves the client: scores on private rows are releases that no ledger has charged.
"""

import json
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import binomtest

from fedmosaic.client.model.scoring import Score
from fedmosaic.client.result.export import guarantees
from fedmosaic.privacy.configuration import Frozen, read_own
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.statement.models import PrivacyStatement
from fedmosaic.privacy.statement.plain import delta_text, epsilon_text, trust

_RESAMPLES: Final = 10_000
_LEVEL: Final = 0.95
BASE, ALONE, FEDERATED = "base", "alone", "federated"


class Difference(Frozen):
    """How much better a model is on the same rows, with 95 % interval and p-value (exact McNemar test)."""

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
    """Compare on the same rows by a paired bootstrap of counts (Efron and Tibshirani 1993, §13.3)."""
    rows = len(one)
    better = sum(a and not b for a, b in zip(one, other, strict=True))
    worse = sum(b and not a for a, b in zip(one, other, strict=True))
    shares = np.array([worse, rows - better - worse, better]) / rows
    counts = np.random.default_rng(0).multinomial(rows, shares, size=_RESAMPLES)
    means = (counts[:, 2] - counts[:, 0]) / rows
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    mean = (better - worse) / rows
    return Difference(mean=mean, low=float(low), high=float(high), p_value=p_value, rows=rows)


class Comparison(Frozen):
    """Shares of right answers; `commonest` is None without choices, `over_alone` without a model alone."""

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


def compare(scores: Mapping[str, Score]) -> Comparison:
    """Compare `base`, `federated` and, where it was trained, `alone` on the rows that all were scored on."""
    federated, alone = scores[FEDERATED], scores.get(ALONE)
    return Comparison(
        measure=federated.measure,
        commonest=federated.commonest,
        scores={name: score.value for name, score in scores.items()},
        over_base=paired_difference(federated.right, scores[BASE].right),
        over_alone=None if alone is None else paired_difference(federated.right, alone.right),
    )


class ResultFile:
    """`result.json`: what a client's own people read afterwards; it stays in the state directory."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier process wrote; StateError if that is damaged."""
        self._path = path
        remedy = "delete it: only the scores before training are lost"
        self._content: dict[str, Any] = read_own(path, dict, remedy) or {}

    def has(self, key: str) -> bool:
        """Whether something was put under this key."""
        return key in self._content

    def put(self, key: str, value: object) -> None:
        """Write a value, durably."""
        self._content[key] = value
        write_atomically(self._path, json.dumps(self._content, indent=2).encode())

    def put_scores(self, when: str, scores: Mapping[str, Score]) -> None:
        """Write scores, what they measure, and which rows are right."""
        self.put(when, {name: score.value for name, score in scores.items()})
        if scores:
            self.put("measures", {name: score.measure for name, score in scores.items()})
        rows = {name: asdict(score) for name, score in scores.items()}
        self.put("rows", self._part("rows") | {when: rows})

    def score(self, when: str, name: str) -> Score | None:
        """A score row by row, as it was put; None if it was not, or by a version before."""
        found = self._part("rows").get(when, {}).get(name)
        return None if found is None else Score(**found | {"right": tuple(found["right"])})

    def _part(self, key: str) -> dict[str, Any]:
        found = self._content.get(key)
        return dict(found) if isinstance(found, dict) else {}

    def scores(self, when: str) -> dict[str, float]:
        """The scores that were put, by test set."""
        return self._part(when)


_COLUMNS = 80


def last_lines(
    state: Path, adapter: Path | None, comparison: Comparison | None, statement: PrivacyStatement
) -> str:
    """What a client says at its end, in 80 columns where no path is longer."""
    lines = [""]
    if comparison is not None:
        rows = comparison.over_base.rows
        lines.append(f"Own test rows  {rows}, right by {comparison.measure}")
        lines += [f"  {name:<12} {score:.2f}" for name, score in comparison.scores.items()]
        if comparison.commonest is not None:
            lines.append(f"  {'one answer':<12} {comparison.commonest:.2f}  (always the commonest)")
        words = " ".join(filter(None, (comparison.verdict(), comparison.warning())))
        lines += textwrap.wrap(words, _COLUMNS, break_long_words=False)
    lines.append(f"Adapter        {adapter or 'none was trained'}")
    # Over all that was sent, towards the server and towards colluding recipients.
    found, client = guarantees(statement, "joint"), statement.clients[0]
    server, recipients = found["server_honest_but_curious"].epsilon, found["colluding_recipients"].epsilon
    told = (
        f"Privacy        {trust(client)} ε = {epsilon_text(server)} towards the server, "
        f"{epsilon_text(recipients)} towards recipients who work together (one {client.unit}, δ "
        f"{delta_text(client.delta)}; what ε means: docs/privacy.md)"
    )
    lines += textwrap.wrap(told, _COLUMNS, subsequent_indent=" " * 15)
    place = shlex.quote(str(state))
    lines += ["Next", f"  fedmosaic report {place}"]
    if adapter is not None:
        lines += [f"  fedmosaic export {place} --out my-model", f"  fedmosaic chat {place}"]
    return "\n".join(lines)
