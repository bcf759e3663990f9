"""Grids of images as files, and conditions as images to show above their samples.

Shapes: images (n, C, H, W) in [-1, 1], which are shown as RGB; a condition as an image
        (3, h, w) in [-1, 1].
"""
import colorsys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from tinyldm.data.images import NEAREST, as_rgb, to_image, to_tensor
from tinyldm.errors import trying

GAP = 4                     # width of the white lines between the images of a grid
LEAST_WIDTH = 96            # smaller images are enlarged to this many pixels or more
QUALITY = 95                # of files in JPEG or WebP; others keep every bit
BACKGROUND = "gainsboro"    # a light grey, where a condition shows nothing


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images as one file, `columns` per row; small ones are enlarged.

    Raises BadInput if the file cannot be written.
    """
    h, w = images.shape[2:]
    factor = -(-LEAST_WIDTH // w)
    h = h * factor
    w = w * factor

    rows = -(-len(images) // columns)
    sheet_size = (columns * (w + GAP) + GAP, rows * (h + GAP) + GAP)
    sheet = Image.new("RGB", sheet_size, "white")
    for i, x in enumerate(images):
        row, column = divmod(i, columns)
        tile = to_image(as_rgb(x)).resize((w, h), NEAREST)
        sheet.paste(tile, (GAP + column * (w + GAP), GAP + row * (h + GAP)))
    save_sheet(sheet, path)


def save_sheet(sheet: Image.Image, path: Path) -> None:
    """Save an image in the format that its suffix says. Raises BadInput if that fails."""
    with trying(f"cannot write {path}"):
        sheet.save(path, quality=QUALITY)


def save_samples(
    images: Tensor, conditions: Sequence[Tensor | None], path: Path, columns: int
) -> None:
    """Write a grid in which each row of samples lies below the row of their conditions.

    conditions: one image (3, H, W) per sample; or None for each, where they cannot be
    shown, like captions, and the grid has the samples alone.
    """
    if not conditions or conditions[0] is None:
        save_grid(images, path, columns)
        return

    images = as_rgb(images)

    # White images complete the last row.
    n_missing = -len(images) % columns
    blank = torch.ones(n_missing, *images.shape[1:])
    shown = torch.cat([torch.stack(list(conditions)), blank])
    samples = torch.cat([images, blank])

    # Rows of conditions and rows of samples alternate.
    shown_rows = shown.unflatten(0, (-1, columns))          # (rows, columns, 3, H, W)
    sample_rows = samples.unflatten(0, (-1, columns))
    alternating = torch.stack([shown_rows, sample_rows], dim=1)     # (rows, 2, ...)
    save_grid(alternating.flatten(0, 2), path, columns)


# ---- conditions as images

def class_colour(k: int, names: Sequence[str]) -> tuple[int, ...]:
    """Return the colour (red, green, blue in 0..255) that stands for class k.

    It is the colour with which the class's name begins, as in "red circle". Where there
    is none, it is one of many hues; neighbours are a golden ratio of the circle apart,
    which keeps them distinct.
    """
    try:
        return ImageColor.getrgb(names[k].split()[0])[:3]
    except (ValueError, IndexError):
        hue = k * 0.618 % 1
        brightness = 0.5 + k % 3 / 4
        return tuple(int(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.7, brightness))


def show_label_map(
    segmentation: Tensor, names: Sequence[str], ground_is_zero: bool
) -> Tensor:
    """Return a label map (h, w) in the colours of its classes, (3, h, w).

    Label k + 1 has the colour of class k of `names`. ground_is_zero: label 0 is not a
    class but the ground, as in the built-in world, and grey.
    """
    h, w = segmentation.shape
    shown = to_tensor(Image.new("RGB", (w, h), BACKGROUND))
    for label in segmentation.unique().tolist():
        is_ground = ground_is_zero and label <= 0
        if not is_ground:
            colour = torch.tensor(class_colour(label - 1, names))
            shown[:, segmentation == label] = colour[:, None] / 127.5 - 1
    return shown


def show_boxes(boxes: Tensor, names: Sequence[str], h: int, w: int) -> Tensor:
    """Return boxes as frames in the colours of their classes, (3, h, w).

    boxes (K, 5) [class, x0, y0, x1, y1 in 0..1].
    """
    sheet = Image.new("RGB", (w, h), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    for label, x0, y0, x1, y1 in boxes.tolist():
        corners = [x0 * (w - 1), y0 * (h - 1), x1 * (w - 1), y1 * (h - 1)]
        pen.rectangle(corners, outline=class_colour(int(label), names))
    return to_tensor(sheet)


def show_small(small: Tensor, h: int, w: int) -> Tensor:
    """Return a small image (C, H, W), enlarged to (3, h, w) without smoothing."""
    return to_tensor(to_image(as_rgb(small)).resize((w, h), NEAREST))


def show_masked(image: Tensor, mask: Tensor) -> Tensor:
    """Return an image (C, H, W) as RGB (3, H, W), black where the mask (1, H, W) is 1."""
    return as_rgb(image) * (1 - mask) - mask
