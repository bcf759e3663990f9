"""What training the paper's models costs: the table in tinyldm/engine/README.md.

    python tests/costs.py

torch counts the FLOPs of a training step with one image on the meta device, where
nothing is computed: forward and backward of the U-Net and tau, or of E, D, VGG16 and
D_psi. They are multiplied by the batch and the steps of the preset. V100-days are the
paper's (Table 18).
"""
import argparse

import torch
from torch.utils.flop_counter import FlopCounterMode

from tinyldm.autoencoder import Autoencoder
from tinyldm.engine import presets
from tinyldm.patchgan import Discriminator, DiscriminatorConfig
from tinyldm.perceptual import VGG16

V100_DAYS = {
    "celebahq256": 14.4,
    "ffhq256": 26,
    "churches256": 18,
    "imagenet256-f8": 79,
    "imagenet256": 271,
    "vq-f4": 29,
    "vq-f8": 66,
}
ROWS = [
    "kl-f8", "vq-f4", "vq-f8", "celebahq256", "ffhq256", "churches256", "imagenet256-f8",
    "imagenet256", "text2img", "sd-v1",
]
GPUS = (1, 8, 64)


def train_stage_one(name: str) -> None:
    """Do the passes of a training step of an autoencoder with one image."""
    row = presets.AE[name]
    ae = Autoencoder(presets.ae_config(name))
    disc = Discriminator(DiscriminatorConfig(row["disc_ch"], row["disc_layers"]))
    vgg = VGG16().requires_grad_(False)

    x = torch.zeros(1, 3, row["size"], row["size"])
    z = ae.encode(x).mean
    x_rec = ae.decoder(ae.post_quant_conv(z))

    # The autoencoder's turn, then D_psi's.
    disc.requires_grad_(False)
    loss = vgg(x)[-1].sum() + vgg(x_rec)[-1].sum() + disc(x_rec).sum()
    loss.backward()
    disc.requires_grad_(True)
    loss = disc(x).sum() + disc(x_rec.detach()).sum()
    loss.backward()


def train_stage_two(name: str) -> None:
    """Do the passes of a training step of a diffusion model with one image."""
    row = presets.LDM[name]
    model = presets.build_networks(row)
    tokens = None
    if row["task"] == "class":
        tokens = model.tau(torch.zeros(1).long())
    elif row["task"] == "text":
        tokens = model.tau(torch.zeros(1, row["n_token"]).long())

    cfg = model.unet.cfg
    z_t = torch.zeros(1, cfg.c_out, cfg.side, cfg.side)
    model.unet(z_t, torch.zeros(1), tokens).sum().backward()


def count_flops(name: str) -> int:
    """Return the FLOPs of a training step of a preset with one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        if name in presets.AE:
            train_stage_one(name)
        else:
            train_stage_two(name)
    return counter.get_total_flops()


def readable_time(hours: float) -> str:
    """Return a time with about two digits."""
    if hours >= 9.5:
        return f"{hours:,.0f} h"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{60 * hours:.0f} min"


def table_row(name: str, tflops: float) -> str:
    """Return a preset's line of the table."""
    row = presets.AE[name] if name in presets.AE else presets.LDM[name]
    per_image = count_flops(name)
    total = per_image * row["batch"] * row["steps"]

    days = V100_DAYS.get(name, "")
    rate_of_v100 = f"{total / days / 86400 / 1e12:.1f}" if days else ""
    hours = total / tflops / 1e12 / 3600
    times = [readable_time(hours / n) for n in GPUS]
    cells = [
        f"`{name}`",
        f"{per_image / 1e9:,.0f}",
        f"{row['batch']:,} x {row['steps']:,}",
        f"{total / 1e18:,.1f}",
        f"{days}",
        rate_of_v100,
        *times,
    ]
    return f"| {' | '.join(cells)} |"


def main(args: argparse.Namespace) -> None:
    gpus = " | ".join(f"{n} GPU" for n in GPUS)
    print(
        "| preset | GFLOP per image | batch x steps | EFLOP | V100-days | TFLOP/s of a V100 "
        f"| {gpus} |"
    )
    print("|" + "---|" * 9)
    for name in ROWS:
        print(table_row(name, args.tflops))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tflops", type=float, default=450, help="what one GPU reaches, in 1e12 FLOP/s"
    )
    main(parser.parse_args())
