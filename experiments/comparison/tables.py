"""The comparison of runs as tables: for a terminal, and as Markdown."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Final

from rich.table import Table

from fedmosaic.experiments.comparison.runs import FIGURES, REFERENCE, Group
from fedmosaic.experiments.scenario.metrics import Interval, markdown_table

ACCURACY_HEADS: Final = ("seeds", "ε server", "ε recipients", *FIGURES)
"""Heads of `accuracies` after the method."""
COST_HEADS: Final = ("kB/round", "TFLOP", "s")
"""Heads of `costs`."""
POOLED: Final = "all scenarios together"
"""Name of the groups of `pooled`."""
GAIN_HEADS: Final = tuple(f"Δ {name}" for name in FIGURES)
"""Heads of `gains` after the method."""


def terminal_tables(groups: Sequence[Group], reference: str = REFERENCE) -> list[Table]:
    """Accuracies, gains and costs in per cent, mean ± half width of the 95 % interval over seeds.

    Args:
        groups: of any number of scenarios.
        reference: the method that the others are compared with.
    """
    tables = []
    together = gains(pooled(groups), reference)
    if together:
        tables.append(_table(f"{POOLED}: against {reference}, pair by pair, points", GAIN_HEADS))
        for method, cells in together:
            tables[-1].add_row(method, *cells)
    for scenario, members in by_scenario(groups):
        tables.append(_table(f"{scenario}, % (mean ± 95 % interval over seeds)", ACCURACY_HEADS))
        for group in members:
            tables[-1].add_row(group.method, *accuracies(group))
        tables[-1].caption = majority_words(members)
        compared = gains(members, reference)
        if compared:
            tables.append(_table(f"{scenario}: against {reference}, seed by seed, points", GAIN_HEADS))
            for method, cells in compared:
                tables[-1].add_row(method, *cells)
        tables.append(_table(f"{scenario}: cost", COST_HEADS))
        for group in members:
            tables[-1].add_row(group.method, *costs(group))
    return tables


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title)
    table.add_column("method", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    return table


def by_scenario(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """The groups of every scenario, both in the order in which they come."""
    names = dict.fromkeys(group.scenario for group in groups)
    return [(name, [group for group in groups if group.scenario == name]) for name in names]


def accuracies(group: Group) -> tuple[str, ...]:
    """The cells of `ACCURACY_HEADS`."""
    return (
        str(len(group.runs)),
        epsilon_text(group.epsilon("server")),
        epsilon_text(group.epsilon("recipients")),
        *(percent(figure) for figure in group.figures()),
    )


def majority_words(groups: Sequence[Group]) -> str:
    """What no model at all would score on the test sets of one scenario; empty where that is not known."""
    known = [run.majority for group in groups for run in group.runs if run.majority is not None]
    return f"always the most frequent answer of a task: Self {100 * fmean(known):.1f}" if known else ""


def costs(group: Group) -> tuple[str, ...]:
    """The cells of `COST_HEADS`, means over the runs."""
    known = [run.training_flops for run in group.runs if run.training_flops is not None]
    return (
        f"{fmean(run.sent for run in group.runs) / 1000:.1f}",
        f"{fmean(known) / 1e12:.3g}" if len(known) == len(group.runs) else "-",
        f"{fmean(run.seconds for run in group.runs):.0f}",
    )


def gains(groups: Sequence[Group], reference: str = REFERENCE) -> list[tuple[str, tuple[str, ...]]]:
    """What every method has over one of them on one scenario; empty where that was not run.

    Args:
        groups: of one scenario.
        reference: the method that the others are compared with.

    Returns:
        Method and the cells of `GAIN_HEADS`.
    """
    compared = next((group for group in groups if group.method == reference), None)
    if compared is None:
        return []
    return [
        (group.method, tuple(percent(gain, sign="+") for gain in group.gains(compared)))
        for group in groups
        if group is not compared
    ]


def overview(groups: Sequence[Group]) -> list[tuple[str, tuple[str, ...], list[tuple[str, tuple[str, ...]]]]]:
    """Methods × scenarios, a table for each of `FIGURES`; none where there is one scenario only.

    Args:
        groups: of any number of scenarios.

    Returns:
        Name of the figure, heads after the method, and rows of method and cells. ε is the largest over the
        scenarios; "-" stands where a method was not run.
    """
    scenarios = tuple(name for name, _ in by_scenario(groups))
    if len(scenarios) < 2:
        return []
    methods = {
        name: [g for g in groups if g.method == name] for name in dict.fromkeys(g.method for g in groups)
    }
    heads = ("ε server", "ε recipients", *scenarios)
    tables = []
    for place, figure in enumerate(FIGURES):
        rows = []
        for method, members in methods.items():
            found = {group.scenario: percent(group.figures()[place]) for group in members}
            cells = (_largest(members, "server"), _largest(members, "recipients"))
            rows.append((method, (*cells, *(found.get(scenario, "-") for scenario in scenarios))))
        tables.append((figure, heads, rows))
    return tables


def _largest(groups: Sequence[Group], reader: str) -> str:
    known = [value for group in groups if (value := group.epsilon(reader)) is not None]
    return epsilon_text(max(known, default=None))


def pooled(groups: Sequence[Group]) -> list[Group]:
    """One group for every method, with its runs in all scenarios; none where there is one scenario only."""
    if len(by_scenario(groups)) < 2:
        return []
    methods = dict.fromkeys(group.method for group in groups)
    return [
        Group(POOLED, method, tuple(run for group in groups if group.method == method for run in group.runs))
        for method in methods
    ]


def markdown(groups: Sequence[Group], reference: str = REFERENCE) -> str:
    """The comparison as Markdown.

    `overview` and the gains over all scenarios, then figures with costs, and gains, for each scenario.

    Args:
        groups: of any number of scenarios.
        reference: the method that the others are compared with.
    """
    lines: list[str] = []
    for figure, heads, cells in overview(groups):
        lines += [f"**{figure}, %**", "", *_markdown(heads, cells), ""]
    together = gains(pooled(groups), reference)
    if together:
        words = f"Against `{reference}`, {POOLED}, pair by pair:"
        lines += [words, "", *_markdown(GAIN_HEADS, together), ""]
    for scenario, members in by_scenario(groups):
        rows = [(group.method, (*accuracies(group), *costs(group))) for group in members]
        lines += [f"**{scenario}**", "", *_markdown((*ACCURACY_HEADS, *COST_HEADS), rows), ""]
        lines += [f"{words[0].upper()}{words[1:]} %.", ""] if (words := majority_words(members)) else []
        compared = gains(members, reference)
        if compared:
            lines += [f"Against `{reference}`, seed by seed:", "", *_markdown(GAIN_HEADS, compared), ""]
    return "\n".join(lines)


def _markdown(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    return markdown_table(
        ("method", *heads), [(f"`{method}`", *cells) for method, cells in rows], numbers=True
    )


def percent(figure: Interval | None, sign: str = "") -> str:
    """`71.3 ± 2.1`, without the interval where one run gives none.

    Args:
        figure: a share, or a difference of shares.
        sign: "+" to show the sign of positive figures too.
    """
    if figure is None:
        return "-"
    width = "" if figure.half_width is None else f" ± {100 * figure.half_width:.1f}"
    return f"{100 * figure.mean:{sign}.1f}{width}"


def epsilon_text(value: float | None) -> str:
    """ε as it stands in tables; "cryptography" where the reader sees no plaintext at all."""
    if value is None:
        return "cryptography"
    return "∞" if value == math.inf else f"{value:.2f}"
