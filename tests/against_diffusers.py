"""The same networks and the same sampling by diffusers, for `python -m tinyldm.bench --against`.

Not a test, and no dependency: `pip install diffusers` by hand. Any file that defines these three
can stand against ours: unet(cfg), autoencoder(cfg) or None, and sampling(...)."""
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from tinyldm import require

def unet(cfg):
    """cfg: our UNetConfig. Called with (z_t, t, ctx); .sample is the tensor. Raises BadInput."""
    require(cfg.d_ctx and not cfg.scale_shift and not cfg.res_updown,
            "--against diffusers: takes presets with cross-attention: toy, imagenet256, text2img")
    widths = [cfg.ch * m for m in cfg.ch_mult]
    attends = ["CrossAttn" * (cfg.side >> i in cfg.attn_res) for i in range(len(widths))]
    return UNet2DConditionModel(
        cfg.side, cfg.c_in, cfg.c_out, block_out_channels=widths, layers_per_block=cfg.n_res,
        down_block_types=[a + "DownBlock2D" for a in attends],
        up_block_types=[a + "UpBlock2D" for a in attends[::-1]],
        attention_head_dim=[cfg.n_head or c // cfg.d_head for c in widths],     # sic: their number
        cross_attention_dim=cfg.d_ctx, norm_num_groups=cfg.groups,
        transformer_layers_per_block=cfg.depth)


def autoencoder(cfg):
    """cfg: our AEConfig. None for what AutoencoderKL is not: VQ, attention beside the middle."""
    if cfg.n_codes or cfg.attn_res:
        return None
    n = len(cfg.ch_mult)
    return AutoencoderKL(
        cfg.c_x, cfg.c_x, ["DownEncoderBlock2D"] * n, ["UpDecoderBlock2D"] * n,
        [cfg.ch * m for m in cfg.ch_mult], cfg.n_res, latent_channels=cfg.c_z,
        norm_num_groups=cfg.groups, mid_block_add_attention=cfg.attn_mid)


def sampling(net, z, ctx, null, betas, steps, s):
    """DDIM as diffusers' pipelines have it: one call for both, guidance, the scheduler's step."""
    scheduler = DDIMScheduler(len(betas), trained_betas=betas.numpy(), clip_sample=False)
    scheduler.set_timesteps(steps, device=z.device)
    both = torch.cat([null.expand_as(ctx), ctx])
    for t in scheduler.timesteps:
        z_in = scheduler.scale_model_input(torch.cat([z, z]), t)
        e_null, e = net(z_in, t, both).chunk(2)
        z = scheduler.step(e_null + s * (e - e_null), t, z).prev_sample
    return z
