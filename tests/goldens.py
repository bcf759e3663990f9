"""Reference numbers of the official code, in tests/golden/*.npz.

They were computed once, on a CPU in float32. A file has in/* (inputs), out/* (what the
official code returns for them), config and recipe (JSON), and sometimes grad/*. All
weights are pseudo-random, so no released file is needed: recipe says how to make them,
and the few that it does not cover are stored under w/*.
"""
import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tinyldm.engine.released_names import sources

FOLDER = Path(__file__).parent / "golden"


def golden(name: str):
    """Return the arrays of tests/golden/<name>.npz by key, such as z["out/y"]."""
    return np.load(FOLDER / f"{name}.npz")


def weights(recipe, case: str = "") -> dict[str, Tensor]:
    """Return the state dict that a recipe describes, under the official code's keys.

    recipe: an npz's "recipe". case: only the keys that begin with it, and without it;
    files of several models have keys like "n3/...".
    """
    state = {}
    for row in json.loads(str(recipe)):
        if row["key"].startswith(case):
            state[row["key"].removeprefix(case)] = made_weight(row)
    return state


def made_weight(row: dict) -> Tensor:
    """Return the tensor that a row of a recipe describes."""
    seed = zlib.crc32(row["seed"].encode())
    random = np.random.RandomState(seed)

    if row["kind"] == "uniform":
        values = random.uniform(0.5, 1.5, row["shape"])
    else:
        mean = {"normal": 0, "one+normal": 1}[row["kind"]]
        values = random.normal(0, row["std"], row["shape"]) + mean

    values = np.round(values * row["grid"]) / row["grid"]
    return torch.from_numpy(values.astype(np.float32))


def close(a, b, tol: float = 5e-5) -> float:
    """Assert max|a - b| <= tol max|b| for tensors or arrays of one shape.

    b is the reference. Returns max|a - b| / max|b|.
    """
    a = as_array(a)
    b = as_array(b)
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"

    error = np.abs(a.astype(np.float64) - b).max()
    largest = np.abs(b).max()
    message = f"off by {error:.3g}, where the largest value is {largest:.3g}"
    assert error <= tol * largest, message
    return error / largest if error else 0.0


def as_array(x) -> np.ndarray:
    """Return a tensor or an array as an array."""
    if isinstance(x, Tensor):
        x = x.detach().cpu()
    return np.asarray(x)


def gradients_close(net: nn.Module, x: Tensor, y: Tensor, ref) -> None:
    """Assert that the gradients of mean(y * cotangent) are the official code's.

    y is net's output for x. The gradient of x is compared value by value, those of the
    parameters by their norms. Where a tensor of ours joins several official ones
    (q, k and v), its norm is that of all of them together.
    """
    net.zero_grad()
    x.grad = None
    cotangent = torch.from_numpy(ref["in/cotangent"])
    (y * cotangent).mean().backward(retain_graph=True)
    close(x.grad, ref["grad/x"], 2e-4)

    official = dict(zip(ref["grad/names"], ref["grad/norms"]))
    table = sources(net)
    ours = []
    wanted = []
    for key, parameter in net.named_parameters():
        gradient = parameter.grad
        ours.append(torch.zeros(()) if gradient is None else gradient.norm())
        wanted.append(math.hypot(*[official[name] for name in table[key].keys]))
    assert_close(torch.stack(ours), torch.tensor(wanted), rtol=2e-4, atol=1e-6)
