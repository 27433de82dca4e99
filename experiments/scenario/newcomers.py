"""Unseen clients: a newcomer begins with what the federation gives it, and trains for a few steps.

Nothing of a newcomer goes into the federation. What it begins with depends on the method; how good it is
after each number of steps is written to `newcomers.json` in the run's directory.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from fedmosaic.experiments.scenario.participants import as_result
from fedmosaic.experiments.scenario.terms import Scenario
from fedmosaic.privacy.configuration import parse_json
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import ConfigurationError

NEWCOMERS: Final = "newcomers.json"


@dataclass(frozen=True)
class Newcomer:
    """How a newcomer fared.

    Attributes:
        id: of the client.
        begun_with: in words, or each member's share of what it began with.
        scores: by steps taken, then by `owner/task`.
    """

    id: str
    begun_with: str | Mapping[str, float]
    scores: Mapping[int, Mapping[str, float]]


def adapt(
    scenario: Scenario,
    name: str,
    begun_with: str | Mapping[str, float],
    train: Callable[[int], None],
    score: Callable[[], Mapping[str, float]],
) -> Newcomer:
    """Train a newcomer step by step and score it at the scenario's numbers of steps.

    Args:
        scenario: names the numbers of steps.
        name: of the newcomer.
        begun_with: what its adapter holds already.
        train: trains it for so many steps more.
        score: scores it as it stands.
    """
    scores: dict[int, Mapping[str, float]] = {}
    for before, steps in pairwise((0, *scenario.adaptation_steps)):
        if steps > before:
            train(steps - before)
        scores[steps] = dict(score())
    return Newcomer(name, begun_with, scores)


def add_newcomer(directory: Path, newcomer: Newcomer) -> None:
    """Write a newcomer down, beside those that are there."""
    known = {found.id: found for found in read_newcomers(directory)}
    content = [asdict(found) for found in (known | {newcomer.id: newcomer}).values()]
    write_atomically(directory / NEWCOMERS, json.dumps(content, indent=1).encode())


def read_newcomers(directory: Path) -> tuple[Newcomer, ...]:
    """The newcomers of a run; none if it had none.

    Raises:
        ConfigurationError: the file is damaged.
    """
    path = directory / NEWCOMERS
    if not path.exists():
        return ()
    try:
        return tuple(_newcomer(record) for record in parse_json(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}); delete it and go on with the run") from None


def _newcomer(record: Any) -> Newcomer:
    scores = {int(steps): dict(found) for steps, found in record["scores"].items()}
    return Newcomer(record["id"], record["begun_with"], scores)


def newcomers_table(newcomers: tuple[Newcomer, ...]) -> Table:
    """Accuracy on the newcomer's own test sets by steps taken."""
    table = Table(title="Unseen clients: Self after so many steps")
    steps = sorted({number for newcomer in newcomers for number in newcomer.scores})
    for column in ("client", "begun with", *map(str, steps)):
        table.add_column(column, justify="left" if column in ("client", "begun with") else "right")
    for newcomer in newcomers:
        own = {
            number: as_result(newcomer.id, scores).get("self") for number, scores in newcomer.scores.items()
        }
        cells = ("-" if (value := own.get(number)) is None else f"{value:.2f}" for number in steps)
        table.add_row(newcomer.id, _words(newcomer.begun_with), *cells)
    return table


def _words(begun_with: str | Mapping[str, float]) -> str:
    if isinstance(begun_with, str):
        return begun_with
    shares = sorted(begun_with.items(), key=lambda item: -item[1])
    return ", ".join(f"{share:.2f} {name}" for name, share in shares)
