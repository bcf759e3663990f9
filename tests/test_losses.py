"""perceptual.py, patchgan.py and losses.py: closed forms, autograd, mistakes of others.

What the official code says about the same is in test_golden_losses.py.
"""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm.autoencoder import Posterior
from tinyldm.engine.weights import open_vgg16
from tinyldm.errors import BadInput
from tinyldm.losses import (
    LossConfig,
    adversarial_loss,
    autoencoder_loss,
    discriminator_loss,
    reconstruction_loss,
    regularisation_loss,
)
from tinyldm.patchgan import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    hinge_loss,
    vanilla_loss,
)
from tinyldm.perceptual import STAGES, VGG16, Perceptual, random_vgg
from tinyldm.quantize import Quantised

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def random_images(n: int = 2, side: int = 32) -> torch.Tensor:
    """Return n images in [-1, 1], the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, side, side, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def perceptual():
    return Perceptual(random_vgg())


# ---- the perceptual distance

def test_perceptual_is_zero_for_equal_images_and_symmetric(perceptual):
    x = random_images()
    y = x.flip(0)
    assert_close(perceptual(x, x), torch.zeros(2))
    assert_close(perceptual(x, y), perceptual(y, x))
    assert (perceptual(x, y) > 0.01).all()


def vgg_stages_by_hand(vgg: VGG16, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of the five stages, by functional calls."""
    convolutions = iter([m for m in vgg.features if isinstance(m, nn.Conv2d)])
    h = ((x + 1) / 2 - IMAGENET_MEAN) / IMAGENET_STD
    outputs = []
    for number, widths in enumerate(STAGES):
        if number > 0:
            h = F.max_pool2d(h, 2)
        for _ in widths:
            conv = next(convolutions)
            h = F.relu(F.conv2d(h, conv.weight, conv.bias, padding=1))
        outputs.append(h)
    return outputs


def test_perceptual_compares_unit_vectors_of_five_stages(perceptual):
    x = random_images()
    y = x.flip(3)
    total = 0
    f_stages = vgg_stages_by_hand(perceptual.vgg, x)
    g_stages = vgg_stages_by_hand(perceptual.vgg, y)
    for f, g in zip(f_stages, g_stages):
        f = f / f.norm(dim=1, keepdim=True).clamp(min=1e-6)
        g = g / g.norm(dim=1, keepdim=True).clamp(min=1e-6)
        total = total + ((f - g) ** 2).sum(1).mean((1, 2))
    assert_close(perceptual(x, y), total / 5, rtol=1e-3, atol=1e-4)


def test_perceptual_gradient_reaches_the_reconstruction_and_never_vgg(perceptual):
    """A mistake made elsewhere: without a gradient, the perceptual term trains nothing."""
    x = random_images()
    x_rec = x.flip(2).requires_grad_()
    perceptual(x, x_rec).sum().backward()
    assert x_rec.grad.abs().sum() > 0
    for parameter in perceptual.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_random_weights_are_the_same_each_time():
    torch.manual_seed(5)
    first = random_vgg().state_dict()
    torch.manual_seed(6)
    second = random_vgg().state_dict()
    assert_close(first, second, rtol=0, atol=0)


def torchvision_vgg16() -> dict[str, torch.Tensor]:
    """A state dict in the layout of torchvision's file, with random weights."""
    state = {"classifier.0.weight": torch.zeros(1)}
    index = 0
    c_in = 3
    for number, widths in enumerate(STAGES):
        index += number > 0                 # the pooling
        for c_out in widths:
            weight = torch.randn(c_out, c_in, 3, 3) * (2 / (9 * c_in)) ** 0.5
            state[f"features.{index}.weight"] = weight
            state[f"features.{index}.bias"] = torch.zeros(c_out)
            index += 2                      # the convolution and its ReLU
            c_in = c_out
    return state


