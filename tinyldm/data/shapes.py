"""The built-in world as a data set: small images of coloured shapes and true captions.

An image shows a scene of world.py, one or two objects, on a plain light ground with
faint grain. Its caption says exactly what there is, and scorer.py can check that from
the pixels alone.

Everything follows from (seed, index) by + - * / and square roots, so the images are the
same, bit by bit, on every machine.

Shapes: image (3, H, W) in [-1, 1]; boxes (K, 5) [class, x0, y0, x1, y1 in 0..1];
        segmentation (H, W), 0 for the ground, else 1 + class.

    python -m tinyldm.data.shapes held-out 256    # prompts that no training caption has
    python -m tinyldm.data.shapes unseen 256      # of classes that training never shows
"""
import argparse
import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinyldm.data.dataset import ImageDataset
from tinyldm.data.world import (
    CLASSES,
    COLOURS,
    EXTENT,
    RELATIONS,
    SEEN,
    SIZES,
    WORLD,
    Scene,
    Thing,
    prompts,
    scenes_of,
)

GAP = 2.0           # least distance of two objects along their relation, in units
MARGIN = 0.5        # least distance of an object from the edge, in units


class Shapes(ImageDataset):
    """n images of `size` pixels of a split: `train`, `held-out` or `unseen`.

    Item i depends on the seed, the split and i alone. There is an item for every
    i >= 0, also beyond n: another epoch has new images.
    """

    label_names = CLASSES
    box_names = CLASSES
    map_names = CLASSES
    has_exact_scorer = True

    def __init__(
        self, n: int = 20_000, size: int = 32, seed: int = 0, split: str = "train"
    ):
        self.n = n
        self.size = size
        self.seed = seed
        self.split = split
        self.singles, self.pairs = scenes_of(split)

    def __len__(self) -> int:
        return self.n

    def scene(self, i: int) -> tuple[list[Thing], str, np.random.Generator]:
        """Return item i's objects, in units, its caption, and its random generator.

        One image in four has one object, one caption in five no sizes. Three relations
        in four are "left of" or "above". Why: if all four are as frequent, models find
        it hard to learn them.
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(self.split.encode()), i])
        wants_single = rng.random() < 0.25
        leaves_out_sizes = rng.random() < 0.2
        wants_frequent_relation = rng.random() < 0.5

        is_single = wants_single and len(self.singles) > 0
        scenes = self.singles if is_single else self.pairs
        k = int(rng.random() * len(scenes))
        if wants_frequent_relation and not is_single:
            k = k - k % 2       # scenes_of puts "left of" and "above" at even places

        things = place(scenes[k], rng)
        caption = scenes[k].caption(sizes=not leaves_out_sizes)
        return things, caption, rng

    def load(self, k: int) -> dict:
        """Return item k; its label is the class of the object that one reads first."""
        things, caption, rng = self.scene(k)
        pixels_per_unit = self.size / WORLD
        things = [thing.scaled(pixels_per_unit) for thing in things]
        return {
            "image": render(things, self.size, rng),
            "caption": caption,
            "label": CLASSES.index(read_first(things).class_name),
            "boxes": bounding_boxes(things, self.size),
            "segmentation": label_map(things, self.size),
        }

    def __getitem__(self, i: int) -> dict:
        return self.load(i)

    def captions(self) -> list[str]:
        return [self.scene(i)[1] for i in range(self.n)]

    def prompts(self, n: int) -> list[str]:
        """Return n prompts of held-out scenes of two objects, with their sizes."""
        return prompts(n)

    def seen_labels(self) -> list[int]:
        return SEEN

    def fingerprint(self) -> list:
        return ["shapes", self.n, self.size, self.seed, self.split]


# ---- where objects lie

def place(scene: Scene, rng: np.random.Generator) -> list[Thing]:
    """Return the scene's objects with random radii and places, in units.

    They lie inside the image and apart, and their relation is beyond doubt.
    """
    radii = []
    for thing in scene.things:
        smallest, largest = SIZES[thing.size]
        radii.append(smallest + (largest - smallest) * rng.random())

    # An object stays inside the image if its centroid lies between low and high.
    extent = np.array([EXTENT[thing.shape] for thing in scene.things])
    extent = extent * np.array(radii)[:, None]                      # (K, 4)
    low = MARGIN - extent[:, :2]                                    # (K, 2)
    high = WORLD - extent[:, 2:] - MARGIN

    if scene.relation is None:
        centroids = low + (high - low) * rng.random((1, 2))
    else:
        centroids = place_two(RELATIONS[scene.relation], extent, low, high, rng)

    placed = []
    for thing, radius, (x, y) in zip(scene.things, radii, centroids.tolist()):
        placed.append(dataclasses.replace(thing, radius=radius, x=x, y=y))
    return placed


def place_two(
    direction: tuple[int, int],
    extent: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return the centroids (2, 2) of two objects, in units.

    direction: where the first object lies from the second, as in RELATIONS. extent
    (2, 4): how far each reaches to its left, up, right and down. low, high (2, 2): the
    ranges of their centroids.
    """
    axis = 0 if direction[0] else 1
    before, after = (0, 1) if sum(direction) < 0 else (1, 0)

    # Across the relation both objects lie near the middle.
    middle = WORLD / 2
    centroids = (middle + 4 * (rng.random((2, 2)) - 0.5)).clip(low, high)

    # Along it each one takes up to a quarter of the room between them, from its edge.
    least = extent[before, 2 + axis] - extent[after, axis] + GAP
    room = high[after, axis] - least - low[before, axis]
    centroids[before, axis] = low[before, axis] + room * 0.25 * rng.random()
    centroids[after, axis] = high[after, axis] - room * 0.25 * rng.random()
    return centroids


