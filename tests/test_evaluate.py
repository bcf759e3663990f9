"""What the training scripts evaluate: held-out loss by noise level, bits, reconstructions."""
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_AE, TINY_LDM
from torch.testing import assert_close

from tinyldm.autoencoder import AEConfig, Posterior
from tinyldm.diffusion import DiffusionConfig
from tinyldm.model import LatentDiffusion, ModelConfig
from tinyldm.quantize import Codebook
from tinyldm.seeds import generator
from tinyldm.tasks import TASKS
from tinyldm.unet import UNetConfig
from train_ae import evaluate_reconstructions
from train_ldm import held_out_loss

ABAR = DiffusionConfig().abar()


# ---- stage two

def model_with(net, predict="eps") -> LatentDiffusion:
    """An unconditional model whose network is the function net(z_t, t, tokens, beside)."""
    diffusion = DiffusionConfig(predict=predict)
    config = ModelConfig("uncond", 32, AEConfig(), UNetConfig(), {}, diffusion)
    return LatentDiffusion(config, None, net, None, TASKS["uncond"]({}), ABAR)


def latents(n, std=1.0, logvar=-math.inf) -> Posterior:
    """q(z | x) of n images, whose means are N(0, std^2)."""
    mean = std * torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Posterior(mean, torch.full_like(mean, logvar))


def test_the_held_out_loss_of_a_net_that_knows_nothing_is_1():
    model = model_with(lambda z_t, t, tokens, beside: 0 * z_t)
    losses = held_out_loss(model, latents(200), {})
    assert list(losses) == [f"held_out_loss_at_{t}" for t in (0, 250, 500, 750)]
    assert_close(list(losses.values()), [1.0] * 4, atol=0.03, rtol=0)
    assert held_out_loss(model, latents(200), {}) == losses


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_the_held_out_loss_of_the_best_net_for_gaussian_latents(predict):
    """eps_theta = sqrt(1 - abar) z_t / var, with var = abar s^2 + 1 - abar; loss abar s^2 / var.

    Half of s^2 is the posterior's own variance.
    """
    def best(z_t, t, tokens, beside):
        abar_t = ABAR[t].float().view(-1, 1, 1, 1)
        var = 0.5 * abar_t + 1 - abar_t
        eps = (1 - abar_t).sqrt() * z_t / var
        if predict == "eps":
            return eps
        return (eps - (1 - abar_t).sqrt() * z_t) / abar_t.sqrt()

    posterior = latents(200, std=0.5, logvar=math.log(0.25))
    losses = held_out_loss(model_with(best, predict), posterior, {})
    expected = (0.5 * ABAR / (0.5 * ABAR + 1 - ABAR)).view(4, 250).mean(1).tolist()
    assert_close(list(losses.values()), expected, rtol=0.03, atol=1e-3)


def test_the_held_out_loss_of_one_latent_by_hand():
    """t is in the middle of each quarter of T; eps is the second noise of generator (0, 0)."""
    seen = []

    def net(z_t, t, tokens, beside):
        seen.append((z_t, int(t)))
        return torch.full_like(z_t, 0.5)

    posterior = latents(1)
    losses = held_out_loss(model_with(net), posterior, {})
    rng = generator(0, 0)
    torch.randn(1, 4, 8, 8, generator=rng)
    eps = torch.randn(1, 4, 8, 8, generator=rng)
    assert [t for _, t in seen] == [125, 375, 625, 875]
    for z_t, t in seen:
        signal = ABAR[t].sqrt().float() * posterior.mean
        assert_close(z_t, signal + (1 - ABAR[t]).sqrt().float() * eps)
    assert_close(list(losses.values()), [(eps - 0.5).square().mean().item()] * 4)


def test_the_held_out_loss_spreads_t_over_each_quarter():
    seen = []

    def net(z_t, t, tokens, beside):
        seen.append(t)
        return z_t

    held_out_loss(model_with(net), latents(64), {})
    for quarter, t in enumerate(seen):
        start = quarter * 250
        assert start <= t.min() < start + 4
        assert start + 246 <= t.max() < start + 250
        assert (t.diff() >= 3).all()


# ---- stage one

def four_pixels(x):
    """Features: the first four values of each image."""
    return x.flatten(1)[:, :4], None


four_pixels.name = "four"


def figures(ae, x):
    return evaluate_reconstructions(ae, four_pixels, x, torch.device("cpu"))[1]


def images(n=70):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def black_images(z):
    return torch.zeros(len(z), 3, 16, 16)


