"""Stage one: the encoder E, the decoder D and the KL-regularised latent space between them.

Paper:   Sec. 3.1, App. G (KL regularisation, the rescaling of z by its standard deviation).
Symbols: x image (B, 3, H, W) in [-1, 1]; z latent (B, c_z, h, w); f = H/h = 2^(len(ch_mult) - 1);
         z_std the paper's sigma-hat, one number, measured on the training set of stage two.
Reads:   layers.py, attention.py

The topology of E and D is one list each, in running order; `forward` walks it.
"""
from dataclasses import dataclass

import torch
from torch import nn

from tinyldm.attention import SelfAttention2d
from tinyldm.layers import Downsample, ResBlock, Upsample, group_norm


@dataclass(frozen=True)
class AEConfig:
    """What shapes E and D. kl-f8 of Table 8 has ch=128, ch_mult=(1, 2, 4, 4), n_res=2, c_z=4."""
    c_x: int = 3                        # image channels
    ch: int = 128                       # width at full resolution
    ch_mult: tuple[int, ...] = (1, 2, 4)        # width of each level; f = 2^(levels - 1)
    n_res: int = 2                      # ResBlocks a level in E; D has one more
    c_z: int = 3                        # latent channels
    groups: int = 32                    # of GroupNorm

    @property
    def f(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)


class Encoder(nn.Module):
    """x (B, c_x, H, W) -> (B, 2 c_z, H/f, W/f), the posterior's moments before quant_conv."""

    def __init__(self, cfg: AEConfig):
        super().__init__()
        c, g = cfg.ch, cfg.groups
        layers = [nn.Conv2d(cfg.c_x, c, 3, padding=1)]
        for level, mult in enumerate(cfg.ch_mult):
            for _ in range(cfg.n_res):
                layers.append(ResBlock(c, cfg.ch * mult, groups=g))
                c = cfg.ch * mult
            if level < len(cfg.ch_mult) - 1:
                layers.append(Downsample(c, asymmetric=True))
        layers += [ResBlock(c, c, groups=g), SelfAttention2d(c, groups=g), ResBlock(c, c, groups=g)]
        layers += [group_norm(c, g), nn.SiLU(), nn.Conv2d(c, 2 * cfg.c_z, 3, padding=1)]
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Decoder(nn.Module):
    """z (B, c_z, h, w) -> (B, c_x, f h, f w), a picture in about [-1, 1]; not clamped."""

    def __init__(self, cfg: AEConfig):
        super().__init__()
        c, g = cfg.ch * cfg.ch_mult[-1], cfg.groups
        layers = [nn.Conv2d(cfg.c_z, c, 3, padding=1)]
        layers += [ResBlock(c, c, groups=g), SelfAttention2d(c, groups=g), ResBlock(c, c, groups=g)]
        for level, mult in reversed(list(enumerate(cfg.ch_mult))):
            for _ in range(cfg.n_res + 1):
                layers.append(ResBlock(c, cfg.ch * mult, groups=g))
                c = cfg.ch * mult
            if level > 0:
                layers.append(Upsample(c))
        layers += [group_norm(c, g), nn.SiLU(), nn.Conv2d(c, cfg.c_x, 3, padding=1)]
        self.layers = nn.ModuleList(layers)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            z = layer(z)
        return z


@dataclass
class Posterior:
    """q(z | x) = N(mean, exp(logvar)), diagonal; mean and logvar (B, c_z, h, w)."""
    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """z = mean + std * noise, with noise ~ N(0, 1) of mean's shape.

        NB: stage two trains on samples, not on the mode (released code, ddpm.py).
        """
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> torch.Tensor:
        """KL(q || N(0, 1)) in nats, summed over c, h, w -> (B,); App. G."""
        return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)

    def scaled(self, z_std: torch.Tensor) -> "Posterior":
        """The posterior of z / z_std."""
        return Posterior(self.mean / z_std, self.logvar - 2 * z_std.log())

    def std(self) -> torch.Tensor:
        """Standard deviation of samples over everything: the paper's sigma-hat (App. G), a number.

        NB: the paper's code takes the first batch only; give this one many pictures.
        """
        return (self.mean.var() + self.logvar.exp().mean()).sqrt()


class Autoencoder(nn.Module):
    """E, D and the 1x1 convs beside the latent. Scaling by z_std happens here and nowhere else.

    z_std is 1 while stage one trains; stage two sets it, so that the z it sees have variance 1.
    The regulariser is KL; VQ (quantize.py) will take the posterior's place.
    """

    def __init__(self, cfg: AEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.c_z, 2 * cfg.c_z, 1)
        self.post_quant_conv = nn.Conv2d(cfg.c_z, cfg.c_z, 1)
        self.register_buffer("z_std", torch.ones(()))

    def encode(self, x: torch.Tensor) -> Posterior:
        """x (B, c_x, H, W) in [-1, 1], sides divisible by f -> q(z | x) of the scaled latents."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20)).scaled(self.z_std)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, c_z, h, w) -> x_rec (B, c_x, f h, f w)."""
        return self.decoder(self.post_quant_conv(z * self.z_std))

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, Posterior]:
        """x, noise (B, c_z, h, w) -> x_rec, q(z | x): stage one in one call for DDP and compile."""
        q = self.encode(x)
        return self.decode(q.sample(noise)), q

    @property
    def last_layer(self) -> torch.Tensor:
        """Weight of D's last conv, where patchgan.adaptive_weight compares gradients."""
        return self.decoder.layers[-1].weight
