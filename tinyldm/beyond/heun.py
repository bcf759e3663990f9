"""Heun's method, of order 2 in every single step, and EDM's spacing of the steps.

Papers:  Karras et al. 2022 (EDM), Alg. 1 and Eq. (5); for the flow, Lipman et al. 2023.
Symbols: sigma = sqrt((1 - abar) / abar) is the noise of z_t / sqrt(abar_t), with
         d(z / sqrt(abar)) / d(sigma) = eps; r, x_r and u are those of flow.py, with
         dx / dr = u. a = sqrt(abar), b = sqrt(1 - abar).

A step goes to s as Euler would, asks the network there, and goes again from t with the
mean of both answers. It costs two calls of the network, but needs no past.

sigma and r are two clocks for the same curve. A step of Heun's is exact where the curve is
a parabola in its clock, so the two differ. In sigma, most of a long first step lies where
all is noise.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from tinyldm.diffusion import predict_z_0
from tinyldm.errors import require
from tinyldm.samplers import Sampler, ddim_step, each, steps


@torch.no_grad()
def heun(
    eps_theta: Callable,
    z_T: Tensor,
    ctx: tuple,
    abar: Tensor,
    ts: list[int],
    randn: Callable | None = None,
) -> Tensor:
    """EDM Alg. 1: DDIM steps with the mean of eps at both their ends."""
    z = z_T
    for t, s, abar_t, abar_s in steps(ts, abar):
        eps = eps_theta(z, each(t, z), ctx)
        if s >= 0:                          # at z_0 itself there is no eps to predict
            z_s = ddim_step(z, eps, abar_t, abar_s)
            eps = (eps + eps_theta(z_s, each(s, z), ctx)) / 2
        z = ddim_step(z, eps, abar_t, abar_s)
    return z


@torch.no_grad()
def flow_heun(
    eps_theta: Callable,
    z_T: Tensor,
    ctx: tuple,
    abar: Tensor,
    ts: list[int],
    randn: Callable | None = None,
) -> Tensor:
    """Heun's method in the time r of the flow: steps with the mean of u at both ends."""
    z = z_T
    for t, s, abar_t, abar_s in steps(ts, abar):
        r_t, factor_t = time_and_factor(abar_t)
        r_s, factor_s = time_and_factor(abar_s)
        x = factor_t * z

        eps = eps_theta(z, each(t, z), ctx)
        u = eps - predict_z_0(z, eps, abar_t)
        if s >= 0:
            z_s = (x + (r_s - r_t) * u) / factor_s
            eps_s = eps_theta(z_s, each(s, z), ctx)
            u = (u + eps_s - predict_z_0(z_s, eps_s, abar_s)) / 2

        z = (x + (r_s - r_t) * u) / factor_s
    return z


def time_and_factor(abar_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return r = b / (a + b), and the factor 1 / (a + b) from z_t to x_r."""
    a = abar_t.sqrt()
    b = (1 - abar_t).sqrt()
    return b / (a + b), 1 / (a + b)


HEUN = Sampler(heun, order=2, has_past=False, takes_eta=False, step_calls=2)
FLOW_HEUN = Sampler(flow_heun, order=2, has_past=False, takes_eta=False, step_calls=2)


# ---- which timesteps to visit

def karras_timesteps(abar: Tensor, S: int, rho: float = 7.0) -> list[int]:
    """EDM Eq. (5): sigma^(1 / rho) falls evenly, so steps are short where sigma is small.

    Visits the timesteps of the nearest sigma and, as there are whole ones only, each of
    the last ones where the rule asks for more than there are.
    Raises BadInput unless 1 <= S <= T.
    """
    T = len(abar)
    require(1 <= S <= T, f"steps {S}: must be 1..{T}")
    powers = ((1 - abar) / abar) ** (0.5 / rho)         # sigma^(1 / rho) of each t, rising
    wanted = torch.linspace(float(powers[-1]), float(powers[0]), S, dtype=powers.dtype)

    visited: list[int] = []
    for k, power in enumerate(wanted):
        nearest = int((powers - power).abs().argmin())
        highest = visited[-1] - 1 if visited else T - 1
        lowest = S - 1 - k                              # so many steps are still to come
        visited.append(max(min(nearest, highest), lowest))
    return [*visited, -1]
