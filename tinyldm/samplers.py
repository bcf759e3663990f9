"""Samplers: from noise z_T ~ N(0, 1) to a latent z_0, by calls of eps_theta.

Paper:   Sec. 4.1, App. B; DDPM (Ho et al. 2020), Alg. 2; DDIM (Song et al. 2021), Eq.
         (12) and (16); PNDM (Liu et al. 2022), Sec. 3; DPM-Solver++ (Lu et al. 2022),
         Alg. 2.
Symbols: ts are the timesteps to visit, falling, and then where to end: -1 is z_0
         itself. A step goes from t to s, the next of ts. sigma is the noise of a DDIM
         step, eta its share.
Shapes:  z_T, z, z_0 (B, c, h, w); abar (T,) float64, on the CPU. ctx goes to eps_theta as
         it is.

All samplers have the arguments (eps_theta, z_T, ctx, abar, ts, randn) and return z_0.
randn() returns fresh noise in z's shape. A sampler calls it at most once per step, and
never in a step that lands on z_0.

A solver "has a past" if it uses the outputs of eps_theta in earlier steps. This makes
it more accurate at no cost, but needs all steps in one run: see masked().
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyldm.diffusion import posterior, predict_z_0, q_sample
from tinyldm.errors import require

# ---- timesteps to visit


def timesteps(abar: Tensor, S: int) -> list[int]:
    """Return S timesteps, evenly spaced from T - 1 down, and then -1: S steps to z_0.

    Why from T - 1: only there is z_t almost pure noise, which z_T is. At any lower t
    the network would find less signal in z_t than it was trained for.
    Why to z_0 itself: a run that ends at t = 0 leaves the noise of t = 0 in the image.
    Why exactly S: each step costs a call of the network, and the user says how many.
    Raises BadInput unless 1 <= S <= T.
    """
    T = len(abar)
    require(1 <= S <= T, f"steps {S}: must be 1..{T}")
    visited = [T - 1 - k * T // S for k in range(S)]
    return [*visited, -1]


def official_timesteps(abar: Tensor, S: int) -> list[int]:
    """The released code's rule: range(0, T, T // S) + 1, read backwards, and then 0.

    It serves to repeat published samples.
    NB: it takes more than S steps for most S, and for most it does not start at T - 1.
    It ends at abar_0 < 1, so noise of std 0.04 (Stable Diffusion: 0.03) stays in the
    latent; with eta > 0, so does the noise of the last step.
    Raises BadInput unless 1 <= S <= T, and where the rule would leave the schedule,
    which it does for 599 of the 1000 values of S.
    """
    T = len(abar)
    require(1 <= S <= T, f"steps {S}: must be 1..{T}")
    visited = [t + 1 for t in range(0, T, T // S)]
    last = T - 1
    require(
        visited[-1] <= last,
        f"steps {S}: the official rule would visit timestep {T} of 0..{last}",
    )
    return [*reversed(visited), 0]


TIMESTEPS = {"even": timesteps, "official": official_timesteps}


def later(ts: list[int], strength: float) -> list[int]:
    """Return the last steps of ts: a share `strength` in 0..1 of them, at least one.

    For SDEdit (Meng et al. 2022): noise the z of an image to the first of them, and
    sample from there. A part of a step is left out, as in the released img2img.py.
    NB: there, int(0.29 * 100) is 28, a rounding error of the product; here it is 29. It
    noises z to one timestep, but samples from the next. It takes its share of the steps
    that are asked for, not of those that official_timesteps visits.
    """
    n_steps = len(ts) - 1
    n_kept = max(1, math.floor(strength * n_steps + 1e-9))
    return ts[-(n_kept + 1):]


# ---- steps

def steps(ts: list[int], abar: Tensor) -> list[tuple[int, int, Tensor, Tensor]]:
    """Return (t, s, abar_t, abar_s) of each step; where s is -1, abar_s is 1."""
    abar = torch.cat([abar, abar.new_ones(1)])          # so that abar[-1] is 1
    return [(t, s, abar[t], abar[s]) for t, s in zip(ts, ts[1:])]


def each(t: int, z: Tensor) -> Tensor:
    """Return t for each of z's samples, (B,), on the CPU."""
    return torch.full((len(z),), t)


