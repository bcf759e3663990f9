"""A schedule that ends in pure noise: zero terminal SNR.

Paper:   Lin et al. 2024, Sec. 3.1 and Alg. 1.

The paper's schedule ends at abar = 0.0047 (Stable Diffusion's) or less: a little of the
image is still in z_T, its mean colour above all. Training shows the network that little,
and sampling begins without it: so the mean brightness of samples is always medium.

A network that predicts eps cannot be trained on it: where z_t is eps, it has nothing to
learn. Take v or flow, and a loss that weighs the end. Eq. (2) does not. Either of these
does: --loss-of output, or a --snr-clamp whose lower end is above 0, as the toy's.
"""
import torch
from torch import Tensor

from tinyldm.diffusion import LEAST_ABAR_OF_FILE, Schedule, cumulative, sqrt_linear_betas


def zero_snr_betas(T: int = 1000) -> Tensor:
    """Shift and scale the sqrt(abar_t) of the paper's schedule, so that the last is 0.

    The first stays as it is. NB: the last is 2^-12, not 0, as the samplers need z_0 to
    follow from eps.
    """
    a = cumulative(sqrt_linear_betas(T)).sqrt()         # (T,)
    end = LEAST_ABAR_OF_FILE ** 0.5
    if T > 1:
        a = end + (a - a[-1]) * (a[0] - end) / (a[0] - a[-1])
    abar = a ** 2
    abar_before = torch.cat([abar.new_ones(1), abar[:-1]])
    return 1 - abar / abar_before


ZERO_SNR = Schedule(zero_snr_betas, takes_range=False, ends_in_noise=True)
