"""The parts that E, D and eps_theta share: ResBlock, resampling, timestep embedding.

Paper:   Sec. 3.1, App. E.2.1. The released code has two versions of these parts,
         model.py for E and D and openaimodel.py for eps_theta; here they are one, and
         the differences are arguments.
Symbols: h features (B, C, H, W); t timesteps (B,); emb features of t (B, d_emb).
"""
import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyldm.errors import require


def zero_(module: nn.Module) -> nn.Module:
    """Set all weights of a module to zero, and return it.

    Why: a residual branch whose last layer is zero adds nothing at first. A deep
    network of such blocks begins as the identity, which trains stably, and each block
    comes into effect only as far as it lowers the loss.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def check_widths(ch: int, ch_mult: Sequence[int], groups: int) -> None:
    """Raise BadInput unless there is a level, and GroupNorm can divide its channels.

    A level has a multiple of ch channels, so groups must divide ch.
    """
    require(len(ch_mult) > 0, "ch_mult is empty: a network has at least one level")
    require(
        groups > 0 and ch % groups == 0,
        f"ch = {ch} is not divisible by groups = {groups}, the groups of GroupNorm",
    )


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Return sinusoidal features of timesteps: t (B,) in 0..T-1 -> (B, dim).

    The first half of the features are cosines, the second half sines. Their frequencies
    fall geometrically from 1 to almost 1/10000. If dim is odd, the last feature is
    zero.

    Source: timestep_embedding in the released util.py.
    """
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, device=t.device) / half
    frequency = torch.exp(exponent)                                 # (half,)
    angle = t[:, None].float() * frequency                          # (B, half)
    features = torch.cat([angle.cos(), angle.sin()], dim=1)         # (B, 2 * half)
    return F.pad(features, (0, dim % 2))                            # (B, dim)


class ResBlock(nn.Module):
    """Residual block: x (B, c_in, H, W), emb (B, d_emb) -> (B, c_out, H, W).

    Its branch is GroupNorm, SiLU, 3x3 convolution, twice. The result is added to x,
    which passes a 1x1 convolution first if the number of channels changes.

    d_emb: width of the timestep's features; None, in E and D, means no timestep.
    groups: number of groups of both norms. It should be well below c_out: a norm with
        one channel per group would take away again what the timestep adds to a channel.
    scale_shift: the timestep gives a scale and a shift after the second norm, instead
        of an offset before it (the released churches model).
    resample: a layer without weights that halves or doubles H and W. It acts on x, and
        on the branch before its first convolution (the churches and inpainting models).

    NB: the released code has GroupNorm's eps at 1e-6 in E and D, at 1e-5 in eps_theta.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        d_emb: int | None = None,
        groups: int = 32,
        scale_shift: bool = False,
        resample: nn.Module | None = None,
    ):
        super().__init__()
        eps = 1e-5 if d_emb else 1e-6
        self.scale_shift = scale_shift
        self.resample = resample or nn.Identity()

        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)

        self.emb = None
        if d_emb:
            n_features = 2 * c_out if scale_shift else c_out
            self.emb = nn.Linear(d_emb, n_features)

        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)

        self.skip = nn.Identity()
        if c_in != c_out:
            self.skip = nn.Conv2d(c_in, c_out, 1)

        # The blocks of eps_theta begin as the identity, those of E and D do not.
        if d_emb:
            zero_(self.conv2)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = F.silu(self.norm1(x))
        h = self.conv1(self.resample(h))                    # (B, c_out, H', W')

        h = self._second_norm(h, emb)
        h = self.conv2(F.silu(h))

        return self.skip(self.resample(x)) + h

    def _second_norm(self, h: Tensor, emb: Tensor | None) -> Tensor:
        """Normalise h (B, c_out, H', W'), and let the timestep act on each channel."""
        if self.emb is None:
            return self.norm2(h)

        e = self.emb(F.silu(emb))[:, :, None, None]         # (B, n_features, 1, 1)
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)                # (B, c_out, 1, 1) each
            return self.norm2(h) * (1 + scale) + shift
        return self.norm2(h + e)


class Downsample(nn.Sequential):
    """Halve the sides, by a 3x3 convolution: (B, C, H, W) -> (B, C, H/2, W/2).

    NB: the released E pads with zeros only at the right and the bottom (asymmetric),
    the released U-Net on all four sides. The paper does not mention it.
    """

    def __init__(self, c: int, asymmetric: bool = False):
        if asymmetric:
            pad = nn.ZeroPad2d((0, 1, 0, 1))                # left, right, top, bottom
            conv = nn.Conv2d(c, c, 3, stride=2)
        else:
            pad = nn.Identity()
            conv = nn.Conv2d(c, c, 3, stride=2, padding=1)
        super().__init__(OrderedDict(pad=pad, conv=conv))


class Upsample(nn.Sequential):
    """Double the sides by repeating values, then convolve: -> (B, C, 2H, 2W)."""

    def __init__(self, c: int):
        grow = nn.Upsample(scale_factor=2)
        conv = nn.Conv2d(c, c, 3, padding=1)
        super().__init__(OrderedDict(grow=grow, conv=conv))
