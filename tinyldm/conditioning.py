"""tau: the encoders of a condition y, and the Context that the U-Net is given of it.

Paper:   Sec. 3.3, App. E.2.1, Table 17; for the text encoder of Stable Diffusion, CLIP
         (Radford et al. 2021).
Symbols: y token ids (B, M), labels (B,) or label maps (B, H, W); ctx = tau(y); D width
         of a token of ctx.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyldm.attention import Attention
from tinyldm.config import option


class Context(NamedTuple):
    """What the U-Net is given of a condition, by one of two ports or by both.

    A U-Net is called as unet(z_t, t, *ctx). Without a condition, ctx is Context().
    """

    tokens: Tensor | None = None    # (B, M, d_ctx): the U-Net attends to them
    beside: Tensor | None = None    # (B, c, h, w): concatenated to z_t


# ---- captions and boxes, as tokens

@dataclass(frozen=True)
class TextConfig:
    """The shape of a TextTransformer; defaults are Table 17's text-to-image model."""

    n_vocab: int | None = option(
        None, "number of different tokens", flag="--vocab-size"
    )
    n_token: int = option(77, "number of tokens of a condition [seq-length]")
    d: int = 1280                   # D; it is the U-Net's d_ctx, so it has no flag
    depth: int = option(32, "number of blocks of tau", flag="--text-depth")
    n_head: int = option(8, "number of attention heads of tau", flag="--text-heads")
    d_head: int = option(64, "width of each head of tau", flag="--text-d-head")
    clip: bool = option(
        False,
        "give tau the form of CLIP's text encoder: causal, with biases",
        flag="--text-clip",
    )


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU: x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """Self-attention, then an MLP of width 4 D, each after a LayerNorm; h (B, M, D)."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        d = cfg.d
        gelu = QuickGELU() if cfg.clip else nn.GELU()
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.attn = Attention(d, d, cfg.n_head, cfg.d_head, cfg.clip)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), gelu, nn.Linear(4 * d, d))

    def forward(self, h: Tensor) -> Tensor:
        x = self.norm1(h)
        h = h + self.attn(x, x)
        return h + self.mlp(self.norm2(h))


class TextTransformer(nn.Module):
    """Transformer over token ids: y (B, M) in 0..n_vocab-1 -> (B, M, D), M <= n_token.

    Embeddings of tokens and of positions are added; blocks and a LayerNorm follow. With
    cfg.clip=False it is the released BERTEmbedder, which has 8 heads of 64 for any D.

    Why no mask: a padding token is a token like any other, as in the paper (Attention).

    Why positions begin as large as tokens, both N(0, 1): many transformers begin with
    positions of std 0.02. Beside tokens of std 1, the first LayerNorm would all but
    hide these, and for a long time ctx would say which words there are, but not their
    order.
    """

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg = cfg
        self.token = nn.Embedding(cfg.n_vocab, cfg.d)
        self.position = nn.Embedding(cfg.n_token, cfg.d)

        self.blocks = nn.Sequential()
        for _ in range(cfg.depth):
            self.blocks.append(TextBlock(cfg))

        self.norm = nn.LayerNorm(cfg.d)

    def forward(self, y: Tensor) -> Tensor:
        M = y.shape[1]
        h = self.token(y) + self.position.weight[:M]        # (B, M, D)
        return self.norm(self.blocks(h))                    # (B, M, D)


# ---- classes

class ClassEmbedder(nn.Module):
    """One learned token per class: y (B,) in 0..n_classes-1 -> (B, 1, D).

    The last class is the null condition.
    NB: so it is in the released ImageNet model, which has 1001 classes; but the
    released training code never drops a label, and so never trains that class.
    """

    def __init__(self, n_classes: int, d: int):
        super().__init__()
        self.embedding = nn.Embedding(n_classes, d)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding(y)[:, None]                   # (B, 1, D)


# ---- label maps

class SpatialRescaler(nn.Module):
    """Shrink label maps to the latent grid: (B, H, W) -> (B, c_out, H / 2^n, W / 2^n).

    A map has labels 0..c_in-1, and -1 where the class is unknown; or it is one-hot
    already, (B, c_in, H, W). Bilinear interpolation halves it n times, after which each
    value is the share of a class in the pixels of a place; then a 1x1 convolution mixes
    the classes.
    """

    def __init__(self, c_in: int, c_out: int, n: int):
        super().__init__()
        self.n = n
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, y: Tensor) -> Tensor:
        if y.ndim == 3:
            y = self._one_hot(y)                            # (B, c_in, H, W)

        for _ in range(self.n):
            y = F.interpolate(y, scale_factor=0.5, mode="bilinear")

        return self.conv(y)                                 # (B, c_out, h, w)

    def _one_hot(self, labels: Tensor) -> Tensor:
        """(B, H, W) -> (B, c_in, H, W); all zeros where the label is -1."""
        c_in = self.conv.in_channels
        one_hot = F.one_hot(labels.long() + 1, c_in + 1)    # (B, H, W, 1 + c_in)
        one_hot = one_hot[..., 1:]                          # drops the class "unknown"
        return one_hot.permute(0, 3, 1, 2).to(self.conv.weight.dtype)
