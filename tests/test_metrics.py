"""metrics.py: SSIM window by window in plain loops, and closed forms."""
import math

import pytest
import torch
from torch.testing import assert_close

from tinyldm.metrics import psnr, ssim

def pictures(seed=0, n=2):
    return torch.rand(n, 3, 16, 20, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def naive_ssim(x, y):
    """Wang et al. 2004 Eq. (13)-(16) of one picture, in float64: every window by itself, with

    variances about the window's own mean; L = 2 is the range of [-1, 1].
    """
    w = torch.tensor([[math.exp(-(i * i + j * j) / (2 * 1.5 ** 2)) for j in range(-5, 6)]
                      for i in range(-5, 6)], dtype=torch.float64)
    w, c1, c2, out = w / w.sum(), (.01 * 2) ** 2, (.03 * 2) ** 2, []
    for c in range(x.shape[0]):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                a, b = (v[c, i:i + 11, j:j + 11].double() for v in (x, y))
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
                cov = (w * (a - ma) * (b - mb)).sum()
                out.append((2 * ma * mb + c1) * (2 * cov + c2)
                           / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2)))
    return torch.stack(out).mean().float()


@pytest.mark.parametrize("noise", [.05, .5, 3])
def test_ssim_is_the_mean_over_windows_of_its_formula(noise):
    x = pictures()
    y = (x + noise * pictures(1)).clamp(-1, 1)
    want = torch.stack([naive_ssim(a, b) for a, b in zip(x, y)])
    assert want[0] != want[1]
    assert_close(ssim(x, y), want, atol=1e-5, rtol=0)


def test_ssim_of_a_picture_with_itself_is_1_and_else_less():
    x = pictures()
    assert_close(ssim(x, x), torch.ones(2))
    assert (ssim(x, x + .1 * pictures(1)) < .999).all()
    assert (ssim(.5 + .3 * x, .5 - .3 * x) < 0).all()           # the other way round


def test_ssim_is_symmetric_in_range_and_clamps_a_reconstruction_only():
    x, y = pictures(), pictures(1)
    assert_close(ssim(x, y), ssim(y, x))
    assert_close(ssim(x, 3 * y), ssim(x, (3 * y).clamp(-1, 1)))
    assert not torch.allclose(ssim(3 * y, x), ssim((3 * y).clamp(-1, 1), x))


@pytest.mark.parametrize("a,b", [(.5, .7), (-.3, -.1), (0., .2), (-.4, .4)])
def test_ssim_of_even_greys_is_its_first_factor(a, b):
    """No variance is left: (2 a b + c1) / (a^2 + b^2 + c1)."""
    x = torch.zeros(1, 3, 12, 14)
    want = (2 * a * b + .0004) / (a * a + b * b + .0004)
    assert_close(ssim(x + a, x + b), torch.tensor([want]), atol=2e-4, rtol=0)


def test_psnr_of_a_known_error_picture_by_picture():
    """10 log10(2^2 / mse): an error of 0.2 is 20 dB, of 0.02 is 40 dB, half of the pixels 3 dB."""
    x = .5 * pictures(n=3)
    y = x + torch.tensor([.2, -.02, 0]).view(3, 1, 1, 1)
    y[2, :, :8] += .2
    assert_close(psnr(x, y), torch.tensor([20, 40, 20 + 10 * math.log10(2)]))
    assert_close(psnr(torch.ones_like(x), x + 9), torch.full((3,), torch.inf))
    assert_close(psnr(0 * x + 3, 0 * x + 9), torch.full((3,), 0.))
