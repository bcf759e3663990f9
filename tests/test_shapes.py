"""shapes.py: the same world everywhere, captions that tell the truth, splits that share nothing."""
import zlib

import numpy as np
import torch

from tinyldm import shapes
from tinyldm.score import parse_prompt
from tinyldm.shapes import SHAPES, UNSEEN, Shapes

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
        first = things[0] if relation in (None, "left of", "above") else things[1]
        assert item["label"] == shapes.CLASSES.index(f"{first.colour} {first.shape}")
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
