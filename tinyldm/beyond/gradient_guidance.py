"""Guide a model by a gradient: to an image, or to a class, that it knows nothing of.

Papers:  LDM App. C (image guiding, Fig. 14); Dhariwal and Nichol 2021, Alg. 2 (a
         classifier).
Symbols: p(y | z_t) is how well y fits to z_t, up to a factor; w the scale; z_0 what
         eps_theta predicts of the latent; D the decoder.

eps is the gradient of the noisy latents' log density, times -sqrt(1 - abar_t). By Bayes'
rule, what is to be fitted adds its own gradient:

    eps <- eps_theta(z_t, t) - w sqrt(1 - abar_t) grad_{z_t} log p(y | z_t)

NB: App. C prints a plus. With it, samples go away from y.

Nothing is trained for it: p(y | z_t) may be any function that can be differentiated.
"""
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyldm.diffusion import at, predict_z_0


def gradient_guided(
    eps_theta: Callable, abar: Tensor, log_p: Callable, scale: float, through: bool = True
) -> Callable:
    """Return an eps_theta that is guided by the gradient of log_p, with scale w.

    log_p(z_t, t, eps) returns one number per sample, (B,). Why eps is given: log_p may
    look at z_0, and then the gradient goes through eps_theta, too.
    through: whether it does. If not, the activations of eps_theta are not kept.
    """

    def guided_eps_theta(z_t: Tensor, t: Tensor, ctx: tuple) -> Tensor:
        with torch.enable_grad():
            z_t = z_t.detach().requires_grad_()
            with torch.set_grad_enabled(through):
                eps = eps_theta(z_t, t, ctx)
            total = log_p(z_t, t, eps).sum()                # samples do not see each other
            gradient, = torch.autograd.grad(total, z_t)
        return eps.detach() - scale * (1 - at(abar, t, z_t)).sqrt() * gradient

    return guided_eps_theta


def fits_image(
    decode: Callable, abar: Tensor, image: Tensor, visible: Tensor | None = None
) -> Callable:
    """Return log_p of an image: -1/2 |y - T(D(z_0))|^2, App. C's Gaussian.

    image: y (C, h, w) in [-1, 1]. If it is smaller than what decode returns, T shrinks
        the decoded image to its size, by the mean of each part (super-resolution).
    visible: (1, h, w), 1 where the image counts and 0 elsewhere (inpainting).
    NB: it is a sum over the pixels, as in the paper, so a larger y wants a lower scale.
    """

    def log_p(z_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        x = decode(predict_z_0(z_t, eps, at(abar, t, z_t))).float()
        difference = F.adaptive_avg_pool2d(x, image.shape[-2:]) - image
        if visible is not None:
            difference = difference * visible
        return -(difference ** 2).sum((1, 2, 3)) / 2

    return log_p
