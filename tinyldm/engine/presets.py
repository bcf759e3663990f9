"""Rows of defaults, one per model: `--preset NAME` sets them; a flag wins over its row.

Paper:   Table 8 (stage one); Tables 12-15 and 17 (stage two); the released configs.

A row is a dict. Its keys are flags of train_ae.py (the rows of AE) or train_ldm.py
(those of LDM), with underscores. `lr` is the learning rate as it is used, for the whole
batch. The rows that have `data` are this project's own: the toy is tuned for two CPU
cores, the emoji are meant for them, and emoji128 for a GPU. All others are the paper's.
"""
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from tinyldm.autoencoder import AEConfig, Pixels
from tinyldm.data.images import both_sides
from tinyldm.diffusion import DiffusionConfig
from tinyldm.engine.flags import config_values
from tinyldm.model import LatentDiffusion, ModelConfig, build_model
from tinyldm.tasks import TASKS
from tinyldm.unet import BACKBONES


def table(columns: Sequence[str], rows: dict[str, tuple]) -> dict[str, dict]:
    """Return {name: {column: value}} of rows {name: values}, written as a table."""
    return {name: dict(zip(columns, values, strict=True)) for name, values in rows.items()}


# ---- stage one

TOY_AE = {
    "data": "shapes", "size": 32,
    "ch": 16, "ch_mult": (1, 2, 4), "n_res": 1, "c_z": 4, "groups": 8,
    "pixel_loss": "l2", "perceptual": "random", "perceptual_weight": 0.03, "kl_weight": 5e-4,
    "disc_weight": 0.5, "disc_start": 360, "disc_ch": 16, "disc_layers": 2,
    "batch": 16, "lr": 4e-3, "muon": 0.02, "betas": (0.9, 0.95), "warmup": 50, "cosine": True,
    "steps": 400,
}

# Drawn pictures of 64 px on two CPU cores: the latents of f = 8 are as small as the toy's.
EMOJI_AE = TOY_AE | {
    "data": "emoji", "size": 64,
    "ch_mult": (1, 2, 4, 4), "c_z": 16,
    "perceptual": "none", "kl_weight": 1e-6, "disc_weight": 0.0,
    "batch": 8, "lr": 3e-3, "steps": 1500,
    "out": Path("out/emoji-ae"),
}

# The bundled model's, of about two hours in both stages, without Muon.
EMOJI_LONG_AE = EMOJI_AE | {"muon": 0.0, "steps": 5500, "out": Path("out/emoji-long-ae")}

# Not measured: it is for a GPU. `python -m tinyldm.data.emoji out/emoji128.zip --size 128` draws
# the set.
EMOJI128_AE = EMOJI_AE | {
    "data": "out/emoji128.zip", "size": 128,
    "ch": 64, "n_res": 2, "groups": 32,
    "perceptual": "vgg16", "perceptual_weight": 1.0,
    "disc_weight": 0.5, "disc_start": 20_000, "disc_ch": 64, "disc_layers": 3,
    "batch": 32, "lr": 2e-4, "muon": 0.0, "warmup": 500, "steps": 60_000,
    "out": Path("out/emoji128-ae"),
}

# Table 8. Batch and lr are the released configs': the batch of one GPU, lr = 4.5e-6
# batch. The steps are the released checkpoints'.
TABLE_8 = {
    "size": 256, "ch": 128, "n_res": 2, "groups": 32,
    "pixel_loss": "l1", "perceptual": "vgg16", "perceptual_weight": 1.0, "disc_ch": 64,
    "betas": (0.5, 0.9), "warmup": 0, "cosine": False, "clip": math.inf,
}
KL = TABLE_8 | {
    "reg": "kl", "kl_weight": 1e-6, "disc_weight": 0.5, "disc_start": 50001, "disc_layers": 3,
}
VQ = TABLE_8 | {
    "reg": "vq", "codebook_weight": 1.0, "vq_beta": 0.25, "vq_beta_on": "codebook",
}

