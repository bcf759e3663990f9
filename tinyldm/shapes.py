"""The built-in world: tiny pictures of coloured shapes with exact captions and an exact scorer.

Shapes: image (3, H, W) in [-1, 1]; boxes (K, 5) [class, x0, y0, x1, y1 in 0..1]; segmentation
        (H, W), 0 = ground, 1 + class, a colour-shape pair. Unit: side / 32. Reads: nothing of ours.
A picture has one or two objects (4 shapes, 7 colours, 2 sizes) on a plain ground with faint grain;
its caption names colour, shape, size and relation ("a small red circle left of a big blue square").
Everything follows from (seed, index) by + - * / and sqrt, so it is the same on every machine.
    python -m tinyldm.shapes held-out 256      # prints prompts that no training caption says
    python -m tinyldm.shapes unseen 256        # ... with unseen colour-shape pairs"""
import itertools
import sys
import zlib
from typing import NamedTuple

import numpy as np
import torch

# Left, up, right, down of the centroid, in radii: of the disc of the same area, for all shapes.
EXTENT = {"circle": (-1., -1., 1., 1.), "square": (-.8862, -.8862, .8862, .8862),
          "triangle": (-1.3468, -1.5551, 1.3468, .7776), "cross": (-1.189, -1.189, 1.189, 1.189)}
SHAPES = tuple(EXTENT)
COLOURS = {"red":  (.84, .10, .12), "orange": (.96, .52, .08), "yellow": (.97, .85, .10),
           "green": (.10, .58, .22), "cyan":  (.12, .74, .84), "blue":  (.12, .24, .78),
           "purple": (.58, .16, .66)}
SIZES = {"small": (3.4, 3.7), "big": (5.0, 5.3)}  # radius of the disc of the same area, world units
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
UNSEEN = {("purple", "circle"), ("orange", "square"), ("cyan", "triangle"), ("yellow", "cross")}
CLASSES = [f"{c} {s}" for c in COLOURS for s in SHAPES]
SEEN = [i for i, c in enumerate(CLASSES) if tuple(c.split()) not in UNSEEN]
PALETTE = np.array(list(COLOURS.values())) * 2 - 1
GAP, MARGIN = 2.0, 0.5                              # between objects; to the edge

class Thing(NamedTuple):
    shape: str
    colour: str
    size: str
    r: float = 0.0          # radius of the disc of the same area
    x: float = 0.0          # centroid, right and down
    y: float = 0.0

def coverage(shape: str, r: float, x: float, y: float, h: int, w: int) -> np.ndarray:
    """Share of each pixel in the shape, (h, w) in [0, 1], from its signed distance; in pixels."""
    dx, dy = np.arange(w) + .5 - x, np.arange(h)[:, None] + .5 - y
    ax, ay = np.abs(dx), np.abs(dy)
    near, far = np.minimum(ax, ay), np.maximum(ax, ay)
    d = {"circle": lambda: np.sqrt(dx * dx + dy * dy) - r, "square": lambda: far - .8862 * r,
         "triangle": lambda: np.maximum(dy, ax * .8660 - dy * .5) - .7776 * r,
         "cross": lambda: np.maximum(far - 1.189 * r, near - .3963 * r)}[shape]()
    return np.clip(.5 - d, 0, 1)

def name(t: Thing) -> str:
    return f"{t.colour} {t.shape}"

def boxes(things: list[Thing], side: int) -> torch.Tensor:
    """(K, 5) [class, x0, y0, x1, y1 in 0..1] of things in pixels, in a picture of side px."""
    ends = [[(c + e * t.r) / side for c, e in zip((t.x, t.y) * 2, EXTENT[t.shape])] for t in things]
    return torch.tensor([[CLASSES.index(name(t)), *b] for t, b in zip(things, ends)]).reshape(-1, 5)

def label_map(things: list[Thing], side: int) -> torch.Tensor:
    """(side, side) of 0 = ground, or 1 + class, of things in pixels."""
    out = np.zeros((side, side), np.int64)
    for t in things:
        out[coverage(t.shape, t.r, t.x, t.y, side, side) > .5] = 1 + CLASSES.index(name(t))
    return torch.from_numpy(out)

def caption(things: list[Thing], relation: str | None, sizes: bool = True) -> str:
    return f" {relation} ".join(f"a {t.size + ' ' if sizes else ''}{name(t)}" for t in things)

