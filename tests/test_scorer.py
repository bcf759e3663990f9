"""data/finder.py, data/scorer.py: right on every clean image, wrong on wrong ones."""
import math

import numpy as np
import pytest
import torch

from tinyldm.data.degrade import Degraded
from tinyldm.data.finder import find
from tinyldm.data.scorer import (
    are_as_wanted,
    class_score,
    follows,
    hides_a_centre,
    inpaint_score,
    iou,
    layout_score,
    parse_prompt,
    semantic_score,
    superres_score,
    text_inpaint_score,
    text_score,
    well_formed_score,
)
from tinyldm.data.shapes import Shapes, place, render
from tinyldm.data.world import CLASSES, COLOURS, Scene, Thing
from tinyldm.errors import BadInput

GROUND = torch.full((3, 32, 32), 0.8)           # an image without objects
RED = 2 * torch.tensor(COLOURS["red"])[:, None, None] - 1


def items_of(data, n):
    return [data[i] for i in range(n)]


def images_of(items):
    return torch.stack([item["image"] for item in items])


@pytest.fixture(scope="module")
def degraded():
    """60 items with every field, mask and small included."""
    data = Degraded(Degraded(Shapes(60, seed=7), "mask", 0), "small", 0)
    return items_of(data, 60)


@pytest.fixture(scope="module")
def with_two_objects(degraded):
    return next(item for item in degraded if len(item["boxes"]) == 2)


# ---- what is found in an image

@pytest.mark.parametrize("split", ["train", "held-out", "unseen"])
@pytest.mark.parametrize("size,n", [(32, 100), (64, 40)])
def test_the_scorer_is_right_on_every_clean_image(split, size, n):
    items = items_of(Shapes(n, size, seed=3, split=split), n)
    assert text_score(images_of(items), items) == {"prompts_followed": 1.0}


def test_the_scorer_finds_places_and_areas():
    data = Shapes(50, seed=4)
    for i in range(50):
        truth = sorted(data.scene(i)[0], key=lambda thing: (thing.x, thing.y))
        found = sorted(find(data[i]["image"]), key=lambda thing: (thing.x, thing.y))
        assert len(truth) == len(found)
        for wanted, thing in zip(truth, found):
            assert abs(wanted.x - thing.x) < 0.3
            assert abs(wanted.y - thing.y) < 0.3
            assert abs(wanted.radius - thing.radius) < 0.2


def test_a_bar_is_a_blob_and_an_even_image_has_no_objects():
    image = GROUND.clone()
    image[:, 10:12, 4:28] = RED
    assert [thing.shape for thing in find(image)] == ["blob"]
    assert find(GROUND) == []


def test_close_objects_of_one_colour_are_found_apart():
    """Two squares of 8 x 8 pixels with one pixel between them: each has an area of 64."""
    image = GROUND.clone()
    image[:, 12:20, 6:14] = RED
    image[:, 12:20, 15:23] = RED
    things = find(image)
    assert [thing.class_name for thing in things] == ["red square", "red square"]
    assert [thing.x for thing in things] == pytest.approx([10, 19])
    for thing in things:
        assert math.pi * thing.radius ** 2 == pytest.approx(64)


def test_sizes_are_measured_in_units_of_the_world():
    """The same radius in pixels is big where a unit is small, and small where it is big."""
    image = Shapes(20)[0]["image"]
    sizes = [[thing.size for thing in find(image, unit)] for unit in (0.5, 1.0, 2.0)]
    assert set(sizes[0]) == {"big"}
    assert set(sizes[2]) == {"small"}
    assert find(image, 1.0) == find(image)


# ---- captions

SWAPS = {
    "small": "big", "big": "small", "red": "blue", "blue": "cyan", "circle": "square",
    "square": "circle", "triangle": "cross", "cross": "triangle", "left": "right",
    "right": "left", "above": "below", "below": "above",
}


def test_an_image_does_not_follow_a_caption_with_one_wrong_word():
    data = Shapes(200, seed=5)
    n_checked = 0
    for i in range(200):
        item = data[i]
        things = find(item["image"])
        named, _ = parse_prompt(item["caption"])
        are_twins = len(set(named)) < len(things)
        if are_twins:
            continue                            # "left of" and "right of" are both true
        words = item["caption"].split()
        for k, word in enumerate(words):
            if word in SWAPS:
                wrong = " ".join([*words[:k], SWAPS[word], *words[k + 1:]])
                assert not follows(things, wrong), item["caption"]
                n_checked += 1
    assert n_checked > 500


