"""inside.py and pictures.py: what is watched is what happened, and watching changes nothing."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm.degrade import Degraded, to_image
from tinyldm.diffusion import cumulative, q_sample, sqrt_linear_betas
from tinyldm.guidance import guided
from tinyldm.inside import attention_maps, record, save_attention
from tinyldm.pictures import colour, condition, save_drawn, save_grid
from tinyldm.shapes import CLASSES, COLOURS, Shapes
from tinyldm.tokens import train_tokenizer
from tinyldm.unet import UNet, UNetConfig

ABAR = cumulative(sqrt_linear_betas(1000))


def tiny_unet(ch_mult=(1,), attn_res=(), depth=1):
    """Two heads of 4 a level-0 width of 8; no parameter is zero."""
    unet = UNet(UNetConfig(4, 4, 8, 8, ch_mult, 1, attn_res, 4, None, 6, depth, groups=4))
    g = torch.Generator().manual_seed(0)
    for p in unet.parameters():
        p.data = .7 * torch.randn(p.shape, generator=g)
    return unet.eval().requires_grad_(False)


def batch(n=3):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(n, 4, 4, 8, generator=g), torch.arange(n) * 300,
            torch.randn(n, 5, 6, generator=g))


def hooks(unet):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


# ---- attention

@pytest.mark.parametrize("ch_mult,rows,columns", [((1,), 4, 8), ((1, 2), 2, 4)])
def test_maps_are_the_softmax_of_queries_and_keys_by_hand(ch_mult, rows, columns):
    """One block, in the middle: place by place, head by head; on a wide grid, coarse or not."""
    unet, (z, t, ctx), seen = tiny_unet(ch_mult), batch(), []
    block = unet.middle[1].blocks[0]
    look = block.norm2.register_forward_hook(lambda m, args, out: seen.append(out))
    with attention_maps(unet, 3, 4, 8) as maps:
        unet(z, t, ctx)
    look.remove()
    attn, want = block.cross_attn, torch.zeros(3, 5, rows, columns)
    for b in range(3):
        for i in range(rows * columns):
            for h in range(attn.n_head):
                part = slice(4 * h, 4 * h + 4)
                q = (attn.to_q.weight @ seen[0][b, i])[part]
                scores = torch.stack([q @ (attn.to_k.weight @ c)[part] / 4 ** .5 for c in ctx[b]])
                want[b, :, i // columns, i % columns] += scores.softmax(0) / attn.n_head
    assert len(maps) == 1 and attn.n_head > 1
    assert_close(maps[0], F.interpolate(want, (4, 8), mode="bilinear"))
    assert maps[0].std() > .05


def test_each_place_looks_at_all_tokens_with_a_sum_of_1():
    """A map a layer, all on the latent grid, whatever theirs is."""
    unet = tiny_unet((1, 2), (8, 4), depth=2)
    with attention_maps(unet, 3, 4, 8) as maps:
        unet(*batch())
    assert len(maps) == 2 * (1 + 1 + 1 + 2 + 2)
    for a in maps:
        assert a.shape == (3, 5, 4, 8) and (a >= 0).all()
        assert_close(a.sum(1), torch.ones(3, 4, 8))


def test_calls_of_the_unet_are_numbered_from_0():
    unet, inputs = tiny_unet(), [batch(2), batch(3), batch(4), batch(5)]
    with attention_maps(unet, 9, 4, 8) as every:
        for i in inputs:
            unet(*i)
    with attention_maps(unet, 9, 4, 8, {1, 3}) as some:
        for i in inputs:
            unet(*i)
    assert [len(a) for a in every] == [2, 3, 4, 5] and [len(a) for a in some] == [3, 5]
    assert torch.equal(some[0], every[1]) and torch.equal(some[1], every[3])


def test_the_last_n_are_looked_at_which_under_guidance_have_the_condition():
    unet, (z, t, ctx) = tiny_unet(), batch()
    with attention_maps(unet, 3, 4, 8) as whole:
        unet(z, t, ctx)
    with attention_maps(unet, 2, 4, 8) as part:
        unet(z, t, ctx)
    assert torch.equal(part[0], whole[0][1:])
    with attention_maps(unet, 3, 4, 8) as maps:
        guided(unet, torch.zeros(1, 5, 6), 2.0)(z, t, ctx)
    assert_close(maps[0], whole[0])


def test_watching_changes_no_bit_and_leaves_nothing_behind():
    unet, inputs = tiny_unet((1, 2), (8,)), batch()
    before = unet(*inputs)
    with attention_maps(unet, 3, 4, 8) as maps:
        assert torch.equal(unet(*inputs), before) and hooks(unet) > 0
    n = len(maps)
    assert n > 0 and hooks(unet) == 0
    assert torch.equal(unet(*inputs), before) and len(maps) == n


def test_no_hook_stays_after_an_exception():
    unet = tiny_unet()
    with pytest.raises(ZeroDivisionError), attention_maps(unet, 3, 4, 8):
        unet(*batch())
        raise ZeroDivisionError
    assert hooks(unet) == 0


def encoding(*pieces):
    """(number of the word or None, token), ... as tokenizers' encodings have them."""
    return SimpleNamespace(word_ids=[w for w, _ in pieces], tokens=[p for _, p in pieces])


