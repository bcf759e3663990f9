"""tau: the encoders of a condition y, ctx = tau(y), which the U-Net is given.

Paper:   Sec. 3.3, App. E.2.1, Table 17; SD's CLIP (Radford et al. 2021). Reads: attention.py
Symbols: y ids (B, M), labels (B,) or maps (B, H, W); ctx (B, M, D) or, beside z_t, (B, c, h, w)."""
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    clip: bool = False                  # CLIP's: causal, biases in attention, another GELU

class QuickGELU(nn.Module):
    """CLIP's approximation of GELU: x sigmoid(1.702 x)."""
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)

class TextBlock(nn.Module):
    """Pre-norm self-attention and a GELU MLP of width 4 D: (B, M, D) -> (B, M, D)."""
    def __init__(self, cfg: TextConfig):
        super().__init__()
        d, gelu = cfg.d, QuickGELU() if cfg.clip else nn.GELU()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attention(d, d, cfg.n_head, cfg.d_head, cfg.clip)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), gelu, nn.Linear(4 * d, d))
    def forward(self, h: Tensor) -> Tensor:
        x = self.norm1(h)
        h = h + self.attn(x, x)
        return h + self.mlp(self.norm2(h))

class TextTransformer(nn.Module):
    """ids (B, M) -> ctx (B, M, D), M <= n_token: token + position embeddings, blocks, LayerNorm. No
    padding mask. The paper's: x-transformers' encoder, 8 heads of 64 whatever D is. Positions begin
    as large as tokens: drawn at 0.02, the first LayerNorm would all but hide them."""
    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg = cfg
        self.token, self.position = (nn.Embedding(n, cfg.d) for n in (cfg.n_vocab, cfg.n_token))
        self.blocks = nn.Sequential(*(TextBlock(cfg) for _ in range(cfg.depth)))
        self.norm = nn.LayerNorm(cfg.d)
    def forward(self, y: Tensor) -> Tensor:
        h = self.token(y) + self.position.weight[:y.shape[1]]                   # (B, M, D)
        return self.norm(self.blocks(h))

class ClassEmbedder(nn.Module):
    """labels (B,) in 0..n_classes-1 -> ctx (B, 1, D), a single token.
    NB: the guided ImageNet model's 1001st is the null condition; released code never trains it."""
    def __init__(self, n_classes: int, d: int):
        super().__init__()
        self.embedding = nn.Embedding(n_classes, d)
    def forward(self, y: Tensor) -> Tensor:
        return self.embedding(y)[:, None]

class SpatialRescaler(nn.Module):
    """Label maps (B, H, W) of 0..c_in-1, -1 where nothing is known, or their one-hot form (B, c_in,
    H, W) -> (B, c_out, H / 2^n, W / 2^n), beside z_t: bilinear halving n times, then a 1x1 conv."""
    def __init__(self, c_in: int, c_out: int, n: int):
        super().__init__()
        self.n, self.conv = n, nn.Conv2d(c_in, c_out, 1, bias=False)
    def forward(self, y: Tensor) -> Tensor:
        if y.ndim == 3:
            y = nn.functional.one_hot(y.long() + 1, self.conv.in_channels + 1)[..., 1:]
            y = y.permute(0, 3, 1, 2).to(self.conv.weight.dtype)                # (B, c_in, H, W)
        for _ in range(self.n):
            y = nn.functional.interpolate(y, scale_factor=0.5, mode="bilinear")
        return self.conv(y)                                                     # (B, c_out, h, w)
