"""Training runs: what they leave in their folder, read back, and losses that go wrong."""
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.testing import assert_close

from tinyldm.engine.checkpoint import load_checkpoint

# Figures of the log that the clock and the machine decide.
TIMING = {"ms", "img_per_s", "gb", "eta_min"}

# What a checkpoint holds that training made.
TRAINED = ("step", "nets", "opts", "idle", "opt", "ema", "ema_n", "ae")


def log_rows(folder: Path) -> list[dict]:
    """The rows of log.jsonl."""
    text = (folder / "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def figures(folder: Path, left_out: set[str] = TIMING) -> list[dict]:
    """The rows of log.jsonl, without the figures that two equal runs may differ in."""
    rows = []
    for row in log_rows(folder):
        rows.append({name: v for name, v in row.items() if name not in left_out})
    return rows


def steps_of(rows: list[dict]) -> list[int]:
    """The steps of some rows of a log."""
    return [row["step"] for row in rows]


def trained_state(path: Path) -> dict:
    """All that training made, from the checkpoint at a path, or from ckpt.pt in a folder."""
    if path.is_dir():
        path = path / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    return {name: checkpoint[name] for name in TRAINED if name in checkpoint}


def step_in(path: Path) -> int:
    """The step of a checkpoint, or of the one before it if it is damaged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_checkpoint(path)["step"]


def assert_same_state(a: Path, b: Path) -> None:
    """Every tensor and number that training made is the same in two runs, bit for bit."""
    assert_close(trained_state(a), trained_state(b), rtol=0, atol=0)


def spoiled_at(n: int, function: Callable, spoil: Callable) -> Callable:
    """Return function, whose n-th result (1, 2, ...) goes through spoil."""
    n_calls = 0

    def spoiled(*args, **kwargs):
        nonlocal n_calls
        n_calls += 1
        result = function(*args, **kwargs)
        return spoil(result) if n_calls == n else result

    return spoiled


def times_nan(loss):
    """A loss that is not finite, and whose gradient is not, either."""
    return loss * torch.nan
