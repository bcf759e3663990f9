"""What to sample: the conditions that a user gives in files, or a data set's held-out ones."""
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tinyldm.data.images import (
    LANCZOS,
    NEAREST,
    fit_image,
    image_loader,
    load_map,
    load_rgb,
    to_tensor,
)
from tinyldm.data.open import open_dataset
from tinyldm.data.tokenizer import clean_text
from tinyldm.errors import naming, require, trying
from tinyldm.model import LatentDiffusion

# How the file of each condition is decoded.
DECODERS: dict[str, Callable] = {
    "boxes": json.loads,
    "map": load_map,
    "mask": load_rgb,
    "guide_mask": load_rgb,
}

# Those that are decoded with as many channels as the model's images have.
IMAGES = ("image", "init", "guide")


@dataclass
class Given:
    """What a user gives: words, and files by their kind (DECODERS and IMAGES)."""

    prompts: list[str]
    labels: list[str]
    files: dict[str, Path] = field(default_factory=dict)


@dataclass
class Request:
    """What to sample: n_each images for each condition.

    is_held_out: the conditions are a data set's held-out items, none were given.
    shared is added to every condition: the image and mask of a repainting, an image to begin
    from, or one to be guided to, with `visible` as the part of it that counts.
    """

    conditions: Sequence[dict]
    shared: dict[str, Tensor]
    size: tuple[int, int]               # (H, W)
    n_each: int
    is_held_out: bool

    def __len__(self) -> int:
        return len(self.conditions) * self.n_each

    def batch(self, first: int, n: int) -> list[dict]:
        """Return the conditions of up to n images, from image `first` on."""
        last = min(first + n, len(self))
        return [self.conditions[i // self.n_each] | self.shared for i in range(first, last)]


def read_request(
    model: LatentDiffusion,
    given: Given,
    size: tuple[int, int],
    *,
    n: int | None = None,
    data: str | None = None,
) -> Request:
    """Read all that says what to sample.

    size: (H, W) of the images, unless the condition itself decides it.
    n: images per condition, or the number of held-out items; default: 16 in all.
    data: the data set to take held-out items from; default: the one of training.
    Raises BadInput that names the file or the value.
    """
    decoded = {"prompts": clean_lines(given.prompts), "label": clean_lines(given.labels)}
    for kind, path in given.files.items():
        with trying(f"{path}: cannot be read"):
            decode = DECODERS.get(kind) or image_loader(model.config.autoencoder.c_x)
            decoded[kind] = decode(path.read_bytes())

    # The condition: given, or else of held-out items, which are as many as are asked for.
    source = ", ".join(str(path) for path in given.files.values())
    with naming(source or "prompt or label"):
        conditions, size = model.task.read(decoded, size, model.size_multiple)
    is_held_out = conditions is None
    if is_held_out:
        conditions = held_out_conditions(model, size, n or 16, data)
        n = 1
    require(len(conditions), "no prompt: give one, in quotes")

    # What all conditions share.
    shared = {}
    if "mask" in decoded:
        shared = image_and_mask(decoded, size)
    if "init" in decoded:
        h, w = size
        shared["init"] = to_tensor(fit_image(decoded["init"], (w, h), LANCZOS, "init"))
    if "guide" in decoded:
        shared |= guide_and_visible(decoded, size)

    n_each = n or 16 // min(len(conditions), 16)
    return Request(conditions, shared, size, n_each, is_held_out)


def clean_lines(lines: Sequence[str]) -> list[str]:
    """Return the lines that say something, without what no text may hold."""
    cleaned = [clean_text(line).strip() for line in lines]
    return [line for line in cleaned if line]


def held_out_conditions(
    model: LatentDiffusion, size: tuple[int, int], n: int, path: str | None
) -> Sequence[dict]:
    """Return n held-out items of a data set; path None: of the one that the model learned."""
    small = None if path else model.run.get("small")
    path = path or model.run.get("data")
    require(path, "data: a released model has none of its own; give a condition or a folder")
    data = open_dataset(
        path,
        "held-out",
        size=size,
        channels=model.config.autoencoder.c_x,
        fields=model.task.fields,
        seed=model.run.get("seed", 0),
        resize=model.run.get("resize", True),
        hold_out=model.run.get("hold_out", True),
        label_column=model.run.get("label_column", "label"),
        degrade=model.run.get("degrade"),
        small=small,
    )
    require(len(data), f"{path}: it has no held-out images; give a condition")
    model.task.check_data(data, str(path))
    return torch.utils.data.Subset(data, [i % len(data) for i in range(n)])


def image_and_mask(decoded: dict, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return the image to repaint (C, H, W), and the mask (1, H, W): 1 where it is repainted."""
    h, w = size
    mask = read_mask(decoded["mask"], decoded["image"], (w, h), "mask", "repainted")
    image = fit_image(decoded["image"], (w, h), LANCZOS, "image")
    return {"image": to_tensor(image), "mask": mask}


def guide_and_visible(decoded: dict, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return the image to be guided to (C, h, w) and, if given, `visible` (1, h, w).

    An image that is a smaller one of the same shape stays as small as it is.
    """
    h, w = size
    guide = decoded["guide"]
    is_small = guide.width <= w and guide.width * h == guide.height * w
    guide_size = guide.size if is_small else (w, h)

    shared = {"guide": to_tensor(fit_image(guide, guide_size, LANCZOS, "guide"))}
    if "guide_mask" in decoded:
        mask = read_mask(decoded["guide_mask"], guide, guide_size, "guide mask", "left out")
        shared["visible"] = 1 - mask
    return shared


def read_mask(
    mask: Image.Image, image: Image.Image, size: tuple[int, int], name: str, white: str
) -> Tensor:
    """Return the mask of an image as (1, H, W), 1 where it is white.

    size: (W, H), as fit_image has it. name and white are for messages: whose mask it is, and
    what its white part is. Raises BadInput for a mask of one colour.
    """
    mask = mask.convert("L")
    if mask.size != image.size:
        warnings.warn(
            f"{name}: {mask.width}x{mask.height} is resized (nearest) to the image's "
            f"{image.width}x{image.height}",
            stacklevel=2,
        )
        mask = mask.resize(image.size, NEAREST)

    mask = fit_image(mask, size, NEAREST, name)
    mask = torch.from_numpy(np.array(mask) > 127).float()[None]
    covered = "all" if mask.any() else "nothing"
    require(
        0 < mask.mean() < 1,
        f"{name}: it covers {covered}; white is {white}, black is kept",
    )
    return mask
