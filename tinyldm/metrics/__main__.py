"""Compare two sets of images: FID, precision and recall, inception score.

    python -m tinyldm.metrics --real photos/ --fake out/samples/ --features inception
    python -m tinyldm.metrics --real a/ --fake b/ --pairs          # also pairs, by name
    python -m tinyldm.metrics --real held-out --fake out/samples/  # the built-in world
    python -m tinyldm.metrics --real a/ --fake b/ --clip clip-vit-large-patch14/

NB: FID in the literature compares 50,000 samples with the whole training set.
"""
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import Dataset

from tinyldm.data.dataset import spread
from tinyldm.data.folder import Folder
from tinyldm.data.images import size_text
from tinyldm.data.shapes import Shapes
from tinyldm.engine.command import run
from tinyldm.engine.flags import add_feature_flags, image_size, new_parser, open_feature_net
from tinyldm.engine.processes import setup
from tinyldm.engine.ranges import check_ranges
from tinyldm.engine.weights import open_perceptual
from tinyldm.errors import naming, require
from tinyldm.metrics.clip import CLIP, clip_score, clip_vectors, cmmd, open_clip
from tinyldm.metrics.images import psnr, ssim
from tinyldm.metrics.reading import ExactImages, Tally, read_images, read_pairs
from tinyldm.metrics.sets import Statistics, compare

BUILT_IN = ("train", "held-out")        # splits of the built-in world
MOST_BUILT_IN = 10_000                  # images of it to compare with
MOST_FEATURES = 10_000                  # images of each set whose features are kept


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = new_parser(__doc__)

    group = parser.add_argument_group("images")
    group.add_argument("--real", type=str, required=True,
                       help="folder, .zip or .tar; or of the built-in world: train or held-out "
                            "(write ./train for a folder that is called so)")
    group.add_argument("--fake", type=str, required=True,
                       help="images to evaluate, given in the same way as --real")
    group.add_argument("--size", type=image_size, metavar="HxW",
                       help="size to scale and crop to, as 64 or 64x96; default: the first fake's")
    group.add_argument("--n", type=int, default=50_000,
                       help="largest number of images of each set")
    group.add_argument("--pairs", action="store_true",
                       help="also compare the images that have the same name in both")
    group.add_argument("--clip", type=Path, metavar="FOLDER",
                       help="also compare them by CLIP, whose weights and vocabulary this folder "
                            "has: cmmd, and clip_score if the fake images have captions")
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
    built_in = args.real in BUILT_IN or args.fake in BUILT_IN
    net = open_feature_net(args, device, built_in)
    if args.clip:
        with naming("--clip"):
            clip = open_clip(args.clip, device)

    # The two sets, at one size.
    size = args.size if args.size is not None else size_of_first(args.fake)
    require(min(size) >= 16, f"--size {size_text(size)}: must be at least 16")
    with naming("--real"):
        real = open_set(args.real, size, args.n)
    with naming("--fake"):
        fake = open_set(args.fake, size, args.n)
    if args.pairs:
        have_names = isinstance(real, ExactImages) and isinstance(fake, ExactImages)
        require(have_names, "--pairs: needs two folders, whose images have names")
        pairs = pairs_by_name(real, fake, args.n)

    # What the sets are like, and what became of their images.
    real_statistics = statistics_of(f"--real {args.real}", real, net, size, args, device)
    fake_statistics = statistics_of(f"--fake {args.fake}", fake, net, size, args, device)
    figures = compare(real_statistics, fake_statistics)

    # How far the images of each pair are apart.
    if args.pairs:
        figures |= compare_pairs(real, fake, pairs, args, device)

    if args.clip:
        figures |= compare_by_clip(real, fake, clip, args, device)

    n_real = real_statistics.moments.n
    n_fake = fake_statistics.moments.n
    text = " | ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{n_real:,} real, {n_fake:,} fake: {text}")


def size_of_first(path: str) -> tuple[int, int]:
    """Return the size (H, W) of the first image in a folder that can be read."""
    with naming("--fake"):
        require(path not in BUILT_IN, f"{path} has images of any size; choose --size")
        _, image, _ = Folder(path, 1, "all", resize=False).readable(0)
        require(
            min(image.size) >= 16,
            f"{path}: the first image is {image.width}x{image.height}, too small to compare; "
            "choose --size, at least 16",
        )
    return image.height, image.width


def open_set(path: str, size: tuple[int, int], n: int) -> Dataset:
    """Open all images of a folder, or at most n of a split of the built-in world."""
    if path not in BUILT_IN:
        return ExactImages(Folder(path, size, "all"))

    if os.path.exists(path):
        print(f"{path} is the built-in world's split; for the folder here, write ./{path}")
    h, w = size
    require(
        h == w,
        f"{path}: the images of the built-in world are square, not {h}x{w}; choose --size",
    )
    return Shapes(min(n, MOST_BUILT_IN), h, split=path)


