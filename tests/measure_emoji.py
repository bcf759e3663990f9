"""Measure a model of the emoji: the tables and pictures in notebooks/README.md.

    python tests/measure_emoji.py out/measured                          # the bundled model
    python tests/measure_emoji.py out/measured --ckpt out/emoji/model.pt --n 64
    python tests/measure_emoji.py out/measured --ckpt out/class/model.pt    # or inpaint

Of a text model it writes, unpicked: names.png, the font's picture beside the sample of its name, in
pairs; face.png, the names at the top of the README; reconstructions.png; changed.png, names with
a word changed or added; colours.png, 24 colours of things, few of which are in the set.

Two judges say whether a sample shows what its name says, rather than another picture of the set:
thumbnails of 16 x 16 pixels, and the features of a network that this program trains to tell all
pictures of the set apart, however they are shifted, tinted, blurred or covered with noise.
"""
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from tinyldm.data.dataset import ImageDataset, spread
from tinyldm.data.images import to_image
from tinyldm.data.open import open_dataset
from tinyldm.engine.open import BUNDLED, model_file, open_model
from tinyldm.metrics.images import psnr, ssim
from tinyldm.metrics.nearest import ranks, share_within, thumbnails
from tinyldm.model import LatentDiffusion

SHOWN = 50                  # pairs in names.png, unpicked

FACE = [                    # the picture at the top of the README, one sample each
    "mushroom", "cat face", "red apple", "rocket", "penguin", "strawberry", "european castle",
    "octopus", "guitar", "slice of pizza", "sunflower", "police officer", "fox face",
    "hot beverage", "red heart", "grinning face with smiling eyes", "snowman", "airplane", "crab",
    "birthday cake", "bicycle", "frog face", "umbrella with rain drops", "gem stone", "tiger face",
    "cactus", "sushi", "robot face", "house with garden", "father christmas",
    "thumbs up with dark skin", "rainbow",
]
CHANGED = [                 # names of the set, and others with a word changed or added
    ("crying face", "crying cat face"), ("red apple", "blue apple"),
    ("green heart", "green star"), ("smiling face with sunglasses", "cat face with sunglasses"),
    ("blue book", "red book"), ("large red circle", "large pink circle"),
    ("police car", "red car"), ("tiger face", "blue tiger face"),
]
COLOURS = ["red", "green", "blue", "orange"]
THINGS = ["car", "apple", "fish", "bird", "hat", "flower"]


class NameNet(nn.Module):
    """Tells the pictures of a set apart: x (B, 3, H, W) -> features (B, 128) of length 1."""

    def __init__(self, n: int):
        super().__init__()
        self.convs = nn.ModuleList()
        for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
            self.convs.append(nn.Conv2d(c_in, c_out, 4, 2, 1))
        self.to_features = nn.Linear(128 * 16, 128)
        self.to_names = nn.Linear(128, n)

    def forward(self, x: Tensor) -> Tensor:
        h = F.adaptive_avg_pool2d(x, 32)
        for conv in self.convs:
            h = F.gelu(conv(h))
        return F.normalize(self.to_features(h.flatten(1)), dim=1)


def changed_a_little(x: Tensor) -> Tensor:
    """Shift, tint and blur images, and cover them with noise, at random."""
    n = len(x)
    dx, dy = torch.randint(-4, 5, (2,)).tolist()
    x = x.roll((dy, dx), (2, 3))
    x = x * (0.8 + 0.4 * torch.rand(n, 3, 1, 1)) + 0.1 * torch.randn(n, 3, 1, 1)
    small = F.avg_pool2d(x, 4)
    blurred = F.interpolate(small, x.shape[2:], mode="bilinear")
    x = x.lerp(blurred, torch.rand(n, 1, 1, 1))
    return x + 0.2 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)


def train_judge(pictures: Tensor, steps: int = 1500, batch: int = 128) -> NameNet:
    """Train a NameNet on pictures (n, 3, H, W), by cross-entropy."""
    torch.manual_seed(0)
    net = NameNet(len(pictures))
    optimiser = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, steps)
    for _ in tqdm(range(steps), "judge", dynamic_ncols=True):
        k = torch.randint(len(pictures), (batch,))
        logits = net.to_names(net(changed_a_little(pictures[k]))) * 8
        loss = F.cross_entropy(logits, k)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def in_parts(function, x: Tensor) -> Tensor:
    """Apply a function to 64 images at a time."""
    return torch.cat([function(part) for part in x.split(64)])


