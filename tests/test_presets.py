"""Presets: each row names flags that exist, and the paper's architectures have their sizes."""
import json
from pathlib import Path

import pytest
import torch

import train_ae
import train_ldm
from tinyldm.attention import SelfAttention2d, SpatialTransformer
from tinyldm.autoencoder import Autoencoder
from tinyldm.data.images import both_sides
from tinyldm.engine import presets
from tinyldm.engine.flags import n_params

# What the official configs say, and the sizes of their networks.
PARAMS = Path(__file__).parent / "golden" / "params.json"
CONFIGS = json.loads(PARAMS.read_text())["configs"]


# ---- flags

# Flags that a row may leave open: None is a value that has a meaning, or the data set decides.
OPTIONAL = {
    "micro_batch", "vgg_weights", "inception", "n_head", "d_head", "z_std", "d_ctx",
    "n_classes", "n_codes", "vocab_size", "channels",
    "degrade", "small", "init", "vocab", "lora", "distill",
    "prior", "prior_weight",
}
ROWS = [(train_ae, presets.AE, name) for name in presets.AE]
ROWS += [(train_ldm, presets.LDM, name) for name in presets.LDM]


@pytest.mark.parametrize("script, table, name", ROWS, ids=lambda value: str(value)[:20])
def test_a_row_sets_flags_that_exist_and_leaves_none_open(script, table, name):
    """A misspelt key would be ignored, a missing one would be None in training."""
    row = table[name]
    args = vars(script.parse_args(["--preset", name]))
    assert row.keys() - {"T"} <= args.keys()
    for key, value in row.items():
        assert args[key] == (both_sides(value) if key == "size" else value)

    left_open = {key for key, value in args.items() if value is None}
    allowed = set(OPTIONAL)
    if "data" not in row:
        allowed.add("data")
    assert left_open <= allowed


def test_a_given_flag_wins_over_its_row():
    """--preset sets defaults, no more."""
    args = train_ldm.parse_args(["--preset", "sd-v1", "--ch", "7", "--size", "64"])
    assert (args.ch, args.size, args.ae_preset) == (7, (64, 64), "kl-f8")


# ---- stage one

# name: c and |Z|, as printed in Table 8
TABLE_8 = {
    "kl-f2": (2, None),
    "kl-f4": (3, None),
    "kl-f8": (4, None),
    "kl-f16": (16, None),
    "kl-f16-c8": (8, None),
    "kl-f32": (64, None),
    "kl-f32-c16": (16, None),
    "vq-f2": (2, 2048),
    "vq-f2-n64": (2, 64),
    "vq-f4": (3, 8192),
    "vq-f4-noattn": (3, 8192),
    "vq-f4-n256": (3, 256),
    "vq-f8": (4, 16384),
    "vq-f8-n256": (4, 256),
    "vq-f16": (8, 16384),
    "vq-f32": (16, 16384),
}


@pytest.mark.parametrize("name", [name for name, row in presets.AE.items() if "data" not in row])
def test_table_8_rows(name):
    """f, c and |Z| are those of the table; the rest is common to all released models."""
    args = train_ae.parse_args(["--preset", name])
    cfg = train_ae.autoencoder_config(args)

    assert (cfg.c_z, cfg.n_codes) == TABLE_8[name]
    assert f"-f{cfg.f}" in name
    assert args.lr == pytest.approx(4.5e-6 * args.batch)
    assert args.betas == (0.5, 0.9)
    assert args.pixel_loss == "l1"
    assert args.clip == float("inf")
    assert not args.cosine


RELEASED_AE = [path for path in CONFIGS if path.startswith("models/first_stage_models")]


@pytest.mark.parametrize("path", RELEASED_AE)
def test_released_autoencoders_have_the_official_sizes_and_settings(path):
    """Parameters of each part exactly; batch, learning rate and the weights of the losses."""
    args = train_ae.parse_args(["--preset", path.split("/")[2]])
    official = CONFIGS[path]

    with torch.device("meta"):
        ae = Autoencoder(train_ae.autoencoder_config(args))
    counts = {"codebook": 0}
    counts |= {name: n_params(part) for name, part in ae.named_children()}
    counts["total"] = sum(counts.values())
    assert counts == official["first_stage"]["param_counts"]

    batch = official["batch_size"]
    assert args.batch == batch
    assert args.lr == pytest.approx(official["base_learning_rate"] * batch)

    loss = official["loss"]["params_resolved"]
    assert args.disc_layers == loss["disc_num_layers"]
    regularisation = "kl_weight" if args.reg == "kl" else "codebook_weight"
    for name in ("disc_start", "disc_weight", "disc_loss", "perceptual_weight", regularisation):
        assert getattr(args, name) == loss[name], name


# ---- stage two

