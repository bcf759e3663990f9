"""The exact scorer of the built-in world: was the condition followed? It looks at pixels alone.

Shapes: images (B, 3, H, W) in [-1, 1], one an item. Reads: shapes.py, metrics.py, degrade.py"""
import itertools
import re

import numpy as np
import torch

from tinyldm import require, shapes
from tinyldm.degrade import bicubic
from tinyldm.metrics import psnr, ssim
from tinyldm.shapes import COLOURS, PALETTE, RELATIONS, SHAPES, SIZES, Thing, coverage, name

def spread(a: np.ndarray, k: int) -> np.ndarray:
    """The largest value within k pixels of each pixel; (H, W) -> (H, W)."""
    return torch.max_pool2d(torch.from_numpy(a)[None].double(), 2 * k + 1, 1, k)[0].numpy()

def find(image, unit: float | None = None) -> list[Thing]:
    """The things in one picture (3, H, W) in [-1, 1], from its pixels alone; places in pixels.
    Each connected patch that differs from the ground (the median colour) is explained by the
    palette's nearest colour and the shape whose drawing, with the patch's own area and centroid,
    errs least; if that is 40 % of its area, by a "blob". unit: px a world unit (side / 32)."""
    image = np.asarray(image, np.float64)
    h, w = image.shape[1:]
    unit = unit or min(h, w) / 32
    delta = image - np.median(image.reshape(3, -1), axis=1)[:, None, None]
    away = np.sqrt((delta ** 2).sum(0))
    label, found = (away > .5) * (1. + np.arange(h * w).reshape(h, w)), []
    while (label != (label := spread(label, 1) * (away > .5))).any():
        pass                                # until pixels that touch, corners too, have one number
    for k in np.unique(label)[1:]:
        core = (label == k) & (away > .8 * away[label == k].max())
        ink = np.median(delta[:, core], axis=1)                            # the object's own colour
        near = (spread(label == k, 2) > 0) & ((label == k) | (label == 0))
        alpha = near * (np.tensordot(ink, delta, 1) / (ink @ ink)).clip(0, 1)
        alpha[alpha < .1] = 0
        area = alpha.sum()
        if area < 4 * unit ** 2:
            continue                                                       # dust
        x, y = ((a * (np.arange(a.shape[1]) + .5)).sum() / area for a in (alpha, alpha.T))
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
    require(m, f"prompt {prompt!r:.99} is no sentence of the built-in world, so it has no score; "
            'say it like "a small red circle left of a big blue square"')
    g = m.groups()
    return [Thing(s, c, z or "") for z, c, s in ((g[0:3], g[4:7]) if g[3] else (g[0:3],))], g[3]

def follows(things: list[Thing], prompt: str) -> bool:
    """Do the found things say the prompt in full: number, colours, shapes, sizes and relation?"""
    asked, relation = parse_prompt(prompt)
    rx, ry = RELATIONS.get(relation, (0, 0))
    def said(order):
        dx, dy = order[0].x - order[-1].x, order[0].y - order[-1].y        # more along than across
        return (all(a[:3] == (t.shape, t.colour, a.size and t.size) for a, t in zip(asked, order))
                and (relation is None or dx * rx + dy * ry > abs(dx * ry + dy * rx)))
    return len(asked) == len(things) and any(map(said, itertools.permutations(things)))

# ---- one function a task: pictures, items (what was asked for, and the truth), things -> figures
def whole(things: list[Thing]) -> list[Thing]:
    return [t for t in things if t.shape != "blob"]

def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes (K, 4) and (L, 4), [x0, y0, x1, y1] -> (K, L)."""
    (a0, a1), (b0, b1) = a[:, None].split(2, -1), b[None].split(2, -1)
    sides = torch.minimum(a1, b1) - torch.maximum(a0, b0), a1 - a0, b1 - b0
    both, area_a, area_b = (s.clamp(min=0).prod(-1) for s in sides)
    return both / (area_a + area_b - both)

def layout_score(images, items, found) -> dict:
    """Asked and found boxes are paired for the largest IoU; one that is left over counts as 0."""
    ious, right = [], []
    for x, item, things in zip(images, items, found):
        a, b = item["boxes"], shapes.boxes(whole(things)[:6], x.shape[-1])
        n = max(len(a), len(b), len(things))
        table = torch.nn.functional.pad(iou(a[:, 1:], b[:, 1:]), (0, n - len(b), 0, n - len(a)))
        best = max(itertools.permutations(range(n)) if n <= 7 else [range(n)],
                   key=lambda p: sum(table[i, j] for i, j in enumerate(p)))
        ious += [float(table[i, j]) for i, j in enumerate(best)]
        right += [bool(table[i, j] > 0 and a[i, 0] == b[j, 0]) for i, j in enumerate(best[:len(a)])]
    return {"mean_iou": np.mean(ious), "classes_right": np.mean(right)}

def semantic_score(images, items, found) -> dict:
    """Agreement of all pixels, and of those where an object was asked for or found."""
    a = torch.stack([i["segmentation"] for i in items])
    b = torch.stack([shapes.label_map(whole(f), a.shape[-1]) for f in found])
    return {"pixels_right": (a == b).double().mean(),
            "object_pixels_right": (a == b)[(a > 0) | (b > 0)].double().mean()}

def superres_score(images, items, found) -> dict:
    truth = torch.stack([i["image"] for i in items])
    blur = torch.stack([bicubic(i["small"], *truth.shape[:1:-1]) for i in items])
    return {"psnr": psnr(truth, images).mean(), "ssim": ssim(truth, images).mean(),
            "bicubic_psnr": psnr(truth, blur).mean(), "bicubic_ssim": ssim(truth, blur).mean()}

def inpaint_score(images, items, found) -> dict:
    """A hole makes sense where nothing in the picture is a blob, and each object of the truth that
    is seen by a quarter or more is whole again: of its class, and where it was."""
    sense, known = [], []
    for x, item, things in zip(images, items, found):
        kept, side = 1 - item["mask"][0], x.shape[-1]
        seen = [t for t in find(item["image"]) if np.average(
            kept, weights=coverage(t.shape, t.r, t.x, t.y, side, side)) >= .25]
        sense.append(whole(things) == things and all(
            any(name(t) == name(o) and max(abs(t.x - o.x), abs(t.y - o.y)) < side / 16
                for t in things) for o in seen))
        known.append(((x - item["image"]) * kept).abs().max())
    return {"holes_sensible": np.mean(sense), "known_error": max(known)}

SCORES = {"layout": layout_score, "semantic": semantic_score, "superres": superres_score,
    "inpaint": inpaint_score, "uncond": lambda images, items, found: {  # something, all of a shape
        "well_formed": np.mean([f != [] and whole(f) == f for f in found]),
        "things": np.mean([*map(len, found)])},
    "class": lambda images, items, found: {"classes_right": np.mean(
        [[*shapes.CLASSES, ""][i["label"]] in map(name, f) for i, f in zip(items, found)])},
    "text": lambda images, items, found: {"prompts_followed": np.mean(
        [follows(f, i["caption"]) for i, f in zip(items, found)])}}

def score(task: str, images: torch.Tensor, items: list[dict], unit=None) -> dict[str, float]:
    """Figures by name: shares in 0..1, IoU, dB, SSIM, or numbers of things. unit: as find's."""
    found = [find(x, unit) for x in images if task != "superres"]
    return {k: float(v) for k, v in SCORES[task](images, items, found).items()}
