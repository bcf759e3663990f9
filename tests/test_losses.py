"""perceptual.py, patchgan.py and how train_ae.py adds them up: closed forms, autograd as oracle,
mistakes that others made, and the official code's numbers."""
import argparse
import json
import math

import pytest
import torch
from goldens import close, golden, weights
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import train_ae
from tinyldm import BadInput
from tinyldm.autoencoder import Posterior
from tinyldm.metrics import psnr
from tinyldm.patchgan import (
    Discriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    vanilla_loss,
)
from tinyldm.perceptual import STAGES, Perceptual
from tinyldm.quantize import Quantised

def pictures(n=2, side=32):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, side, side, generator=g) * 2 - 1


def test_perceptual_is_zero_for_equal_pictures_and_symmetric():
    p, x = Perceptual("random"), pictures()
    y = x.flip(0)
    assert_close(p(x, x), torch.zeros(2))
    assert_close(p(x, y), p(y, x))
    assert (p(x, y) > 0.01).all()


def test_perceptual_compares_five_layers_of_unit_vectors():
    """By hand: relu1_2 ... relu5_3 by F.conv2d, distances of unit vectors, mean over places."""
    p, x, y = Perceptual("random"), pictures(), pictures().flip(3)
    convs = iter([m for m in p.features if isinstance(m, nn.Conv2d)])
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    a, b = (((v + 1) / 2 - mean) / std for v in (x, y))
    total = 0
    for i, stage in enumerate(STAGES):
        if i:
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
        for _ in stage:
            c = next(convs)
            a, b = (F.relu(F.conv2d(v, c.weight, c.bias, padding=1)) for v in (a, b))
        unit = [v / v.norm(dim=1, keepdim=True).clamp(min=1e-6) for v in (a, b)]
        total = total + ((unit[0] - unit[1]) ** 2).sum(1).mean((1, 2))
    assert_close(p(x, y), total / 5, rtol=1e-3, atol=1e-4)


def test_perceptual_gradient_reaches_the_reconstruction_and_never_vgg():
    """paper.md's B10: a perceptual term without a gradient trains nothing."""
    p, x, y = Perceptual("random"), pictures(), pictures().flip(2).requires_grad_()
    p(x, y).sum().backward()
    assert y.grad.abs().sum() > 0
    assert all(w.grad is None and not w.requires_grad for w in p.parameters())


def test_random_weights_are_the_same_each_time():
    torch.manual_seed(5)
    a = Perceptual("random")
    torch.manual_seed(6)
    assert_close(a.state_dict(), Perceptual("random").state_dict(), rtol=0, atol=0)


def test_vgg16_reads_torchvisions_layout(tmp_path):
    """13 convolutions under torchvision's names and shapes; the classifier is left out."""
    index, state, c = 0, {"classifier.0.weight": torch.zeros(1)}, 3
    for i, stage in enumerate(STAGES):
        index += i > 0
        for width in stage:
            state |= {f"features.{index}.weight": torch.randn(width, c, 3, 3) * (2 / (9 * c)) ** .5,
                      f"features.{index}.bias": torch.zeros(width)}
            c, index = width, index + 2
    assert max(int(k.split(".")[1]) for k in state if k.startswith("features")) == 28
    torch.save(state, tmp_path / "vgg.pth")
    p = Perceptual("vgg16", str(tmp_path / "vgg.pth"))
    assert_close(p.features[28].weight, state["features.28.weight"], rtol=0, atol=0)
    assert p.taps == [3, 8, 15, 22, 29]
    assert sum(w.numel() for w in p.parameters()) == 14_714_688


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint",
                                     {"features.0.weight": torch.zeros(1)}])
def test_missing_or_wrong_vgg_weights_are_bad_input(tmp_path, content):
    path = tmp_path / "vgg.pth"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match="--vgg-weights"):
        Perceptual("vgg16", str(path))


