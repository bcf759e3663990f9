"""presets.py: each row names flags that exist, and the paper's architectures have their sizes."""
import json
from pathlib import Path

import pytest
import torch

import train_ae
import train_ldm
from tinyldm import presets
from tinyldm.autoencoder import Autoencoder

CONFIGS = json.loads((Path(__file__).parent / "golden" / "params.json").read_text())["configs"]


@pytest.mark.parametrize("script,table", [(train_ae, presets.AE), (train_ldm, presets.LDM)])
def test_every_row_sets_flags_that_exist_and_leaves_none_open(script, table):
    for name, row in table.items():
        args = vars(script.parse_args(["--preset", name]))
        assert row.keys() <= args.keys(), name
        assert all(args[k] == v for k, v in row.items())
        open_flags = {k for k, v in args.items() if v is None}
        assert open_flags <= {"micro_batch", "vgg_weights"} | ({"data"} - {*row}), name


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
