"""Command-line flags: those of the hyperparameter dataclasses, and those that programs share.

A hyperparameter is declared once, in the dataclass that it shapes (config.py's `option`); this
file makes its flag. `--preset NAME` sets the defaults of a row of presets.py, and any flag that
is given wins over its row.
"""
import argparse
import dataclasses
import json
import types
import typing
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from tinyldm.data.dataset import ImageDataset
from tinyldm.data.images import both_sides
from tinyldm.data.open import open_dataset
from tinyldm.engine.ranges import check_ranges, flag_of
from tinyldm.errors import BadInput, naming, require
from tinyldm.metrics.features import open_features


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.MetavarTypeHelpFormatter):
    """Prints the program's docstring as it is, and the type of each flag's value."""


def new_parser(doc: str) -> ArgumentParser:
    """Return a parser whose help begins with the program's docstring."""
    return ArgumentParser(
        usage="%(prog)s [flags]",
        description=doc,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )


def parse(
    parser: ArgumentParser,
    presets: dict[str, dict],
    argv: Sequence[str] | None,
    row_to_start_from: Callable[[Namespace], dict | None] | None = None,
) -> Namespace:
    """Parse argv with the row of --preset as defaults, so that a given flag always wins.

    row_to_start_from: returns the row of the model that training starts from, which then takes
    the place of the preset's; None if training starts from nothing.
    Raises BadInput for a number that is out of its range.
    """
    parser.add_argument(
        "--preset", type=str,
        choices=presets,
        metavar="NAME",
        help="defaults of all flags below (engine/presets.py); default: toy; one of: "
        + ", ".join(presets),
    )
    first = parser.parse_args(argv)
    row = row_to_start_from(first) if row_to_start_from is not None else None
    if row is None:
        preset = first.preset or "toy"
        row = presets[preset] | {"preset": preset}
    parser.set_defaults(**row)
    args = parser.parse_args(argv)
    args.size = both_sides(args.size)       # one number in a preset's row
    check_ranges(vars(args))
    return args


def image_size(text: str) -> tuple[int, int]:
    """Parse the value of --size -> (H, W): 64 is a square, 64x96 is 64 high and 96 wide."""
    sides = text.split("x")
    are_numbers = all(side.isascii() and side.isdigit() for side in sides)
    if len(sides) > 2 or not are_numbers:
        raise argparse.ArgumentTypeError(f"{text:.99} is no size; give 64, or 64x96 for HxW")
    return int(sides[0]), int(sides[-1])


def plain_values(args: Namespace) -> dict:
    """Return the flags as plain values, for checkpoints and for printing."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


# ---- hyperparameters

def option_fields(config: type) -> list[dataclasses.Field]:
    """Return the fields of a dataclass that are flags."""
    return [field for field in dataclasses.fields(config) if "help" in field.metadata]


def flag_name(field: dataclasses.Field) -> str:
    """Return the flag of a field, such as --ch-mult."""
    return field.metadata["flag"] or flag_of(field.name)


def destination(field: dataclasses.Field) -> str:
    """Return the name under which argparse keeps a field's flag."""
    return flag_name(field).removeprefix("--").replace("-", "_")