@pytest.mark.parametrize("n_layers,field,n_params", [(3, 70, 2_765_633), (2, 34, 663_361)])
def test_discriminator_sees_patches_and_has_the_official_size(n_layers, field, n_params):
    """A pixel beyond the receptive field leaves a logit as it is; the last inside changes it."""
    d = Discriminator(3, 64, n_layers).eval()
    assert sum(p.numel() for p in d.parameters()) == n_params
    x = torch.zeros(1, 3, 192, 192, requires_grad=True)
    logits = d(x)
    assert logits.shape[1] == 1
    k = logits.shape[2] // 2
    logits[0, 0, k, k].backward()
    rows = x.grad[0].abs().sum((0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == field


def test_256_px_give_30x30_logits():
    assert Discriminator(3, 8)(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def test_discriminator_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 0.5])
    assert_close(hinge_loss(real, fake).item(), 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 1.5) / 3))
    want = (sum(math.log(1 + math.exp(-v)) for v in (2, .5, -1))
            + sum(math.log(1 + math.exp(v)) for v in (-3, 0, .5)))
    assert_close(vanilla_loss(real, fake).item(), want / 6)
    assert hinge_loss(torch.zeros(3), torch.zeros(3)) == 1
    assert_close(vanilla_loss(torch.zeros(3), torch.zeros(3)).item(), math.log(2))


def test_the_generators_step_leaves_the_discriminator_alone():
    """B9: gradients of -D(x_rec) left in D's parameters would train D to be fooled."""
    d, x_rec = Discriminator(3, 8, 2), pictures().requires_grad_()
    loss = generator_loss(d, x_rec)
    loss.backward()
    assert x_rec.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in d.parameters())
    d.eval()
    assert_close(generator_loss(d, x_rec), -d(x_rec).mean())


def test_vqgan_eq_7_adaptive_weight_equals_autograd_by_hand():
    last = torch.randn(3, 4, requires_grad=True)
    x = torch.randn(5, 4)
    out = x @ last.T
    loss_rec, loss_adv = (out - 1).abs().mean(), -(out * torch.arange(3.)).mean()
    lam = adaptive_weight(loss_rec, loss_adv, last)
    g_rec = ((out - 1).sign() / 15).T @ x
    g_adv = -(torch.arange(3.)[:, None] * x.sum(0)) / 15
    assert_close(lam, (g_rec.norm() / (g_adv.norm() + 1e-4)).detach())
    assert not lam.requires_grad and last.grad is None


def test_adaptive_weight_is_clamped_at_1e4():
    last = torch.ones(2, requires_grad=True)
    assert adaptive_weight(1e9 * last.sum(), 1e-9 * last.sum(), last) == 1e4


def test_psnr_of_a_known_error():
    x = torch.zeros(1, 3, 4, 4)
    assert_close(psnr(x, x + 0.2), torch.tensor([20.0]))
    assert_close(psnr(x + 1, x + 7), torch.tensor([float("inf")]))


def official(disc, state):
    """Load the official discriminator's weights; its main.N is our layers.N."""
    disc.load_state_dict({k.replace("main.", "layers."): torch.as_tensor(v)
                          for k, v in state.items()})
    return disc


@pytest.mark.parametrize("case", ["n3", "n2", "n4"])
def test_official_discriminator(case):
    """In eval, in train with the buffers afterwards, and in eval with small running variances."""
    ref = golden("disc")
    cfg = json.loads(str(ref["config"]))["cases"][case]
    x, disc = torch.from_numpy(ref["in/x"]), Discriminator(3, cfg["ndf"], cfg["n_layers"])
    state = weights(ref["recipe"], f"{case}/")
    state |= {k[3 + len(case):]: ref[k] for k in ref if k.startswith(f"w/{case}/")}
    close(official(disc, state).eval()(x), ref[f"out/{case}/y_eval"])
    close(disc.train()(x), ref[f"out/{case}/y_train"])
    after = [k for k in ref if k.startswith(f"out/{case}/after_train/")]
    assert len(after) == 3 * (cfg["n_layers"])
    for k in after:
        close(disc.state_dict()["layers" + k.split("main")[1]], ref[k])
    official(disc, state)
    for k, v in disc.named_buffers():
        if k.endswith("running_var"):
            v.mul_(2 ** -14)
    close(disc.eval()(x), ref[f"out/{case}/y_eval_smallvar"])


def test_official_discriminator_losses():
    ref = golden("losses")
    real, fake = (torch.from_numpy(ref[f"in/logits_{k}"]) for k in ("real", "fake"))
    close(hinge_loss(real, fake), ref["out/hinge_d_loss"])
    close(vanilla_loss(real, fake), ref["out/vanilla_d_loss"])


CASES = json.loads(str(golden("losses")["config"]))["cases"]


