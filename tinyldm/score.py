"""The exact scorer of the built-in world: was the condition followed? It looks at pixels alone.

Shapes:  images (B, 3, H, W) in [-1, 1], one an item; an item is what was asked for, and the truth.
Reads:   shapes.py, metrics.py, degrade.py"""
import itertools
import re

import numpy as np
import torch

from tinyldm import require, shapes
from tinyldm.degrade import bicubic
from tinyldm.metrics import psnr, ssim
from tinyldm.shapes import COLOURS, PALETTE, RELATIONS, SHAPES, SIZES, Thing, coverage, name

def _components(mask: np.ndarray) -> np.ndarray:
    """(H, W) bool -> (H, W) int: 0, or one number for all pixels that touch, corners included."""
    label = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while (label != (label := _spread(label, 1) * mask)).any():
        pass                                # until no number spreads any further
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
    unit: pixels a world unit; by default the picture's side / 32."""
    image = np.asarray(image, np.float64)
    h, w = image.shape[1:]
    unit = unit or min(h, w) / 32
    delta = image - np.median(image.reshape(3, -1), axis=1)[:, None, None]
    away = np.sqrt((delta ** 2).sum(0))
    label, found = _components(away > .5), []
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

# ---- one function a task: the pictures and the items that were asked for -> figures
def whole(things: list[Thing]) -> list[Thing]:
    return [t for t in things if t.shape != "blob"]

def uncond_score(images, items, found) -> dict:
    """Well-formed: something is in the picture, and all of it has one of the four shapes."""
    found = list(found)
    return {"well_formed": np.mean([f != [] and whole(f) == f for f in found]),
            "things": np.mean([len(f) for f in found])}

def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of boxes (K, 4) and (L, 4), [x0, y0, x1, y1] -> (K, L)."""
    a, b = a[:, None], b[None]
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    area, area_a, area_b = (s.clamp(min=0).prod(-1) for s in
                            (sides, a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]))
    return area / (area_a + area_b - area)

def layout_score(images, items, found) -> dict:
    """Asked and found boxes are paired for the largest IoU; one that is left over counts as 0."""
    ious, right = [], []
    for x, item, things in zip(images, items, found):
        a, b = item["boxes"], shapes.boxes(whole(things)[:6], x.shape[-1])
        n = max(len(a), len(b), len(things))
        table = torch.zeros(n, n)
        table[:len(a), :len(b)] = iou(a[:, 1:], b[:, 1:])
        best = max(itertools.permutations(range(n)) if n <= 7 else [range(n)],
                   key=lambda p: sum(table[i, j] for i, j in enumerate(p)))
        ious += [float(table[i, j]) for i, j in enumerate(best)]
        right += [j < len(b) and bool(table[i, j] > 0 and a[i, 0] == b[j, 0])
                  for i, j in enumerate(best[:len(a)])]
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

SCORES = {
    "uncond": uncond_score, "layout": layout_score, "semantic": semantic_score,
    "superres": superres_score, "inpaint": inpaint_score,
    "class": lambda images, items, found: {"classes_right": np.mean(
        [[*shapes.CLASSES, ""][i["label"]] in map(name, f) for i, f in zip(items, found)])},
    "text": lambda images, items, found: {"prompts_followed": np.mean(
        [follows(f, i["caption"]) for i, f in zip(items, found)])}}

def score(task: str, images: torch.Tensor, items: list[dict], unit=None) -> dict[str, float]:
    """Figures by name: shares in 0..1, IoU, dB, SSIM, or numbers of things. unit: as find's."""
    found = (find(x, unit) for x in images)                     # only where it is looked at
    return {k: float(v) for k, v in SCORES[task](images, items, found).items()}