def compared(data: Dataset, n: int) -> list[int]:
    """Return the numbers of at most n images, evenly spread over a set."""
    return spread(min(len(data), n), len(data))


def statistics_of(
    name: str,
    data: Dataset,
    net: nn.Module,
    size: tuple[int, int],
    args: Namespace,
    device: torch.device,
) -> Statistics:
    """Return the statistics of at most --n images, evenly spread over a set.

    Prints what became of its images; name is the set's flag and its value.
    """
    require(args.n >= 4, f"--n {args.n}: must be at least 4")
    numbers = compared(data, args.n)
    stride = -(-len(numbers) // MOST_FEATURES)
    tally = Tally(size)
    images = read_images(data, numbers, args.workers, device, tally)
    statistics = Statistics(net, images, stride)

    n_read = statistics.moments.n
    parts = [f"{name}: {n_read:,} images are compared", *tally.parts()]
    lines = [" | ".join(parts)]
    if isinstance(data, ExactImages):
        lines += data.folder.summary()[1:]      # what was no image
    print("\n".join(lines))
    require(
        n_read >= 4,
        f"{name}: {n_read} images can be read; each set must have four images or more",
    )
    return statistics


def pairs_by_name(real: ExactImages, fake: ExactImages, n: int) -> list[tuple[int, int]]:
    """Return the numbers of the real and the fake image of at most n names in both sets.

    Raises BadInput if no name occurs in both.
    """
    real_index = {real.name(i): i for i in range(len(real))}
    fake_index = {fake.name(i): i for i in range(len(fake))}
    names = sorted(real_index.keys() & fake_index.keys())[:n]
    require(names, "--pairs: no image of --fake has the name of one of --real")
    return [(real_index[name], fake_index[name]) for name in names]


def compare_pairs(
    real: ExactImages,
    fake: ExactImages,
    pairs: Sequence[tuple[int, int]],
    args: Namespace,
    device: torch.device,
) -> dict[str, float]:
    """Return the means of PSNR, SSIM and perceptual distance over pairs of images.

    The perceptual distance is VGG16's if its weights are given, else one of random
    features.
    """
    kind = "vgg16" if args.vgg_weights else "random"
    with naming("--vgg-weights"):
        distance = open_perceptual(kind, args.vgg_weights, device)
    rows = []
    for x, x_rec in read_pairs(real, fake, pairs, args.workers, device):
        row = [psnr(x, x_rec), ssim(x, x_rec), distance(x, x_rec)]
        rows.append(torch.stack(row))                           # (3, B)
    require(rows, "--pairs: no two images of the same name can be read")

    figures = torch.cat(rows, dim=1)                            # (3, number of pairs)
    n_pairs = figures.shape[1]
    left_out = f" | {len(pairs) - n_pairs:,} left out" if n_pairs < len(pairs) else ""
    print(f"--pairs: {n_pairs:,} images have the same name in both{left_out}")
    mean_psnr, mean_ssim, mean_distance = figures.mean(1).tolist()
    return {"psnr": mean_psnr, "ssim": mean_ssim, f"perceptual_{kind}": mean_distance}


def compare_by_clip(
    real: Dataset,
    fake: Dataset,
    clip: tuple[CLIP, Tokenizer],
    args: Namespace,
    device: torch.device,
) -> dict[str, float]:
    """Return cmmd, and clip_score if all fake images have captions, of at most --n images."""
    net, tokenizer = clip

    def vectors_of(data: Dataset, tally: Tally) -> Tensor:
        numbers = compared(data, args.n)
        return clip_vectors(net, read_images(data, numbers, args.workers, device, tally))

    tally = Tally((0, 0))
    vectors = vectors_of(fake, tally)
    figures = {"cmmd": cmmd(vectors_of(real, Tally((0, 0))), vectors)}

    captions = captions_of(fake, compared(fake, args.n), tally)
    if captions is None:
        print("--clip: not all fake images have captions, so there is no clip_score")
    else:
        figures["clip_score"] = clip_score(net, tokenizer, vectors, captions)
    return figures


def captions_of(data: Dataset, numbers: Sequence[int], tally: Tally) -> list[str] | None:
    """Return the first caption of each image that was read; None if one has none."""
    if not isinstance(data, ExactImages):
        return [data[k]["caption"] for k in numbers]

    captions = []
    for k in numbers:
        if data.name(k) in tally.unreadable:
            continue
        text = data.folder.rows[k].get("text")
        if not text:
            return None
        captions.append(text if isinstance(text, str) else text[0])
    return captions


if __name__ == "__main__":
    run(main, parse_args)