@torch.no_grad()
def sample(model: LatentDiffusion, conditions: Sequence[dict], steps: int = 50) -> Tensor:
    """Sample an image for each condition, each with the noise of its place."""
    images = []
    for first in tqdm(range(0, len(conditions), 50), "sampling", dynamic_ncols=True):
        batch = conditions[first:first + 50]
        seeds = [(0, first + i) for i in range(len(batch))]
        images.append(model.sample(batch, seeds=seeds, steps=steps))
    return torch.cat(images)


# ---- pictures

def save_captioned(images: Tensor, captions: Sequence[str], path: Path, columns: int) -> None:
    """Write images in rows, each above its caption."""
    h, w = images.shape[2:]
    font = ImageFont.load_default(11)
    cell_w = max(w + 8, 96)
    cell_h = h + 22
    n_rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell_w, n_rows * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (x, caption) in enumerate(zip(images, captions)):
        row, column = divmod(i, columns)
        corner = (column * cell_w + (cell_w - w) // 2, row * cell_h + 3)
        sheet.paste(to_image(x), corner)
        while pen.textlength(caption, font) > cell_w - 4:
            caption = caption.removesuffix("…")[:-1] + "…"
        middle = (column * cell_w + cell_w // 2, row * cell_h + h + 5)
        pen.text(middle, caption, "black", font, anchor="ma")
    sheet.save(path)


def pairs(left: Tensor, right: Tensor) -> Tensor:
    """Put images side by side -> (n, 3, H, 2 W)."""
    return torch.cat([left, right], dim=3)


# ---- figures

def all_images(data: ImageDataset) -> Tensor:
    return torch.stack([data[k]["image"] for k in range(len(data))])


def first_captions(data: ImageDataset) -> list[str]:
    """The first caption of each image, the plain one."""
    return [row["text"] if isinstance(row["text"], str) else row["text"][0] for row in data.rows]


@torch.no_grad()
def reconstruct(model: LatentDiffusion, x: Tensor) -> Tensor:
    x_rec = in_parts(lambda part: model.ae.decode(model.ae.encode(part).mean), x)
    return x_rec.clamp(-1, 1)


@torch.no_grad()
def print_reconstructions(model: LatentDiffusion, size: int, out: Path) -> None:
    """PSNR and SSIM of the held-out pictures, and 40 of them beside their originals."""
    x = all_images(open_dataset("emoji", "held-out", size=size))
    x_rec = reconstruct(model, x)
    print(
        f"stage one, {len(x)} held-out pictures: PSNR {psnr(x, x_rec).mean():.1f} dB, "
        f"SSIM {ssim(x, x_rec).mean():.3f}"
    )
    shown = pairs(x, x_rec)[spread(40, len(x))]
    save_captioned(shown, [""] * len(shown), out / "reconstructions.png", 8)


def print_names(
    samples: Tensor, wanted: Tensor, pictures: Tensor, judges: dict
) -> None:
    """How many samples have the named picture as the nearest, or among the five nearest."""
    for name, judge in judges.items():
        found = in_parts(judge, samples)
        every = in_parts(judge, pictures)
        rank = ranks(found, in_parts(judge, wanted), every)
        by_chance = ranks(found.roll(1, 0), in_parts(judge, wanted), every)
        print(
            f"{name}: of {len(samples)} names, {share_within(rank, 1):.1%} are nearest, "
            f"{share_within(rank, 5):.1%} among the nearest five; for samples of other names, "
            f"{share_within(by_chance, 5):.1%}"
        )


@torch.no_grad()
def print_memory(model: LatentDiffusion, samples: Tensor, k: Tensor, pictures: Tensor) -> None:
    """RMS distances in thumbnails: of samples and of reconstructions to the nearest picture.

    A sample as near as the reconstruction of a picture is that picture, learned by heart.
    """
    def to_nearest(x: Tensor) -> Tensor:
        distances = torch.cdist(thumbnails(x), thumbnails(pictures))
        return distances.min(1).values / thumbnails(x).shape[1] ** 0.5

    x = pictures[k]
    x_rec = reconstruct(model, x)
    for name, images in (("samples", samples), ("reconstructions", x_rec)):
        near = to_nearest(images)
        low, middle, high = near.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        print(
            f"{name}: RMS distance of 16 x 16 pixels in [-1, 1] to the nearest picture "
            f"{middle:.3f} (from {low:.3f} to {high:.3f} for four of five)"
        )


def measure_text(model: LatentDiffusion, args: argparse.Namespace) -> None:
    """The tables and pictures of a model that draws emoji from their names."""
    size = model.config.size[0]
    data = open_dataset("emoji", size=size, hold_out=False)
    pictures = all_images(data)
    captions = first_captions(data)

    print_reconstructions(model, size, args.out)

    # Names at random, judged twice.
    k = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:args.n]
    asked = [captions[i] for i in k]
    samples = sample(model, [{"caption": caption} for caption in asked])
    save_captioned(pairs(pictures[k], samples)[:SHOWN], asked, args.out / "names.png", 5)
    judges = {"16 x 16 pixels": thumbnails, "features": train_judge(pictures)}
    print_names(samples, pictures[k], pictures, judges)
    print_memory(model, samples, k, pictures)

    face = sample(model, [{"caption": caption} for caption in FACE])
    save_captioned(face, FACE, args.out / "face.png", 8)

    # Names with a word changed, and colours of things; training shows few of them.
    words = [caption for pair in CHANGED for caption in pair]
    changed = sample(model, [{"caption": caption} for caption in words])
    save_captioned(changed, words, args.out / "changed.png", 8)
    combined = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
    known = [caption for caption in combined if caption in captions]
    print(f"of the {len(combined)} colours and things, the set has {known or 'none'}")
    coloured = sample(model, [{"caption": caption} for caption in combined])
    save_captioned(coloured, combined, args.out / "colours.png", len(THINGS))


def measure_class(model: LatentDiffusion, args: argparse.Namespace) -> None:
    """How often the picture that is nearest to a sample has the class that was asked for."""
    data = open_dataset("emoji", size=model.config.size, hold_out=False)
    labels = torch.tensor([data[k]["label"] for k in range(len(data))])
    asked = torch.arange(args.n) % len(data.label_names)
    samples = sample(model, [{"label": int(label)} for label in asked])
    nearest = torch.cdist(thumbnails(samples), thumbnails(all_images(data))).argmin(1)
    right = (labels[nearest] == asked).double()
    chance = torch.bincount(labels).double() / len(labels)
    print(
        f"of {args.n} samples of {len(data.label_names)} classes, the nearest picture is of the "
        f"class in {right.mean():.1%}; by chance {chance[asked].mean():.1%}"
    )
    shown = min(args.n, 4 * len(data.label_names))
    names = [data.label_names[label] for label in asked[:shown]]
    save_captioned(samples[:shown], names, args.out / "class.png", len(data.label_names))


def measure_inpaint(model: LatentDiffusion, args: argparse.Namespace) -> None:
    """How often the hidden picture, which is held out, is the nearest of all to its repair."""
    size = model.config.size
    every = all_images(open_dataset("emoji", size=size, hold_out=False))
    held_out = open_dataset("emoji", "held-out", size=size, fields=("mask",))
    items = [held_out[k] for k in range(len(held_out))]
    x = torch.stack([item["image"] for item in items])
    mask = torch.stack([item["mask"] for item in items])
    samples = sample(model, items)
    grey = x * (1 - mask)
    for name, images in (("repaired", samples), ("with grey holes", grey)):
        rank = ranks(thumbnails(images), thumbnails(x), thumbnails(every))
        print(f"{name}: the true picture is the nearest in {share_within(rank, 1):.1%}")
    error = ((samples - x).square() * mask).sum() / (3 * mask.sum())
    print(f"holes cover {mask.mean():.0%}; PSNR in them {10 * (4 / error).log10():.1f} dB")
    shown = torch.cat([grey, samples, x], dim=3)[spread(20, len(x))]
    save_captioned(shown, [""] * len(shown), args.out / "inpaint.png", 4)


MEASURES = {"text": measure_text, "class": measure_class, "inpaint": measure_inpaint}


def main(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    model = open_model(args.ckpt)
    task = model.config.task
    if task not in MEASURES:
        sys.exit(f"{args.ckpt}: its task is {task}; give a model of {', '.join(MEASURES)}")
    MEASURES[task](model, args)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure a model of the emoji.")
    parser.add_argument("out", type=Path, help="folder of the pictures")
    parser.add_argument("--ckpt", type=model_file, default=BUNDLED["emoji"])
    parser.add_argument("--n", type=int, default=200, help="number of names")
    main(parser.parse_args())
