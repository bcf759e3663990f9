"""The Inception network, in whose features the literature measures FID and IS.

Paper:  App. E.3 (FID by torch-fidelity). FID: Heusel et al. 2017. The network: Szegedy
        et al. 2016, Table 1.
Shapes: x (B, C, H, W) in [-1, 1] -> features (B, 2048), p(y | x) (B, 1008).

NB: figures can be compared only if every step is that of the TensorFlow graph of
2015-12-05: pixels of 8 bits, TensorFlow 1's resize to 299 x 299, (v - 128) / 128,
average pools that do not count their padding, a maximum pool in the last block, 1008
classes. torchvision's network differs in all of these, pytorch-fid in the resize and
the scale. torch-fidelity follows the graph, and so does this file.

The layers have torchvision's names, which the public weights have (pytorch-fid's file).
"""
import torch
from torch import Tensor, nn

from tinyldm.data.images import as_rgb

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)


class Conv(nn.Module):
    """A convolution without bias, BatchNorm and ReLU. Padding keeps the sides."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | str = "same",
    ):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def average_pool() -> nn.Module:
    """Return the mean over 3 x 3 places; at the border, over those inside the map."""
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35 -> 35 x 35 (Szegedy et al. 2016, Fig. 5): 5 x 5, also as two of 3 x 3."""

    def __init__(self, c_in: int, c_pool: int):
        super().__init__()
        self.branch1x1 = Conv(c_in, 64, 1)
        self.branch5x5_1 = Conv(c_in, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5)
        self.branch3x3dbl_1 = Conv(c_in, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.pool = average_pool()
        self.branch_pool = Conv(c_in, c_pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        direct = self.branch1x1(x)                              # (B, 64, 35, 35)
        once = self.branch5x5_2(self.branch5x5_1(x))            # (B, 64, 35, 35)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        twice = self.branch3x3dbl_3(twice)                      # (B, 96, 35, 35)
        pooled = self.branch_pool(self.pool(x))                 # (B, c_pool, 35, 35)
        return torch.cat([direct, once, twice, pooled], dim=1)


class ReduceTo17(nn.Module):
    """35 x 35 -> 17 x 17."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, 2, 0)
        self.branch3x3dbl_1 = Conv(288, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, 2, 0)
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3(x)                                # (B, 384, 17, 17)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        twice = self.branch3x3dbl_3(twice)                      # (B, 96, 17, 17)
        return torch.cat([once, twice, self.pool(x)], dim=1)    # (B, 768, 17, 17)


class BlockC(nn.Module):
    """17 x 17 -> 17 x 17 (Fig. 6): 7 x 7 as a row of 7, then a column of 7."""

    def __init__(self, width: int):
        super().__init__()
        row = (1, 7)
        column = (7, 1)
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1 = Conv(768, width, 1)
        self.branch7x7_2 = Conv(width, width, row)
        self.branch7x7_3 = Conv(width, 192, column)
        self.branch7x7dbl_1 = Conv(768, width, 1)
        self.branch7x7dbl_2 = Conv(width, width, column)
        self.branch7x7dbl_3 = Conv(width, width, row)
        self.branch7x7dbl_4 = Conv(width, width, column)
        self.branch7x7dbl_5 = Conv(width, 192, row)
        self.pool = average_pool()
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        direct = self.branch1x1(x)                              # (B, 192, 17, 17)
        once = self.branch7x7_2(self.branch7x7_1(x))
        once = self.branch7x7_3(once)                           # (B, 192, 17, 17)
        twice = self.branch7x7dbl_2(self.branch7x7dbl_1(x))
        twice = self.branch7x7dbl_4(self.branch7x7dbl_3(twice))
        twice = self.branch7x7dbl_5(twice)                      # (B, 192, 17, 17)
        pooled = self.branch_pool(self.pool(x))                 # (B, 192, 17, 17)
        return torch.cat([direct, once, twice, pooled], dim=1)  # (B, 768, 17, 17)


class ReduceTo8(nn.Module):
    """17 x 17 -> 8 x 8."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = Conv(768, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, 2, 0)
        self.branch7x7x3_1 = Conv(768, 192, 1)
        self.branch7x7x3_2 = Conv(192, 192, (1, 7))
        self.branch7x7x3_3 = Conv(192, 192, (7, 1))
        self.branch7x7x3_4 = Conv(192, 192, 3, 2, 0)
        self.pool = nn.MaxPool2d(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_2(self.branch3x3_1(x))            # (B, 320, 8, 8)
        twice = self.branch7x7x3_2(self.branch7x7x3_1(x))
        twice = self.branch7x7x3_4(self.branch7x7x3_3(twice))   # (B, 192, 8, 8)
        return torch.cat([once, twice, self.pool(x)], dim=1)    # (B, 1280, 8, 8)


class BlockE(nn.Module):
    """8 x 8 -> 8 x 8 (Fig. 7): branches that fork into a row of 3 and a column of 3."""

    def __init__(self, c_in: int, pool: nn.Module):
        super().__init__()
        row = (1, 3)
        column = (3, 1)
        self.branch1x1 = Conv(c_in, 320, 1)
        self.branch3x3_1 = Conv(c_in, 384, 1)
        self.branch3x3_2a = Conv(384, 384, row)
        self.branch3x3_2b = Conv(384, 384, column)
        self.branch3x3dbl_1 = Conv(c_in, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3)
        self.branch3x3dbl_3a = Conv(384, 384, row)
        self.branch3x3dbl_3b = Conv(384, 384, column)
        self.pool = pool
        self.branch_pool = Conv(c_in, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        direct = self.branch1x1(x)                              # (B, 320, 8, 8)
        once = self.branch3x3_1(x)
        once = [self.branch3x3_2a(once), self.branch3x3_2b(once)]  # (B, 384, 8, 8) each
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        twice = [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice)]
        pooled = self.branch_pool(self.pool(x))                 # (B, 192, 8, 8)
        return torch.cat([direct, *once, *twice, pooled], dim=1)  # (B, 2048, 8, 8)


class Inception(nn.Module):
    """The network, frozen and in eval mode; it begins with random weights."""

    name = "inception"

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, 0)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 1, 0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 1, 0)
        self.halve = nn.MaxPool2d(3, 2)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = ReduceTo17()
        self.Mixed_6b = BlockC(128)
        self.Mixed_6c = BlockC(160)
        self.Mixed_6d = BlockC(160)
        self.Mixed_6e = BlockC(192)
        self.Mixed_7a = ReduceTo8()
        self.Mixed_7b = BlockE(1280, average_pool())
        self.Mixed_7c = BlockE(2048, nn.MaxPool2d(3, 1, 1))
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features, the mean over places of the last block, and p(y | x).

        NB: the logits are without the bias of fc, as in torch-fidelity and in the first
        code of IS (Salimans et al. 2016).
        """
        # The 8-bit pixels of an image file, then TensorFlow's resize and scale.
        x = as_rgb(x).float()                                   # (B, 3, H, W)
        pixels = ((x + 1) * 127.5).round().clamp(0, 255)
        wide = resize_last_axis(pixels, 299)
        square = resize_last_axis(wide.mT, 299).mT              # (B, 3, 299, 299)
        h = (square - 128) / 128

        h = self.Conv2d_1a_3x3(h)                               # (B, 32, 149, 149)
        h = self.Conv2d_2a_3x3(h)
        h = self.Conv2d_2b_3x3(h)                               # (B, 64, 147, 147)
        h = self.halve(h)
        h = self.Conv2d_3b_1x1(h)
        h = self.Conv2d_4a_3x3(h)                               # (B, 192, 71, 71)
        h = self.halve(h)

        h = self.Mixed_5b(h)
        h = self.Mixed_5c(h)
        h = self.Mixed_5d(h)                                    # (B, 288, 35, 35)
        h = self.Mixed_6a(h)
        h = self.Mixed_6b(h)
        h = self.Mixed_6c(h)
        h = self.Mixed_6d(h)
        h = self.Mixed_6e(h)                                    # (B, 768, 17, 17)
        h = self.Mixed_7a(h)
        h = self.Mixed_7b(h)
        h = self.Mixed_7c(h)                                    # (B, 2048, 8, 8)

        features = h.mean((2, 3))                               # (B, 2048)
        logits = features @ self.fc.weight.T                    # (B, 1008)
        return features, logits.softmax(1)


def resize_last_axis(x: Tensor, n: int) -> Tensor:
    """TensorFlow 1's bilinear resize of the last axis, (..., n_in) -> (..., n).

    Output i lies at i * n_in / n, between two pixels. NB: other libraries add half a
    pixel, and average where they shrink.
    """
    n_in = x.shape[-1]
    at = torch.arange(n, device=x.device) * (n_in / n)
    low = at.long()
    high = (low + 1).clamp(max=n_in - 1)
    left = x[..., low]
    right = x[..., high]
    return left + (right - left) * (at - low)
