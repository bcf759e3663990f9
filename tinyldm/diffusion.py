"""The diffusion process: noise schedules, q_sample, posterior and loss. It knows no network.

Paper:   Eq. (1)-(3) and App. B; DDPM (Ho et al. 2020) Eq. (4), (7), (14). t runs from 0 to T-1.
Symbols: beta_t the step's noise variance, alpha_t = 1 - beta_t, abar_t = prod alpha (always DDPM's
         meaning; the LDM appendix writes alpha_t for sqrt(abar_t)); eps ~ N(0, 1).
Shapes:  betas, abar (T,) float64; z, z_t, z_0, eps (B, c, h, w); t (B,). Reads: nothing of ours."""
import math
from collections.abc import Callable

import torch

def sqrt_linear_betas(T: int = 1000, start: float = 0.0015, end: float = 0.0195) -> torch.Tensor:
    """The paper's schedule (App. E.2.1): sqrt(beta) rises linearly from sqrt(start) to sqrt(end).
    NB: the released code calls this "linear", and "sqrt_linear" what is linear in beta itself."""
    return torch.linspace(start ** 0.5, end ** 0.5, T, dtype=torch.float64) ** 2

def cosine_betas(T: int = 1000, offset: float = 0.008) -> torch.Tensor:
    """Nichol and Dhariwal 2021, Eq. (17): abar_t ~ cos^2, every beta at most 0.999."""
    u = (torch.arange(T + 1, dtype=torch.float64) / T + offset) / (1 + offset)
    abar = (u * math.pi / 2).cos() ** 2
    return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)

SCHEDULES = {"sqrt-linear": sqrt_linear_betas, "cosine": cosine_betas}

def cumulative(betas: torch.Tensor) -> torch.Tensor:
    """abar_t = prod_{s <= t} (1 - beta_s), (T,) float64."""
    return (1 - betas).cumprod(0)

def at(abar: torch.Tensor, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """abar_t as (B, 1, 1, 1) in z's dtype, from float64 abar (T,)."""
    return abar[t].to(z.dtype).view(-1, 1, 1, 1)

def q_sample(z: torch.Tensor, t: torch.Tensor, eps: torch.Tensor, abar: torch.Tensor):
    """DDPM Eq. (4): z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps."""
    a = at(abar, t, z)
    return a.sqrt() * z + (1 - a).sqrt() * eps

def predict_z_0(z_t: torch.Tensor, eps: torch.Tensor, abar_t: torch.Tensor) -> torch.Tensor:
    """q_sample solved for z: z_0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t); abar_t a number."""
    return (z_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()

def posterior(z_0: torch.Tensor, z_t: torch.Tensor, abar_t: torch.Tensor, abar_s: torch.Tensor):
    """q(z_s | z_t, z_0) for s < t: its mean and variance (a number). DDPM Eq. (7) where s = t - 1.
    alpha and beta are those of the whole step from t to s. With abar_s = 1 it is z_0 itself."""
    alpha = abar_t / abar_s
    beta = 1 - alpha
    mean = (abar_s.sqrt() * beta * z_0 + alpha.sqrt() * (1 - abar_s) * z_t) / (1 - abar_t)
    return mean, beta * (1 - abar_s) / (1 - abar_t)

def draw_t(B: int, T: int, g: torch.Generator) -> torch.Tensor:
    """Timesteps (B,) of a training step: uniform in 0..T-1, spread evenly over the batch."""
    u = torch.randperm(B, generator=g) + torch.rand(B, generator=g)         # may round up to B
    return (u / B * T).long().clamp(max=T - 1)

def ldm_loss(eps_theta: Callable, z: torch.Tensor, t: torch.Tensor, eps: torch.Tensor,
             abar: torch.Tensor, ctx: torch.Tensor | None = None, norm: str = "l2") -> torch.Tensor:
    """LDM Eq. (2), with ctx (3), of pixels (1): |eps - eps_theta(z_t, t, ctx)|^2, mean over c, h, w
    -> (B,). A net that knows nothing (0) has loss 1.
    NB: the paper writes L2; the configs of churches, inpainting, layout and maps have "l1"."""
    d = eps - eps_theta(q_sample(z, t, eps, abar), t, ctx).float()
    return (d.abs() if norm == "l1" else d ** 2).flatten(1).mean(1)

def as_eps_theta(net: Callable, abar: torch.Tensor, predict: str) -> Callable:
    """eps_theta(z_t, t, ctx) from a net that says "eps" (the paper) or "v" (Salimans and Ho 2022):
    eps = sqrt(1 - abar_t) z_t + sqrt(abar_t) v: no need to repeat z_t. The loss stays Eq. (2)."""
    def eps_theta(z_t: torch.Tensor, t: torch.Tensor, ctx: torch.Tensor | None) -> torch.Tensor:
        a = at(abar, t, z_t)
        return (1 - a).sqrt() * z_t + a.sqrt() * net(z_t, t, ctx).float()
    return net if predict == "eps" else eps_theta

def snr_weight(t: torch.Tensor, abar: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Factors (B,) on ldm_loss that clamp to low..high the weight of an error of z_0. In Eq. (2) it
    is SNR = abar / (1 - abar), next to nothing where noise is high and a picture's layout decided.
    0..inf is Eq. (2) itself, 0..high min-SNR (Hang et al. 2023)."""
    snr = abar[t] / (1 - abar[t])
    return (snr.clamp(low, high) / snr).float()
