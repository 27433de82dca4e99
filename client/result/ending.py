"""What a client's own people read after a run: `result.json`, and the last lines of the client."""

import json
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fedmosaic.client.model.scoring import Score
from fedmosaic.client.result.comparison import Comparison
from fedmosaic.client.result.export import guarantees
from fedmosaic.privacy.configuration import read_own
from fedmosaic.privacy.files import write_atomically
from fedmosaic.privacy.statement.models import PrivacyStatement
from fedmosaic.privacy.statement.plain import delta_text, epsilon_text, trust

_COLUMNS: Final = 80


def _score(found: dict[str, Any]) -> Score:
    return Score(**found | {"right": tuple(found["right"])})


def _checked(content: dict[str, Any]) -> dict[str, Any]:
    """What a file holds, with scores that can be read; rows are not in one of a version before."""
    content = dict(content)
    for scores in content.get("rows", {}).values():
        for found in scores.values():
            _score(found)
    return content


class ResultFile:
    """`result.json`: what a client's own people read afterwards; it stays in the state directory."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier process wrote; StateError if that is damaged."""
        self._path = path
        remedy = "delete it: only the scores before training are lost"
        self._content: dict[str, Any] = read_own(path, _checked, remedy) or {}

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
        return None if found is None else _score(found)

    def _part(self, key: str) -> dict[str, Any]:
        found = self._content.get(key)
        return dict(found) if isinstance(found, dict) else {}

    def scores(self, when: str) -> dict[str, float]:
        """The scores that were put, by test set."""
        return self._part(when)


def last_lines(
    state: Path, adapter: Path | None, comparison: Comparison | None, statement: PrivacyStatement
) -> str:
    """What a client says at its end, in 80 columns where no path is longer.

    Without an adapter none was trained, and without a comparison there are no own test rows.
    """
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