def tile(path, row, column):
    """The 128 x 128 px of a tile, below its word's 16 px; (128, 128, 3)."""
    y = row * 144 + 16
    return np.array(Image.open(path))[y:y + 128, column * 128:column * 128 + 128].astype(float)


def test_a_tile_a_word_bright_where_it_was_looked_at(tmp_path):
    """Pieces of a word are averaged, special tokens left out, those beyond M cut off."""
    path, images = tmp_path / "words.png", torch.full((2, 3, 8, 8), .6)
    maps = torch.zeros(2, 4, 2, 2)
    maps[0, 1, 0, 1] = 1                                                    # top right
    maps[0, 2:, 1] = torch.tensor([[1., 0.], [0., 1.]])                     # the bottom, together
    maps[1, 0, 1, 0] = 1                                                    # bottom left
    save_attention(images, maps, [
        encoding((None, "[CLS]"), (0, "red"), (1, "squ"), (1, "##are"), (2, "beyond")),
        encoding((0, "blue</w>"), (None, "[PAD]"))], path)
    assert Image.open(path).size == (3 * 128, 2 * 144)
    full = np.array(to_image(images[0]))[0, 0, 0]

    def corners(row, column):
        """Brightness of the corners, of that of the picture; [[top left, top right], [...]]."""
        t = tile(path, row, column)
        return (np.stack([[t[8, 8], t[8, -8]], [t[-8, 8], t[-8, -8]]]).mean(-1) / full).round(1)
    assert (tile(path, 0, 0) == full).all() and (tile(path, 1, 0) == full).all()
    assert (corners(0, 1) > .9).tolist() == [[False, True], [False, False]]
    assert (corners(0, 2) > .9).tolist() == [[False, False], [True, True]]
    assert (corners(1, 1) > .9).tolist() == [[False, False], [True, False]]
    assert .1 <= corners(0, 1)[1, 0] <= .2                                  # never quite black
    assert (tile(path, 1, 2) == 255).all()                                  # no second word
    sheet = np.array(Image.open(path))
    heads = [[(sheet[144 * r:144 * r + 16, 128 * c:128 * c + 128] < 255).any() for c in range(3)]
             for r in range(2)]
    assert heads == [[False, True, True], [False, True, False]]             # words above tiles


