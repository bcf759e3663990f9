"""eps_theta: the time-conditional U-Net, with attention at chosen resolutions.

Paper:   Sec. 3.2, 3.3, App. E.2.1, Tables 12-15; the released openaimodel.py.
Symbols: z_t noised latent (B, c_out, h, w); t timestep (B,) in 0..T-1; tokens
         (B, M, d_ctx) and beside (B, c_in - c_out, h, w) the two ports of a condition;
         h features; emb features of the timestep (B, 4 ch).
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinyldm.attention import SelfAttention2d, SpatialTransformer, check_attended_sides
from tinyldm.config import option
from tinyldm.errors import require
from tinyldm.layers import (
    Downsample,
    ResBlock,
    Upsample,
    check_widths,
    timestep_embedding,
    zero_,
)


@dataclass(frozen=True)
class UNetConfig:
    """The shape of eps_theta; in brackets, the names in Tables 12-15.

    A level is all that has the same resolution; level 0 has the resolution of z_t.
    Raises BadInput for widths of which no network can be built.
    """

    c_in: int = 3                   # channels of z_t and of a condition beside it
    c_out: int = 3                  # channels of z_t

    # The shorter side of the training latents. It decides which levels are those of
    # attn_res; latents of other sides work too.
    side: int = 64

    ch: int = option(224, "channels at level 0 [Channels]")
    ch_mult: tuple[int, ...] = option(
        (1, 2, 3, 4), "channels of each level, as multiples of ch [Channel Multiplier]"
    )
    n_res: int = option(2, "ResBlocks per level, one more on the way up [Depth]")

    attn_res: tuple[int, ...] = option(
        (32, 16, 8), "shorter sides of the feature maps that attend [Attention resolutions]"
    )
    d_head: int | None = option(32, "width of each attention head [Head Channels]")
    n_head: int | None = option(
        None, "number of heads, which then decides their width [Number of Heads]"
    )
    d_ctx: int | None = option(
        None, "width of tau and of the tokens to attend to [CA embedding dim]"
    )
    depth: int = option(1, "blocks per spatial transformer [Transformer depth]")

    groups: int = option(32, "number of groups of GroupNorm")
    scale_shift: bool = option(
        False, "let the timestep scale and shift features, instead of only shift"
    )
    res_updown: bool = option(
        False, "resample inside ResBlocks, instead of by convolutions"
    )

    def __post_init__(self) -> None:
        check_widths(self.ch, self.ch_mult, self.groups)
        require(self.n_head or self.d_head, "one of n_head and d_head is needed")
        for c in self.attended_widths:
            n_head = self.n_head or c // self.d_head
            require(
                n_head > 0 and c % n_head == 0,
                f"{c} channels, which attend, cannot be divided into heads: "
                f"n_head = {self.n_head}, d_head = {self.d_head}",
            )

    def check_attention(self) -> None:
        """Raise BadInput if attention would not be as attn_res and d_head say.

        Why not always: models have been trained with heads that are a little wider than
        d_head, and at sides where few levels or none attend.
        """
        check_attended_sides(self.attn_res, self.side, len(self.ch_mult))
        for c in self.attended_widths:
            require(
                self.n_head or c % self.d_head == 0,
                f"d_head = {self.d_head} does not divide {c} channels, which attend",
            )

    @property
    def attended_widths(self) -> list[int]:
        """The channels of the levels that attend, and of the lowest, which does anyway."""
        levels = range(len(self.ch_mult))
        widths = [self.ch * self.ch_mult[level] for level in levels if self.attends(level)]
        return [*widths, self.ch * self.ch_mult[-1]]

    @property
    def factor(self) -> int:
        """The number that must divide the sides of z_t."""
        return 2 ** (len(self.ch_mult) - 1)

    def attends(self, level: int) -> bool:
        """Return whether each ResBlock of a level is followed by attention."""
        return self.side // 2 ** level in self.attn_res


class UNet(nn.Module):
    """The network eps_theta(z_t, t, ctx); diffusion.py says what it may predict.

    A stage is a list of one to three layers: a ResBlock, attention if the level
    attends, and an upsampling at the end of a level on the way up. On the way down, the
    output of each stage is kept; on the way up, it is concatenated to the input of its
    counterpart.

    The attention is a SpatialTransformer if the U-Net attends to a condition (cfg.d_ctx
    is given), else SelfAttention2d. The last convolution of each ResBlock and attention
    begins at zero, so each begins as the identity (see zero_). So does conv_out: an
    untrained U-Net predicts 0, which is the mean of eps.

    ckpt_grad = True saves memory: activations inside a stage are not kept for the
    backward pass, but computed a second time.
    """

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        self.ckpt_grad = False

        d_emb = 4 * cfg.ch
        self.time = nn.Sequential(
            nn.Linear(cfg.ch, d_emb), nn.SiLU(), nn.Linear(d_emb, d_emb)
        )

        # The way down; `kept` has the number of channels of each output that is kept.
        c = cfg.ch
        first = nn.Conv2d(cfg.c_in, c, 3, padding=1)
        self.down = nn.ModuleList([nn.ModuleList([first])])
        kept = [c]

        for level, mult in enumerate(cfg.ch_mult):
            if level > 0:
                self.down.append(nn.ModuleList([self._downsample(c)]))
                kept.append(c)
            for _ in range(cfg.n_res):
                self.down.append(self._stage(c, cfg.ch * mult, level))
                c = cfg.ch * mult
                kept.append(c)

        # The lowest resolution, which attends in any case.
        self.middle = nn.ModuleList(
            [self._res_block(c, c), self._attention(c), self._res_block(c, c)]
        )

        # The way up. Each level has one stage more than on the way down, for the kept
        # output of the first convolution or of a downsampling.
        self.up = nn.ModuleList()
        for level, mult in reversed(list(enumerate(cfg.ch_mult))):
            for _ in range(cfg.n_res + 1):
                self.up.append(self._stage(c + kept.pop(), cfg.ch * mult, level))
                c = cfg.ch * mult
            if level > 0:
                self.up[-1].append(self._upsample(c))

        self.norm_out = nn.GroupNorm(cfg.groups, c, 1e-5)
        self.conv_out = zero_(nn.Conv2d(c, cfg.c_out, 3, padding=1))

    # ---- the layers

    def _stage(self, c_in: int, c_out: int, level: int) -> nn.ModuleList:
        """Return a ResBlock, and attention if the level attends."""
        stage = nn.ModuleList([self._res_block(c_in, c_out)])
        if self.cfg.attends(level):
            stage.append(self._attention(c_out))
        return stage

    def _res_block(
        self, c_in: int, c_out: int, resample: nn.Module | None = None
    ) -> ResBlock:
        return ResBlock(
            c_in,
            c_out,
            d_emb=4 * self.cfg.ch,
            groups=self.cfg.groups,
            scale_shift=self.cfg.scale_shift,
            resample=resample,
        )

    def _attention(self, c: int) -> SpatialTransformer | SelfAttention2d:
        """Return a SpatialTransformer if cfg.d_ctx is given, else SelfAttention2d."""
        cfg = self.cfg
        n_head = cfg.n_head or c // cfg.d_head
        d_head = c // n_head
        if cfg.d_ctx:
            return SpatialTransformer(
                c, cfg.d_ctx, n_head, d_head, cfg.depth, cfg.groups
            )

        attention = SelfAttention2d(c, n_head, cfg.groups, eps=1e-5)
        zero_(attention.proj_out)
        return attention

    def _downsample(self, c: int) -> nn.Module:
        if self.cfg.res_updown:
            return self._res_block(c, c, resample=nn.AvgPool2d(2))
        return Downsample(c)

    def _upsample(self, c: int) -> nn.Module:
        if self.cfg.res_updown:
            return self._res_block(c, c, resample=nn.Upsample(scale_factor=2))
        return Upsample(c)

    # ---- the computation

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        tokens: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction, (B, c_out, h, w); cfg.factor must divide h and w.

        The U-Net attends to tokens (B, M, d_ctx); beside (B, c_in - c_out, h, w) is
        concatenated to z_t. Raises ValueError if cfg.d_ctx is given and tokens are not,
        or the other way round.
        """
        check_tokens(self.cfg.d_ctx, tokens)

        # The timestep, for every ResBlock.
        emb = timestep_embedding(t, self.cfg.ch)            # (B, ch)
        emb = self.time(emb.to(z_t.dtype))                  # (B, 4 ch)

        # A condition that lies place by place beside z_t.
        h = z_t
        if beside is not None:
            h = torch.cat([z_t, beside], dim=1)             # (B, c_in, h, w)

        # The way down, the lowest resolution, and the way up.
        kept = []
        for stage in self.down:
            h = self.run(stage, h, emb, tokens)
            kept.append(h)

        h = self.run(self.middle, h, emb, tokens)

        for stage in self.up:
            h = torch.cat([h, kept.pop()], dim=1)
            h = self.run(stage, h, emb, tokens)

        return self.conv_out(F.silu(self.norm_out(h)))      # (B, c_out, h, w)

    def run(
        self, stage: nn.ModuleList, h: Tensor, emb: Tensor, tokens: Tensor | None
    ) -> Tensor:
        """Apply a stage; if ckpt_grad is set, without keeping its activations."""
        if self.ckpt_grad and torch.is_grad_enabled():
            return checkpoint(run_stage, stage, h, emb, tokens, use_reentrant=False)
        return run_stage(stage, h, emb, tokens)


