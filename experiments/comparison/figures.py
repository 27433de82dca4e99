"""The figure of privacy against utility, as SVG."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmosaic.experiments.comparison.runs import Group, Run
from fedmosaic.experiments.scenario.metrics import Interval, interval
from fedmosaic.protos.errors import ConfigurationError

_PROTECTIONS: Final = {
    "none": ("#0b5fa5", "s", "none: adapter in the clear"),
    "encrypted": ("#1b8a8a", "D", "encrypted: server sees ciphertext"),
    "dp": ("#c2571a", "o", "dp: noise on all that leaves"),
    "dp+encrypted": ("#8a3b8f", "^", "dp+encrypted: both"),
}
"""Colour, mark and words of every protection."""
_REFERENCES: Final = {"local": (":", "local: nothing leaves, ε = 0"), "fedavg": ("--", "fedavg: ε = ∞")}
_PANELS: Final[tuple[tuple[str, Callable[[Run], float]], ...]] = (
    ("Self A_last, %", lambda run: run.figures[0]),
    ("Others A_last, %", lambda run: run.figures[2]),
    ("relevance, AUC in %", lambda run: run.relevance),
)


def privacy_figure(groups: Sequence[Group]) -> str:
    """Accuracy and relevance over ε, by how the adapter is protected, as SVG.

    ε is not the target but what the clients' ledgers came to: the largest of any client, both channels
    together, towards another member; ∞ without differential privacy on the adapter. `local` and `fedavg` give
    lines. `ConfigurationError` if no run has a server of FedMosaic's, or the runs are of several scenarios.
    """
    private = [group for group in groups if group.runs[0].protection]
    scenarios = {group.scenario for group in groups}
    if not private or len(scenarios) != 1:
        raise ConfigurationError(
            f"a privacy figure of {len(private)} private methods on {len(scenarios)} scenarios; give runs of "
            "fedmosaic on one scenario"
        )
    buffer = io.StringIO()
    # Letters stay letters; without a date, the same runs give the same bytes.
    with mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "fedmosaic",
            "axes.grid": True,
            "grid.color": "#ddd",
            "axes.axisbelow": True,
        }
    ):
        drawn = Figure(figsize=(9.6, 4.2), layout="constrained")
        panels = drawn.subplots(1, len(_PANELS))
        finite = [value for group in private if (value := _epsilon(group)) < math.inf]
        end = 4 * max(finite, default=1.0)
        for number, (axes, (title, _)) in enumerate(zip(panels, _PANELS, strict=True)):
            _panel(axes, number, groups, end, infinite=len(finite) < len(private))
            axes.set_title(title, fontsize=11)
            axes.set_xlabel("ε (small: more private)")
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="lower center", ncols=2, frameon=False, bbox_to_anchor=(0.5, -0.18))
        drawn.suptitle(f"Privacy against utility: {next(iter(scenarios))}")
        drawn.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _epsilon(group: Group) -> float:
    found = group.epsilon("recipients")
    return math.inf if found is None else found


def _panel(axes: Axes, number: int, groups: Sequence[Group], end: float, *, infinite: bool) -> None:
    for name, (dash, words) in _REFERENCES.items():
        for group in groups:
            figure = _figure(group, number)
            if group.method == name and figure is not None:
                axes.axhline(100 * figure.mean, color="#5a5a5a", linestyle=dash, label=words)
    for protection, (colour, mark, words) in _PROTECTIONS.items():
        own = [group for group in groups if group.runs[0].protection == protection]
        points = [(min(_epsilon(g), end), f) for g in own if (f := _figure(g, number)) is not None]
        points.sort(key=lambda point: point[0])
        if points:
            axes.errorbar(
                [epsilon for epsilon, _ in points],
                [100 * figure.mean for _, figure in points],
                yerr=[100 * (figure.half_width or 0.0) for _, figure in points],
                color=colour,
                marker=mark,
                capsize=2,
                label=words,
            )
    axes.set_xscale("log")
    ticks = [tick for tick in (0.1, 0.3, 1, 3, 8, 20, 50) if tick <= end / 2]
    axes.set_xticks([*ticks, *([end] if infinite else [])], [*map(str, ticks), *(["∞"] if infinite else [])])
    axes.minorticks_off()


def _figure(group: Group, number: int) -> Interval | None:
    return interval([_PANELS[number][1](run) for run in group.runs])
