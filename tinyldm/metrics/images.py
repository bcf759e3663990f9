"""Metrics of single images: how far is a reconstruction from its original?

Paper:  App. E.3, Tables 5 and 8.
Shapes: x, x_rec (B, C, H, W) in [-1, 1] -> (B,), one value per image.
"""
import torch
from torch import Tensor


def psnr(x: Tensor, x_rec: Tensor) -> Tensor:
    """Return each image's peak signal-to-noise ratio in dB; x_rec is clamped first.

    10 log10(peak^2 / mean squared error), where the peak is 2, the width of the range.
    """
    squared_error = (x - x_rec.clamp(-1, 1)).square().flatten(1)    # (B, C H W)
    return 10 * torch.log10(4 / squared_error.mean(1))


def ssim(x: Tensor, x_rec: Tensor) -> Tensor:
    """Return each image's structural similarity: Wang et al. 2004, Eq. (13).

    Means, variances and the covariance are weighted by a Gaussian window of 11 x 11
    pixels and std 1.5, at each place where it fits in. The result is the mean over
    places and channels. Pixels are shifted to 0..2; x_rec is clamped to that range.
    It is computed on the CPU. Why: in float64, which not every device has.
    """
    device = x.device
    x = x.cpu().double() + 1
    y = x_rec.cpu().double().clamp(-1, 1) + 1
    window = gaussian_window(x)

    mean_x = window_mean(x, window)                 # (B, C, H - n + 1, W - n + 1)
    mean_y = window_mean(y, window)
    var_x = window_mean(x * x, window) - mean_x ** 2
    var_y = window_mean(y * y, window) - mean_y ** 2
    cov = window_mean(x * y, window) - mean_x * mean_y

    # (K_1 L)^2 and (K_2 L)^2, where L = 2 is the width of the range.
    c_1 = (0.01 * 2) ** 2
    c_2 = (0.03 * 2) ** 2
    numerator = (2 * mean_x * mean_y + c_1) * (2 * cov + c_2)
    denominator = (mean_x ** 2 + mean_y ** 2 + c_1) * (var_x + var_y + c_2)
    return (numerator / denominator).flatten(1).mean(1).float().to(device)


def gaussian_window(x: Tensor) -> Tensor:
    """Return SSIM's window for images x (B, C, H, W): (C, 1, n, n), each of sum 1.

    n is 11, or the shorter side of a smaller image.
    """
    n = min(11, *x.shape[2:])
    g = torch.signal.windows.gaussian(n, std=1.5, dtype=x.dtype, device=x.device)
    window = g[:, None] * g / g.sum() ** 2          # (n, n)
    return window.expand(x.shape[1], 1, n, n)


def window_mean(x: Tensor, window: Tensor) -> Tensor:
    """Return the weighted mean in the window at each place, channel by channel."""
    return torch.conv2d(x, window, groups=x.shape[1])


def gradient_length(x: Tensor) -> Tensor:
    """Return the length of each pixel's gradient, (B, C, H - 1, W - 1).

    The gradient is the differences to the pixel on the right and to the one below. In a
    blurred image it is shorter.
    """
    here = x[..., :-1, :-1]
    right = x[..., :-1, 1:]
    below = x[..., 1:, :-1]
    return torch.hypot(right - here, below - here)