# row: the official config whose numbers it must have
RELEASED = {
    "celebahq256": "models/ldm/celeba256/config.yaml",
    "ffhq256": "models/ldm/ffhq256/config.yaml",
    "bedrooms256": "models/ldm/lsun_beds256/config.yaml",
    "churches256": "models/ldm/lsun_churches256/config.yaml",
    "imagenet256-f8": "models/ldm/cin256/config.yaml",
    "imagenet256": "configs/latent-diffusion/cin256-v2.yaml",
    "text2img256": "models/ldm/text2img256/config.yaml",
    "text2img": "configs/latent-diffusion/txt2img-1p4B-eval.yaml",
    "sd-v1": "stable-diffusion:configs/stable-diffusion/v1-inference.yaml",
    "layout256": "models/ldm/layout2img-openimages256/config.yaml",
    "semantic256": "models/ldm/semantic_synthesis256/config.yaml",
    "semantic512": "models/ldm/semantic_synthesis512/config.yaml",
    "superres256": "models/ldm/bsr_sr/config.yaml",
    "inpaint256": "models/ldm/inpainting_big/config.yaml",
}


@pytest.fixture(scope="module")
def networks():
    """networks(name) -> the model of a row on the meta device, built once."""
    built = {}

    def get(name):
        if name not in built:
            built[name] = presets.build_networks(presets.LDM[name])
        return built[name]

    return get


def heads(unet):
    """Return what params.json has of each attention: its kind, width and number of heads."""
    rows = []
    for module in unet.modules():
        if isinstance(module, SpatialTransformer):
            n_head = module.blocks[0].self_attn.n_head
            rows.append(("SpatialTransformer", module.norm.num_channels, n_head))
        elif isinstance(module, SelfAttention2d):
            rows.append(("AttentionBlock", module.norm.num_channels, module.n_head))
    return rows


@pytest.mark.parametrize("name", RELEASED)
def test_released_diffusion_models_have_the_official_sizes(name, networks):
    """Parameters of each network and the heads of each attention, exactly."""
    model = networks(name)
    official = CONFIGS[RELEASED[name]]

    counts = official["param_counts"]
    assert n_params(model.unet) == counts["unet"]
    assert n_params(model.ae) == counts["first_stage"]

    tau = official["cond_stage"]["param_counts"]
    if name == "inpaint256":
        assert model.tau is None                    # its tau is stage one itself
        assert tau["extra"] == 0
    else:
        assert n_params(model.tau) == tau.get("total_without_to_logits", tau["total"])

    attentions = [tuple(row[1:4]) for row in official["unet"]["attention"]["rows"]]
    assert sorted(heads(model.unet)) == sorted(attentions)


@pytest.mark.parametrize("name", RELEASED)
def test_released_diffusion_models_have_the_official_settings(name):
    """Schedule, loss, scale of the latents, learning rate."""
    row = presets.LDM[name]
    official = CONFIGS[RELEASED[name]]

    diffusion = official["diffusion"]
    assert row["beta_range"] == (diffusion["linear_start"], diffusion["linear_end"])
    assert row["loss"] == diffusion["loss_type"]
    z_std = None if diffusion["scale_by_std"] else 1 / diffusion["scale_factor"]
    assert row["z_std"] == z_std

    # The official code multiplies by the batch, but for churches and where Table 15 says so.
    scaled = official["base_learning_rate"] * row["batch"]
    assert row["lr"] in (pytest.approx(scaled), 5e-5, 1e-4)


def test_the_inpainting_model_of_stable_diffusion_differs_in_what_it_sees_and_how_it_trained(
    networks
):
    """Five channels more beside z_t: a mask, and the latents of the masked image."""
    model = networks("sd-v1-inpaint")
    assert model.unet.cfg.c_in == 9
    assert n_params(model.unet) == 859_535_364
    for name in ("tau", "ae"):
        assert n_params(getattr(model, name)) == n_params(getattr(networks("sd-v1"), name))

    row = presets.LDM["sd-v1-inpaint"]
    changed = {name for name, value in presets.LDM["sd-v1"].items() if row[name] != value}
    assert changed == {"task", "lr", "steps", "warmup"}


# Millions of parameters as printed in Tables 13 and 14, by f; ImageNet's f = 4 is the released
# model's 401 M.
SWEEP = {
    "imagenet": {1: 397, 2: 391, 4: 401, 8: 395, 16: 395, 32: 395},
    "celeba": {1: 270, 2: 265, 4: 274, 8: 258, 16: 258, 32: 258},
}


@pytest.mark.parametrize("f", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("data", SWEEP)
def test_f_sweep_has_the_sizes_of_tables_13_and_14(data, f, networks):
    """All models of the sweep are about as large, on latents of 256 / f."""
    unet = networks(f"{data}-f{f}").unet
    assert round(n_params(unet) / 1e6) == SWEEP[data][f]
    assert unet.cfg.side == 256 // f


def test_dry_run_prints_a_rows_sizes(cli):
    """Without a data set, and in no time: nothing is allocated."""
    output = cli("train_ldm.py", "--preset", "sd-v1", "--dry-run")
    assert "U-Net 859,520,964 | tau 123,060,480 | autoencoder kl-f8 83,653,863" in output

    output = cli("train_ldm.py", "--preset", "imagenet-f1", "--dry-run")
    assert "autoencoder none 0" in output
