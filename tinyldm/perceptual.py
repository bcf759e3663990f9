"""The perceptual distance: how far two pictures lie apart in the features of a VGG16.

Paper:   Sec. 3.1, L_rec (Zhang et al. 2018); App. G. Reads: nothing of ours.
Shapes:  x, x_rec (B, 3, H, W) in [-1, 1] -> (B,), 0 = equal; sides of at least 16.
NB: the paper weighs the channels by LPIPS's learned weights, here all weigh the same: torchvision's
VGG16 file is all it needs. `random`, an eighth as wide, with fixed random weights, needs none."""
import warnings

import torch
from torch import Tensor, nn

from tinyldm import BadInput

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

def load_public(net: nn.Module, url: str, path: str | None, flag: str, prefix="") -> nn.Module:
    """Fill net with a public state dict's keys of that prefix: from a file, or fetched once into
    torch's hub cache. Raises BadInput, for TorchScript too: to load that is to run code in it."""
    how = dict(map_location="cpu", weights_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*TorchScript")
            state = (torch.hub.load_state_dict_from_url(url, check_hash=True, **how)
                     if path is None else torch.load(path, **how))
        net.load_state_dict({k: v for k, v in state.items() if k.startswith(prefix)})
        return net
    except Exception as e:
        why = "TorchScript, which is code" if isinstance(e, Warning) else type(e).__name__
        raise BadInput(f"no weights from {path or url} ({why}): give {url.split('/')[-1]} by "
                       f"{flag} PATH; or use --perceptual random, --features shapes") from e

class Perceptual(nn.Module):
    """kind: `vgg16`, torchvision's weights (load_public), or `random`; frozen. Raises BadInput."""
    def __init__(self, kind: str, weights: str | None = None):
        super().__init__()
        self.taps, layers, c = [], [], 3
        for i, stage in enumerate(STAGES):
            layers += [nn.MaxPool2d(2)] if i else []
            for width in stage:
                c_in, c = c, width // (8 if kind == "random" else 1)
                layers += [nn.Conv2d(c_in, c, 3, padding=1), nn.ReLU()]
            self.taps.append(len(layers) - 1)       # relu1_2, 2_2, 3_3, 4_3, 5_3
        self.features = nn.Sequential(*layers)      # torchvision's names: features.0.weight ...
        if kind == "random":
            g = torch.Generator().manual_seed(0)
            for p in self.parameters():
                p.data = (torch.randn(p.shape, generator=g) * (2 / p[0].numel()) ** 0.5
                          if p.ndim > 1 else p * 0)
        else:
            load_public(self, URL, weights, "--vgg-weights", "features.")
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 2 - 1)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 2)
        self.requires_grad_(False).eval()
    def forward(self, x: Tensor, x_rec: Tensor) -> Tensor:
        """Mean over five layers and all places of |f/|f| - f_rec/|f_rec||^2, in 0..4 -> (B,)."""
        h, total = (torch.cat([x, x_rec]) - self.mean) / self.std, 0
        for i, layer in enumerate(self.features):
            h = layer(h)
            if i in self.taps:
                f, f_rec = nn.functional.normalize(h, eps=1e-6).chunk(2)
                total = total + (f - f_rec).square().sum(1).mean((1, 2))
        return total / len(self.taps)
