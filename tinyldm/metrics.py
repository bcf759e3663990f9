"""How good is a reconstruction?

Paper:   Table 8.
Shapes:  x, x_rec (B, 3, H, W) in [-1, 1] -> (B,).
Reads:   nothing of ours.
"""
import torch


def psnr(x: torch.Tensor, x_rec: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of each picture, x_rec clamped to [-1, 1]; the peak is 2."""
    mse = (x - x_rec.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse)
