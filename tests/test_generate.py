"""generate.py with nets in closed form: img2img, masks, walks and sizes; later and slerp."""
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm import samplers
from tinyldm.autoencoder import Pixels, Posterior, build_autoencoder
from tinyldm.conditioning import ClassEmbedder
from tinyldm.degrade import Degraded
from tinyldm.diffusion import cosine_betas, cumulative, sqrt_linear_betas
from tinyldm.generate import SAMPLERS, Model, defaults, draw, draw_noise
from tinyldm.inside import record
from tinyldm.samplers import later, slerp
from tinyldm.shapes import Shapes
from tinyldm.training import generator

ABAR = cumulative(sqrt_linear_betas(1000))
M, S = .2, .3                                       # oracle's data: N(M, S^2), as in test_samplers


def oracle(z_t, t, ctx=None):
    """E[eps | z_t] for independent Gaussian data."""
    a = ABAR[t].view(-1, 1, 1, 1)
    return ((1 - a).sqrt() * (z_t - a.sqrt() * M) / (a * S ** 2 + 1 - a)).to(z_t.dtype)


def knows(z_0):
    """The eps_theta of a data set of one picture."""
    def eps_theta(z_t, t, ctx):
        a = ABAR[t].view(-1, 1, 1, 1)
        return ((z_t - a.sqrt() * z_0) / (1 - a).sqrt()).float()
    return eps_theta


class Blocks(torch.nn.Module):
    """A stage one of f = 4 without weights: the means of 4 x 4 pixels."""
    cfg = SimpleNamespace(f=4, c_z=3)

    def encode(self, x):
        z = F.avg_pool2d(x, 4)
        return Posterior(z, torch.full_like(z, -torch.inf))

    def decode(self, z):
        return F.interpolate(z, scale_factor=4)


class Spy:
    """Notes what a U-Net is given."""

    def __init__(self, net):
        self.net, self.calls = net, []

    def __call__(self, z, t, ctx=None):
        self.calls.append((z, t, ctx))
        return self.net(z, t, ctx)


def model(net, ae=None, abar=ABAR, task="uncond", tau=None):
    return Model(ae or Pixels(), net, tau, None, abar, "eps", task, (), {})


def noise(seed, i, shape, k=0):
    """The k-th noise of picture i."""
    g = generator(seed, i)
    return [torch.randn(shape, generator=g) for _ in range(k + 1)][k]


def picture(seed=0, h=8, w=8):
    return torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed)) * 1.6 - .8


# ---- img2img

@pytest.mark.parametrize("n", [1, 2, 7, 50])
@pytest.mark.parametrize("rule", [samplers.timesteps, samplers.official_timesteps])
def test_later_is_the_end_of_the_steps(n, rule):
    ts = rule(1000, n)
    n = len(ts) - 1
    assert later(ts, 1.0) == ts and later(ts, 1e-9) == ts[-2:]
    for k in range(1, n + 1):
        assert later(ts, k / n) == ts[n - k:]


def test_img2img_begins_at_the_noise_level_of_its_first_timestep():
    """z is sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise at the very t that the U-Net is told."""
    for strength, k in ((.3, 3), (.5, 5), (1, 10), (.01, 1)):
        net, x = Spy(oracle), picture()
        draw(model(net), [{"init": x}] * 2, defaults(size=(8, 8), steps=10, init=True, seed=4,
                                                     strength=strength), first=3)
        ts = samplers.timesteps(1000, 10)
        assert [int(t[0]) for _, t, _ in net.calls] == ts[10 - k:10]
        a = ABAR[ts[10 - k]].item()
        for j in range(2):
            assert_close(net.calls[0][0][j],
                         a ** .5 * x + (1 - a) ** .5 * noise(4, 3 + j, (3, 8, 8)))


def test_without_init_strength_is_not_looked_at():
    net = Spy(oracle)
    draw(model(net), [{}], defaults(size=(8, 8), steps=10, strength=.3))
    assert len(net.calls) == 10
    assert torch.equal(net.calls[0][0][0], noise(0, 0, (3, 8, 8)))


