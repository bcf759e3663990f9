"""The network in whose features the literature measures FID, and by whose classes it computes IS.

Paper:   App. E.3 (torch-fidelity). FID: Heusel et al. 2017. The net: Szegedy et al. 2016, Tab. 1.
Shapes:  x (B, 3, H, W) in [-1, 1] -> features (B, 2048), p (B, 1008). Reads: nothing of ours.
NB: a figure is comparable only if every step is that of the TensorFlow graph of 2015-12-05: pixels
of 8 bits, TensorFlow 1's resize to 299 x 299, (v - 128) / 128, average pools without their padding,
a max pool in the last block, 1008 classes. torchvision's net differs in all of these, pytorch-fid
in the resize and the scale; torch-fidelity follows the graph, as we do."""
import re
from collections import OrderedDict

import torch
from torch import Tensor, nn

URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
       "pt_inception-2015-12-05-6726825d.pth")
MEAN = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
MAX, HALVE = nn.MaxPool2d(3, 1, 1), nn.MaxPool2d(3, 2)

def conv(c_in: int, width: int, kernel, stride: int = 1, padding="same") -> nn.Sequential:
    layer = nn.Conv2d(c_in, width, kernel, stride, padding, bias=False)
    norm = nn.BatchNorm2d(width, eps=1e-3)
    return nn.Sequential(OrderedDict(conv=layer, bn=norm, relu=nn.ReLU(inplace=True)))

class Block(nn.ModuleDict):
    """rows: name -> a pool, or conv's arguments. (B, C, H, W) -> all branches, side by side.
    A name with _2 .. _5 or _pool goes on from the row before, b from where a did; others from x."""
    def __init__(self, rows: dict):
        super().__init__({f"branch{name}": conv(*row) if isinstance(row, tuple) else row
                          for name, row in rows.items()})
    def forward(self, x: Tensor) -> Tensor:
        out = []
        for name, layer in self.items():
            h = out.pop() if re.search("_[2-5p]", name) else x
            out += [layer(h), h] if name[-1] == "a" else [layer(h)]     # b takes the same h
        return torch.cat(out, 1)

def a(c_in, w):         # Szegedy et al. 2016, Fig. 5; the letters are those of torchvision
    return Block({
        "1x1": (c_in, 64, 1), "5x5_1": (c_in, 48, 1), "5x5_2": (48, 64, 5),
        "3x3dbl_1": (c_in, 64, 1), "3x3dbl_2": (64, 96, 3), "3x3dbl_3": (96, 96, 3),
        "pool": MEAN, "_pool": (c_in, w, 1)})

def c(w, row=(1, 7), col=(7, 1)):   # Fig. 6: 7 x 7 as a row and a column
    return Block({
        "1x1": (768, 192, 1), "7x7_1": (768, w, 1), "7x7_2": (w, w, row), "7x7_3": (w, 192, col),
        "7x7dbl_1": (768, w, 1), "7x7dbl_2": (w, w, col), "7x7dbl_3": (w, w, row),
        "7x7dbl_4": (w, w, col), "7x7dbl_5": (w, 192, row), "pool": MEAN, "_pool": (768, 192, 1)})

def e(c_in, pool, fork=((384, 384, (1, 3)), (384, 384, (3, 1)))):        # Fig. 7
    return Block({
        "1x1": (c_in, 320, 1), "3x3_1": (c_in, 384, 1), "3x3_2a": fork[0], "3x3_2b": fork[1],
        "3x3dbl_1": (c_in, 448, 1), "3x3dbl_2": (448, 384, 3), "3x3dbl_3a": fork[0],
        "3x3dbl_3b": fork[1], "pool": pool, "_pool": (c_in, 192, 1)})

def tf_resize(x: Tensor, n: int) -> Tensor:
    """TensorFlow 1's bilinear resize of the last axis, (..., in) -> (..., n): output i lies at
    i * in / n, between two pixels; no half pixel is added, and nothing is averaged in shrinking."""
    at = torch.arange(n, device=x.device) * (x.shape[-1] / n)
    low = at.long()
    left, right = x[..., low], x[..., (low + 1).clamp(max=x.shape[-1] - 1)]
    return left + (right - left) * (at - low)

class Inception(nn.Sequential):
    """Frozen, in eval mode; the state dict's keys are pytorch-fid's, which are torchvision's."""
    name = "inception"
    def __init__(self):
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=conv(3, 32, 3, 2, 0), Conv2d_2a_3x3=conv(32, 32, 3, 1, 0),
            Conv2d_2b_3x3=conv(32, 64, 3), pool_2=HALVE,                                # 73 x 73
            Conv2d_3b_1x1=conv(64, 80, 1), Conv2d_4a_3x3=conv(80, 192, 3, 1, 0), pool_4=HALVE,
            Mixed_5b=a(192, 32), Mixed_5c=a(256, 64), Mixed_5d=a(288, 64),              # 35 x 35
            Mixed_6a=Block({"3x3": (288, 384, 3, 2, 0), "3x3dbl_1": (288, 64, 1),       # 17 x 17
                            "3x3dbl_2": (64, 96, 3), "3x3dbl_3": (96, 96, 3, 2, 0), "pool": HALVE}),
            Mixed_6b=c(128), Mixed_6c=c(160), Mixed_6d=c(160), Mixed_6e=c(192),
            Mixed_7a=Block({"3x3_1": (768, 192, 1), "3x3_2": (192, 320, 3, 2, 0),       # 8 x 8
                            "7x7x3_1": (768, 192, 1), "7x7x3_2": (192, 192, (1, 7)),
                            "7x7x3_3": (192, 192, (7, 1)), "7x7x3_4": (192, 192, 3, 2, 0),
                            "pool": HALVE}),
            Mixed_7b=e(1280, MEAN), Mixed_7c=e(2048, MAX), fc=nn.Linear(2048, 1008)))
        self.requires_grad_(False).eval()
    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, 3, H, W) in [-1, 1] -> the last block's mean over places (B, 2048), and softmax of
        the logits (B, 1008). NB: without fc's bias, as torch-fidelity and Salimans et al.'s IS."""
        h = ((x.float() + 1) * 127.5).round().clamp(0, 255)             # the pixels of a png
        h = (tf_resize(tf_resize(h, 299).mT, 299).mT - 128) / 128
        *layers, fc = self
        h = nn.Sequential(*layers)(h).mean((2, 3))
        return h, (h @ fc.weight.T).softmax(1)
