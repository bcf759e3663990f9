"""perceptual.py and patchgan.py: closed forms, autograd as oracle, mistakes that others made."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm import BadInput
from tinyldm.metrics import psnr
from tinyldm.patchgan import (
    Discriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    vanilla_loss,
)
from tinyldm.perceptual import STAGES, Perceptual


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
