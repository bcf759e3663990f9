"""tasks.py and both ports of the U-Net: what y and ctx are for each task, worked out by hand."""
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm import BadInput, presets
from tinyldm.autoencoder import AEConfig, Autoencoder, Pixels
from tinyldm.conditioning import ClassEmbedder, SpatialRescaler, TextConfig
from tinyldm.data import loader
from tinyldm.degrade import Degraded
from tinyldm.guidance import drop_condition, guided
from tinyldm.shapes import CLASSES, Shapes
from tinyldm.tasks import TASKS, inpaint_ctx, layout_y, superres_ctx
from tinyldm.unet import UNet, UNetConfig

ROW = dict(size=32, ch=8, ch_mult=(1, 2), n_res=1, attn_res=(8, 4), d_head=4, n_head=None, depth=1,
           groups=4, scale_shift=False, res_updown=False, d_ctx=12, n_classes=None, n_token=12,
           vocab_size=None, text_depth=1, text_heads=2, text_d_head=4, text_clip=False)


def alive(net, seed=0):
    """No parameter is zero, so that all of a net can be seen in what it says."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = .3 * torch.randn(p.shape, generator=g)
    return net.eval().requires_grad_(False)


def stage_one(f=4):
    levels = {2: (1, 2), 4: (1, 1, 2), 8: (1, 1, 1, 2)}
    if f == 1:
        return Pixels()
    return alive(Autoencoder(AEConfig(ch=8, ch_mult=levels[f], n_res=1, c_z=4, groups=4, side=32,
                                      attn_mid=False)))


def world(task, f=4):
    """-> y(batch), the stretched null, ctx(y), the U-Net and a batch of three pictures."""
    ae, data, row = stage_one(f), Shapes(8, 32), Namespace(task=task, **ROW)
    tokenizer = TASKS[task].fit(row, data) if TASKS[task].fit else None
    tau = presets.condition_encoder(vars(row), f)
    unet = alive(UNet(presets.unet_config(vars(row), ae.cfg)))
    if tau:
        alive(tau, 1)
    if task in ("superres", "inpaint"):
        data = Degraded(Degraded(data, "mask", 0), "small", 0)

    def y(batch):
        return TASKS[task].y(batch, tau, tokenizer)

    def ctx(y):
        return TASKS[task].ctx(y, tau, ae)
    return y, y(TASKS[task].null), ctx, unet, next(iter(loader(data, [[0, 1, 2]], 0)))


def layout(n_vocab, n_token, *boxes):
    tau = SimpleNamespace(cfg=TextConfig(n_vocab=n_vocab, n_token=n_token))
    return layout_y({"boxes": [torch.tensor(b).reshape(-1, 5) for b in boxes]}, tau, None).tolist()


WIDE, TALL, TINY = [5, 0, 1 / 3, 1, 2 / 3], [2, 1 / 3, 0, 1, 1], [1, 0, 0, .1, .1]


def test_layout_tokens_by_hand():
    """A grid of 4 x 4 places: WIDE is from (x 0, y 1) = 4 to (3, 2) = 11, TALL from 1 to 15.

    The largest first, two boxes in eight tokens, and 16 for none.
    """
    assert layout(17, 8, [WIDE, TINY, TALL], [WIDE], []) == [
        [2, 1, 15, 5, 4, 11, 16, 16], [5, 4, 11, 16, 16, 16, 16, 16], [16] * 8]


def test_layout_corners_are_of_the_nearest_place_and_the_last_token_is_none():
    """side = isqrt(n_vocab - 1): 25 numbers leave a grid of 4 x 4 and 24 for none."""
    assert layout(25, 4, [[3, .18, .82, .49, .84]]) == [[3, 2 * 4 + 1, 3 * 4 + 1, 24]]
    assert layout(26, 3, [[3, 0, .24, .26, 1]]) == [[3, 1 * 5 + 0, 4 * 5 + 1]]


def test_layout_boxes_of_one_area_keep_their_order():
    boxes = [[k, 0, k / 64, .5, (k + 1) / 64] for k in range(64)]
    assert layout(17, 192, boxes)[0][::3] == list(range(64))
    assert layout(17, 192, boxes[::-1])[0][::3] == list(range(63, -1, -1))


def test_label_maps_and_their_one_hot_form_are_one_and_minus_1_says_nothing():
    tau = SpatialRescaler(5, 3, 2)
    y = torch.randint(5, (2, 8, 12), generator=torch.Generator().manual_seed(0))
    assert_close(tau(y.to(torch.int16)), tau(F.one_hot(y, 5).movedim(3, 1).float()))
    assert tau(y).shape == (2, 3, 2, 3)
    by_hand = torch.stack([tau.conv.weight[:, k, 0, 0] for k in y[0, :4, :4].flatten()]).mean(0)
    assert_close(tau(y)[0, :, 0, 0], by_hand)
    assert (tau(torch.full((1, 8, 8), -1)) == 0).all()


def test_a_label_that_the_model_has_not_is_bad_input():
    """Labels beyond a byte's 127 stay what they are."""
    tau, semantic = SpatialRescaler(200, 3, 2), TASKS["semantic"].y
    good = torch.tensor([[0, 199], [128, 5]])
    assert semantic({"segmentation": [good]}, tau, None)[0].tolist() == good.tolist()
    with pytest.raises(BadInput, match="labels 0..200, but the model's are 0..199"):
        semantic({"segmentation": [good, good + 1]}, tau, None)


