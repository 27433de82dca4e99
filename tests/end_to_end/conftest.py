"""Federations of vectors that are founded, served and closed again."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from end_to_end import federation_of_vectors as fv
from fedmosaic.server.coordinator import Coordinator


@pytest.fixture
def founded(tmp_path: Path) -> Iterator[Callable[..., tuple[Path, Coordinator]]]:
    """Founds a federation on terms of `fv.terms`; its directory, and its server, closed at the end."""
    opened: list[Coordinator] = []

    def found(*backend_and_rounds: Any, **schedule: Any) -> tuple[Path, Coordinator]:
        directory = fv.make_federation(tmp_path / "f", fv.terms(*backend_and_rounds, **schedule))
        opened.append(fv.coordinator_of(directory))
        return directory, opened[-1]

    yield found
    for coordinator in opened:
        coordinator.close()
