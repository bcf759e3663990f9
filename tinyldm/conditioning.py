"""tau: the encoders that turn a condition y into the tokens ctx = tau(y) that the U-Net attends to.

Paper:   Sec. 3.3, App. E.2.1, Table 17; CLIP (Radford et al. 2021) for Stable Diffusion's tau.
Symbols: y token ids (B, M), labels (B,) or maps; ctx (B, M, D); M tokens of width D.
Reads:   attention.py, tokens.py

TASKS says which field of a data set's item is the condition, how a list of its values becomes y,
and which value is none at all, the null condition of guidance: tau learns what that means.
"""
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from tinyldm.attention import Attention
from tinyldm.tokens import encode


@dataclass(frozen=True)
class TextConfig:
    """What shapes tau; Table 17's text-to-image row has seq 77, depth 32, dim 1280."""
    n_vocab: int
    n_token: int = 77                   # M
    d: int = 1280                       # D, the U-Net's d_ctx
    depth: int = 32
    n_head: int = 8
    d_head: int = 64
    clip: bool = False                  # CLIP's: causal, biases in attention, another GELU


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU: x sigmoid(1.702 x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class TextBlock(nn.Module):
    """Pre-norm self-attention and a GELU MLP of width 4 D: (B, M, D) -> (B, M, D)."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        d = cfg.d
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, d, cfg.n_head, cfg.d_head, cfg.clip)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), QuickGELU() if cfg.clip else nn.GELU(),
                                 nn.Linear(4 * d, d))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = self.norm1(h)
        h = h + self.attn(x, x)
        return h + self.mlp(self.norm2(h))


class TextTransformer(nn.Module):
    """ids (B, M) -> ctx (B, M, D): token + position embeddings, blocks, LayerNorm. No padding mask.

    The paper's is x-transformers' encoder, with 8 heads of 64 whatever D is; M at most n_token.

    Tokens and positions begin at one size. Were positions drawn at 0.02 beside unit-size tokens,
    the first LayerNorm would all but hide them: a toy run then mixed up "left of" and "right of".
    """

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg = cfg
        self.token = nn.Embedding(cfg.n_vocab, cfg.d)
        self.position = nn.Embedding(cfg.n_token, cfg.d)
        self.blocks = nn.ModuleList(TextBlock(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.d)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        h = self.token(y) + self.position.weight[:y.shape[1]]                   # (B, M, D)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)


class ClassEmbedder(nn.Module):
    """labels (B,) in 0..n_classes-1 -> ctx (B, 1, D), a single token.

    NB: the guided ImageNet model has a 1001st class, the null condition, which the released code
    never trains; without it guidance is impossible.
    """

    def __init__(self, n_classes: int, d: int):
        super().__init__()
        self.embedding = nn.Embedding(n_classes, d)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return self.embedding(y)[:, None]


class SpatialRescaler(nn.Module):
    """A one-hot label map (B, c_in, H, W) -> (B, c_out, H / 2^n, W / 2^n), to lie beside z_t.

    Bilinear halving n times (on even sides the mean of 2 x 2 each time), then a 1x1 conv.
    """

    def __init__(self, c_in: int, c_out: int, n: int):
        super().__init__()
        self.n = n
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        for _ in range(self.n):
            y = F.interpolate(y, scale_factor=0.5, mode="bilinear")
        return self.conv(y)                                                     # (B, c_out, h, w)


class Task(NamedTuple):
    """A kind of condition. to_y(values, tau, tokenizer) -> y (B, ...)."""
    field: str | None       # of an item of the data set
    null: str | None        # the value that says nothing
    to_y: Callable


def rebuild(task: str, shape: dict) -> nn.Module | None:
    """tau from what a checkpoint says of its shape (train_ldm.py's shape_of)."""
    if task == "none":
        return None
    return ClassEmbedder(**shape) if task == "class" else TextTransformer(TextConfig(**shape))


def no_y(values: list, tau, tokenizer) -> torch.Tensor:
    return torch.zeros(len(values), dtype=torch.int64)


def class_y(values: list, tau: ClassEmbedder, tokenizer) -> torch.Tensor:
    """labels, or None for the last class, the null one -> (B,)."""
    null = tau.embedding.num_embeddings - 1
    return torch.tensor([null if v is None else int(v) for v in values])


def text_y(values: list, tau: TextTransformer, tokenizer) -> torch.Tensor:
    """captions -> token ids (B, M); the empty one is M times [PAD]."""
    return encode(tokenizer, values, tau.cfg.n_token)


TASKS = {
    #             field      null  to_y          all through cross-attention
    "none":  Task(None,      None, no_y),
    "class": Task("label",   None, class_y),
    "text":  Task("caption", "",   text_y),
}