def ddim_step(
    z: Tensor, eps: Tensor, abar_t: Tensor, abar_s: Tensor, sigma: Tensor | float = 0.0
) -> Tensor:
    """DDIM Eq. (12) without noise: sqrt(abar_s) z_0 + sqrt(1 - abar_s - sigma^2) eps.

    z_0 is the one that eps implies. The clamp is for rounding errors.
    """
    z_0 = predict_z_0(z, eps, abar_t)
    direction = (1 - abar_s - sigma ** 2).clamp(min=0).sqrt() * eps
    return abar_s.sqrt() * z_0 + direction


# ---- samplers with noise

@torch.no_grad()
def ddpm(
    eps_theta: Callable,
    z_T: Tensor,
    ctx: tuple,
    abar: Tensor,
    ts: list[int],
    randn: Callable | None = None,
) -> Tensor:
    """Ancestral sampling, DDPM Alg. 2: sample z_s from q(z_s | z_t, predicted z_0)."""
    z = z_T
    for t, _, abar_t, abar_s in steps(ts, abar):
        eps = eps_theta(z, each(t, z), ctx)
        z_0 = predict_z_0(z, eps, abar_t)
        z, variance = posterior(z_0, z, abar_t, abar_s)
        if abar_s < 1:
            z = z + variance.sqrt() * randn()
    return z


@torch.no_grad()
def ddim(
    eps_theta: Callable,
    z_T: Tensor,
    ctx: tuple,
    abar: Tensor,
    ts: list[int],
    randn: Callable | None = None,
    eta: float = 0.0,
) -> Tensor:
    """DDIM Eq. (12): sqrt(abar_s) z_0 + sqrt(1 - abar_s - sigma^2) eps + sigma noise.

    eta = 0 is deterministic and needs no randn. eta = 1 has DDPM's variance.
    """
    z = z_T
    for t, _, abar_t, abar_s in steps(ts, abar):
        eps = eps_theta(z, each(t, z), ctx)
        # Eq. (16): eta times the std of q(z_s | z_t, z_0).
        variance = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
        sigma = eta * variance.sqrt()
        z = ddim_step(z, eps, abar_t, abar_s, sigma)
        if sigma > 0:
            z = z + sigma * randn()
    return z


# ---- deterministic solvers with a past

# Adams and Bashforth's weights for equal steps, one row per number of known eps, the
# newest first. They are to be divided by the sum of their row.
ADAMS_BASHFORTH = [(1,), (3, -1), (23, -16, 5), (55, -59, 37, -9)]


@torch.no_grad()
def plms(
    eps_theta: Callable,
    z_T: Tensor,
    ctx: tuple,
    abar: Tensor,
    ts: list[int],
    randn: Callable | None = None,
) -> Tensor:
    """Pseudo linear multistep, PNDM Sec. 3: DDIM steps with the mean of eps over each.

    The mean is extrapolated from the outputs of eps_theta at the start of this step and
    of up to three steps before. The first step has none before it, so it calls
    eps_theta at both its ends.
    NB: PNDM begins with three Runge-Kutta steps of four calls each. The released code
    begins with this one step of two calls.
    """
    z = z_T
    past: list[Tensor] = []             # outputs of eps_theta, the newest first
    for t, s, abar_t, abar_s in steps(ts, abar):
        past = [eps_theta(z, each(t, z), ctx), *past[:3]]
        weights = ADAMS_BASHFORTH[len(past) - 1]
        eps = sum(w * e for w, e in zip(weights, past)) / sum(weights)

        # The first step. If it lands on z_0, there is no eps to predict at its end.
        if len(past) == 1 and s >= 0:
            z_s = ddim_step(z, eps, abar_t, abar_s)
            eps = (eps + eps_theta(z_s, each(s, z), ctx)) / 2

        z = ddim_step(z, eps, abar_t, abar_s)
    return z


