"""The bricks of E, D and eps_theta: normalisation, ResBlock, down-/upsampling, timestep embedding.

Paper:   Sec. 3.1, App. E.2.1; the released code's model.py (E, D) and openaimodel.py (eps_theta).
Symbols: h features (B, C, H, W); emb the timestep's features (B, D). Reads: nothing of ours."""
import math
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

def zero_(module: nn.Module) -> nn.Module:
    """Zero a module's weights: a residual branch that ends in it begins as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module

def timestep_embedding(t: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal features [cos | sin] of t (B,) in 0..T-1 -> (B, dim), zero-padded if dim is odd.
    Frequencies fall from 1 to almost 1/10000, geometrically (openaimodel's util.py)."""
    half = dim // 2
    freq = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
    angle = t[:, None].float() * freq
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, dim % 2))

class ResBlock(nn.Module):
    """norm, SiLU, conv, twice, plus x: x (B, c_in, H, W), emb (B, d_emb) -> (B, c_out, H, W).
    d_emb is None in E and D; in eps_theta it is emb's width, conv2 begins at zero and eps is 1e-5.
    groups: well below c_out, since norm2 of single channels would wipe out emb's offset.
    scale_shift: emb becomes norm2's scale and shift instead of an offset before it. resample: a
    parameterless layer that halves or doubles H and W, of the input too, before the first conv."""
    def __init__(self, c_in: int, c_out: int, d_emb: int | None = None, groups: int = 32,
                 scale_shift: bool = False, resample: nn.Module | None = None):
        super().__init__()
        eps = 1e-5 if d_emb else 1e-6
        self.scale_shift, self.resample = scale_shift, resample or nn.Identity()
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(d_emb, c_out * (2 if scale_shift else 1)) if d_emb else None
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        if d_emb:
            zero_(self.conv2)
    def forward(self, x: torch.Tensor, emb: torch.Tensor | None = None) -> torch.Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        e = 0 if self.emb is None else self.emb(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        return self.skip(self.resample(x)) + self.conv2(F.silu(h))

class Downsample(nn.Sequential):
    """3x3 conv of stride 2: (B, C, H, W) -> (B, C, H/2, W/2).
    NB: the released E pads only right and bottom, the U-Net all four sides; the paper is silent."""
    def __init__(self, c: int, asymmetric: bool = False):
        pad = nn.ZeroPad2d((0, 1, 0, 1)) if asymmetric else nn.Identity()
        conv = nn.Conv2d(c, c, 3, stride=2, padding=0 if asymmetric else 1)
        super().__init__(OrderedDict(pad=pad, conv=conv))

class Upsample(nn.Sequential):
    """Nearest-neighbour doubling, then a 3x3 conv: (B, C, H, W) -> (B, C, 2H, 2W)."""
    def __init__(self, c: int):
        grow, conv = nn.Upsample(scale_factor=2), nn.Conv2d(c, c, 3, padding=1)
        super().__init__(OrderedDict(grow=grow, conv=conv))
