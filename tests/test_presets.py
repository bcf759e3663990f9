"""presets.py: each row names flags that exist, and the paper's architectures have their sizes."""
import json
from pathlib import Path

import pytest
import torch

import train_ae
import train_ldm
from tinyldm import presets
from tinyldm.attention import SelfAttention2d, SpatialTransformer
from tinyldm.autoencoder import Autoencoder

CONFIGS = json.loads((Path(__file__).parent / "golden" / "params.json").read_text())["configs"]


@pytest.mark.parametrize("script,table", [(train_ae, presets.AE), (train_ldm, presets.LDM)])
def test_every_row_sets_flags_that_exist_and_leaves_none_open(script, table):
    for name, row in table.items():
        args = vars(script.parse_args(["--preset", name]))
        assert row.keys() <= args.keys(), name
        assert all(args[k] == v for k, v in row.items())
        open_flags = {k for k, v in args.items() if v is None}
        optional = {"micro_batch", "vgg_weights", "n_head", "d_head", "z_std", "d_ctx", "n_classes",
                    "vocab_size", "inception"}
        if row.get("task") not in (None, "text", "layout"):
            optional |= {"text_depth", "text_heads", "text_d_head", "n_token"}
        assert open_flags <= optional | ({"data"} - {*row}), name


TABLE_8 = {        # name: c, |Z| as printed there
    "kl-f2": (2, None), "kl-f4": (3, None), "kl-f8": (4, None), "kl-f16": (16, None),
    "kl-f16-c8": (8, None), "kl-f32": (64, None), "kl-f32-c16": (16, None),
    "vq-f2": (2, 2048), "vq-f2-n64": (2, 64), "vq-f4": (3, 8192), "vq-f4-noattn": (3, 8192),
    "vq-f4-n256": (3, 256), "vq-f8": (4, 16384), "vq-f8-n256": (4, 256), "vq-f16": (8, 16384),
    "vq-f32": (16, 16384)}


@pytest.mark.parametrize("name", [n for n in presets.AE if n != "toy"])
def test_table_8_rows(name):
    args = train_ae.parse_args(["--preset", name])
    cfg = train_ae.configure(args)
    assert (cfg.c_z, cfg.n_codes) == TABLE_8[name] and f"-f{cfg.f}" in name
    assert args.lr == pytest.approx(4.5e-6 * args.batch) and args.betas == (0.5, 0.9)
    assert args.pixel_loss == "l1" and args.clip == float("inf") and not args.cosine


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.startswith("models/first_stage_models")])
def test_released_autoencoders_have_the_official_sizes_and_settings(path):
    """Parameters of each part exactly; batch, learning rate and the weights of the losses."""
    args, c = train_ae.parse_args(["--preset", path.split("/")[2]]), CONFIGS[path]
    with torch.device("meta"):
        ae = Autoencoder(train_ae.configure(args))
    n = {k: sum(p.numel() for p in m.parameters()) for k, m in ae.named_children()}
    assert {"codebook": 0} | n | {"total": sum(n.values())} == c["first_stage"]["param_counts"]
    assert args.batch == c["batch_size"]
    assert args.lr == pytest.approx(c["base_learning_rate"] * c["batch_size"])
    loss = c["loss"]["params_resolved"]
    assert args.disc_layers == loss["disc_num_layers"]
    for k in ("disc_start", "disc_weight", "disc_loss", "perceptual_weight",
              "kl_weight" if args.reg == "kl" else "codebook_weight"):
        assert getattr(args, k) == loss[k], k


RELEASED = {       # row: the config whose numbers it must have
    "celebahq256": "models/ldm/celeba256", "ffhq256": "models/ldm/ffhq256",
    "bedrooms256": "models/ldm/lsun_beds256", "churches256": "models/ldm/lsun_churches256",
    "imagenet256-f8": "models/ldm/cin256", "text2img256": "models/ldm/text2img256",
    "imagenet256": "configs/latent-diffusion/cin256-v2.yaml",
    "text2img": "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "sd-v1": "stable-diffusion:configs/stable-diffusion/v1-inference.yaml",
    "layout256": "models/ldm/layout2img-openimages256", "superres256": "models/ldm/bsr_sr",
    "semantic256": "models/ldm/semantic_synthesis256", "inpaint256": "models/ldm/inpainting_big",
    "semantic512": "models/ldm/semantic_synthesis512"}


def size(net):
    return sum(p.numel() for p in net.parameters()) if net else 0


def heads(unet):
    """What params.json has under unet.attention.rows, in the order of the layers."""
    for m in unet.modules():
        if isinstance(m, SpatialTransformer):
            yield ["SpatialTransformer", m.norm.num_channels, m.blocks[0].self_attn.n_head]
        elif isinstance(m, SelfAttention2d):
            yield ["AttentionBlock", m.norm.num_channels, m.n_head]


@pytest.mark.parametrize("name", RELEASED)
def test_released_diffusion_models_have_the_official_sizes_and_settings(name):
    """Parameters of each network and the heads of each attention, exactly; loss, schedule, lr."""
    row = presets.LDM[name]
    c = CONFIGS.get(RELEASED[name]) or CONFIGS[RELEASED[name] + "/config.yaml"]
    ae, unet, tau = presets.networks(row)
    n = c["param_counts"]
    assert (size(unet), size(ae)) == (n["unet"], n["first_stage"])
    cond = c["cond_stage"]["param_counts"]
    if name == "inpaint256":
        assert tau is None and cond["extra"] == 0               # its encoder is stage one itself
    else:
        assert size(tau) == cond.get("total_without_to_logits", cond["total"])
    rows = {tuple(r[1:4]) for r in c["unet"]["attention"]["rows"]}
    assert {tuple(r) for r in heads(unet)} == rows
    assert len(list(heads(unet))) == len(c["unet"]["attention"]["rows"])
    d = c["diffusion"]
    assert row["beta_range"] == (d["linear_start"], d["linear_end"])
    assert row["loss"] == d["loss_type"]
    assert row["z_std"] == (None if d["scale_by_std"] else 1 / d["scale_factor"])
    scaled = c["base_learning_rate"] * row["batch"]             # the code's --scale_lr
    assert row["lr"] in (pytest.approx(scaled), 5e-5, 1e-4)     # churches, and Table 15's own


def test_f_sweep_has_the_sizes_of_tables_13_and_14():
    """Millions of parameters as printed; but our f = 4 of ImageNet is the released one, 401 M."""
    for name, want in (("imagenet", (397, 391, 401, 395, 395, 395)),
                       ("celeba", (270, 265, 274, 258, 258, 258))):
        for f, m in zip((1, 2, 4, 8, 16, 32), want):
            _, unet, _ = presets.networks(presets.LDM[f"{name}-f{f}"])
            assert round(size(unet) / 1e6) == m and unet.cfg.side == 256 // f, (name, f)


def test_dry_run_prints_a_rows_sizes(cli):
    said = cli("train_ldm.py", "--preset", "sd-v1", "--dry-run")
    assert "U-Net 859,520,964 | tau 123,060,480 | autoencoder kl-f8 83,653,863" in said
    said = cli("train_ldm.py", "--preset", "imagenet-f1", "--dry-run")
    assert "autoencoder none 0" in said