def test_vgg16_reads_torchvisions_layout(tmp_path):
    """13 convolutions under torchvision's names; the classifier is left out."""
    state = torchvision_vgg16()
    torch.save(state, tmp_path / "vgg.pth")
    vgg = open_vgg16(tmp_path / "vgg.pth")

    assert list(vgg.state_dict()) == [k for k in state if k.startswith("features")]
    assert_close(vgg.features[28].weight, state["features.28.weight"], rtol=0, atol=0)
    assert vgg.taps == [3, 8, 15, 22, 29]
    assert sum(p.numel() for p in vgg.parameters()) == 14_714_688


@pytest.mark.parametrize(
    "content", [None, b"", b"not a checkpoint", {"features.0.weight": torch.zeros(1)}]
)
def test_missing_or_wrong_vgg_weights_are_bad_input(tmp_path, content):
    path = tmp_path / "vgg.pth"
    if isinstance(content, dict):
        torch.save(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=f"{path}: .*vgg16-397923af.pth"):
        open_vgg16(path)


# ---- D_psi

@pytest.mark.parametrize(
    "n_layers,patch,n_parameters", [(3, 70, 2_765_633), (2, 34, 663_361)]
)
def test_discriminator_sees_patches_and_has_the_official_size(
    n_layers, patch, n_parameters
):
    """The pixels on which one logit depends are a square of the patch's side."""
    disc = Discriminator(DiscriminatorConfig(n_layers=n_layers)).eval()
    assert sum(p.numel() for p in disc.parameters()) == n_parameters

    x = torch.zeros(1, 3, 192, 192, requires_grad=True)
    logits = disc(x)
    assert logits.shape[1] == 1
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    rows = x.grad[0].abs().sum((0, 2)).nonzero()
    columns = x.grad[0].abs().sum((0, 1)).nonzero()
    assert rows.max() - rows.min() + 1 == patch
    assert columns.max() - columns.min() + 1 == patch


def test_256_px_give_30x30_logits():
    disc = Discriminator(DiscriminatorConfig(ch=8))
    assert disc(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


# ---- the losses of the two players

def test_discriminator_losses_by_hand():
    real = [2.0, 0.5, -1.0]
    fake = [-3.0, 0.0, 0.5]

    hinge = 0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 1.5) / 3)
    assert_close(hinge_loss(torch.tensor(real), torch.tensor(fake)).item(), hinge)

    loss_real = sum(math.log(1 + math.exp(-logit)) for logit in real) / 3
    loss_fake = sum(math.log(1 + math.exp(logit)) for logit in fake) / 3
    vanilla = 0.5 * (loss_real + loss_fake)
    assert_close(vanilla_loss(torch.tensor(real), torch.tensor(fake)).item(), vanilla)


def test_discriminator_losses_where_d_psi_knows_nothing():
    zero = torch.zeros(3)
    assert hinge_loss(zero, zero) == 1
    assert_close(vanilla_loss(zero, zero).item(), math.log(2))


def test_the_generators_step_leaves_the_discriminator_alone():
    """A mistake made elsewhere: gradients left in D_psi train it to be fooled."""
    disc = Discriminator(DiscriminatorConfig(ch=8, n_layers=2))
    x_rec = random_images().requires_grad_()
    adversarial_loss(LossConfig(), disc, x_rec).backward()
    assert x_rec.grad.abs().sum() > 0
    for parameter in disc.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad

    disc.eval()
    assert_close(adversarial_loss(LossConfig(), disc, x_rec), -disc(x_rec).mean())


def test_the_discriminators_step_leaves_the_autoencoder_alone():
    disc = Discriminator(DiscriminatorConfig(ch=8, n_layers=2)).eval()
    x = random_images()
    x_rec = x.flip(2).requires_grad_()
    loss, figures = discriminator_loss(LossConfig(), disc, x, x_rec)
    loss.backward()
    assert x_rec.grad is None
    assert all(p.grad is not None for p in disc.parameters())
    assert_close(loss, hinge_loss(disc(x), disc(x_rec)))
    assert_close(figures["d_real"], disc(x).mean())
    assert_close(figures["d_fake"], disc(x_rec).mean())


# ---- lam

