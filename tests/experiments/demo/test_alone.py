"""Each client of the demo once more, without the others."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from fedmosaic.experiments.comparison.record import read_run
from fedmosaic.experiments.demo.command import train_alone


def test_every_client_is_trained_and_scored_alone(tmp_path: Path, tiny_scenario: Any) -> None:
    scenario = tiny_scenario(adapter={"rank": 2, "blocks": 2, "protection": "encrypted"})
    found = train_alone(scenario, tmp_path, Console(file=io.StringIO()))
    assert set(found) == {client.id for client in scenario.clients}
    assert all(0.0 <= value <= 1.0 for value in found.values())
    record = read_run(tmp_path / "alone")
    assert not record.server, "nobody was there to exchange anything with"
    assert all(set(result["after"]) == {"self"} for result in record.clients.values())
