"""model.py: sampling with networks in closed form, and models of every task from their config.

Here also is what sample.py makes of the noise of two seeds.
"""
import math
from dataclasses import replace
from types import SimpleNamespace

import gaussian
import pytest
import torch
from gaussian import ABAR
from made_up import made_up_items, made_up_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from sample import strip_noise
from tinyldm.autoencoder import AEConfig, Pixels, Posterior, build_autoencoder
from tinyldm.conditioning import ClassEmbedder
from tinyldm.data.degrade import Degraded
from tinyldm.data.shapes import Shapes
from tinyldm.diffusion import SCHEDULES, DiffusionConfig, cumulative
from tinyldm.errors import BadInput
from tinyldm.model import LatentDiffusion, ModelConfig, build_model
from tinyldm.samplers import SAMPLERS, TIMESTEPS, later, timesteps
from tinyldm.seeds import generator, slerp
from tinyldm.show.attention import record_z_0
from tinyldm.tasks import TASKS
from tinyldm.unet import UNetConfig

# ---- networks in closed form


def of_gaussian_data(z_t, t, tokens=None, beside=None):
    """A U-Net that has learned the Gaussian data of gaussian.py."""
    return gaussian.eps_theta(z_t, t)


def of_one_image(z_0: Tensor):
    """Return a U-Net that has learned a data set of a single latent z_0."""
    def net(z_t, t, tokens=None, beside=None):
        abar_t = ABAR[t].view(-1, 1, 1, 1)
        eps = (z_t - abar_t.sqrt() * z_0) / (1 - abar_t).sqrt()
        return eps.float()

    return net


class Spy:
    """Calls a U-Net and notes what it is given: (z_t, t, tokens, beside) of each call."""

    def __init__(self, net):
        self.net = net
        self.calls = []

    def __call__(self, z_t, t, tokens=None, beside=None):
        self.calls.append((z_t, t, tokens, beside))
        return self.net(z_t, t, tokens, beside)


class Blocks(nn.Module):
    """A stage one with f = 4 and no weights: a latent is the mean of 4 x 4 pixels."""

    cfg = SimpleNamespace(f=4, c_z=3)
    z_std = torch.ones(())

    def encode(self, x):
        z = F.avg_pool2d(x, 4)
        return Posterior(z, torch.full_like(z, -torch.inf))

    def decode(self, z):
        return F.interpolate(z, scale_factor=4)


def model_of(net, ae=None, *, abar=ABAR, task="uncond", tau=None, shape=None, p_drop=0.1):
    """Return a model with a given U-Net, whose images have 8 x 8 pixels; default: in pixels."""
    config = ModelConfig(
        task=task,
        size=(8, 8),
        autoencoder=AEConfig(),
        unet=UNetConfig(),
        tau=shape or {},
        diffusion=DiffusionConfig(predict="eps"),
        p_drop=p_drop,
    )
    return LatentDiffusion(config, ae or Pixels(), net, tau, TASKS[task](config.tau), abar)


def sample(model, conditions, *, seed=0, first=0, **how):
    """Sample images `first`... of a seed, one per condition."""
    seeds = [(seed, first + i) for i in range(len(conditions))]
    return model.sample(conditions, seeds=seeds, **how)


def noise(seed: int, index: int, shape: tuple[int, ...], k: int = 0) -> Tensor:
    """Return the k-th noise of an image: 0 is its z_T, then come those of the steps."""
    rng = generator(seed, index)
    drawn = [torch.randn(shape, generator=rng) for _ in range(k + 1)]
    return drawn[k]


def random_image(seed: int = 0, h: int = 8, w: int = 8) -> Tensor:
    return torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


# ---- from an image

@pytest.mark.parametrize("n", [1, 2, 7, 50])
@pytest.mark.parametrize("rule", TIMESTEPS)
def test_later_is_the_end_of_the_steps(rule, n):
    ts = TIMESTEPS[rule](ABAR, n)
    n = len(ts) - 1
    assert later(ts, 1.0) == ts
    assert later(ts, 1e-9) == ts[-2:]
    for k in range(1, n + 1):
        assert later(ts, k / n) == ts[n - k:]