def check_tokens(d_ctx: int | None, tokens: Tensor | None) -> None:
    """Raise ValueError if a network that attends has no tokens, or another one has some."""
    if d_ctx and tokens is None:
        raise ValueError(
            "this network attends to a condition: pass tokens (B, M, d_ctx) as ctx; for "
            "no condition, those of the null condition"
        )
    if tokens is not None and not d_ctx:
        raise ValueError("this network cannot attend to tokens: it has no d_ctx")


def run_stage(
    stage: nn.ModuleList, h: Tensor, emb: Tensor, tokens: Tensor | None
) -> Tensor:
    """Apply the layers of a stage in turn, each with the inputs that it takes."""
    for layer in stage:
        if isinstance(layer, ResBlock):
            h = layer(h, emb)
        elif isinstance(layer, SpatialTransformer):
            h = layer(h, tokens)
        else:
            h = layer(h)
    return h


@dataclass(frozen=True)
class Backbone:
    """A network that eps_theta can be: the dataclass of its shape, and how it is built.

    concatenates: what lies beside z_t is concatenated to it, so c_in counts both.
    is_eps_theta: it predicts noise. A classifier of z_t, which a model has in the same
        place, does not.
    """

    name: str                           # for people
    config: type
    build: Callable[..., nn.Module]
    concatenates: bool = True
    is_eps_theta: bool = True


BACKBONES = {"unet": Backbone("U-Net", UNetConfig, UNet)}