def test_prompts_may_have_different_numbers_of_words(tmp_path):
    texts = ["a red circle", "a small red circle above a big blue square", "a"]
    encodings = train_tokenizer(texts).encode_batch(texts)
    save_attention(torch.zeros(3, 3, 8, 8), torch.rand(3, 12, 8, 8), encodings, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == ((1 + 9) * 128, 3 * 144)
    save_attention(torch.zeros(3, 3, 8, 8), torch.rand(3, 4, 8, 8), encodings, tmp_path / "b.png")
    assert Image.open(tmp_path / "b.png").size == ((1 + 4) * 128, 3 * 144)


# ---- predicted z_0

def test_record_keeps_z_0_and_leaves_eps_alone():
    """With exact eps it is z itself, at any t."""
    g = torch.Generator().manual_seed(0)
    z, eps, kept = *torch.randn(2, 2, 3, 4, 4, generator=g), []
    watched = record(lambda z_t, t, ctx: eps, ABAR, kept)
    for t in (0, 400, 900):
        t = torch.full((2,), t)
        assert watched(q_sample(z, t, eps, ABAR), t, None) is eps
    assert len(kept) == 3
    for z_0 in kept:
        assert z_0.dtype == torch.float32
        assert_close(z_0, z, rtol=1e-3, atol=1e-4)


def test_record_passes_all_on():
    def eps_theta(z_t, t, ctx):
        return z_t * t.view(-1, 1, 1, 1) + ctx
    z, t, ctx = torch.randn(2, 3, 4, 4), torch.tensor([7, 7]), torch.randn(2, 3, 4, 4)
    assert torch.equal(record(eps_theta, ABAR, [])(z, t, ctx), eps_theta(z, t, ctx))


# ---- grids

def plain(*greys, h=48, w=32):
    return torch.tensor(greys).view(-1, 1, 1, 1).expand(-1, 3, h, w)


def test_a_grid_by_rows_each_picture_enlarged(tmp_path):
    """48 x 32 px three times as large, 4 px of white around each, the last row not full."""
    path = tmp_path / "grid.png"
    save_grid(plain(-1., -.6, -.2, .2, .6), path, 3)
    sheet = np.array(Image.open(path)).astype(int)
    assert sheet.shape == (2 * (144 + 4) + 4, 3 * (96 + 4) + 4, 3)
    levels = [0, 51, 102, 153, 204, 255]
    for i, level in enumerate(levels):
        y, x = 4 + i // 3 * 148, 4 + i % 3 * 100
        assert (sheet[y:y + 144, x:x + 96] == level).all()
        assert (sheet[y - 4:y, x:x + 96] == 255).all() and (sheet[y:y + 144, x - 4:x] == 255).all()


@pytest.mark.parametrize("side,shown", [(32, 96), (40, 120), (96, 96), (256, 256)])
def test_pictures_are_enlarged_to_96_px_at_least(side, shown, tmp_path):
    save_grid(plain(0., h=side, w=side), tmp_path / "a.png", 1)
    assert Image.open(tmp_path / "a.png").size == (shown + 8, shown + 8)


# ---- conditions as pictures

def rgb(x):
    return np.array(to_image(x))


GROUND, RED, BLUE = (220, 220, 220), (255, 0, 0), (0, 0, 255)


def test_colours_are_those_that_names_begin_with():
    assert colour(CLASSES.index("red cross"), CLASSES) == RED
    assert colour(CLASSES.index("blue circle"), CLASSES) == BLUE
    for k, name in enumerate(CLASSES):
        assert colour(k, CLASSES) == colour(k - k % 4, CLASSES), name
    assert len({colour(k, CLASSES) for k in range(28)}) == len(COLOURS)
    hues = [colour(k, ()) for k in range(20)]
    assert len(set(hues)) == 20 and all(0 <= v <= 255 for c in hues for v in c)
    assert colour(1, ("person", "", "zebra")) == colour(1, ())


def test_label_maps_have_the_colours_of_their_classes():
    """0 is the ground of the built-in world, and a class like others where none have names."""
    y = torch.zeros(4, 6, dtype=torch.int64)
    y[1, 2], y[3, 5] = 1 + CLASSES.index("red circle"), 1 + CLASSES.index("blue cross")
    got = rgb(condition("semantic", {"segmentation": y}, CLASSES, 4, 6))
    want = np.full((4, 6, 3), GROUND)
    want[1, 2], want[3, 5] = RED, BLUE
    assert (got == want).all()
    got = rgb(condition("semantic", {"segmentation": y}, (), 4, 6))
    assert len({tuple(v) for v in got.reshape(-1, 3).tolist()} | {GROUND}) == 4


def test_boxes_are_frames_in_the_colour_of_their_class():
    boxes = torch.tensor([[CLASSES.index("blue square"), .25, .5, .75, 1.]])
    got = rgb(condition("layout", {"boxes": boxes}, CLASSES, 9, 17))
    want = np.full((9, 17, 3), GROUND)
    want[4:9, 4:13] = BLUE
    want[5:8, 5:12] = GROUND
    assert (got == want).all()


def test_a_small_picture_is_shown_large_and_a_hole_black():
    item = Degraded(Degraded(Shapes(1, 32), "mask", 0), "small", 0)[0]
    got = condition("superres", item, CLASSES, 32, 32)
    assert_close(got, item["small"].repeat_interleave(4, 1).repeat_interleave(4, 2), atol=1e-5,
                 rtol=0)
    wide = condition("superres", {"small": item["small"][:, :4]}, CLASSES, 16, 32)
    assert wide.shape == (3, 16, 32)
    got, hole = condition("inpaint", item, CLASSES, 32, 32), item["mask"][0] > 0
    assert (got[:, hole] == -1).all() and torch.equal(got[:, ~hole], item["image"][:, ~hole])


@pytest.mark.parametrize("task", ["uncond", "class", "text"])
def test_what_is_no_picture_is_not_shown(task, tmp_path):
    assert condition(task, {}, CLASSES, 32, 32) is None
    save_drawn(plain(-1., 0.), [{}, {}], task, CLASSES, tmp_path / "a.png", 2)
    save_grid(plain(-1., 0.), tmp_path / "b.png", 2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("n,columns", [(5, 2), (4, 2), (2, 3)])
def test_each_row_of_pictures_lies_below_the_row_of_its_conditions(n, columns, tmp_path):
    """Conditions are darker than pictures here; the places of a last row that is not full white."""
    pictures = plain(*(.1 * i for i in range(n)))
    items = [{"image": -.1 * torch.ones(3, 48, 32) - .1 * i, "mask": torch.zeros(1, 48, 32)}
             for i in range(n)]
    save_drawn(pictures, items, "inpaint", (), tmp_path / "a.png", columns)
    sheet, rows = np.array(Image.open(tmp_path / "a.png")).astype(int), -(-n // columns)
    assert sheet.shape == (2 * rows * 148 + 4, columns * 100 + 4, 3)
    for i in range(rows * columns):
        for below in (0, 1):
            y, x = 4 + (2 * (i // columns) + below) * 148, 4 + i % columns * 100
            grey = (pictures[i, 0, 0, 0] if below else items[i]["image"][0, 0, 0]) if i < n else 1
            assert abs(sheet[y:y + 144, x:x + 96] - (float(grey) + 1) * 127.5).max() <= 1
