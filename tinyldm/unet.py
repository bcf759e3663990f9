"""eps_theta: the time-conditional U-Net, with a transformer at chosen resolutions.

Paper:   Sec. 3.2, 3.3, App. E.2.1, Tables 12-15, openaimodel.py. Reads: layers.py, attention.py
Symbols: z_t (B, c_in, h, w); t (B,) in 0..T-1; ctx = tau(y) (B, M, d_ctx); emb (B, 4 ch)."""
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tinyldm.attention import SelfAttention2d, SpatialTransformer
from tinyldm.layers import Downsample, ResBlock, Upsample, timestep_embedding, zero_

@dataclass(frozen=True)
class UNetConfig:
    """What shapes eps_theta; the names of Tables 12-15 in brackets."""
    c_in: int = 3                       # latent channels, plus those of conditions beside them
    c_out: int = 3                      # latent channels
    side: int = 64                      # of the latent grid it is built for; others work too
    ch: int = 224                       # [Channels]
    ch_mult: tuple[int, ...] = (1, 2, 3, 4)     # [Channel Multiplier]
    n_res: int = 2                      # [Depth] ResBlocks a level on the way down; one more up
    attn_res: tuple[int, ...] = (32, 16, 8)     # [Attention resolutions] sides of grids that attend
    d_head: int | None = 32             # [Head Channels] width of a head; or, instead of it,
    n_head: int | None = None           # [Number of Heads] everywhere, as wide as they have to be
    d_ctx: int | None = None            # [CA embedding dim]; None: no condition, self-attention
    depth: int = 1                      # [Transformer depth] blocks in each SpatialTransformer
    groups: int = 32                    # of GroupNorm
    scale_shift: bool = False           # the timestep scales and shifts; churches only
    res_updown: bool = False            # ResBlocks resample, not convs; churches and inpainting
    @property
    def factor(self) -> int:
        """The latent's sides must be multiples of it."""
        return 2 ** (len(self.ch_mult) - 1)

class UNet(nn.Module):
    """eps_theta(z_t, t, ctx): z_t (B, c_out, h, w), t (B,) -> (B, c_out, h, w); cfg.factor divides
    h and w. ctx: tokens (B, M, d_ctx) to attend to, or ValueError; without d_ctx, maps (B, c_in -
    c_out, h, w) beside z_t, or None. `down` and `up` are lists of stages, these of a few layers."""
    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg, self.ckpt_grad = cfg, False
        d_emb, g = 4 * cfg.ch, cfg.groups
        res = partial(ResBlock, d_emb=d_emb, groups=g, scale_shift=cfg.scale_shift)
        def attn(c):
            n_head = cfg.n_head or c // cfg.d_head
            if cfg.d_ctx:
                return SpatialTransformer(c, cfg.d_ctx, n_head, c // n_head, cfg.depth, g)
            block = SelfAttention2d(c, n_head, g, eps=1e-5)
            zero_(block.proj_out)
            return block
        def stage(c_in, c_out, level):
            attends = cfg.side >> level in cfg.attn_res
            return [res(c_in, c_out), *([attn(c_out)] if attends else [])]
        self.time = nn.Sequential(nn.Linear(cfg.ch, d_emb), nn.SiLU(), nn.Linear(d_emb, d_emb))
        c, levels = cfg.ch, list(enumerate(cfg.ch_mult))
        halve, double = nn.AvgPool2d(2), nn.Upsample(scale_factor=2)
        down, skips = [[nn.Conv2d(cfg.c_in, c, 3, padding=1)]], [c]
        for level, mult in levels:
            if level > 0:
                down.append([res(c, c, resample=halve) if cfg.res_updown else Downsample(c)])
                skips.append(c)
            for _ in range(cfg.n_res):
                down.append(stage(c, cfg.ch * mult, level))
                c = cfg.ch * mult
                skips.append(c)
        self.down, up = nn.ModuleList(map(nn.ModuleList, down)), []
        self.middle = nn.ModuleList([res(c, c), attn(c), res(c, c)])
        for level, mult in reversed(levels):
            for _ in range(cfg.n_res + 1):
                up.append(stage(c + skips.pop(), cfg.ch * mult, level))
                c = cfg.ch * mult
            if level > 0:
                up[-1].append(res(c, c, resample=double) if cfg.res_updown else Upsample(c))
        self.up = nn.ModuleList(map(nn.ModuleList, up))
        self.norm_out = nn.GroupNorm(g, c, 1e-5)
        self.conv_out = zero_(nn.Conv2d(c, cfg.c_out, 3, padding=1))
    def forward(self, z_t: torch.Tensor, t: torch.Tensor, ctx: torch.Tensor | None = None):
        emb = self.time(timestep_embedding(t, self.cfg.ch).to(z_t.dtype))       # (B, 4 ch)
        if ctx is not None and self.cfg.d_ctx is None:
            z_t, ctx = torch.cat([z_t, ctx], dim=1), None                       # (B, c_in, h, w)
        h, skips, run = z_t, [], run_stage
        if self.ckpt_grad and torch.is_grad_enabled():      # backward computes stages anew
            run = partial(checkpoint, run_stage, use_reentrant=False)
        for stage in self.down:
            h = run(stage, h, emb, ctx)
            skips.append(h)
        h = run(self.middle, h, emb, ctx)
        for stage in self.up:
            h = run(stage, torch.cat([h, skips.pop()], dim=1), emb, ctx)
        return self.conv_out(nn.functional.silu(self.norm_out(h)))              # (B, c_out, h, w)

def run_stage(stage: nn.ModuleList, h: torch.Tensor, emb: torch.Tensor, ctx: torch.Tensor | None):
    """Apply a stage's layers in turn, giving each what it takes; FSDP makes subclasses of them."""
    takes = {ResBlock: emb, SpatialTransformer: ctx}
    for layer in stage:
        h = layer(h, *[v for kind, v in takes.items() if isinstance(layer, kind)])
    return h
