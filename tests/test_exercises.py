"""The exercises' checks: the package's own functions pass, and what is wrong is told."""
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))

import checks  # noqa: E402, as it lies beside the notebooks

NOTEBOOK = ROOT / "notebooks/exercises.ipynb"

every_exercise = pytest.mark.parametrize("name", checks.EXERCISES)


@every_exercise
def test_the_packages_own_function_is_right(name, capsys):
    assert checks.check(name, checks.EXERCISES[name].solution)
    assert "right" in capsys.readouterr().out


@every_exercise
def test_three_mistakes_are_told_apart(name):
    mistakes = checks.EXERCISES[name].mistakes
    assert len(mistakes) >= 3
    for message, mistake in mistakes.items():
        assert checks.problem_of(checks.EXERCISES[name], mistake) == message


@every_exercise
def test_an_answer_that_is_no_answer_is_told(name, capsys):
    def empty(*args):
        raise NotImplementedError

    def fails(*args):
        return args[0].no_such_thing

    exercise = checks.EXERCISES[name]
    results = exercise.outcome(exercise.solution)
    assert "results, where" in checks.difference((*results, results[0]), results)
    assert checks.problem_of(exercise, empty) == "it is still empty"
    assert "it stops with AttributeError" in checks.problem_of(checks.EXERCISES[name], fails)
    assert not checks.check(name, empty)
    assert "not yet" in capsys.readouterr().out


def test_the_notebook_has_every_exercise_still_to_be_done():
    """Each is asked for, is empty, is checked, and can be looked up."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for name in checks.EXERCISES:
        assert f"def {name}(" in code
        assert f'check("{name}", {name})' in code
        assert f'solution("{name}")' in code
    assert code.count("raise NotImplementedError") == len(checks.EXERCISES)
