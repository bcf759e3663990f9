"""Find the objects in an image of the built-in world, from its pixels alone.

The ground has the median colour of the image, and each connected patch of pixels that
differ from it is one object. Its colour is the nearest one of the world's. Its shape is
the one whose rendering, with the same area and centroid, differs least.

Shapes: image (3, H, W) in [-1, 1]; a patch, alpha (H, W).
Units:  places and radii of found objects are in pixels.
"""
import numpy as np
import torch
from torch import Tensor

from tinyldm.data.shapes import coverage
from tinyldm.data.world import COLOURS, SHAPES, WORLD, Thing

BLOB = "blob"               # the shape of what is none of SHAPES
DIFFERS = 0.5               # a colour this far from the ground's belongs to an object
LARGEST_ERROR = 0.4         # of a shape that explains a patch, as a share of its area
SMALLEST_AREA = 4           # of an object, in square units of the world
SMALL_BELOW = 4.3           # the radius between "small" and "big", in units


def find(
    image: Tensor, unit: float | None = None, colours: dict[str, tuple] = COLOURS
) -> list[Thing]:
    """Return the objects in one image. One that has none of the shapes is a "blob".

    unit: the number of pixels per unit of the world; default: the shorter side / 32.
    colours: red, green and blue in 0..1 of the colours that objects may have, by name.
    """
    pixels = np.asarray(image, np.float64)
    h, w = pixels.shape[1:]
    unit = unit or min(h, w) / WORLD

    ground = np.median(pixels.reshape(3, -1), axis=1)
    difference = pixels - ground[:, None, None]                     # (3, H, W)
    distance = np.sqrt((difference ** 2).sum(0))                    # (H, W)
    patches = number_patches(distance > DIFFERS)

    things = []
    for number in np.unique(patches)[1:]:       # the first is 0, which is the ground
        patch = patches == number
        others = (patches > 0) & ~patch
        core = patch & (distance > 0.8 * distance[patch].max())
        alpha = opacity(patch, others, core, difference)
        if alpha.sum() < SMALLEST_AREA * unit ** 2:
            continue                            # dust
        colour = nearest_colour(pixels[:, core].mean(1), colours)
        things.append(explain(alpha, colour, unit))
    return things


def spread(values: np.ndarray, distance: int) -> np.ndarray:
    """Return the largest value within `distance` pixels of each pixel, (H, W)."""
    window = 2 * distance + 1
    images = torch.from_numpy(values)[None].double()
    return torch.max_pool2d(images, window, 1, distance)[0].numpy()


def number_patches(mask: np.ndarray) -> np.ndarray:
    """Give every connected patch of a mask (H, W) a number of its own; the rest is 0.

    Pixels that touch, at corners too, are connected. Every pixel begins with a number
    of its own, then takes the largest of its neighbours' until nothing changes.
    """
    numbers = mask * (1.0 + np.arange(mask.size).reshape(mask.shape))
    while True:
        larger = spread(numbers, 1) * mask
        if (larger == numbers).all():
            return numbers
        numbers = larger


def opacity(
    patch: np.ndarray, others: np.ndarray, core: np.ndarray, difference: np.ndarray
) -> np.ndarray:
    """Return how much of each pixel the object of a patch covers, (H, W) in 0..1.

    A pixel at its edge mixes its colour, which is that of the patch's core, with the
    ground's. So its share of the pixel is the pixel's difference from the ground,
    (3, H, W), projected onto the core's.
    """
    ink = np.median(difference[:, core], axis=1)                    # (3,)
    projected = np.tensordot(ink, difference, 1) / (ink @ ink)      # (H, W)
    near = (spread(patch, 2) > 0) & ~others
    alpha = near * projected.clip(0, 1)
    alpha[alpha < 0.1] = 0
    return alpha


def nearest_colour(colour: np.ndarray, colours: dict[str, tuple]) -> str:
    """Return the name of the colour, in 0..1, that is nearest to one in [-1, 1]."""
    palette = np.array(list(colours.values())) * 2 - 1              # (n, 3) in [-1, 1]
    squared_distances = ((palette - colour) ** 2).sum(1)
    return list(colours)[int(squared_distances.argmin())]


def explain(alpha: np.ndarray, colour: str, unit: float) -> Thing:
    """Return the object that covers the pixels as alpha (H, W) says."""
    h, w = alpha.shape
    area = alpha.sum()
    radius = np.sqrt(area / np.pi)
    x = mean_column(alpha, area)
    y = mean_column(alpha.T, area)

    errors = []
    for shape in SHAPES:
        rendered = coverage(shape, radius, x, y, h, w)
        errors.append(np.abs(alpha - rendered).sum() / area)
    best = int(np.argmin(errors))
    shape = SHAPES[best] if errors[best] < LARGEST_ERROR else BLOB
    size = "small" if radius < SMALL_BELOW * unit else "big"
    return Thing(shape, colour, size, radius, x, y)


def mean_column(alpha: np.ndarray, area: float) -> float:
    """Return the horizontal centroid of what covers alpha (H, W); area is its sum."""
    centres = np.arange(alpha.shape[1]) + 0.5
    return (alpha * centres).sum() / area


def has_blob(things: list[Thing]) -> bool:
    """True if one of the found objects has none of the shapes."""
    return any(thing.shape == BLOB for thing in things)


def without_blobs(things: list[Thing]) -> list[Thing]:
    """Return the found objects that have one of the shapes."""
    return [thing for thing in things if thing.shape != BLOB]
