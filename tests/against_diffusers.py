"""The same networks and the same sampling by diffusers, for the benchmark.

    pip install diffusers
    python -m tinyldm.engine.bench --against diffusers

This is no test, and diffusers is no dependency. Any file that defines these three
functions can be compared with our code.
"""
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from tinyldm.autoencoder import AEConfig
from tinyldm.conditioning import Context
from tinyldm.errors import require
from tinyldm.unet import UNetConfig


def unet(cfg: UNetConfig) -> UNet2DConditionModel:
    """Return diffusers' U-Net of our shape. It is called as net(z_t, t, tokens).

    Raises BadInput for a shape that diffusers does not have.
    """
    require(
        cfg.d_ctx and not cfg.scale_shift and not cfg.res_updown,
        "--against diffusers: takes presets with cross-attention: toy, imagenet256, text2img",
    )
    widths = [cfg.ch * mult for mult in cfg.ch_mult]
    down_blocks = []
    for level in range(len(widths)):
        down_blocks.append("CrossAttnDownBlock2D" if cfg.attends(level) else "DownBlock2D")
    up_blocks = [name.replace("Down", "Up") for name in reversed(down_blocks)]

    return UNet2DConditionModel(
        sample_size=cfg.side,
        in_channels=cfg.c_in,
        out_channels=cfg.c_out,
        block_out_channels=widths,
        layers_per_block=cfg.n_res,
        down_block_types=down_blocks,
        up_block_types=up_blocks,
        # In spite of its name, this is the number of heads.
        attention_head_dim=[cfg.n_head or width // cfg.d_head for width in widths],
        cross_attention_dim=cfg.d_ctx,
        norm_num_groups=cfg.groups,
        transformer_layers_per_block=cfg.depth,
    )


def autoencoder(cfg: AEConfig) -> AutoencoderKL | None:
    """Return diffusers' autoencoder of our shape, or None if it has no such shape.

    It has no codebook, and attention only at the lowest resolution.
    """
    if cfg.n_codes or cfg.attn_res:
        return None
    n_levels = len(cfg.ch_mult)
    return AutoencoderKL(
        in_channels=cfg.c_x,
        out_channels=cfg.c_x,
        down_block_types=["DownEncoderBlock2D"] * n_levels,
        up_block_types=["UpDecoderBlock2D"] * n_levels,
        block_out_channels=[cfg.ch * mult for mult in cfg.ch_mult],
        layers_per_block=cfg.n_res,
        latent_channels=cfg.c_z,
        norm_num_groups=cfg.groups,
        mid_block_add_attention=cfg.attn_mid,
    )


def sampling(
    net: Callable,
    z_T: Tensor,
    ctx: Context,
    ctx_null: Context,
    betas: Tensor,
    steps: int,
    s: float,
) -> Tensor:
    """Sample as diffusers' pipelines do: one call for both conditions, guidance, a DDIM
    step."""
    scheduler = DDIMScheduler(len(betas), trained_betas=betas.numpy(), clip_sample=False)
    scheduler.set_timesteps(steps, device=z_T.device)
    both = torch.cat([ctx_null.tokens.expand_as(ctx.tokens), ctx.tokens])

    z = z_T
    for t in scheduler.timesteps:
        z_t = scheduler.scale_model_input(torch.cat([z, z]), t)
        eps_null, eps = net(z_t, t, both).chunk(2)
        guided = eps_null + s * (eps - eps_null)
        z = scheduler.step(guided, t, z).prev_sample
    return z
