"""A folder, .zip or .tar of images as a data set.

files.py finds the images and what is known of them. Here they become items: an image is
scaled and cropped to one size, and its boxes and its label map with it.
"""
import os
import warnings
import zlib
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tinyldm.data.dataset import ImageDataset
from tinyldm.data.files import IMAGE_SUFFIXES, Files
from tinyldm.data.images import (
    LANCZOS,
    NEAREST,
    both_sides,
    image_loader,
    load_map,
    map_to_tensor,
    to_tensor,
)
from tinyldm.errors import BadInput, require, trying

# For each field: the column of a row that it comes from, and what to do if it is
# missing.
FIELD_SOURCES = {
    "caption": ("text", 'give it a .txt beside it, or a "text" in metadata.jsonl'),
    "label": (
        "label",
        'put it into a sub-folder named so, or a "label" into metadata.jsonl',
    ),
    "boxes": (
        "boxes",
        'give it "boxes" in metadata.jsonl: [[class, x0, y0, x1, y1 in pixels], ...]',
    ),
    "segmentation": (
        "mask",
        'give it a "mask" in metadata.jsonl: the file of its label map',
    ),
}


class Folder(ImageDataset):
    """The images of a folder, .zip or .tar, all scaled and cropped to one size.

    size: (H, W) in pixels, or the side of a square.
    split: "train", "held-out" (one image in 20, by a hash of its name) or "all".
    resize: scale an image so that it covers `size` before the central crop; else only
        crop.
    flip: mirror images, boxes and label maps in every second epoch.
    label_column: the key in metadata that holds an image's class.
    channels: 1 for grey images, 3 for RGB, 4 for RGBA.

    Raises BadInput if there are no images, or if metadata is wrong. An image that
    cannot be read is replaced by the next one, with a warning.
    """

    def __init__(
        self,
        path: str,
        size: int | tuple[int, int],
        split: str = "train",
        resize: bool = True,
        flip: bool = False,
        label_column: str = "label",
        channels: int = 3,
    ):
        self.path = path
        self.size = both_sides(size)
        self.resize = resize
        self.flip = flip
        self.channels = channels
        self.load_image = image_loader(channels)
        self.files = Files(path, label_column)
        self.unreadable: set[str] = set()

        # The classes of all images, so that they are the same for each split.
        rows = self.files.rows()
        labels = [row["label"] for row in rows if "label" in row]
        boxes = chain.from_iterable(row.get("boxes", []) for row in rows)
        self.label_names = class_names(labels)
        self.box_names = class_names(box[0] for box in boxes)

        self.rows = [row for row in rows if in_split(row["file_name"], split)]
        kinds = ", ".join(IMAGE_SUFFIXES)
        require(
            self.rows or split == "held-out",
            f"{path}: no images in it ({kinds}, or plain .tar)",
        )
        if self.files.places:
            self.shards = [self.files.container(row["file_name"]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self) -> list[str]:
        return [str(row["text"]) for row in self.rows]

    def require_field(self, name: str) -> None:
        """Raise BadInput that names an image without the field, and says what to do."""
        column, advice = FIELD_SOURCES.get(name, ("file_name", ""))
        for row in self.rows:
            message = f"{self.path}: {row['file_name']} has no {name}; {advice}"
            require(column in row, message)

    def fingerprint(self) -> list:
        """Return what decides the items, and the states of the files they come from."""
        used = set()
        for row in self.rows:
            used.add(self.files.container(row["file_name"]))
            if "mask" in row:
                used.add(self.files.container(row["mask"]))
        states = [self.files.state(name) for name in sorted(used)]
        how = [self.size, self.channels, self.resize, self.flip]
        return [how, self.label_names, self.box_names, self.rows, states]

    # ---- from files to items

    def load(self, k: int) -> dict[str, Any]:
        """Return the item of image k; BadInput if it is smaller than the crop."""
        row, image = self.readable(k)

        # The crop is in the centre of the image, and has the shape of `size`.
        h, w = self.size
        crop_w, crop_h = largest_crop(image.size, (w, h)) if self.resize else (w, h)
        require(
            crop_w <= image.width and crop_h <= image.height,
            f"{self.path}: {row['file_name']} is {image.width}x{image.height} (width x "
            f"height), smaller than the crop of {w}x{h}; allow scaling, or take a smaller "
            "size",
        )
        left = (image.width - crop_w) // 2
        top = (image.height - crop_h) // 2
        crop = (left, top, left + crop_w, top + crop_h)

        cropped = image.resize((w, h), LANCZOS, crop)
        item: dict[str, Any] = {"image": to_tensor(cropped)}
        if "text" in row:
            item["caption"] = str(row["text"])
        if "label" in row:
            item["label"] = self.label_names.index(str(row["label"]))
        if "boxes" in row:
            item["boxes"] = self._boxes(row["boxes"], crop)
        if "mask" in row:
            item["segmentation"] = self._label_map(row["mask"], crop, image.size)
        return item

    def readable(self, k: int) -> tuple[dict, Image.Image]:
        """Return the row and the image k, or those of the next image that can be read.

        The image may be smaller than its file says, except if it has boxes in pixels.
        Raises BadInput if no image can be read.
        """
        for j in range(k, k + len(self)):
            row = self.rows[j % len(self)]
            name = row["file_name"]
            if name in self.unreadable:
                continue

            may_be_smaller = self.resize and "boxes" not in row
            least_side = 2 * max(self.size) if may_be_smaller else None
            try:
                return row, self.load_image(self.files.read(name), least_side)
            except Exception as error:      # a stranger's file may raise anything
                self.unreadable.add(name)
                count = f"({len(self.unreadable)} so far)"
                warnings.warn(f"{name} is skipped: {error} {count}", stacklevel=2)

        raise BadInput(f"{self.path}: none of its {len(self)} images can be read")

    def _boxes(self, rows: list, crop: tuple[int, int, int, int]) -> Tensor:
        """[[class, x0, y0, x1, y1], ...] in pixels -> (K, 5), in shares of the crop."""
        numbered = []
        for name, *corners in rows:
            number = float(self.box_names.index(str(name)))
            numbered.append([number, *corners[:4]])
        boxes = torch.tensor(numbered).reshape(-1, 5)

        left, top, right, bottom = crop
        origin = torch.tensor([left, top, left, top])
        extent = torch.tensor([right - left, bottom - top] * 2)
        boxes[:, 1:] = ((boxes[:, 1:] - origin) / extent).clamp(0, 1)

        # A box outside the crop has no area left.
        has_area = (boxes[:, 3:] > boxes[:, 1:3]).all(1)
        return boxes[has_area]

    def _label_map(
        self, name: str, crop: tuple[int, ...], image_size: tuple[int, int]
    ) -> Tensor:
        """The file of a label map, of any size -> (H, W)."""
        with trying(f"{self.path}: {name} cannot be read"):
            label_map = load_map(self.files.read(name))

        # The crop of the image, in pixels of the map.
        map_crop = []
        for edge, of_map, of_image in zip(crop, label_map.size * 2, image_size * 2):
            map_crop.append(edge * of_map / of_image)
        h, w = self.size
        cropped = label_map.resize((w, h), NEAREST, map_crop)
        return map_to_tensor(cropped)


def largest_crop(image: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """Return the size of the largest crop of an image that has a shape.

    All three are (width, height). A crop has whole pixels, so its shape is nearly that.
    """
    width, height = image
    w, h = shape
    if width * h <= height * w:
        return width, max(1, round(width * h / w))
    return max(1, round(height * w / h)), height


def in_split(file_name: str, split: str) -> bool:
    """Return whether an image is in a split.

    Why by a hash of its name: it stays in its split while others come and go.
    """
    if split == "all":
        return True
    is_held_out = zlib.crc32(os.fsencode(file_name)) % 20 == 0
    return is_held_out == (split == "held-out")


def class_names(found: Iterable[Any]) -> tuple[str, ...]:
    """Return the classes that were found, as text, sorted, each once."""
    return tuple(sorted({str(name) for name in found}))
