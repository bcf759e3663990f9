"""What the built-in world consists of, and which of its scenes each split has.

A scene is one object, or two and how they lie: "a small red circle left of a big blue
square". There are 4 shapes, 7 colours, 2 sizes and 4 relations; shapes.py makes images
of scenes.

Units: the world is 32 units wide, whatever the size of an image in pixels. x points to
       the right and y down, from the top left corner.
"""
import dataclasses
import functools
import zlib
from dataclasses import dataclass

import numpy as np

WORLD = 32                      # the side of the world, in units

# How far each shape reaches from its centroid to the left, up, right and down. The unit
# is the radius of the disc that has the shape's area, so that all shapes of one radius
# cover the same area.
EXTENT = {
    "circle": (-1.0, -1.0, 1.0, 1.0),
    "square": (-0.8862, -0.8862, 0.8862, 0.8862),
    "triangle": (-1.3468, -1.5551, 1.3468, 0.7776),
    "cross": (-1.189, -1.189, 1.189, 1.189),
}
SHAPES = tuple(EXTENT)

COLOURS = {                     # red, green, blue in 0..1
    "red": (0.84, 0.10, 0.12),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.97, 0.85, 0.10),
    "green": (0.10, 0.58, 0.22),
    "cyan": (0.12, 0.74, 0.84),
    "blue": (0.12, 0.24, 0.78),
    "purple": (0.58, 0.16, 0.66),
}

SIZES = {                       # smallest and largest radius, in units
    "small": (3.4, 3.7),
    "big": (5.0, 5.3),
}

RELATIONS = {                   # where the first object lies from the second: (x, y)
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}

# A class is a pair of colour and shape.
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)

# The pairs that no training image shows, and the numbers of the classes that some do.
UNSEEN = {
    ("purple", "circle"),
    ("orange", "square"),
    ("cyan", "triangle"),
    ("yellow", "cross"),
}
SEEN = [i for i, name in enumerate(CLASSES) if tuple(name.split()) not in UNSEEN]


@dataclass(frozen=True)
class Thing:
    """One object. radius, x and y are 0 until it has a place in an image."""

    shape: str
    colour: str
    size: str
    radius: float = 0.0         # of the disc of the same area
    x: float = 0.0              # of the centroid
    y: float = 0.0

    @property
    def class_name(self) -> str:
        """Its class, such as "red circle"."""
        return f"{self.colour} {self.shape}"

    @property
    def is_unseen(self) -> bool:
        """True if no training image shows an object of its class."""
        return (self.colour, self.shape) in UNSEEN

    def scaled(self, factor: float) -> "Thing":
        """Return the object with all lengths multiplied by a factor."""
        return dataclasses.replace(
            self, radius=self.radius * factor, x=self.x * factor, y=self.y * factor
        )


@dataclass(frozen=True)
class Scene:
    """What an image shows: one object, or two and where the first lies."""

    things: tuple[Thing, ...]
    relation: str | None = None

    def caption(self, sizes: bool = True) -> str:
        """Return the caption; without `sizes` it leaves out "small" and "big"."""
        names = []
        for thing in self.things:
            size = f"{thing.size} " if sizes else ""
            names.append(f"a {size}{thing.class_name}")
        return f" {self.relation} ".join(names)


@functools.cache                # there are thousands, and every Shapes needs them
def scenes_of(split: str) -> tuple[list[Scene], list[Scene]]:
    """Return all scenes of a split: those of one object, and those of two.

    `unseen` has those with a class of UNSEEN; `held-out` has an eighth of the other
    scenes of two objects; `train` has the rest.

    The scenes of two objects come in couples that show the same, seen from either
    object: scene 2 k is "left of" or "above", and scene 2 k + 1 is its inverse.
    """
    things = []
    for size in SIZES:
        for colour in COLOURS:
            for shape in SHAPES:
                things.append(Thing(shape, colour, size))

    singles = []
    for thing in things:
        split_of_thing = "unseen" if thing.is_unseen else "train"
        if split_of_thing == split:
            singles.append(Scene((thing,)))

    pairs = []
    for first in things:
        for second in things:
            for relation, inverse in (("left of", "right of"), ("above", "below")):
                scene = Scene((first, second), relation)
                if split_of_pair(scene) == split:
                    pairs.append(scene)
                    pairs.append(Scene((second, first), inverse))
    return singles, pairs


def split_of_pair(scene: Scene) -> str:
    """Return the split of a scene of two objects that is "left of" or "above"."""
    if any(thing.is_unseen for thing in scene.things):
        return "unseen"
    hashed = zlib.crc32(scene.caption().encode())
    return "held-out" if hashed % 8 == 0 else "train"


def prompts(n: int, split: str = "held-out", seed: int = 0) -> list[str]:
    """Return n captions of a split, in random order, of two objects and their sizes."""
    pairs = scenes_of(split)[1]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i].caption() for i in order[:n]]
