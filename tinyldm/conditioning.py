"""tau: the encoders that turn a condition y into the tokens ctx = tau(y) that the U-Net attends to.

Paper:   Sec. 3.3, App. E.2.1, Table 17.
Symbols: y token ids (B, M); ctx (B, M, D); M tokens of width D.
Reads:   attention.py

The null condition of guidance is the empty caption: M times [PAD]. tau learns what it means.
"""
from dataclasses import dataclass

import torch
from torch import nn

from tinyldm.attention import Attention


@dataclass(frozen=True)
class TextConfig:
    """What shapes tau; Table 17's text-to-image row has seq 77, depth 32, dim 1280."""
    n_vocab: int
    n_token: int = 77                   # M
    d: int = 1280                       # D, the U-Net's d_ctx
    depth: int = 32
    n_head: int = 8
    d_head: int = 64


class TextBlock(nn.Module):
    """Pre-norm self-attention and a GELU MLP of width 4 D: (B, M, D) -> (B, M, D)."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        d = cfg.d
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, d, cfg.n_head, cfg.d_head)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = self.norm1(h)
        h = h + self.attn(x, x)
        return h + self.mlp(self.norm2(h))


class TextTransformer(nn.Module):
    """ids (B, M) -> ctx (B, M, D): token + position embeddings, blocks, LayerNorm. No padding mask.

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
        h = self.token(y) + self.position.weight                                # (B, M, D)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)
