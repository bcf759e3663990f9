"""tasks.py: what every task must keep, over the table TASKS, and what y and ctx are by hand.

A new row of TASKS is tested by being there: its class says what it needs, and the items are made
up. Below come the tests of single tasks.
"""
import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_up import made_up_data, made_up_items, made_up_model, stage_one
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import train_ldm
from tinyldm.conditioning import ClassEmbedder, Context, SpatialRescaler
from tinyldm.data.images import to_tensor
from tinyldm.data.loader import collate
from tinyldm.data.open import open_dataset
from tinyldm.data.shapes import CLASSES, Shapes
from tinyldm.errors import BadInput
from tinyldm.guidance import drop_condition, guided
from tinyldm.model import LatentDiffusion
from tinyldm.tasks import TASKS, Class, Inpainting, Layout, Semantic, SuperResolution, Text

CONDITION_FLAGS = {
    "prompt", "prompts", "negative", "to_prompt", "label", "boxes", "map", "image", "mask",
}


@dataclass
class Case:
    """A task in use: a random model of it, and three made-up items."""

    model: LatentDiffusion
    items: list[dict]

    @property
    def task(self):
        return self.model.task

    @property
    def is_conditional(self) -> bool:
        return len(self.task.fields) > 0

    def y(self, items: list[dict]) -> dict[str, Tensor]:
        """Return y as training makes it: of a whole batch of the data set."""
        return self.task.encode(collate(items))

    def null_like(self, y: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return y with the null condition in every row; what null does not name stays."""
        null = {name: v.to(y[name]).expand_as(y[name]) for name, v in self.task.null().items()}
        return y | null

    def ctx(self, y: dict[str, Tensor]) -> Context:
        return self.task.context(y, self.model.tau, self.model.ae)


@pytest.fixture(scope="module", params=TASKS)
def name(request):
    """The name of each task in turn."""
    return request.param


@pytest.fixture(scope="module", params=[4, 1], ids=["latents", "pixels"])
def case(request, name):
    """Each task in turn, on the latents of a stage one with f = 4, and on pixels."""
    return Case(made_up_model(name, request.param), made_up_items(3))


def row(values: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """Return row i, as a batch of one."""
    return {name: v[i:i + 1] for name, v in values.items()}


def ports(ctx: Context) -> list[Tensor]:
    """Return the tensors of the ports that are in use."""
    return [port for port in ctx if port is not None]


# ---- every task: y

def test_y_has_one_row_per_item(case):
    y = case.y(case.items)
    assert bool(y) == case.is_conditional
    for v in y.values():
        assert len(v) == 3
        assert torch.isfinite(v).all()


def test_y_of_an_item_does_not_depend_on_the_rest_of_the_batch(case):
    """Else a sample would depend on what it is sampled together with."""
    y = case.y(case.items)
    for i, item in enumerate(case.items):
        assert_close(row(y, i), case.y([item]), rtol=0, atol=0)


def test_y_is_made_of_the_named_fields_alone(case):
    """Sampling has nothing but these fields to give."""
    batch = {}
    for field in case.task.fields:
        batch[field] = [item[field] for item in case.items]
    assert_close(case.task.encode(batch), case.y(case.items), rtol=0, atol=0)


# ---- every task: the null condition

@pytest.mark.parametrize("h,w", [(32, 32), (16, 48)])
def test_null_is_one_row_that_stretches_to_images_of_any_size(case, h, w):
    y = case.y(made_up_items(3, h, w))
    null = case.task.null()
    assert null.keys() <= y.keys()
    assert bool(null) == case.is_conditional
    for name, v in null.items():
        assert v.expand(1, *y[name].shape[1:]).shape == y[name][:1].shape


def test_null_is_a_value_that_y_can_hold(case):
    """It is cast to y's dtype, which must not change it."""
    y = case.y(case.items)
    for name, v in case.task.null().items():
        assert torch.equal(v.to(y[name].dtype).double(), v.double())
        assert torch.isfinite(v).all()


def test_null_is_always_the_same_and_no_items_condition(case):
    null = case.null_like(case.y(case.items))
    y = case.y(case.items)
    assert_close(case.null_like(y), null, rtol=0, atol=0)
    for i in range(3):
        different = [not torch.equal(v[i], null[name][i]) for name, v in y.items()]
        assert any(different) == case.is_conditional


def test_dropped_rows_become_null_and_the_others_stay(case):
    y = case.y(case.items)
    null = case.null_like(y)
    dropped = drop_condition(y, case.task.null(), torch.tensor([False, True, False]))
    for name, v in y.items():
        assert dropped[name].dtype == v.dtype
        assert dropped[name].shape == v.shape
    assert_close(row(dropped, 1), row(null, 1), rtol=0, atol=0)
    for i in (0, 2):
        assert_close(row(dropped, i), row(y, i), rtol=0, atol=0)

    # By whatever port it goes: ctx of a dropped row is that of the null condition.
    for ctx, ctx_null in zip(ports(case.ctx(dropped)), ports(case.ctx(null))):
        assert_close(ctx[1], ctx_null[1])


# ---- every task: ctx and its ports

@pytest.mark.parametrize("h,w", [(32, 32), (16, 48)])
def test_ctx_comes_by_the_ports_that_the_class_names(case, h, w):
    """tokens (B, M, d_ctx) where it attends; so many channels beside z_t, on its grid."""
    ctx = case.ctx(case.y(made_up_items(3, h, w)))
    unet = case.model.unet.cfg
    c_z = case.model.ae.cfg.c_z
    f = case.model.ae.cfg.f
    n_beside = case.task.beside_channels(c_z, case.model.ae.cfg.c_x)
    assert (unet.c_in, unet.c_out) == (c_z + n_beside, c_z)

    assert (ctx.tokens is not None) == case.task.attends
    if ctx.tokens is not None:
        n, _, width = ctx.tokens.shape
        assert (n, width) == (3, unet.d_ctx)

    assert (ctx.beside is not None) == (n_beside > 0)
    if ctx.beside is not None:
        assert ctx.beside.shape == (3, n_beside, h // f, w // f)

    assert bool(ports(ctx)) == case.is_conditional
    for port in ports(ctx):
        assert port.dtype == torch.float32
        assert torch.isfinite(port).all()


def test_ctx_of_an_item_does_not_depend_on_the_rest_of_the_batch(case):
    y = case.y(case.items)
    ctx = case.ctx(y)
    for i in range(3):
        for port, alone in zip(ports(ctx), ports(case.ctx(row(y, i)))):
            assert_close(port[i:i + 1], alone)


def test_ctx_follows_each_field_of_the_item(case):
    """Item 0 with one field of item 1 has another ctx than item 0, and neither has null's."""
    first, second, _ = case.items
    ctx = case.ctx(case.y([first]))
    ctx_null = case.ctx(case.null_like(case.y([first])))
    for field in case.task.fields:
        changed = case.ctx(case.y([first | {field: second[field]}]))
        assert far(ctx, changed)
        assert far(ctx, ctx_null)
        assert far(changed, ctx_null)


def far(a: Context, b: Context) -> bool:
    """True if two contexts differ by more than rounding, in some port."""
    return any((v - w).abs().max() > 1e-3 for v, w in zip(ports(a), ports(b)))


def test_gradients_reach_all_of_tau_and_none_of_stage_one(case):
    y = case.y(case.items)
    nets = [case.model.ae]
    if case.model.tau is not None:
        nets.append(case.model.tau)
    for net in nets:
        net.requires_grad_(True)
    total = sum(port.square().sum() for port in ports(case.ctx(y)))
    if case.model.tau is not None:
        total.backward()
        assert all(p.grad is not None for p in case.model.tau.parameters())
    elif case.is_conditional:
        assert not total.requires_grad
    assert all(p.grad is None for p in case.model.ae.parameters())
    for net in nets:
        net.zero_grad()
        net.requires_grad_(False)


def test_the_unet_heeds_the_condition_and_guidance_is_the_formula(case):
    """(1 - s) eps(null) + s eps(ctx), whatever the ports are."""
    unet = case.model.unet
    f = case.model.ae.cfg.f
    rng = torch.Generator().manual_seed(0)
    z_t = torch.randn(3, unet.cfg.c_out, 32 // f, 32 // f, generator=rng)
    t = torch.tensor([5, 600, 7])
    eps_theta = case.model.eps_theta()

    y = case.y(case.items)
    ctx = case.ctx(y)
    ctx_null = case.ctx(case.null_like(y))
    if not case.is_conditional:
        assert ctx == ctx_null == Context()
        assert eps_theta(z_t, t, ctx).shape == z_t.shape
        return

    eps = eps_theta(z_t, t, ctx)
    eps_null = eps_theta(z_t, t, ctx_null)
    assert eps.shape == z_t.shape
    for i in range(3):
        assert (eps[i] - eps_null[i]).abs().max() > 1e-3

    s = 2.5
    found = guided(eps_theta, ctx_null, s)(z_t, t, ctx)
    assert_close(found, (1 - s) * eps_null + s * eps, rtol=1e-3, atol=1e-3)


# ---- every task: from the data set and from the user, for people

def test_a_data_set_decides_only_what_the_flags_leave_open_and_always_the_same(name):
    data = made_up_data()
    values = vars(train_ldm.parse_args(["--task", name]))
    decided = TASKS[name].decide(values, data, data)
    assert decided == TASKS[name].decide(values, data, data)
    for key in decided:
        assert key == "tokenizer" or values[key] is None


def test_what_training_shows_are_conditions_of_the_task(case):
    """examples() has as many as asked for, also of a data set that holds out nothing."""
    data = made_up_data()
    for held_out in (data, made_up_data(0)):
        items = case.task.examples(11, data, held_out)
        assert len(items) == 11
        batch = {field: [item[field] for item in items] for field in case.task.fields}
        for v in case.task.encode(batch).values():
            assert len(v) == 11


def test_without_any_flag_conditions_are_of_the_task_or_held_out_items(case):
    assert set(case.task.flags) <= CONDITION_FLAGS
    conditions, size = case.task.read({"prompts": [], "label": []}, (32, 32), 8)
    assert size == (32, 32)
    if conditions is None:
        assert case.is_conditional
        return
    for condition in conditions:
        assert set(condition) == set(case.task.fields)


def test_a_prompt_is_read_as_a_condition_in_place_of_null(case):
    """--negative: it has the fields that null names, and is encoded by itself."""
    if "prompt" not in case.task.flags:
        assert "negative" not in case.task.flags
        return
    negative = case.task.read_prompt("2")
    assert negative.keys() == case.task.null().keys()
    y = case.task.encode({name: [value] for name, value in negative.items()})
    for name, v in case.task.null().items():
        assert y[name].shape == v.shape
        assert not torch.equal(y[name], v)


def test_a_condition_is_shown_as_an_image_of_the_samples_size_or_not_at_all(case):
    for item in case.items:
        shown = case.task.show(item, 32, 32)
        if shown is not None:
            assert shown.shape == (3, 32, 32)
            assert -1 <= shown.min() <= shown.max() <= 1


def test_true_images_of_the_built_in_world_score_better_than_noise(case):
    """In the first figure, which is the one that a learner looks at."""
    data = open_dataset("shapes", "held-out", size=32, fields=case.task.fields)
    items = [data[i] for i in range(3)]
    case.task.check_scorable(items)
    images = torch.stack([item["image"] for item in items])
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1

    of_truth = case.task.score(images, items)
    of_noise = case.task.score(noise, items)
    assert of_truth.keys() == of_noise.keys()
    assert all(isinstance(v, float) for v in of_truth.values())
    first = next(iter(of_truth))
    assert of_truth[first] > of_noise[first]


def test_a_task_explains_itself_and_is_guided_by_at_least_1(name):
    task = TASKS[name]
    assert task.__doc__
    assert task.guidance_scale >= 1
    assert task.size_multiple >= 1


# ---- what says nothing, by hand

@pytest.mark.parametrize("task,expected", [
    (Class({"n_classes": 6, "d": 4}), {"label": [5]}),
    (Layout({"n_vocab": 17, "n_token": 6}), {"boxes": [[16] * 6]}),
    (Layout({"n_vocab": 17, "n_token": 8}), {"boxes": [[16] * 6 + [0, 15]]}),
    (Semantic({"c_in": 5, "c_out": 3, "n": 2}), {"segmentation": [[[-1]]]}),
    (SuperResolution({}), {"small": [[[[0]]]]}),
    (Inpainting({}), {"image": [[[[-1]]]], "mask": [[[[1]]]]}),
], ids=lambda v: type(v).__name__)
def test_the_null_condition_of_each_task(task, expected):
    """The class that no item has, no box (of a whole image), labels that are unknown, grey, a hole
    everywhere.
    """
    null = {name: v.tolist() for name, v in task.null().items()}
    assert null == expected


def test_the_null_caption_is_padding_alone():
    task = made_up_model("text").task
    padding = task.tokenizer.token_to_id("[PAD]")
    assert task.null()["caption"].unique().tolist() == [padding]


# ---- class

def test_a_class_is_one_token():
    task = Class({"n_classes": 6, "d": 4})
    tau = ClassEmbedder(6, 4)
    assert task.encode({"label": [3, 0]})["label"].tolist() == [3, 0]
    tokens = task.context({"label": torch.tensor([3, 5])}, tau, None).tokens
    assert_close(tokens[:, 0], tau.embedding.weight[[3, 5]])


# ---- layout

WIDE = [5, 0, 1 / 3, 1, 2 / 3]
TALL = [2, 1 / 3, 0, 1, 1]
TINY = [1, 0, 0, 0.1, 0.1]


def layout_tokens(n_vocab: int, n_token: int, *boxes: list) -> list:
    """The token ids of layouts, each a list of boxes."""
    task = Layout({"n_vocab": n_vocab, "n_token": n_token})
    tensors = [torch.tensor(rows).reshape(-1, 5) for rows in boxes]
    return task.encode({"boxes": tensors})["boxes"].tolist()


def test_layout_tokens_by_hand():
    """On a grid of 4 x 4 cells WIDE goes from (x 0, y 1), cell 4, to (3, 2), cell 11; TALL from 1
    to 15. The largest come first, seven tokens hold two boxes, and 16 means no box.
    """
    assert layout_tokens(17, 7, [WIDE, TINY, TALL], [WIDE], []) == [
        [2, 1, 15, 5, 4, 11, 16],
        [5, 4, 11, 16, 16, 16, 16],
        [16] * 7,
    ]


def released_layout(boxes: list, n_tokens: int, n_max: int) -> list[int]:
    """The tokens of a whole image by the formulas of taming-transformers' conditional builders.

    boxes: rows [class, x0, y0, x1, y1 in 0..1], in the order in which they come.
    """
    side = int(math.sqrt(n_tokens))
    none = n_tokens - 1

    def cell(x: float, y: float) -> int:
        return int(round(y * (side - 1))) * side + int(round(x * (side - 1)))

    tokens = []
    for number, x0, y0, x1, y1 in boxes:
        tokens += [number, cell(x0, y0), cell(x1, y1)]
    tokens += [none] * 3 * (n_max - len(boxes))
    return [*tokens, cell(0, 0), cell(1, 1)]


@pytest.mark.parametrize("n_tokens,n_max", [(8192, 30), (1025, 3), (17, 2)])
def test_two_tokens_that_are_left_over_are_the_corners_of_the_crop(n_tokens, n_max):
    """As in the released layout model, whose 92 tokens are 30 boxes and the crop."""
    largest_first = [TALL, WIDE]
    expected = released_layout(largest_first, n_tokens, n_max)
    assert layout_tokens(n_tokens, 3 * n_max + 2, [WIDE, TALL]) == [expected]
    null = Layout({"n_vocab": n_tokens, "n_token": 3 * n_max + 2}).null()["boxes"].tolist()
    assert null == [released_layout([], n_tokens, n_max)]


def test_corners_are_the_nearest_cells_and_the_last_token_is_no_box():
    """The grid has isqrt(n_vocab - 1) cells a side: 24 numbers give 4 x 4, and 24 is no box."""
    assert layout_tokens(25, 4, [[3, 0.18, 0.82, 0.49, 0.84]]) == [[3, 2 * 4 + 1, 3 * 4 + 1, 24]]
    assert layout_tokens(26, 3, [[3, 0, 0.24, 0.26, 1]]) == [[3, 1 * 5 + 0, 4 * 5 + 1]]


def test_boxes_of_equal_area_keep_their_order():
    boxes = [[k, 0, k / 64, 0.5, (k + 1) / 64] for k in range(64)]
    upwards = layout_tokens(17, 192, boxes)[0]
    downwards = layout_tokens(17, 192, boxes[::-1])[0]
    assert upwards[::3] == list(range(64))
    assert downwards[::3] == list(range(63, -1, -1))


def test_boxes_of_a_user_are_in_pixels_and_their_classes_names_or_numbers():
    task = Layout({"n_vocab": 17, "n_token": 8}, None, ("cat", "dog"))
    rows = [["dog", 8, 0, 16, 5], [0, 0, 0, 32, 10]]
    conditions, size = task.read({"boxes": rows}, (20, 32), 8)
    assert size == (20, 32)
    expected = [[1, 0.25, 0, 0.5, 0.25], [0, 0, 0, 1, 0.5]]
    assert_close(conditions[0]["boxes"], torch.tensor(expected))


# ---- semantic

def test_a_label_map_may_also_be_given_one_hot():
    tau = SpatialRescaler(5, 3, 2)
    y = torch.randint(5, (2, 8, 12), generator=torch.Generator().manual_seed(0))
    one_hot = F.one_hot(y, 5).movedim(3, 1).float()
    assert tau(y).shape == (2, 3, 2, 3)
    assert_close(tau(y.to(torch.int16)), tau(one_hot))


def test_a_label_that_the_model_does_not_have_is_bad_input():
    """Labels beyond a byte's 127 stay what they are."""
    task = Semantic({"c_in": 200, "c_out": 3, "n": 2})
    good = torch.tensor([[0, 199], [128, 5]])
    assert task.encode({"segmentation": [good]})["segmentation"][0].tolist() == good.tolist()
    with pytest.raises(BadInput, match="labels 0..200, but the model's are 0..199"):
        task.encode({"segmentation": [good, good + 1]})


# ---- superres

def ctx_of_small(small: Tensor, f: int) -> Tensor:
    ae = SimpleNamespace(cfg=SimpleNamespace(f=f))
    return SuperResolution({}).context({"small": small}, None, ae).beside


def small_images() -> Tensor:
    return torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("f,shape", [(1, (24, 32)), (2, (12, 16)), (4, (6, 8)), (8, (3, 4))])
def test_the_small_image_is_resized_to_the_latents_grid(f, shape):
    small = small_images()
    ctx = ctx_of_small(small, f)
    assert ctx.shape == (2, 3, *shape)
    assert (ctx - F.interpolate(small, shape, mode="bilinear")).abs().mean() < 0.2

    # The same for a mirrored, a turned and a constant image.
    assert_close(ctx_of_small(small.flip(3), f), ctx.flip(3))
    assert_close(ctx_of_small(small.mT, f), ctx.mT)
    assert_close(ctx_of_small(0 * small + 0.3, f), 0 * ctx + 0.3)
    if f == 4:
        assert torch.equal(ctx, small)


def test_a_small_image_is_shrunk_further_as_pillow_does_it():
    small = small_images()
    rows = []
    for channel in small.flatten(0, 1):
        image = Image.fromarray(channel.numpy())
        rows.append(np.array(image.resize((4, 3), Image.Resampling.BICUBIC)))
    expected = torch.from_numpy(np.stack(rows)).view(2, 3, 3, 4)
    assert_close(ctx_of_small(small, 8), expected, atol=1e-4, rtol=0)


# ---- inpaint

def hole() -> Tensor:
    mask = torch.zeros(1, 32, 32)
    mask[:, 8:16, 4:24] = 1
    return mask


def ctx_of_masked(image: Tensor, mask: Tensor) -> Tensor:
    task = Inpainting({})
    y = task.encode({"image": [image], "mask": [mask]})
    return task.context(y, None, stage_one(4)).beside


def test_what_lies_in_a_hole_is_unknown():
    """The image there does not change ctx; elsewhere it does."""
    rng = torch.Generator().manual_seed(0)
    image = torch.rand(3, 32, 32, generator=rng) * 2 - 1
    noise = torch.rand(3, 32, 32, generator=rng)
    other = torch.where(hole() > 0, noise, image)
    ctx = ctx_of_masked(image, hole())
    assert torch.equal(ctx, ctx_of_masked(other, hole()))

    other[:, 8:16, 3] += 0.5
    assert not torch.equal(ctx, ctx_of_masked(other, hole()))
    masked_image = torch.where(hole() > 0, -1, image)[None]
    assert_close(ctx[:, :4], stage_one(4).encode(masked_image).mean)


def random_pixels() -> np.ndarray:
    """A random image (32, 32, 3) of bytes."""
    return np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)


def test_masked_images_are_those_of_the_released_program():
    """scripts/inpaint.py: masked in 0..1, then mapped to -1..1; latents first, then the mask."""
    image = random_pixels().transpose(2, 0, 1)[None].astype(np.float32) / 255
    mask = hole()[None].numpy()
    masked_image = (1 - mask) * image

    z = stage_one(4).encode(torch.from_numpy(masked_image * 2 - 1)).mean
    mask_on_grid = F.interpolate(torch.from_numpy(mask * 2 - 1), z.shape[2:])
    found = ctx_of_masked(to_tensor(Image.fromarray(random_pixels())), hole())
    assert_close(found, torch.cat([z, mask_on_grid], dim=1), atol=1e-4, rtol=1e-4)


def test_the_mask_is_1_in_holes_and_minus_1_elsewhere_on_the_latents_grid():
    expected = torch.full((8, 8), -1.0)
    expected[2:4, 1:6] = 1
    ctx = ctx_of_masked(torch.zeros(3, 32, 32), hole())
    assert torch.equal(ctx[0, 4], expected)


# ---- text-inpaint

def test_captions_with_masked_images_are_those_of_the_released_model():
    """scripts of Stable Diffusion's inpainting: masked in -1..1; the mask in 0..1, then latents."""
    model = made_up_model("text-inpaint")
    image = random_pixels().transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
    mask = hole()[None].numpy()
    masked_image = image * (mask < 0.5)

    z = model.ae.encode(torch.from_numpy(masked_image)).mean
    mask_on_grid = F.interpolate(torch.from_numpy(mask), z.shape[2:])
    ids = made_up_model("text").task.encode({"caption": ["bee number 1"]})["caption"]

    item = {"caption": "bee number 1", "image": to_tensor(Image.fromarray(random_pixels()))}
    y = model.task.encode(collate([item | {"mask": hole()}]))
    ctx = model.task.context(y, model.tau, model.ae)
    assert_close(ctx.beside, torch.cat([mask_on_grid, z], dim=1), atol=1e-4, rtol=1e-4)
    assert_close(ctx.tokens, model.tau(ids))


def test_null_leaves_mask_and_image_as_they_are():
    task = made_up_model("text-inpaint").task
    assert_close(task.null(), made_up_model("text").task.null())

    # An epoch takes another caption of the same image: the rest is in the cache.
    y = task.encode({"caption": ["a cat", "a dog"]})
    assert list(y) == ["caption"]


def test_a_prompt_without_an_image_has_nothing_to_repaint():
    task = made_up_model("text-inpaint").task
    given = {"prompts": ["a cat"], "label": []}
    with pytest.raises(BadInput, match="give an image and a mask, too"):
        task.read(given, (32, 32), 8)
    conditions, _ = task.read(given | {"mask": None}, (32, 32), 8)
    assert conditions == [{"caption": "a cat"}]


# ---- what the data set decides

NOT_GIVEN = {"n_classes": None, "vocab_size": None, "n_token": 12}


def test_values_that_are_not_given_follow_from_the_data_set():
    data = Shapes(20, 32)
    assert Class.decide(NOT_GIVEN, data, data) == {"n_classes": 29}     # 28, and the null class
    assert Layout.decide(NOT_GIVEN, data, data) == {"vocab_size": 32 * 32 + 1}

    largest = max(int(data[i]["segmentation"].max()) for i in range(20))
    assert Semantic.decide(NOT_GIVEN, data, data) == {"n_classes": 1 + largest}

    words = {word for caption in data.captions() for word in caption.split()}
    assert Text.decide(NOT_GIVEN, data, data)["vocab_size"] == 2 + len(words)


def test_values_that_are_given_stay():
    data = Shapes(20, 32)
    given = {"n_classes": 29, "vocab_size": len(CLASSES) + 1, "n_token": 12}
    for task in (Class, Layout):
        assert given | task.decide(given, data, data) == given
    given["n_classes"] = 5
    assert given | Semantic.decide(given, data, data) == given


def test_too_few_classes_or_tokens_are_bad_input():
    data = Shapes(1)
    few = {"n_classes": 28, "vocab_size": 28, "n_token": 12}
    with pytest.raises(BadInput, match="n_classes = 28: the data set has 28, and the null class"):
        Class.decide(few, data, data)
    with pytest.raises(BadInput, match="vocab_size = 28: there are 28 classes, and a token for"):
        Layout.decide(few, data, data)
    with pytest.raises(BadInput, match="n_token = 2: a box takes three"):
        Layout.decide(few | {"n_token": 2}, data, data)
