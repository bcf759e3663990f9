"""show/attention.py: what is observed has happened, and observing changes nothing."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm.conditioning import Context
from tinyldm.data.images import to_image
from tinyldm.data.tokenizer import train_tokenizer
from tinyldm.diffusion import cumulative, q_sample, sqrt_linear_betas
from tinyldm.guidance import guided
from tinyldm.show.attention import attention_maps, record_z_0, save_attention
from tinyldm.unet import UNet, UNetConfig

ABAR = cumulative(sqrt_linear_betas(1000))


def tiny_unet(ch_mult=(1,), attn_res=(), depth=1):
    """A U-Net with two heads of width 4 at its finest level; no parameter is zero."""
    cfg = UNetConfig(
        c_in=4, c_out=4, side=8, ch=8, ch_mult=ch_mult, n_res=1, attn_res=attn_res,
        d_head=4, d_ctx=6, depth=depth, groups=4,
    )
    unet = UNet(cfg)
    generator = torch.Generator().manual_seed(0)
    for p in unet.parameters():
        p.data = 0.7 * torch.randn(p.shape, generator=generator)
    return unet.eval().requires_grad_(False)


def inputs(n=3):
    """z_t on a grid of 4 x 8, t, and five tokens of width 6."""
    generator = torch.Generator().manual_seed(1)
    z_t = torch.randn(n, 4, 4, 8, generator=generator)
    t = torch.arange(n) * 300
    tokens = torch.randn(n, 5, 6, generator=generator)
    return z_t, t, tokens


def number_of_hooks(unet):
    n = 0
    for module in unet.modules():
        n += len(module._forward_hooks) + len(module._forward_pre_hooks)
    return n


# ---- attention maps

def naive_maps(attn, x, tokens, rows, columns):
    """Softmax of queries and keys, by place and head: (B, M, rows, columns)."""
    maps = torch.zeros(len(x), tokens.shape[1], rows, columns)
    for b in range(len(x)):
        for i in range(rows * columns):
            for head in range(attn.n_head):
                part = slice(4 * head, 4 * head + 4)
                q = (attn.to_q.weight @ x[b, i])[part]
                keys = [(attn.to_k.weight @ token)[part] for token in tokens[b]]
                scores = torch.stack([q @ k / 4 ** 0.5 for k in keys])
                maps[b, :, i // columns, i % columns] += scores.softmax(0) / attn.n_head
    return maps


@pytest.mark.parametrize("ch_mult,rows,columns", [((1,), 4, 8), ((1, 2), 2, 4)])
def test_maps_are_the_softmax_of_queries_and_keys(ch_mult, rows, columns):
    """For the block in the middle, on a wide grid: the latents' own, or a coarser one."""
    unet = tiny_unet(ch_mult)
    z_t, t, tokens = inputs()
    block = unet.middle[1].blocks[0]
    seen = []

    def keep_output(module, args, output):
        seen.append(output)

    hook = block.norm2.register_forward_hook(keep_output)
    with attention_maps(unet, 3, 4, 8) as maps:
        unet(z_t, t, tokens)
    hook.remove()

    expected = naive_maps(block.cross_attn, seen[0], tokens, rows, columns)
    assert len(maps) == 1
    assert block.cross_attn.n_head > 1
    assert_close(maps[0], F.interpolate(expected, (4, 8), mode="bilinear"))
    assert maps[0].std() > 0.05


def test_there_is_a_map_per_layer_whose_sum_over_tokens_is_1():
    """All are on the latent grid, whatever the grid of their layer."""
    unet = tiny_unet((1, 2), (8, 4), depth=2)
    with attention_maps(unet, 3, 4, 8) as maps:
        unet(*inputs())
    n_transformers = 1 + 1 + 1 + 2 + 2          # down, down, middle, up, up
    assert len(maps) == 2 * n_transformers
    for layer_map in maps:
        assert layer_map.shape == (3, 5, 4, 8)
        assert (layer_map >= 0).all()
        assert_close(layer_map.sum(1), torch.ones(3, 4, 8))