def stage_one(case, mode):
    """-> the numbers of a case's step 50 as ref(key), its parameters, D, x, x_rec, last layer."""
    z, p = golden("losses"), CASES[case]["params"]
    disc = official(Discriminator(3, 16, 3), {k[16:]: z[k] for k in z if k.startswith("w/")})
    x, feat, bias = (torch.from_numpy(z[f"in/{k}"]) for k in ("x", "feat", "last_layer_bias"))
    last = torch.from_numpy(z["in/last_layer_weight"]).requires_grad_()
    x_rec = F.conv2d(feat, last, bias, padding=1)

    def ref(key):
        return z[f"out/{case}/{mode}/step50/{key}"]
    return ref, p, disc.train(mode == "train"), x, x_rec, last


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_official_stage_one_losses(case, mode):
    """LPIPSWithDiscriminator and VQLPIPSWithDiscriminator after disc_start, the generator's step.

    n = 3HW turns our means into the KL model's sums over pixels. Its logvar (ours is always 0)
    makes of L_rec exp(-logvar) L_rec + logvar.
    """
    ref, p, disc, x, x_rec, last = stage_one(case, mode)
    kl = case.startswith("kl")
    args = argparse.Namespace(
        pixel_loss=p.get("pixel_loss", "l1"), perceptual_weight=p.get("perceptual_weight", 1.0),
        reg="kl" if kl else "vq", kl_weight=p.get("kl_weight"), vq_beta=0.25,
        vq_beta_on="codebook", codebook_weight=p.get("codebook_weight"))
    moments = torch.from_numpy(golden("losses")["in/posterior_moments"]).requires_grad_()
    q = Posterior(*moments.chunk(2, dim=1))
    if not kl:                              # a codebook loss of 1.25 * 0.3, the official 0.375
        q = Quantised(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.3 ** 0.5), None)
    loss_rec, loss_reg, told = train_ae.losses(
        args, lambda a, b: (a - b).square().mean((1, 2, 3)), x, x_rec, q)
    loss_adv = generator_loss(disc, x_rec)
    lam = adaptive_weight(loss_rec, loss_adv, last)

    n, logvar = (x[0].numel(), p.get("logvar_init", 0.0)) if kl else (1, 0.0)
    nll = n * (math.exp(-logvar) * loss_rec + logvar)
    d_weight = n * math.exp(-logvar) * p["disc_weight"] * lam
    loss = nll + n * loss_reg + d_weight * loss_adv
    loss.backward()
    for ours, key in ((loss_rec, "rec_loss"), (nll, "nll_loss"), (loss_adv, "g_loss"),
                      (d_weight, "d_weight"), (loss, "total_loss"), (last.grad, "grad_last_layer")):
        close(ours, ref(f"opt0/{key}"), 2e-4 if key in ("d_weight", "grad_last_layer") else 5e-5)
    if kl:
        close(told["kl"] * q.mean[0].numel(), ref("opt0/kl_loss"))
        close(moments.grad, ref("opt0/grad_moments"))
    else:
        close(told["codebook"], ref("opt0/quant_loss"))
        close(told["perceptual"], ref("opt0/p_loss"))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_official_discriminators_step(case, mode):
    """Real and reconstructed pictures go through D one after the other, in both modes of BatchNorm;
    the generator's step before moves BatchNorm's statistics too."""
    ref, p, disc, x, x_rec, _ = stage_one(case, mode)
    disc_loss = vanilla_loss if p.get("disc_loss") == "vanilla" else hinge_loss
    real, fake = disc(x), disc(x_rec.detach())
    loss = disc_loss(real, fake)
    loss.backward()
    norm = torch.stack([w.grad.norm() for w in disc.parameters()]).norm()
    for ours, key in ((real.mean(), "logits_real"), (fake.mean(), "logits_fake"),
                      (loss, "disc_loss"), (norm, "disc_grad_norm")):
        close(ours, ref(f"opt1/{key}"), 2e-4 if key == "disc_grad_norm" else 5e-5)
    if mode == "train":
        _, _, other, _, x_rec, _ = stage_one(case, mode)
        generator_loss(other, x_rec)
        for net, opt in ((disc, "opt1"), (other, "opt0")):
            means = [v.norm() for k, v in net.named_buffers() if k.endswith("running_mean")]
            close(torch.stack(means), ref(f"{opt}/disc_running_mean_norm"))


def test_official_adaptive_weight():
    """From gradients of known norm; the official number includes disc_weight 0.5."""
    ref = golden("losses")
    last = torch.zeros(3, 6, 3, 3, requires_grad=True)
    g_rec, g_adv = (torch.from_numpy(ref[f"out/adaptive/{k}_grad"]) for k in ("nll", "g"))
    lam = adaptive_weight((last * g_rec).sum(), (last * g_adv).sum(), last)
    close(0.5 * lam, ref["out/adaptive/d_weight_official"])