@torch.no_grad()
def dpm_solver_pp(
    eps_theta: Callable,
    z_T: Tensor,
    ctx: tuple,
    abar: Tensor,
    ts: list[int],
    randn: Callable | None = None,
) -> Tensor:
    """DPM-Solver++(2M), Alg. 2: DDIM steps with the z_0 predicted for their middle.

    That z_0 is extrapolated from the z_0 predicted at the start of this step and of the
    step before. Lengths h are measured in lambda = log sqrt(abar / (1 - abar)). Two
    steps are plain DDIM: the first, and one that lands on z_0, where lambda is
    infinite.
    """
    z = z_T
    z_0_last = None
    h_last = None
    for t, _, abar_t, abar_s in steps(ts, abar):
        eps = eps_theta(z, each(t, z), ctx)
        z_0 = predict_z_0(z, eps, abar_t)
        h = (abar_s.logit() - abar_t.logit()) / 2       # lambda = logit(abar) / 2

        if z_0_last is None or abar_s == 1:
            z_0_middle = z_0
        else:
            z_0_middle = z_0 + h / (2 * h_last) * (z_0 - z_0_last)

        # A DDIM step in terms of z_0: the noise in z shrinks to that of s.
        noise = z - abar_t.sqrt() * z_0_middle
        z = abar_s.sqrt() * z_0_middle + ((1 - abar_s) / (1 - abar_t)).sqrt() * noise
        z_0_last = z_0
        h_last = h
    return z


# ---- the table

@dataclass(frozen=True)
class Sampler:
    """A sampler and its properties, which tests/test_tables.py checks for every row.

    order: with twice the steps, the error of a deterministic run falls to 1 / 2^order
        or less; None for a sampler that always adds noise.
    has_past: it uses earlier outputs of eps_theta, so its run cannot be split.
    takes_eta: it has DDIM's eta; with eta = 0 it is deterministic.
    step_calls, first_step_calls: calls of eps_theta in a step, and in the first step if
        that differs. A step that lands on z_0 always makes one call, because at its end
        there is no eps to predict.
    """

    run: Callable[..., Tensor]
    order: int | None
    has_past: bool
    takes_eta: bool
    step_calls: int = 1
    first_step_calls: int | None = None

    def __call__(
        self,
        eps_theta: Callable,
        z_T: Tensor,
        ctx: tuple,
        abar: Tensor,
        ts: list[int],
        randn: Callable | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """Sample z_0. Raises BadInput for an eta other than 0 if it takes none."""
        if self.takes_eta:
            return self.run(eps_theta, z_T, ctx, abar, ts, randn, eta)
        require(eta == 0, f"eta {eta:g}: this sampler has none")
        return self.run(eps_theta, z_T, ctx, abar, ts, randn)

    def first_calls(self, n_steps: int) -> list[int]:
        """Return, for each step, the number (from 0) of its first call of eps_theta."""
        in_first = self.first_step_calls or self.step_calls
        later_steps = [in_first + k * self.step_calls for k in range(n_steps - 1)]
        return [0, *later_steps]

    def n_calls(self, n_steps: int, to_z_0: bool = True) -> int:
        """Return the number of calls in a run, which lands on z_0 or on a timestep."""
        if to_z_0:
            return self.first_calls(n_steps)[-1] + 1
        return self.first_calls(n_steps + 1)[-1]


SAMPLERS = {
    "ddim": Sampler(ddim, order=1, has_past=False, takes_eta=True),
    "ddpm": Sampler(ddpm, order=None, has_past=False, takes_eta=False),
    "plms": Sampler(plms, order=2, has_past=True, takes_eta=False, first_step_calls=2),
    "dpm++": Sampler(dpm_solver_pp, order=2, has_past=True, takes_eta=False),
}


# ---- inpainting with any model

@torch.no_grad()
def masked(
    step: Callable[[Tensor, list[int]], Tensor],
    z_T: Tensor,
    z: Tensor,
    mask: Tensor,
    abar: Tensor,
    ts: list[int],
    randn: Callable,
) -> Tensor:
    """Sample a z_0 that agrees with the known z where mask (B, 1, h, w) is 1.

    Before each step, the known part of z_t is replaced by a fresh sample of q(z_t | z),
    and the step makes the rest fit to it. step(z_t, [t, s]) takes z_t from t to s.

    A model whose condition has the mask needs none of this: it knows what surrounds the
    holes. Why no sampler with a past: each call is a run of one step, in which there is no
    past, so the solver would quietly be a worse one. Keeping the past would be no help:
    it belongs to a z_t that has since been replaced.
    """
    z_t = z_T
    for t, s in zip(ts, ts[1:]):
        known = q_sample(z, each(t, z), randn(), abar)
        z_t = mask * known + (1 - mask) * z_t
        z_t = step(z_t, [t, s])
    return z_t
