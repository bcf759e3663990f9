"""Does fd_texture order degradations of photographs? Measured on folders of images.

    python tests/texture.py photos/ icons.zip --size 32 64

Half of a folder is compared with the other half: as it is, then blurred, noisy, tinted, or
without some of its kinds of images, ever more so. test_features.py does the same with
made-up photographs.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from tinyldm.data.folder import Folder
from tinyldm.metrics.features import open_features
from tinyldm.metrics.sets import Statistics, compare

MOST_IMAGES = 1600

# How strong each degradation is; images are in [-1, 1].
BLUR = (0.5, 1, 2, 4)               # std of the Gaussian, in pixels
NOISE = (0.05, 0.1, 0.2, 0.4)       # std of the Gaussian, with which pixels vary
TINT = (0.05, 0.1, 0.2, 0.4)        # red is brighter by this share, blue darker
MISSING = (1, 2, 3)                 # number of kinds, the most frequent first


def in_8_bits(x: Tensor) -> Tensor:
    """Images as they come back from a file."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def blurred(x: Tensor, std: float) -> Tensor:
    reach = round(3 * std + 0.5)
    offsets = torch.arange(-reach, reach + 1.0)
    window = (-offsets ** 2 / (2 * std ** 2)).exp()
    rows = (window / window.sum()).repeat(3, 1, 1, 1)           # (3, 1, 1, width)
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    along_rows = F.conv2d(padded, rows, groups=3)
    return in_8_bits(F.conv2d(along_rows, rows.transpose(2, 3), groups=3))


def noisy(x: Tensor, std: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return in_8_bits(x + std * torch.randn(x.shape, generator=generator))


def tinted(x: Tensor, share: float) -> Tensor:
    factors = torch.tensor([1 + share, 1, 1 - share]).view(3, 1, 1)
    return in_8_bits((x + 1) * factors - 1)


def degradations(x: Tensor, kinds: Tensor) -> dict[str, list[Tensor]]:
    """The images x (n, 3, H, W), of kinds (n,) 0, 1, ..., degraded more and more."""
    n_missing = range(1, min(len(MISSING), int(kinds.max())) + 1)
    return {
        "blur": [blurred(x, std) for std in BLUR],
        "noise": [noisy(x, std) for std in NOISE],
        "tint": [tinted(x, share) for share in TINT],
        "missing kinds": [x[kinds >= n] for n in n_missing],
    }


def measure(x: Tensor, kinds: Tensor) -> dict[str, list[tuple[float, float, float]]]:
    """fd_texture, precision and recall of the second half of x against the first.

    The first of each list is that of the images as they are.
    """
    net = open_features("texture", torch.device("cpu"))
    half = len(x) // 2
    real = Statistics(net, x[:half].split(64))

    def figures_of(fake: Tensor) -> tuple[float, float, float]:
        figures = compare(real, Statistics(net, fake.split(64)))
        return figures["fd_texture"], figures["precision"], figures["recall"]

    other = x[half:]
    as_it_is = figures_of(other)
    table = {}
    for name, worse_and_worse in degradations(other, kinds[half:]).items():
        table[name] = [as_it_is] + [figures_of(fake) for fake in worse_and_worse]
    return table


def photographs(n: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Made-up photographs (n, 3, side, side) of three kinds, and their kinds (n,).

    Each is noise with the spectrum of photographs, 1 / f, on regions of two colours of its
    kind.
    """
    generator = torch.Generator().manual_seed(seed)
    colours = torch.tensor([
        [[0.4, 0.1, -0.4], [-0.3, -0.1, 0.2]],
        [[-0.5, 0.2, 0.1], [0.3, 0.4, 0.5]],
        [[-0.6, -0.6, -0.2], [0.5, 0.0, 0.1]],
    ])                                                          # (kinds, 2 regions, RGB)
    frequency = torch.fft.fftfreq(side)[:, None].hypot(torch.fft.rfftfreq(side))
    frequency[0, 0] = 1 / side

    noise = torch.randn(n, 4, side, side, generator=generator)
    pink = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency, s=(side, side))
    pink = pink / pink.std((2, 3), keepdim=True)                # (n, 4, side, side)
    kinds = torch.randint(3, (n,), generator=generator)
    regions = (pink[:, 3:] > 0).float()
    first, second = colours[kinds].unbind(1)
    base = torch.where(regions > 0, first[:, :, None, None], second[:, :, None, None])
    return in_8_bits(base + 0.15 * pink[:, :3] + 0.15 * pink[:, :1]), kinds


def open_photographs(path: str, size: int, label_column: str) -> tuple[Tensor, Tensor]:
    """The images of a folder in random order, and the kind of each, the most frequent is 0.

    The kinds are the classes of the folder or, if it has none, four steps of brightness.
    """
    data = Folder(path, size, "all", label_column=label_column)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    items = [data[k] for k in order[:MOST_IMAGES].tolist()]
    x = torch.stack([item["image"] for item in items])
    if all("label" in item for item in items) and len(data.label_names) > 1:
        labels = torch.tensor([item["label"] for item in items])
    else:
        brightness = x.mean((1, 2, 3))
        quarters = brightness.quantile(torch.tensor([0.25, 0.5, 0.75]))
        labels = torch.bucketize(brightness, quarters)
    by_frequency = labels.bincount().argsort(descending=True)
    return x, by_frequency.argsort()[labels]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--size", type=int, nargs="+", default=[64])
    parser.add_argument("--label-column", default="label")
    args = parser.parse_args()

    for path in args.folders:
        for size in args.size:
            table = measure(*open_photographs(path, size, args.label_column))
            for name, rows in table.items():
                distances, precisions, recalls = zip(*rows)
                order = "rises" if list(distances) == sorted(distances) else "DOES NOT RISE"
                texts = [
                    " ".join(f"{distance:.3g}" for distance in distances),
                    "precision " + " ".join(f"{value:.2f}" for value in precisions),
                    "recall " + " ".join(f"{value:.2f}" for value in recalls),
                ]
                line = " | ".join([f"{Path(path).name} {size} px", f"{name} {order}", *texts])
                print(line, flush=True)


if __name__ == "__main__":
    main()