def test_what_lies_in_a_hole_is_unknown():
    """The picture there changes neither y nor ctx; elsewhere it does."""
    ae, g = stage_one(), torch.Generator().manual_seed(0)
    x, mask = torch.rand(1, 3, 32, 32, generator=g) * 2 - 1, torch.zeros(1, 1, 32, 32)
    mask[..., 8:16, 4:24] = 1
    other = torch.where(mask > 0, torch.rand(1, 3, 32, 32, generator=g), x)

    def ctx(x):
        return inpaint_ctx(TASKS["inpaint"].y({"image": x, "mask": [mask[0]]}, None, None), None,
                           ae)
    assert (other != x).any() and torch.equal(ctx(x), ctx(other))
    other[..., 8:16, 3] += .5
    assert not torch.equal(ctx(x), ctx(other))
    assert_close(ctx(x)[:, :4], ae.encode(x * (1 - mask)).mean)


def test_the_mask_is_1_in_holes_and_minus_1_elsewhere_on_the_latent_grid():
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:16, 4:24] = 1
    y = TASKS["inpaint"].y({"image": [torch.zeros(3, 32, 32)], "mask": [mask]}, None, None)
    want = torch.full((8, 8), -1.)
    want[2:4, 1:6] = 1
    assert torch.equal(inpaint_ctx(y, None, stage_one())[0, 4], want)


def small_picture():
    return torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("f,shape", [(1, (24, 32)), (2, (12, 16)), (4, (6, 8)), (8, (3, 4))])
def test_the_small_picture_comes_to_the_latent_grid(f, shape):
    ae, y = SimpleNamespace(cfg=SimpleNamespace(f=f)), small_picture()
    ctx = superres_ctx(y, None, ae)
    assert ctx.shape == (2, 3, *shape)
    assert_close(superres_ctx(y.flip(3), None, ae), ctx.flip(3))
    assert_close(superres_ctx(y.mT, None, ae), ctx.mT)
    assert_close(superres_ctx(0 * y + .3, None, ae), 0 * ctx + .3)
    assert (ctx - F.interpolate(y, shape, mode="bilinear")).abs().mean() < .2
    if f == 4:
        assert torch.equal(ctx, y)


def test_a_shrunk_small_picture_is_averaged_as_pillow_does():
    y = small_picture()
    want = [[np.array(Image.fromarray(c.numpy()).resize((4, 3), Image.Resampling.BICUBIC))
             for c in x] for x in y]
    got = superres_ctx(y, None, SimpleNamespace(cfg=SimpleNamespace(f=8)))
    assert_close(got, torch.from_numpy(np.array(want)), atol=1e-4, rtol=0)


def test_class_none_is_the_last_class():
    tau = ClassEmbedder(6, 4)
    assert TASKS["class"].y({"label": [3, None, 0]}, tau, None).tolist() == [3, 5, 0]
    assert_close(tau(torch.tensor([3, 5]))[:, 0], tau.embedding.weight[[3, 5]])


CASES = [(task, 4) for task in TASKS] + [(t, 1) for t in ("uncond", "semantic", "superres",
                                                          "inpaint")]


