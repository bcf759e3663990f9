"""Small helpers that several tests use."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
TINY_AE = ["--ch", "8", "--ch-mult", "1", "2", "--groups", "4", "--batch", "4",
           "--perceptual", "none", "--disc-ch", "4", "--disc-layers", "1", "--disc-start", "1",
           "--log-every", "1"]
TINY_LDM = ["--ch", "16", "--d-text", "32", "--d-head", "16", "--text-depth", "1",
            "--groups", "4", "--batch", "4", "--log-every", "1"]


@pytest.fixture
def cli():
    """Run a script as a user would: cli("sample.py", "--n", 3, code=2) -> its stdout and stderr."""
    def run(script, *flags, code=0, cwd=ROOT):
        env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        p = subprocess.run([sys.executable, ROOT / script, *map(str, flags)], cwd=cwd, env=env,
                           capture_output=True, text=True, timeout=100)
        assert p.returncode == code, p.stdout + p.stderr
        return p.stdout + p.stderr
    return run


@pytest.fixture
def folder(tmp_path):
    """folder(n, captions=...) -> a folder of n random 40x48 pictures with metadata.jsonl."""
    def make(n=8, name="pics", **fields):
        path = tmp_path / name
        path.mkdir()
        rng, rows = np.random.default_rng(0), []
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (48, 40, 3), np.uint8)).save(path / f"{i}.png")
            rows.append({"file_name": f"{i}.png", "text": f"picture {i % 3}"} | fields)
        (path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return path
    return make
