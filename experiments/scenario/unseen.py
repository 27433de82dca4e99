"""Unseen clients, which come when the last round is over: the record of how they fared.

Nothing of an unseen client goes into the federation. How good it is after each number of steps is in
`unseen.json` of the run's directory.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter
from rich.table import Table

from fedmosaic.experiments.scenario.participants import as_result
from fedmosaic.privacy.configuration import Frozen
from fedmosaic.privacy.files import write_atomically
from fedmosaic.protos.errors import ConfigurationError

UNSEEN: Final = "unseen.json"


class UnseenClient(Frozen):
    """How an unseen client fared."""

    id: str
    begun_with: str | Mapping[str, float]
    """In words, or each member's share of what it began with."""
    scores: Mapping[int, Mapping[str, float]]
    """By steps taken, then by `owner/task`."""


_RECORDS: Final = TypeAdapter(tuple[UnseenClient, ...])


def add_unseen(directory: Path, client: UnseenClient) -> None:
    """Write an unseen client down, beside those that are there."""
    known = {found.id: found for found in read_unseen(directory)} | {client.id: client}
    content = [found.model_dump(mode="json") for found in known.values()]
    write_atomically(directory / UNSEEN, json.dumps(content, indent=1).encode())


def read_unseen(directory: Path) -> tuple[UnseenClient, ...]:
    """The unseen clients of a run; none if it had none.

    Raises:
        ConfigurationError: the file is damaged.
    """
    path = directory / UNSEEN
    if not path.exists():
        return ()
    try:
        return _RECORDS.validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}); delete it and go on with the run") from None


def unseen_table(clients: tuple[UnseenClient, ...]) -> Table:
    """Accuracy on each unseen client's own test sets by steps taken."""
    steps = sorted({number for client in clients for number in client.scores})
    table = Table("client", "begun with", title="Unseen clients: Self after so many steps")
    for number in steps:
        table.add_column(str(number), justify="right")
    for client in clients:
        own = {number: as_result(client.id, scores).get("self") for number, scores in client.scores.items()}
        cells = ("-" if (value := own.get(number)) is None else f"{value:.2f}" for number in steps)
        table.add_row(client.id, _words(client.begun_with), *cells)
    return table


def _words(begun_with: str | Mapping[str, float]) -> str:
    if isinstance(begun_with, str):
        return begun_with
    shares = sorted(begun_with.items(), key=lambda item: -item[1])
    return ", ".join(f"{share:.2f} {name}" for name, share in shares)