@pytest.mark.parametrize("task,f", CASES)
def test_from_a_batch_through_its_port_to_eps(task, f):
    """null stretches to y of a real batch, dropped rows are null, and the U-Net heeds ctx."""
    to_y, null, to_ctx, unet, batch = world(task, f)
    y = to_y(batch)
    assert len(y) == 3 and null.shape[0] == 1
    dropped = drop_condition(y, null[0].to(y.dtype), torch.tensor([False, True, False]))
    whole = null.expand(1, *y.shape[1:])
    assert dropped.dtype == y.dtype and dropped.shape == y.shape
    assert torch.equal(dropped[1], whole[0].to(y.dtype)) and torch.equal(dropped[::2], y[::2])

    z, t = torch.randn(3, unet.cfg.c_out, 32 // f, 32 // f), torch.tensor([5, 6, 7])
    ctx, ctx_null = to_ctx(y), to_ctx(whole)
    assert unet(z, t, ctx).shape == z.shape
    if task == "uncond":
        assert ctx is None and ctx_null is None and unet.cfg.c_in == unet.cfg.c_out
        return
    if TASKS[task].beside:
        assert ctx.shape == (3, unet.cfg.c_in - unet.cfg.c_out, *z.shape[2:])
        assert unet.cfg.d_ctx is None
    else:
        assert ctx.ndim == 3 and ctx.shape[2] == unet.cfg.d_ctx
    assert_close(to_ctx(dropped)[1], ctx_null[0])
    assert not torch.allclose(ctx[0], ctx[1]) and not torch.allclose(ctx[0], ctx_null[0])
    one = unet(z, t, ctx)
    assert not torch.allclose(one[0], unet(z, t, ctx_null.expand_as(ctx))[0], atol=1e-4)


@pytest.mark.parametrize("task", ["class", "layout", "semantic", "inpaint"])
def test_guidance_by_hand_for_both_ports(task):
    """(1 - s) eps(null) + s eps(ctx), for tokens and for maps."""
    to_y, null, to_ctx, unet, batch = world(task)
    y, z, t, s = to_y(batch), torch.randn(3, 4, 8, 8), torch.tensor([5, 600, 7]), 2.5
    ctx, ctx_null = to_ctx(y), to_ctx(null.expand(1, *y.shape[1:]))
    e, e_null = unet(z, t, ctx), unet(z, t, ctx_null.expand_as(ctx))
    got = guided(unet, ctx_null, s)(z, t, ctx)
    assert (got - e).abs().max() > .01
    assert_close(got, (1 - s) * e_null + s * e, rtol=1e-3, atol=1e-4)


def tiny_unet(c_in, d_ctx=None):
    return alive(UNet(UNetConfig(c_in, 4, 8, 8, (1, 2), 1, (4,), 4, None, d_ctx, groups=4)))


def test_maps_lie_behind_z_t():
    """UNet(z_t, t, ctx) is UNet(z_t and ctx in one, t)."""
    unet, z, ctx = tiny_unet(7), torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8, 8)
    t = torch.tensor([3, 900])
    assert torch.equal(unet(z, t, ctx), unet(torch.cat([z, ctx], 1), t))
    assert not torch.allclose(unet(z, t, ctx), unet(torch.cat([ctx, z], 1), t), atol=1e-4)


def test_no_condition_is_ignored_and_none_is_missed_in_silence():
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    assert tiny_unet(4)(z, t).shape == tiny_unet(4)(z, t, None).shape == z.shape
    for bad in (torch.randn(2, 3, 8, 8), torch.randn(2, 5, 12)):
        with pytest.raises(RuntimeError):
            tiny_unet(4)(z, t, bad)
    with pytest.raises(RuntimeError):
        tiny_unet(7)(z, t)
    with pytest.raises(ValueError, match="pass ctx"):
        tiny_unet(4, d_ctx=12)(z, t)


def test_flags_that_are_left_open_follow_from_the_set():
    data, row = Shapes(20, 32), Namespace(task="", **ROW)
    TASKS["class"].fit(row, data)
    assert row.n_classes == 29                                      # 28, and the null class
    TASKS["layout"].fit(row, data)
    assert row.vocab_size == 32 * 32 + 1
    row.n_classes = row.vocab_size = None
    TASKS["semantic"].fit(row, data)
    assert row.n_classes == 1 + max(int(data[i]["segmentation"].max()) for i in range(20))
    tokenizer = TASKS["text"].fit(row, data)
    assert row.vocab_size == tokenizer.get_vocab_size() == 2 + len(
        {word for text in data.captions() for word in text.split()})


def test_flags_that_are_given_stay():
    data = Shapes(20, 32)
    row = Namespace(n_classes=29, vocab_size=len(CLASSES) + 1, n_token=12)
    assert TASKS["class"].fit(row, data) is None and TASKS["layout"].fit(row, data) is None
    assert vars(row) == {"n_classes": 29, "vocab_size": 29, "n_token": 12}
    row.n_classes = 5
    TASKS["semantic"].fit(row, data)
    assert row.n_classes == 5


def test_too_few_classes_or_tokens_are_bad_input():
    row = Namespace(n_classes=28, vocab_size=28, n_token=12)
    with pytest.raises(BadInput, match="--n-classes 28: there are 28, and the null class"):
        TASKS["class"].fit(row, Shapes(1))
    with pytest.raises(BadInput, match="--vocab-size 28: there are 28 classes, and a token for"):
        TASKS["layout"].fit(row, Shapes(1))
    row.n_token = 2
    with pytest.raises(BadInput, match="--n-token 2: a box takes three"):
        TASKS["layout"].fit(row, Shapes(1))