KL_ROWS = table(
    ("ch_mult", "attn_res", "c_z", "batch", "lr", "steps"),
    {
        #              ch_mult             attn_res  c_z  batch  lr      steps
        "kl-f4":      ((1, 2, 4),          (),       3,   10,    4.5e-5, 176991),
        "kl-f8":      ((1, 2, 4, 4),       (),       4,   4,     1.8e-5, 246803),
        "kl-f16":     ((1, 1, 2, 2, 4),    (16,),    16,  6,     2.7e-5, 442998),
        "kl-f32":     ((1, 1, 2, 2, 4, 4), (16, 8),  64,  6,     2.7e-5, 406763),
        # Not released: f and c_z are Table 8's, the rest is the nearest released row's.
        "kl-f2":      ((1, 2),             (),       2,   10,    4.5e-5, 176991),
        "kl-f16-c8":  ((1, 1, 2, 2, 4),    (16,),    8,   6,     2.7e-5, 442998),
        "kl-f32-c16": ((1, 1, 2, 2, 4, 4), (16, 8),  16,  6,     2.7e-5, 406763),
    },
)

VQ_ROWS = table(
    ("ch_mult", "attn_res", "c_z", "n_codes", "batch", "lr", "steps"),
    {
        #                ch_mult             attn_res  c_z  n_codes  batch  lr      steps
        "vq-f4":        ((1, 2, 4),          (),       3,   8192,    8,     3.6e-5, 533066),
        "vq-f4-noattn": ((1, 2, 4),          (),       3,   8192,    8,     3.6e-5, 658131),
        "vq-f8":        ((1, 2, 2, 4),       (32,),    4,   16384,   10,    4.5e-5, 971043),
        "vq-f8-n256":   ((1, 2, 2, 4),       (32,),    4,   256,     10,    4.5e-5, 1608649),
        "vq-f16":       ((1, 1, 2, 2, 4),    (16,),    8,   16384,   14,    6.3e-5, 1101166),
        # Not released: f, c_z and n_codes are Table 8's, the rest is the nearest released row's.
        "vq-f2":        ((1, 2),             (),       2,   2048,    8,     3.6e-5, 533066),
        "vq-f2-n64":    ((1, 2),             (),       2,   64,      8,     3.6e-5, 533066),
        "vq-f4-n256":   ((1, 2, 4),          (),       3,   256,     8,     3.6e-5, 533066),
        "vq-f32":       ((1, 1, 2, 2, 4, 4), (16, 8),  16,  16384,   14,    6.3e-5, 1101166),
    },
)

# NB: the first steps with D_psi of vq-f4, vq-f4-noattn and vq-f8 are probably those of
# runs that were resumed. To train one of them from nothing, take 250001.
VQ_DISCRIMINATORS = table(
    ("disc_weight", "disc_start", "disc_layers"),
    {
        #                disc_weight  disc_start  disc_layers
        "vq-f4":        (0.75,        0,          3),
        "vq-f4-noattn": (0.75,        11,         3),
        "vq-f8":        (0.60,        1,          2),
        "vq-f8-n256":   (0.75,        250001,     3),
        "vq-f16":       (0.75,        250001,     2),
        "vq-f2":        (0.75,        250001,     3),
        "vq-f2-n64":    (0.75,        250001,     3),
        "vq-f4-n256":   (0.75,        250001,     3),
        "vq-f32":       (0.75,        250001,     2),
    },
)

AE = {
    "toy": TOY_AE,
    "emoji": EMOJI_AE,
    "emoji-long": EMOJI_LONG_AE,
    "emoji128": EMOJI128_AE,
}
AE |= {name: KL | row for name, row in KL_ROWS.items()}
AE |= {name: VQ | row | VQ_DISCRIMINATORS[name] for name, row in VQ_ROWS.items()}
AE["vq-f4-noattn"]["attn_mid"] = False


# ---- stage two

TOY_LDM = {
    "data": "shapes", "ae_preset": "toy", "size": 32,
    "ch": 48, "ch_mult": (1, 2), "n_res": 1, "attn_res": (8, 4), "d_head": 16, "depth": 1,
    "groups": 8,
    "d_ctx": 128, "text_depth": 2, "text_heads": 8, "text_d_head": 16, "n_token": 12,
    "schedule": "sqrt-linear", "predict": "v", "snr_clamp": (0.1, 1.0),
    "batch": 64, "lr": 2e-3, "muon": 0.02, "betas": (0.9, 0.99), "warmup": 100, "cosine": True,
    "ema": 0.99, "steps": 1000,
}

# Stage two has no held-out names: a model cannot know a word that no caption of training has.
EMOJI_LDM = TOY_LDM | {
    "data": "emoji", "ae_preset": "emoji", "size": 64, "hold_out": False,
    "n_token": 20,
    "ae": Path("out/emoji-ae/ckpt.pt"), "out": Path("out/emoji"), "steps": 2500,
}

