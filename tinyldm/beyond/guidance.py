"""Classifier-free guidance as it is used today: in an interval of noise, and rescaled.

Papers:  Kynkaanniemi et al. 2024 (the interval); Lin et al. 2024, Sec. 3.4, Eq. (15) and
         (16) (the rescaling).
Symbols: sigma = sqrt((1 - abar) / abar), the noise of z_t / sqrt(abar_t); phi the share of
         the rescaling; s, ctx and ctx_null as in tinyldm/guidance.py.

Far up, at a high sigma, guidance takes away what varies among samples; far down it changes
nothing that one can see, but costs a second call. In between it does its work.

A high s also enlarges z_0, so images get too much contrast. Rescaling gives z_0 the std
again that it has without guidance.
"""
from collections.abc import Callable

from torch import Tensor

from tinyldm.conditioning import Context
from tinyldm.diffusion import at, predict_z_0
from tinyldm.guidance import null_and_condition


def guidance_of_today(
    abar: Tensor, interval: tuple[float, float], phi: float = 0.0
) -> Callable:
    """Return a function that does what guided() does, with an interval and a rescaling.

    interval: the lowest and the highest sigma with guidance; outside of it, s is 1.
    phi: 0..1; 0 does not rescale, 1 gives z_0 all of its std again.
    """
    sigma = ((1 - abar) / abar).sqrt()

    def guided_today(eps_theta: Callable, ctx_null: Context, s: float) -> Callable:
        def guided_eps_theta(z_t: Tensor, t: Tensor, ctx: Context) -> Tensor:
            low, high = interval
            if s == 1 or not low <= sigma[t[0]] <= high:    # all of a batch have one t
                return eps_theta(z_t, t, ctx)

            eps_null, eps = null_and_condition(eps_theta, z_t, t, ctx, ctx_null)
            eps_guided = eps_null + s * (eps - eps_null)
            if phi == 0:
                return eps_guided
            return rescaled(z_t, eps_guided, eps, at(abar, t, z_t), phi)

        return guided_eps_theta

    return guided_today


def rescaled(
    z_t: Tensor, eps_guided: Tensor, eps: Tensor, abar_t: Tensor, phi: float
) -> Tensor:
    """Return eps_guided with a z_0 whose std is, for phi = 1, that of the unguided z_0.

    NB: Lin et al. rescale what their network predicts, which is v. At the noisy end, where
    it matters, v is -z_0. In terms of z_0 it is the same for every prediction.
    """
    z_0 = predict_z_0(z_t, eps_guided, abar_t)
    std = predict_z_0(z_t, eps, abar_t).std((1, 2, 3), keepdim=True)
    std_guided = z_0.std((1, 2, 3), keepdim=True)

    z_0 = phi * (z_0 * std / std_guided) + (1 - phi) * z_0          # Eq. (15) and (16)
    return (z_t - abar_t.sqrt() * z_0) / (1 - abar_t).sqrt()
