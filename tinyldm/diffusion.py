"""The diffusion process: how noise is added, what a network predicts, and its loss.

Paper:   Eq. (1)-(3) and App. B; DDPM (Ho et al. 2020), Eq. (4), (7) and (14).
Symbols: beta_t is the variance of the noise that step t adds; alpha_t = 1 - beta_t;
         abar_t = alpha_0 alpha_1 ... alpha_t, the share of the signal in z_t's
         variance; eps ~ N(0, 1); SNR = abar / (1 - abar). t runs from 0 to T - 1.
Shapes:  betas and abar (T,) float64; z, z_t, z_0, eps (B, c, h, w); t (B,).
Devices: abar and t stay on the CPU, whatever the device of z is. Why: not every device has
         float64, and no step has to wait for a device to read t.

NB: alpha always has DDPM's meaning. The paper's App. B writes alpha_t for sqrt(abar_t),
and sigma_t for sqrt(1 - abar_t).

This file knows no network: eps_theta is any function of (z_t, t, ctx).
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyldm.config import option
from tinyldm.errors import require

LEAST_ABAR = 1e-30      # of a schedule; the paper's ends at 1e-4

# What an abar of 0 is raised to. Why: eps then says nothing of z_0, and the samplers know
# eps alone; at 2^-24, float32 still has z_0 to 3 digits, in a step that decides little.
LEAST_ABAR_OF_FILE = 2 ** -24

# ---- noise schedules


def sqrt_linear_betas(
    T: int = 1000, start: float = 0.0015, end: float = 0.0195
) -> Tensor:
    """The paper's, App. E.2.1: sqrt(beta) rises linearly, so beta from start to end.

    NB: the released code calls this "linear", and "sqrt_linear" what is linear in beta.
    """
    return torch.linspace(start ** 0.5, end ** 0.5, T, dtype=torch.float64) ** 2


def cosine_betas(T: int = 1000, offset: float = 0.008) -> Tensor:
    """Nichol and Dhariwal 2021, Eq. (17): abar_t falls as cos^2, and beta <= 0.999."""
    t = torch.arange(T + 1, dtype=torch.float64)
    u = (t / T + offset) / (1 + offset)
    abar = (u * math.pi / 2).cos() ** 2                 # (T + 1,)
    betas = 1 - abar[1:] / abar[:-1]                    # (T,)
    return betas.clamp(max=0.999)


def cumulative(betas: Tensor) -> Tensor:
    """Return abar_t = (1 - beta_0) (1 - beta_1) ... (1 - beta_t), (T,) float64."""
    return (1 - betas).cumprod(0)


@dataclass(frozen=True)
class Schedule:
    """A noise schedule: betas(T), or betas(T, first beta, last beta) if takes_range.

    ends_in_noise: hardly any signal is left at T - 1, so that a prediction of eps would
        say nothing of z_0 there.
    """

    betas: Callable[..., Tensor]
    takes_range: bool
    ends_in_noise: bool = False


SCHEDULES = {
    "sqrt-linear": Schedule(sqrt_linear_betas, takes_range=True),
    "cosine": Schedule(cosine_betas, takes_range=False),
}


# ---- the process, DDPM Eq. (4) and (7)

def at(abar: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """Return abar_t of each sample, (B, 1, 1, 1), in z's dtype and on its device."""
    abar_t = abar[t].to(z.dtype)
    return abar_t.to(z.device).view(-1, 1, 1, 1)


