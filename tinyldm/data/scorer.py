"""The exact scorer of the built-in world: does an image follow its condition?

finder.py finds the objects of an image from its pixels alone; here they are compared
with what the condition asks for. There is one function per kind of condition, and
tasks.py chooses.

Shapes: images (n, 3, H, W) in [-1, 1], one per item; items as data sets have them.
Units:  unit is the number of pixels per unit of the world; default: shorter side / 32.
"""
import itertools
import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tinyldm.data.degrade import bicubic
from tinyldm.data.finder import find, has_blob, without_blobs
from tinyldm.data.shapes import bounding_boxes, cover_of, label_map
from tinyldm.data.world import CLASSES, COLOURS, RELATIONS, SHAPES, SIZES, Thing
from tinyldm.errors import require
from tinyldm.metrics.images import psnr, ssim

MOST_PAIRED = 7             # boxes whose best pairing is searched: 7! = 5,040 ways


# ---- captions

def parse_prompt(prompt: str) -> tuple[list[Thing], str | None]:
    """Return the objects that a caption of this world names, and their relation.

    An object without a size has the size "". Raises BadInput for any other sentence.
    """
    size_words = "|".join(SIZES)
    colour_words = "|".join(COLOURS)
    shape_words = "|".join(SHAPES)
    relation_words = "|".join(RELATIONS)
    thing = rf"(?:a )?(?:({size_words}) )?({colour_words}) ({shape_words})"
    sentence = rf"{thing}(?: ({relation_words}) {thing})?"
    match = re.fullmatch(sentence, prompt.strip().lower())
    require(
        match,
        f"prompt {prompt!r:.99} is no sentence of the built-in world, so it has no "
        'score; say it like "a small red circle left of a big blue square"',
    )

    size, colour, shape, relation, size_2, colour_2, shape_2 = match.groups()
    things = [Thing(shape, colour, size or "")]
    if relation:
        things.append(Thing(shape_2, colour_2, size_2 or ""))
    return things, relation


def follows(things: list[Thing], prompt: str) -> bool:
    """True if the found objects are what a caption says.

    Raises BadInput for what is no caption of this world.
    """
    wanted, relation = parse_prompt(prompt)
    return are_as_wanted(things, wanted, relation)


def are_as_wanted(
    things: list[Thing], wanted: Sequence[Thing], relation: str | None
) -> bool:
    """True if found objects are the wanted ones, and lie as the relation says.

    Their number, colours, shapes and relation must be right, and the sizes if given.
    """
    if len(things) != len(wanted):
        return False
    for ordered in itertools.permutations(things):
        are_right = all(map(is_of_kind, ordered, wanted))
        if are_right and is_related(ordered[0], relation, ordered[-1]):
            return True
    return False


def is_of_kind(thing: Thing, wanted: Thing) -> bool:
    """True if an object has the wanted class, and the wanted size if there is one."""
    same_class = thing.class_name == wanted.class_name
    return same_class and wanted.size in ("", thing.size)


def is_related(first: Thing, relation: str | None, second: Thing) -> bool:
    """True if `first` is farther along the relation to `second` than across it."""
    if relation is None:
        return True
    dx = first.x - second.x
    dy = first.y - second.y
    direction_x, direction_y = RELATIONS[relation]
    along = dx * direction_x + dy * direction_y
    across = abs(dx * direction_y + dy * direction_x)
    return bool(along > across)


# ---- one score per kind of condition

def well_formed_score(
    images: Tensor, items: Sequence[dict], unit: float | None = None
) -> dict[str, float]:
    """Score images without a condition.

    Returns the share of images with some object and no blob, and the objects per image.
    """
    found = [find(x, unit) for x in images]
    well_formed = [bool(things) and not has_blob(things) for things in found]
    numbers = [len(things) for things in found]
    return {
        "well_formed": float(np.mean(well_formed)),
        "things": float(np.mean(numbers)),
    }


def class_score(
    images: Tensor, items: Sequence[dict], unit: float | None = None
) -> dict[str, float]:
    """Return the share of images that show an object of the item's class.

    A label beyond CLASSES, which is the null condition, is never right.
    """
    right = []
    for x, item in zip(images, items):
        label = item["label"]
        names = [thing.class_name for thing in find(x, unit)]
        right.append(label < len(CLASSES) and CLASSES[label] in names)
    return {"classes_right": float(np.mean(right))}


def text_score(
    images: Tensor, items: Sequence[dict], unit: float | None = None
) -> dict[str, float]:
    """Return the share of images that follow all that the item's caption says."""
    followed = []
    for x, item in zip(images, items):
        followed.append(follows(find(x, unit), item["caption"]))
    return {"prompts_followed": float(np.mean(followed))}


def layout_score(
    images: Tensor, items: Sequence[dict], unit: float | None = None
) -> dict[str, float]:
    """Return the mean IoU of wanted and found boxes, and the share of right classes.

    The boxes are paired for the largest sum of IoUs. One without a partner, wanted or
    found, counts as an IoU of 0.
    """
    ious = []
    classes_right = []
    for x, item in zip(images, items):
        things = find(x, unit)
        wanted = item["boxes"]
        found = bounding_boxes(without_blobs(things)[:6], x.shape[-1])

        # Rows and columns of 0 stand for missing partners, and make the table square.
        n = max(len(wanted), len(found), len(things))
        missing = (0, n - len(found), 0, n - len(wanted))
        table = F.pad(iou(wanted[:, 1:], found[:, 1:]), missing)    # (n, n)
        partners = best_partners(table)

        for i, j in enumerate(partners):
            ious.append(float(table[i, j]))
        for i, j in enumerate(partners[:len(wanted)]):
            is_right = table[i, j] > 0 and wanted[i, 0] == found[j, 0]
            classes_right.append(bool(is_right))
    return {
        "mean_iou": float(np.mean(ious)),
        "classes_right": float(np.mean(classes_right)),
    }


