"""The diffusion process: noise schedules, q_sample, posterior and loss. It knows no network.

Paper:   Eq. (1)-(3) and App. B; DDPM (Ho et al. 2020) Eq. (4), (7), (14). t runs from 0 to T-1.
Symbols: beta_t the step's noise variance, alpha_t = 1 - beta_t, abar_t = prod alpha (always DDPM's
         meaning; the LDM appendix writes alpha_t for sqrt(abar_t)); eps ~ N(0, 1).
Shapes:  betas, abar (T,) float64; z, z_t, z_0, eps (B, c, h, w); t (B,) integers.
Reads:   nothing of ours.
"""
import math
from collections.abc import Callable

import torch


def sqrt_linear_betas(T: int = 1000, start: float = 0.0015, end: float = 0.0195) -> torch.Tensor:
    """The paper's schedule (App. E.2.1): sqrt(beta) rises linearly from sqrt(start) to sqrt(end).

    NB: the released code calls this "linear", and "sqrt_linear" what is linear in beta itself.
    """
    return torch.linspace(start ** 0.5, end ** 0.5, T, dtype=torch.float64) ** 2


def sd_betas(T: int = 1000) -> torch.Tensor:
    """The same with the ends of the released text-to-image models (Stable Diffusion's too).

    It destroys the picture later, and leaves more of it in z_T: sqrt(abar_T) = 0.068.
    """
    return sqrt_linear_betas(T, 0.00085, 0.012)


def cosine_betas(T: int = 1000, offset: float = 0.008) -> torch.Tensor:
    """Nichol and Dhariwal 2021, Eq. (17): abar_t ~ cos^2, every beta at most 0.999."""
    u = (torch.arange(T + 1, dtype=torch.float64) / T + offset) / (1 + offset)
    abar = (u * math.pi / 2).cos() ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)


SCHEDULES = {"sqrt-linear": sqrt_linear_betas, "sd": sd_betas, "cosine": cosine_betas}


def cumulative(betas: torch.Tensor) -> torch.Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), (T,) float64."""
    return (1 - betas).cumprod(0)


def at(abar: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """abar_t as (B, 1, 1, 1) in z's dtype, from float64 abar (T,)."""
    return abar[t].to(z.dtype).view(-1, 1, 1, 1)


def q_sample(z: torch.Tensor, t: torch.Tensor, eps: torch.Tensor,
             abar: torch.Tensor) -> torch.Tensor:
    """DDPM Eq. (4): z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps."""
    a = at(abar, t, z)
    return a.sqrt() * z + (1 - a).sqrt() * eps


def predict_z_0(z_t: torch.Tensor, eps: torch.Tensor, abar_t: torch.Tensor) -> torch.Tensor:
    """q_sample solved for z: z_0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t); abar_t a number."""
    return (z_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()


def posterior(z_0: torch.Tensor, z_t: torch.Tensor, abar_t: torch.Tensor,
              abar_s: torch.Tensor) -> tuple:
    """q(z_s | z_t, z_0) for s < t: its mean and variance (a number). DDPM Eq. (7) where s = t - 1.

    alpha = abar_t / abar_s, beta = 1 - alpha,
    mean = (sqrt(abar_s) beta z_0 + sqrt(alpha) (1 - abar_s) z_t) / (1 - abar_t),
    var = beta (1 - abar_s) / (1 - abar_t). With abar_s = 1 it is z_0 itself.
    """
    alpha = abar_t / abar_s
    beta = 1 - alpha
    mean = (abar_s.sqrt() * beta * z_0 + alpha.sqrt() * (1 - abar_s) * z_t) / (1 - abar_t)
    return mean, beta * (1 - abar_s) / (1 - abar_t)


def v_target(z: torch.Tensor, eps: torch.Tensor, abar_t: torch.Tensor) -> torch.Tensor:
    """v = sqrt(abar_t) eps - sqrt(1 - abar_t) z (Salimans and Ho 2022, Eq. (12) in our letters)."""
    return abar_t.sqrt() * eps - (1 - abar_t).sqrt() * z


def as_eps_theta(net: Callable, abar: torch.Tensor, predict: str) -> Callable:
    """eps_theta(z_t, t, ctx) from a net that predicts "eps" (the net itself) or "v":

    eps = sqrt(abar_t) v + sqrt(1 - abar_t) z_t.
    """
    def eps_theta(z_t: torch.Tensor, t: torch.Tensor, ctx: torch.Tensor | None) -> torch.Tensor:
        a = at(abar, t, z_t)
        return a.sqrt() * net(z_t, t, ctx).float() + (1 - a).sqrt() * z_t
    return net if predict == "eps" else eps_theta


def ldm_loss(net: Callable, z: torch.Tensor, t: torch.Tensor, eps: torch.Tensor,
             abar: torch.Tensor, ctx: torch.Tensor | None = None, norm: str = "l2",
             predict: str = "eps") -> torch.Tensor:
    """LDM Eq. (2), with ctx = tau(y) Eq. (3): |eps - net(z_t, t, ctx)|^2, mean of c, h, w -> (B,).

    Eq. (1) is the same with z = x, the pixels. A net that knows nothing (0) has loss 1.
    predict "v" is not in the paper. In terms of errors of z_0, Eq. (2) weighs a timestep by
    abar / (1 - abar), which is next to nothing where noise is high; but there the layout of a
    picture is decided. For v the weight is one more: 1 / (1 - abar).
    NB: the paper writes L2; the configs of churches, inpainting, layout and maps have "l1".
    """
    target = eps if predict == "eps" else v_target(z, eps, at(abar, t, z))
    d = target - net(q_sample(z, t, eps, abar), t, ctx).float()
    return (d.abs() if norm == "l1" else d ** 2).flatten(1).mean(1)