def test_the_less_strength_the_more_of_the_picture_is_kept():
    """At last all of it is as the data are, N(M, S^2)."""
    x, far = picture(), []
    for strength in (.01, .1, .5, 1):
        last = draw(model(oracle), [{"init": x}], defaults(size=(8, 8), steps=200, init=True,
                                                           strength=strength))
        far.append((last[0] - x).abs().mean())
    assert far[0] < .12 < far[1] < far[2] < far[3]
    assert abs(last.mean() - M) < .07 and abs(last.std() - S) < .07


# ---- walks from noise to noise

def test_slerp_goes_from_a_to_b_in_equal_angles_at_one_norm():
    a, b = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0)).double()
    b *= a.norm() / b.norm()
    assert_close(slerp(a, b, 0.0), a)
    assert_close(slerp(a, b, 1.0), b)
    way = [slerp(a, b, k / 7) for k in range(8)]
    assert_close(torch.stack([z.norm() for z in way]), a.norm().expand(8))

    def angle(u, v):
        return math.acos((u.flatten() @ v.flatten() / u.norm() / v.norm()).item())
    assert angle(a, b) > 1
    for u, v in zip(way, way[1:]):
        assert math.isclose(angle(u, v), angle(a, b) / 7, rel_tol=1e-9)
    assert torch.equal(slerp(a, a, .3), a)


def test_a_walk_starts_at_picture_0_of_one_seed_and_ends_at_that_of_the_other():
    """The same in any batches; only z_T walks, the noise of the steps is each picture's own."""
    args, shape = defaults(seed=5, to_seed=9, n=4), (3, 4, 4)
    z, randn = draw_noise(4, args, 0, shape, "cpu")
    ends = noise(5, 0, shape), noise(9, 0, shape)
    assert_close(z, torch.stack([slerp(*ends, k / 3) for k in range(4)]))
    assert_close(z[[0, 3]], torch.stack(ends))
    parts = [draw_noise(2, args, first, shape, "cpu") for first in (0, 2)]
    assert_close(torch.cat([p[0] for p in parts]), z)
    assert torch.equal(randn(), torch.stack([noise(5, j, shape, 1) for j in range(4)]))
    assert_close(draw_noise(1, defaults(seed=5, to_seed=9, n=1), 0, shape, "cpu")[0][0], ends[0])


def test_a_walk_of_two_prompts_is_two_walks():
    """Pictures n.. belong to the second prompt, and go from seed to seed once more."""
    z, _ = draw_noise(8, defaults(seed=5, to_seed=9, n=4), 0, (3, 4, 4), "cpu")
    assert_close(z[4:], z[:4])


# ---- a part is known

def hole(h=8, w=8):
    mask = torch.zeros(1, h, w)
    mask[:, 2:5, 1:7] = 1
    return mask


@pytest.mark.parametrize("task,sampler", [
    *(("inpaint", k) for k in SAMPLERS),
    *(("uncond", k) for k in SAMPLERS)])
def test_only_the_hole_is_painted(task, sampler):
    """What is known stays bit by bit, and the hole is what the net knows of it."""
    x, target, mask = picture(), picture(1), hole()
    got = draw(model(knows(target), task=task), [{"image": x, "mask": mask}],
               defaults(size=(8, 8), steps=10, sampler=sampler))[0]
    known = (mask == 0).expand(3, 8, 8)
    assert torch.equal(got[known], x[known])
    assert_close(got[~known], target[~known], atol=1e-3, rtol=0)


