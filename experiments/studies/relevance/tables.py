"""Table and figure of the relevance study."""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from fedmosaic.experiments.scenario.metrics import markdown_table


@dataclass(frozen=True)
class Cell:
    """One measured cell: a design with its length k, examples n per release, its ε, and what was found."""

    probe: str
    task_set: str
    design: str
    dimensions: int
    n: int
    epsilon: float
    auc: float
    top1: float
    bootstrapped: bool


def markdown(cells: Iterable[Cell]) -> str:
    """One table per probe and task set: designs down, n and ε across, AUC / top-1 in the cells.

    † marks cells whose examples were drawn with replacement.
    """
    parts = []
    ordered = sorted(cells, key=lambda cell: (cell.probe, cell.task_set))
    for (probe, task_set), group in itertools.groupby(ordered, lambda cell: (cell.probe, cell.task_set)):
        found = {(cell.design, cell.n, cell.epsilon): cell for cell in group}
        sizes = sorted({n for _, n, _ in found})
        epsilons = sorted({epsilon for _, _, epsilon in found}, reverse=True)
        columns = list(itertools.product(sizes, epsilons))
        head = ["design", "k"] + [f"n={n} ε={_epsilon(epsilon)}" for n, epsilon in columns]
        rows = []
        for design in dict.fromkeys(design for design, _, _ in found):
            row = [found[(design, *column)] for column in columns]
            figures = (f"{c.auc:.3f} / {c.top1:.2f}{'†' if c.bootstrapped else ''}" for c in row)
            rows.append([design, str(row[0].dimensions), *figures])
        parts.append("\n".join([f"### {task_set}, probe {probe}", "", *markdown_table(head, rows)]))
    legend = (
        "AUC / top-1 of the corrected cosine, averaged over trials; ε of one release. "
        "† n exceeds a client's examples, which are then drawn with replacement."
    )
    return "\n\n".join([*parts, legend])


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw AUC against ε, one panel per probe, task set and n, one line per design."""
    rows = list(dict.fromkeys((cell.probe, cell.task_set) for cell in cells))
    sizes = sorted({cell.n for cell in cells})
    epsilons = sorted({cell.epsilon for cell in cells})
    designs = list(dict.fromkeys(cell.design for cell in cells))
    figure = Figure(figsize=(4 * len(sizes), 2.8 * len(rows) + 1), layout="constrained")
    panels = figure.subplots(len(rows), len(sizes), squeeze=False, sharex=True, sharey=True)
    found = {(cell.probe, cell.task_set, cell.n, cell.design, cell.epsilon): cell for cell in cells}
    for (i, row), (j, n) in itertools.product(enumerate(rows), enumerate(sizes)):
        panel = panels[i, j]
        for design in designs:
            line = [found[(*row, n, design, epsilon)] for epsilon in epsilons]
            panel.plot(range(len(epsilons)), [cell.auc for cell in line], marker="o", label=design)
        replaced = " (with replacement)" if line[0].bootstrapped else ""
        panel.set_title(f"{row[0]}, {row[1]}, n = {n}{replaced}", fontsize=8)
        panel.set_xticks(range(len(epsilons)), [_epsilon(epsilon) for epsilon in epsilons])
        panel.set_ylim(0.45, 1.02)
        panel.grid(alpha=0.3)
        if i == len(rows) - 1:
            panel.set_xlabel("ε of one release (δ fixed)")
        if j == 0:
            panel.set_ylabel("same-task AUC")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    # Letters as text keep an SVG small and its words searchable; without a date it repeats byte by byte.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedmosaic"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _epsilon(epsilon: float) -> str:
    return "∞" if math.isinf(epsilon) else f"{epsilon:g}"
