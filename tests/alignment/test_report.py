"""The figure: well-formed, a number per pair of layers, a frame per chosen pair."""

from pathlib import Path
from xml.etree import ElementTree

import torch

from fedmosaic.alignment.report import heat_map


def test_the_figure_shows_every_pair_and_frames_the_chosen_ones(tmp_path: Path) -> None:
    cka = torch.tensor([[1.0, 0.5, -0.01], [0.2, 0.75, float(1.0 + 1e-6)]])
    path = tmp_path / "cka.svg"
    heat_map(cka, anchor="a<b", model="c&d", pairs=[(0, 0), (1, 2)], mean_deviation=0.125, path=path)
    text = path.read_text(encoding="utf-8")
    words = [element.text or "" for element in ElementTree.fromstring(text).iter()]  # noqa: S314  # our own
    assert {"1.00", "0.50", "-0.01", "0.20", "0.75"} <= set(words)
    assert any("0.125" in word for word in words)
    assert any("a<b" in word for word in words)
    assert text.count("stroke: #d62728") == 2
