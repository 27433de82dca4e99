"""The figure: well-formed, one cell per pair of layers, frames where the chosen pairs are."""

from xml.etree import ElementTree

import torch

from fedmosaic.alignment.heat_map import heat_map

SVG = "{http://www.w3.org/2000/svg}"


def test_the_figure_shows_every_pair_and_frames_the_chosen_ones() -> None:
    cka = torch.tensor([[1.0, 0.5, -0.01], [0.2, 0.75, float(1.0 + 1e-6)]])
    text = heat_map(cka, anchor="a<b", model="c&d", pairs=[(0, 0), (1, 2)], mean_deviation=0.125)
    root = ElementTree.fromstring(text)  # noqa: S314  # written by the function under test
    rectangles = root.findall(f"{SVG}rect")
    cells = [cell for cell in rectangles if (cell.get("fill") or "").startswith("rgb")]
    frames = [frame for frame in rectangles if frame.get("fill") == "none"]
    assert len(cells) == cka.numel()
    assert cells[0].get("fill") == "rgb(8,48,107)"
    assert cells[2].get("fill") == "rgb(255,255,255)"
    corners = {(float(cell.get("x", 0)), float(cell.get("y", 0))) for cell in (cells[0], cells[5])}
    assert {(float(f.get("x", 0)) - 1.5, float(f.get("y", 0)) - 1.5) for f in frames} == corners
    words = [element.text or "" for element in root.iter() if element.text]
    assert any("0.125" in word for word in words)
    assert ".75" in words
    assert any("a<b" in word for word in words)
