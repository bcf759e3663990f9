"""What training the paper's models costs, as the README has it: `python tests/costs.py`.

FLOPs of a training step for one picture are counted by torch on the meta device (nothing is
computed): forward and backward of the U-Net and tau; of E, D, VGG and D_psi. Times the batch and
the steps of the row. The V100-days are the paper's Table 18; hours are at a stated rate."""
import argparse

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tinyldm import presets
from tinyldm.autoencoder import Autoencoder
from tinyldm.patchgan import Discriminator
from tinyldm.perceptual import STAGES

V100_DAYS = {"celebahq256": 14.4, "ffhq256": 26, "churches256": 18, "imagenet256-f8": 79,
             "imagenet256": 271, "vq-f4": 29, "vq-f8": 66}
ROWS = ["kl-f8", "vq-f4", "vq-f8", "celebahq256", "ffhq256", "churches256", "imagenet256-f8",
        "imagenet256", "text2img", "sd-v1"]


def stage_two(row):
    ae, unet, tau = presets.networks(row)
    c, ctx = unet.cfg, None
    if tau:
        ctx = tau(torch.zeros((1, row["n_token"]) if row["task"] != "class" else 1).long())
    unet(torch.zeros(1, c.c_out, c.side, c.side), torch.zeros(1), ctx).sum().backward()


def stage_one(row, cfg):
    ae, disc = Autoencoder(cfg), Discriminator(3, row["disc_ch"], row["disc_layers"])
    layers, c = [], 3
    for i, stage in enumerate(STAGES):
        layers += [nn.MaxPool2d(2)] if i else []
        for width in stage:
            layers += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
            c = width
    vgg = nn.Sequential(*layers).requires_grad_(False)
    x = torch.zeros(1, 3, row["size"], row["size"])
    x_rec = ae.decoder(ae.post_quant_conv(ae.encode(x).mean))
    fake = x_rec.detach()
    disc.requires_grad_(False)                              # the generator's turn, then D_psi's
    (vgg(x).sum() + vgg(x_rec).sum() + disc(x_rec).sum()).backward()
    disc.requires_grad_(True)
    (disc(x).sum() + disc(fake).sum()).backward()


def time(hours):
    return f"{hours:,.0f} h" if hours >= 9.5 else f"{hours:.1f} h" if hours >= 1 else \
        f"{60 * hours:.0f} min"


def main(args):
    print("| preset | GFLOP a picture | batch x steps | EFLOP | V100-days | TFLOP/s of a V100 | "
          + " | ".join(f"{n} GPU" for n in (1, 8, 64)) + " |\n|" + "---|" * 9)
    for name in ROWS:
        one = name in presets.AE
        row = presets.AE[name] if one else presets.LDM[name]
        with torch.device("meta"), FlopCounterMode(display=False) as n:
            stage_one(row, presets.ae_config(name)) if one else stage_two(row)
        each, rounds = n.get_total_flops(), row["batch"] * row["steps"]
        days, hours = V100_DAYS.get(name), each * rounds / args.tflops / 1e12 / 3600
        print(f"| `{name}` | {each / 1e9:,.0f} | {row['batch']:,} x {row['steps']:,} | "
              f"{each * rounds / 1e18:,.1f} | {days or ''} | "
              + (f"{each * rounds / days / 86400 / 1e12:.1f}" if days else "") + " | "
              + " | ".join(time(hours / n) for n in (1, 8, 64)) + " |")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--tflops", type=float, default=450, help="what one GPU reaches, 1e12 a second")
    main(p.parse_args())
