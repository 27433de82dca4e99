"""What an alignment did, for a person: a table, and the similarity of two models' layers as a figure."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

from fedmosaic.alignment.checkpoint import Manifest


def print_report(manifest: Manifest, out: str, console: Console) -> None:
    """One row per model and block of what the directory `out` holds."""
    table = Table(title=f"Aligned to {manifest.anchor.folder} ({manifest.label})")
    for heading in ("model", "block", "layers", "CKA", "inputs r²", "outputs r²"):
        table.add_column(heading)
    for model in manifest.models:
        figures = model.report
        for block, layer in enumerate(model.layers):
            table.add_row(
                model.folder if block == 0 else "",
                str(block),
                f"{manifest.anchor.layers[block]} ↔ {layer}",
                _number(figures.get("cka_of_pairs"), block),
                _number(figures.get("inputs_squared_correlation"), block),
                _number(figures.get("outputs_squared_correlation"), block),
            )
    console.print(table)
    for model in manifest.models:
        figures = model.report
        console.print(
            f"{model.folder}: {figures.get('texts', 0)} texts, {figures.get('positions', 0)} positions, "
            f"{figures.get('seconds', 0.0)} s, peak memory {figures.get('peak_memory_mib', 0)} MiB; the most "
            f"similar layer lies {figures.get('cka_mean_deviation', 0.0):.3f} of the depth away from equal "
            f"relative depth on average ({out}/cka-{model.folder}.svg)",
            soft_wrap=True,
        )
    console.print(f"Checkpoints that clients load by path: {out}/<model>", soft_wrap=True)


def _number(values: Sequence[float] | None, index: int) -> str:
    return "" if not values or index >= len(values) else f"{values[index]:.3f}"


def heat_map(
    cka_LM: torch.Tensor,
    *,
    anchor: str,
    model: str,
    pairs: Sequence[tuple[int, int]],
    mean_deviation: float,
    path: Path,
) -> None:
    """Draw linear CKA of all pairs of L layers of the anchor and M of the model as SVG; chosen ones framed.

    The mean deviation is that of the arg-max from equal relative depth.
    """
    rows, columns = cka_LM.shape
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedmosaic"}):
        figure = Figure(figsize=(1.5 + 0.35 * columns, 1.8 + 0.35 * rows), layout="constrained")
        axes = figure.subplots()
        axes.imshow(cka_LM.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
        for row, values in enumerate(cka_LM.tolist()):
            for column, value in enumerate(values):
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