@pytest.mark.parametrize("strength,n_steps", [(0.3, 3), (0.5, 5), (1, 10), (0.01, 1)])
def test_sampling_from_an_image_begins_at_the_noise_level_of_its_first_timestep(strength, n_steps):
    """z_t is sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise, at the very t that the U-Net is given."""
    net = Spy(of_gaussian_data)
    image = random_image()
    conditions = [{"init": image}, {"init": image}]
    sample(model_of(net), conditions, seed=4, first=3, steps=10, strength=strength)

    ts = timesteps(ABAR, 10)[10 - n_steps:]
    assert [int(t[0]) for _, t, _, _ in net.calls] == ts[:-1]
    abar_t = ABAR[ts[0]].item()
    z_t = net.calls[0][0]
    for i in range(2):
        z_T = noise(4, 3 + i, (3, 8, 8))
        assert_close(z_t[i], abar_t ** 0.5 * image + (1 - abar_t) ** 0.5 * z_T)


def test_without_an_image_to_begin_from_strength_does_not_matter():
    net = Spy(of_gaussian_data)
    sample(model_of(net), [{}], steps=10, strength=0.3)
    assert len(net.calls) == 10
    assert torch.equal(net.calls[0][0][0], noise(0, 0, (3, 8, 8)))


def test_the_less_strength_the_more_of_the_image_is_kept():
    """With all of it, the sample is as the data are, N(M, S^2)."""
    image = random_image()
    distances = []
    for strength in (0.01, 0.1, 0.5, 1):
        x = sample(model_of(of_gaussian_data), [{"init": image}], steps=200, strength=strength)
        distances.append(float((x[0] - image).abs().mean()))
    assert distances == sorted(distances)
    assert distances[0] < 0.12 < distances[1]
    assert abs(x.mean() - gaussian.M) < 0.07
    assert abs(x.std() - gaussian.S) < 0.07


# ---- from the noise of one seed to that of another

def test_slerp_goes_from_a_to_b_in_equal_angles_at_one_norm():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 6, 5, generator=rng).double()
    b = b * a.norm() / b.norm()
    assert_close(slerp(a, b, 0.0), a)
    assert_close(slerp(a, b, 1.0), b)
    assert torch.equal(slerp(a, a, 0.3), a)

    way = [slerp(a, b, k / 7) for k in range(8)]
    for z in way:
        assert_close(z.norm(), a.norm())
    assert angle(a, b) > 1
    for z, z_next in zip(way, way[1:]):
        assert math.isclose(angle(z, z_next), angle(a, b) / 7, rel_tol=1e-9)


def angle(u: Tensor, v: Tensor) -> float:
    cosine = u.flatten() @ v.flatten() / u.norm() / v.norm()
    return math.acos(cosine.item())


def test_a_strip_begins_at_image_0_of_one_seed_and_ends_at_image_0_of_the_other():
    shape = (3, 4, 4)
    start = noise(5, 0, shape)
    end = noise(9, 0, shape)
    strip = strip_noise(5, 9, 0, 4, 4, shape)
    assert_close(strip, torch.stack([slerp(start, end, k / 3) for k in range(4)]))
    assert_close(strip[0], start)
    assert_close(strip[3], end)
    assert_close(strip_noise(5, 9, 0, 1, 1, shape)[0], start)

    # It is the same in two batches; images 4... are a second strip, of the next prompt.
    parts = [strip_noise(5, 9, first, 2, 4, shape) for first in (0, 2)]
    assert_close(torch.cat(parts), strip)
    both = strip_noise(5, 9, 0, 8, 4, shape)
    assert_close(both, torch.cat([strip, strip]))


