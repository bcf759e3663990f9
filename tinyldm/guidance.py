"""Classifier-free guidance: drop the condition in training, extrapolate away from none in sampling.

Paper:   Sec. 4.3.1, Table 10; Ho and Salimans 2021, Eq. (6). s = 1: no guidance (their w = s - 1).
Shapes:  z_t (B, c, h, w); t (B,); ctx, y (B, ...); ctx_null (1 or B, ...). Reads: nothing of ours.
NB: the released code reports guided results but contains no dropping of conditions."""
from collections.abc import Callable

import torch

def drop_condition(y: torch.Tensor, y_null: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
    """y with the rows where drop (B,) is true replaced by the null condition y_null (...)."""
    return torch.where(drop.view(-1, *[1] * (y.ndim - 1)), y_null, y)

def guided(eps_theta: Callable, ctx_null: torch.Tensor, s: float) -> Callable:
    """eps = eps_theta(ctx_null) + s (eps_theta(ctx) - eps_theta(ctx_null)), both in one call."""
    def eps(z_t: torch.Tensor, t: torch.Tensor, ctx: torch.Tensor) -> torch.Tensor:
        both = torch.cat([ctx_null.expand_as(ctx), ctx])
        e_null, e = eps_theta(torch.cat([z_t, z_t]), torch.cat([t, t]), both).chunk(2)
        return e_null + s * (e - e_null)
    return eps_theta if s == 1 else eps
