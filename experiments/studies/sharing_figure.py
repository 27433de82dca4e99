"""The figure of the sharing study."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from fedmosaic.experiments.scenario.metrics import Interval


def draw(found: Mapping[str, Mapping[int, Interval]], path: Path) -> None:
    """Draw the gain over the number of members, one line per release and ε, as SVG."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    for index, (name, line) in enumerate(found.items()):
        panel.errorbar(
            [m * 1.04 ** (index - 1) for m in line],  # beside each other, or intervals hide intervals
            [100 * gained.mean for gained in line.values()],
            yerr=[100 * (gained.half_width or 0.0) for gained in line.values()],
            marker="o",
            linestyle=":" if "each" in name else "-",
            label=name,
        )
    members = sorted({m for line in found.values() for m in line})
    panel.axhline(0.0, color="black", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_xticks(members, [str(m) for m in members])
    panel.set_xlabel("members of the group")
    panel.set_ylabel("points above a member alone")
    panel.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    # Letters as text keep an SVG small and its words searchable; without a date it repeats byte by byte.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedmosaic"}):
        figure.savefig(path, metadata={"Date": None})
