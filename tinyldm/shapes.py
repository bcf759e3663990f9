"""The built-in world: tiny pictures of coloured shapes with exact captions and an exact scorer.

A picture has one or two objects (4 shapes, 7 colours, 2 sizes) on a plain ground with faint grain;
its caption names colour, shape, size and relation ("a small red circle left of a big blue square").
Everything follows from (seed, index) by + - * / and sqrt, so it is the same on every machine.
`score` looks at pictures alone and tells which share of the prompts was followed in full.

Shapes: image (3, H, W) in [-1, 1]; boxes (K, 5) [class, x0, y0, x1, y1 in 0..1]; segmentation
        (H, W), 0 = ground, 1 + class. A class is a colour-shape pair. World unit: side / 32.
Reads:  nothing of ours.

    python -m tinyldm.shapes held-out 256 > prompts.txt    # prompts that no training caption says
    python -m tinyldm.shapes unseen 256                    # ... with never-seen colour-shape pairs
"""
import itertools
import re
import sys
import zlib
from typing import NamedTuple

import numpy as np
import torch

from tinyldm import BadInput

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red":  (.84, .10, .12), "orange": (.96, .52, .08), "yellow": (.97, .85, .10),
           "green": (.10, .58, .22), "cyan":  (.12, .74, .84), "blue":  (.12, .24, .78),
           "purple": (.58, .16, .66)}
SIZES = {"small": (3.4, 3.7), "big": (5.0, 5.3)}  # radius of the disc of the same area, world units
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
UNSEEN = {("purple", "circle"), ("orange", "square"), ("cyan", "triangle"), ("yellow", "cross")}
CLASSES = [f"{c} {s}" for c in COLOURS for s in SHAPES]
PALETTE = np.array(list(COLOURS.values())) * 2 - 1
# Half-extents (left/right, up, down) in radii. All shapes of a size have the same area and their
# centroid in the middle, so the scorer gets size and place from sums over pixels alone.
EXTENT = {"circle": (1., 1., 1.), "square": (.8862, .8862, .8862),
          "triangle": (1.3468, 1.5551, .7776), "cross": (1.1890, 1.1890, 1.1890)}
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
    dx, dy = np.arange(w)[None, :] + .5 - x, np.arange(h)[:, None] + .5 - y
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        d = np.sqrt(dx * dx + dy * dy) - r
    elif shape == "square":
        d = np.maximum(ax, ay) - .8862 * r
    elif shape == "triangle":
        d = np.maximum(dy, ax * .8660 - dy * .5) - .7776 * r
    else:
        d = np.minimum(np.maximum(ax - 1.189 * r, ay - .3963 * r),
                       np.maximum(ax - .3963 * r, ay - 1.189 * r))
    return np.clip(.5 - d, 0, 1)


def caption(things: list[Thing], relation: str | None, sizes: bool = True) -> str:
    names = [f"a {t.size + ' ' if sizes else ''}{t.colour} {t.shape}" for t in things]
    return f" {relation} ".join(names)


def _specs(split: str) -> tuple[list, list]:
    """All (things, relation) of one and of two objects that belong to a split.

    `train`: no pair of UNSEEN, not held out. `held-out`: every eighth scene of two objects, by a
    hash that ignores which object is named first. `unseen`: scenes with a pair of UNSEEN.
    """
    kinds = [Thing(s, c, z) for z in SIZES for c in COLOURS for s in SHAPES]
    def new(things):
        return any((t.colour, t.shape) in UNSEEN for t in things)
    singles = [([a], None) for a in kinds if new([a]) == (split == "unseen")]
    pairs = []
    for a, b, relation in itertools.product(kinds, kinds, ("left of", "above")):
        held = zlib.crc32(caption([a, b], relation).encode()) % 8 == 0
        if ("unseen" if new([a, b]) else "held-out" if held else "train") == split:
            pairs += [([a, b], relation),
                      ([b, a], {"left of": "right of", "above": "below"}[relation])]
    return singles if split != "held-out" else [], pairs


