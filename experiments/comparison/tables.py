"""The comparison of runs as tables of Markdown."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Final

from fedmosaic.experiments.comparison.runs import FIGURES, REFERENCE, Group
from fedmosaic.experiments.scenario.metrics import Interval, markdown_table

_READERS: Final = ("ε server", "ε recipients")
_FIGURE_HEADS: Final = ("seeds", *_READERS, *FIGURES, "kB/round", "TFLOP", "s")
_GAIN_HEADS: Final = tuple(f"Δ {name}" for name in FIGURES)
_POOLED: Final = "all scenarios together"

Rows = list[tuple[str, tuple[str, ...]]]
"""Method and cells."""


def markdown(groups: Sequence[Group], reference: str = REFERENCE) -> str:
    """All tables: methods × scenarios where there are several, then figures and gains of each scenario."""
    lines: list[str] = []

    def put(title: str, heads: Sequence[str], rows: Rows) -> None:
        cells = [(f"`{method}`", *found) for method, found in rows]
        lines.extend([f"**{title}**", "", *markdown_table(("method", *heads), cells, numbers=True), ""])

    scenarios = by_scenario(groups)
    if len(scenarios) > 1:
        heads = (*_READERS, *(name for name, _ in scenarios))
        for place, figure in enumerate(FIGURES):
            put(f"{figure}, %", heads, _overview(groups, place))
        if together := gains(pooled(groups), reference):
            put(f"{_POOLED}: against {reference}, pair by pair, points", _GAIN_HEADS, together)
    for scenario, members in scenarios:
        known = [run.majority for group in members for run in group.runs if not math.isnan(run.majority)]
        always = f"; always the most frequent answer: Self {100 * fmean(known):.1f}" if known else ""
        title = f"{scenario}: %, mean ± half of the 95 % interval over seeds{always}"
        put(title, _FIGURE_HEADS, [(group.method, _figures(group)) for group in members])
        if compared := gains(members, reference):
            put(f"{scenario}: against {reference}, seed by seed, points", _GAIN_HEADS, compared)
    return "\n".join(lines)


def by_scenario(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """The groups of every scenario, both in the order in which they come."""
    names = dict.fromkeys(group.scenario for group in groups)
    return [(name, [group for group in groups if group.scenario == name]) for name in names]


def pooled(groups: Sequence[Group]) -> list[Group]:
    """One group for every method, with its runs in all scenarios."""
    methods = dict.fromkeys(group.method for group in groups)
    return [
        Group(_POOLED, method, tuple(run for group in groups if group.method == method for run in group.runs))
        for method in methods
    ]


def gains(groups: Sequence[Group], reference: str = REFERENCE) -> Rows:
    """What every method has over one of them on one scenario; empty where that was not run."""
    compared = next((group for group in groups if group.method == reference), None)
    if compared is None:
        return []
    return [
        (group.method, tuple(percent(gain, sign="+") for gain in group.gains(compared)))
        for group in groups
        if group is not compared
    ]


def _figures(group: Group) -> tuple[str, ...]:
    flops = fmean(run.training_flops for run in group.runs)
    return (
        str(len(group.runs)),
        *(epsilon_text(group.epsilon(reader)) for reader in ("server", "recipients")),
        *(percent(figure) for figure in group.figures()),
        f"{fmean(run.sent for run in group.runs) / 1000:.1f}",
        "-" if math.isnan(flops) else f"{flops / 1e12:.3g}",
        f"{fmean(run.seconds for run in group.runs):.0f}",
    )


def _overview(groups: Sequence[Group], place: int) -> Rows:
    """Methods × scenarios; ε is the largest over the scenarios, "-" stands where a method was not run."""
    found = {(group.method, group.scenario): percent(group.figures()[place]) for group in groups}
    scenarios = [name for name, _ in by_scenario(groups)]
    return [
        (
            group.method,
            (
                *(epsilon_text(group.epsilon(reader)) for reader in ("server", "recipients")),
                *(found.get((group.method, scenario), "-") for scenario in scenarios),
            ),
        )
        for group in pooled(groups)
    ]


def percent(figure: Interval | None, sign: str = "") -> str:
    """`71.3 ± 2.1`, without the interval where one run gives none; with "+" positive figures have a sign."""
    if figure is None:
        return "-"
    width = "" if figure.half_width is None else f" ± {100 * figure.half_width:.1f}"
    return f"{100 * figure.mean:{sign}.1f}{width}"


def epsilon_text(value: float | None) -> str:
    """ε as it stands in tables; "cryptography" where the reader sees no plaintext at all."""
    if value is None:
        return "cryptography"
    return "∞" if value == math.inf else f"{value:.2f}"
