"""beyond/gradient_guidance.py and beyond/guidance.py, against closed forms."""
import gaussian
import pytest
import torch
from gaussian import ABAR
from PIL import Image
from torch.testing import assert_close

from tinyldm.beyond.gradient_guidance import fits_image, gradient_guided
from tinyldm.beyond.guidance import guidance_of_today
from tinyldm.conditioning import Context
from tinyldm.diffusion import at, predict_z_0
from tinyldm.guidance import guided
from tinyldm.samplers import ddim, timesteps

# ---- by a gradient


def test_guidance_by_the_true_p_of_y_samples_the_posterior():
    """y = z_0 + noise of std 0.2: all is Gaussian, and Bayes' rule says what z_0 then is."""
    y = 1.0
    noise_variance = 0.04

    def log_p(z_t, t, eps):
        """log N(y; E[z_0 | z_t], Var[z_0 | z_t] + noise_variance)."""
        abar_t = at(ABAR, t, z_t)
        z_0 = predict_z_0(z_t, eps, abar_t)
        of_z_0 = gaussian.S ** 2 * (1 - abar_t) / gaussian.variance(abar_t)
        return (-(y - z_0) ** 2 / (of_z_0 + noise_variance) / 2).sum((1, 2, 3))

    eps_theta = gradient_guided(gaussian.eps_theta, ABAR, log_p, 1.0)
    z_T, _ = gaussian.noise()
    z_0 = ddim(eps_theta, z_T, (), ABAR, timesteps(ABAR, 1000))

    precision = 1 / gaussian.S ** 2 + 1 / noise_variance
    mean = (gaussian.M / gaussian.S ** 2 + y / noise_variance) / precision
    assert abs(z_0.mean() - mean) < 0.01
    assert abs(z_0.std() - precision ** -0.5) < 0.01


def test_a_scale_of_0_changes_nothing():
    z_T, _ = gaussian.noise()
    t = torch.full((64,), 500)
    eps_theta = gradient_guided(gaussian.eps_theta, ABAR, lambda z, t, eps: z.sum((1, 2, 3)), 0)
    assert_close(eps_theta(z_T, t, ()), gaussian.eps_theta(z_T, t))


def no_noise(z_t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of log_p with which z_0 is z_t / sqrt(abar_t)."""
    return z_t, torch.full((len(z_t),), 500), torch.zeros_like(z_t)


def test_the_distance_to_a_smaller_image_is_that_of_the_means():
    """-1/2 of the summed squares; the decoder here doubles."""
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(3, 2, 4, 4, generator=generator)
    image = torch.randn(2, 2, 2, generator=generator)
    log_p = fits_image(lambda z_0: 2 * z_0, ABAR, image)
    x = 2 * z_t / ABAR[500].float().sqrt()
    means = x.view(3, 2, 2, 2, 2, 2).mean((3, 5))           # of 2 x 2 pixels each
    wanted = -((means - image) ** 2).flatten(1).sum(1) / 2
    assert_close(log_p(*no_noise(z_t)), wanted)


def test_what_is_not_visible_does_not_count():
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(1, 2, 4, 4, generator=generator).requires_grad_()
    visible = torch.zeros(1, 4, 4)
    visible[:, :, :2] = 1
    log_p = fits_image(lambda z_0: z_0, ABAR, torch.zeros(2, 4, 4), visible)
    gradient, = torch.autograd.grad(log_p(*no_noise(z_t)).sum(), z_t)
    assert (gradient[..., :2] != 0).all()
    assert (gradient[..., 2:] == 0).all()


# ---- classifier-free guidance of today

T_HIGH, T_LOW = 700, 100            # sigma is 7.9 and 0.46 there


def eps_of_tokens(z_t, t, ctx):
    """A network that heeds its tokens, and counts the samples that it is asked for."""
    eps_of_tokens.n_samples = len(z_t)
    return 0.3 * z_t + ctx.tokens.view(-1, 1, 1, 1) * torch.sin(z_t)


CTX = Context(tokens=torch.tensor([1.0, 2.0]).view(2, 1, 1), beside=None)
CTX_NULL = Context(tokens=torch.zeros(1, 1, 1), beside=None)


def call(guide, t, s=3.0):
    """Return z_t, the guided eps at timestep t, and how many samples the network was asked for."""
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(2, 2, 4, 4, generator=generator)
    eps = guide(eps_of_tokens, CTX_NULL, s)(z_t, torch.full((2,), t), CTX)
    return z_t, eps, eps_of_tokens.n_samples


def test_within_the_interval_it_is_plain_guidance_and_outside_none():
    """sigma at t = 500 is 2.8."""
    today = guidance_of_today(ABAR, (1.0, 5.0))
    _, inside, n_inside = call(today, 500)
    assert_close(inside, call(guided, 500)[1])
    assert n_inside == 4
    for t in (T_LOW, T_HIGH):
        _, outside, n_outside = call(today, t)
        assert_close(outside, call(guided, t, s=1)[1])
        assert n_outside == 2


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaling_gives_z_0_its_std_again(phi):
    """Of each sample: phi of the way from the guided z_0's std to the unguided one's."""
    today = guidance_of_today(ABAR, (0.0, float("inf")), phi)
    abar_t = ABAR[T_HIGH].float()

    def std(guide, s):
        z_t, eps, _ = call(guide, T_HIGH, s)
        return predict_z_0(z_t, eps, abar_t).std((1, 2, 3))

    wanted = phi * std(guided, 1.0) + (1 - phi) * std(guided, 3.0)
    assert_close(std(today, 3.0), wanted)
    assert not torch.allclose(std(guided, 1.0), std(guided, 3.0), rtol=0.05)


# ---- sample.py

def save_grey(path, value, size=16):
    Image.new("RGB", (size, size), (value,) * 3).save(path)
    return path


def mean_of(path):
    """The mean of a folder's first image, in 0..255."""
    pixels = Image.open(path / "000000.png").convert("L").tobytes()
    return sum(pixels) / len(pixels)


def test_sample_py_guides_to_an_image(trained, tmp_path, cli):
    """An untrained model's samples get as bright, or as dark, as the image that is given."""
    means = {}
    for value in (30, 220):
        image = save_grey(tmp_path / f"{value}.png", value, size=4)
        cli("sample.py", "--ckpt", trained / "ldm/model.pt", "--guide", image, "--guide-scale", 20,
            "--steps", 8, "--n", 1, "--scale", 1, "--out", tmp_path / str(value), "a circle")
        means[value] = mean_of(tmp_path / str(value))
    assert means[30] + 5 < means[220]
