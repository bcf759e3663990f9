"""The names in the official files: which of their tensors is which of ours.

Paper:   the released model zoo; latent-diffusion's openaimodel.py and model.py,
         x-transformers, taming-transformers' discriminator, transformers' CLIP.
Symbols: a rule is a pair (pattern, replacement) of re.sub; the rules of a network turn
         our key into the official one, applied one after the other.
"""
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from tinyldm.attention import SelfAttention2d
from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.conditioning import SpatialRescaler, TextTransformer
from tinyldm.patchgan import Discriminator
from tinyldm.unet import UNet

Rule = tuple[str, str | Callable[[re.Match], str]]

# What the keys of a network begin with in a file of a whole model. The averaged weights
# have the U-Net's names without dots.
UNET = "model.diffusion_model."
EMA = "model_ema.diffusion_model"
AE = "first_stage_model."
TAU = "cond_stage_model."

# What a file may hold that none of our networks needs.
IGNORED = re.compile(
    r"""
    betas | (\w+_)?alphas_cumprod(_prev)? | posterior_\w+ | lvlb_weights    # the schedule
    | logvar | scale_factor                         # of the whole model
    | model_ema\.(decay|num_updates)
    | (first_stage_model\.)?loss\..+                # stage one's losses, D_psi among them
    | (.*\.)?to_logits\.\w+                         # the output layer of the text encoder
    | (.*\.)?position_ids                           # the numbers 0..76 of CLIP's
    | (.*\.)?(logit_scale|text_projection(\.weight)?)   # how CLIP compares text and image
    | v_pred                                        # says what the U-Net predicts
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Source:
    """Where one tensor of ours comes from.

    keys: official tensors, to be joined in dimension 0.
    shape: that of each of them.
    n_head: if it is not 1, the rows of the official tensor are ordered (head, q|k|v),
        those of ours (q|k|v, head).
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    n_head: int = 1


def sources(net: nn.Module) -> dict[str, Source]:
    """Return the source of each tensor of a network; z_std is no weight and has none."""
    rules = rules_of(net)
    modules = dict(net.named_modules())
    found = {}
    for key, x in net.state_dict().items():
        if key == "z_std":
            continue
        name = renamed(key, rules)
        shape = tuple(x.shape)
        block = modules.get(key.rsplit(".", 2)[0])          # middle.1.qkv.weight -> middle.1
        is_attention = isinstance(block, SelfAttention2d)
        is_qkv = is_attention and ".qkv." in key

        if is_attention and isinstance(net, UNet):
            # The official U-Net has convolutions over one dimension here, N.
            n_head = block.n_head if is_qkv else 1
            found[key] = Source((name,), shape[:3], n_head)
        elif is_qkv:
            # The official E and D have a convolution for each of q, k and v.
            keys = tuple(name.replace("qkv", letter) for letter in "qkv")
            found[key] = Source(keys, (shape[0] // 3, *shape[1:]))
        else:
            found[key] = Source((name,), shape)
    return found


def renamed(key: str, rules: Sequence[Rule]) -> str:
    """Return what the rules make of a name, one after the other."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def rules_of(net: nn.Module) -> Sequence[Rule]:
    """Return the rules of a network; () where the names are the same."""
    if isinstance(net, UNet):
        return UNET_RULES
    if isinstance(net, Autoencoder):
        return autoencoder_rules(net.cfg)
    if isinstance(net, TextTransformer):
        return CLIP_RULES if net.cfg.clip else TEXT_RULES
    if isinstance(net, SpatialRescaler):
        return [(r"^conv", "channel_mapper")]
    if isinstance(net, Discriminator):
        return [(r"^layers", "main")]
    return ()


# ---- the U-Net: openaimodel.py

UNET_RULES = [
    # Stages.
    (r"^time\.", "time_embed."),
    (r"^down\.", "input_blocks."),
    (r"^middle\.", "middle_block."),
    (r"^up\.", "output_blocks."),
    (r"^norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    # Downsample.
    (r"^(input_blocks\.\d+\.0)\.conv\.", r"\1.op."),
    # ResBlock. The prefix keeps apart the norms of a TransformerBlock.
    (r"(_blocks?\.[\d.]+)norm1", r"\1in_layers.0"),
    (r"conv1", "in_layers.2"),
    (r"(_blocks?\.[\d.]+)norm2", r"\1out_layers.0"),
    (r"conv2", "out_layers.3"),
    (r"\.emb\.", ".emb_layers.1."),
    (r"\.skip\.", ".skip_connection."),
    # SpatialTransformer.
    (r"\.blocks\.", ".transformer_blocks."),
    (r"self_attn", "attn1"),
    (r"cross_attn", "attn2"),
    (r"to_out", "to_out.0"),
    (r"mlp\.proj", "ff.net.0.proj"),
    (r"mlp\.out", "ff.net.2"),
]


# ---- E and D: model.py

def autoencoder_rules(cfg: AEConfig) -> list[Rule]:
    """Return the rules of an autoencoder of this shape."""
    names = {"encoder": encoder_layer_names(cfg), "decoder": decoder_layer_names(cfg)}

    def layer_name(match: re.Match) -> str:
        part = match[1]
        layer = int(match[2])
        return f"{part}.{names[part][layer]}"

    return [
        (r"^(encoder|decoder)\.layers\.(\d+)", layer_name),
        (r"\.skip\.", ".nin_shortcut."),
        (r"^codebook\.codes", "quantize.embedding.weight"),
    ]


def encoder_layer_names(cfg: AEConfig) -> list[str]:
    """Return the official names of E's layers, in running order."""
    names = ["conv_in"]
    for level in range(len(cfg.ch_mult)):
        if level > 0:
            names.append(f"down.{level - 1}.downsample")
        names += level_layer_names(cfg, "down", level, cfg.n_res)
    return [*names, *middle_layer_names(cfg), *OUTPUT_LAYER_NAMES]


def decoder_layer_names(cfg: AEConfig) -> list[str]:
    """Return the official names of D's layers, in running order.

    up.0 is the level of full resolution, though D runs it last.
    """
    names = ["conv_in", *middle_layer_names(cfg)]
    for level in reversed(range(len(cfg.ch_mult))):
        names += level_layer_names(cfg, "up", level, cfg.n_res + 1)
        if level > 0:
            names.append(f"up.{level}.upsample")
    return [*names, *OUTPUT_LAYER_NAMES]


OUTPUT_LAYER_NAMES = ["norm_out", "(the SiLU has no tensors)", "conv_out"]


def middle_layer_names(cfg: AEConfig) -> list[str]:
    """Return the names of the layers at the lowest resolution."""
    if cfg.attn_mid:
        return ["mid.block_1", "mid.attn_1", "mid.block_2"]
    return ["mid.block_1", "mid.block_2"]


def level_layer_names(cfg: AEConfig, way: str, level: int, n_blocks: int) -> list[str]:
    """Return the names of a level's ResBlocks, and of the attention behind each."""
    names = []
    for i in range(n_blocks):
        names.append(f"{way}.{level}.block.{i}")
        if cfg.attends(level):
            names.append(f"{way}.{level}.attn.{i}")
    return names


# ---- text encoders: x-transformers, and CLIP's in transformers

def x_transformers_layer(match: re.Match) -> str:
    """Name a part of block i: attention is layer 2i, the MLP is layer 2i + 1.

    Each layer is a list of its norm, 0, and its network, 1.
    """
    i = int(match[1])
    part = match[2]
    layer = 2 * i + 1 if part in ("norm2", "mlp") else 2 * i
    item = 1 if part in ("attn", "mlp") else 0
    return f"attn_layers.layers.{layer}.{item}"


TEXT_RULES = [
    (r"^token\.", "token_emb."),
    (r"^position\.", "pos_emb.emb."),
    (r"mlp\.0", "mlp.net.0.0"),
    (r"mlp\.2", "mlp.net.2"),
    (r"^blocks\.(\d+)\.(norm1|attn|norm2|mlp)", x_transformers_layer),
    (r"^", "transformer."),
]

CLIP_RULES = [
    (r"^(token|position)\.", r"embeddings.\1_embedding."),
    (r"^norm\.", "final_layer_norm."),
    (r"^blocks\.", "encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"mlp\.0", "mlp.fc1"),
    (r"mlp\.2", "mlp.fc2"),
    (r"\.attn\.to_(\w+)\.", r".self_attn.\1_proj."),
    (r"^", "transformer.text_model."),
]
