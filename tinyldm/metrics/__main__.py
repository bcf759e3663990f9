"""Compare two sets of images: FID, precision and recall, inception score.

    python -m tinyldm.metrics --real photos/ --fake out/samples/ --features inception
    python -m tinyldm.metrics --real a/ --fake b/ --pairs          # also pairs, by name
    python -m tinyldm.metrics --real held-out --fake out/samples/  # the built-in world

NB: FID in the literature compares 50,000 samples with the whole training set.
"""
from argparse import Namespace
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tinyldm.data.dataset import ImageDataset
from tinyldm.data.folder import Folder
from tinyldm.data.images import size_text
from tinyldm.data.shapes import Shapes
from tinyldm.engine.command import run
from tinyldm.engine.flags import add_feature_flags, image_size, new_parser
from tinyldm.engine.processes import setup
from tinyldm.engine.ranges import check_ranges
from tinyldm.engine.weights import open_perceptual
from tinyldm.errors import naming, require
from tinyldm.metrics.features import open_features
from tinyldm.metrics.images import psnr, ssim
from tinyldm.metrics.sets import Statistics, compare, load_images

BUILT_IN = ("train", "held-out")        # splits of the built-in world
MOST_BUILT_IN = 10_000                  # images of it to compare with
MOST_FEATURES = 10_000                  # images of each set whose features are kept


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = new_parser(__doc__)

    group = parser.add_argument_group("images")
    group.add_argument("--real", type=str, required=True,
                       help="folder, .zip or .tar; or built-in: 'train' or 'held-out'")
    group.add_argument("--fake", type=str, required=True,
                       help="images to evaluate, given in the same way as --real")
    group.add_argument("--size", type=image_size, metavar="HxW",
                       help="size to scale and crop to, as 64 or 64x96; default: the first fake's")
    group.add_argument("--n", type=int, default=50_000,
                       help="largest number of images of each set")
    group.add_argument("--pairs", action="store_true",
                       help="also compare the images that have the same name in both")
    add_feature_flags(parser)

    group = parser.add_argument_group("system")
    group.add_argument("--device", type=str, default="auto",
                       help="auto (CUDA if there is any), cpu or cuda")
    group.add_argument("--workers", type=int, default=0,
                       help="processes that load images")
    args = parser.parse_args(argv)
    check_ranges(vars(args))
    return args


def main(args: Namespace) -> None:
    device = setup(args.device, "fp32").device
    with naming(f"--features {args.features}"):
        net = open_features(args.features, device, args.inception, args.vgg_weights)

    # The two sets, at one size.
    size = args.size if args.size is not None else size_of_first(args.fake)
    require(min(size) >= 16, f"--size {size_text(size)}: must be at least 16")
    with naming("--real"):
        real = open_set(args.real, size, args.n)
    with naming("--fake"):
        fake = open_set(args.fake, size, args.n)
    if args.pairs:
        have_names = isinstance(real, Folder) and isinstance(fake, Folder)
        require(have_names, "--pairs: needs two folders, whose images have names")

    # What the sets are like. Each gives at most --n images, evenly spread over it.
    statistics = []
    numbers = []
    for data in (real, fake):
        n = min(len(data), args.n)
        require(n >= 4, "--real, --fake, --n: each set must have four images or more")
        spread = [i * len(data) // n for i in range(n)]
        stride = -(-n // MOST_FEATURES)
        images = load_images(data, spread, args.workers, device)
        statistics.append(Statistics(net, images, stride))
        numbers.append(n)
    figures = compare(*statistics)

    # How far the images of each pair are apart.
    if args.pairs:
        pairs = paired_images(real, fake, args.n, args.workers, device)
        figures |= compare_pairs(pairs, args.vgg_weights, device)

    n_real, n_fake = numbers
    text = " | ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{n_real:,} real, {n_fake:,} fake: {text}")


def size_of_first(path: str) -> tuple[int, int]:
    """Return the size (H, W) of the first image in a folder that can be read."""
    with naming("--fake"):
        _, image = Folder(path, 1, "all", resize=False).readable(0)
    return image.height, image.width


def open_set(path: str, size: tuple[int, int], n: int) -> ImageDataset:
    """Open all images of a folder, or at most n of a split of the built-in world."""
    if path in BUILT_IN:
        h, w = size
        require(h == w, f"{path}: the images of the built-in world are square, not {h}x{w}")
        return Shapes(max(0, min(n, MOST_BUILT_IN)), h, split=path)
    return Folder(path, size, "all")


def paired_images(
    real: Folder, fake: Folder, n: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (B, 3, H, W) of real and fake images of the same name.

    There are at most n pairs in all. Raises BadInput if no name occurs in both.
    """
    real_index = {row["file_name"]: i for i, row in enumerate(real.rows)}
    fake_index = {row["file_name"]: i for i, row in enumerate(fake.rows)}
    names = real_index.keys() & fake_index.keys()

    # An image that cannot be read was replaced by the next one, which is no partner.
    names = sorted(names - real.unreadable - fake.unreadable)[:n]
    require(names, "--pairs: no image of --fake has the name of one of --real")

    real_items = [real_index[name] for name in names]
    fake_items = [fake_index[name] for name in names]
    yield from zip(
        load_images(real, real_items, workers, device),
        load_images(fake, fake_items, workers, device),
    )


def compare_pairs(
    pairs: Iterator[tuple[Tensor, Tensor]],
    vgg_weights: str | None,
    device: torch.device,
) -> dict[str, float]:
    """Return the means of PSNR, SSIM and perceptual distance over pairs of images.

    The perceptual distance is VGG16's if its weights are given, else one of random
    features.
    """
    kind = "vgg16" if vgg_weights else "random"
    distance = open_perceptual(kind, vgg_weights, device)
    rows = []
    for x, x_rec in pairs:
        row = [psnr(x, x_rec), ssim(x, x_rec), distance(x, x_rec)]
        rows.append(torch.stack(row))                           # (3, B)
    mean_psnr, mean_ssim, mean_distance = torch.cat(rows, dim=1).mean(1).tolist()
    return {"psnr": mean_psnr, "ssim": mean_ssim, f"perceptual_{kind}": mean_distance}


if __name__ == "__main__":
    run(main, parse_args)
