"""Attention between the places of an image, and from places to a condition's tokens.

Paper:   Sec. 3.3: softmax(Q K^T / sqrt(d)) V, with Q from the U-Net and K, V from
         tau(y); Table 16 for the block around it.
Symbols: N = H * W places; M tokens of the condition; D width of the transformer; n_head
         heads of width d_head; q, k, v queries, keys, values.

NB: Table 16 orders a block as LayerNorm, self-attention, MLP, cross-attention. The
released code and weights have self-attention, cross-attention, MLP, each after its own
LayerNorm; so does this file.

NB: Sec. 3.3 prints W_Q with tau's width and W_V with the U-Net's. It is the other way
round: queries come from the U-Net, keys and values from tau.
"""
import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from tinyldm.errors import require
from tinyldm.layers import zero_


class Attention(nn.Module):
    """Multi-head attention: x (B, N, d_x), ctx (B, M, d_ctx) -> (B, N, d_x).

    For self-attention, pass x as ctx too. With clip=True it is the attention of CLIP's
    text encoder, which has biases and is causal: token i attends to tokens 0..i only.

    Why no mask over padding tokens: the paper says "unmasked" (App. E.2.1), and its
    weights were trained so. Padding has an embedding of its own, from which the network
    learns how much to attend to it.
    """

    def __init__(
        self, d_x: int, d_ctx: int, n_head: int, d_head: int, clip: bool = False
    ):
        super().__init__()
        d_inner = n_head * d_head
        self.n_head = n_head
        self.causal = clip

        self.to_q = nn.Linear(d_x, d_inner, bias=clip)
        self.to_k = nn.Linear(d_ctx, d_inner, bias=clip)
        self.to_v = nn.Linear(d_ctx, d_inner, bias=clip)
        self.to_out = nn.Linear(d_inner, d_x)

    def forward(self, x: Tensor, ctx: Tensor) -> Tensor:
        q = self._split_heads(self.to_q(x))                 # (B, n_head, N, d_head)
        k = self._split_heads(self.to_k(ctx))               # (B, n_head, M, d_head)
        v = self._split_heads(self.to_v(ctx))               # (B, n_head, M, d_head)

        # softmax(q k^T / sqrt(d_head)) v
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)

        h = h.transpose(1, 2).flatten(2)                    # (B, N, n_head * d_head)
        return self.to_out(h)                               # (B, N, d_x)

    def _split_heads(self, h: Tensor) -> Tensor:
        """(B, N, n_head * d_head) -> (B, n_head, N, d_head)."""
        return h.unflatten(2, (self.n_head, -1)).transpose(1, 2)


