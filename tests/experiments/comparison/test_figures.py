"""The privacy figure is well formed, says every reader's ε and puts points where the ledgers put them."""

import math
import re
from dataclasses import replace
from xml.parsers import expat

import pytest

from fedmosaic.experiments.comparison.figures import privacy_figure
from fedmosaic.experiments.comparison.runs import Run, group_runs
from fedmosaic.experiments.scenario.metrics import Pair
from fedmosaic.protos.errors import ConfigurationError


def _run(seed: int, method: str, own: float, protection: str, epsilon: float | None) -> Run:
    return Run(
        scenario="s, all",
        method=method,
        seed=seed,
        curve={1: Pair(own, own / 2)},
        epsilon={"server": epsilon, "recipients": epsilon},
        sent=1.0,
        seconds=1.0,
        protection=protection,
        relevance=0.9 if protection else math.nan,
    )


def _runs() -> list[Run]:
    return [
        run
        for seed in (0, 1)
        for run in (
            _run(seed, "fedmosaic dp 1", 0.5 + seed / 100, "dp", 1.0),
            _run(seed, "fedmosaic dp 8", 0.6 + seed / 100, "dp", 7.9),
            _run(seed, "fedmosaic <clear>", 0.7 + seed / 100, "none", math.inf),
            _run(seed, "fedmosaic encrypted", 0.7, "encrypted", math.inf),
            _run(seed, "local", 0.4, "", 0.0),
        )
    ]


def test_the_figure_is_well_formed_and_loads_nothing() -> None:
    svg = privacy_figure(group_runs(_runs()))
    expat.ParserCreate().Parse(svg, True)
    assert len(svg) < 150_000
    for words in ("∞", "local: nothing leaves", "dp: noise on all that leaves", "relevance, AUC in %"):
        assert words in svg
    assert all(link.startswith("#") for link in re.findall(r'(?:href|src)="([^"]*)"', svg))
    assert svg == privacy_figure(group_runs(_runs())), "the same runs give the same bytes"


def test_runs_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="0 private methods"):
        privacy_figure(group_runs([_run(0, "local", 0.4, "", 0.0)]))
    other = replace(_runs()[0], scenario="t, all")
    with pytest.raises(ConfigurationError, match="on 2 scenarios"):
        privacy_figure(group_runs([*_runs(), other]))
