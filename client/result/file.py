"""What a client's own people read after a run."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedmosaic.client.model.scoring import Score
from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import StateError

log = logging.getLogger("fedmosaic.client")
RESULT = "result.json"
TRAFFIC = "traffic.json"
NOTHING_RECEIVED = (
    "YOU RECEIVED NOTHING from the other members in any of the {rounds} rounds: this client trained alone. "
    "The lines 'no … aggregate' above tell why, round by round; a policy needs enough members that contribute"
)


class ResultFile:
    """`result.json`: what a client's own people read afterwards; it stays in the state directory."""

    def __init__(self, path: Path) -> None:
        """Read what an earlier process wrote; StateError if that is damaged."""
        self._path = path
        self._content = _read_result(path) if path.exists() else {}

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


def _read_result(path: Path) -> dict[str, object]:
    try:
        content = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content
    except (OSError, ValueError) as error:
        raise StateError(
            f"{path} is damaged ({error}); delete it: only the scores before training are lost"
        ) from None