def test_given_noise_replaces_z_T_alone():
    """The noise of the steps stays each image's own."""
    z_T = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    conditions = [{"image": random_image(), "mask": 1 - hole()}] * 2
    net = Spy(of_gaussian_data)
    sample(model_of(net), conditions, steps=3, z_T=z_T)
    z_t, t, _, _ = net.calls[0]
    abar_t = ABAR[t[0]].item()
    for i in range(2):
        step_noise = noise(0, i, (3, 8, 8), 1)
        known = abar_t ** 0.5 * random_image() + (1 - abar_t) ** 0.5 * step_noise
        assert_close(z_t[i], torch.where(hole() > 0, known, z_T[i]))


# ---- where a part of the image is known

def hole(h: int = 8, w: int = 8) -> Tensor:
    mask = torch.zeros(1, h, w)
    mask[:, 2:5, 1:7] = 1
    return mask


@pytest.mark.parametrize("task,pull", [("inpaint", False), ("inpaint", True), ("uncond", False)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_the_hole_is_repainted(sampler, task, pull):
    """What is known stays bit by bit, and the hole is what the U-Net has learned.

    A sampler that builds on its past steps is refused where what is known is put back at each
    step: always, if the U-Net does not see the mask.
    """
    image = random_image()
    learned = random_image(1)
    model = model_of(of_one_image(learned), task=task)
    conditions = [{"image": image, "mask": hole()}]
    if SAMPLERS[sampler].has_past and (pull or task == "uncond"):
        with pytest.raises(BadInput, match="builds on its past steps"):
            sample(model, conditions, steps=10, sampler=sampler, pull=pull)
        return

    x, = sample(model, conditions, steps=10, sampler=sampler, pull=pull)
    known = (hole() == 0).expand(3, 8, 8)
    assert torch.equal(x[known], image[known])
    assert_close(x[~known], learned[~known], atol=1e-3, rtol=0)


def test_a_latent_is_known_where_no_pixel_of_its_block_is_in_the_hole():
    """Before each step known latents are sampled from q(z_t | z) anew, the others left alone."""
    image = random_image(h=8, w=16)
    mask = torch.zeros(1, 8, 16)
    mask[:, 5, 7] = 1                               # one pixel, in block (1, 1) of (2, 4)
    net = Spy(of_gaussian_data)
    x, = sample(model_of(net, Blocks()), [{"image": image, "mask": mask}], size=(8, 16), steps=4)

    known = torch.ones(2, 4, dtype=torch.bool)
    known[1, 1] = False
    z = F.avg_pool2d(image, 4)
    assert len(net.calls) == 4
    for k, (z_t, t, _, _) in enumerate(net.calls):
        abar_t = ABAR[t[0]].item()
        expected = abar_t ** 0.5 * z + (1 - abar_t) ** 0.5 * noise(0, 0, (3, 2, 4), 1 + k)
        assert_close(z_t[0][:, known], expected[:, known])
    first_z_t = net.calls[0][0]
    assert torch.equal(first_z_t[0, :, 1, 1], noise(0, 0, (3, 2, 4))[:, 1, 1])
    assert torch.equal((x != image).any(0), mask[0] > 0)


@pytest.mark.parametrize("pull", [False, True])
def test_an_inpainting_model_sees_image_and_hole_and_is_pulled_to_the_rest_if_asked(pull):
    """Else z_t is the sampler's own everywhere; with pull, in the hole alone."""
    image = random_image()
    net = Spy(of_gaussian_data)
    model = model_of(net, task="inpaint")
    assert model.sees_mask
    sample(model, [{"image": image, "mask": hole()}], steps=3, pull=pull)

    z_t, _, tokens, beside = net.calls[0]
    z_T = noise(0, 0, (3, 8, 8))
    assert torch.equal(z_t[0] * hole(), z_T * hole())
    assert torch.equal(z_t[0], z_T) == (not pull)
    assert tokens is None
    assert_close(beside[0], torch.cat([torch.where(hole() > 0, -1, image), 2 * hole() - 1]))


def test_superres_does_not_use_the_true_image():
    """An item of a data set has it, too; a model that has learned black samples black."""
    black = torch.full((3, 32, 32), -1.0)
    item = Degraded(Shapes(1, 32), "small", 0)[0]
    x, = sample(model_of(of_one_image(black), task="superres"), [item], size=(32, 32), steps=3)
    assert_close(x, black, atol=1e-3, rtol=0)


# ---- batches, sizes, samplers

@pytest.mark.parametrize("fields", [(), ("init",), ("image", "mask")])
def test_an_image_is_the_same_in_any_batch(fields):
    conditions = []
    for i in range(5):
        values = {"image": random_image(i), "mask": hole(), "init": random_image(9 + i)}
        conditions.append({field: values[field] for field in fields})
    model = model_of(of_gaussian_data)
    how = {"steps": 6, "eta": 1.0}

    x = sample(model, conditions, seed=3, **how)
    first_two = sample(model, conditions[:2], seed=3, **how)
    others = sample(model, conditions[2:], seed=3, first=2, **how)
    assert_close(torch.cat([first_two, others]), x)

    # Images differ from one another, and from those of another seed.
    assert not torch.allclose(x[0], x[1])
    assert not torch.allclose(sample(model, conditions, seed=4, **how), x, atol=0.02)


def test_the_sampler_and_eta_are_passed_on():
    def sampled(sampler, eta=0.0):
        return sample(model_of(of_gaussian_data), [{}], steps=9, sampler=sampler, eta=eta)

    assert_close(sampled("ddim", 1.0), sampled("ddpm"), atol=1e-3, rtol=0)
    assert not torch.allclose(sampled("ddim"), sampled("ddim", 1.0), atol=0.02)


def test_images_need_not_be_square():
    """size is (H, W); the U-Net is given (H / f, W / f)."""
    learned = random_image(1, 2, 4)
    net = Spy(of_one_image(learned))
    x = sample(model_of(net, Blocks()), [{}, {}], size=(8, 16), steps=5)
    assert x.shape == (2, 3, 8, 16)
    assert net.calls[0][0].shape == (2, 3, 2, 4)
    expected = F.interpolate(learned[None], scale_factor=4)[0]
    assert_close(x[0], expected, atol=1e-3, rtol=0)


def test_the_size_is_that_of_training_unless_one_is_given():
    assert sample(model_of(of_gaussian_data), [{}], steps=1).shape == (1, 3, 8, 8)


def test_pixels_are_latents_once_they_are_divided_by_z_std():
    ae = Pixels()
    x = random_image()[None]
    assert_close(ae.encode(x).mean, x)

    ae.z_std.fill_(0.5)
    q = ae.encode(x)
    assert_close(q.mean, 2 * x)
    assert torch.equal(q.sample(torch.randn_like(x)), q.mean)
    assert_close(ae.decode(q.mean), x)
    sampled = sample(model_of(of_one_image(2 * x), ae), [{}], steps=5)
    assert_close(sampled, x, atol=1e-3, rtol=0)


def test_pixels_come_back_from_their_config_and_state():
    ae = Pixels()
    ae.z_std.fill_(0.7)
    back = build_autoencoder(ae.cfg)
    assert isinstance(back, Pixels)
    assert (back.cfg.f, back.cfg.c_z) == (1, 3)
    back.load_state_dict(ae.state_dict())
    assert_close(back.encode(random_image()[None]).mean, random_image()[None] / 0.7)


def test_images_are_clamped():
    bright = torch.full((3, 8, 8), 3.0)
    x, = sample(model_of(of_one_image(bright)), [{}], steps=3)
    assert torch.equal(x, torch.ones(3, 8, 8))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_of_one_timestep_gives_the_networks_own_z_0(schedule, sampler):
    """T = 1 is plain regression: one call, at t = 0."""
    abar = cumulative(SCHEDULES[schedule].betas(1))
    net = Spy(lambda z_t, t, *ctx: 0 * z_t + 0.3)
    x, = sample(model_of(net, abar=abar), [{}], steps=1, sampler=sampler)
    abar_0 = abar[0].item()
    z_0 = (noise(0, 0, (3, 8, 8)) - (1 - abar_0) ** 0.5 * 0.3) / abar_0 ** 0.5
    assert_close(x, z_0.clamp(-1, 1))
    assert [int(t) for _, t, _, _ in net.calls] == [0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_step_is_enough_for_a_network_that_knows_the_image(sampler):
    learned = random_image(1)
    x, = sample(model_of(of_one_image(learned)), [{}], steps=1, sampler=sampler)
    assert_close(x, learned, atol=1e-3, rtol=0)


# ---- guidance

def sample_classes(p_drop=0.1, **how):
    """Sample class 2 and the null class, 3 -> calls of the U-Net, predicted z_0, embeddings."""
    torch.manual_seed(0)
    shape = {"n_classes": 4, "d": 5}
    tau = ClassEmbedder(**shape).requires_grad_(False)
    net = Spy(lambda z_t, t, tokens, beside: z_t * tokens.mean((1, 2)).view(-1, 1, 1, 1) / 9)
    model = model_of(net, task="class", tau=tau, shape=shape, p_drop=p_drop)

    z_0s = []

    def around(eps_theta):
        return record_z_0(eps_theta, ABAR, z_0s)

    sample(model, [{"label": 2}, {"label": 3}], steps=3, around=around, **how)
    assert len(net.calls) == len(z_0s) == 3
    return net.calls, torch.stack(z_0s), tau.embedding.weight


def test_guidance_asks_for_null_first_and_what_is_watched_is_guided():
    calls, z_0s, table = sample_classes(guidance_scale=3.0)
    z_t, t, tokens, _ = calls[0]
    assert_close(tokens[:, 0], table[[3, 3, 2, 3]])
    assert torch.equal(z_t[:2], z_t[2:])
    assert t.tolist() == [999] * 4

    abar_t = ABAR[999].item()
    eps_null = z_t[0] * table[3].mean() / 9
    eps = z_t[0] * table[2].mean() / 9
    guided = 3 * eps - 2 * eps_null
    assert_close(z_0s[0, 0], (z_t[0] - (1 - abar_t) ** 0.5 * guided) / abar_t ** 0.5)


def test_the_guidance_scale_is_the_tasks_own_unless_one_is_given():
    by_default = sample_classes()[1]
    assert_close(by_default, sample_classes(guidance_scale=2.0)[1])
    calls, _, table = sample_classes(guidance_scale=1.0)
    assert_close(calls[0][2][:, 0], table[[2, 3]])          # no guidance, half the work


def test_a_model_that_has_seen_no_null_condition_is_not_guided():
    calls, _, table = sample_classes(p_drop=0.0)
    assert_close(calls[0][2][:, 0], table[[2, 3]])


@pytest.mark.parametrize("p_drop", [0.1, 0.0])
def test_a_negative_condition_takes_the_place_of_null(p_drop):
    """With or without a null condition of its own; the scale is the task's, 2."""
    calls, z_0s, table = sample_classes(p_drop, negative={"label": 1})
    z_t, _, tokens, _ = calls[0]
    assert_close(tokens[:, 0], table[[1, 1, 2, 3]])

    abar_t = ABAR[999].item()
    eps_negative = z_t[0] * table[1].mean() / 9
    eps = z_t[0] * table[2].mean() / 9
    guided = 2 * eps - eps_negative
    assert_close(z_0s[0, 0], (z_t[0] - (1 - abar_t) ** 0.5 * guided) / abar_t ** 0.5)


@pytest.mark.parametrize("task", ["text", "text-inpaint"])
def test_a_negative_caption_is_the_empty_one_or_undoes_the_prompt(task):
    """The empty caption is null. One equal to the prompt leaves no direction to go further in."""
    model = made_up_model(task)
    conditions = made_up_items(2)
    captions = [condition["caption"] for condition in conditions]
    by_null = sample(model, conditions, steps=2)
    assert torch.equal(sample(model, conditions, steps=2, negative={"caption": ""}), by_null)

    conditions[1]["caption"] = captions[0]
    plain = sample(model, conditions, steps=2, guidance_scale=1)
    undone = sample(model, conditions, steps=2, negative={"caption": captions[0]})
    assert_close(undone, plain, atol=1e-3, rtol=0)
    other = sample(model, conditions, steps=2, negative={"caption": captions[1]})
    assert not torch.allclose(other, plain, atol=1e-2)


@pytest.mark.parametrize("task", ["text", "text-inpaint", "class"])
def test_a_blend_of_two_conditions_goes_from_one_to_the_other(task):
    """At weight 0 it is the first, at 1 the second, and half way neither; the noise is one."""
    model = made_up_model(task)
    first, second = made_up_items(2)
    name = "label" if task == "class" else "caption"
    other = {name: second[name]}

    def blend(weight):
        return sample(model, [first | {"toward": (other, weight)}], steps=2)

    begin = sample(model, [first], steps=2)
    end = sample(model, [first | other], steps=2)
    assert_close(blend(0.0), begin)
    assert_close(blend(1.0), end)
    half = blend(0.5)
    for image in (begin, end):
        assert not torch.allclose(half, image, atol=1e-3)


def test_guidance_of_captions_leaves_what_surrounds_a_hole():
    """Image and mask lie beside z_t in both halves; the tokens differ."""
    model = made_up_model("text-inpaint")
    model = replace(model, unet=Spy(model.unet))
    sample(model, made_up_items(2), steps=1)
    (_, _, tokens, beside), = model.unet.calls
    assert len(beside) == 4
    assert_close(beside[:2], beside[2:])
    assert not torch.equal(beside[0], beside[1])
    assert_close(tokens[0], tokens[1])
    assert not torch.allclose(tokens[2:], tokens[:2], atol=1e-2)


def test_without_a_condition_there_is_nothing_to_guide_by():
    net = Spy(of_gaussian_data)
    sample(model_of(net), [{}] * 3, steps=2, guidance_scale=5.0)
    assert len(net.calls) == 2
    for z_t, _, tokens, beside in net.calls:
        assert len(z_t) == 3
        assert tokens is None
        assert beside is None


# ---- models of every task

@pytest.fixture(scope="module", params=TASKS)
def model(request):
    """A random model of each task in turn."""
    return made_up_model(request.param)


def test_a_model_is_built_again_from_what_a_checkpoint_holds(model):
    """Also from an older one, which has p_drop among the flags of its run only."""
    config = replace(model.config, p_drop=0.25)
    saved = config.to_checkpoint()
    again = ModelConfig.from_checkpoint(saved)
    assert again == config
    older = {name: v for name, v in saved.items() if name != "p_drop"}
    older["args"] = {"p_drop": 0.25}
    assert ModelConfig.from_checkpoint(older) == config

    rebuilt = build_model(again)
    for name in ("ae", "unet", "tau"):
        net = getattr(model, name)
        if net is None:
            assert getattr(rebuilt, name) is None
        else:
            getattr(rebuilt, name).load_state_dict(net.state_dict())
    conditions = made_up_items(2)
    assert_close(sample(rebuilt, conditions, steps=2), sample(model, conditions, steps=2))


def test_a_model_of_a_task_whose_conditions_were_made_otherwise_is_refused(model):
    """Its images would be wrong in silence."""
    config = model.config.to_checkpoint()
    task = config["config"]["task"]
    assert task.get("version", 1) == model.task.version
    task["version"] = model.task.version + 1
    with pytest.raises(BadInput, match=f"its task {task['name']} has conditions of version"):
        ModelConfig.from_checkpoint(config)


def test_samples_of_every_task_are_the_same_in_any_batch(model):
    conditions = made_up_items(3)
    x = sample(model, conditions, steps=2)
    assert x.shape == (3, 3, 32, 32)
    assert torch.isfinite(x).all()
    for i in range(3):
        alone = sample(model, conditions[i:i + 1], first=i, steps=2)
        assert_close(alone[0], x[i], atol=1e-3, rtol=0)


def test_a_model_for_sampling_is_frozen(model):
    model.for_sampling("cpu")
    for net in (model.ae, model.unet, model.tau):
        if net is not None:
            assert not net.training
            assert not any(p.requires_grad for p in net.parameters())
    assert model.size_multiple == model.ae.cfg.f * model.unet.cfg.factor
