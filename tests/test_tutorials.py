"""The notebooks run as they are, on a tiny pretrained model, and hold no place of the machine they ran on."""

import logging
import re
import warnings
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


def check(name: str, shown: str) -> None:
    if name.startswith("own"):
        assert "still running: []\nrounds that began with something received: 1" in shown
        before, after = map(float, re.findall(r"before (0\.\d\d), after (\d\.\d\d)", shown)[0])
        assert after > before
    else:
        assert "10 examples of one person" in shown
        assert re.search(r"joint +server_malicious +dp +ε = +[23]\.\d\d", shown)


@pytest.mark.real_models
@pytest.mark.skipif(not MODEL.exists(), reason="the pretrained stories-260k is not here")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_cells_of_a_notebook_run_one_after_the_other(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEDMOSAIC_TUTORIAL_MODEL", str(MODEL))
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    cells: dict[str, object] = {}
    # Here and not in a kernel, whose imports alone would take as long as both notebooks.
    with warnings.catch_warnings():
        for cell in nbformat.read(TUTORIALS / name, as_version=4).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, name, "exec"), cells)  # noqa: S102  # a cell of ours
    check(name, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.real_models
@pytest.mark.skipif(not MODEL.exists(), reason="the pretrained stories-260k is not here")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_in_a_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOSAIC_TUTORIAL_MODEL", str(MODEL))
    notebook = nbformat.read(TUTORIALS / name, as_version=4)
    NotebookClient(notebook, timeout=250, kernel_name="python3").execute()
    check(name, printed(notebook))
