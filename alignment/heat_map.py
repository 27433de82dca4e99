"""The similarity of layers as an SVG heat map, drawn by hand so that nothing has to be installed for it."""

from collections.abc import Sequence
from html import escape
from typing import Final

import torch

_CELL: Final = 24
_LEFT: Final = 70
_TOP: Final = 56
_FEWEST_COLUMNS: Final = 12


def heat_map(
    cka_LM: torch.Tensor,
    *,
    anchor: str,
    model: str,
    pairs: Sequence[tuple[int, int]],
    mean_deviation: float,
) -> str:
    """Draw linear CKA of all layer pairs; the chosen pairs are framed.

    Args:
        cka_LM: (L, M) similarities.
        anchor: Name of the anchor, whose layers are the rows.
        model: Name of the other model, whose layers are the columns.
        pairs: Chosen pairs of layers.
        mean_deviation: Mean distance of the arg-max from equal relative depth.

    Returns:
        An SVG document.
    """
    rows, columns = cka_LM.shape
    width = _LEFT + _CELL * max(columns, _FEWEST_COLUMNS) + 20
    height = _TOP + _CELL * rows + 64
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f"<title>Linear CKA of the layers of {escape(anchor)} and {escape(model)}</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="18" font-size="13">Linear CKA, layers of {escape(model)} →</text>',
        f'<text x="14" y="{_TOP + _CELL * rows / 2}" transform="rotate(-90 14 {_TOP + _CELL * rows / 2})" '
        f'text-anchor="middle">{escape(anchor)}</text>',
    ]
    parts += [
        f'<text x="{_LEFT + _CELL * (column + 0.5)}" y="{_TOP - 6}" text-anchor="middle">{column}</text>'
        for column in range(columns)
    ]
    for row in range(rows):
        y = _TOP + _CELL * row
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 16}" text-anchor="end">{row}</text>')
        parts += [_cell(float(cka_LM[row, column]), column, y) for column in range(columns)]
    parts += [
        f'<rect x="{_LEFT + _CELL * column + 1.5}" y="{_TOP + _CELL * row + 1.5}" width="{_CELL - 3}" '
        f'height="{_CELL - 3}" fill="none" stroke="#d62728" stroke-width="3"/>'
        for row, column in pairs
    ]
    return "\n".join([*parts, *_legend(_TOP + _CELL * rows, mean_deviation), "</svg>"]) + "\n"


def _legend(y: float, mean_deviation: float) -> tuple[str, str]:
    return (
        f'<text x="{_LEFT}" y="{y + 22}">framed: shared layers of the two models</text>',
        f'<text x="{_LEFT}" y="{y + 40}">mean deviation of the most similar layer from equal relative '
        f"depth: {mean_deviation:.3f}</text>",
    )


def _cell(value: float, column: int, y: float) -> str:
    share = min(1.0, max(0.0, value))
    # From white to dark blue, readable without colour too.
    red, green, blue = (round(255 + share * (end - 255)) for end in (8, 48, 107))
    ink = "white" if share > 0.55 else "black"
    x = _LEFT + _CELL * column
    return (
        f'<rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" fill="rgb({red},{green},{blue})"/>'
        f'<text x="{x + _CELL / 2}" y="{y + 16}" text-anchor="middle" font-size="9" fill="{ink}">'
        f"{value:.2f}</text>".replace(">0.", ">.")
    )
