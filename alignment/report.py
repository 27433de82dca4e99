"""What an alignment did, for a person: tables, and the similarity of two models' layers as a figure."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Column, Table

from fedmosaic.alignment.blocks import LayerSimilarity
from fedmosaic.alignment.checkpoint import Manifest
from fedmosaic.alignment.transfer import Score, ratios, summary


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
                *(
                    f"{figures[name][block]:.3f}"
                    for name in ("cka_of_pairs", "inputs_squared_correlation", "outputs_squared_correlation")
                ),
            )
    console.print(table)
    for model in manifest.models:
        figures = model.report
        console.print(
            f"{model.folder}: {figures['texts']} texts, {figures['positions']} positions, "
            f"{figures['seconds']} s, peak memory {figures['peak_memory_mib']} MiB; the most similar layer "
            f"lies {figures['cka_mean_deviation']:.3f} of the depth away from equal relative depth on "
            f"average ({out}/cka-{model.folder}.svg)",
            soft_wrap=True,
        )
    console.print(f"Checkpoints that clients load by path: {out}/<model>", soft_wrap=True)


def print_transfer(
    agreements: Sequence[Mapping[str, Any]], scores: Sequence[Score], console: Console
) -> None:
    """What `fedmosaic align evaluate` measured: agreement, calibrated scores, and the ratios of transfer."""
    table = _folded("Agreement before training, on the tasks' examples", agreements[0])
    for row in agreements:
        table.add_row(*map(_shown, row.values()))
    console.print(table)
    title = "Calibrated scores (mean ± half of the 95 % interval over seeds)"
    console.print(_scored(title, summary(scores), ("task", "bases", "variant")))
    title = "Transfer ratio over the tasks that both models learnt (± half of the 95 % interval)"
    console.print(_scored(title, ratios(scores), ("bases", "variant", "tasks")))


def _scored(title: str, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> Table:
    table = _folded(title, (*keys, "direction", "accuracy", "loss"))
    for row in rows:
        table.add_row(
            *(str(len(row[key]) if key == "tasks" else row[key]) for key in keys),
            f"{row['source']} → {row['target']}",
            *(f"{row[name]:.3f} ± {row[f'{name}_half_width']:.3f}" for name in ("accuracy", "loss")),
        )
    return table


def line_of(values: Mapping[str, Any]) -> str:
    """One row of a table on one line, for a log."""
    return ", ".join(map(_shown, values.values()))


def _folded(title: str, headings: Iterable[str]) -> Table:
    """A table that loses no letter on a narrow terminal: cut there, two tasks would have one name."""
    return Table(*(Column(name, overflow="fold") for name in headings), title=title)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(_shown, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def heat_map(
    similarity: LayerSimilarity, anchor: str, model: str, pairs: Iterable[tuple[int, int]], path: Path
) -> None:
    """Draw linear CKA of all pairs of layers of the anchor and the model as SVG; chosen ones framed."""
    rows, columns = similarity.cka_LM.shape
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedmosaic"}):
        figure = Figure(figsize=(1.5 + 0.35 * columns, 1.8 + 0.35 * rows), layout="constrained")
        axes = figure.subplots()
        axes.imshow(similarity.cka_LM.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
        for row, values in enumerate(similarity.cka_LM.tolist()):
            for column, value in enumerate(values):
                ink = "white" if value > 0.55 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7)
        for row, column in pairs:
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d62728", lw=2))
        axes.set_xticks(range(columns))
        axes.set_yticks(range(rows))
        axes.set_xlabel(f"layers of {model}; framed: shared layers")
        axes.set_ylabel(f"layers of {anchor}")
        deviation = similarity.mean_deviation()
        axes.set_title(f"Linear CKA; mean deviation from equal depth {deviation:.3f}", fontsize=9)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