def test_bits_of_codes_are_places_times_their_entropy():
    """Codes of frequency 1/2, 1/4, 1/4, 0: 1.5 bits at each of 8 x 8 places."""
    codebook = Codebook(4, 1)
    codebook.codes.data = torch.tensor([[-6.0], [0], [6], [60]])
    z = torch.tensor([-3.0, -2.9, 0.2, 2.8]).repeat(70 * 16).view(70, 1, 8, 8)  # times z_std

    def encode(x):
        return Posterior(z[:len(x)], torch.full_like(z[:len(x)], -torch.inf))

    ae = SimpleNamespace(
        codebook=codebook, z_std=torch.tensor(2.0), decode=black_images, encode=encode
    )
    assert_close(figures(ae, images())["bits"], torch.tensor(64 * 1.5))


@pytest.mark.parametrize("mean,logvar,nats", [(1.0, 1.0, 64 * (math.e - 1) / 2), (0.0, 0.0, 0.0)])
def test_bits_of_a_posterior_are_its_kl_over_ln_2(mean, logvar, nats):
    """KL(N(1, e) || N(0, 1)) = (1 + e - 1 - 1) / 2 nats for each of 64 values; of N(0, 1): 0."""
    def encode(x):
        shape = (len(x), 1, 8, 8)
        return Posterior(torch.full(shape, mean), torch.full(shape, logvar))

    ae = SimpleNamespace(codebook=None, decode=black_images, encode=encode)
    assert_close(figures(ae, images())["bits"].item(), nats / math.log(2))


def test_a_perfect_reconstruction_and_worse_ones():
    x = 0.5 * images()

    def through(decode):
        ae = SimpleNamespace(
            codebook=None, decode=decode, encode=lambda x: Posterior(x, 0 * x)
        )
        return figures(ae, x)

    same = through(lambda z: z)
    half = through(lambda z: 0.5 * z)
    blurred = through(lambda z: torch.nn.functional.avg_pool2d(z, 3, 1, 1))
    assert same["edges"] == same["held_out_ssim"] == 1
    assert same["held_out_psnr"] == math.inf
    assert abs(same["fd_four"]) < 1e-9
    assert same["precision"] == same["recall"] == 1
    assert_close(half["edges"], torch.tensor(0.5))
    assert blurred["edges"] < 0.5
    assert blurred["fd_four"] > 0.01
    mse = (0.5 * x).square().flatten(1).mean(1)
    assert_close(half["held_out_psnr"], 10 * (4 / mse).log10().mean())


# ---- when the scripts evaluate

def test_evaluations_come_when_due_and_at_the_end(tmp_path, cli, monkeypatch):
    """Each has a line in the log, a grid, and a plot of everything that the log then holds."""
    plotted = []

    def save_curves(log, path):
        plotted.append((path.name, log.read_text().count("fd_shapes")))

    monkeypatch.setattr("train_ae.save_curves", save_curves)
    cli("train_ae.py", *TINY_AE, "--size", 16, "--steps", 5, "--eval-every", 2,
        "--disc-weight", 0, "--out", tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "fd_shapes" in line] == [2, 4, 5]
    assert [line["step"] for line in lines if "rec" in line] == [1, 2, 3, 4, 5]
    assert len(lines) == 8
    grids = sorted(path.name for path in tmp_path.glob("*.png"))
    assert grids == [f"recon_{step:06d}.png" for step in (2, 4, 5)]
    assert plotted == [("curves.png", 1), ("curves.png", 2), ("curves.png", 3)]


def test_eval_n_0_evaluates_nothing_and_one_image_is_enough(tmp_path, cli, folder):
    tiny = ["--size", 16, "--steps", 1]
    cli("train_ae.py", *TINY_AE, *tiny, "--disc-weight", 0, "--eval-n", 0,
        "--out", tmp_path / "ae")
    stage_two = [*TINY_LDM, *tiny, "--ae", tmp_path / "ae/ckpt.pt"]
    cli("train_ldm.py", *stage_two, "--eval-n", 0, "--out", tmp_path / "none")
    cli("train_ldm.py", *stage_two, "--data", folder(1), "--task", "uncond",
        "--out", tmp_path / "one")
    for name, n in (("ae", 0), ("none", 0), ("one", 1)):
        out = tmp_path / name
        log = (out / "log.jsonl").read_text().splitlines()
        assert len(log) == 1 + n
        assert all("fd_shapes" in line for line in log[1:])
        assert len(list(out.glob("samples_*.png"))) + len(list(out.glob("recon_*.png"))) == n
        assert (out / "ckpt.pt").exists()
