"""The figures of the training scripts, by hand: held-out loss by noise level, bits, edges."""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_AE, TINY_LDM
from gaussian import ABAR
from runs import log_rows, steps_of
from torch.testing import assert_close

from tinyldm.autoencoder import AEConfig, Pixels, Posterior
from tinyldm.diffusion import PREDICTIONS, DiffusionConfig
from tinyldm.model import LatentDiffusion, ModelConfig
from tinyldm.quantize import Codebook
from tinyldm.seeds import generator
from tinyldm.tasks import Unconditional
from tinyldm.unet import UNetConfig
from train_ae import evaluate_reconstructions
from train_ldm import held_out_loss

# ---- stage two


def loss_of(net, posterior, predict="eps"):
    """The held-out loss of an unconditional model with a given U-Net."""
    diffusion = DiffusionConfig(predict=predict)
    config = ModelConfig("uncond", (8, 8), AEConfig(), UNetConfig(), {}, diffusion)
    model = LatentDiffusion(config, Pixels(), net, None, Unconditional({}), ABAR)
    return held_out_loss(model, posterior, {})


def latents(n, std=1.0, logvar=-math.inf):
    """q(z | x) of n images, whose means are N(0, std^2)."""
    mean = std * torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Posterior(mean, torch.full_like(mean, logvar))


def test_the_held_out_loss_of_a_net_that_knows_nothing_is_1():
    def net(z_t, t, tokens, beside):
        return 0 * z_t

    losses = loss_of(net, latents(200))
    assert list(losses) == [f"held_out_loss_at_{t}" for t in (0, 250, 500, 750)]
    assert_close(list(losses.values()), [1.0] * 4, atol=0.03, rtol=0)
    assert loss_of(net, latents(200)) == losses


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_held_out_loss_of_the_best_net_for_gaussian_latents(predict):
    """With z ~ N(0, s^2) the best eps_theta is sqrt(1 - abar) z_t / var, var = abar s^2 + 1 - abar.

    Its loss is abar s^2 / var. Half of s^2 is the variance of the posterior itself.
    """
    variance = 0.5

    def net(z_t, t, tokens, beside):
        abar_t = ABAR[t].float().view(-1, 1, 1, 1)
        eps = (1 - abar_t).sqrt() * z_t / (variance * abar_t + 1 - abar_t)

        # The output that claims this eps; all outputs are affine in it.
        prediction = PREDICTIONS[predict]
        at_0 = prediction.eps(torch.zeros_like(z_t), z_t, abar_t)
        at_1 = prediction.eps(torch.ones_like(z_t), z_t, abar_t)
        return (eps - at_0) / (at_1 - at_0)

    losses = loss_of(net, latents(200, 0.5, math.log(0.25)), predict)
    by_timestep = variance * ABAR / (variance * ABAR + 1 - ABAR)
    expected = by_timestep.view(4, 250).mean(1).tolist()
    assert_close(list(losses.values()), expected, rtol=0.03, atol=1e-3)


def test_the_held_out_loss_of_one_latent_by_hand():
    """t is in the middle of each quarter of T; the second noise of generator (0, 0) is eps."""
    calls = []

    def net(z_t, t, tokens, beside):
        calls.append((z_t, int(t)))
        return torch.full_like(z_t, 0.5)

    posterior = latents(1)
    losses = loss_of(net, posterior)
    rng = generator(0, 0)
    torch.randn(1, 4, 8, 8, generator=rng)
    eps = torch.randn(1, 4, 8, 8, generator=rng)

    assert [t for _, t in calls] == [125, 375, 625, 875]
    for z_t, t in calls:
        signal = ABAR[t].sqrt().float() * posterior.mean
        assert_close(z_t, signal + (1 - ABAR[t]).sqrt().float() * eps)
    expected = (eps - 0.5).square().mean().item()
    assert_close(list(losses.values()), [expected] * 4)


def test_the_held_out_loss_spreads_t_over_each_quarter():
    timesteps = []

    def net(z_t, t, tokens, beside):
        timesteps.append(t)
        return z_t

    loss_of(net, latents(64))
    for quarter, t in enumerate(timesteps):
        start = quarter * 250
        assert start <= t.min() < start + 4
        assert start + 246 <= t.max() < start + 250
        assert (t.diff() >= 3).all()


# ---- stage one

def figures_of(x, encode, decode, **more):
    """The figures of a stage one that is given by its functions."""
    ae = SimpleNamespace(encode=encode, decode=decode, codebook=None)
    vars(ae).update(more)

    def features(images):
        return images.flatten(1)[:, :4], None

    features.name = "four"
    _, figures = evaluate_reconstructions(ae, features, x, torch.device("cpu"))
    return figures


def random_images(n=70):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def black_images(z):
    return torch.zeros(len(z), 3, 16, 16)


def test_bits_of_codes_are_places_times_their_entropy():
    """Codes of frequency 1/2, 1/4, 1/4 and 0 are 1.5 bits at each of 8 x 8 places."""
    codebook = Codebook(4, 1)
    codebook.codes.data = torch.tensor([[-6.0], [0], [6], [60]])
    of_an_image = torch.tensor([-3.0, -2.9, 0.2, 2.8]).repeat(16)      # divided by z_std

    def encode(x):
        z = of_an_image.repeat(len(x)).view(len(x), 1, 8, 8)
        return Posterior(z, torch.full_like(z, -torch.inf))

    z_std = torch.tensor(2.0)
    figures = figures_of(random_images(), encode, black_images, codebook=codebook, z_std=z_std)
    assert_close(figures["bits"], torch.tensor(64 * 1.5))


