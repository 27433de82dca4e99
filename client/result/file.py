"""What a client's own people read after a run."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmosaic.client.model.scoring import Score
from fedmosaic.privacy.configuration import read_own
from fedmosaic.privacy.files import write_atomically


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
