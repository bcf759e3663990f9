"""Networks whose features say how alike two sets of pictures are: x -> (features, probabilities).

Paper:   App. E.3 (FID by torch-fidelity's Inception).
Shapes:  x (B, 3, H, W) in [-1, 1] -> features (B, d), and p(y | x) (B, K) or None.
Reads:   inception.py, perceptual.py, shapes.py"""
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyldm.checkpoint import unpickle
from tinyldm.inception import load_inception
from tinyldm.perceptual import Perceptual
from tinyldm.shapes import COLOURS, SHAPES, SIZES

SHAPESNET = Path(__file__).with_name("shapesnet.pt")
KINDS = list(product(COLOURS, SHAPES, SIZES))

class ShapesNet(nn.Module):
    """A small classifier of the built-in world; p: the share of each (colour, shape, size).
    NB: its Frechet distance, "fd_shapes", is no FID and compares with nothing outside this project:
    it needs no download, and knows flat shapes alone (tests/shapesnet.py trains it in a minute)."""
    name = "shapes"
    def __init__(self):
        super().__init__()
        widths = (3, 16, 32, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(widths, widths[1:]))
        self.out = nn.Linear(sum(widths[1:]), len(KINDS))
        self.register_buffer("std", torch.ones(sum(widths[1:])))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, 112): each channel's mean over places, three layers, of std 1 in the set."""
        means = [(x := nn.functional.gelu(conv(x))).mean((2, 3)) for conv in self.convs]
        f = torch.cat(means, dim=1)
        return f / self.std, self.out(f).softmax(1)

class VGG16(Perceptual):
    """torchvision's: the mean over places of the last convolution, relu5_3 (B, 512); no p.
    NB: Kynkaanniemi et al. take its second fully connected layer, of pictures of 224 px."""
    name = "vgg16"
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.features((x - self.mean) / self.std).mean((2, 3)), None

def feature_flags(parser) -> None:
    g = parser.add_argument_group("features")
    g.add_argument("--features", choices=["shapes", "vgg16", "inception"], default="shapes",
                   help="of the Frechet distance: inception is FID; shapes needs no download")
    g.add_argument("--inception", help="pt_inception-2015-12-05-6726825d.pth; default: fetched")
    g.add_argument("--vgg-weights", help="torchvision's vgg16-397923af.pth; default: fetched")

def open_features(args, device: torch.device) -> nn.Module:
    """The network of --features, frozen, with its name in .name. Raises BadInput."""
    if args.features == "inception":
        net = load_inception(args.inception)
    elif args.features == "vgg16":
        net = VGG16("vgg16", args.vgg_weights)
    else:
        net = ShapesNet()
        net.load_state_dict(unpickle(SHAPESNET, SHAPESNET, mmap=False))
    return net.to(device).eval().requires_grad_(False)