def test_vqgan_eq_7_adaptive_weight_by_hand():
    torch.manual_seed(0)
    w = torch.randn(3, 4, requires_grad=True)
    h = torch.randn(5, 4)
    out = h @ w.T                                       # (5, 3)
    channel = torch.arange(3.0)
    lam = adaptive_weight((out - 1).abs().mean(), -(out * channel).mean(), w)

    grad_rec = ((out - 1).sign() / 15).T @ h
    grad_adv = -(channel[:, None] * h.sum(0)) / 15
    assert_close(lam, (grad_rec.norm() / (grad_adv.norm() + 1e-4)).detach())
    assert not lam.requires_grad
    assert w.grad is None


def test_adaptive_weight_is_clamped_at_1e4():
    w = torch.ones(2, requires_grad=True)
    assert adaptive_weight(1e9 * w.sum(), 1e-9 * w.sum(), w) == 1e4


# ---- Eq. (25)

@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_reconstruction_loss_by_hand(norm):
    """Errors of 0.5 in one image and of 0.1 in another; a perceptual distance of 2 and 4."""
    x = torch.zeros(2, 3, 4, 4)
    x_rec = torch.tensor([0.5, -0.1]).view(2, 1, 1, 1).expand_as(x)
    distance = torch.tensor([2.0, 4.0])
    cfg = LossConfig(pixel_loss=norm, perceptual_weight=0.1)
    pixel = 0.3 if norm == "l1" else (0.25 + 0.01) / 2

    loss, figures = reconstruction_loss(cfg, lambda a, b: distance, x, x_rec)
    assert_close(loss.item(), pixel + 0.1 * 3)
    assert_close(figures["rec"].item(), pixel)
    assert_close(figures["perceptual"].item(), 3.0)

    loss, figures = reconstruction_loss(cfg, None, x, x_rec)
    assert_close(loss.item(), pixel)
    assert figures["perceptual"] == 0


def test_kl_term_is_per_pixel_value_and_is_logged_per_latent_value():
    """q = N(1, e^2): KL = (1 + e^2 - 1 - 2) / 2 nats per latent value."""
    mean = torch.ones(2, 3, 4, 4)
    q = Posterior(mean, 2 * mean)
    x = torch.zeros(2, 3, 16, 16)
    kl = (math.e ** 2 - 2) / 2

    loss, figures = regularisation_loss(LossConfig(kl_weight=0.01), x, q)
    assert_close(loss.item(), 0.01 * kl * 48 / 768)
    assert_close(figures["kl"].item(), kl)
    assert_close(figures["z_std"].item(), math.e)


def test_codebook_term_is_the_weighted_loss_of_the_codebook():
    q = Quantised(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 2.0), None)
    cfg = LossConfig(codebook_weight=0.5, vq_beta=0.25)
    loss, figures = regularisation_loss(cfg, torch.zeros(1, 3, 16, 16), q)
    assert_close(loss.item(), 0.5 * 1.25 * 4)
    assert_close(figures["codebook"].item(), 1.25 * 4)


@pytest.mark.parametrize("adversarial", [False, True])
def test_autoencoder_loss_is_the_sum_of_its_terms(adversarial):
    torch.manual_seed(0)
    disc = Discriminator(DiscriminatorConfig(ch=8, n_layers=2)).eval()
    w = torch.randn(3, 6, 3, 3, requires_grad=True)
    x_rec = F.conv2d(torch.randn(2, 6, 32, 32), w, padding=1)
    x = random_images()
    q = Posterior(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8))
    cfg = LossConfig(kl_weight=0.1, disc_weight=0.7)
    loss, figures = autoencoder_loss(cfg, None, disc, w, x, x_rec, q, adversarial)

    loss_rec, _ = reconstruction_loss(cfg, None, x, x_rec)
    loss_reg, _ = regularisation_loss(cfg, x, q)
    want = loss_rec + loss_reg
    if adversarial:
        loss_adv = -disc(x_rec).mean()
        want = want + 0.7 * adaptive_weight(loss_rec, loss_adv, w) * loss_adv
    assert_close(loss, want)

    assert ("lam" in figures) == ("adv" in figures) == adversarial
    gradient, = torch.autograd.grad(loss, w, retain_graph=True)
    want_gradient, = torch.autograd.grad(want, w)
    assert_close(gradient, want_gradient)
