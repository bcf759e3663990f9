"""The networks in whose features two sets of images are compared (sets.py).

Paper:  App. E.3: FID, of Inception features, as torch-fidelity measures it.
Shapes: x (B, C, H, W) in [-1, 1], which each network sees as RGB (images.as_rgb)
        -> features (B, d), and p(y | x) (B, K) or None.
"""
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinyldm
from tinyldm.data.images import as_rgb
from tinyldm.data.world import COLOURS, SHAPES, SIZES
from tinyldm.engine.weights import load_public, open_vgg16
from tinyldm.metrics.inception import URL as INCEPTION_URL, Inception
from tinyldm.perceptual import VGG16

SHAPESNET = Path(tinyldm.__file__).with_name("shapesnet.pt")

# The classes of ShapesNet: every (colour, shape, size) of the built-in world.
KINDS = [(c, s, z) for c in COLOURS for s in SHAPES for z in SIZES]


class ShapesNet(nn.Module):
    """A small classifier of the built-in world's objects, which needs no download.

    p is the share of each of KINDS among the objects of an image. tests/shapesnet.py
    trains the network in a minute.

    NB: its Frechet distance, "fd_shapes", is no FID. It compares with nothing outside
    this project, and the network knows nothing but flat shapes.
    """

    name = "shapes"

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList()
        for c_in, c_out in ((3, 16), (16, 32), (32, 64)):
            self.convs.append(nn.Conv2d(c_in, c_out, 4, 2, 1))
        n_features = 16 + 32 + 64
        self.out = nn.Linear(n_features, len(KINDS))

        # The std of the features of the built-in world.
        self.register_buffer("std", torch.ones(n_features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features, the means over places of each layer's channels, and p."""
        h = as_rgb(x)
        means = []
        for conv in self.convs:
            h = F.gelu(conv(h))
            means.append(h.mean((2, 3)))
        features = torch.cat(means, dim=1)                      # (B, 112)
        return features / self.std, self.out(features).softmax(1)


class Texture(nn.Module):
    """Fixed measures of colour and of detail at each scale: no weights, no download. No p.

    They are the mean, the std and a thumbnail of brightness and of two colours and, scale
    by scale, how large the differences of neighbouring pixels are. Why: blur takes detail
    from the fine scales and noise adds it, a tint moves the means, and a missing kind of
    images changes the covariances. tests/texture.py measures this on any folders.

    Why logarithms: halving the detail counts the same in flat and in busy images.

    NB: its Frechet distance, "fd_texture", is no FID, and knows nothing of what an image
    shows. The number of features, and so the distance, depends on the size of the images.
    """

    name = "texture"

    PART = 8                # images at a time; more would not fit into a CPU's cache
    LEAST_SIDE = 8          # of the coarsest scale, in pixels
    NO_DETAIL = 0.02        # about the rounding of 8-bit pixels, which are in [-1, 1]

    # Features are divided by these, so that each kind varies by about 1 among photographs.
    COLOUR_STD = 0.15
    THUMBNAIL_STD = 0.25
    DETAIL_STD = 0.5

    def __init__(self):
        super().__init__()
        brightness = [1 / 3, 1 / 3, 1 / 3]
        red_green = [1 / 2, -1 / 2, 0]
        yellow_blue = [1 / 4, 1 / 4, -1 / 2]
        axes = torch.tensor([brightness, red_green, yellow_blue])
        self.register_buffer("axes", axes)                      # (3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Return 54 features, and 24 more for each scale: 126 at 32 pixels, 198 at 256."""
        parts = [self._features(part) for part in x.split(self.PART)]
        return torch.cat(parts), None

    def _features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, d)"""
        h = torch.einsum("ac,bchw->bahw", self.axes, as_rgb(x))
        features = [
            h.mean((2, 3)) / self.COLOUR_STD,
            h.std((2, 3)) / self.COLOUR_STD,
            F.adaptive_avg_pool2d(h, 4).flatten(1) / self.THUMBNAIL_STD,
        ]
        # First and second differences along columns and rows, then half the size.
        while min(h.shape[2:]) >= self.LEAST_SIDE:
            for axis in (2, 3):
                for order in (1, 2):
                    difference = h.diff(order, axis) / 2 ** order
                    features.append(self._detail(difference.abs().mean((2, 3))))
                    features.append(self._detail(difference.square().mean((2, 3)).sqrt()))
            h = F.avg_pool2d(h, 2)
        return torch.cat(features, dim=1)

    def _detail(self, size: Tensor) -> Tensor:
        """The logarithm of the mean size of differences, as a feature."""
        return (size + self.NO_DETAIL).log() / self.DETAIL_STD


class VGGFeatures(nn.Module):
    """torchvision's VGG16: the mean over places of its last convolution, relu5_3. No p.

    NB: Kynkaanniemi et al. 2019 use the second fully connected layer, of images of 224
    pixels.
    """

    name = "vgg16"

    def __init__(self, vgg: VGG16):
        super().__init__()
        self.vgg = vgg

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        relu5_3 = self.vgg(x)[-1]                               # (B, 512, H/16, W/16)
        return relu5_3.mean((2, 3)), None                       # (B, 512)


def open_features(
    kind: str,
    device: torch.device,
    inception: str | None = None,
    vgg_weights: str | None = None,
    *,
    built_in: bool = False,
) -> nn.Module:
    """Return a feature network, frozen.

    kind: "shapes", "texture", "vgg16" or "inception", which is also net.name. "auto" is
    one of the two that need no file: shapes for images of the built-in world, texture for
    others. inception and vgg_weights are the paths of the public weights; without a path
    they are downloaded once. Raises BadInput if there are none.
    """
    if kind == "auto":
        kind = "shapes" if built_in else "texture"

    if kind == "inception":
        net = load_public(Inception(), INCEPTION_URL, inception)
    elif kind == "vgg16":
        net = VGGFeatures(open_vgg16(vgg_weights))
    elif kind == "texture":
        net = Texture()
    else:
        net = ShapesNet()
        state = torch.load(SHAPESNET, map_location="cpu", weights_only=True)
        net.load_state_dict(state)
    return net.to(device).eval().requires_grad_(False)
