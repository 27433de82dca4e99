"""What no model at all would score: always the most frequent answer of a task."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fedmosaic.client.model.examples import Example, read_examples
from fedmosaic.protos.errors import ConfigurationError


def majority_accuracy(examples: Sequence[Example]) -> float:
    """Share in [0, 1] of examples with the most frequent answer; NaN if one has no choices."""
    if not examples or not all(example.choices for example in examples):
        return math.nan
    return Counter(example.answer for example in examples).most_common(1)[0][1] / len(examples)


def majorities(scenario: Mapping[str, Any]) -> dict[str, float]:
    """By client, the mean over its tasks of `majority_accuracy` on the rows that are scored.

    Args:
        scenario: content of a run's `scenario.json`, whose test files may have gone since: then NaN.
    """
    limit = scenario.get("evaluation_examples") or None
    return {client["id"]: _of_client(client, limit) for client in scenario.get("clients", [])}


def _of_client(client: Mapping[str, Any], limit: int | None) -> float:
    files = [task.get("test") for task in (client.get("tasks") or [client])]
    try:
        return fmean(majority_accuracy(read_examples(Path(file))[:limit]) for file in files if file)
    except (ConfigurationError, ValueError):
        return math.nan
