"""A table runs each of its cells once, goes on where it stopped, and never mixes settings."""

import logging
from pathlib import Path
from typing import Any

import pytest

from fedmosaic.experiments.methods import BASELINES
from fedmosaic.experiments.methods.variants import VARIANTS
from fedmosaic.experiments.runs import table as grid
from fedmosaic.protos.errors import ConfigurationError

TABLES = Path(__file__).parents[3] / "experiments" / "tables"
_NOT_ON_THE_PAGE = {
    "defaults.toml",
    "text-siblings-tuning.toml",
    "vision-siblings-tuning.toml",
    "text-siblings-many.toml",
}


@pytest.fixture
def table(tmp_path: Path, tiny_scenario: Any) -> Path:
    (tmp_path / "tiny.json").write_text(tiny_scenario().model_dump_json())
    path = tmp_path / "table.toml"
    path.write_text(
        'scenarios = ["tiny.json"]\nstreams = ["all"]\nseeds = [0, 1]\n'
        'set = ["training.steps=1", "schedule.rounds=1"]\n'
        '[[methods]]\nmethod = "local"\n'
        '[[methods]]\nmethod = "fedavg"\nvariant = "fast, α"\nset = ["training.learning_rate=0.1"]\n'
    )
    return path


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


def test_a_table_runs_once_goes_on_and_stands_between_its_marks(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "out", tmp_path / "page.md"
    arguments = [str(table), "--out", str(out), "--seeds", "0", "--page", str(page)]
    for text in (
        "# No marks\n",
        "<!-- end of table.toml --> <!-- table.toml -->",
        "<!-- table.toml --> " * 2,
    ):
        page.write_text(text)
        with pytest.raises(ConfigurationError, match=r"write the lines <!-- table\.toml -->"):
            grid.main(arguments)
    assert not out.exists(), "refused before anything is run"
    before, after = "# Kept α\n\n<!-- table.toml -->", "<!-- end of table.toml -->\n\nKept too.\n"
    page.write_text(f"{before}\nold\n{after}", encoding="utf-8")
    assert grid.main(arguments) == 0
    made = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert len(made) == 8
    assert logging.getLogger("fedmosaic").isEnabledFor(logging.WARNING), "what runs after it is not silenced"
    written = page.read_text(encoding="utf-8")
    assert written.startswith(before)
    assert written.endswith(after)
    block = written[len(before) : -len(after)]
    assert "old" not in block
    assert "| `fedavg fast, α` | 1 | ∞ | ∞ |" in block
    assert block.split("\n\nWritten by")[0].strip() in capsys.readouterr().out
    assert f"Written by `fedmosaic experiments table {table} --out" in block
    assert grid.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == made
    assert page.read_text(encoding="utf-8") == written, "the same runs give the same page"
    table.write_text(table.read_text().replace("training.steps=1", "training.steps=2"))
    with pytest.raises(ConfigurationError, match="other settings"):
        grid.main(arguments)


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
    monkeypatch.setenv("FEDMOSAIC_MODEL", str(tmp_path))
    cells = grid.cells(grid.Arguments(TABLES / name, tmp_path / "out"))
    assert len(cells) > 3
    assert {cell.scenario.method for cell in cells} <= {*VARIANTS, *BASELINES}
    if name not in _NOT_ON_THE_PAGE:
        grid._places(TABLES.parents[1] / "docs" / "experiments-tables.md", name)
