"""The perceptual distance: how far two images lie apart in the features of a VGG16.

Paper:   Sec. 3.1 and App. G, part of L_rec; Zhang et al. 2018 (LPIPS).
Shapes:  x, x_rec (B, C, H, W) in [-1, 1] -> (B,); 0 means equal. Sides of at least 16.
         Images that are not RGB are compared as RGB (images.as_rgb).

Why: a mean of pixel errors prefers a blurred texture to a sharp one that is shifted by
a pixel. A classifier's features change little with the shift and much with the blur.
"""
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tinyldm.data.images import as_rgb

# The widths of VGG16's convolutions. Between two stages, a pooling halves the sides.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """The convolutions of VGG16, all their widths divided by `divisor`.

    The weights have the names of torchvision's file: features.0.weight and so on. Here
    they are untrained: engine/weights.py fills in torchvision's, random_vgg() fixed
    random ones.
    """

    def __init__(self, divisor: int = 1):
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []       # last layer of each stage: relu1_2 to relu5_3
        c_in = 3
        for number, widths in enumerate(STAGES):
            if number > 0:
                layers.append(nn.MaxPool2d(2))
            for width in widths:
                c_out = width // divisor
                layers.append(nn.Conv2d(c_in, c_out, 3, padding=1))
                layers.append(nn.ReLU())
                c_in = c_out
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)

        # torchvision's mean and std are those of pixels in [0, 1]; ours are in [-1, 1].
        # They are constants and so not part of the state dict.
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 2 - 1
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 2
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the outputs of the five stages, each as soon as it is computed.

        Their shapes are (B, 64, H, W) to (B, 512, H/16, W/16), if the divisor is 1.
        """
        h = (as_rgb(x) - self.mean) / self.std          # (B, 3, H, W)
        for number, layer in enumerate(self.features):
            h = layer(h)
            if number in self.taps:
                yield h

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the five stages."""
        return list(self.stages(x))


def random_vgg() -> VGG16:
    """Return a VGG16 an eighth as wide, with random weights that are always the same.

    Why: it needs no download, and even random features tell a blurred image from a
    sharp one. The weights have variance 2 / fan-in (He et al. 2015), so that no stage
    fades or explodes.
    """
    vgg = VGG16(divisor=8)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in vgg.named_parameters():
        if name.endswith("bias"):
            parameter.data.zero_()
        else:
            fan_in = parameter[0].numel()
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = noise * (2 / fan_in) ** 0.5
    return vgg


class Perceptual(nn.Module):
    """The distance of two images in the features of a frozen VGG16.

    NB: the paper uses LPIPS, which weighs the channels by learned weights. Here all
    channels weigh the same, so that torchvision's VGG16 file is all that is needed.
    """

    def __init__(self, vgg: VGG16):
        super().__init__()
        self.vgg = vgg
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, x_rec: Tensor) -> Tensor:
        """Return the mean over stages and places of |f/|f| - f_rec/|f_rec||^2, in 0..4.

        f is the vector of all channels at one place. Its length is divided out, so that
        each stage and each place counts the same.
        """
        total = 0
        for output in self.vgg.stages(torch.cat([x, x_rec])):
            unit = nn.functional.normalize(output, eps=1e-6)
            f, f_rec = unit.chunk(2)                    # (B, C, h, w) each
            distance = (f - f_rec).square().sum(1)      # (B, h, w)
            total = total + distance.mean((1, 2))       # (B,)
        return total / len(self.vgg.taps)
