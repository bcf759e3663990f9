"""train_ae.py's and train_ldm.py's figures: held-out loss by noise level, and bits, by hand."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_AE, TINY_LDM
from PIL import Image
from torch.testing import assert_close

from tinyldm import training as tr
from tinyldm.autoencoder import Posterior
from tinyldm.diffusion import cumulative, sqrt_linear_betas
from tinyldm.generate import Model
from tinyldm.pictures import save_curves
from tinyldm.quantize import Codebook
from train_ae import evaluate
from train_ldm import held_out_loss

ABAR = cumulative(sqrt_linear_betas())

def model(net, predict="eps", abar=ABAR):
    return Model(None, net, None, None, abar, predict, "uncond", (), {})


def latents(n, std=1.0, logvar=-math.inf):
    """q(z | x) whose means are N(0, std^2)."""
    mean = std * torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Posterior(mean, torch.full_like(mean, logvar))


def test_held_out_loss_of_a_net_that_knows_nothing_is_1():
    m, q = model(lambda z_t, t, ctx: 0 * z_t), latents(200)
    told = held_out_loss(m, q, torch.zeros(200))
    assert list(told) == [f"held_out_loss_at_{t}" for t in (0, 250, 500, 750)]
    assert_close(list(told.values()), [1.] * 4, atol=.03, rtol=0)
    assert held_out_loss(m, q, torch.zeros(200)) == told


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_held_out_loss_of_the_best_net_for_gaussian_latents(predict):
    """eps_theta = sqrt(1 - abar) z_t / var, var = abar s^2 + 1 - abar; its loss is abar s^2 / var.

    Half of s^2 is the posterior's own variance."""
    def best(z_t, t, ctx):
        a = ABAR[t].float().view(-1, 1, 1, 1)
        var = .5 * a + 1 - a
        eps = (1 - a).sqrt() * z_t / var
        return eps if predict == "eps" else (eps - (1 - a).sqrt() * z_t) / a.sqrt()
    told = held_out_loss(model(best, predict), latents(200, .5, math.log(.25)), torch.zeros(200))
    want = (.5 * ABAR / (.5 * ABAR + 1 - ABAR)).view(4, 250).mean(1).tolist()
    assert_close(list(told.values()), want, rtol=.03, atol=1e-3)


def test_held_out_loss_of_one_latent_by_hand():
    """t in the middle of each quarter of T; the second draw of generator (0, 0) is eps."""
    seen = []

    def net(z_t, t, ctx):
        seen.append((z_t, int(t)))
        return torch.full_like(z_t, .5)
    q = latents(1)
    told = held_out_loss(model(net), q, torch.zeros(1))
    g = tr.generator(0, 0)
    _, eps = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 4, 8, 8, generator=g)
    assert [t for _, t in seen] == [125, 375, 625, 875]
    for z_t, t in seen:
        assert_close(z_t, ABAR[t].sqrt().float() * q.mean + (1 - ABAR[t]).sqrt().float() * eps)
    assert_close(list(told.values()), [(eps - .5).square().mean().item()] * 4)


def test_held_out_loss_spreads_t_over_each_quarter():
    seen = []

    def net(z_t, t, ctx):
        seen.append(t)
        return z_t
    held_out_loss(model(net), latents(64), torch.zeros(64))
    for k, t in enumerate(seen):
        assert k * 250 <= t.min() < k * 250 + 4 and k * 250 + 246 <= t.max() < k * 250 + 250
        assert (t.diff() >= 3).all()


# ---- stage one

def figures(ae, x):
    def net(v):
        return v.flatten(1)[:, :4], None
    net.name = "four"
    return evaluate(ae, net, x, torch.device("cpu"))[1]


def pictures(n=70):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_bits_of_codes_are_places_times_their_entropy():
    """Codes of frequency 1/2, 1/4, 1/4, 0: 1.5 bits at each of 8 x 8 places."""
    codebook = Codebook(4, 1)
    codebook.codes.data = torch.tensor([[-6.], [0], [6], [60]])
    z = torch.tensor([-3., -2.9, .2, 2.8]).repeat(70 * 16).view(70, 1, 8, 8)   # in units of z_std
    ae = SimpleNamespace(
        codebook=codebook, z_std=torch.tensor(2.), decode=lambda z: torch.zeros(len(z), 3, 16, 16),
        encode=lambda x: Posterior(z[:len(x)], torch.full_like(z[:len(x)], -torch.inf)))
    assert_close(figures(ae, pictures())["bits"], torch.tensor(64 * 1.5))


