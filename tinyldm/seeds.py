"""Where randomness comes from: everything random is a function of (seed, index).

The index is the number of a training step or of a sampled image. So a resumed run, another
batch size or more processes change nothing: they ask for the same numbers again.
"""
import numpy as np
import torch
from torch import Tensor


def generator(seed: int, index: int) -> torch.Generator:
    """Return the random generator of training step `index`, or of image `index`.

    Why mixed: torch's CPU generator uses only 32 bits of its seed, and neighbouring pairs
    must not give related numbers.
    """
    mixed = np.random.SeedSequence([seed, index]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


def slerp(a: Tensor, b: Tensor, w: float) -> Tensor:
    """Interpolate from noise a (w = 0) to noise b (w = 1) along the great circle.

    Why not a straight line: halfway between two samples of N(0, 1) it has too small a norm,
    which no network has seen in training. On the circle the norm stays as it is.
    """
    cosine = (a.flatten() @ b.flatten()) / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if angle < 1e-4:
        return a
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)
