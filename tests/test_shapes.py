"""data/world.py, data/shapes.py: the same world everywhere, and true captions."""
import zlib

import numpy as np
import pytest
import torch

from tinyldm.data import shapes
from tinyldm.data.scorer import parse_prompt
from tinyldm.data.shapes import Shapes
from tinyldm.data.world import (
    CLASSES,
    COLOURS,
    SEEN,
    SHAPES,
    SIZES,
    UNSEEN,
    Scene,
    prompts,
)

INVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


def test_the_world_is_the_same_on_every_machine():
    data = Shapes(seed=0)
    images = torch.stack([data[i]["image"] for i in range(32)])
    pixels = ((images + 1) * 127.5).round().byte()
    assert zlib.crc32(pixels.numpy().tobytes()) == 1547551370


def test_items_depend_on_seed_and_index_only():
    """The number of items does not matter; another seed gives other images."""
    a = Shapes(10, seed=1)
    b = Shapes(500, seed=1)
    assert torch.equal(a[7]["image"], b[7]["image"])
    assert a[7]["caption"] == b[7]["caption"] == b.captions()[7]
    assert not torch.equal(a[7]["image"], Shapes(10, seed=2)[7]["image"])


def test_every_epoch_has_new_images():
    """Item n + i is none of the items 0..n-1."""
    data = Shapes(10)
    assert not torch.equal(data[13]["image"], data[3]["image"])


def test_a_world_is_rich_enough():
    assert len(SHAPES) >= 4
    assert len(COLOURS) >= 7
    assert len(SIZES) >= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_rendered_shape_has_the_area_and_the_centroid_that_it_should(shape):
    yy, xx = np.mgrid[:64, :64] + 0.5
    cover = shapes.coverage(shape, 12.0, 30.3, 33.6, 64, 64)
    area = cover.sum()
    assert abs(area / (np.pi * 144) - 1) < 0.01
    assert abs((cover * xx).sum() / area - 30.3) < 0.1
    assert abs((cover * yy).sum() / area - 33.6) < 0.15


def test_captions_and_labels_agree_with_the_objects():
    """The label is the class of the object that is farther to the left, or above."""
    data = Shapes(60, seed=6)
    for i in range(60):
        item = data[i]
        things, caption, _ = data.scene(i)
        named, relation = parse_prompt(item["caption"])
        assert item["caption"] == caption
        assert [t.shape for t in named] == [t.shape for t in things]
        assert (len(things) == 2) == (relation is not None)

        first = things[0] if relation in (None, "left of", "above") else things[1]
        assert item["label"] == CLASSES.index(f"{first.colour} {first.shape}")


def test_boxes_enclose_the_pixels_of_label_maps():
    data = Shapes(60, seed=6)
    for i in range(60):
        item = data[i]
        boxes = item["boxes"]
        assert item["image"].abs().max() <= 1
        for kind, x0, y0, x1, y1 in boxes.tolist():
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1
            rows, columns = (item["segmentation"] == 1 + kind).nonzero().T
            is_only_one = (boxes[:, 0] == kind).sum() == 1
            if is_only_one:
                assert abs(columns.min() - 32 * x0) < 1.6
                assert abs(columns.max() + 1 - 32 * x1) < 1.6
                assert abs(rows.min() - 32 * y0) < 1.6
                assert abs(rows.max() + 1 - 32 * y1) < 1.6


def test_a_larger_image_shows_the_same_scene():
    """Boxes are shares of the side, so they stay; pixels are means of 2 x 2 pixels."""
    small = Shapes(8, 32)
    large = Shapes(8, 64)
    for i in range(8):
        torch.testing.assert_close(small[i]["boxes"], large[i]["boxes"])
        halved = torch.nn.functional.avg_pool2d(large[i]["image"], 2)
        assert (halved - small[i]["image"]).abs().mean() < 0.05


def test_training_never_shows_the_unseen_pairs_but_all_others():
    train = Shapes(4000)
    pairs = set()
    for i in range(4000):
        pairs |= {(thing.colour, thing.shape) for thing in train.scene(i)[0]}
    assert not pairs & UNSEEN
    assert len(pairs) == len(CLASSES) - len(UNSEEN) == len(SEEN)


def test_splits_share_no_scene():
    """Nor the same scene, said from the other object."""
    held_out = set(prompts(100_000, "held-out"))
    unseen = set(prompts(100_000, "unseen"))
    kept_back = held_out | unseen
    assert len(kept_back) > 2000
    assert not kept_back & set(Shapes(4000).captions())
    for prompt in prompts(200):
        (a, b), relation = parse_prompt(prompt)
        assert Scene((b, a), INVERSE[relation]).caption() in kept_back


def test_unseen_prompts_have_an_unseen_pair():
    for prompt in prompts(100, "unseen"):
        things, _ = parse_prompt(prompt)
        assert any((t.colour, t.shape) in UNSEEN for t in things)


def test_fingerprints_differ_where_items_do():
    worlds = [Shapes(9), Shapes(9, 64), Shapes(9, seed=1), Shapes(9, split="held-out")]
    prints = [data.fingerprint() for data in worlds]
    assert all(prints.count(p) == 1 for p in prints)
    assert Shapes(9).fingerprint() == prints[0]


def test_the_program_prints_prompts(capsys):
    """python -m tinyldm.data.shapes held-out 3"""
    shapes.main(["held-out", "3"])
    assert capsys.readouterr().out.splitlines() == prompts(3)
    with pytest.raises(SystemExit):
        shapes.main(["train", "3"])
