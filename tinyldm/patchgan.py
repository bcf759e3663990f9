"""The patch discriminator D_psi, the adversarial losses, and their adaptive weight.

Paper:   Sec. 3.1, App. G, Eq. (25); VQGAN (Esser et al. 2021), Eq. (7); pix2pix (Isola
         et al. 2017) for the network.
Symbols: disc is D_psi, lam the adaptive weight. A logit is D_psi's answer for one patch
         of an image: > 0 for "real", < 0 for "reconstructed". real and fake are the
         logits of real and of reconstructed images.
Shapes:  x (B, c_x, H, W) in [-1, 1] -> logits (B, 1, H', W').

Why patches: pixel and perceptual losses already get the layout right. What they miss is
texture, and that can be seen in a small patch.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyldm.config import option


@dataclass(frozen=True)
class DiscriminatorConfig:
    """What shapes D_psi; the defaults are those of the released autoencoders."""

    ch: int = option(
        64, "width of D_psi's first layer; the next ones are up to 8 times as wide",
        flag="--disc-ch",
    )
    n_layers: int = option(
        3, "number of D_psi's layers of stride 2; 3 see patches of 70x70 pixels",
        flag="--disc-layers",
    )


class Discriminator(nn.Module):
    """D_psi: convolutions of 4x4 pixels, each but the last two of stride 2.

    Each logit depends on a patch of 34, 70 or 142 pixels a side, for n_layers 2, 3, 4.
    NB: BatchNorm sees real and reconstructed images in separate calls, as in the
    released code.
    """

    def __init__(self, cfg: DiscriminatorConfig, c_x: int = 3):
        super().__init__()
        self.cfg = cfg
        layers = [nn.Conv2d(c_x, cfg.ch, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        c_in = cfg.ch
        for number in range(1, cfg.n_layers + 1):
            c_out = cfg.ch * min(2 ** number, 8)
            stride = 2 if number < cfg.n_layers else 1
            layers.append(nn.Conv2d(c_in, c_out, 4, stride, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(c_out))
            layers.append(nn.LeakyReLU(0.2))
            c_in = c_out
        layers.append(nn.Conv2d(c_in, 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*layers)

        # pix2pix's initialisation.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (B, 1, H', W'), where H' is about H / 2^n_layers."""
        return self.layers(x)


# ---- losses of the two players

@dataclass(frozen=True)
class GanLoss:
    """The losses of the two players, each to be minimised by its own player.

    discriminator(real, fake) is D_psi's loss. generator(fake) is the autoencoder's,
    which is low when D_psi takes reconstructions for real images. Both take logits of
    any shape and return a mean.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """D_psi's loss: (E max(0, 1 - real) + E max(0, 1 + fake)) / 2. It is 1 at logits 0.

    Why: a logit that is right by more than 1 has no gradient any more, so D_psi does
    not grow ever surer of itself while the autoencoder cannot keep up.
    """
    loss_real = torch.relu(1 - real).mean()
    loss_fake = torch.relu(1 + fake).mean()
    return 0.5 * (loss_real + loss_fake)


def vanilla_loss(real: Tensor, fake: Tensor) -> Tensor:
    """D_psi's loss: (-E log sigmoid(real) - E log(1 - sigmoid(fake))) / 2.

    It is log 2 at logits 0. softplus(a) = log(1 + exp(a)) is -log sigmoid(-a).
    """
    loss_real = nn.functional.softplus(-real).mean()
    loss_fake = nn.functional.softplus(fake).mean()
    return 0.5 * (loss_real + loss_fake)


def negative_mean(fake: Tensor) -> Tensor:
    """The autoencoder's loss: L_adv = -E fake.

    Why neither hinge nor logarithm: its gradient with respect to the logits is
    constant, so a reconstruction that D_psi is sure about still learns.
    """
    return -fake.mean()


# NB: App. G prints log D_psi, the vanilla loss. The released code uses the hinge loss.
GAN_LOSSES = {
    "hinge": GanLoss(hinge_loss, negative_mean),
    "vanilla": GanLoss(vanilla_loss, negative_mean),
}


# ---- VQGAN Eq. (7)

def adaptive_weight(loss_rec: Tensor, loss_adv: Tensor, last_weight: Tensor) -> Tensor:
    """Return lam = |d loss_rec / d w| / (|d loss_adv / d w| + 1e-4), in 0..1e4.

    w is the weight of the decoder's last layer. No gradient flows through lam.

    Why: times lam, the gradient of the adversarial term is as large as that of the
    reconstruction term, whatever the scale of D_psi's logits.
    NB: the code of the released KL models sums loss_rec over the pixels, so its lam is
    often at the limit of 1e4. Here losses are means, as in the code of the released VQ
    models; times 3HW they are the sums, and lam grows by the same factor.
    """
    grad_rec, = torch.autograd.grad(loss_rec, last_weight, retain_graph=True)
    grad_adv, = torch.autograd.grad(loss_adv, last_weight, retain_graph=True)
    lam = grad_rec.norm() / (grad_adv.norm() + 1e-4)
    return lam.clamp(0, 1e4).detach()