EMOJI_LONG_LDM = EMOJI_LDM | {
    "ae_preset": "emoji-long", "muon": 0.0, "steps": 6000,
    "ae": Path("out/emoji-long-ae/ckpt.pt"), "out": Path("out/emoji-long"),
}

# Flow matching in place of diffusion (beyond/flow.py).
FLOW = {
    "schedule": "straight", "predict": "flow", "loss_of": "output", "draw_t": "logit-normal",
    "snr_clamp": (0.0, math.inf),
}

EMOJI128_LDM = EMOJI_LDM | {
    "data": "out/emoji128.zip", "ae_preset": "emoji128", "size": 128,
    "ch": 192, "ch_mult": (1, 2, 3), "n_res": 2, "attn_res": (16, 8, 4), "d_head": 32,
    "groups": 32,
    "d_ctx": 512, "text_depth": 6, "text_heads": 8, "text_d_head": 64,
    "batch": 256, "lr": 3e-4, "muon": 0.0, "warmup": 1000, "ema": 0.999, "steps": 60_000,
    "ae": Path("out/emoji128-ae/ckpt.pt"), "out": Path("out/emoji128"),
}

# What the paper's models have in common, unless their own rows say otherwise.
PAPER = {
    "task": "uncond", "size": 256,
    "n_res": 2, "groups": 32, "scale_shift": False, "res_updown": False, "depth": 1,
    "d_ctx": None, "n_classes": None,
    "schedule": "sqrt-linear", "T": 1000, "predict": "eps", "snr_clamp": (0.0, math.inf),
    "p_drop": 0.0, "z_std": 1.0,
    "betas": (0.9, 0.999), "warmup": 0, "cosine": False, "clip": math.inf, "ema": 0.9999,
}

# Tables 12, 13 and 15, and the released configs. n_head None: heads are 32 wide.
UNET_ROWS = table(
    ("ae_preset", "ch", "ch_mult", "attn_res", "n_head"),
    {
        #                  ae_preset       ch   ch_mult          attn_res        n_head
        "celebahq256":    ("vq-f4",        224, (1, 2, 3, 4),    (32, 16, 8),    None),
        "ffhq256":        ("vq-f4",        224, (1, 2, 3, 4),    (32, 16, 8),    None),
        "bedrooms256":    ("vq-f4",        224, (1, 2, 3, 4),    (32, 16, 8),    None),
        "churches256":    ("kl-f8",        192, (1, 2, 2, 4, 4), (32, 16, 8, 4), 8),
        "imagenet256-f8": ("vq-f8",        256, (1, 2, 4),       (32, 16, 8),    None),
        "imagenet256":    ("vq-f4",        192, (1, 2, 3, 5),    (32, 16, 8),    1),
        "text2img256":    ("vq-f4",        192, (1, 2, 3, 5),    (32, 16, 8),    None),
        "text2img":       ("kl-f8",        320, (1, 2, 4, 4),    (32, 16, 8),    8),
        "sd-v1":          ("kl-f8",        320, (1, 2, 4, 4),    (64, 32, 16),   8),
        "sd-v1-inpaint":  ("kl-f8",        320, (1, 2, 4, 4),    (64, 32, 16),   8),
        "layout256":      ("vq-f4",        128, (1, 2, 3, 4),    (32, 16, 8),    None),
        "semantic256":    ("vq-f4",        128, (1, 4, 8),       (),             8),
        "semantic512":    ("vq-f4",        128, (1, 4, 8),       (),             8),
        "superres256":    ("vq-f4",        160, (1, 2, 2, 4),    (8,),           None),
        "inpaint256":     ("vq-f4-noattn", 256, (1, 2, 3, 4),    (32, 16, 8),    8),
    },
)

