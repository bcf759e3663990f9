"""How good is a reconstruction?

Paper:   Tables 5, 8, 11. SSIM: Wang et al. 2004.
Shapes:  x, x_rec (B, 3, H, W) in [-1, 1] -> (B,).
Reads:   nothing of ours."""
import torch
from torch.nn import functional as F

def psnr(x: torch.Tensor, x_rec: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture, x_rec clamped to [-1, 1]; the peak is 2."""
    mse = (x - x_rec.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse)

def ssim(x: torch.Tensor, x_rec: torch.Tensor) -> torch.Tensor:
    """Structural similarity, Wang et al. 2004 Eq. (13): a Gaussian window of 11 x 11 and std 1.5,
    wherever it fits in; K_1 = 0.01, K_2 = 0.03; the mean over places and channels."""
    n = min(11, *x.shape[2:])
    i = torch.arange(n, dtype=x.dtype, device=x.device) - (n - 1) / 2
    g = (-i ** 2 / (2 * 1.5 ** 2)).exp()
    window = (g[:, None] * g / g.sum() ** 2).expand(x.shape[1], 1, n, n)

    def mean(v):
        return F.conv2d(v, window, groups=x.shape[1])
    y = x_rec.clamp(-1, 1)
    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx ** 2, mean(y * y) - my ** 2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    out = (2 * mx * my + c1) * (2 * cov + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2))
    return out.flatten(1).mean(1)
