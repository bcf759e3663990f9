"""What a picture loses, for tasks that give it back: resolution (superres) and regions (inpaint).

Paper:   Sec. 4.4, 4.5, App. E.3 (LDM-BSR's chain, in short; LaMa's masks). Reads: nothing of ours.
Shapes:  image (3, H, W) in [-1, 1] -> small (3, H / 4, W / 4); mask (1, H, W), 1 where lost."""
import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter

def to_image(x: torch.Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> 8 bits a channel, rounded to nearest."""
    x = (x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(x.round().byte().permute(1, 2, 0).numpy())

def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB -> (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1

def bicubic(x: torch.Tensor, w: int, h: int) -> torch.Tensor:
    """Pillow's bicubic, which averages where it shrinks; (3, H, W) -> (3, h, w)."""
    return to_tensor(to_image(x).resize((w, h), Image.BICUBIC))

def shrink(x: torch.Tensor, rng: np.random.Generator, chain: bool) -> torch.Tensor:
    """A quarter of each side: bicubic or, with `chain`, blur, a shrink of any kind, noise, JPEG."""
    h, w = x.shape[1] // 4, x.shape[2] // 4
    if not chain:
        return bicubic(x, w, h)
    image = to_image(x).filter(ImageFilter.GaussianBlur(2 * rng.random()))
    how = (Image.BICUBIC, Image.BILINEAR, Image.BOX)[rng.integers(3)]
    pixels = np.asarray(image.resize((w, h), how)) + rng.normal(0, 8 * rng.random(), (h, w, 3))
    file = io.BytesIO()
    image = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=int(rng.integers(60, 96)), subsampling=0)
    return to_tensor(Image.open(file))

def draw_mask(side: int, rng: np.random.Generator) -> torch.Tensor:
    """Boxes, or strokes, wide or narrow, that hide a part of the picture: (1, side, side)."""
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    if rng.random() < .5:
        for _ in range(rng.integers(1, 4)):
            w, h = side * rng.uniform(.15, .5, 2)
            x, y = rng.random(2) * (side - w, side - h)
            draw.rectangle((x, y, x + w, y + h), 255)
    else:
        width = side * (rng.uniform(.12, .25) if rng.random() < .5 else rng.uniform(.04, .1))
        for _ in range(rng.integers(1, 4)):
            at = side * rng.random(2)
            for _ in range(rng.integers(1, 5)):
                to = (at + side * rng.uniform(-.4, .4, 2)).clip(0, side)
                draw.line((*at, *to), 255, max(1, round(width)))
                draw.ellipse((*(to - width / 2), *(to + width / 2)), 255)
                at = to
    mask = torch.from_numpy(np.array(canvas))[None] / 255.
    return mask if 0 < mask.mean() < 1 else draw_mask(side, rng)

class Degraded(torch.utils.data.Dataset):
    """data's items, each with `small` or `mask`; what item i loses follows from (seed, i)."""
    def __init__(self, data: torch.utils.data.Dataset, field: str, seed: int, chain: bool = False):
        self.data, self.field, self.seed, self.chain = data, field, seed, chain
        self.classes, self.labels, self.tars = data.classes, data.labels, data.tars
    def __len__(self):
        return len(self.data)
    def __getitem__(self, i: int) -> dict:
        item, rng = self.data[i], np.random.default_rng([self.seed, i])
        x = item["image"]
        lost = draw_mask(x.shape[1], rng) if self.field == "mask" else shrink(x, rng, self.chain)
        return item | {self.field: lost}