def test_a_missing_or_a_third_object_is_wrong(with_two_objects):
    caption = with_two_objects["caption"]
    things = find(with_two_objects["image"])
    assert follows(things, caption)
    assert not follows(things[:1], caption)
    assert not follows([*things, things[0]], caption)


@pytest.mark.parametrize(
    "prompt",
    ["", "a dog", "a red circle above", "red", "a red circle on a blue square"],
)
def test_other_sentences_are_bad_input(prompt):
    with pytest.raises(BadInput, match="built-in world"):
        parse_prompt(prompt)


def test_sizes_may_be_left_out():
    circle = Thing("circle", "red", "big", radius=5, x=10, y=5)
    square = Thing("square", "blue", "small", radius=3, x=11, y=25)
    things = [circle, square]
    assert follows(things, "a red circle above a blue square")
    assert follows(things, "a big red circle above blue square")
    assert not follows(things, "a small red circle above a blue square")


def test_a_relation_holds_if_it_is_larger_than_the_shift_across_it():
    """An object that is 4 pixels higher and 15 to the left is left of the other one."""
    circle = Thing("circle", "red", "big", radius=5, x=10, y=5)
    square = Thing("square", "blue", "small", radius=3, x=25, y=9)
    things = [circle, square]
    assert follows(things, "a red circle left of a blue square")
    assert follows(things, "a blue square right of a red circle")
    assert not follows(things, "a red circle above a blue square")
    assert not follows(things, "a blue square below a red circle")
    assert not follows(things, "a red circle right of a blue square")


# ---- scores

def test_scores_are_shares_of_images():
    """k of 4 images are right, the others have no objects."""
    items = items_of(Shapes(4, seed=6), 4)
    for k in range(5):
        images = torch.stack([item["image"] for item in items[:k]] + [GROUND] * (4 - k))
        assert text_score(images, items) == {"prompts_followed": k / 4}
        assert class_score(images, items) == {"classes_right": k / 4}
        assert well_formed_score(images, items)["well_formed"] == k / 4


def test_the_null_class_is_never_right():
    image = Shapes(1)[0]["image"][None]
    assert class_score(image, [{"label": len(CLASSES)}]) == {"classes_right": 0.0}


def test_the_truth_has_the_best_scores(degraded):
    x = images_of(degraded)
    layout = layout_score(x, degraded)
    assert layout["mean_iou"] > 0.97
    assert layout["classes_right"] == 1
    semantic = semantic_score(x, degraded)
    assert semantic["pixels_right"] > 0.998
    assert semantic["object_pixels_right"] > 0.98
    assert inpaint_score(x, degraded) == {"holes_sensible": 1.0, "known_error": 0.0}
    assert superres_score(x, degraded)["ssim"] == pytest.approx(1)


def test_the_images_of_other_items_score_badly(degraded):
    """Each image is compared with the next item's condition."""
    x = images_of(degraded)
    others = degraded[1:] + degraded[:1]
    assert class_score(x, others)["classes_right"] < 0.2
    layout = layout_score(x, others)
    assert layout["mean_iou"] < 0.4
    assert layout["classes_right"] < 0.2
    assert semantic_score(x, others)["object_pixels_right"] < 0.1
    inpaint = inpaint_score(x, others)
    assert inpaint["known_error"] > 1
    assert inpaint["holes_sensible"] < 0.2
    superres = superres_score(x, others)
    assert superres["psnr"] < superres["bicubic_psnr"] - 3


def test_a_missing_or_a_further_object_costs_iou(with_two_objects):
    """One of two found boxes is not wanted: 1/2. One of three wanted ones is gone: 2/3."""
    x = with_two_objects["image"][None]
    boxes = with_two_objects["boxes"]
    for wanted, most in ((boxes[:1], 1 / 2), (boxes[[0, 1, 1]], 2 / 3)):
        mean_iou = layout_score(x, [{"boxes": wanted}])["mean_iou"]
        assert most - 0.05 < mean_iou <= most


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])
    assert iou(a, b).tolist() == [[pytest.approx(1 / 7), 1, 0], [0, 0.25, 0]]


