"""Networks whose features say how alike two sets of pictures are: x -> (features, probabilities).

Shapes:  x (B, 3, H, W) in [-1, 1] -> features (B, d), and p(y | x) (B, K) or None.
Paper:   App. E.3 (FID by torch-fidelity's). Reads: inception.py, perceptual.py, shapes.py"""
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyldm.checkpoint import unpickle
from tinyldm.inception import URL, Inception
from tinyldm.perceptual import Perceptual, load_public
from tinyldm.shapes import COLOURS, SHAPES, SIZES

SHAPESNET = Path(__file__).with_name("shapesnet.pt")
KINDS = [(c, s, z) for c in COLOURS for s in SHAPES for z in SIZES]

class ShapesNet(nn.Module):
    """A small classifier of the built-in world; p: the share of each (colour, shape, size).
    NB: its Frechet distance, "fd_shapes", is no FID and compares with nothing outside this project:
    it needs no download, and knows flat shapes alone (tests/shapesnet.py trains it in a minute)."""
    name = "shapes"
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(*c, 4, 2, 1) for c in ((3, 16), (16, 32), (32, 64)))
        self.out = nn.Linear(112, len(KINDS))
        self.register_buffer("std", torch.ones(112))
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, 112): each channel's mean over places, three layers, of std 1 in the set."""
        f = torch.cat([(x := nn.functional.gelu(conv(x))).mean((2, 3)) for conv in self.convs], 1)
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
        net = load_public(Inception(), URL, args.inception, "--inception")
    elif args.features == "vgg16":
        net = VGG16("vgg16", args.vgg_weights)
    else:
        net = ShapesNet()
        net.load_state_dict(unpickle(SHAPESNET, SHAPESNET, mmap=False))
    return net.to(device).eval().requires_grad_(False)
