"""The scale study counts one federation per size; its scenario scores nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import scale

from fedmosaic.protos.errors import ConfigurationError


def test_both_sides_of_a_small_federation_are_measured(tiny_folder: Path, tmp_path: Path) -> None:
    arguments = scale.Arguments(
        model=str(tiny_folder / "small"), clients=(5,), rounds=2, steps=1, dimensions=4
    )
    # The tiny model has two layers; the study's adapter has one Co-LoRA layer for each of four blocks.
    with pytest.raises(Exception, match=r"block|layer"):
        scale.clients_side(arguments, 5)
    fitting = replace(arguments, blocks=2)
    figures = scale.clients_side(fitting, 5) | scale.server_side(arguments, 5)
    assert figures.keys() == scale.HEADS.keys()
    assert 0 < figures["round"] < figures["seconds"]
    assert all(value > 0 for value in figures.values())
    assert min(figures["peak"], figures["server_peak"]) > 50
    assert scale.as_table({5: figures})[2].startswith("| 5 |")
    scale.draw({5: figures}, tmp_path / "growth.svg")
    assert "clients" in (tmp_path / "growth.svg").read_text()


def test_too_few_clients_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 4"):
        scale.main(["--model", "x", "--clients", "3"])


def test_clients_of_a_scale_run_share_five_tasks(tmp_path: Path) -> None:
    scenario = scale.scale_scenario(scale.Arguments(model="m"), 12, tmp_path)
    assert len({client.task for client in scenario.clients}) == 5
    assert scenario.rounds_to_score() == ()
    assert scenario.schedule.quorum == 12