def test_a_latent_is_known_where_no_pixel_of_its_block_is_in_the_hole():
    """Before each step the known ones are drawn from q(z_t | z) anew, the others left alone."""
    x, mask, net = picture(h=8, w=16), torch.zeros(1, 8, 16), Spy(oracle)
    mask[:, 5, 7] = 1                                       # one pixel, in block (1, 1) of (2, 4)
    got = draw(model(net, Blocks()), [{"image": x, "mask": mask}],
               defaults(size=(8, 16), steps=4))[0]
    z, z_T = F.avg_pool2d(x, 4), noise(0, 0, (3, 2, 4))
    for k, (z_t, t, _) in enumerate(net.calls):
        a = ABAR[t[0]].item()
        want = a ** .5 * z + (1 - a) ** .5 * noise(0, 0, (3, 2, 4), 1 + k)
        known = torch.ones(2, 4, dtype=torch.bool)
        known[1, 1] = False
        assert_close(z_t[0][:, known], want[:, known])
        assert k > 0 or torch.equal(z_t[0][:, 1, 1], z_T[:, 1, 1])
    assert len(net.calls) == 4
    assert torch.equal((got != x).any(0), mask[0] > 0)


def test_an_inpainting_model_sees_the_hole_and_the_rest_is_put_back_at_each_step():
    """Its ctx tells it; in the hole z_t is its own, from the first noise on."""
    x, mask, net = picture(), hole(), Spy(oracle)
    draw(model(net, task="inpaint"), [{"image": x, "mask": mask}], defaults(size=(8, 8), steps=3))
    z, _, ctx = net.calls[0]
    assert torch.equal(z[0] * mask, noise(0, 0, (3, 8, 8)) * mask)
    assert not torch.equal(z[0], noise(0, 0, (3, 8, 8)))
    assert_close(ctx, torch.cat([x * (1 - mask), 2 * mask - 1])[None])


def test_superres_does_not_peep_at_the_truth():
    """An item of the set has image and mask as well; a model that draws black draws black."""
    item = Degraded(Shapes(1, 32), "small", 0)[0]
    got = draw(model(knows(torch.full((3, 32, 32), -1.)), task="superres"), [item],
               defaults(size=(32, 32), steps=3))
    assert_close(got, torch.full((1, 3, 32, 32), -1.), atol=1e-3, rtol=0)


# ---- batches, sizes, scales

@pytest.mark.parametrize("more", [{}, {"init": True, "strength": .5}, {"mask": True}])
def test_a_picture_is_the_same_in_any_batch(more):
    items = [{"image": picture(i), "mask": hole(), "init": picture(9 + i)} for i in range(5)]
    if "mask" not in more:
        items = [{"init": i["init"]} for i in items]
    args = defaults(size=(8, 8), steps=6, eta=1.0, seed=3, **more)
    m = model(oracle)
    whole = draw(m, items, args)
    parts = [draw(m, items[:2], args), draw(m, items[2:], args, first=2)]
    assert_close(torch.cat(parts), whole)
    assert not torch.allclose(whole[0], whole[1])
    assert not torch.allclose(draw(m, items, defaults(size=(8, 8), steps=6, seed=4, **more)),
                              whole, atol=.02)


def test_eta_is_ddims_alone():
    """1 makes it ddpm; the others have no such flag."""
    def drawn(sampler, eta):
        return draw(model(oracle), [{}], defaults(size=(8, 8), steps=9, sampler=sampler, eta=eta))
    assert_close(drawn("ddim", 1.0), drawn("ddpm", 1.0), atol=1e-3, rtol=0)
    assert not torch.allclose(drawn("ddim", 0.0), drawn("ddim", 1.0), atol=.02)
    assert torch.equal(drawn("dpm++", 0.0), drawn("dpm++", 1.0))


def test_pictures_need_not_be_square():
    """size is (H, W); the U-Net is given (H / f, W / f)."""
    target = picture(1, 2, 4)
    net = Spy(knows(target))
    got = draw(model(net, Blocks()), [{}] * 2, defaults(size=(8, 16), steps=5))
    assert got.shape == (2, 3, 8, 16) and net.calls[0][0].shape == (2, 3, 2, 4)
    assert_close(got[0], F.interpolate(target[None], scale_factor=4)[0], atol=1e-3, rtol=0)


