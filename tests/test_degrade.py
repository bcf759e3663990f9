"""degrade.py: what is lost is a function of (seed, item), and of the kinds that it should be."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tinyldm.degrade import Degraded, bicubic, draw_mask, shrink, to_image, to_tensor
from tinyldm.shapes import CLASSES, Shapes

SIDE = 96


@pytest.fixture(scope="module")
def masks():
    return [draw_mask(SIDE, np.random.default_rng([0, i])) for i in range(300)]


def bands(mask):
    """How often a row differs from the row above it, and so of columns; the larger."""
    m = mask[0]
    return max(int((m[1:] != m[:-1]).any(1).sum()), int((m.mT[1:] != m.mT[:-1]).any(1).sum()))


def breadth(mask):
    """Side of the largest square that fits into the hole, as a share of the picture's."""
    m, k = mask[0] > 0, 0
    while m.any():
        m, k = m[1:, 1:] & m[1:, :-1] & m[:-1, 1:] & m[:-1, :-1], k + 1
    return k / SIDE


def test_masks_are_of_0_and_1_and_never_empty_or_full(masks):
    for mask in masks:
        assert mask.shape == (1, SIDE, SIDE) and mask.unique().tolist() == [0, 1]


def test_an_empty_or_a_full_mask_is_drawn_anew():
    """On a picture of 2 px most are full; each is drawn until it is not."""
    small = [draw_mask(2, np.random.default_rng([0, i])) for i in range(100)]
    assert all(0 < m.mean() < 1 for m in small)


def test_coverage_of_masks(masks):
    """From a scratch to half of the picture, a seventh at the median."""
    shares = torch.stack([m.mean() for m in masks])
    assert .003 < shares.min() < .03 and .4 < shares.max() < .75
    assert .12 < shares.median() < .18


def test_masks_are_boxes_or_strokes_and_strokes_wide_or_narrow(masks):
    """Up to 3 boxes, 0.15 or more wide, have at most 6 edges a side; round strokes have many."""
    boxes = [breadth(m) for m in masks if bands(m) <= 6]
    strokes = np.array([breadth(m) for m in masks if bands(m) > 6])
    assert 120 < (np.array(boxes) > .14).sum() < 180 and max(boxes) < .6
    assert 120 < len(strokes) < 180
    assert .02 < strokes.min() and (strokes < .07).sum() > 15 and (strokes > .15).sum() > 30


def test_masks_hide_every_part_of_the_picture(masks):
    """No edge or corner is always known, nor is one side hidden more than the other."""
    often = torch.stack(masks).mean(0)[0]
    assert .01 < often.min() and often.max() < .6
    assert abs(often[:, :48].mean() - often[:, 48:].mean()) < .05
    assert abs(often[:48].mean() - often[48:].mean()) < .05


def test_8_bits_survive_the_way_to_an_image_and_back():
    levels = torch.arange(256).float() / 127.5 - 1
    x = torch.stack([levels, levels.flip(0), levels.roll(7)])[:, None].expand(3, 5, 256)
    assert to_image(x).size == (256, 5)
    assert_close(to_tensor(to_image(x)), x)
    assert np.array(to_image(x))[0, 10].tolist() == [10, 245, 3]


def test_to_image_rounds_to_nearest_and_clamps():
    x = (torch.tensor([99.6, 100.4, -50, 300]) / 127.5 - 1).expand(3, 1, 4)
    assert np.array(to_image(x))[0, :, 0].tolist() == [100, 100, 0, 255]


def picture(h=40, w=56):
    """Smooth, and other in every direction and channel."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    return torch.stack([x, y * y, (6 * x + 3 * y).sin() / 2 + .5]) * 1.6 - .8


def test_bicubic_is_pillows():
    x = picture() + .1 * torch.randn(3, 40, 56, generator=torch.Generator().manual_seed(0))
    data = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, 2).numpy()
    want = np.array(Image.fromarray(data).resize((14, 10), Image.Resampling.BICUBIC))
    got = shrink(x, np.random.default_rng(0), chain=False)
    assert got.shape == (3, 10, 14)
    assert_close(got, torch.from_numpy(want).movedim(2, 0) / 127.5 - 1)
    assert bicubic(x, 80, 60).shape == (3, 60, 80)


def test_the_chain_loses_more_but_leaves_the_picture():
    """Blur, noise and JPEG: everywhere near the bicubic one, never the same, sometimes clean."""
    x = picture()
    plain = shrink(x, np.random.default_rng(0), chain=False)
    far = torch.stack([(shrink(x, np.random.default_rng(i), True) - plain).square().mean().sqrt()
                       for i in range(60)])
    assert (far > 0).all() and far.max() < .12
    assert far.max() > .05 and far.min() < .03
    mean = torch.stack([shrink(x, np.random.default_rng(i), True) for i in range(60)]).mean(0)
    assert (mean - plain).abs().mean() < .03


def test_the_chain_blurs_and_adds_noise():
    """Of an even grey only noise is seen; a chequered one is greyer than bicubic leaves it."""
    grey, rngs = torch.zeros(3, 64, 64), [np.random.default_rng(i) for i in range(30)]
    noise = torch.stack([shrink(grey, rng, True).std() for rng in rngs])
    assert noise.min() < .01 and .03 < noise.max() < 8 / 127.5 * 1.2
    chequered = torch.zeros(3, 64, 64)
    chequered[:, :, torch.arange(64) // 4 % 2 == 0] = .8
    plain = shrink(chequered, rngs[0], False).std()
    blurred = torch.stack([shrink(chequered, rng, True).std() for rng in rngs])
    assert blurred.min() < .6 * plain


def test_the_chain_is_no_darker():
    grey = torch.full((3, 64, 64), 100 / 127.5 - 1)
    got = torch.stack([shrink(grey, np.random.default_rng(i), True) for i in range(40)])
    assert abs((got.mean() + 1) * 127.5 - 100) < .2


@pytest.mark.parametrize("chain", [False, True])
def test_what_item_i_loses_follows_from_seed_and_i(chain):
    """Nothing depends on the order in which items are looked at; all else of an item stays."""
    data = Shapes(6, 32)
    a, again, b = (Degraded(Degraded(data, "mask", seed), "small", seed, chain)
                   for seed in (3, 3, 4))
    items = [a[i] for i in range(6)]
    for i in (4, 0, 5):
        item, other = again[i], b[i]
        assert item.keys() == {*data[i], "small", "mask"}
        for k, v in data[i].items():
            assert torch.equal(item[k], v) if isinstance(v, torch.Tensor) else item[k] == v
        assert item["small"].shape == (3, 8, 8) and item["mask"].shape == (1, 32, 32)
        for k in ("small", "mask"):
            assert torch.equal(item[k], items[i][k])
        assert not torch.equal(item["mask"], other["mask"])
        assert torch.equal(item["small"], other["small"]) != chain
    assert len({i["mask"].numpy().tobytes() for i in items}) == 6
    assert len(a) == 6 and a.classes == a.labels == CLASSES
