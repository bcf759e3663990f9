"""The rules of the house that a machine can check: imports, names, docstrings, README files."""
import ast
import functools
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from tinyldm.tasks import TASKS

PACKAGE = sorted(ROOT.glob("tinyldm/**/*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
CODE = PACKAGE + SCRIPTS
CORE = sorted(ROOT.glob("tinyldm/*.py"))
READMES = sorted([*ROOT.glob("*.md"), *ROOT.glob("tinyldm/**/*.md"), *ROOT.glob("tests/*.md"),
                  *ROOT.glob("notebooks/*.md")])


def name_of(path: Path) -> str:
    """A file's name in messages: its path from the root of the repository."""
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    """tinyldm/data/files.py -> tinyldm.data.files; a folder's __init__.py is the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


MODULES = {module_name(path): path for path in CODE}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    """The full names of all modules that a file imports, also inside functions.

    `from tinyldm.data import files` is tinyldm.data.files, as files is a module there.
    """
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.add(inner if inner in MODULES or node.module == "torch" else node.module)
    return names


def parametrized(files: list[Path]):
    """Run a test once per file, named after it."""
    return pytest.mark.parametrize("path", files, ids=name_of)


# ---- imports

@parametrized(CODE)
def test_only_the_allowed_packages_are_imported(path):
    """matplotlib may be missing, so only the file that plots curves imports it."""
    allowed = {"torch", "numpy", "PIL", "tokenizers", "tqdm", "tinyldm"}
    if path.name == "curves.py":
        allowed.add("matplotlib")

    packages = {name.split(".")[0] for name in imported(path)}
    assert packages <= allowed | set(sys.stdlib_module_names)


def test_modules_import_one_another_without_circles():
    """Modules that need nothing but modules already read can be read; so all can, in turn."""
    waiting = {name: imported(path) & MODULES.keys() for name, path in MODULES.items()}
    read = set()
    while waiting:
        readable = {name for name, needs in waiting.items() if needs <= read}
        assert readable, f"a circle among {sorted(waiting)}"
        read |= readable
        for name in readable:
            del waiting[name]


@parametrized(CORE)
def test_the_core_knows_nothing_of_flags_processes_and_files(path):
    """What the paper says needs no command line, no process group, no disk."""
    for name in imported(path):
        assert not name.startswith(("argparse", "torch.distributed", "tinyldm.engine"))
        assert name not in ("pathlib", "os", "io", "json")


@parametrized(PACKAGE)
def test_the_package_does_not_import_the_scripts(path):
    """The scripts use the package, never the other way round."""
    scripts = {script.stem for script in SCRIPTS}
    assert not imported(path) & scripts


# ---- flags stop at the programs' door

# The scripts, what makes flags for programs and runs them, and three programs of the package.
MAY_HAVE_ARGS = SCRIPTS + [
    ROOT / "tinyldm/engine/flags.py",
    ROOT / "tinyldm/engine/command.py",
    ROOT / "tinyldm/engine/bench.py",
    ROOT / "tinyldm/engine/released.py",
    ROOT / "tinyldm/metrics/__main__.py",
]


def is_program(node: ast.AST) -> bool:
    """True for main and parse_args, which any module may have to be a program."""
    return isinstance(node, ast.FunctionDef) and node.name in ("main", "parse_args")


def flags_in(node: ast.AST) -> set[str]:
    """Which of `args` and `Namespace` are variables, parameters or imports somewhere in a node.

    `*args` is something else: the arguments of any function.
    """
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name):
            names.add(inner.id)
        elif isinstance(inner, ast.Attribute):
            names.add(inner.attr)
        elif isinstance(inner, ast.alias):
            names.add(inner.name)
        elif isinstance(inner, ast.arguments):
            names.update(argument.arg for argument in inner.args + inner.kwonlyargs)
    return names & {"args", "Namespace"}


@parametrized([path for path in PACKAGE if path not in MAY_HAVE_ARGS])
def test_library_functions_take_values_and_no_flags(path):
    """Nothing is called args, and nothing is a Namespace, but in main and parse_args."""
    for node in tree_of(path).body:
        assert is_program(node) or not flags_in(node), f"line {node.lineno}"


def test_programs_that_have_args_are_there():
    """The list of exceptions has no file that is gone."""
    assert all(path.exists() for path in MAY_HAVE_ARGS)


# ---- each task in one place

def is_task_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in TASKS


def compared_task_names(tree: ast.AST) -> list[int]:
    """The lines that compare something with a task's name: ==, !=, in a tuple, match."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.MatchValue) and is_task_name(node.value):
            lines.append(node.lineno)
        if not isinstance(node, ast.Compare):
            continue
        for operator, right in zip(node.ops, node.comparators):
            if isinstance(operator, ast.Eq | ast.NotEq):
                candidates = [node.left, right]
            else:                       # `task in ("text", "class")`
                candidates = getattr(right, "elts", [])
            if any(is_task_name(candidate) for candidate in candidates):
                lines.append(node.lineno)
    return lines


@parametrized([path for path in CODE if path.name != "tasks.py"])
def test_no_task_is_a_special_case_outside_tasks_py(path):
    """Whatever is particular to a task is in its class, so a new task needs no other change."""
    assert compared_task_names(tree_of(path)) == []


@pytest.mark.parametrize("code", [
    "if task == 'text': pass",
    "x = 1 if 'class' != task else 2",
    "if task in ('superres', 'other'): pass",
    "match task:\n    case 'layout': pass",
])
def test_a_comparison_with_a_task_is_found(code):
    """The search for special cases finds each way to write one."""
    assert compared_task_names(ast.parse(code))


# ---- docstrings

@parametrized(CODE)
def test_modules_and_public_names_have_docstrings(path):
    """main and parse_args are told by the docstring of their program."""
    tree = tree_of(path)
    assert ast.get_docstring(tree)

    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            is_public = not node.name.startswith("_") and node.name not in ("main", "parse_args")
            assert not is_public or ast.get_docstring(node), node.name


# ---- README files

def without_blocks(text: str) -> str:
    """The text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def find_file(name: str, readme: Path) -> Path | None:
    """The file that a README means: from the root, from its own folder, or from a usual one."""
    for folder in (ROOT, readme.parent, ROOT / "tinyldm", ROOT / "tests"):
        if (folder / name).exists():
            return folder / name
    return None


def defined_names(path: Path) -> set[str]:
    """The functions, classes and constants of a file, and `Class.method`."""
    names = set()
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(target.id for target in targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            for inner in getattr(node, "body", []):
                if isinstance(node, ast.ClassDef) and isinstance(inner, ast.FunctionDef):
                    names.add(f"{node.name}.{inner.name}")
    return names


@parametrized(READMES)
def test_a_readme_names_what_exists(path):
    """Files `tests/x.py`, `tinyldm/...` or `x.py`; tests and functions `x.py::name`."""
    text = without_blocks(path.read_text())
    for name, function in re.findall(r"`([\w./-]+)(?:::([\w.]+))?`", text):
        is_file = name.startswith(("tests/", "tinyldm/", "notebooks/")) or name.endswith(".py")
        if not is_file:
            continue
        file = find_file(name, path)
        assert file, f"{name} does not exist"
        assert not function or function in defined_names(file), f"{name} has no {function}"


@parametrized(READMES)
def test_a_readme_names_modules_and_links_to_files_that_exist(path):
    """Modules as in `python -m tinyldm.x`, programs as in `python x.py`, links to files."""
    text = path.read_text()
    for name in re.findall(r"python -m (tinyldm[\w.]*)", text):
        assert {name, f"{name}.__main__"} & MODULES.keys(), name
    for name in re.findall(r"python ([\w/]+\.py)", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