def test_calls_of_the_unet_are_numbered_from_0():
    unet = tiny_unet()
    batches = [inputs(2), inputs(3), inputs(4), inputs(5)]
    with attention_maps(unet, 9, 4, 8) as every:
        for batch in batches:
            unet(*batch)
    with attention_maps(unet, 9, 4, 8, calls={1, 3}) as some:
        for batch in batches:
            unet(*batch)
    assert [len(call) for call in every] == [2, 3, 4, 5]
    assert [len(call) for call in some] == [3, 5]
    assert torch.equal(some[0], every[1])
    assert torch.equal(some[1], every[3])


def test_only_the_last_n_of_the_batch_are_kept():
    unet = tiny_unet()
    with attention_maps(unet, 3, 4, 8) as all_maps:
        unet(*inputs())
    with attention_maps(unet, 2, 4, 8) as maps:
        unet(*inputs())
    assert torch.equal(maps[0], all_maps[0][1:])


def test_under_guidance_the_maps_are_those_with_the_condition():
    unet = tiny_unet()
    z_t, t, tokens = inputs()
    with attention_maps(unet, 3, 4, 8) as expected:
        unet(z_t, t, tokens)

    def eps_theta(z_t, t, ctx):
        return unet(z_t, t, *ctx)

    ctx_null = Context(tokens=torch.zeros(1, 5, 6))
    with attention_maps(unet, 3, 4, 8) as maps:
        guided(eps_theta, ctx_null, 2.0)(z_t, t, Context(tokens))
    assert_close(maps[0], expected[0])


def test_observing_changes_no_bit_and_leaves_nothing_behind():
    unet = tiny_unet((1, 2), (8,))
    before = unet(*inputs())
    with attention_maps(unet, 3, 4, 8) as maps:
        assert torch.equal(unet(*inputs()), before)
        assert number_of_hooks(unet) > 0
    n_maps = len(maps)
    assert n_maps > 0
    assert number_of_hooks(unet) == 0
    assert torch.equal(unet(*inputs()), before)
    assert len(maps) == n_maps


def test_a_compiled_unet_is_compiled_once_and_observed_alike():
    """However often it is called, and whichever calls are kept."""
    unet = tiny_unet()
    with attention_maps(unet, 3, 4, 8) as expected:
        unet(*inputs())

    torch._dynamo.reset()
    counter = CompileCounter()              # it compiles nothing, but counts
    unet.forward = torch.compile(unet.forward, dynamic=False, backend=counter)
    with attention_maps(unet, 3, 4, 8, calls={1, 2, 4}) as maps:
        for _ in range(6):
            unet(*inputs())
    assert counter.frame_count == 1
    assert len(maps) == 3 * len(expected)
    for observed, layer_map in zip(maps, expected * 3):
        assert_close(observed, layer_map)


def test_without_calls_to_keep_nothing_is_observed():
    """So a run without maps is not slowed down by them."""
    unet = tiny_unet()
    with attention_maps(unet, 3, 4, 8, calls=set()) as maps:
        assert number_of_hooks(unet) == 0
        unet(*inputs())
    assert maps == []


def test_no_hook_stays_after_an_exception():
    unet = tiny_unet()
    with pytest.raises(ZeroDivisionError), attention_maps(unet, 3, 4, 8):
        unet(*inputs())
        raise ZeroDivisionError
    assert number_of_hooks(unet) == 0


# ---- attention maps as an image

def encoding(*pieces):
    """An encoding like the tokenizers', of pairs (number of the word or None, token)."""
    word_ids = [word for word, _ in pieces]
    tokens = [token for _, token in pieces]
    return SimpleNamespace(word_ids=word_ids, tokens=tokens)


def tile(path, row, column):
    """The pixels (128, 128, 3) of a tile, below the 16 rows with its word."""
    y = row * 144 + 16
    x = column * 128
    return np.array(Image.open(path))[y:y + 128, x:x + 128].astype(float)


def corners(path, row, column, full):
    """Brightness at the corners, as shares of `full`: [[top left, right], [bottom]]."""
    pixels = tile(path, row, column).mean(-1)
    return (pixels[[8, -8]][:, [8, -8]] / full).round(1)


