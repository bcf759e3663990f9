"""Images that lack something, for the tasks that restore it: superres, (text-)inpaint.

Paper:  Sec. 4.4 (bicubic), App. D.6.1 (a chain of degradations, here a shorter one),
        Sec. 4.5 (masks of boxes and strokes, as LaMa has them).
Shapes: image (C, H, W) in [-1, 1] -> small (C, H / 4, W / 4) in [-1, 1];
        mask (1, H, W), 1 in the holes and 0 elsewhere.
"""
import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor

from tinyldm.data.dataset import ImageDataset, Wrapped
from tinyldm.data.images import BICUBIC, to_image, to_tensor

SHRINKING_FILTERS = (BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.BOX)


class Degraded(Wrapped):
    """The items of a data set, each with a field more: `small` or `mask`.

    What item i lacks follows from (seed, i) alone.
    """

    def __init__(
        self,
        data: ImageDataset,
        field: str,
        seed: int,
        chain: bool = False,
        share_hidden: float = 0.0,
    ):
        """field: "small" or "mask"; chain: how small images are made (see shrink).

        share_hidden: the share of masks, 0..1, that hide all of their image.
        """
        super().__init__(data)
        self.field = field
        self.seed = seed
        self.chain = chain
        self.share_hidden = share_hidden

    def change(self, item: dict[str, Any], i: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, i])
        if self.field == "mask":
            h, w = item["image"].shape[1:]
            item["mask"] = random_mask(h, w, rng)
            if rng.random() < self.share_hidden:
                item["mask"] = torch.ones(1, h, w)
        else:
            item["small"] = shrink(item["image"], rng, self.chain)
        return item

    def summary(self) -> list[str]:
        lines = self.data.summary()
        if self.field == "small":
            how = "a chain of degradations" if self.chain else "the bicubic filter"
            lines = [*lines, f"small images are made from the images, by {how}"]
        return lines

    def require_field(self, name: str) -> None:
        if name != self.field:
            self.data.require_field(name)

    def fingerprint(self) -> list:
        how = [self.field, self.seed, self.chain]
        if self.share_hidden:
            how.append(self.share_hidden)
        return [self.data.fingerprint(), *how]


# ---- superres: fewer pixels

def bicubic(x: Tensor, w: int, h: int) -> Tensor:
    """Resize (C, H, W) -> (C, h, w) by Pillow's bicubic filter.

    Pillow's filter grows with the factor by which it shrinks, so it averages over all
    pixels.
    """
    return to_tensor(to_image(x).resize((w, h), BICUBIC))


def shrink(x: Tensor, rng: np.random.Generator, chain: bool) -> Tensor:
    """Shrink (C, H, W) to a quarter of each side.

    chain: blur the image, shrink it by a random filter, then add noise and JPEG's
    artefacts; else shrink it by the bicubic filter.
    """
    h = x.shape[1] // 4
    w = x.shape[2] // 4
    if not chain:
        return bicubic(x, w, h)

    # Blur with a radius of up to 2 pixels.
    radius = 2 * rng.random()
    image = to_image(x).filter(ImageFilter.GaussianBlur(radius))

    # Shrink.
    image = image.resize((w, h), SHRINKING_FILTERS[rng.integers(3)])

    # Add noise, whose std is up to 8 of the 255 levels.
    std = 8 * rng.random()
    pixels = np.asarray(image)
    pixels = pixels + rng.normal(0, std, pixels.shape)
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

    # Save as JPEG, with a quality from 60 to 95.
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(60, 96)), subsampling=0)
    return to_tensor(Image.open(file))


# ---- inpaint: holes

def random_mask(h: int, w: int, rng: np.random.Generator) -> Tensor:
    """Return a mask (1, h, w) of boxes, or of wide or narrow strokes.

    It is never empty, and never covers the whole image.
    """
    sides = np.array([w, h])
    while True:
        canvas = Image.new("L", (w, h))
        pen = ImageDraw.Draw(canvas)
        if rng.random() < 0.5:
            draw_boxes(pen, sides, rng)
        else:
            draw_strokes(pen, sides, rng)

        mask = torch.from_numpy(np.array(canvas))[None] / 255.0     # (1, h, w)
        if 0 < mask.mean() < 1:
            return mask


def draw_boxes(
    pen: ImageDraw.ImageDraw, sides: np.ndarray, rng: np.random.Generator
) -> None:
    """Draw 1 to 3 boxes, whose sides are 0.15 to 0.5 of the image's."""
    for _ in range(rng.integers(1, 4)):
        extent = sides * rng.uniform(0.15, 0.5, 2)
        start = rng.random(2) * (sides - extent)
        pen.rectangle((*start, *(start + extent)), 255)


def draw_strokes(
    pen: ImageDraw.ImageDraw, sides: np.ndarray, rng: np.random.Generator
) -> None:
    """Draw 1 to 3 strokes of one width, each of 1 to 4 straight parts, round ends."""
    shorter = sides.min()
    is_wide = rng.random() < 0.5
    if is_wide:
        width = shorter * rng.uniform(0.12, 0.25)
    else:
        width = shorter * rng.uniform(0.04, 0.1)

    for _ in range(rng.integers(1, 4)):
        start = sides * rng.random(2)
        for _ in range(rng.integers(1, 5)):
            step = sides * rng.uniform(-0.4, 0.4, 2)
            end = (start + step).clip(0, sides)
            pen.line((*start, *end), 255, max(1, round(width)))
            pen.ellipse((*(end - width / 2), *(end + width / 2)), 255)
            start = end
