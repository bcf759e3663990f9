"""Small helpers that several tests use."""
import contextlib
import importlib
import io
import json
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tinyldm import training as tr

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TINY_AE = ["--ch", "8", "--ch-mult", "1", "2", "--groups", "4", "--batch", "4",
           "--perceptual", "none", "--disc-ch", "4", "--disc-layers", "1", "--disc-start", "1",
           "--log-every", "1", "--n-shapes", "40", "--eval-n", "8"]
TINY_VQ = [*TINY_AE, "--reg", "vq", "--n-codes", "32", "--restart-codes", "1", "--attn-res", "8",
           "--no-attn-mid"]
TINY_LDM = ["--ch", "16", "--d-ctx", "32", "--d-head", "16", "--text-depth", "1",
            "--groups", "4", "--batch", "4", "--log-every", "1", "--n-shapes", "40",
            "--eval-n", "8"]


@pytest.fixture(scope="session")
def cli():
    """Run a script as the command line does: cli("sample.py", "--n", 3, code=2) -> its output.

    As if matplotlib were not installed, unless curves are asked for: they take longer than a run.
    """
    def run(script, *flags, code=0, curves=False):
        module, said = importlib.import_module(script[:-3]), io.StringIO()
        handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), \
                pytest.MonkeyPatch.context() as patch:
            if not curves:
                patch.setitem(sys.modules, "matplotlib.figure", None)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("always")
                    tr.run(module.main, lambda: module.parse_args([str(f) for f in flags]))
                got = 0
            except SystemExit as e:
                got = e.code
        for s, handler in handlers.items():
            signal.signal(s, handler)
        assert got == code, said.getvalue()
        return said.getvalue()
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