def add_config_flags(
    parser: ArgumentParser, config: type, title: str, besides: type | None = None
) -> None:
    """Add one flag for each option of a dataclass; type, default and help are the field's.

    besides: a dataclass whose flags are there already. Options that both have share a flag.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config)
    names = {field.name for field in option_fields(besides)} if besides else set()
    for field in option_fields(config):
        if field.name in names:
            continue
        how = argument_type(hints[field.name])
        if field.metadata["choices"]:
            how = {"type": str, "choices": field.metadata["choices"]}
        group.add_argument(
            flag_name(field), default=field.default, help=field.metadata["help"], **how
        )


def argument_type(hint: type) -> dict:
    """Return add_argument's keywords for a field's type.

    `int | None` is an int that may be left out, `tuple[int, ...]` is any number of ints,
    `tuple[float, float]` is two floats, `tuple[float, float] | tuple[()]` two or none, and a
    bool has a --no- form.
    """
    may_be_empty = tuple[()] in typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if hint is bool:
        return {"action": BooleanOptionalAction}
    if typing.get_origin(hint) is tuple:
        kinds = typing.get_args(hint)
        nargs = "*" if may_be_empty or kinds[1:] == (Ellipsis,) else len(kinds)
        return {"type": kinds[0], "nargs": nargs}
    return {"type": hint}


def config_values(config: type, values: dict) -> dict:
    """Return a dataclass's keyword arguments from flags' values, by their destinations."""
    found = {}
    for field in option_fields(config):
        value = values[destination(field)]
        found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


# ---- flags that several programs share

def add_data_flags(parser: ArgumentParser) -> None:
    """Add the flags that say what the images are (data/open.py)."""
    g = parser.add_argument_group("data")
    g.add_argument("--data", type=str,
                   help="'shapes' (the built-in world), 'emoji' (the bundled set), or a folder, "
                        ".zip or .tar; ./emoji is a folder of that name")
    g.add_argument("--n-shapes", type=int, default=10_000,
                   help="number of training images of the built-in world")
    g.add_argument("--size", type=image_size, metavar="HxW",
                   help="size of the training images in pixels: 64 for a square, or 64x96 for "
                        "64 high and 96 wide")
    g.add_argument("--channels", type=int,
                   help="channels of the images: 1 is grey, 3 RGB, 4 RGBA; default: those of "
                        "stage one, or 3")
    g.add_argument("--resize", action=BooleanOptionalAction, default=True,
                   help="scale images to cover --size before the central crop")
    g.add_argument("--flip", action="store_true", help="mirror the images in every second epoch")
    g.add_argument("--hold-out", action=BooleanOptionalAction, default=True,
                   help="keep images back to evaluate with; --no-hold-out trains on all of them, "
                        "and what the log calls held out is then of the training set")


def open_data(
    args: Namespace, split: str, channels: int = 3, source: str = "data", **conditions: object
) -> ImageDataset:
    """Open the data set that the data flags describe.

    split is "train" or "held-out". channels are those of stage one. source is the flag that
    has the path, "data" or train_ldm.py's "prior". conditions are open_dataset's keyword
    arguments about the conditions: fields, label_column, degrade. Raises BadInput.
    """
    path = getattr(args, source)
    require(
        path,
        f"--data: preset {args.preset} has none of its own; give a folder of images",
    )
    with naming(f"--{source}"):
        return open_dataset(
            path,
            split,
            size=args.size,
            channels=channels,
            seed=args.seed,
            n_shapes=args.n_shapes,
            resize=args.resize,
            flip=args.flip,
            hold_out=args.hold_out,
            **conditions,
        )


def print_found(data: ImageDataset) -> None:
    """Print what was found at --data, and what was left out."""
    for line in data.summary():
        print(line)


def add_feature_flags(parser: ArgumentParser) -> None:
    """Add the flags that say in whose features two sets of images are compared."""
    g = parser.add_argument_group("features of the metrics")
    g.add_argument("--features", type=str, default="auto",
                   choices=["auto", "shapes", "texture", "vgg16", "inception"],
                   help="network of the Frechet distance: inception gives FID; auto needs no "
                        "file: shapes in the built-in world, texture elsewhere")
    g.add_argument("--inception", type=str,
                   help="path of pt_inception-2015-12-05-6726825d.pth; default: fetched")
    g.add_argument("--vgg-weights", type=str,
                   help="path of torchvision's vgg16-397923af.pth; default: fetched")


def open_feature_net(args: Namespace, device: torch.device, built_in: bool) -> nn.Module:
    """Open the feature network that the feature flags describe.

    built_in: whether the images are the built-in world's. Raises BadInput, which names the
    flag.
    """
    source = f"--features {args.features}"
    if args.features == "inception" and args.inception:
        source = "--inception"
    if args.features == "vgg16" and args.vgg_weights:
        source = "--vgg-weights"
    with naming(source):
        return open_features(
            args.features, device, args.inception, args.vgg_weights, built_in=built_in
        )


def add_system_flags(parser: ArgumentParser) -> None:
    """Add the flags that say on what the networks run, and how."""
    g = parser.add_argument_group("system")
    g.add_argument("--device", type=str, default="auto",
                   help="auto (CUDA if there is any, then Apple's mps), cpu, cuda or mps")
    g.add_argument("--dtype", type=str, choices=["auto", "fp32", "bf16"], default="auto",
                   help="precision of the networks; auto is bf16 on CUDA and fp32 elsewhere")
    g.add_argument("--compile", action="store_true",
                   help="run the networks through torch.compile")


def add_loading_flags(parser: ArgumentParser) -> None:
    """Add the flags of randomness, and of loading images."""
    g = parser.add_argument_group("randomness and loading")
    g.add_argument("--seed", type=int, default=0, help="seed of everything random")
    g.add_argument("--workers", type=int, default=0, help="processes that load images")


def add_training_flags(parser: ArgumentParser, *, out: str, every: int, eval_n: int) -> None:
    """Add the flags of a training run: its length, its output, its optimiser, its device.

    out, every and eval_n are the defaults of the output folder, of the steps between
    checkpoints, and of the number of images to evaluate with.
    """
    g = parser.add_argument_group("run")
    g.add_argument("--out", type=Path, default=Path(out),
                   help="folder of everything that is written")
    g.add_argument("--steps", type=int, help="training steps in all")
    g.add_argument("--save-every", type=int, default=every, help="steps between checkpoints")
    g.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    g.add_argument("--eval-every", type=int, default=every, help="steps between evaluations")
    g.add_argument("--eval-n", type=int, default=eval_n,
                   help="number of images to evaluate with; 0 turns evaluation off")
    g.add_argument("--dry-run", action="store_true",
                   help="print the sizes and the memory of the model, then exit")

    g = parser.add_argument_group("optimisation")
    g.add_argument("--batch", type=int, help="images per step, over all processes")
    g.add_argument("--micro-batch", type=int,
                   help="images at a time in each process; gradients add up; default: all")
    g.add_argument("--lr", type=float, help="learning rate; it is not multiplied by the batch")
    g.add_argument("--muon", type=float, default=0.0, metavar="LR",
                   help="let Muon update the weights of linear layers and convolutions, with this "
                        "learning rate, which rises and falls as --lr; 0: Adam does")
    g.add_argument("--betas", type=float, nargs=2, help="Adam's two decay rates")
    g.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    g.add_argument("--cosine", action=BooleanOptionalAction,
                   help="let the learning rate fall to 0 at the end")
    g.add_argument("--warmup", type=int, help="steps in which the learning rate rises from 0")
    g.add_argument("--skip-nan", type=int, default=0,
                   help="most steps to skip because loss or gradient is not finite")

    add_system_flags(parser)
    add_loading_flags(parser)


def check_training_flags(args: Namespace, world: int) -> int:
    """Return the number of micro-batches per step of each of `world` processes.

    Raises BadInput where flags do not fit together.
    """
    require(
        args.batch % world == 0,
        f"--batch {args.batch} cannot be shared evenly by {world} process(es)",
    )

    per_process = args.batch // world
    micro_batch = args.micro_batch or per_process
    require(
        per_process % micro_batch == 0,
        f"--micro-batch {micro_batch} does not divide the {per_process} images of each process",
    )
    return per_process // micro_batch


def print_dry_run(args: Namespace, *nets: nn.Module | None) -> None:
    """Print the configuration, and the memory of what training keeps of the weights.

    Why 20 bytes per parameter: weight, gradient, Adam's two moments and the EMA, 4 bytes each.
    Of a frozen one there is the weight alone.
    """
    params = [p for net in nets if net is not None for p in net.parameters()]
    n = sum(p.numel() for p in params if p.requires_grad)
    n_frozen = sum(p.numel() for p in params if not p.requires_grad)
    gib = (20 * n + 4 * n_frozen) / 2 ** 30
    frozen = f" and {n_frozen:,} frozen" if n_frozen else ""
    print(json.dumps(plain_values(args), indent=1))
    print(
        f"{n:,} parameters in training{frozen}: {gib:.2f} GiB with gradients, Adam and EMA; "
        "activations come on top"
    )


def n_params(net: nn.Module | None) -> int:
    """Return the number of parameters of a network; 0 for None."""
    return sum(p.numel() for p in net.parameters()) if net is not None else 0


def not_finite(step: int, folder: Path) -> BadInput:
    """Return the error that ends a run whose loss or gradient is not finite."""
    kept = f"{folder} keeps step {step - 1}" if step > 1 else "nothing is saved yet"
    return BadInput(
        f"step {step}: loss or gradient is not finite: training stops; {kept}; try a lower "
        "--lr, more --warmup, --dtype fp32 or --skip-nan 10"
    )
