"""Crops of images, and of the boxes, label maps and small images that belong to them.

Sizes are (width, height), and a crop is (left, top, right, bottom), both in pixels.
"""
from collections.abc import Sequence

import torch
from torch import Tensor

Size = tuple[int, int]
Crop = tuple[int, int, int, int]


def largest_crop(image: Size, shape: Size) -> Size:
    """Return the size of the largest crop of an image that has a shape.

    A crop has whole pixels, so its shape is nearly that.
    """
    width, height = image
    w, h = shape
    if width * h <= height * w:
        return width, max(1, round(width * h / w))
    return max(1, round(height * w / h)), height


def central_crop(image: Size, size: Size) -> Crop:
    """Return the crop of a size in the centre of an image."""
    left = (image[0] - size[0]) // 2
    top = (image[1] - size[1]) // 2
    return left, top, left + size[0], top + size[1]


def scaled_crop(crop: Crop, image: Size, other: Size) -> list[float]:
    """Return a crop of an image in the pixels of another one that shows the same."""
    pairs = zip(crop, image * 2, other * 2)
    return [edge * of_other / of_image for edge, of_image, of_other in pairs]


def has_shape(size: Size, other: Size) -> bool:
    """Return whether two sizes have one aspect ratio, as far as whole pixels allow."""
    w, h = size
    other_w, other_h = other
    return abs(w * other_h - h * other_w) <= max(*size, *other)


def cropped_boxes(boxes: Sequence[list], names: Sequence[str], crop: Crop) -> Tensor:
    """Return boxes as (K, 5) [class, x0, y0, x1, y1], in shares of the crop.

    boxes: [[class, x0, y0, x1, y1], ...] in pixels of the image; names: the classes. Boxes
    are clipped to the crop, and those outside of it are left out.
    """
    rows = [[float(names.index(name)), *corners] for name, *corners in boxes]
    cropped = torch.tensor(rows).reshape(-1, 5)

    left, top, right, bottom = crop
    origin = torch.tensor([left, top, left, top])
    extent = torch.tensor([right - left, bottom - top] * 2)
    cropped[:, 1:] = ((cropped[:, 1:] - origin) / extent).clamp(0, 1)

    # A box outside the crop has no area left.
    has_area = (cropped[:, 3:] > cropped[:, 1:3]).all(1)
    return cropped[has_area]
