"""eps_theta as a transformer over patches of z_t, in place of the U-Net.

Papers:  Peebles and Xie 2023 (DiT), Sec. 3.2 and Fig. 3, the block adaLN-Zero; for text,
         Chen et al. 2024 (PixArt-alpha), cross-attention in each block.
Symbols: z_t (B, c_out, h, w); t (B,); tokens (B, M, d_ctx) and beside (B, c_in - c_out,
         h, w) the two ports of a condition; N patches; emb (B, ch) what the timestep and
         the condition as a whole say; D = ch.

What changed against the U-Net: there are no levels, no convolutions and no skips. All
blocks see all patches at one resolution, which costs N^2. The timestep does not add to
features but scales and shifts them, and opens each branch by a gate that begins at zero.

NB: the DiT paper's queries, keys and values have biases, its timestep becomes 256 features
first, and it also predicts a variance; here it is as in unet.py. PixArt's cross-attention has
no LayerNorm before it, and its text is not also pooled into emb.
"""
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinyldm.attention import Attention
from tinyldm.config import option
from tinyldm.errors import require
from tinyldm.layers import timestep_embedding, zero_
from tinyldm.unet import UNetConfig, check_tokens

# Options that the U-Net has, too: they are the same flags.
U = UNetConfig.__dataclass_fields__