def _place(things: list[Thing], relation: str | None, rng: np.random.Generator) -> list[Thing]:
    """Give each thing a radius and a place: in the picture, apart, the relation beyond doubt."""
    r = [SIZES[t.size][0] + (SIZES[t.size][1] - SIZES[t.size][0]) * rng.random() for t in things]
    ext = [[e * ri for e in EXTENT[t.shape]] for t, ri in zip(things, r)]  # sides, up, down
    low = [(e[0] + MARGIN, e[1] + MARGIN) for e in ext]
    high = [(32 - e[0] - MARGIN, 32 - e[2] - MARGIN) for e in ext]
    if relation is None:
        at = [[low[0][k] + (high[0][k] - low[0][k]) * rng.random() for k in (0, 1)]]
    else:
        k = 0 if RELATIONS[relation][0] else 1                             # axis of the relation
        a, b = (0, 1) if sum(RELATIONS[relation]) < 0 else (1, 0)          # a before b on the axis
        need = ext[a][k and 2] + ext[b][k] + GAP                           # centre to centre
        slack = high[b][k] - need - low[a][k]                              # room along the axis
        at = [[min(max(16 + 4 * (rng.random() - .5), lo[j]), hi[j]) for j in (0, 1)]
              for lo, hi in zip(low, high)]                                # the other axis: middle
        at[a][k] = low[a][k] + slack * .25 * rng.random()
        at[b][k] = high[b][k] - slack * .25 * rng.random()
    return [t._replace(r=ri, x=p[0], y=p[1]) for t, ri, p in zip(things, r, at)]


class Shapes(torch.utils.data.Dataset):
    """`n` pictures of `size` px: `train`, `held-out` or `unseen`; item i depends on (seed, i)."""
    classes = CLASSES

    def __init__(self, n: int = 20_000, size: int = 32, seed: int = 0, split: str = "train"):
        self.n, self.size, self.key = n, size, [seed, zlib.crc32(split.encode())]
        self.singles, self.pairs = _specs(split)

    def __len__(self):
        return self.n

    def scene(self, i: int) -> tuple[list[Thing], str, np.random.Generator]:
        """Item i's placed things and caption. One in four has one object, one in five no sizes.

        Three of four relations are "left of" or "above". Were all four as frequent, then who is
        named first would tell nothing of who is where unless the relation is read as well: an
        exclusive or, in front of which a toy run stood still (its relations a coin toss).
        """
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
        image = np.ones((side, side, 3)) * (.64 + .24 * rng.random())      # light grey ground
        segmentation = np.zeros((side, side), np.int64)
        boxes = []
        for t in things:
            cover = coverage(t.shape, t.r * unit, t.x * unit, t.y * unit, side, side)
            kind = CLASSES.index(f"{t.colour} {t.shape}")
            image += cover[..., None] * (PALETTE[list(COLOURS).index(t.colour)] - image)
            segmentation[cover > .5] = 1 + kind
            e, up, down = (v * t.r for v in EXTENT[t.shape])
            boxes.append([kind, (t.x - e) / 32, (t.y - up) / 32, (t.x + e) / 32, (t.y + down) / 32])
        image += .04 * (rng.random((side, side, 1)) - .5)                  # faint grain
        image = torch.from_numpy(image.clip(-1, 1).astype(np.float32)).permute(2, 0, 1)
        return {"image": image, "caption": text, "label": int(boxes[0][0]),
                "boxes": torch.tensor(boxes), "segmentation": torch.from_numpy(segmentation)}


def prompts(n: int, split: str = "held-out", seed: int = 0) -> list[str]:
    """n captions of a split that say all: two objects, both sizes."""
    pairs = _specs(split)[1]
    return [caption(*pairs[i]) for i in np.random.default_rng(seed).permutation(len(pairs))[:n]]


