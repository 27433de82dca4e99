"""The figure, a number per pair of layers and a frame per chosen one; and tables on a narrow terminal."""

import io
from pathlib import Path
from xml.etree import ElementTree

import torch
from rich.console import Console

from fedmosaic.alignment.blocks import LayerSimilarity
from fedmosaic.alignment.report import heat_map, print_transfer
from fedmosaic.alignment.transfer import MOVED, RETRAINED, ZERO_SHOT, Score


def test_the_figure_shows_every_pair_and_frames_the_chosen_ones(tmp_path: Path) -> None:
    cka = torch.tensor([[1.0, 0.5, -0.01], [0.2, 0.75, float(1.0 + 1e-6)]])
    path = tmp_path / "cka.svg"
    heat_map(LayerSimilarity(cka), "a<b", "c&d", [(0, 0), (1, 2)], path)
    text = path.read_text(encoding="utf-8")
    words = [element.text or "" for element in ElementTree.fromstring(text).iter()]  # noqa: S314  # our own
    assert {"1.00", "0.50", "-0.01", "0.20", "0.75"} <= set(words)
    assert any("equal depth 0.083" in word for word in words)
    assert any("a<b" in word for word in words)
    assert text.count("stroke: #d62728") == 2


def test_tables_keep_the_names_of_tasks_on_a_narrow_terminal() -> None:
    names = ("intents-of-one-kind", "intents-of-one-kind-letters")
    variants = (ZERO_SHOT, RETRAINED, MOVED)
    found = [Score(name, "a", "b", "ours", of, 0, 1.4, 0.3) for name in names for of in variants]
    console = Console(width=60, file=io.StringIO(), record=True)
    print_transfer([{"task": name, "reading": 0.5} for name in names], found, console)
    text = console.export_text()
    assert all(title in text for title in ("Agreement", "Calibrated scores", "Transfer ratio"))
    assert "…" not in text
