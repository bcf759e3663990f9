"""The names that diffusers gives to the tensors of the official files.

Source: AutoencoderKL, VQModel and UNet2DConditionModel of diffusers. Both kinds of files hold the
        same numbers; only attention in E and D differs in shape, Linear layers for 1x1
        convolutions.
Symbols: a rule is a pair (pattern, replacement) of re.sub, from the official name on.
"""
import re

from torch import Tensor

from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.engine.released_names import Rule, renamed, sources
from tinyldm.unet import UNet, UNetConfig

# ---- E and D

# Names of attention's layers in older files, by the ones of today.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def autoencoder_rules(n_levels: int) -> list[Rule]:
    """Return the rules of E and D. NB: up_blocks are numbered as D runs them, up is not."""

    def up_block(match: re.Match) -> str:
        return f".up_blocks.{n_levels - 1 - int(match[1])}."

    return [
        (r"\.down\.", ".down_blocks."),
        (r"\.up\.(\d+)\.", up_block),
        (r"\.(down|up)sample\.", r".\1samplers.0."),
        (r"\.block\.", ".resnets."),
        (r"\.attn\.", ".attentions."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ]


def from_diffusers(state: dict[str, Tensor], ae: Autoencoder) -> dict[str, Tensor]:
    """Return a state dict in diffusers' layout with the official names of an autoencoder.

    What this autoencoder does not have keeps its name, and so does a state dict in another
    layout.
    """
    if not any(key.startswith("encoder.down_blocks.") for key in state):
        return state
    rules = rules_from_official(ae)
    official = {renamed(name, rules): name for name in official_names(ae)}

    found = {}
    for key, x in state.items():
        for old, new in OLD_NAMES.items():
            key = key.replace(f".{old}.", f".{new}.")
        name = official.get(key, key)
        is_projection = ".attentions." in key and x.ndim == 2
        found[name] = x[:, :, None, None] if is_projection else x
    return found


def to_diffusers(state: dict[str, Tensor], net: Autoencoder | UNet) -> dict[str, Tensor]:
    """Return the official state dict of a network with the names and shapes of diffusers."""
    rules = rules_from_official(net)
    found = {}
    for name, x in state.items():
        key = renamed(name, rules)
        is_projection = isinstance(net, Autoencoder) and ".attentions." in key and x.ndim == 4
        found[key] = x.flatten(1) if is_projection else x
    return found


def official_names(net: Autoencoder | UNet) -> list[str]:
    """Return the official names of all tensors of a network."""
    return [name for source in sources(net).values() for name in source.keys]


def rules_from_official(net: Autoencoder | UNet) -> list[Rule]:
    """Return the rules from the official names of a network to those of diffusers."""
    if isinstance(net, UNet):
        return unet_rules(net.cfg.n_res)
    return autoencoder_rules(len(net.cfg.ch_mult))


# ---- the U-Net

def unet_rules(n_res: int) -> list[Rule]:
    """Return the rules of a U-Net with spatial transformers and convolutions that resample."""

    def down_layer(match: re.Match) -> str:
        level, i = divmod(int(match[1]) - 1, n_res + 1)
        part = {"0": f"resnets.{i}", "1": f"attentions.{i}", "0.op": "downsamplers.0.conv"}
        return f"down_blocks.{level}.{part[match[2]]}."

    def up_layer(match: re.Match) -> str:
        block, i = divmod(int(match[1]), n_res + 1)
        if match[2].endswith("conv"):
            return f"up_blocks.{block}.upsamplers.0.conv."
        part = {"0": "resnets", "1": "attentions"}
        return f"up_blocks.{block}.{part[match[2]]}.{i}."

    return [
        (r"^input_blocks\.0\.0\.", "conv_in."),
        (r"^input_blocks\.(\d+)\.(0\.op|\d)\.", down_layer),
        (r"^middle_block\.0\.", "mid_block.resnets.0."),
        (r"^middle_block\.1\.", "mid_block.attentions.0."),
        (r"^middle_block\.2\.", "mid_block.resnets.1."),
        (r"^output_blocks\.(\d+)\.(\d\.conv|\d)\.", up_layer),
        (r"\.in_layers\.0\.", ".norm1."),
        (r"\.in_layers\.2\.", ".conv1."),
        (r"\.emb_layers\.1\.", ".time_emb_proj."),
        (r"\.out_layers\.0\.", ".norm2."),
        (r"\.out_layers\.3\.", ".conv2."),
        (r"\.skip_connection\.", ".conv_shortcut."),
        (r"^time_embed\.0\.", "time_embedding.linear_1."),
        (r"^time_embed\.2\.", "time_embedding.linear_2."),
        (r"^out\.0\.", "conv_norm_out."),
        (r"^out\.2\.", "conv_out."),
    ]


# ---- config.json

def diffusers_config(cfg: AEConfig | UNetConfig) -> dict:
    """Return the config.json of a network: the class of diffusers, and its arguments."""
    widths = [cfg.ch * mult for mult in cfg.ch_mult]
    common = {
        "block_out_channels": widths,
        "layers_per_block": cfg.n_res,
        "norm_num_groups": cfg.groups,
        "sample_size": cfg.side,
    }
    if isinstance(cfg, UNetConfig):
        return common | unet_config(cfg, widths)

    levels = range(len(widths))
    down = ["AttnDownEncoderBlock2D" if cfg.attends(i) else "DownEncoderBlock2D" for i in levels]
    up = ["AttnUpDecoderBlock2D" if cfg.attends(i) else "UpDecoderBlock2D" for i in levels]
    config = common | {
        "in_channels": cfg.c_x,
        "out_channels": cfg.c_x,
        "latent_channels": cfg.c_e or cfg.c_z,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "mid_block_add_attention": cfg.attn_mid,
    }
    if cfg.n_codes is None:
        return config | {"_class_name": "AutoencoderKL"}
    codes = {"num_vq_embeddings": cfg.n_codes, "vq_embed_dim": cfg.c_z}
    return config | codes | {"_class_name": "VQModel"}


def unet_config(cfg: UNetConfig, widths: list[int]) -> dict:
    """Return what config.json has of a U-Net alone."""
    levels = range(len(widths))
    down = ["CrossAttnDownBlock2D" if cfg.attends(i) else "DownBlock2D" for i in levels]
    up = ["CrossAttnUpBlock2D" if cfg.attends(i) else "UpBlock2D" for i in reversed(levels)]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": cfg.c_in,
        "out_channels": cfg.c_out,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": cfg.d_ctx,
        "transformer_layers_per_block": cfg.depth,
        # NB: this argument is the number of heads, whatever its name says.
        "attention_head_dim": [cfg.n_head or width // cfg.d_head for width in widths],
        "resnet_time_scale_shift": "scale_shift" if cfg.scale_shift else "default",
    }
