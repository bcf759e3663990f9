"""The house rules that a machine can check: sizes, imports, files, no stray text."""
import ast
import re
import sys

import pytest
from conftest import ROOT

CODE = sorted([*ROOT.glob("tinyldm/*.py"), *ROOT.glob("*.py")])
OURS = {p.stem for p in ROOT.glob("tinyldm/*.py")}


def imports(path):
    """All modules that a file imports, as (package, name) pairs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((a.name.split(".")[0], None) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
            yield from ((parts[0], n) for n in names)


def test_sizes():
    lengths = {p.name: len(p.read_text().splitlines()) for p in CODE}
    assert sum(lengths.values()) < 4000 and max(lengths.values()) <= 300, lengths


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_only_the_allowed_packages_are_imported(path):
    allowed = {"torch", "numpy", "PIL", "tokenizers", "tqdm", "tinyldm"}
    if path.name == "pictures.py":
        allowed |= {"matplotlib"}           # within a try: it may be missing
    assert {p for p, _ in imports(path)} <= allowed | set(sys.stdlib_module_names)


def test_imports_run_one_way():
    needs = {p.stem: {n for k, n in imports(p) if k == "tinyldm" and n in OURS}
             for p in ROOT.glob("tinyldm/*.py")}
    for name in ("layers", "diffusion", "guidance", "patchgan", "perceptual", "tokens", "quantize"):
        assert not needs[name], name
    done = set()
    while needs:
        free = {n for n, uses in needs.items() if uses <= done}
        assert free, f"a circle among {sorted(needs)}"
        done |= free
        needs = {n: u for n, u in needs.items() if n not in free}


@pytest.mark.parametrize("path", CODE, ids=lambda p: p.name)
def test_every_module_opens_with_its_fields_and_functions_stay_short(path):
    tree = ast.parse(path.read_text())
    doc = ast.get_docstring(tree)
    assert doc
    if path.parent.name == "tinyldm" and path.name not in ("__init__.py", "presets.py"):
        assert "Reads:" in doc
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            wall = {"main": 130, "__init__": 60}.get(node.name, 50)
            assert node.end_lineno - node.lineno < wall, f"{path.name}: {node.name}"


def test_the_readme_names_files_tests_and_line_counts_as_they_are():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`(tests/\w+\.py|tinyldm/\w+\.\w+|\w+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "tinyldm" / name).exists(), name
    for test, function in re.findall(r"`(test_\w+)\.py::(\w+)`", text):
        assert f"def {function}(" in (ROOT / "tests" / f"{test}.py").read_text(), function
    counts = re.findall(r"^ +(\w+\.py) +(\d+) ", text, re.M)
    assert len(counts) > 15
    for name, n in counts:
        path = ROOT / name if (ROOT / name).exists() else ROOT / "tinyldm" / name
        assert abs(len(path.read_text().splitlines()) - int(n)) <= 5, name