def shared(name: str) -> object:
    """Return an option with the U-Net's default and help, as a field of another dataclass."""
    field = U[name]
    return option(field.default, field.metadata["help"])


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT; in brackets, the names in the DiT paper's Table 1.

    Raises BadInput for widths of which no network can be built.
    """

    c_in: int = 4                   # channels of z_t and of a condition beside it
    c_out: int = 4                  # channels of z_t
    side: int = 32                  # the shorter side of the training latents

    ch: int = shared("ch")          # D, the width of each patch's token [Hidden size d]
    n_head: int | None = shared("n_head")       # [Heads]
    d_head: int | None = shared("d_head")
    d_ctx: int | None = shared("d_ctx")
    n_block: int = option(12, "number of blocks of the DiT [Layers N]", flag="--blocks")
    patch: int = option(2, "side of the DiT's patches [p]")

    def __post_init__(self) -> None:
        require(self.n_head or self.d_head, "one of n_head and d_head is needed")
        n_head = self.heads
        require(
            n_head > 0 and self.ch % n_head == 0,
            f"ch = {self.ch} cannot be divided into heads: n_head = {self.n_head}, "
            f"d_head = {self.d_head}",
        )
        require(self.ch % 4 == 0, f"ch = {self.ch}: must be a multiple of 4")

    def check_attention(self) -> None:
        """Raise BadInput if the heads would not be as wide as d_head says."""
        require(
            self.n_head or self.ch % self.d_head == 0,
            f"d_head = {self.d_head} does not divide ch = {self.ch}",
        )

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.n_head or self.ch // self.d_head

    @property
    def factor(self) -> int:
        """The number that must divide the sides of z_t."""
        return self.patch


class DiTBlock(nn.Module):
    """Self-attention, cross-attention and MLP; x (B, N, D), emb (B, D) -> (B, N, D).

    emb gives self-attention and MLP a scale, a shift and a gate each: adaLN-Zero. The
    gates are zero at first, and so is what cross-attention adds: a block begins as the
    identity.
    """

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        d = cfg.ch
        d_head = d // cfg.heads
        self.norm1 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.norm3 = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.self_attn = Attention(d, d, cfg.heads, d_head)
        self.mlp = nn.Sequential(
            nn.Linear(d, 4 * d), nn.GELU(approximate="tanh"), nn.Linear(4 * d, d)
        )
        self.ada = zero_(nn.Linear(d, 6 * d))

        self.cross_attn = None
        if cfg.d_ctx:
            self.norm2 = nn.LayerNorm(d)
            self.cross_attn = Attention(d, cfg.d_ctx, cfg.heads, d_head)
            zero_(self.cross_attn.to_out)

    def forward(self, x: Tensor, emb: Tensor, tokens: Tensor | None) -> Tensor:
        ada = self.ada(F.silu(emb))[:, None]                # (B, 1, 6 D)
        shift1, scale1, gate1, shift3, scale3, gate3 = ada.chunk(6, dim=2)

        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + gate1 * self.self_attn(h, h)
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm2(x), tokens)
        h = self.norm3(x) * (1 + scale3) + shift3
        return x + gate3 * self.mlp(h)


class DiT(nn.Module):
    """The network eps_theta(z_t, t, ctx), called as the U-Net is.

    Of a condition that comes as tokens, the mean goes to emb, by which a class acts in the
    DiT paper; and every block attends to all of them, as captions need it. Of a class,
    which is one token, the attention only says the same once more.

    It begins as zero, as the U-Net does. ckpt_grad = True computes the activations inside
    a block a second time in the backward pass, in place of keeping them.
    """

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.cfg = cfg
        self.ckpt_grad = False
        d = cfg.ch

        self.time = nn.Sequential(nn.Linear(d, d), nn.SiLU(), nn.Linear(d, d))
        self.pool = nn.Linear(cfg.d_ctx, d) if cfg.d_ctx else None
        self.patches = nn.Conv2d(cfg.c_in, d, cfg.patch, stride=cfg.patch)
        self.blocks = nn.ModuleList([DiTBlock(cfg) for _ in range(cfg.n_block)])

        self.norm_out = nn.LayerNorm(d, elementwise_affine=False, eps=1e-6)
        self.ada_out = zero_(nn.Linear(d, 2 * d))
        self.proj_out = zero_(nn.Linear(d, cfg.c_out * cfg.patch ** 2))

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        tokens: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction, (B, c_out, h, w); cfg.patch must divide h and w.

        Raises ValueError if cfg.d_ctx is given and tokens are not, or the other way round.
        """
        check_tokens(self.cfg.d_ctx, tokens)

        # The timestep, and the condition as a whole.
        emb = timestep_embedding(t, self.cfg.ch)            # (B, D)
        emb = self.time(emb.to(z_t.dtype))
        if tokens is not None:
            emb = emb + self.pool(tokens.mean(1))

        # Each patch becomes a token, which knows its place.
        h = z_t
        if beside is not None:
            h = torch.cat([z_t, beside], dim=1)             # (B, c_in, h, w)
        h = self.patches(h)                                 # (B, D, h / p, w / p)
        rows, columns = h.shape[2:]
        x = h.flatten(2).transpose(1, 2)                    # (B, N, D)
        x = x + places(rows, columns, self.cfg.ch, x)

        for block in self.blocks:
            if self.ckpt_grad and torch.is_grad_enabled():
                x = checkpoint(block, x, emb, tokens, use_reentrant=False)
            else:
                x = block(x, emb, tokens)

        # Each token becomes a patch again.
        shift, scale = self.ada_out(F.silu(emb))[:, None].chunk(2, dim=2)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        h = x.transpose(1, 2).unflatten(2, (rows, columns))  # (B, p p c_out, ...)
        return F.pixel_shuffle(h, self.cfg.patch)           # (B, c_out, h, w)


def places(rows: int, columns: int, d: int, like: Tensor) -> Tensor:
    """Return sinusoidal features of each place of a grid, row by row -> (N, d).

    One half of the features says the row, the other the column. They are computed, not
    learned, so a DiT samples at other sizes, too.
    """
    row = timestep_embedding(torch.arange(rows, device=like.device), d // 2)
    column = timestep_embedding(torch.arange(columns, device=like.device), d // 2)
    features = torch.cat(
        [row.repeat_interleave(columns, 0), column.repeat(rows, 1)], dim=1
    )
    return features.to(like.dtype)
