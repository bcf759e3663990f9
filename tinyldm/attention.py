"""Attention: between the places of a picture, and from the places to the tokens of a condition.

Paper:   Sec. 3.3, softmax(Q K^T / sqrt(d)) V with Q from the U-Net and K, V from tau(y); Table 16.
Symbols: N = h*w places, M context tokens, D width, n_head heads of d_head. Reads: layers.py
NB: Table 16 orders a block LayerNorm, self-attention, MLP, cross-attention. As in the released code
and weights, ours is self-attention, cross-attention, MLP, each behind a LayerNorm.
NB: Sec. 3.3 prints W_Q with tau's width and W_V with the U-Net's; they are the other way round."""
import torch
from torch import nn
from torch.nn import functional as F

from tinyldm.layers import zero_

class Attention(nn.Module):
    """x (B, N, d_x), ctx (B, M, d_ctx), x itself in self-attention -> (B, N, d_x). No mask: padding
    tokens, too, are attended to (App. E.2.1). clip: CLIP's, with biases, causal: i sees 0..i."""
    def __init__(self, d_x: int, d_ctx: int, n_head: int, d_head: int, clip: bool = False):
        super().__init__()
        self.n_head, self.causal = n_head, clip
        self.to_q, self.to_k, self.to_v = (nn.Linear(d_in, n_head * d_head, bias=clip)
                                           for d_in in (d_x, d_ctx, d_ctx))
        self.to_out = nn.Linear(n_head * d_head, d_x)
    def forward(self, x: torch.Tensor, ctx: torch.Tensor) -> torch.Tensor:
        q, k, v = (a.unflatten(2, (self.n_head, -1)).transpose(1, 2)    # (B, n_head, N|M, d_head)
                   for a in (self.to_q(x), self.to_k(ctx), self.to_v(ctx)))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)     # 1 / sqrt(d_head)
        return self.to_out(h.transpose(1, 2).flatten(2))                # (B, N, d_x)

class GEGLU(nn.Module):
    """The block's MLP: value * GELU(gate), inner width 4 d; (B, N, d) -> (B, N, d)."""
    def __init__(self, d: int):
        super().__init__()
        self.proj, self.out = nn.Linear(d, 8 * d), nn.Linear(4 * d, d)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Chunking the weight, not the result, saves backward a copy of the widest activation.
        (w_value, w_gate), (b_value, b_gate) = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        return self.out(F.linear(x, w_value, b_value) * F.gelu(F.linear(x, w_gate, b_gate)))

class TransformerBlock(nn.Module):
    """Table 16's block: x (B, N, D), ctx (B, M, d_ctx) -> (B, N, D)."""
    def __init__(self, d: int, d_ctx: int, n_head: int, d_head: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.self_attn = Attention(d, d, n_head, d_head)
        self.cross_attn = Attention(d, d_ctx, n_head, d_head)
        self.mlp = GEGLU(d)
    def forward(self, x: torch.Tensor, ctx: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        x = x + self.self_attn(h, h)
        x = x + self.cross_attn(self.norm2(x), ctx)
        return x + self.mlp(self.norm3(x))

class SpatialTransformer(nn.Module):
    """A transformer over the places of a feature map, conditioned by cross-attention (Table 16).
    x (B, C, H, W), ctx (B, M, d_ctx) -> (B, C, H, W). Raises ValueError when ctx is missing.
    NB: the released code silently attends to x itself when the context is None."""
    def __init__(self, c: int, d_ctx: int, n_head: int, d_head: int, depth: int = 1, groups=32):
        super().__init__()
        d = n_head * d_head
        self.norm, self.proj_in = nn.GroupNorm(groups, c, 1e-6), nn.Conv2d(c, d, 1)
        self.blocks = nn.ModuleList(TransformerBlock(d, d_ctx, n_head, d_head)
                                    for _ in range(depth))
        self.proj_out = zero_(nn.Conv2d(d, c, 1))
    def forward(self, x: torch.Tensor, ctx: torch.Tensor | None) -> torch.Tensor:
        if ctx is None:
            raise ValueError("this U-Net attends to a condition: pass ctx (B, M, d_ctx), or null's")
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, N, D)
        for block in self.blocks:
            tokens = block(tokens, ctx)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))

class SelfAttention2d(nn.Module):
    """Self-attention between the places of a map, (B, C, H, W) -> the same; one head in E and D."""
    def __init__(self, c: int, n_head: int = 1, groups: int = 32, eps: float = 1e-6):
        super().__init__()
        self.n_head, self.norm = n_head, nn.GroupNorm(groups, c, eps)
        self.qkv, self.proj_out = nn.Conv2d(c, 3 * c, 1), nn.Conv2d(c, c, 1)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2)                         # (B, 3C, N)
        q, k, v = qkv.unflatten(1, (3, self.n_head, -1)).transpose(3, 4).unbind(1)
        h = F.scaled_dot_product_attention(q, k, v)                     # (B, n_head, N, C/n_head)
        return x + self.proj_out(h.transpose(2, 3).reshape(x.shape))