def test_bits_of_a_posterior_are_its_kl_over_ln_2():
    """KL(N(1, e) || N(0, 1)) = (1 + e - 1 - 1) / 2 nats of each of 64 values; of N(0, 1): 0."""
    for m, logvar, nats in ((1., 1., 64 * (math.e - 1) / 2), (0., 0., 0.)):
        ae = SimpleNamespace(
            codebook=None, decode=lambda z: torch.zeros(len(z), 3, 16, 16),
            encode=lambda x, m=m, logvar=logvar: Posterior(*(torch.full((len(x), 1, 8, 8), v)
                                                             for v in (m, logvar))))
        assert_close(figures(ae, pictures())["bits"].item(), nats / math.log(2))


def test_a_perfect_reconstruction_and_a_blurred_one():
    def through(decode):
        return figures(SimpleNamespace(codebook=None, decode=decode,
                                       encode=lambda x: Posterior(x, 0 * x)), x)
    x = .5 * pictures()
    same, half = through(lambda z: z), through(lambda z: .5 * z)
    blurred = through(lambda z: torch.nn.functional.avg_pool2d(z, 3, 1, 1))
    assert same["edges"] == same["held_out_ssim"] == 1 and same["held_out_psnr"] == math.inf
    assert abs(same["fd_four"]) < 1e-9 and same["precision"] == same["recall"] == 1
    assert_close(half["edges"], torch.tensor(.5))
    assert blurred["edges"] < .5 and blurred["fd_four"] > .01 > abs(same["fd_four"])
    mse = (.5 * x).square().flatten(1).mean(1)
    assert_close(half["held_out_psnr"], 10 * (4 / mse).log10().mean())


# ---- the log's figures and their plot

def test_figures_are_written_where_due_and_at_the_end(tmp_path, cli, monkeypatch):
    """With a row of pictures and the plot of all that the log then holds."""
    drawn = []
    monkeypatch.setattr("tinyldm.pictures.save_curves", lambda log, path: drawn.append(
        (path.name, log.read_text().count("fd_shapes"))))
    cli("train_ae.py", *TINY_AE, "--size", 16, "--steps", 5, "--eval-every", 2, "--disc-weight", 0,
        "--out", tmp_path)
    told = [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in told if "fd_shapes" in x] == [2, 4, 5]
    assert [x["step"] for x in told if "rec" in x] == [1, 2, 3, 4, 5] and len(told) == 8
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [
        f"recon_{i:06d}.png" for i in (2, 4, 5)]
    assert drawn == [("curves.png", i) for i in (1, 2, 3)]


def test_no_pictures_are_not_judged_and_one_is(tmp_path, cli, folder):
    tiny = ["--size", 16, "--steps", 1, "--disc-weight", 0]
    cli("train_ae.py", *TINY_AE, *tiny, "--eval-n", 0, "--out", tmp_path / "ae")
    for i, flags in enumerate((["--eval-n", 0], ["--data", folder(1), "--task", "uncond"])):
        cli("train_ldm.py", *TINY_LDM, *tiny[:4], "--ae", tmp_path / "ae/ckpt.pt", *flags,
            "--out", tmp_path / str(i))
    for name, n in (("ae", 0), ("0", 0), ("1", 1)):
        log = (tmp_path / name / "log.jsonl").read_text().splitlines()
        assert len(log) == 1 + n and all("fd_shapes" in x for x in log[1:])
        assert len([p for p in (tmp_path / name).glob("*.png") if p.stem != "curves"]) == n
        assert (tmp_path / name / "ckpt.pt").exists()


def test_curves_show_each_value_by_step(tmp_path, monkeypatch):
    Figure, drawn = pytest.importorskip("matplotlib.figure").Figure, []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig",
                        lambda self, path: drawn.append(save(self, path) or self))
    lines = [{"step": 1, "loss": 3., "ms": 9.}, {"step": 2, "loss": 2.},
             {"step": 2, "held_out_loss_at_0": .5, "held_out_loss_at_250": .25}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    save_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    loss, held_out = drawn[0].axes
    assert loss.get_title() == "loss" and held_out.get_title() == "held_out_loss"
    assert [v.get_xydata().tolist() for v in loss.lines] == [[[1, 3], [2, 2]]]
    assert [v.get_xydata().tolist() for v in held_out.lines] == [[[2, .5]], [[2, .25]]]
    assert [v.get_text() for v in held_out.get_legend().texts] == ["t from 0", "t from 250"]
    assert Image.open(tmp_path / "curves.png").width > 1000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    save_curves(tmp_path / "log.jsonl", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
