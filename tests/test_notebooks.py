"""Every notebook: the house rules, and each of its cells runs."""
import json
import sys

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def cells(path, kind):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]
            if c["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_keeps_the_house_rules(path):
    code = cells(path, "code")
    assert len(code) + len(cells(path, "markdown")) <= 12 and path.stat().st_size < 1e6
    assert all(len(c.splitlines()) <= 10 and "%" not in c[:1] for c in code)
    text = cells(path, "markdown")
    assert text[0].startswith("# ") and "?" in text[0].splitlines()[0]
    assert "What to try" in text[-1]
    outputs = [c["outputs"] for c in json.loads(path.read_text())["cells"] if "outputs" in c]
    assert sum(any("image/png" in o.get("data", {}) for o in each) for each in outputs) >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_cell_runs(path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    space = {}
    for code in cells(path, "code"):
        exec(code, space)
        space["plt"].close("all")
