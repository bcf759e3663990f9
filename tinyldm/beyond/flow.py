"""Flow matching: the way from noise to a latent is a straight line.

Papers:  Lipman et al. 2023; Liu et al. 2023 (rectified flow); Esser et al. 2024 (Stable
         Diffusion 3), Sec. 2-3.
Symbols: r in 0..1 is the time of the flow: x_r = (1 - r) z_0 + r eps, so x_0 is the
         latent and x_1 the noise. u = eps - z_0 is its velocity, dx_r / dr.

A network learns u with the plain loss |u - u_theta|^2. To sample, begin at x_1 = eps and
follow u_theta down to r = 0.

What changed against the paper is four choices. Three of them are here:

- the schedule, STRAIGHT: abar_t such that z_t is x_r, scaled to variance 1,
- what the network predicts, VELOCITY,
- how t is drawn in training, draw_logit_normal.

The fourth is the loss, which is the error of the output itself (`--loss-of output`).

All else stays as it is. A flow is a diffusion whose noise is added at another pace: x_r and
z_t with the same ratio of signal to noise differ by a factor, x_r = z_t / (a + b) with
a = sqrt(abar_t) and b = sqrt(1 - abar_t), and r = b / (a + b). The network is given z_t,
whose variance is 1 at every t. And Euler's method for the flow, x_s = x_r + (s - r) u, is
DDIM, so that all samplers, img2img, inpainting and guidance are as before.
"""
import torch
from torch import Tensor

from tinyldm.diffusion import Prediction, Schedule, draw_evenly

# ---- the schedule


def straight_betas(T: int = 1000) -> Tensor:
    """Return the betas with which r rises evenly: abar = (1 - r)^2 / ((1 - r)^2 + r^2).

    Why r = (t + 1/2) / T, and not to 1: at r = 1, z_t is eps alone, and z_0 does not
    follow from eps. The last abar_t is 2.5e-7 for T = 1000.
    """
    r = (torch.arange(T, dtype=torch.float64) + 0.5) / T
    abar = (1 - r) ** 2 / ((1 - r) ** 2 + r ** 2)       # (T,)
    abar_before = torch.cat([abar.new_ones(1), abar[:-1]])
    return 1 - abar / abar_before


STRAIGHT = Schedule(straight_betas, takes_range=False, ends_in_noise=True)


# ---- what the network predicts

def eps_from_velocity(output: Tensor, z_t: Tensor, abar_t: Tensor) -> Tensor:
    """Solve z_t = a z_0 + b eps and u = eps - z_0 for eps = (z_t + a u) / (a + b)."""
    a = abar_t.sqrt()
    b = (1 - abar_t).sqrt()
    return (z_t + a * output) / (a + b)


def z_0_from_velocity(output: Tensor, z_t: Tensor, abar_t: Tensor) -> Tensor:
    """Solve the same for z_0 = (z_t - b u) / (a + b)."""
    a = abar_t.sqrt()
    b = (1 - abar_t).sqrt()
    return (z_t - b * output) / (a + b)


def velocity_weight(abar_t: Tensor) -> Tensor:
    """Return (a / (a + b))^2 = (1 - r)^2: an error of u enters eps times 1 - r."""
    a = abar_t.sqrt()
    b = (1 - abar_t).sqrt()
    return (a / (a + b)) ** 2


VELOCITY = Prediction(eps_from_velocity, z_0_from_velocity, velocity_weight)


# ---- how t is drawn in training

def draw_logit_normal(B: int, T: int, generator: torch.Generator) -> Tensor:
    """Draw t (B,) so that logit(r) ~ N(0, 1), Esser et al. 2024, Eq. (19).

    Why: the ends are easy. At r = 1, u can be no better than the noise minus the mean of
    all latents; at r = 0, than the mean of all noise, which is 0, minus the latent. The
    middle, where the content of an image is decided, gets more of the batch.
    NB: as in Stable Diffusion 3, the loss is not divided by the density, so the middle
    also weighs more in it. The very ends are all but never drawn: one t in 600 is above
    0.95 T, where sampling begins. `--draw-t uniform` draws all alike.
    """
    u = draw_evenly(B, generator)
    r = torch.special.ndtri(u).sigmoid()                    # ndtri is the normal quantile
    return (r * T).long().clamp(max=T - 1)