# The loss and the ends of beta are the released configs'. The steps of text2img256 and
# of semantic512 are stated nowhere, so they are those of the nearest row.
# NB: Table 15 prints 1.0e-6 as the learning rate of inpainting. That is the rate per
# image, which all released configs multiply by the batch.
# NB: sd-v1-inpaint's steps are those after 595,000 of sd-v1's training; its batch is
# stated nowhere, so it is sd-v1's. In a quarter of its training masks all is hidden.
TRAINING_ROWS = table(
    ("loss", "beta_range", "batch", "lr", "steps"),
    {
        #                  loss  beta_range         batch  lr       steps
        "celebahq256":    ("l2", (0.0015, 0.0195),  48,    9.6e-5,  410_000),
        "ffhq256":        ("l2", (0.0015, 0.0195),  42,    8.4e-5,  635_000),
        "bedrooms256":    ("l2", (0.0015, 0.0195),  48,    9.6e-5,  1_900_000),
        "churches256":    ("l1", (0.0015, 0.0155),  96,    5.0e-5,  500_000),
        "imagenet256-f8": ("l2", (0.0015, 0.0195),  64,    6.4e-5,  4_800_000),
        "imagenet256":    ("l2", (0.0015, 0.0195),  1200,  1.0e-4,  178_000),
        "text2img256":    ("l2", (0.0015, 0.0195),  28,    5.6e-5,  390_000),
        "text2img":       ("l2", (0.00085, 0.012),  680,   1.0e-4,  390_000),
        "sd-v1":          ("l2", (0.00085, 0.012),  2048,  1.0e-4,  225_000),
        "sd-v1-inpaint":  ("l2", (0.00085, 0.012),  2048,  7.5e-5,  440_000),
        "layout256":      ("l1", (0.0015, 0.0205),  24,    4.8e-5,  4_400_000),
        "semantic256":    ("l1", (0.0015, 0.0205),  48,    4.8e-5,  360_000),
        "semantic512":    ("l1", (0.0015, 0.0205),  8,     8.0e-6,  360_000),
        "superres256":    ("l2", (0.0015, 0.0155),  64,    6.4e-5,  860_000),
        "inpaint256":     ("l1", (0.0015, 0.0205),  128,   1.28e-4, 360_000),
    },
)

# The conditions: Tables 15 and 17.
CLASS_F8 = {"task": "class", "n_classes": 1000, "d_ctx": 512}
BERT = {
    "task": "text", "vocab_size": 30522, "n_token": 77,
    "text_depth": 32, "text_heads": 8, "text_d_head": 64, "text_clip": False, "p_drop": 0.1,
}
CLIP = BERT | {
    "vocab_size": 49408, "d_ctx": 768,
    "text_depth": 12, "text_heads": 12, "text_clip": True,
}
BOXES = BERT | {
    "task": "layout", "vocab_size": 8192, "n_token": 92, "d_ctx": 512, "text_depth": 16,
    "p_drop": 0.0,
}
LABEL_MAPS = {"task": "semantic", "n_classes": 182}
KL_F8_STD = 1 / 0.18215             # the released configs' scale_factor is 0.18215

# All else that a row does not have in common with PAPER.
OTHER_VALUES = {
    "churches256": {"scale_shift": True, "res_updown": True, "warmup": 10_000, "z_std": None},
    "imagenet256-f8": CLASS_F8,
    "imagenet256": {"task": "class", "n_classes": 1001, "d_ctx": 512, "p_drop": 0.1},
    "text2img256": BERT | {"d_ctx": 640},
    "text2img": BERT | {"d_ctx": 1280, "z_std": KL_F8_STD},
    "sd-v1": CLIP | {"size": 512, "z_std": KL_F8_STD, "warmup": 10_000},
    "sd-v1-inpaint": CLIP | {
        "task": "text-inpaint", "size": 512, "z_std": KL_F8_STD, "warmup": 2_500,
    },
    "layout256": BOXES | {"depth": 3},
    "semantic256": LABEL_MAPS,
    "semantic512": LABEL_MAPS | {"size": 512},
    "superres256": {"task": "superres"},
    "inpaint256": {"task": "inpaint", "res_updown": True},
}