def hides_a_part(item):
    """True if the mask covers between 30 % and 70 % of an object."""
    for label in item["segmentation"].unique():
        hidden = item["mask"][0][item["segmentation"] == label].mean()
        if label > 0 and 0.3 < hidden < 0.7:
            return True
    return False


def test_an_unfinished_hole_is_not_sensible(degraded):
    """The holes are filled with the ground, so a part of each object is missing."""
    items = [item for item in degraded if hides_a_part(item)]
    filled = []
    for item in items:
        ground = item["image"].amax()
        filled.append(item["image"] * (1 - item["mask"]) + ground * item["mask"])
    assert len(items) > 10
    assert inpaint_score(torch.stack(filled), items)["holes_sensible"] < 0.3


def test_a_moved_object_does_not_complete_an_image(degraded):
    """It may be off by less than a 16th of the side, which is 2 pixels here."""
    items = [item | {"mask": 0 * item["mask"]} for item in degraded[:20]]
    x = images_of(items)
    assert inpaint_score(x.roll(1, 3), items)["holes_sensible"] > 0.9
    assert inpaint_score(x.roll(3, 3), items)["holes_sensible"] == 0


def test_a_blob_in_a_hole_is_not_sensible(degraded):
    """Nothing that can be seen is missing, but a bar has been added."""
    item = degraded[0]
    filled = item["image"].clone()
    filled[:, :2] = -1
    assert inpaint_score(item["image"][None], [item])["holes_sensible"] == 1
    assert inpaint_score(filled[None], [item])["holes_sensible"] == 0


def test_a_repainted_hole_must_hold_what_the_caption_says(degraded):
    """Holes that are filled with the ground, or captions of another colour, are not as asked."""
    hidden = [item for item in degraded if hides_a_centre(item["mask"], find(item["image"]))]
    seen = [item for item in degraded if not any(item is other for other in hidden)]
    assert len(hidden) > 10
    assert len(seen) > 10
    assert text_inpaint_score(images_of(degraded), degraded) == {
        "prompts_followed": 1.0, "holes_as_asked": 1.0, "known_exact": 1.0,
    }

    # Emptied: only what hides a centre counts for the holes.
    emptied = []
    for item in degraded:
        emptied.append(torch.where(item["mask"] > 0, item["image"].amax(), item["image"]))
    scores = text_inpaint_score(torch.stack(emptied), degraded)
    assert scores["holes_as_asked"] < 0.1
    assert scores["holes_as_asked"] < scores["prompts_followed"] < 1
    assert scores["known_exact"] == 1

    swapped = []
    for item in hidden:
        words = [SWAPS.get(word, word) for word in item["caption"].split()]
        swapped.append(item | {"caption": " ".join(words)})
    assert text_inpaint_score(images_of(hidden), swapped)["holes_as_asked"] < 0.1
    assert math.isnan(text_inpaint_score(images_of(seen), seen)["holes_as_asked"])


def test_one_wrong_pixel_outside_of_a_hole_is_not_exact(degraded):
    items = degraded[:4]
    images = images_of(items)
    y, x = (items[0]["mask"][0] == 0).nonzero()[0]
    images[0, 1, y, x] += 1e-6
    assert text_inpaint_score(images, items)["known_exact"] == 0.75


def test_only_changes_outside_of_holes_are_a_known_error(degraded):
    item = degraded[0]
    hole = item["mask"][0] > 0
    in_hole = item["image"].clone()
    in_hole[:, hole] -= 0.3
    outside = item["image"].clone()
    outside[:, ~hole] -= 0.3
    assert inpaint_score(in_hole[None], [item])["known_error"] == 0
    assert inpaint_score(outside[None], [item])["known_error"] == pytest.approx(0.3)


def test_a_colour_outside_the_world_is_found_by_its_name():
    """If it is given; else its objects have the nearest colour of the world."""
    colours = COLOURS | {"magenta": (0.74, 0.13, 0.42)}
    rng = np.random.default_rng(0)
    scene = Scene((Thing("cross", "magenta", "big"), Thing("square", "red", "small")), "above")
    image = render(place(scene, rng), 32, rng, colours)
    found = find(image, colours=colours)
    assert are_as_wanted(found, scene.things, scene.relation)
    assert not are_as_wanted(found, scene.things, "below")
    assert {thing.colour for thing in find(image)} == {"red", "purple"}
