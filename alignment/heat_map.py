"""The similarity of the layers of two models as a figure."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


def heat_map(
    cka_LM: torch.Tensor,
    *,
    anchor: str,
    model: str,
    pairs: Sequence[tuple[int, int]],
    mean_deviation: float,
    path: Path,
) -> None:
    """Draw linear CKA of all layer pairs as SVG; the chosen pairs are framed.

    Args:
        cka_LM: (L, M) similarities.
        anchor: Name of the anchor, whose layers are the rows.
        model: Name of the other model, whose layers are the columns.
        pairs: Chosen pairs of layers.
        mean_deviation: Mean distance of the arg-max from equal relative depth.
        path: Where the figure is written.
    """
    rows, columns = cka_LM.shape
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedmosaic"}):
        figure = Figure(figsize=(1.5 + 0.35 * columns, 1.8 + 0.35 * rows), layout="constrained")
        axes = figure.subplots()
        axes.imshow(cka_LM.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
        for row in range(rows):
            for column in range(columns):
                value = float(cka_LM[row, column])
                ink = "white" if value > 0.55 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7)
        for row, column in pairs:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d62728", lw=2))
        axes.set_xticks(range(columns))
        axes.set_yticks(range(rows))
        axes.set_xlabel(f"layers of {model}; framed: shared layers")
        axes.set_ylabel(f"layers of {anchor}")
        axes.set_title(f"Linear CKA; mean deviation from equal depth {mean_deviation:.3f}", fontsize=9)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
