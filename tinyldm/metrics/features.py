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
) -> nn.Module:
    """Return a feature network, frozen; kind is "shapes", "vgg16" or "inception".

    Its kind is also in net.name. inception and vgg_weights are the paths of the public
    weights; without a path they are downloaded once. Raises BadInput if there are none.
    """
    if kind == "inception":
        net = load_public(Inception(), INCEPTION_URL, inception)
    elif kind == "vgg16":
        net = VGGFeatures(open_vgg16(vgg_weights))
    else:
        net = ShapesNet()
        state = torch.load(SHAPESNET, map_location="cpu", weights_only=True)
        net.load_state_dict(state)
    return net.to(device).eval().requires_grad_(False)
