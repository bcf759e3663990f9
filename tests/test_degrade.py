"""data/degrade.py: what an image lacks follows from (seed, item), and is of the right kinds."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tinyldm.data.dataset import content_bytes
from tinyldm.data.degrade import Degraded, bicubic, random_mask, shrink
from tinyldm.data.shapes import CLASSES, Shapes

SIDE = 96


def rngs(n):
    return [np.random.default_rng(i) for i in range(n)]


# ---- masks

@pytest.fixture(scope="module")
def masks():
    return [random_mask(SIDE, SIDE, np.random.default_rng([0, i])) for i in range(300)]


def n_edges(mask):
    """How often a row differs from the row above it, or a column from its neighbour."""
    m = mask[0]
    rows = int((m[1:] != m[:-1]).any(1).sum())
    columns = int((m.mT[1:] != m.mT[:-1]).any(1).sum())
    return max(rows, columns)


def breadth(mask):
    """The side of the largest square that fits into a hole, as a share of the image's."""
    inside = mask[0] > 0
    side = 0
    while inside.any():
        inside = inside[1:, 1:] & inside[1:, :-1] & inside[:-1, 1:] & inside[:-1, :-1]
        side += 1
    return side / SIDE


def test_masks_are_of_0_and_1_and_never_empty_or_full(masks):
    for mask in masks:
        assert mask.shape == (1, SIDE, SIDE)
        assert mask.unique().tolist() == [0, 1]


def test_an_empty_or_a_full_mask_is_drawn_anew():
    """On an image of 2 px most masks would be full."""
    for i in range(100):
        assert 0 < random_mask(2, 2, np.random.default_rng([0, i])).mean() < 1


def test_coverage_of_masks(masks):
    """From a scratch to half of the image, a seventh at the median."""
    shares = torch.stack([mask.mean() for mask in masks])
    assert 0.003 < shares.min() < 0.03
    assert 0.4 < shares.max() < 0.75
    assert 0.12 < shares.median() < 0.18


def test_masks_are_boxes_or_strokes_and_strokes_wide_or_narrow(masks):
    """Up to 3 boxes, 0.15 or more wide, have at most 6 edges a side; round strokes have many."""
    boxes = np.array([breadth(mask) for mask in masks if n_edges(mask) <= 6])
    strokes = np.array([breadth(mask) for mask in masks if n_edges(mask) > 6])
    assert 120 < (boxes > 0.14).sum() < 180
    assert max(boxes) < 0.6
    assert 120 < len(strokes) < 180
    assert 0.02 < strokes.min()
    assert (strokes < 0.07).sum() > 15
    assert (strokes > 0.15).sum() > 30


def test_masks_hide_every_part_of_the_image(masks):
    """No edge or corner is always known, and no side is hidden more than the other."""
    often = torch.stack(masks).mean(0)[0]
    assert 0.01 < often.min() and often.max() < 0.6
    assert abs(often[:, :48].mean() - often[:, 48:].mean()) < 0.05
    assert abs(often[:48].mean() - often[48:].mean()) < 0.05


# ---- small images