# ---- from objects, in pixels, to an image and what is known about it

def coverage(
    shape: str, radius: float, x: float, y: float, h: int, w: int
) -> np.ndarray:
    """Return the share of each pixel that a shape covers, (h, w) in [0, 1].

    radius, x and y are in pixels. The share is 1/2 - d, between 0 and 1, where d is the
    signed distance from the shape's outline to the pixel's centre, negative inside.
    """
    dx = np.arange(w) + 0.5 - x                 # (w,)
    dy = np.arange(h)[:, None] + 0.5 - y        # (h, 1)
    nearer = np.minimum(np.abs(dx), np.abs(dy))
    farther = np.maximum(np.abs(dx), np.abs(dy))

    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - radius
    elif shape == "square":
        distance = farther - 0.8862 * radius
    elif shape == "triangle":
        upper_sides = np.abs(dx) * 0.8660 - dy * 0.5
        distance = np.maximum(dy, upper_sides) - 0.7776 * radius
    else:
        # A cross, whose arms are a third as wide as the whole.
        distance = np.maximum(farther - 1.189 * radius, nearer - 0.3963 * radius)
    return np.clip(0.5 - distance, 0, 1)


def cover_of(thing: Thing, side: int) -> np.ndarray:
    """Return the share of each pixel that an object covers, (side, side)."""
    return coverage(thing.shape, thing.radius, thing.x, thing.y, side, side)


def render(
    things: list[Thing],
    side: int,
    rng: np.random.Generator,
    colours: dict[str, tuple] = COLOURS,
) -> Tensor:
    """Return the image (3, side, side) in [-1, 1] that shows the objects.

    colours: red, green and blue in 0..1, by the names that the objects have.
    """
    ground = 0.64 + 0.24 * rng.random()
    image = np.full((side, side, 3), ground)
    for thing in things:
        colour = np.array(colours[thing.colour]) * 2 - 1
        cover = cover_of(thing, side)
        image += cover[..., None] * (colour - image)

    grain = 0.04 * (rng.random((side, side, 1)) - 0.5)
    image += grain
    image = image.clip(-1, 1).astype(np.float32)
    return torch.from_numpy(image).permute(2, 0, 1)


def bounding_boxes(things: list[Thing], side: int) -> Tensor:
    """Return the boxes (K, 5) [class, x0, y0, x1, y1 in 0..1] of the objects."""
    rows = []
    for thing in things:
        left, up, right, down = EXTENT[thing.shape]
        x0 = (thing.x + left * thing.radius) / side
        y0 = (thing.y + up * thing.radius) / side
        x1 = (thing.x + right * thing.radius) / side
        y1 = (thing.y + down * thing.radius) / side
        rows.append([CLASSES.index(thing.class_name), x0, y0, x1, y1])
    return torch.tensor(rows).reshape(-1, 5)


def label_map(things: list[Thing], side: int) -> Tensor:
    """Return the label map (side, side): 0 for the ground, else 1 + class."""
    labels = np.zeros((side, side), np.int64)
    for thing in things:
        labels[cover_of(thing, side) > 0.5] = 1 + CLASSES.index(thing.class_name)
    return torch.from_numpy(labels)


def read_first(things: list[Thing]) -> Thing:
    """Return the object that is nearest to the top left corner, along both axes."""
    return min(things, key=lambda thing: thing.x + thing.y)


def main(argv: Sequence[str] | None = None) -> None:
    """Print prompts, one per line."""
    parser = argparse.ArgumentParser(
        description="Print prompts of the built-in world that no training caption has."
    )
    parser.add_argument("split", choices=["held-out", "unseen"])
    parser.add_argument("n", type=int, help="number of prompts")
    args = parser.parse_args(argv)
    print("\n".join(prompts(args.n, args.split)))


if __name__ == "__main__":
    main()
