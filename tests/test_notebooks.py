"""Every notebook: the rules of the house, and each of its cells runs as in Jupyter."""
import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT, signal_handlers_kept

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.stem != "exercises"]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict]:
    """The cells of a notebook that are "code" or "markdown"."""
    notebook = json.loads(path.read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def sources(path: Path, kind: str) -> list[str]:
    """The text of each of these cells."""
    return ["".join(cell["source"]) for cell in cells(path, kind)]


def has_figure(cell: dict) -> bool:
    """True if the kept output of a cell has an image."""
    return any("image/png" in output.get("data", {}) for output in cell["outputs"])


@every_notebook
def test_a_notebook_is_short(path):
    """Its cells have at most 10 lines of code, and it is smaller than 1 MB."""
    code = sources(path, "code")
    assert path.stat().st_size < 1e6
    for cell in code:
        assert len(cell.splitlines()) <= 10
        assert not cell.startswith("%")


@every_notebook
def test_a_notebook_begins_with_a_question_and_ends_with_what_to_try(path):
    text = sources(path, "markdown")
    title = text[0].splitlines()[0]
    assert title.startswith("# ")
    assert "?" in title
    assert "What to try" in text[-1]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_a_lesson_keeps_three_figures_or_more(path):
    """They can be looked at without running anything."""
    figures = [cell for cell in cells(path, "code") if has_figure(cell)]
    assert len(figures) >= 3


@every_notebook
def test_every_cell_runs(path, monkeypatch):
    """In the folder of the notebooks, from which the package can be imported, but no script."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(path.parent)
    others = [folder for folder in sys.path if folder != str(ROOT)]
    monkeypatch.setattr(sys, "path", [str(path.parent), *others])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for script in ("train_ae", "train_ldm"):
        monkeypatch.delitem(sys.modules, script, raising=False)

    space = {}
    with signal_handlers_kept():
        for code in sources(path, "code"):
            exec(code, space)
            pyplot.close("all")
