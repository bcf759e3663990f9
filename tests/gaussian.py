"""Gaussian data, for which all is known in closed form: an oracle for samplers.

If z_0 ~ N(M, S^2), independently everywhere, then z_t is Gaussian, too:

    z_t ~ N(sqrt(abar_t) M, abar_t S^2 + 1 - abar_t)

so the eps_theta that perfect training would reach is known, and so is where a perfect
deterministic solver takes a z_t.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from tinyldm.diffusion import cumulative, sqrt_linear_betas

M = 0.5
S = 0.3
ABAR = cumulative(sqrt_linear_betas(1000))


def variance(abar_t: Tensor) -> Tensor:
    """The variance of z_t."""
    return abar_t * S ** 2 + 1 - abar_t


def eps_theta(z_t: Tensor, t: Tensor, ctx: tuple = ()) -> Tensor:
    """The mean of eps, given z_t."""
    abar_t = ABAR[t].view(-1, 1, 1, 1)
    away = z_t - abar_t.sqrt() * M
    return ((1 - abar_t).sqrt() * away / variance(abar_t)).to(z_t.dtype)


def exact_solution(z_t: Tensor, t: int, s: int) -> Tensor:
    """Where the probability flow takes z_t from t to s.

    Each value keeps its place in the distribution: as many std from the mean as before.
    """
    away = (z_t - ABAR[t].sqrt() * M) / variance(ABAR[t]).sqrt()
    return ABAR[s].sqrt() * M + variance(ABAR[s]).sqrt() * away


def noise() -> tuple[Tensor, Callable[[], Tensor]]:
    """Return z_T (64, 1, 16, 16), and randn() for the steps; the same numbers each time."""
    generator = torch.Generator().manual_seed(0)

    def randn() -> Tensor:
        return torch.randn(64, 1, 16, 16, generator=generator)

    return randn(), randn