def test_pixels_are_latents_once_they_are_divided_by_z_std():
    ae, x = Pixels(), picture()[None]
    assert_close(ae.encode(x).mean, x)
    ae.z_std.fill_(.5)
    q = ae.encode(x)
    assert_close(q.mean, 2 * x)
    assert torch.equal(q.sample(torch.randn_like(x)), q.mean)
    assert_close(ae.decode(q.mean), x)
    assert_close(draw(model(knows(2 * x), ae), [{}], defaults(size=(8, 8), steps=5)), x,
                 atol=1e-3, rtol=0)


def test_pixels_come_back_from_what_a_checkpoint_says():
    ae = Pixels()
    ae.z_std.fill_(.7)
    back = build_autoencoder(asdict(ae.cfg))
    assert isinstance(back, Pixels) and (back.cfg.f, back.cfg.c_z) == (1, 3)
    back.load_state_dict(ae.state_dict())
    assert_close(back.encode(picture()[None]).mean, picture()[None] / .7)


def test_pictures_are_clamped():
    x = torch.full((3, 8, 8), 3.)
    assert torch.equal(draw(model(knows(x)), [{}], defaults(size=(8, 8), steps=3))[0], x / 3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("betas", [sqrt_linear_betas, cosine_betas])
def test_a_schedule_of_one_step_gives_the_nets_own_z_0(sampler, betas):
    """T = 1, and --steps left open: one call at t = 0 (PLMS may look twice)."""
    abar, net = cumulative(betas(1)), Spy(lambda z, t, ctx: 0 * z + .3)
    got = draw(model(net, abar=abar), [{}], defaults(size=(8, 8), steps=None, sampler=sampler))
    a = abar[0].item()
    want = (noise(0, 0, (3, 8, 8)) - (1 - a) ** .5 * .3) / a ** .5
    assert_close(got[0], want.clamp(-1, 1))
    assert {int(t) for _, t, _ in net.calls} == {0}
    assert len(net.calls) == 1 or sampler == "plms"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_enough_for_a_net_that_knows_the_picture(sampler):
    """NB: at t = 0 there is no noise left in plms's z_s = z_0, so its second eps is about 0."""
    got = draw(model(knows(picture(1))), [{}], defaults(size=(8, 8), steps=1, sampler=sampler))
    assert_close(got[0], picture(1), atol=1e-3, rtol=0)


# ---- conditions

def classes(**flags):
    """-> the calls of a class model's U-Net, and the table of its classes."""
    torch.manual_seed(0)
    tau = ClassEmbedder(4, 5).requires_grad_(False)
    net = Spy(lambda z, t, ctx: z * ctx.mean((1, 2)).view(-1, 1, 1, 1) / 9)
    m, kept = model(net, task="class", tau=tau), []
    draw(m, [{"label": 2}, {"label": None}], defaults(size=(8, 8), steps=3, **flags),
         wrap=lambda eps: record(eps, m.abar, kept))
    assert len(net.calls) == len(kept) == 3
    return net.calls, kept, tau.embedding.weight


def test_guidance_asks_for_null_first_and_for_the_condition_last():
    """A label of None is null itself."""
    (calls, kept, table), a = classes(scale=3.0), ABAR[999].item()
    z, t, ctx = calls[0]
    assert_close(ctx[:, 0], table[[3, 3, 2, 3]])
    assert torch.equal(z[:2], z[2:]) and t.tolist() == [999] * 4
    e_null, e = (z[0] * table[k].mean() / 9 for k in (3, 2))
    assert_close(kept[0][0], (z[0] - (1 - a) ** .5 * (3 * e - 2 * e_null)) / a ** .5)


def test_the_scale_is_the_tasks_own_unless_a_flag_says_otherwise():
    assert_close(torch.stack(classes()[1]), torch.stack(classes(scale=2.0)[1]))
    calls, _, table = classes(scale=1.0)
    assert_close(calls[0][2][:, 0], table[[2, 3]])              # no guidance, half the work


def test_without_a_condition_there_is_nothing_to_guide_by():
    net = Spy(oracle)
    draw(model(net), [{}] * 3, defaults(size=(8, 8), steps=2, scale=5.0))
    assert [(len(z), ctx) for z, _, ctx in net.calls] == [(3, None)] * 2
