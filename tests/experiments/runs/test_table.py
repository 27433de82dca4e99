"""A table runs each of its cells once, goes on where it stopped, and never mixes settings."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fedmosaic.experiments.methods import BASELINES, VARIANTS
from fedmosaic.experiments.runs import table as grid
from fedmosaic.protos.errors import ConfigurationError

TABLES = Path(__file__).parents[3] / "experiments" / "tables"


@pytest.fixture
def table(tmp_path: Path, tiny_scenario: Any) -> Path:
    (tmp_path / "tiny.json").write_text(tiny_scenario().model_dump_json())
    scenario = tmp_path / "tiny.toml"
    scenario.write_text(_as_toml(json.loads(tiny_scenario().model_dump_json(exclude_none=True))))
    path = tmp_path / "table.toml"
    path.write_text(
        'scenarios = ["tiny.toml"]\nstreams = ["all"]\nseeds = [0, 1]\n'
        'set = ["training.steps=1", "schedule.rounds=1"]\n'
        '[[methods]]\nmethod = "local"\n'
        '[[methods]]\nmethod = "fedavg"\nvariant = "fast, α"\nset = ["training.learning_rate=0.1"]\n'
    )
    return path


def _as_toml(content: dict[str, Any]) -> str:
    # JSON's inline tables with "=" for ":" are TOML's.
    def value(item: Any) -> str:
        if isinstance(item, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in item.items()) + "}"
        if isinstance(item, list):
            return "[" + ", ".join(map(value, item)) + "]"
        return json.dumps(item)

    return "\n".join(f"{key} = {value(item)}" for key, item in content.items()) + "\n"


def test_cells_come_seed_by_seed_with_their_own_settings(table: Path, tmp_path: Path) -> None:
    cells = grid.cells(grid.Arguments(table, tmp_path / "out"))
    assert [cell.name for cell in cells] == [
        "tiny-all-local-seed-0",
        "tiny-all-fedavg-fast-seed-0",
        "tiny-all-local-seed-1",
        "tiny-all-fedavg-fast-seed-1",
    ]
    assert [cell.scenario.training.learning_rate for cell in cells] == [0.01, 0.1, 0.01, 0.1]
    assert all(cell.scenario.training.steps == 1 for cell in cells)
    assert cells[3].scenario.seed == 1
    assert "--method fedavg --seed 1" in cells[3].command


def test_a_table_runs_once_and_goes_on(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [str(table), "--out", str(out), "--seeds", "0"]
    assert grid.main(arguments) == 0
    assert "| `fedavg fast, α` | 1 |" in capsys.readouterr().out
    written = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(written) == 8
    assert logging.getLogger("fedmosaic").isEnabledFor(logging.WARNING), (
        "the table silenced what runs after it"
    )
    assert grid.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == written
    with pytest.raises(ConfigurationError, match="other settings"):
        grid.main([*arguments, "--set", "training.steps=2"])


def test_one_name_for_two_cells_is_refused(table: Path, tmp_path: Path) -> None:
    table.write_text(table.read_text() + '[[methods]]\nmethod = "local"\nset = ["training.steps=2"]\n')
    with pytest.raises(ConfigurationError, match="give one a variant"):
        grid.cells(grid.Arguments(table, tmp_path / "out"))


@pytest.mark.parametrize("name", sorted(p.name for p in TABLES.glob("*.toml")))
def test_every_table_of_the_repository_names_runs_that_are_possible(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMOSAIC_MODELS", str(tmp_path))
    monkeypatch.setenv("FEDMOSAIC_TASKS", str(tmp_path))
    cells = grid.cells(grid.Arguments(TABLES / name, tmp_path / "out"))
    assert len(cells) > 3
    assert {cell.scenario.method for cell in cells} <= {*VARIANTS, *BASELINES}
