"""The objective of stage one, App. G, Eq. (25), with all its terms in one place:

    min over E and D, max over psi:
        L_rec(x, x_rec) - L_adv(x_rec) + log D_psi(x) + L_reg(x)

Two players take turns in it. E and D minimise (autoencoder_loss)

    loss_rec + loss_reg + disc_weight * lam * loss_adv

    loss_rec  pixel errors, and perceptual_weight * the distance in VGG's features
    loss_reg  kl_weight * KL(q(z|x), N(0, 1)), or for VQ codebook_weight * codebook loss
    loss_adv  low where D_psi takes x_rec for a real image
    lam       makes loss_adv as strong as loss_rec (patchgan.adaptive_weight)

and D_psi minimises its own loss, of x against x_rec (discriminator_loss).

Paper:   Sec. 3.1, App. G.
Symbols: x, x_rec = D(E(x)) (B, c_x, H, W) in [-1, 1]; disc is D_psi; q is the second
         output of the autoencoder: q(z|x), a Posterior, or for VQ z and its codes,
         Quantised.

Why a KL weight of 1e-6, and not 1 or 0: with 1 the loss is that of a variational
autoencoder. It drops all information whose KL divergence costs more than it gains in
pixel errors, so z loses detail and x_rec is blurred. With 0, latents may have any mean
and scale and lie anywhere, and a diffusion model learns such a distribution badly. A
slight weight keeps them near N(0, 1) and costs next to no detail.

NB: losses are means over pixels here, as in the code of the released VQ models. The
code of the released KL models sums over pixels and divides by B, so all its terms are
3HW times as large: loss_adv too, by its lam. Why means: the loss, its gradient and lam
do not depend on the size of the images, and lam does not reach its limit of 1e4.
NB: that code also divides loss_rec by exp(logvar). No optimiser trains logvar, which
stays 0, so it is left out.
"""
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from tinyldm.autoencoder import Posterior
from tinyldm.config import option
from tinyldm.patchgan import GAN_LOSSES, adaptive_weight
from tinyldm.quantize import Quantised


@dataclass(frozen=True)
class LossConfig:
    """The weights of Eq. (25); the defaults are those of the released KL models."""

    pixel_loss: str = option(
        "l1",
        "norm of the pixel errors; the released code has l1",
        choices=["l1", "l2"],
    )
    perceptual: str = option(
        "vgg16",
        "network whose features are compared; random is small and needs no file",
        choices=["vgg16", "random", "none"],
    )
    perceptual_weight: float = option(1.0, "weight of the perceptual distance")
    kl_weight: float = option(1e-6, "weight of the latents' KL divergence")
    codebook_weight: float = option(1.0, "weight of the codebook loss, for VQ")
    vq_beta: float = option(0.25, "weight of one of the codebook loss's two terms")
    vq_beta_on: str = option(
        "codebook",
        "the term that vq_beta multiplies; in the VQ-VAE paper it is commitment",
        choices=["codebook", "commitment"],
    )
    disc_weight: float = option(0.5, "weight of the adversarial term; 0 turns it off")
    disc_start: int = option(50001, "D_psi is trained and used after this step")
    disc_loss: str = option("hinge", "loss of D_psi", choices=GAN_LOSSES)


# ---- the terms

def reconstruction_loss(
    cfg: LossConfig, perceptual: Callable | None, x: Tensor, x_rec: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return L_rec, and its two parts to log. Without `perceptual`, the second is 0."""
    error = x - x_rec.float()                           # (B, c_x, H, W)
    if cfg.pixel_loss == "l1":
        loss_pixel = error.abs().mean()
    else:
        loss_pixel = error.square().mean()

    if perceptual is None:
        loss_perceptual = 0 * loss_pixel
    else:
        loss_perceptual = perceptual(x, x_rec).mean()

    loss_rec = loss_pixel + cfg.perceptual_weight * loss_perceptual
    return loss_rec, {"rec": loss_pixel, "perceptual": loss_perceptual}


def regularisation_loss(
    cfg: LossConfig, x: Tensor, q: Posterior | Quantised
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weighted L_reg, and what to log; kl is in nats per value of z.

    The KL divergence is a sum over z. Here it is divided by the number of pixel values,
    over which L_rec is a mean: so kl_weight means the same as in the released code,
    where both are sums.
    """
    if isinstance(q, Posterior):
        loss_kl = q.kl().mean()                         # nats per image
        figures = {"kl": loss_kl / q.mean[0].numel(), "z_std": q.std()}
        return cfg.kl_weight * loss_kl / x[0].numel(), figures

    loss_codebook = q.loss(cfg.vq_beta, cfg.vq_beta_on)
    figures = {"codebook": loss_codebook, "z_std": q.z.std()}
    return cfg.codebook_weight * loss_codebook, figures


def adversarial_loss(cfg: LossConfig, disc: nn.Module, x_rec: Tensor) -> Tensor:
    """Return L_adv of x_rec, with D_psi frozen.

    Why frozen: this loss must not leave gradients in D_psi's parameters. They would be
    added to those of D_psi's own loss, and train it to be fooled.
    """
    disc.requires_grad_(False)
    loss_adv = GAN_LOSSES[cfg.disc_loss].generator(disc(x_rec))
    disc.requires_grad_(True)
    return loss_adv


# ---- the two players

def autoencoder_loss(
    cfg: LossConfig,
    perceptual: Callable | None,
    disc: nn.Module,
    last_weight: Tensor,
    x: Tensor,
    x_rec: Tensor,
    q: Posterior | Quantised,
    adversarial: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of E and D in Eq. (25), and its parts to log.

    last_weight is the weight of D's last layer, for lam. adversarial says whether D_psi
    takes part, which it does after step disc_start.
    Why so late: early reconstructions are so blurred that D_psi learns nothing of use
    from them, and disturbs what E and D learn from L_rec.
    """
    loss_rec, figures = reconstruction_loss(cfg, perceptual, x, x_rec)
    loss_reg, figures_reg = regularisation_loss(cfg, x, q)
    figures |= figures_reg
    loss = loss_rec + loss_reg

    if adversarial:
        loss_adv = adversarial_loss(cfg, disc, x_rec)
        lam = adaptive_weight(loss_rec, loss_adv, last_weight)
        loss = loss + cfg.disc_weight * lam * loss_adv
        figures |= {"adv": loss_adv, "lam": lam}
    return loss, figures


def discriminator_loss(
    cfg: LossConfig, disc: Callable[[Tensor], Tensor], x: Tensor, x_rec: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of D_psi in Eq. (25), and what to log: it and the mean logits.

    No gradient reaches E and D.
    """
    real = disc(x)                                      # (B, 1, H', W')
    fake = disc(x_rec.detach())
    loss = GAN_LOSSES[cfg.disc_loss].discriminator(real.float(), fake.float())
    return loss, {"disc": loss, "d_real": real.mean(), "d_fake": fake.mean()}
