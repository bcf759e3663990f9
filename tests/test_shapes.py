"""shapes.py: the same world everywhere, captions that tell the truth, a scorer that is right."""
import zlib

import numpy as np
import pytest
import torch

from tinyldm import BadInput, shapes
from tinyldm.shapes import SHAPES, UNSEEN, Shapes, Thing, find, follows, parse_prompt, score


def test_the_world_is_the_same_on_every_machine():
    data = Shapes(seed=0)
    images = torch.stack([data[i]["image"] for i in range(32)])
    assert zlib.crc32(((images + 1) * 127.5).round().byte().numpy().tobytes()) == 1547551370


def test_items_depend_on_seed_and_index_only():
    a, b = Shapes(10, seed=1), Shapes(500, seed=1)
    assert (a[7]["image"] == b[7]["image"]).all()
    assert a[7]["caption"] == b[7]["caption"] == b.captions()[7]
    assert (a[7]["image"] != Shapes(10, seed=2)[7]["image"]).any()


def test_a_world_is_rich_enough():
    assert len(SHAPES) >= 4 and len(shapes.COLOURS) >= 7 and len(shapes.SIZES) >= 2


@pytest.mark.parametrize("split", ["train", "held-out", "unseen"])
@pytest.mark.parametrize("size", [32, 64])
def test_the_scorer_is_right_on_every_clean_picture(split, size):
    items = list(map(Shapes(200, size, seed=3, split=split).__getitem__, range(200)))
    assert score([i["image"] for i in items], [i["caption"] for i in items]) == 1.0


def test_the_score_is_the_share_of_prompts_followed():
    data = Shapes(4, seed=6)
    images, prompts = [data[i]["image"] for i in range(4)], data.captions()
    for k in range(5):
        assert score(images[:k] + [torch.ones(3, 32, 32)] * (4 - k), prompts) == k / 4


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


def test_drawings_have_the_area_and_centroid_that_they_are_asked_for():
    yy, xx = np.mgrid[:64, :64] + 0.5
    for s in SHAPES:
        c = shapes.coverage(s, 12.0, 30.3, 33.6, 64, 64)
        assert abs(c.sum() / (np.pi * 144) - 1) < 0.01
        assert abs((c * xx).sum() / c.sum() - 30.3) < 0.1
        assert abs((c * yy).sum() / c.sum() - 33.6) < 0.15


def test_captions_boxes_labels_and_maps_agree():
    data = Shapes(60, seed=6)
    for i in range(60):
        item, (things, text, _) = data[i], data.scene(i)
        asked, relation = parse_prompt(item["caption"])
        assert [t.shape for t in asked] == [t.shape for t in things]
        assert (len(things) == 2) == (relation is not None)
        assert item["label"] == shapes.CLASSES.index(f"{things[0].colour} {things[0].shape}")
        assert item["caption"] == text and item["image"].abs().max() <= 1
        for kind, x0, y0, x1, y1 in item["boxes"].tolist():
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
            rows, cols = (item["segmentation"] == 1 + kind).nonzero().T
            if (item["boxes"][:, 0] == kind).sum() == 1:
                for pixel, edge in ((cols.min(), x0), (cols.max() + 1, x1),
                                    (rows.min(), y0), (rows.max() + 1, y1)):
                    assert abs(pixel - 32 * edge) < 1.6


def test_splits_share_no_scene_and_training_never_shows_the_unseen_pairs():
    train = Shapes(4000)
    pairs = {(t.colour, t.shape) for i in range(4000) for t in train.scene(i)[0]}
    assert not pairs & UNSEEN and len(pairs) == len(shapes.CLASSES) - len(UNSEEN)
    told = {t for split in ("held-out", "unseen") for t in shapes.prompts(100_000, split)}
    assert len(told) > 2000 and not told & set(train.captions())
    flipped = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for p in shapes.prompts(200):                   # nor the same scene, said from the other object
        (a, b), relation = parse_prompt(p)
        assert shapes.caption([b, a], flipped[relation]) in told
    assert all(any((t.colour, t.shape) in UNSEEN for t in parse_prompt(p)[0])
               for p in shapes.prompts(100, "unseen"))


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