class GEGLU(nn.Module):
    """The MLP of a block: value * GELU(gate), both linear in x; (B, N, d) -> (B, N, d).

    value and gate are 4 d wide. `proj` holds the weights of both, value first.
    """

    def __init__(self, d: int):
        super().__init__()
        self.proj = nn.Linear(d, 8 * d)
        self.out = nn.Linear(4 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        # Why split the weights, and not proj(x): backward would have to join the
        # gradients of the two halves, which copies the network's widest activation.
        w_value, w_gate = self.proj.weight.chunk(2)
        b_value, b_gate = self.proj.bias.chunk(2)

        value = F.linear(x, w_value, b_value)               # (B, N, 4 d)
        gate = F.linear(x, w_gate, b_gate)                  # (B, N, 4 d)
        return self.out(value * F.gelu(gate))               # (B, N, d)


class TransformerBlock(nn.Module):
    """Table 16's block: self-attention, cross-attention, MLP, each added to its input.

    x (B, N, D), ctx (B, M, d_ctx) -> (B, N, D).
    """

    def __init__(self, d: int, d_ctx: int, n_head: int, d_head: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)
        self.norm3 = nn.LayerNorm(d)
        self.self_attn = Attention(d, d, n_head, d_head)
        self.cross_attn = Attention(d, d_ctx, n_head, d_head)
        self.mlp = GEGLU(d)

    def forward(self, x: Tensor, ctx: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.self_attn(h, h)
        x = x + self.cross_attn(self.norm2(x), ctx)
        return x + self.mlp(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the places of a feature map, attending to a condition too.

    x (B, C, H, W), ctx (B, M, d_ctx) -> (B, C, H, W); Table 16. Its blocks are
    D = n_head * d_head wide.

    Raises ValueError if ctx is None. Why: cross-attention needs something to attend to.
    NB: the released code then attends to x itself without a word, so that a forgotten
    condition looks like a working model. To sample without a condition, pass the ctx of
    the null condition.
    """

    def __init__(
        self,
        c: int,
        d_ctx: int,
        n_head: int,
        d_head: int,
        depth: int = 1,
        groups: int = 32,
    ):
        super().__init__()
        d = n_head * d_head
        self.norm = nn.GroupNorm(groups, c, 1e-6)
        self.proj_in = nn.Conv2d(c, d, 1)

        self.blocks = nn.ModuleList()
        for _ in range(depth):
            self.blocks.append(TransformerBlock(d, d_ctx, n_head, d_head))

        # The transformer begins as the identity.
        self.proj_out = zero_(nn.Conv2d(d, c, 1))

    def forward(self, x: Tensor, ctx: Tensor | None) -> Tensor:
        if ctx is None:
            raise ValueError("cross-attention needs a context: pass ctx (B, M, d_ctx)")

        # Each place of the feature map becomes a token.
        h = self.proj_in(self.norm(x))                      # (B, D, H, W)
        tokens = h.flatten(2).transpose(1, 2)               # (B, N, D)

        for block in self.blocks:
            tokens = block(tokens, ctx)

        # Each token goes back to its place.
        h = tokens.transpose(1, 2)                          # (B, D, N)
        h = h.unflatten(2, x.shape[2:])                     # (B, D, H, W)
        return x + self.proj_out(h)                         # (B, C, H, W)


def check_attended_sides(attn_res: Sequence[int], side: int, n_levels: int) -> None:
    """Raise BadInput if no level has feature maps of one of the sides attn_res.

    Warns of the sides that no level has, if others are there. `side` is that of level 0.
    """
    sides = [side // 2 ** level for level in range(n_levels)]
    missing = [r for r in attn_res if r not in sides]
    message = (
        f"attn_res {listed(missing)}: no level has feature maps of such a side; choose among "
        f"{listed(sides)}"
    )
    require(not missing or len(missing) < len(attn_res), message)
    if missing:
        warnings.warn(message, stacklevel=3)


def listed(numbers: Sequence[int]) -> str:
    """Return numbers as text, such as 32, 16, 8."""
    return ", ".join(str(number) for number in numbers)


class SelfAttention2d(nn.Module):
    """Self-attention between the places of a feature map: (B, C, H, W) -> (B, C, H, W).

    E and D have one head over all channels, the unconditional U-Net has several. The
    queries, keys and values of all heads together are C wide each.
    """

    def __init__(self, c: int, n_head: int = 1, groups: int = 32, eps: float = 1e-6):
        super().__init__()
        self.n_head = n_head
        self.norm = nn.GroupNorm(groups, c, eps)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm(x)).flatten(2)             # (B, 3 C, N)
        qkv = qkv.unflatten(1, (3, self.n_head, -1))        # (B, 3, n_head, d_head, N)
        q, k, v = qkv.transpose(3, 4).unbind(1)             # 3 x (B, n_head, N, d_head)

        # softmax(q k^T / sqrt(d_head)) v
        h = F.scaled_dot_product_attention(q, k, v)         # (B, n_head, N, d_head)

        h = h.transpose(2, 3).reshape(x.shape)              # (B, C, H, W)
        return x + self.proj_out(h)
