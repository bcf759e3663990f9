"""Read the images of a set that is to be compared, and count what was read.

In training, the next image takes the place of one that cannot be read (data/folder.py).
Here it is left out, as an image that counts twice would change the figures.
"""
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tinyldm.data.crops import has_shape
from tinyldm.data.folder import Folder
from tinyldm.data.images import LANCZOS, size_text, to_tensor, upright_size, why_unreadable
from tinyldm.metrics.sets import load_batches_of

MOST_NAMED = 3                  # images that a line of text names


class ExactImages(Dataset):
    """The images of a folder, each by its own number.

    An item has `image` (C, H, W), `stored_size`, the (width, height) of the file, and
    `error`, which is "" or says why the image cannot be read; then the image is black.
    """

    def __init__(self, folder: Folder):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def name(self, k: int) -> str:
        """Return the file name of image k."""
        return self.folder.rows[k]["file_name"]

    def __getitem__(self, k: int) -> dict[str, Any]:
        h, w = self.folder.size
        try:
            data = self.folder.read_image(k)
            image = self.folder.open_image(k, data)
            stored_size = upright_size(data)
        except Exception as error:          # a stranger's file may raise anything
            black = -torch.ones(self.folder.channels, h, w)
            return {"image": black, "stored_size": (w, h), "error": why_unreadable(error)}

        crop = self.folder.crop_of(k, image)
        cropped = image.resize((w, h), LANCZOS, crop)
        return {"image": to_tensor(cropped), "stored_size": stored_size, "error": ""}


class Tally:
    """What became of the images of a set that were to be read."""

    def __init__(self, size: tuple[int, int]):
        self.size = size                            # (H, W) that all images get
        self.unreadable: dict[str, str] = {}        # {file name: why}
        self.sizes: Counter[tuple[int, int]] = Counter()    # (width, height) of files

    def parts(self) -> list[str]:
        """Return what a reader should know about the set, in a few words each."""
        h, w = self.size
        parts = []
        if self.unreadable:
            n = len(self.unreadable)
            parts.append(f"{n:,} left out, unreadable: {listed(self.unreadable)}")

        cropped = [size for size in self.sizes if not has_shape(size, (w, h))]
        if cropped:
            n = sum(self.sizes[size] for size in cropped)
            shape = "square" if h == w else f"in the shape of {size_text(self.size)}"
            parts.append(f"{n:,} cropped to the centre, as not {shape}")

        scaled = [size for size in self.sizes if size != (w, h) and size not in cropped]
        if scaled:
            n = sum(self.sizes[size] for size in scaled)
            parts.append(f"{n:,} scaled from {range_text(scaled)} to {size_text(self.size)}")
        return parts


def listed(unreadable: dict[str, str]) -> str:
    """Return the first images that cannot be read, and how many more there are."""
    names = list(unreadable)
    named = [f"{name} ({unreadable[name]:.99})" for name in names[:MOST_NAMED]]
    n_more = len(names) - len(named)
    more = f" and {n_more:,} more" if n_more else ""
    return ", ".join(named) + more


def range_text(sizes: Sequence[tuple[int, int]]) -> str:
    """Return the smallest and the largest (width, height), by area, as HxW."""
    by_area = sorted(sizes, key=lambda size: size[0] * size[1])
    w, h = by_area[0]
    largest_w, largest_h = by_area[-1]
    smallest = size_text((h, w))
    largest = size_text((largest_h, largest_w))
    return smallest if smallest == largest else f"{smallest} .. {largest}"


def read_images(
    data: Dataset,
    items: Sequence[int],
    workers: int,
    device: torch.device,
    tally: Tally,
) -> Iterator[Tensor]:
    """Yield the images of items that can be read, at most 64 at a time; count them."""
    first = 0
    for batch in load_batches_of(data, items, workers):
        x = batch["image"]
        if isinstance(data, ExactImages):
            x = x[are_readable(batch)]
            numbers = items[first:first + len(batch["error"])]
            first += len(numbers)
            for k, size, error in zip(numbers, batch["stored_size"], batch["error"]):
                if error:
                    tally.unreadable[data.name(k)] = error
                else:
                    tally.sizes[tuple(size)] += 1

        if len(x) > 0:
            yield x.to(device)


def read_pairs(
    real: ExactImages,
    fake: ExactImages,
    items: Sequence[tuple[int, int]],
    workers: int,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (B, C, H, W) of real and fake images; items are pairs of numbers.

    A pair of which one image cannot be read is left out.
    """
    real_batches = load_batches_of(real, [i for i, _ in items], workers)
    fake_batches = load_batches_of(fake, [j for _, j in items], workers)
    for real_batch, fake_batch in zip(real_batches, fake_batches):
        are_pairs = are_readable(real_batch) & are_readable(fake_batch)
        if are_pairs.any():
            x = real_batch["image"][are_pairs].to(device)
            x_rec = fake_batch["image"][are_pairs].to(device)
            yield x, x_rec


def are_readable(batch: dict[str, Any]) -> Tensor:
    """Return for each image of a batch whether it could be read, (B,)."""
    return torch.tensor([error == "" for error in batch["error"]])
