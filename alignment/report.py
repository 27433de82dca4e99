"""What an alignment did, for a person: a table, and the same as JSON in the manifest."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fedmosaic.alignment.checkpoint import Manifest


def print_report(manifest: Manifest, out: str, console: Console) -> None:
    """Print one row per model and block.

    Args:
        manifest: What the directory holds.
        out: The directory, as given.
        console: Where to print.
    """
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