# The sweep over f: Table 13 (ImageNet) and Table 14 (CelebA-HQ). f = 1 diffuses pixels.
# NB: at f = 32 these tables have 32 latent channels, but Table 8's VQ model has 16; so
# has ours.
SWEEP_UNETS = table(
    ("ae_preset", "ch", "ch_mult", "attn_res"),
    {
        #        ae_preset  ch   ch_mult             attn_res
        "f1":  ("none",     192, (1, 1, 2, 2, 4, 4), (32, 16, 8)),
        "f2":  ("vq-f2",    192, (1, 2, 2, 4, 4),    (32, 16, 8)),
        "f4":  ("vq-f4",    192, (1, 2, 3, 5),       (32, 16, 8)),
        "f8":  ("vq-f8",    256, (1, 2, 4),          (32, 16, 8)),
        "f16": ("vq-f16",   256, (1, 2, 4),          (16, 8, 4)),
        "f32": ("vq-f32",   256, (1, 2, 4),          (8, 4, 2)),
    },
)
SWEEP_IMAGENET = table(
    ("batch", "lr"),
    {
        "f1": (7, 4.9e-5), "f2": (9, 6.3e-5), "f4": (40, 8.0e-5),
        "f8": (64, 6.4e-5), "f16": (112, 4.5e-5), "f32": (112, 4.5e-5),
    },
)
SWEEP_CELEBA = table(
    ("batch", "lr"),
    {
        "f1": (9, 9.0e-5), "f2": (11, 1.1e-4), "f4": (48, 9.6e-5),
        "f8": (96, 9.6e-5), "f16": (128, 1.3e-4), "f32": (128, 1.3e-4),
    },
)
SWEEP = PAPER | {"loss": "l2", "beta_range": (0.0015, 0.0195), "d_head": 32, "n_head": None}


def paper_row(name: str) -> dict:
    """Return the complete row of one of UNET_ROWS."""
    unet = UNET_ROWS[name]
    d_head = 32 if unet["n_head"] is None else None
    row = PAPER | unet | {"d_head": d_head} | TRAINING_ROWS[name]
    return row | OTHER_VALUES.get(name, {})


def sweep_rows() -> dict[str, dict]:
    """Return the complete rows of the sweep over f."""
    rows = {}
    for f, unet in SWEEP_UNETS.items():
        imagenet = SWEEP_IMAGENET[f] | CLASS_F8 | {"steps": 2_000_000}
        celeba = SWEEP_CELEBA[f] | {"steps": 500_000}
        rows[f"imagenet-{f}"] = SWEEP | unet | imagenet
        rows[f"celeba-{f}"] = SWEEP | unet | celeba
    rows["celeba-f4"] |= {"ch": 224, "ch_mult": (1, 2, 3, 4)}
    return rows


LDM = {
    "toy": TOY_LDM,
    "toy-flow": TOY_LDM | FLOW,
    "emoji": EMOJI_LDM,
    "emoji-long": EMOJI_LONG_LDM,
    "emoji128": EMOJI128_LDM,
}
LDM |= {name: paper_row(name) for name in UNET_ROWS}
LDM |= sweep_rows()


# ---- from a row to a model

def ae_config(name: str, c_x: int = 3) -> AEConfig:
    """Return the shape of stage one of a row of AE, for images of c_x channels.

    "none" stands for Pixels.
    """
    if name == "none":
        return Pixels(c_x).cfg
    row = AE[name]
    fields = {field.name for field in dataclasses.fields(AEConfig)}
    shape = {key: value for key, value in row.items() if key in fields}
    return AEConfig(c_x=c_x, side=row["size"], **shape)


def model_config(
    row: dict,
    ae: AEConfig,
    class_names: Sequence[str] = (),
    tokenizer: str | None = None,
) -> ModelConfig:
    """Return what a model of these hyperparameters, and of this stage one, is made of.

    row: a row of LDM, or the flags of train_ldm.py. tokenizer: its JSON.
    """
    task = TASKS[row["task"]]
    size = both_sides(row["size"])
    backbone = row.get("backbone", "unet")
    shape = BACKBONES[backbone].config
    unet = config_values(shape, row)
    if not task.attends:
        unet["d_ctx"] = None
    unet_config = shape(
        c_in=ae.c_z + task.beside_channels(ae.c_z, ae.c_x),
        c_out=ae.c_z,
        side=min(size) // ae.f,
        **unet,
    )
    return ModelConfig(
        task=row["task"],
        size=size,
        autoencoder=ae,
        unet=unet_config,
        tau=task.tau_shape(row, ae.f),
        diffusion=DiffusionConfig(**config_values(DiffusionConfig, row)),
        class_names=tuple(class_names),
        tokenizer=tokenizer,
        p_drop=row["p_drop"],
        backbone=backbone,
    )


def config_of(row: dict) -> ModelConfig:
    """Return what the model of a row is made of."""
    return model_config(row, ae_config(row["ae_preset"], row.get("channels") or 3))


def build_networks(row: dict) -> LatentDiffusion:
    """Build the model of a row on the meta device: shapes without memory or weights."""
    with torch.device("meta"):
        return build_model(config_of(row))