def smooth_image(h=40, w=56):
    """An image that is smooth, and different in every direction and channel."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    waves = (6 * x + 3 * y).sin() / 2 + 0.5
    return torch.stack([x, y * y, waves]) * 1.6 - 0.8


def test_bicubic_is_pillows():
    noise = torch.randn(3, 40, 56, generator=torch.Generator().manual_seed(0))
    x = smooth_image() + 0.1 * noise
    pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, 2).numpy()
    wanted = np.array(Image.fromarray(pixels).resize((14, 10), Image.Resampling.BICUBIC))
    got = shrink(x, np.random.default_rng(0), chain=False)
    assert got.shape == (3, 10, 14)
    assert_close(got, torch.from_numpy(wanted).movedim(2, 0) / 127.5 - 1)
    assert bicubic(x, 80, 60).shape == (3, 60, 80)


def test_the_chain_loses_more_but_leaves_the_image():
    """Its images are near the bicubic one, never the same, and sometimes clean."""
    x = smooth_image()
    clean = shrink(x, np.random.default_rng(0), chain=False)
    degraded = torch.stack([shrink(x, rng, chain=True) for rng in rngs(60)])
    errors = (degraded - clean).square().mean((1, 2, 3)).sqrt()
    assert (errors > 0).all()
    assert errors.min() < 0.03
    assert 0.05 < errors.max() < 0.12
    assert (degraded.mean(0) - clean).abs().mean() < 0.03


def test_the_chain_adds_noise():
    """In an even grey only the noise is seen."""
    grey = torch.zeros(3, 64, 64)
    noise = torch.stack([shrink(grey, rng, chain=True).std() for rng in rngs(30)])
    assert noise.min() < 0.01
    assert 0.03 < noise.max() < 8 / 127.5 * 1.2


def test_the_chain_blurs():
    """Stripes become greyer than bicubic shrinking leaves them."""
    stripes = torch.zeros(3, 64, 64)
    stripes[:, :, torch.arange(64) // 4 % 2 == 0] = 0.8
    clean = shrink(stripes, np.random.default_rng(0), chain=False).std()
    blurred = torch.stack([shrink(stripes, rng, chain=True).std() for rng in rngs(60)])
    assert blurred.min() < 0.6 * clean


def test_the_chain_is_no_darker():
    grey = torch.full((3, 64, 64), 100 / 127.5 - 1)
    got = torch.stack([shrink(grey, rng, chain=True) for rng in rngs(40)])
    assert abs((got.mean() + 1) * 127.5 - 100) < 0.2


# ---- the data set

@pytest.mark.parametrize("chain", [False, True])
def test_what_item_i_lacks_follows_from_seed_and_i(chain):
    """The order in which items are read does not matter; their other fields stay."""
    data = Shapes(6, 32)

    def degraded(seed):
        return Degraded(Degraded(data, "mask", seed), "small", seed, chain)

    items = [degraded(3)[i] for i in range(6)]
    again = degraded(3)
    other = degraded(4)
    for i in (4, 0, 5):
        item = again[i]
        assert item.keys() == {*data[i], "small", "mask"}
        for name, value in data[i].items():
            assert content_bytes(item[name]) == content_bytes(value)
        assert item["small"].shape == (3, 8, 8)
        assert item["mask"].shape == (1, 32, 32)
        assert torch.equal(item["small"], items[i]["small"])
        assert torch.equal(item["mask"], items[i]["mask"])
        assert not torch.equal(item["mask"], other[i]["mask"])
        assert torch.equal(item["small"], other[i]["small"]) != chain

    different = {item["mask"].numpy().tobytes() for item in items}
    assert len(different) == 6


def test_a_degraded_data_set_answers_as_the_one_within():
    data = Shapes(6, 32)
    degraded = Degraded(Degraded(data, "mask", 0), "small", 0)
    assert len(degraded) == 6
    assert degraded.label_names == degraded.box_names == degraded.map_names == CLASSES
    assert degraded.has_exact_scorer
    assert degraded.captions() == data.captions()
    assert degraded.prompts(3) == data.prompts(3)
    assert degraded.seen_labels() == data.seen_labels()
    for field in ("mask", "small", "caption"):
        degraded.require_field(field)


def test_the_fingerprint_says_how_images_are_degraded():
    data = Shapes(6, 32)
    fingerprints = [
        data.fingerprint(),
        Degraded(data, "mask", 0).fingerprint(),
        Degraded(data, "small", 0).fingerprint(),
        Degraded(data, "small", 1).fingerprint(),
        Degraded(data, "small", 0, chain=True).fingerprint(),
        Degraded(Shapes(6, 16), "small", 0).fingerprint(),
    ]
    assert len({str(fingerprint) for fingerprint in fingerprints}) == 6


def test_a_share_of_masks_hides_all_of_the_image():
    """The others are those that there would be without."""
    data = Shapes(60, 16)
    plain = Degraded(data, "mask", 0)
    some = Degraded(data, "mask", 0, share_hidden=0.25)
    hidden = [bool(some[i]["mask"].all()) for i in range(60)]
    assert 8 < sum(hidden) < 24
    for i in range(60):
        assert hidden[i] or torch.equal(some[i]["mask"], plain[i]["mask"])
    assert some.fingerprint() != plain.fingerprint()