def _components(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (H, W) int: 0, or one number for all pixels that touch, corners included."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while (label != (label := _spread(label, 1) * mask)).any():
        pass
    return label


def _spread(a: np.ndarray, k: int) -> np.ndarray:
    """The largest value within k pixels of each pixel; (H, W) -> (H, W)."""
    p = np.pad(a, k)
    p = np.max([p[i:i + a.shape[0]] for i in range(2 * k + 1)], axis=0)
    return np.max([p[:, j:j + a.shape[1]] for j in range(2 * k + 1)], axis=0)


def find(image, unit: float | None = None) -> list[Thing]:
    """The things in one picture (3, H, W) in [-1, 1], from its pixels alone; places in pixels.

    Each connected patch that differs from the ground (the median colour) is explained by the
    palette's nearest colour and the shape whose drawing, with the patch's own area and centroid,
    errs least. A patch that no shape explains (more than 40 % of its area wrong) has shape "blob".
    unit: pixels a world unit; by default the picture's side / 32.
    """
    image = np.asarray(image, np.float64)
    h, w = image.shape[1:]
    unit = unit or min(h, w) / 32
    delta = image - np.median(image.reshape(3, -1), axis=1)[:, None, None]
    away = np.sqrt((delta ** 2).sum(0))
    label = _components(away > .5)
    found = []
    for k in np.unique(label)[1:]:
        core = (label == k) & (away > .8 * away[label == k].max())
        ink = np.median(delta[:, core], axis=1)                            # the object's own colour
        near = _spread(label == k, 2) & ((label == k) | (label == 0))
        alpha = near * (np.tensordot(ink, delta, 1) / (ink @ ink)).clip(0, 1)
        alpha[alpha < .1] = 0
        area = alpha.sum()
        if area < 4 * unit ** 2:
            continue                                                       # dust
        x = (alpha * (np.arange(w) + .5)).sum() / area
        y = (alpha.T * (np.arange(h) + .5)).sum() / area
        r = np.sqrt(area / np.pi)
        error = [np.abs(alpha - coverage(s, r, x, y, h, w)).sum() / area for s in SHAPES]
        shape = SHAPES[int(np.argmin(error))] if min(error) < .4 else "blob"
        colour = list(COLOURS)[int(((PALETTE - image[:, core].mean(1)) ** 2).sum(1).argmin())]
        found.append(Thing(shape, colour, "small" if r < 4.3 * unit else "big", r, x, y))
    return found


def parse_prompt(prompt: str) -> tuple[list[Thing], str | None]:
    """A sentence of this world -> its things (size "" if unsaid) and relation, or BadInput."""
    thing = rf"(?:a )?(?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    m = re.fullmatch(rf"{thing}(?: ({'|'.join(RELATIONS)}) {thing})?", prompt.strip().lower())
    if not m:
        raise BadInput(f"prompt {prompt!r} is not a sentence of the built-in world, so it cannot "
                       'be scored; say it like "a small red circle left of a big blue square"')
    g = m.groups()
    return [Thing(s, c, z or "") for z, c, s in ((g[0:3], g[4:7]) if g[3] else (g[0:3],))], g[3]


def follows(things: list[Thing], prompt: str) -> bool:
    """Do the found things say the prompt in full: number, colours, shapes, sizes and relation?"""
    asked, relation = parse_prompt(prompt)
    if len(asked) != len(things):
        return False
    for order in itertools.permutations(things):
        if all((a.shape, a.colour) == (t.shape, t.colour) and a.size in ("", t.size)
               for a, t in zip(asked, order)):
            if relation is None:
                return True
            dx, dy = order[0].x - order[1].x, order[0].y - order[1].y
            rx, ry = RELATIONS[relation]
            if (dx * rx > abs(dy)) if rx else (dy * ry > abs(dx)):
                return True
    return False


def right(things: list[Thing], prompt: str, task: str) -> bool:
    """Text: all as said. Class "red circle": one is in it. None: one or two things, none a blob."""
    if task == "none":
        return len(things) in (1, 2) and all(t.shape != "blob" for t in things)
    if task == "class":
        return any(f"{t.colour} {t.shape}" == prompt for t in things)
    return follows(things, prompt)


def score(images, prompts: list[str], unit: float | None = None, task: str = "text") -> float:
    """The share of prompts followed in full; images (B, 3, H, W) in [-1, 1], one a prompt."""
    done = [right(find(x, unit), p, task) for x, p in zip(images, prompts, strict=True)]
    return sum(done) / len(prompts)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("held-out", "unseen") or not sys.argv[2].isdigit():
        sys.exit("usage: python -m tinyldm.shapes held-out|unseen N")
    print("\n".join(prompts(int(sys.argv[2]), sys.argv[1])))