def q_sample(z: Tensor, t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """Add noise, DDPM Eq. (4): z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps.

    This is t + 1 steps of z <- sqrt(alpha) z + sqrt(beta) eps at once.
    """
    abar_t = at(abar, t, z)
    return abar_t.sqrt() * z + (1 - abar_t).sqrt() * eps


def predict_z_0(z_t: Tensor, eps: Tensor, abar_t: Tensor) -> Tensor:
    """Solve q_sample for z: z_0 = (z_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)."""
    return (z_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()


def posterior(
    z_0: Tensor, z_t: Tensor, abar_t: Tensor, abar_s: Tensor
) -> tuple[Tensor, Tensor]:
    """Return mean and variance of q(z_s | z_t, z_0), s < t. DDPM Eq. (7) is s = t - 1.

    The mean is shaped as z_0, the variance as abar_t. With abar_s = 1, z_s is z_0
    itself: the mean is z_0, the variance 0.
    """
    # The alpha and beta of one step from s to t.
    alpha = abar_t / abar_s
    beta = 1 - alpha

    from_z_0 = abar_s.sqrt() * beta * z_0
    from_z_t = alpha.sqrt() * (1 - abar_s) * z_t
    mean = (from_z_0 + from_z_t) / (1 - abar_t)
    variance = beta * (1 - abar_s) / (1 - abar_t)
    return mean, variance


# ---- what a network may predict

@dataclass(frozen=True)
class Prediction:
    """What the output of a network means.

    eps(output, z_t, abar_t) and z_0(output, z_t, abar_t) say what the output claims eps
    and z_0 to be. They always agree: sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps = z_t.
    weight(abar_t) is the weight that Eq. (2) gives to the output's own squared error:
    |eps - eps_theta|^2 = weight |true output - output|^2.
    Training and sampling use eps alone, and the weight if the loss is the output's own; z_0 says
    what the choice means, and the tests hold the three against one another.
    """

    eps: Callable[[Tensor, Tensor, Tensor], Tensor]
    z_0: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight: Callable[[Tensor], Tensor]


def eps_from_eps(output: Tensor, z_t: Tensor, abar_t: Tensor) -> Tensor:
    """The paper's choice: the output is eps itself."""
    return output


def z_0_from_eps(output: Tensor, z_t: Tensor, abar_t: Tensor) -> Tensor:
    """Return the z_0 that follows from a predicted eps."""
    return predict_z_0(z_t, output, abar_t)


def eps_weight(abar_t: Tensor) -> Tensor:
    """Return 1: Eq. (2) is the squared error of eps itself."""
    return torch.ones_like(abar_t)


def eps_from_v(output: Tensor, z_t: Tensor, abar_t: Tensor) -> Tensor:
    """Salimans and Ho 2022: the output is v = sqrt(abar_t) eps - sqrt(1 - abar_t) z_0.

    (z_t, v) is (z_0, eps), rotated by an angle that grows with t. Rotating it back
    gives eps = sqrt(1 - abar_t) z_t + sqrt(abar_t) v.

    Why: near t = T - 1, z_t is nearly eps. A network that predicts eps must repeat its
    input there, and a small error of eps is a large error of z_0: 1 / sqrt(SNR) times,
    which is 84 at the end of the paper's schedule. v is just what z_t does not say, and
    its errors are never enlarged: they enter eps times sqrt(abar_t), and z_0 times
    sqrt(1 - abar_t).
    """
    return (1 - abar_t).sqrt() * z_t + abar_t.sqrt() * output


def z_0_from_v(output: Tensor, z_t: Tensor, abar_t: Tensor) -> Tensor:
    """Rotate back for z_0: sqrt(abar_t) z_t - sqrt(1 - abar_t) v."""
    return abar_t.sqrt() * z_t - (1 - abar_t).sqrt() * output


def v_weight(abar_t: Tensor) -> Tensor:
    """Return abar_t: an error of v enters eps times sqrt(abar_t)."""
    return abar_t


PREDICTIONS = {
    "eps": Prediction(eps_from_eps, z_0_from_eps, eps_weight),
    "v": Prediction(eps_from_v, z_0_from_v, v_weight),
}


def as_eps_theta(net: Callable, abar: Tensor, predict: str) -> Callable:
    """Return eps_theta(z_t, t, ctx), float32, of a network that predicts `predict`.

    The network is called as net(z_t, t, *ctx). Loss and samplers only know eps_theta.
    """
    prediction = PREDICTIONS[predict]

    def eps_theta(z_t: Tensor, t: Tensor, ctx: tuple) -> Tensor:
        output = net(z_t, t.to(z_t.device), *ctx).float()   # (B, c, h, w)
        return prediction.eps(output, z_t, at(abar, t, z_t))

    return eps_theta


@dataclass(frozen=True)
class DiffusionConfig:
    """The process that a model is trained for; the defaults are the paper's.

    Raises BadInput for a beta_range where the schedule takes none, for alphas_cumprod that are no
    schedule, and for a prediction that is not known.
    """

    schedule: str = option("sqrt-linear", "schedule of the noise", choices=SCHEDULES)
    T: int = option(1000, "number of timesteps")
    beta_range: tuple[float, float] | tuple[()] = option(
        (), "first and last beta of the schedule; none, the default: the schedule's own"
    )
    predict: str = option(
        "eps", "what the U-Net predicts; the paper's predicts eps", choices=PREDICTIONS
    )

    # abar_t for all t, of a released file whose schedule is another one; () is none.
    alphas_cumprod: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        takes_range = SCHEDULES[self.schedule].takes_range
        require(
            takes_range or not self.beta_range,
            f"beta_range {self.beta_range}: the {self.schedule} schedule takes none",
        )
        n_betas = len(self.beta_range)
        require(n_betas in (0, 2), f"beta_range has {n_betas} numbers; give the first and the last")
        require(self.predict in PREDICTIONS, f"predict {self.predict!r:.99}: not known")
        require(
            self.predict != "eps" or not SCHEDULES[self.schedule].ends_in_noise,
            f"predict eps: it says nothing of z_0 at the end of the {self.schedule} schedule, "
            "which is pure noise; take another prediction",
        )
        if self.alphas_cumprod:
            self._check_alphas_cumprod()

    def _check_alphas_cumprod(self) -> None:
        """Raise BadInput for numbers that are no schedule, or one that `predict` does not fit."""
        abar = self.alphas_cumprod
        require(
            len(abar) == self.T,
            f"alphas_cumprod: {len(abar)} numbers for T = {self.T} timesteps",
        )
        falls = all(a > b for a, b in zip(abar, abar[1:]))
        require(
            falls and abar[0] < 1 and abar[-1] >= 0,
            "alphas_cumprod: the numbers must fall from below 1 to 0 or above",
        )
        require(
            abar[-1] > 0 or self.predict != "eps",
            "alphas_cumprod: it ends at 0, where a prediction of eps says nothing of z_0",
        )

    def abar(self) -> Tensor:
        """Return abar_t for all t, (T,) float64.

        Raises BadInput if so little signal is left at the end that float32 loses it.
        """
        if self.alphas_cumprod:
            abar = torch.tensor(self.alphas_cumprod, dtype=torch.float64)
            return abar.clamp(min=LEAST_ABAR_OF_FILE)

        betas = SCHEDULES[self.schedule].betas(self.T, *self.beta_range)
        abar = cumulative(betas)
        require(
            abar[-1] > LEAST_ABAR,
            f"T {self.T}: abar falls to {abar[-1]:.0e}; take fewer timesteps or a lower beta_range",
        )
        return abar


# ---- training, Eq. (1)-(3)

def draw_timesteps(B: int, T: int, generator: torch.Generator) -> Tensor:
    """Return t (B,), each uniform in 0..T-1, for one training step.

    Why not independent: the loss depends strongly on t. Here each of B equal parts of
    0..T-1 has one t, so the loss of a batch fluctuates less.
    """
    return (draw_evenly(B, generator) * T).long().clamp(max=T - 1)


def draw_evenly(B: int, generator: torch.Generator) -> Tensor:
    """Draw (B,) numbers, each uniform in 0..1, one in each of B equal parts."""
    part = torch.randperm(B, generator=generator)
    place = torch.rand(B, generator=generator)              # within the part
    return (part + place) / B                               # may round up to 1


DRAWS = {"uniform": draw_timesteps}


def ldm_loss(
    eps_theta: Callable,
    z: Tensor,
    t: Tensor,
    eps: Tensor,
    abar: Tensor,
    ctx: tuple = (),
    norm: str = "l2",
) -> Tensor:
    """LDM Eq. (2), |eps - eps_theta(z_t, t, ctx)|^2, as a mean over c, h, w -> (B,).

    With ctx it is Eq. (3); if z are pixels, it is Eq. (1). An eps_theta that is always
    0 has loss 1.

    In terms of z_0 it is SNR |z_0 - predicted z_0|^2. The weight of an error of z_0 is
    the SNR: 670 at t = 0 of the paper's schedule and 0.00014 at t = T - 1. snr_weight
    can change that.
    NB: the paper's norm is l2. The released configs of churches, inpainting, layouts
    and label maps have "l1", |eps - eps_theta|.
    """
    z_t = q_sample(z, t, eps, abar)
    error = eps - eps_theta(z_t, t, ctx).float()        # (B, c, h, w)
    if norm == "l1":
        error = error.abs()
    else:
        error = error ** 2
    return error.flatten(1).mean(1)                     # (B,)


def snr_weight(t: Tensor, abar: Tensor, low: float, high: float) -> Tensor:
    """Return factors (B,) on ldm_loss that clamp the weight of z_0 errors to low..high.

    In Eq. (2) that weight is the SNR. low = 0 and high = inf leave it as it is; low = 0
    with a finite high is min-SNR (Hang et al. 2023).
    Why a low above 0: near t = T - 1 the layout of the image is decided, but the SNR
    gives errors of z_0 next to no weight there. Why a finite high: the noise near t = 0
    is hardly visible, but has by far the largest weight.
    """
    snr = abar[t] / (1 - abar[t])
    return (snr.clamp(low, high) / snr).float()


def output_weight(t: Tensor, abar: Tensor, predict: str) -> Tensor:
    """Return factors (B,) on ldm_loss that make it the squared error of the output itself.

    ldm_loss is Prediction.weight times that error.
    """
    return (1 / PREDICTIONS[predict].weight(abar[t])).float()
