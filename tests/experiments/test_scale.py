"""The scale study counts one federation per size; its scenario scores nothing."""

from pathlib import Path

import pytest
from benchmarks import scale

from fedmosaic.protos.errors import ConfigurationError


def test_a_small_federation_is_measured(tiny_folder: Path) -> None:
    arguments = scale.Arguments(
        model=str(tiny_folder / "small"), clients=(5,), rounds=2, steps=1, dimensions=4
    )
    # The tiny model has two layers; the study's adapter has one Co-LoRA layer for each of four blocks.
    with pytest.raises(Exception, match=r"block|layer"):
        scale.measure(arguments, 5)
    figures = scale.measure(scale.Arguments(**{**vars(arguments), "blocks": 2}), 5)
    assert figures.clients == 5
    assert 0 < figures.server_seconds < figures.round_seconds < figures.seconds
    assert figures.peak_megabytes > 50
    assert scale.as_table([figures])[2].startswith("| 5 |")


def test_the_server_alone_is_measured_over_random_adapters(tiny_folder: Path) -> None:
    arguments = scale.Arguments(
        model=str(tiny_folder / "small"), clients=(5,), rounds=2, dimensions=4, server_only=True
    )
    figures = scale.measure(arguments, 5)
    assert 0 < figures.server_seconds < figures.round_seconds < figures.seconds


def test_too_few_clients_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="at least 4"):
        scale.main(["--model", "x", "--clients", "3"])


def test_clients_of_a_scale_run_share_five_tasks(tmp_path: Path) -> None:
    scenario = scale.scale_scenario(scale.Arguments(model="m"), 12, tmp_path)
    assert len({client.task for client in scenario.clients}) == 5
    assert scenario.rounds_to_score() == ()
    assert scenario.schedule.quorum == 12
