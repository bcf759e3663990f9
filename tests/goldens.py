"""Reference numbers of the official code in tests/golden/*.npz: made once, on the CPU, in float32.

Keys: in/* inputs, out/* what the official code returned, config and recipe (json), w/* the few
weights that no recipe gives. Every weight is pseudo-random; no released file is needed.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import torch

def golden(name: str):
    """The arrays of tests/golden/<name>.npz by key; z["out/y"] is a numpy array."""
    return np.load(Path(__file__).parent / "golden" / f"{name}.npz")


def weights(recipe, case: str = "") -> dict[str, torch.Tensor]:
    """The state dict that recipe (an npz's "recipe") describes, under the official code's keys.

    case: take only the keys that begin so, and cut it off; a file of several models has "n3/...".
    Weights under "w/" in the npz are not in the recipe: add them where there are any.
    """
    state = {}
    for row in json.loads(str(recipe)):
        if not row["key"].startswith(case):
            continue
        r, shape = np.random.RandomState(zlib.crc32(row["seed"].encode())), row["shape"]
        if row["kind"] == "uniform":
            v = r.uniform(0.5, 1.5, shape)
        else:
            v = r.normal(0, row["std"], shape) + {"normal": 0, "one+normal": 1}[row["kind"]]
        v = np.round(v * row["grid"]) / row["grid"]
        state[row["key"][len(case):]] = torch.from_numpy(v.astype(np.float32))
    return state


def close(a, b, tol: float = 5e-5) -> float:
    """Assert max|a - b| <= tol max|b| for tensors or arrays of one shape; b is the reference.

    Returns max|a - b| / max|b|.
    """
    a, b = (np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x) for x in (a, b))
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    off, largest = np.abs(a.astype(np.float64) - b).max(), np.abs(b).max()
    assert off <= tol * largest, f"off by {off:.3g} where the largest is {largest:.3g}"
    return off / largest if off else 0.0
