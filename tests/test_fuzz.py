"""Strangers' files, mutated by chance: nothing runs, nothing is written, memory and time stay
bounded, and all that is wrong is BadInput in one line.

pytest -m slow takes FUZZ_SECONDS (60) for each reader, with FUZZ_SEED (the time).
"""
import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

pytest.importorskip("resource")         # Windows has no limits

NAMES = (
    "images", "maps", "boxes", "metadata", "zips", "tars", "checkpoints", "released",
    "vocabularies", "prompts",
)


def run_readers(folder, names, seed, seconds, most=10 ** 9):
    """Let readers read in a process with limits; return what it says of each."""
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    flags = [",".join(names), str(seed), str(seconds), str(most), "--folder", folder]
    process = subprocess.run(
        [sys.executable, ROOT / "tests/fuzz_child.py", *flags],
        capture_output=True,
        text=True,
        cwd=folder,
        env=env,
    )
    now = folder / "now"
    number = now.read_text() if now.exists() else "before the first input"
    assert process.returncode == 0, (number, process.stderr[-2000:])

    results = json.loads(process.stdout.splitlines()[-1])
    for name, result in results.items():
        print(name, result)
    assert not (folder / "canary").exists()
    faults = {name: result["faults"] for name, result in results.items() if result["faults"]}
    assert not faults
    return results


def test_some_mutated_files_of_each_kind(tmp_path):
    """Some inputs of each kind are read and some are refused, else they would test nothing."""
    results = run_readers(tmp_path, NAMES, seed=0, seconds=600, most=20)
    assert tuple(results) == NAMES
    for name, result in results.items():
        assert result["read"] > 0 and result["refused"] > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_for_a_minute(name, tmp_path):
    """As many inputs as there is time for."""
    seed = int(os.environ.get("FUZZ_SEED", time.time()))
    seconds = float(os.environ.get("FUZZ_SECONDS", 60))
    run_readers(tmp_path, [name], seed, seconds)
