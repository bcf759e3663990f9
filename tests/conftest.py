"""Helpers that several tests use: tiny models' flags, a command line, folders of images."""
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
import torch
from in_two_processes import pytest_runtestloop  # noqa: F401  (pytest finds it here by its name)
from PIL import Image

from tinyldm.engine import command

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# The networks of the tests are so small that a second thread slows them down.
torch.set_num_threads(1)

# Flags of models that train in a second.
TINY_AE = [
    "--ch", "8", "--ch-mult", "1", "2", "--groups", "4", "--batch", "4",
    "--perceptual", "none", "--disc-ch", "4", "--disc-layers", "1", "--disc-start", "1",
    "--log-every", "1", "--n-shapes", "40", "--eval-n", "8",
]
TINY_VQ = [
    *TINY_AE, "--reg", "vq", "--n-codes", "32", "--restart-codes", "1", "--attn-res", "8",
    "--no-attn-mid",
]
TINY_LDM = [
    "--ch", "16", "--d-ctx", "32", "--d-head", "16", "--text-depth", "1", "--groups", "4",
    "--batch", "4", "--log-every", "1", "--n-shapes", "40", "--eval-n", "8",
]

# A U-Net of one level, which is built and run in half the time.
ONE_LEVEL = ["--ch-mult", "1", "--attn-res", "8"]


@contextlib.contextmanager
def signal_handlers_kept():
    """A training run installs signal handlers; put the old ones back afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def cli():
    """Run a script as the command line does: cli("sample.py", "--n", 3, code=2) -> its output.

    It runs as if matplotlib were not installed, unless curves are asked for: to plot them takes
    longer than such a run.
    """
    def run(script, *flags, code=0, curves=False):
        module = importlib.import_module(script.removesuffix(".py"))
        argv = [str(flag) for flag in flags]
        output = io.StringIO()
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(output))
            stack.enter_context(contextlib.redirect_stderr(output))
            stack.enter_context(signal_handlers_kept())
            stack.enter_context(warnings.catch_warnings())
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            warnings.simplefilter("always")
            if not curves:
                patch.setitem(sys.modules, "matplotlib.figure", None)
            try:
                command.run(module.main, lambda: module.parse_args(argv))
                exit_code = 0
            except SystemExit as error:
                exit_code = error.code
        assert exit_code == code, output.getvalue()
        return output.getvalue()

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, cli):
    """A folder with both stages, tiny, trained for two steps: ae/ and ldm/. Only read it."""
    out = tmp_path_factory.mktemp("trained")
    short = ["--size", 16, "--steps", 2]
    cli("train_ae.py", *TINY_AE, *short, "--out", out / "ae")
    cli("train_ldm.py", *TINY_LDM, *ONE_LEVEL, *short, "--ae", out / "ae/ckpt.pt",
        "--out", out / "ldm")
    return out


@pytest.fixture(scope="module")
def few_are_held_out():
    """To evaluate all 256 held-out images of the built-in world takes longer than such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinyldm.data.open.N_HELD_OUT_SHAPES", 16)
        yield


def write_images(path, n, **fields):
    """Make a folder of n random 40x48 images, with metadata.jsonl; each has the same fields."""
    path.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        pixels = rng.integers(0, 255, (48, 40, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": f"picture {i % 3}"} | fields)
    lines = [json.dumps(row) + "\n" for row in rows]
    (path / "metadata.jsonl").write_text("".join(lines))
    return path


@pytest.fixture
def folder(tmp_path):
    """folder(n, name, **fields) -> a new folder, as write_images makes it."""
    def make(n=8, name="images", **fields):
        return write_images(tmp_path / name, n, **fields)

    return make
