"""Samplers: from z_T ~ N(0, 1) to z_0, as pure functions of (eps_theta, z_T, ctx).

Paper:   Sec. 4.1, App. B; DDPM (Ho et al. 2020) Alg. 2; DDIM (Song et al. 2021) Eq. (12), (16);
         PNDM (Liu et al. 2022) Sec. 3; DPM-Solver++ (Lu et al. 2022) Alg. 2.
Symbols: ts the timesteps to visit, falling, then the end: -1 is z_0 itself. A step goes from t to
         s, the next of ts, and calls eps_theta once; sigma is DDIM's noise in it, eta its share.
Shapes:  z (B, c, h, w); ctx (B, ...) tokens, maps, or None; abar (T,) float64. Reads: diffusion.py
`randn()` gives fresh noise of z's shape, once a step, never in one that lands on z_0."""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tinyldm import require
from tinyldm.diffusion import posterior, predict_z_0, q_sample

def timesteps(T: int, S: int) -> list[int]:
    """S timesteps from T-1 down, evenly spaced, then -1. Raises BadInput unless 1 <= S <= T."""
    require(1 <= S <= T, f"--steps {S}: must be 1..{T}")
    return [T - 1 - i * T // S for i in range(S)] + [-1]

def official_timesteps(T: int, S: int) -> list[int]:
    """The released rule, range(0, T, T // S) + 1 read backwards, then 0: for published samples.
    NB: it never starts at T-1, takes other than S steps for most S, for 599 of 1000 would leave the
    schedule (BadInput). It ends at abar_0 < 1: noise of std 0.04 (SD: 0.03), and eta's, stays."""
    timesteps(T, S)                                     # for its BadInput
    ts = [t + 1 for t in range(0, T, T // S)]
    require(ts[-1] < T, f"--steps {S}: the official rule would visit timestep {T} of 0..{T - 1}")
    return ts[::-1] + [0]

def pairs(ts: list[int], abar: Tensor) -> list[tuple]:
    """(t, abar_t, abar_s) a step; abar_{-1} = 1, where z is z_0."""
    abar = torch.cat([abar, abar.new_ones(1)])
    return [(t, abar[t], abar[s]) for t, s in zip(ts, ts[1:])]

def each(t: int, z: Tensor) -> Tensor:
    """t for each of z's samples, (B,)."""
    return torch.full((len(z),), t, device=z.device)

@torch.no_grad()
def ddpm(eps_theta: Callable, z_T: Tensor, ctx, abar: Tensor, ts: list[int], randn) -> Tensor:
    """Ancestral sampling, DDPM Alg. 2: draw each z_s from q(z_s | z_t, z_0) with predicted z_0."""
    z = z_T
    for t, abar_t, abar_s in pairs(ts, abar):
        z_0 = predict_z_0(z, eps_theta(z, each(t, z), ctx), abar_t)
        z, var = posterior(z_0, z, abar_t, abar_s)
        if abar_s < 1:
            z = z + var.sqrt() * randn()
    return z

def ddim_step(z: Tensor, eps: Tensor, abar_t, abar_s, sigma=0.0) -> Tensor:
    """DDIM Eq. (12) but for its noise: sqrt(abar_s) z_0 + sqrt(1 - abar_s - sigma^2) eps."""
    z_0 = predict_z_0(z, eps, abar_t)
    return abar_s.sqrt() * z_0 + (1 - abar_s - sigma ** 2).clamp(min=0).sqrt() * eps

@torch.no_grad()
def ddim(eps_theta: Callable, z_T: Tensor, ctx, abar: Tensor, ts: list[int], randn=None, eta=0.0):
    """DDIM Eq. (12): z_s = sqrt(abar_s) z_0 + sqrt(1 - abar_s - sigma^2) eps + sigma noise; sigma:
    Eq. (16). eta = 0 is deterministic and needs no randn, eta = 1 has DDPM's variance."""
    z = z_T
    for t, abar_t, abar_s in pairs(ts, abar):
        eps = eps_theta(z, each(t, z), ctx)
        sigma = eta * ((1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)).sqrt()
        z = ddim_step(z, eps, abar_t, abar_s, sigma)
        if sigma > 0:
            z = z + sigma * randn()
    return z

@torch.no_grad()
def plms(eps_theta: Callable, z_T: Tensor, ctx, abar: Tensor, ts: list[int], randn=None) -> Tensor:
    """Pseudo linear multistep, PNDM Sec. 3: a DDIM step with the mean of eps over it, from the last
    2, 3, then 4 by Adams and Bashforth's weights. The first step calls eps_theta at both its ends.
    NB: PNDM begins with three Runge-Kutta steps of four calls; this is the released code's way."""
    weights = (1,), (3, -1), (23, -16, 5), (55, -59, 37, -9)    # for even steps; newest eps first
    z, past = z_T, []
    for (t, abar_t, abar_s), s in zip(pairs(ts, abar), ts[1:]):
        past = [eps_theta(z, each(t, z), ctx), *past[:3]]
        w = weights[len(past) - 1]
        eps = sum(w_i * e for w_i, e in zip(w, past)) / sum(w)
        if len(past) == 1 and s >= 0:                   # z_0 itself has no eps to speak of
            z_s = ddim_step(z, eps, abar_t, abar_s)
            eps = (eps + eps_theta(z_s, each(s, z), ctx)) / 2
        z = ddim_step(z, eps, abar_t, abar_s)
    return z

@torch.no_grad()
def dpm_solver_pp(eps_theta: Callable, z_T: Tensor, ctx, abar: Tensor, ts: list[int], randn=None):
    """DPM-Solver++(2M), Alg. 2: a DDIM step with z_0 extrapolated to its middle, mid, but for the
    first step and one onto z_0. h, h_last: lengths in lambda = log sqrt(abar / (1 - abar))."""
    z, z_0_last, h_last = z_T, 0.0, math.inf
    for t, abar_t, abar_s in pairs(ts, abar):
        z_0 = predict_z_0(z, eps_theta(z, each(t, z), ctx), abar_t)
        h = (abar_s.logit() - abar_t.logit()) / 2
        mid = z_0 + (h / (2 * h_last) if abar_s < 1 else 0) * (z_0 - z_0_last)
        z = abar_s.sqrt() * mid + ((1 - abar_s) / (1 - abar_t)).sqrt() * (z - abar_t.sqrt() * mid)
        z_0_last, h_last = z_0, h
    return z

@torch.no_grad()
def masked(sampler: Callable, z_T: Tensor, z: Tensor, mask: Tensor, abar: Tensor, ts, randn):
    """Fill in z where mask (B, 1, h, w) is 0: before each step, z_t is drawn from q(z_t | z) where
    it is 1. sampler(z_t, ts) takes z_t along ts, one step a call: none has a past."""
    z_t = z_T
    for t, s in zip(ts, ts[1:]):
        z_t = mask * q_sample(z, each(t, z), randn(), abar) + (1 - mask) * z_t
        z_t = sampler(z_t, [t, s])
    return z_t

def later(ts: list[int], strength: float) -> list[int]:
    """The last `strength` (0..1] of the steps, for SDEdit (Meng et al. 2022): noise z to the first.
    NB: the released img2img.py adds noise of one step and begins denoising at the step below."""
    return ts[-(max(1, round(strength * (len(ts) - 1))) + 1):]

def slerp(a: Tensor, b: Tensor, w: float) -> Tensor:
    """From noise a (w = 0) to b (1) along the great circle, where all between is as likely."""
    angle = torch.acos((a.flatten() @ b.flatten() / (a.norm() * b.norm())).clamp(-1, 1))
    ab = (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)
    return a if angle < 1e-4 else ab
