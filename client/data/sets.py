"""All sets of a client: what is trained on, and what is scored."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedmosaic.client.data.records import ExampleSet, read_set
from fedmosaic.client.settings import DataSettings
from fedmosaic.protos.errors import ConfigurationError


@dataclass(frozen=True)
class ClientData:
    """A client's examples as read: to be trained on, and to be scored, the client's own set as "self"."""

    train: ExampleSet
    tests: dict[str, ExampleSet]


def read_sets(
    settings: DataSettings, train: Iterable[Any] | None = None, test: Iterable[Any] | None = None
) -> ClientData:
    """Read every set, or take the rows that are handed over instead; ConfigurationError as of `read_set`."""
    if "self" in settings.others:
        raise ConfigurationError(
            'data.others names a set "self", the name of data.test; give it another name'
        )
    source = settings.train if train is None else train
    if source is None:
        raise ConfigurationError("data.train: missing; name the training examples")
    tests = {name: read_set(place, settings.columns) for name, place in settings.test_sets.items()}
    if test is not None:
        tests = {"self": read_set(test, settings.columns)} | tests
    return ClientData(read_set(source, settings.columns), tests)