def semantic_score(
    images: Tensor, items: Sequence[dict], unit: float | None = None
) -> dict[str, float]:
    """Compare the found objects' label map with the item's.

    Returns the share of right pixels, and that of those pixels where an object is or
    should be.
    """
    wanted = torch.stack([item["segmentation"] for item in items])
    found_maps = []
    for x in images:
        things = without_blobs(find(x, unit))
        found_maps.append(label_map(things, wanted.shape[-1]))
    found = torch.stack(found_maps)                                 # (n, H, W)

    right = wanted == found
    is_object = (wanted > 0) | (found > 0)
    return {
        "pixels_right": float(right.double().mean()),
        "object_pixels_right": float(right[is_object].double().mean()),
    }


def superres_score(
    images: Tensor, items: Sequence[dict], unit: float | None = None
) -> dict[str, float]:
    """Return PSNR (dB) and SSIM to the truth, and those of a bicubic enlargement."""
    truth = torch.stack([item["image"] for item in items])
    h, w = truth.shape[2:]
    enlarged = torch.stack([bicubic(item["small"], w, h) for item in items])
    return {
        "psnr": float(psnr(truth, images).mean()),
        "ssim": float(ssim(truth, images).mean()),
        "bicubic_psnr": float(psnr(truth, enlarged).mean()),
        "bicubic_ssim": float(ssim(truth, enlarged).mean()),
    }


def inpaint_score(
    images: Tensor, items: Sequence[dict], unit: float | None = None
) -> dict[str, float]:
    """Return the share of sensibly filled holes, and the largest error outside of them.

    Holes are filled sensibly if the image has no blob, and is complete: each object of
    the true image of which a quarter or more can be seen has its class and its place.
    """
    sensible = []
    errors = []
    for x, item in zip(images, items):
        things = find(x, unit)
        kept = 1 - item["mask"][0]                                  # (H, W)
        side = x.shape[-1]

        are_complete = True
        for truth in find(item["image"]):
            share_seen = np.average(kept, weights=cover_of(truth, side))
            is_complete = any(is_same(thing, truth, side / 16) for thing in things)
            if share_seen >= 0.25 and not is_complete:
                are_complete = False
        sensible.append(are_complete and not has_blob(things))

        error = ((x - item["image"]) * kept).abs().max()
        errors.append(float(error))
    return {"holes_sensible": float(np.mean(sensible)), "known_error": max(errors)}


def text_inpaint_score(
    images: Tensor, items: Sequence[dict], unit: float | None = None
) -> dict[str, float]:
    """Compare repainted images with their captions, and what is known with the true images.

    Returns three shares: of images that follow all that their caption says; the same, of
    those whose hole hides the centre of an object of the true image, which the model can
    only know from the caption (NaN if there are none); and of images that are exactly the
    true ones outside of the holes.
    """
    followed = []
    followed_in_holes = []
    known_is_exact = []
    for x, item in zip(images, items):
        is_followed = follows(find(x, unit), item["caption"])
        followed.append(is_followed)
        if hides_a_centre(item["mask"], find(item["image"], unit)):
            followed_in_holes.append(is_followed)

        kept = (item["mask"] == 0).expand_as(x)                     # (3, H, W)
        known_is_exact.append(torch.equal(x[kept], item["image"][kept]))
    return {
        "prompts_followed": float(np.mean(followed)),
        "holes_as_asked": sum(followed_in_holes) / (len(followed_in_holes) or np.nan),
        "known_exact": float(np.mean(known_is_exact)),
    }


# ---- what the scores use

def hides_a_centre(mask: Tensor, things: list[Thing]) -> bool:
    """True if the centroid of an object lies where the mask (1, H, W) is 1."""
    return any(mask[0, int(thing.y), int(thing.x)] > 0 for thing in things)


def is_same(a: Thing, b: Thing, distance: float) -> bool:
    """True if two objects have one class, less than `distance` apart on each axis."""
    apart = max(abs(a.x - b.x), abs(a.y - b.y))
    return a.class_name == b.class_name and bool(apart < distance)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union, (K, L), of boxes (K, 4) and (L, 4).

    A box is [x0, y0, x1, y1].
    """
    a_start, a_end = a[:, None].split(2, -1)                        # (K, 1, 2) each
    b_start, b_end = b[None].split(2, -1)                           # (1, L, 2) each
    common_sides = torch.minimum(a_end, b_end) - torch.maximum(a_start, b_start)
    intersection = box_area(common_sides)                           # (K, L)
    area_a = box_area(a_end - a_start)
    area_b = box_area(b_end - b_start)
    return intersection / (area_a + area_b - intersection)


def box_area(sides: Tensor) -> Tensor:
    """Return the areas of boxes with these sides (..., 2); a negative side is none."""
    return sides.clamp(min=0).prod(-1)


def best_partners(table: Tensor) -> Sequence[int]:
    """Return the column for each row of a square table that gives the largest sum.

    All ways are tried; with more than MOST_PAIRED rows, row i takes column i.
    """
    n = len(table)
    if n > MOST_PAIRED:
        return range(n)

    def total(columns: Sequence[int]) -> Tensor:
        return sum(table[i, j] for i, j in enumerate(columns))

    return max(itertools.permutations(range(n)), key=total)
