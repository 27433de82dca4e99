"""The notebooks run as they are, on a tiny pretrained model, and hold no place of the machine they ran on."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
MODEL = Path(__file__).parents[2] / "shared" / "models" / "stories-260k"
NOTEBOOKS = sorted(path.name for path in TUTORIALS.glob("*.ipynb"))


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.output_type for output in outputs if output.output_type == "error"] == []
    return "".join(output.get("text", "") for output in outputs)


def test_both_are_there() -> None:
    assert NOTEBOOKS == ["own-model.ipynb", "privacy-statement.ipynb"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_kept_of_a_run_names_no_place(name: str) -> None:
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    shown = printed(notebook)
    assert shown
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|usr|opt|Users)/", shown)
    text = (TUTORIALS / name).read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!http)[^)#]+)", text)
    assert links
    assert [link for link in links if not (TUTORIALS / link).exists()] == []


@pytest.mark.slow
@pytest.mark.real_models
@pytest.mark.skipif(not MODEL.exists(), reason="the pretrained stories-260k is not here")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_to_its_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOSAIC_TUTORIAL_MODEL", str(MODEL))
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    NotebookClient(notebook, timeout=250, kernel_name="python3").execute()
    shown = printed(notebook)
    if name.startswith("own"):
        assert "rounds that began with something received: 1" in shown
        before, after = map(float, re.findall(r"before (0\.\d\d), after (\d\.\d\d)", shown)[0])
        assert after > before
    else:
        assert "10 examples of one person" in shown
        assert re.search(r"joint +server_malicious +dp +ε = +[23]\.\d\d", shown)
