"""score.py: right on every clean picture, for every task, and wrong where the picture is wrong."""
import pytest
import torch

from tinyldm import BadInput, shapes
from tinyldm.degrade import Degraded
from tinyldm.score import find, follows, iou, parse_prompt, score
from tinyldm.shapes import Shapes, Thing

@pytest.mark.parametrize("split", ["train", "held-out", "unseen"])
@pytest.mark.parametrize("size", [32, 64])
def test_the_scorer_is_right_on_every_clean_picture(split, size):
    items = list(map(Shapes(200, size, seed=3, split=split).__getitem__, range(200)))
    assert score("text", [i["image"] for i in items], items) == {"prompts_followed": 1.0}


def test_the_score_is_the_share_of_prompts_followed():
    items = list(map(Shapes(4, seed=6).__getitem__, range(4)))
    for k in range(5):
        images = [i["image"] for i in items[:k]] + [torch.ones(3, 32, 32)] * (4 - k)
        assert score("text", images, items) == {"prompts_followed": k / 4}
        assert score("uncond", images, items)["well_formed"] == k / 4
        assert score("class", images, items) == {"classes_right": k / 4}


def test_the_scorer_finds_places_and_areas():
    data = Shapes(50, seed=4)
    for i in range(50):
        both = data.scene(i)[0], find(data[i]["image"])
        for asked, got in zip(*(sorted(v, key=lambda t: (t.x, t.y)) for v in both)):
            assert abs(asked.x - got.x) < 0.3 and abs(asked.y - got.y) < 0.3
            assert abs(asked.r - got.r) < 0.2


def test_wrong_prompts_are_told_from_right_ones():
    """Change any one word of a full caption: the picture no longer follows it."""
    data, checked = Shapes(200, seed=5), 0
    swaps = {"small": "big", "big": "small", "red": "blue", "blue": "cyan",
             "circle": "square", "square": "circle", "triangle": "cross", "cross": "triangle",
             "left": "right", "right": "left", "above": "below", "below": "above"}
    for i in range(200):
        item, things = data[i], find(data[i]["image"])
        words = item["caption"].split()
        if len(set(parse_prompt(item["caption"])[0])) < len(things):
            continue                                # twins: "left of" and "right of" are both true
        for k, w in enumerate(words):
            if w in swaps:
                wrong = " ".join([*words[:k], swaps[w], *words[k + 1:]])
                assert not follows(things, wrong), item["caption"]
                checked += 1
    assert checked > 500


def test_a_missing_or_third_object_fails():
    item = next(i for i in map(Shapes(50).__getitem__, range(50)) if len(i["boxes"]) == 2)
    things = find(item["image"])
    assert follows(things, item["caption"])
    assert not follows(things[:1], item["caption"])
    assert not follows([*things, things[0]], item["caption"])


def test_a_blob_is_no_shape():
    image = torch.full((3, 32, 32), 0.8)
    image[:, 10:12, 4:28] = torch.tensor(shapes.PALETTE[0]).float()[:, None, None]
    assert [t.shape for t in find(image)] == ["blob"]
    assert find(torch.full((3, 32, 32), 0.8)) == []


@pytest.mark.parametrize("p", ["", "a dog", "a red circle above", "red",
                               "a red circle on a blue square"])
def test_foreign_sentences_are_bad_input(p):
    with pytest.raises(BadInput, match="built-in world"):
        parse_prompt(p)


def test_sizes_may_be_left_out():
    things = [Thing("circle", "red", "big", 5, 10, 5), Thing("square", "blue", "small", 3, 11, 25)]
    assert follows(things, "a red circle above a blue square")
    assert follows(things, "a big red circle above blue square")
    assert not follows(things, "a small red circle above a blue square")


def degraded(n):
    data = Degraded(Degraded(Shapes(n, seed=7), "mask", 0), "small", 0)
    return [data[i] for i in range(n)]


def test_the_truth_has_the_best_score_in_every_task():
    items = degraded(100)
    x = torch.stack([i["image"] for i in items])
    assert score("layout", x, items)["mean_iou"] > 0.97
    assert score("layout", x, items)["classes_right"] == 1
    assert score("semantic", x, items)["pixels_right"] > 0.998
    assert score("semantic", x, items)["object_pixels_right"] > 0.98
    assert score("inpaint", x, items) == {"holes_sensible": 1.0, "known_error": 0.0}
    assert score("superres", x, items)["ssim"] == pytest.approx(1)


def test_the_pictures_of_other_items_score_badly():
    """Each picture is judged by the next item's condition."""
    items = degraded(100)
    x, other = torch.stack([i["image"] for i in items]), items[1:] + items[:1]
    assert score("class", x, other)["classes_right"] < 0.2
    assert score("layout", x, other)["mean_iou"] < 0.4
    assert score("layout", x, other)["classes_right"] < 0.2
    assert score("semantic", x, other)["object_pixels_right"] < 0.1
    assert score("inpaint", x, other)["known_error"] > 1
    assert score("inpaint", x, other)["holes_sensible"] < 0.2
    told = score("superres", x, other)
    assert told["psnr"] < told["bicubic_psnr"] - 3


def test_a_missing_or_further_object_costs_iou():
    item = next(i for i in degraded(50) if len(i["boxes"]) == 2)
    x = item["image"][None]
    one = item | {"boxes": item["boxes"][:1]}
    three = item | {"boxes": item["boxes"][[0, 1, 1]]}
    for asked, most in ((one, 1 / 2), (three, 2 / 3)):
        assert most - 0.05 < score("layout", x, [asked])["mean_iou"] <= most


def test_iou_by_hand():
    a = torch.tensor([[0., 0, 2, 2], [0, 0, 1, 1]])
    b = torch.tensor([[1., 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])
    assert iou(a, b).tolist() == [[pytest.approx(1 / 7), 1, 0], [0, 0.25, 0]]


def test_an_unfinished_hole_makes_no_sense():
    """The masked picture itself: where an object was cut, what is left is a blob or another one."""
    items = [i for i in degraded(60) if any(
        i["mask"][0][i["segmentation"] == k].mean() > 0.3
        and i["mask"][0][i["segmentation"] == k].mean() < 0.7
        for k in i["segmentation"].unique() if k > 0)]
    x = torch.stack([i["image"] * (1 - i["mask"]) + i["image"].amax() * i["mask"] for i in items])
    assert len(items) > 10 and score("inpaint", x, items)["holes_sensible"] < 0.3
