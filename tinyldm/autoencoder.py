"""Stage one: the encoder E, the decoder D, and the regularised latent space between.

Paper:   Sec. 3.1; App. G (both regularisers, and the scaling of z); Table 8.
Symbols: x image (B, c_x, H, W) in [-1, 1]; x_rec its reconstruction; z latent
         (B, c_z, h, w); f = H / h = 2^(len(ch_mult) - 1); z_std the standard deviation
         of z over a training set, the paper's sigma-hat.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyldm.attention import SelfAttention2d, check_attended_sides
from tinyldm.config import option
from tinyldm.layers import Downsample, ResBlock, Upsample, check_widths
from tinyldm.quantize import Codebook, Quantised


@dataclass(frozen=True)
class AEConfig:
    """The shape of E, D and the latent space; for Table 8's, see engine/presets.py.

    A level is all that has the same resolution; level 0 is full resolution.
    Raises BadInput for widths of which no network can be built.
    """

    c_x: int = 3                    # channels of the images; the data set decides it
    ch: int = option(128, "channels at full resolution")
    ch_mult: tuple[int, ...] = option(
        (1, 2, 4), "channels of each level, as multiples of ch; f = 2^(levels - 1)"
    )
    n_res: int = option(2, "number of ResBlocks per level of E; D has one more")
    c_z: int = option(3, "channels of the latent")
    groups: int = option(32, "number of groups of GroupNorm")

    # The shorter side of the training images. It decides which levels are those of
    # attn_res; images of other sides work too.
    side: int = 256
    attn_res: tuple[int, ...] = option(
        (), "shorter sides of the feature maps that have self-attention"
    )
    attn_mid: bool = option(True, "have self-attention at the lowest resolution")

    n_codes: int | None = option(None, "number of codes of a VQ model; without it, KL")
    c_e: int | None = None          # channels at E's end and D's start; None: c_z

    def __post_init__(self) -> None:
        check_widths(self.ch, self.ch_mult, self.groups)

    def check_attention(self) -> None:
        """Raise BadInput if no level has feature maps of one of the sides attn_res."""
        check_attended_sides(self.attn_res, self.side, len(self.ch_mult))

    @property
    def f(self) -> int:
        """The downsampling factor H / h."""
        return 2 ** (len(self.ch_mult) - 1)

    def attends(self, level: int) -> bool:
        """Return whether each ResBlock of a level is followed by self-attention."""
        return self.side // 2 ** level in self.attn_res


# ---- E and D, which mirror one another

class Encoder(nn.Module):
    """E: x (B, c_x, H, W) -> (B, c_out, H/f, W/f).

    Level by level, from full to lowest resolution: n_res ResBlocks, and then
    downsampling.
    """

    def __init__(self, cfg: AEConfig, c_out: int):
        super().__init__()
        c = cfg.ch
        layers = [nn.Conv2d(cfg.c_x, c, 3, padding=1)]

        for level, mult in enumerate(cfg.ch_mult):
            if level > 0:
                layers.append(Downsample(c, asymmetric=True))
            for _ in range(cfg.n_res):
                layers += res_layers(cfg, level, c, cfg.ch * mult)
                c = cfg.ch * mult

        layers += middle_layers(cfg, c)
        layers += output_layers(cfg, c, c_out)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder(nn.Module):
    """D: (B, c_in, h, w) -> (B, c_x, f h, f w), roughly in [-1, 1], but not clamped.

    Level by level, from lowest to full resolution: n_res + 1 ResBlocks, and then
    upsampling. It mirrors E: what E does first, D undoes last.
    """

    def __init__(self, cfg: AEConfig, c_in: int):
        super().__init__()
        c = cfg.ch * cfg.ch_mult[-1]
        layers = [nn.Conv2d(c_in, c, 3, padding=1)]
        layers += middle_layers(cfg, c)

        for level, mult in reversed(list(enumerate(cfg.ch_mult))):
            for _ in range(cfg.n_res + 1):
                layers += res_layers(cfg, level, c, cfg.ch * mult)
                c = cfg.ch * mult
            if level > 0:
                layers.append(Upsample(c))

        layers += output_layers(cfg, c, cfg.c_x)
        self.layers = nn.Sequential(*layers)

    @property
    def last_weight(self) -> nn.Parameter:
        """The weight of the last convolution, at which losses.py measures lam."""
        return self.layers[-1].weight

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


def res_layers(cfg: AEConfig, level: int, c_in: int, c_out: int) -> list[nn.Module]:
    """Return a ResBlock, and self-attention if the level attends."""
    layers = [ResBlock(c_in, c_out, groups=cfg.groups)]
    if cfg.attends(level):
        layers.append(SelfAttention2d(c_out, groups=cfg.groups))
    return layers


def middle_layers(cfg: AEConfig, c: int) -> list[nn.Module]:
    """Return ResBlock, self-attention and ResBlock, for the lowest resolution."""
    # Why self-attention is made first, though it runs second: layers take their random
    # initial weights in the order in which they are made. In another order the same
    # seed would give other weights.
    attention = []
    if cfg.attn_mid:
        attention.append(SelfAttention2d(c, groups=cfg.groups))
    before = ResBlock(c, c, groups=cfg.groups)
    after = ResBlock(c, c, groups=cfg.groups)
    return [before, *attention, after]


def output_layers(cfg: AEConfig, c_in: int, c_out: int) -> list[nn.Module]:
    """Return the layers at the end of E and of D: norm, SiLU, convolution."""
    norm = nn.GroupNorm(cfg.groups, c_in, 1e-6)
    conv = nn.Conv2d(c_in, c_out, 3, padding=1)
    return [norm, nn.SiLU(), conv]


# ---- the latent space

@dataclass
class Posterior:
    """q(z | x) = N(mean, exp(logvar)), diagonal; mean and logvar are (B, c_z, h, w).

    The E of a VQ model is deterministic: logvar is -inf, and a sample is the mean.
    """

    mean: Tensor
    logvar: Tensor

    def to(self, device: torch.device) -> "Posterior":
        """Return the posterior on a device."""
        return Posterior(self.mean.to(device), self.logvar.to(device))

    def sample(self, noise: Tensor) -> Tensor:
        """Return z = mean + std * noise, where noise ~ N(0, 1) has the shape of mean.

        NB: the released code trains stage two on samples, not on means (ddpm.py).
        """
        std = (0.5 * self.logvar).exp()
        return self.mean + std * noise

    def kl(self) -> Tensor:
        """Return KL(q || N(0, 1)) in nats, summed over each image's latent -> (B,).

        App. G.
        """
        twice_kl = self.mean ** 2 + self.logvar.exp() - 1 - self.logvar
        return 0.5 * twice_kl.flatten(1).sum(1)

    def scaled(self, z_std: Tensor) -> "Posterior":
        """Return the posterior of z / z_std."""
        return Posterior(self.mean / z_std, self.logvar - 2 * z_std.log())

    def std(self) -> Tensor:
        """Return the standard deviation of samples, over all of their values: a number.

        This is the paper's sigma-hat (App. G). It needs no sampling: the variance of
        samples is the variance of the means plus the mean of the variances.
        NB: the released code uses one batch only. Call this on a Posterior of many.
        """
        variance = self.mean.var() + self.logvar.exp().mean()
        return variance.sqrt()


class Autoencoder(nn.Module):
    """E and D, and the latent space between them.

    The latent space consists of 1x1 convolutions, of a codebook for VQ, and of scaling:
    `encode` divides latents by z_std and `decode` multiplies them by it. No other place
    scales latents.

    z_std is 1 in stage one. Stage two sets it to the sigma-hat of its training set, so
    that the z it diffuses has variance 1, which the noise schedule assumes (App. G).
    NB: the released VQ models are not scaled; their z has a variance of about 1 anyway.
    """

    def __init__(self, cfg: AEConfig):
        super().__init__()
        self.cfg = cfg
        c_e = cfg.c_e or cfg.c_z
        n_moments = 1 if cfg.n_codes else 2         # VQ: z alone; KL: mean and logvar

        self.encoder = Encoder(cfg, n_moments * c_e)
        self.decoder = Decoder(cfg, c_e)
        self.quant_conv = nn.Conv2d(n_moments * c_e, n_moments * cfg.c_z, 1)
        self.post_quant_conv = nn.Conv2d(cfg.c_z, c_e, 1)

        self.codebook = None
        if cfg.n_codes:
            self.codebook = Codebook(cfg.n_codes, cfg.c_z)

        self.register_buffer("z_std", torch.ones(()))

    def encode(self, x: Tensor) -> Posterior:
        """Return q(z | x) of the scaled latents: x (B, c_x, H, W) in [-1, 1].

        H and W must be multiples of f.

        Why a VQ model's z is not quantised here but in `decode`: quantisation counts as
        the first layer of D (Sec. 3.1, App. G). So stage two learns E's own, continuous
        output, which suits Gaussian noise; and what it samples is rounded to codes
        before the rest of D, which has never seen anything else.
        """
        h = self.quant_conv(self.encoder(x))                # (B, n_moments * c_z, h, w)

        if self.codebook is not None:
            no_noise = torch.full_like(h, -torch.inf)
            return Posterior(h, no_noise).scaled(self.z_std)

        mean, logvar = h.chunk(2, dim=1)                    # (B, c_z, h, w) each
        return Posterior(mean, logvar.clamp(-30, 20)).scaled(self.z_std)

    def decode(self, z: Tensor, quantise: bool = True) -> Tensor:
        """Return x_rec (B, c_x, f h, f w) of scaled latents z (B, c_z, h, w).

        quantise=False: do not round the latents of a VQ model to codes.
        """
        z = z * self.z_std
        if self.codebook is not None and quantise:
            z = self.codebook(z).straight_through()
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Posterior | Quantised]:
        """Return x_rec and what the loss regularises: all that stage one trains on.

        x (B, c_x, H, W); noise (B, c_z, h, w) ~ N(0, 1), unused for VQ. The second
        result is the Posterior, or for VQ the Quantised latents, before scaling.
        """
        q = self.encode(x)
        if self.codebook is None:
            return self.decode(q.sample(noise)), q

        quantised = self.codebook(q.mean * self.z_std)
        z = quantised.straight_through() / self.z_std
        return self.decode(z, quantise=False), quantised


class Pixels(nn.Module):
    """Stands for stage one if pixels are diffused: f = 1, z = x / z_std, no weights."""

    def __init__(self, c_x: int = 3):
        super().__init__()
        self.cfg = AEConfig(c_x=c_x, ch=0, ch_mult=(1,), c_z=c_x)
        self.register_buffer("z_std", torch.ones(()))

    def encode(self, x: Tensor) -> Posterior:
        no_noise = torch.full_like(x, -torch.inf)
        return Posterior(x, no_noise).scaled(self.z_std)

    def decode(self, z: Tensor) -> Tensor:
        return z * self.z_std


def build_autoencoder(cfg: AEConfig) -> Autoencoder | Pixels:
    """Return an untrained stage one of this shape; ch = 0 stands for Pixels."""
    return Autoencoder(cfg) if cfg.ch else Pixels(cfg.c_x)
