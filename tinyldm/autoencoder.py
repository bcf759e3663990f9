"""Stage one: the encoder E, the decoder D and the regularised latent space between them.

Paper:   Sec. 3.1, App. G (KL and VQ regularisation, the rescaling of z by its std), Table 8.
Symbols: x image (B, 3, H, W) in [-1, 1]; z latent (B, c_z, h, w); f = H/h = 2^(len(ch_mult) - 1).
Reads:   layers.py, attention.py, quantize.py"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyldm.attention import SelfAttention2d
from tinyldm.layers import Downsample, ResBlock, Upsample
from tinyldm.quantize import Codebook

@dataclass(frozen=True)
class AEConfig:
    """What shapes E, D and the latent space; presets.py has Table 8's values."""
    c_x: int = 3                        # image channels
    ch: int = 128                       # width at full resolution
    ch_mult: tuple[int, ...] = (1, 2, 4)        # width of each level; f = 2^(levels - 1)
    n_res: int = 2                      # ResBlocks a level in E; D has one more
    c_z: int = 3                        # latent channels
    groups: int = 32                    # of GroupNorm
    side: int = 256                     # of the pictures it is built for; others work too
    attn_res: tuple[int, ...] = ()      # sides of grids that attend, for pictures of that side
    attn_mid: bool = True               # attention in the middle
    n_codes: int | None = None          # size of the codebook; None: KL, not VQ
    c_e: int | None = None              # channels that E ends and D begins with; None: c_z
    @property
    def f(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)

class Coder(nn.Sequential):
    """What E and, going up, its mirror image D share: one list of layers, in running order."""
    def __init__(self, cfg: AEConfig, c_in: int, c_out: int, up: bool):
        super().__init__()
        g, levels = cfg.groups, list(enumerate(cfg.ch_mult))
        c = cfg.ch * cfg.ch_mult[-1] if up else cfg.ch
        def middle():                                       # of both, at the lowest resolution
            attn = [SelfAttention2d(c, groups=g)] if cfg.attn_mid else []
            return [ResBlock(c, c, groups=g), *attn, ResBlock(c, c, groups=g)]
        layers = [nn.Conv2d(c_in, c, 3, padding=1), *(middle() if up else ())]
        for level, mult in reversed(levels) if up else levels:
            if level > 0 and not up:
                layers.append(Downsample(c, asymmetric=True))
            for _ in range(cfg.n_res + up):
                layers.append(ResBlock(c, cfg.ch * mult, groups=g))
                c = cfg.ch * mult
                if cfg.side >> level in cfg.attn_res:
                    layers.append(SelfAttention2d(c, groups=g))
            if level > 0 and up:
                layers.append(Upsample(c))
        layers += [] if up else middle()
        self.layers = nn.Sequential(*layers, nn.GroupNorm(g, c, 1e-6), nn.SiLU(),
                                    nn.Conv2d(c, c_out, 3, padding=1))

class Encoder(Coder):
    """x (B, c_x, H, W) -> (B, c_out, H/f, W/f), what quant_conv reads; c_out = 2 c_e for KL."""

class Decoder(Coder):
    """(B, c_in, h, w) from post_quant_conv -> (B, c_x, f h, f w), about [-1, 1]; not clamped."""

@dataclass
class Posterior:
    """q(z | x) = N(mean, exp(logvar)), diagonal; mean, logvar (B, c_z, h, w); VQ: logvar -inf."""
    mean: Tensor
    logvar: Tensor
    def sample(self, noise: Tensor) -> Tensor:
        """z = mean + std * noise, noise ~ N(0, 1). NB: stage two trains on samples (ddpm.py)."""
        return self.mean + (0.5 * self.logvar).exp() * noise
    def kl(self) -> Tensor:
        """KL(q || N(0, 1)) in nats, summed over c, h, w -> (B,); App. G."""
        return 0.5 * (self.mean ** 2 + self.logvar.exp() - 1 - self.logvar).flatten(1).sum(1)
    def scaled(self, z_std: Tensor) -> "Posterior":
        """The posterior of z / z_std."""
        return Posterior(self.mean / z_std, self.logvar - 2 * z_std.log())
    def std(self) -> Tensor:
        """The paper's sigma-hat (App. G), a number: the std of samples over everything.
        NB: the paper's code takes the first batch only; give this one many pictures."""
        return (self.mean.var() + self.logvar.exp().mean()).sqrt()

class Autoencoder(nn.Module):
    """E, D and the 1x1 convs beside the latent; all scaling happens here. z_std is 1 in stage one;
    stage two sets it to its training set's sigma-hat, so that the z it sees have variance 1.
    NB: the released VQ models are not scaled; their z has about variance 1 as it is (App. G)."""
    def __init__(self, cfg: AEConfig):
        super().__init__()
        self.cfg, c_e = cfg, cfg.c_e or cfg.c_z
        moments = 1 if cfg.n_codes else 2                               # KL: mean and logvar
        self.encoder = Encoder(cfg, cfg.c_x, moments * c_e, up=False)
        self.decoder = Decoder(cfg, c_e, cfg.c_x, up=True)
        self.quant_conv = nn.Conv2d(moments * c_e, moments * cfg.c_z, 1)
        self.post_quant_conv = nn.Conv2d(cfg.c_z, c_e, 1)
        self.codebook = Codebook(cfg.n_codes, cfg.c_z) if cfg.n_codes else None
        self.register_buffer("z_std", torch.ones(()))
    def encode(self, x: Tensor) -> Posterior:
        """x (B, c_x, H, W) in [-1, 1], sides divisible by f -> q(z | x) of the scaled latents.
        NB: a VQ model's z is not quantised here but in decode: stage two learns E's own output."""
        h = self.quant_conv(self.encoder(x))
        if self.codebook is not None:
            return Posterior(h, torch.full_like(h, -torch.inf)).scaled(self.z_std)
        mean, logvar = h.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20)).scaled(self.z_std)
    def decode(self, z: Tensor, quantise: bool = True) -> Tensor:
        """Scaled latents (B, c_z, h, w) -> x_rec (B, c_x, f h, f w)."""
        z = z * self.z_std
        if self.codebook is not None and quantise:
            z = self.codebook(z).straight_through()
        return self.decoder(self.post_quant_conv(z))
    def forward(self, x: Tensor, noise: Tensor) -> tuple:
        """Stage one in one call, for DDP and compile: x, noise (B, c_z, h, w) -> x_rec and what is
        regularised: the Posterior, or for VQ the unscaled z and their codes, Quantised."""
        q = self.encode(x)
        if self.codebook is None:
            return self.decode(q.sample(noise)), q
        q = self.codebook(q.mean * self.z_std)
        return self.decode(q.straight_through() / self.z_std, quantise=False), q

class Pixels(nn.Module):
    """In stage one's place for diffusion in pixel space, f = 1: z = x / z_std, nothing learned."""
    cfg = AEConfig(ch=0, ch_mult=(1,), c_z=3)
    def __init__(self):
        super().__init__()
        self.register_buffer("z_std", torch.ones(()))
    def encode(self, x: Tensor) -> Posterior:
        return Posterior(x, torch.full_like(x, -torch.inf)).scaled(self.z_std)
    def decode(self, z: Tensor) -> Tensor:
        return z * self.z_std

def build_autoencoder(shape: dict) -> Autoencoder | Pixels:
    """Of AEConfig's fields, as a checkpoint says them; width 0 stands for pixels."""
    cfg = AEConfig(**shape)
    return Autoencoder(cfg) if cfg.ch else Pixels()