@pytest.fixture
def two_prompts(tmp_path):
    """The image of two prompts' attention, and the brightness of the samples.

    Of the first prompt, "red" is attended to at the top right, "square" at the bottom;
    of the second, "blue" at the bottom left.
    """
    path = tmp_path / "words.png"
    images = torch.full((2, 3, 8, 8), 0.6)
    maps = torch.zeros(2, 4, 2, 2)
    maps[0, 1, 0, 1] = 1
    maps[0, 2, 1, 0] = 1
    maps[0, 3, 1, 1] = 1
    maps[1, 0, 1, 0] = 1
    encodings = [
        encoding((None, "[CLS]"), (0, "red"), (1, "squ"), (1, "##are"), (2, "beyond")),
        encoding((0, "blue</w>"), (None, "[PAD]")),
    ]
    save_attention(images, maps, encodings, path)
    full = np.array(to_image(images[0]))[0, 0, 0]
    return path, full


def test_a_tile_is_bright_where_its_word_is_attended_to(two_prompts):
    """The maps of a word's tokens are averaged; the darkest place is not black."""
    path, full = two_prompts
    assert (tile(path, 0, 0) == full).all()
    assert (tile(path, 1, 0) == full).all()
    red = corners(path, 0, 1, full)
    assert (red > 0.9).tolist() == [[False, True], [False, False]]
    assert 0.1 <= red[1, 0] <= 0.2
    assert (corners(path, 0, 2, full) > 0.9).tolist() == [[False, False], [True, True]]
    assert (corners(path, 1, 1, full) > 0.9).tolist() == [[False, False], [True, False]]


def test_special_tokens_and_those_beyond_M_have_no_tile(two_prompts):
    path, _ = two_prompts
    assert Image.open(path).size == (3 * 128, 2 * 144)
    assert (tile(path, 1, 2) == 255).all()


def test_words_are_written_above_their_tiles(two_prompts):
    path, _ = two_prompts
    sheet = np.array(Image.open(path))
    has_text = np.zeros((2, 3), bool)
    for row in range(2):
        for column in range(3):
            heading = sheet[144 * row:144 * row + 16, 128 * column:128 * column + 128]
            has_text[row, column] = (heading < 255).any()
    assert has_text.tolist() == [[False, True, True], [False, True, False]]


@pytest.mark.parametrize("n_tokens,most_words", [(12, 9), (4, 4)])
def test_prompts_may_have_different_numbers_of_words(tmp_path, n_tokens, most_words):
    prompts = ["a red circle", "a small red circle above a big blue square", "a"]
    encodings = train_tokenizer(prompts).encode_batch(prompts)
    maps = torch.rand(3, n_tokens, 8, 8)
    save_attention(torch.zeros(3, 3, 8, 8), maps, encodings, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == ((1 + most_words) * 128, 3 * 144)


# ---- predicted z_0

def test_record_z_0_keeps_z_0_and_leaves_eps_alone():
    """With the exact eps it is z itself, at any t."""
    z, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    kept = []
    recording = record_z_0(lambda z_t, t, ctx: eps, ABAR, kept)
    for t in (0, 400, 900):
        t = torch.full((2,), t)
        z_t = q_sample(z, t, eps, ABAR)
        assert recording(z_t, t, Context()) is eps
    assert len(kept) == 3
    for z_0 in kept:
        assert z_0.dtype == torch.float32
        assert_close(z_0, z, rtol=1e-3, atol=1e-4)


def test_record_z_0_passes_all_inputs_on():
    def eps_theta(z_t, t, ctx):
        return z_t * t.view(-1, 1, 1, 1) + ctx.beside

    z_t = torch.randn(2, 3, 4, 4)
    t = torch.tensor([7, 7])
    ctx = Context(beside=torch.randn(2, 3, 4, 4))
    recording = record_z_0(eps_theta, ABAR, [])
    assert torch.equal(recording(z_t, t, ctx), eps_theta(z_t, t, ctx))