@pytest.mark.parametrize("mean,logvar,nats", [(1.0, 1.0, 64 * (math.e - 1) / 2), (0.0, 0.0, 0.0)])
def test_bits_of_a_posterior_are_its_kl_over_ln_2(mean, logvar, nats):
    """KL(N(1, e), N(0, 1)) is (1 + e - 1 - 1) / 2 nats for each of 64 values; of N(0, 1) it is 0.
    """
    def encode(x):
        shape = (len(x), 1, 8, 8)
        return Posterior(torch.full(shape, mean), torch.full(shape, logvar))

    figures = figures_of(random_images(), encode, black_images)
    assert_close(figures["bits"].item(), nats / math.log(2))


def test_a_perfect_a_fainter_and_a_blurred_reconstruction():
    x = 0.5 * random_images()

    def encode(x):
        return Posterior(x, 0 * x)

    same = figures_of(x, encode, lambda z: z)
    assert same["edges"] == same["held_out_ssim"] == 1
    assert same["held_out_psnr"] == math.inf
    assert same["precision"] == same["recall"] == 1
    assert abs(same["fd_four"]) < 1e-9

    half = figures_of(x, encode, lambda z: 0.5 * z)
    assert_close(half["edges"], torch.tensor(0.5))
    mse = (0.5 * x).square().flatten(1).mean(1)
    assert_close(half["held_out_psnr"], 10 * (4 / mse).log10().mean())

    blurred = figures_of(x, encode, lambda z: torch.nn.functional.avg_pool2d(z, 3, 1, 1))
    assert blurred["edges"] < 0.5
    assert blurred["fd_four"] > 0.01


# ---- when they are written

def test_evaluations_come_when_due_and_at_the_end(tmp_path, cli, monkeypatch):
    """Each time with a row of images, and the plot of all that the log then holds."""
    plotted = []

    def save_curves(log, path):
        plotted.append((path.name, log.read_text().count("fd_shapes")))

    monkeypatch.setattr("train_ae.save_curves", save_curves)
    cli("train_ae.py", *TINY_AE, "--size", 16, "--steps", 5, "--eval-every", 2,
        "--disc-weight", 0, "--out", tmp_path)

    rows = log_rows(tmp_path)
    assert len(rows) == 8
    assert steps_of([row for row in rows if "rec" in row]) == [1, 2, 3, 4, 5]
    assert steps_of([row for row in rows if "fd_shapes" in row]) == [2, 4, 5]
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == [f"recon_{step:06d}.png" for step in (2, 4, 5)]
    assert plotted == [("curves.png", 1), ("curves.png", 2), ("curves.png", 3)]


@pytest.mark.parametrize("script,n", [("train_ae.py", 0), ("train_ldm.py", 0), ("train_ldm.py", 1)])
def test_nothing_is_evaluated_if_eval_n_is_0(tmp_path, trained, cli, monkeypatch, script, n):
    monkeypatch.setattr("tinyldm.data.open.N_HELD_OUT_SHAPES", 8)       # 256 take a second
    flags = TINY_AE
    if script == "train_ldm.py":
        flags = [*TINY_LDM, "--ae", trained / "ae/ckpt.pt", "--T", 4]
    cli(script, *flags, "--size", 16, "--steps", 1, "--eval-n", n, "--out", tmp_path)
    rows = log_rows(tmp_path)
    assert ["fd_shapes" in row for row in rows] == [False, True][:1 + n]
    assert len(list(tmp_path.glob("*.png"))) == n
    assert (tmp_path / "ckpt.pt").exists()


def test_a_data_set_that_holds_nothing_out_is_evaluated_by_its_training_images(
    tmp_path, trained, cli, folder
):
    flags = [*TINY_LDM, "--ae", trained / "ae/ckpt.pt", "--size", 16, "--T", 4, "--steps", 1]
    cli("train_ldm.py", *flags, "--task", "uncond", "--data", folder(1), "--out", tmp_path / "x")
    assert {"held_out_loss_at_0", "fd_texture"} <= set(log_rows(tmp_path / "x")[-1])

    output = cli("train_ae.py", *TINY_AE, "--size", 16, "--steps", 1, "--data", tmp_path / "images",
                 "--out", tmp_path / "ae")
    assert "no image is held out" in output


def test_images_with_names_of_their_own_are_judged_by_the_nearest(tmp_path, trained, cli, folder):
    """Not those that share captions. With --no-hold-out, every image is trained on."""
    flags = ["train_ldm.py", *TINY_LDM, "--ae", trained / "ae/ckpt.pt", "--size", 16, "--T", 4,
             "--steps", 1, "--eval-n", 4]
    shared = folder(40)
    cli(*flags, "--data", shared, "--out", tmp_path / "x")
    assert "named_is_nearest" not in log_rows(tmp_path / "x")[-1]

    for i in range(40):
        (shared / f"{i}.txt").write_text(f"picture number {i}")
    (shared / "metadata.jsonl").unlink()
    output = cli(*flags, "--data", shared, "--no-hold-out", "--out", tmp_path / "y")
    row = log_rows(tmp_path / "y")[-1]
    assert 0 <= row["named_is_nearest"] <= row["named_in_nearest_5"] <= 1
    assert "40 images, none of them held out" in output