def _specs(split: str) -> tuple[list, list]:
    """All (things, relation) of one and of two objects of a split. `unseen`: with a pair of UNSEEN;
    `held-out`: an eighth of the scenes of two, by hash, in both orders; `train`: the rest."""
    kinds = [Thing(s, c, z) for z in SIZES for c in COLOURS for s in SHAPES]
    new = {t for t in kinds if (t.colour, t.shape) in UNSEEN}
    singles = [([a], None) for a in kinds if (a in new) == (split == "unseen")]
    pairs, ways = [], (("left of", "right of"), ("above", "below"))
    for a, b, (there, back) in itertools.product(kinds, kinds, ways):
        held = zlib.crc32(caption([a, b], there).encode()) % 8 == 0
        if ("unseen" if {a, b} & new else "held-out" if held else "train") == split:
            pairs += [([a, b], there), ([b, a], back)]
    return singles if split != "held-out" else [], pairs

def _place(things: list[Thing], relation: str | None, rng: np.random.Generator) -> list[Thing]:
    """Give each thing a radius and a place: in the picture, apart, the relation beyond doubt."""
    r = [lo + (hi - lo) * rng.random() for lo, hi in (SIZES[t.size] for t in things)]
    ext = np.array([EXTENT[t.shape] for t in things]) * np.array(r)[:, None]
    low, high = MARGIN - ext[:, :2], 32 - ext[:, 2:] - MARGIN
    if relation is None:
        at = low + (high - low) * rng.random((1, 2))
    else:
        k = 0 if RELATIONS[relation][0] else 1                             # axis of the relation
        a, b = (0, 1) if sum(RELATIONS[relation]) < 0 else (1, 0)          # a before b on the axis
        slack = high[b, k] - (ext[a, 2 + k] - ext[b, k] + GAP) - low[a, k]     # room along the axis
        at = (16 + 4 * (rng.random((2, 2)) - .5)).clip(low, high)          # the other axis: middle
        at[a, k] = low[a, k] + slack * .25 * rng.random()
        at[b, k] = high[b, k] - slack * .25 * rng.random()
    return [t._replace(r=ri, x=x, y=y) for t, ri, (x, y) in zip(things, r, at.tolist())]

class Shapes(torch.utils.data.Dataset):
    """`n` pictures of `size` px: `train`, `held-out` or `unseen`; item i depends on (seed, i)."""
    classes, labels, tars = CLASSES, CLASSES, None
    def __init__(self, n: int = 20_000, size: int = 32, seed: int = 0, split: str = "train"):
        self.n, self.size, self.key = n, size, [seed, zlib.crc32(split.encode())]
        self.singles, self.pairs = _specs(split)
    def __len__(self):
        return self.n
    def scene(self, i: int) -> tuple[list[Thing], str, np.random.Generator]:
        """Item i's placed things and caption. One in four has one object, one in five no sizes.
        Three of four relations are "left of" or "above": all four alike are hard to learn."""
        rng = np.random.default_rng([*self.key, i])
        few, terse, plain = rng.random() < .25, rng.random() < .2, rng.random() < .5
        specs = self.singles if few and self.singles else self.pairs
        k = int(rng.random() * len(specs))
        things, relation = specs[k - k % 2 if plain and specs is self.pairs else k]
        return _place(things, relation, rng), caption(things, relation, sizes=not terse), rng
    def captions(self) -> list[str]:
        return [self.scene(i)[1] for i in range(self.n)]
    def __getitem__(self, i: int) -> dict:
        things, text, rng = self.scene(i)
        side, unit = self.size, self.size / 32
        image = np.full((side, side, 3), .64 + .24 * rng.random())         # light grey ground
        things = [t._replace(r=t.r * unit, x=t.x * unit, y=t.y * unit) for t in things]
        for t in things:
            cover = coverage(t.shape, t.r, t.x, t.y, side, side)
            image += cover[..., None] * (PALETTE[list(COLOURS).index(t.colour)] - image)
        image += .04 * (rng.random((side, side, 1)) - .5)                  # faint grain
        image = torch.from_numpy(image.clip(-1, 1).astype(np.float32)).permute(2, 0, 1)
        first = min(things, key=lambda t: t.x + t.y)                       # as one reads
        return {"image": image, "caption": text, "label": CLASSES.index(name(first)),
                "boxes": boxes(things, side), "segmentation": label_map(things, side)}

def prompts(n: int, split: str = "held-out", seed: int = 0) -> list[str]:
    """n captions of a split that say all: two objects, both sizes."""
    pairs = _specs(split)[1]
    return [caption(*pairs[i]) for i in np.random.default_rng(seed).permutation(len(pairs))[:n]]

if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("held-out", "unseen") or not sys.argv[2].isdigit():
        sys.exit("usage: python -m tinyldm.shapes held-out|unseen N")
    print("\n".join(prompts(int(sys.argv[2]), sys.argv[1])))
