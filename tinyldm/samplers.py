"""Samplers: from z_T ~ N(0, 1) to z_0, as pure functions of (eps_theta, z_T, ctx).

Paper:   Sec. 4.1, App. B; DDPM (Ho et al. 2020) Alg. 2; DDIM (Song et al. 2021) Eq. (12), (16).
Symbols: ts the timesteps to visit, falling; sigma the noise that a DDIM step adds, eta its share.
Shapes:  z (B, c, h, w); ctx (B, M, d_ctx) or None; abar (T,) float64.
Reads:   diffusion.py

`randn()` gives fresh noise of z's shape, once a step, never in the last, which lands on z_0.
"""
from collections.abc import Callable

import torch

from tinyldm.diffusion import posterior, predict_z_0


def timesteps(T: int, S: int) -> list[int]:
    """S timesteps from T-1 down, evenly spaced. Raises ValueError unless 1 <= S <= T.

    NB: the released rule, range(0, T, T // S) + 1, gives another number of steps for most S,
    an index out of range for 599 of 1000, and never starts at T-1.
    """
    if not 1 <= S <= T:
        raise ValueError(f"steps must be 1..{T}, not {S}")
    return [T - 1 - i * T // S for i in range(S)]


def pairs(ts: list[int], abar: torch.Tensor):
    """(t, abar_t, abar_s) a step, s being the next timestep; after the last comes abar = 1: z_0.

    NB: the released DDIM ends at abar_0 < 1, leaving noise of std 0.04 (SD: 0.03) in the latent.
    """
    one = abar.new_ones(())
    return [(t, abar[t], abar[s] if s >= 0 else one) for t, s in zip(ts, ts[1:] + [-1])]


@torch.no_grad()
def ddpm(eps_theta: Callable, z_T: torch.Tensor, ctx, abar: torch.Tensor, ts: list[int],
         randn: Callable) -> torch.Tensor:
    """Ancestral sampling, DDPM Alg. 2: draw each z_s from q(z_s | z_t, z_0) with predicted z_0."""
    z = z_T
    for t, abar_t, abar_s in pairs(ts, abar):
        eps = eps_theta(z, torch.full((len(z),), t, device=z.device), ctx)
        z, var = posterior(predict_z_0(z, eps, abar_t), z, abar_t, abar_s)
        if abar_s < 1:
            z = z + var.sqrt() * randn()
    return z


@torch.no_grad()
def ddim(eps_theta: Callable, z_T: torch.Tensor, ctx, abar: torch.Tensor, ts: list[int],
         randn: Callable | None = None, eta: float = 0.0) -> torch.Tensor:
    """DDIM Eq. (12): z_s = sqrt(abar_s) z_0 + sqrt(1 - abar_s - sigma^2) eps + sigma noise.

    sigma = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s). eta = 0 is
    deterministic, eta = 1 has DDPM's variance. randn is needed only when eta > 0.
    """
    z = z_T
    for t, abar_t, abar_s in pairs(ts, abar):
        eps = eps_theta(z, torch.full((len(z),), t, device=z.device), ctx)
        sigma = eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)).sqrt()
        z_0 = predict_z_0(z, eps, abar_t)
        z = abar_s.sqrt() * z_0 + (1 - abar_s - sigma ** 2).clamp(min=0).sqrt() * eps
        if sigma > 0:
            z = z + sigma * randn()
    return z
