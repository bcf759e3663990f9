"""Sample images from a trained model; its file says which task it learned.

    python sample.py "a mushroom"                                   # the bundled emoji model
    python sample.py --ckpt toy "a red circle above a blue square"  # the bundled toy model
    python sample.py --ckpt out/class/ckpt.pt --label "red circle"  # by default: all its classes
    python sample.py --ckpt out/layout/ckpt.pt --boxes boxes.json   # by default: held-out boxes
    python sample.py --image photo.png --mask hole.png "a cat face"         # white is repainted
    python sample.py --guide small.png "a cat face"         # an image that shrinks to this one
    python sample.py --lora out/lora/lora.safetensors "a golden star"   # what a LoRA has learned
    python sample.py --official sd-v1-4.ckpt --vocab clip/ --scale 7.5 "a photo of a red house"
    torchrun --nproc-per-node 8 -- sample.py --n 50000 --out out/samples ...    # shared by 8

It writes one grid, with a row per prompt, or a folder of images, batch by batch, and settings.json,
which says how they were made. If they have captions or classes, metadata.jsonl makes the folder a
data set. Image i has the noise of (seed, i): its bits are the same in batches of one size, in any
number of processes; in batches of another size it differs by 1e-5 or so.
"""
import math
import sys
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tinyldm.beyond.classifier import fits_class
from tinyldm.beyond.gradient_guidance import fits_image, gradient_guided
from tinyldm.beyond.guidance import guidance_of_today
from tinyldm.data.images import LOADERS, size_text
from tinyldm.data.text import decode_text, text_lines
from tinyldm.data.tokenizer import clean_text, cleaned
from tinyldm.engine import flags, presets
from tinyldm.engine.command import run
from tinyldm.engine.open import (
    BUNDLED,
    is_ours,
    model_file,
    open_lora,
    open_model,
    save_model,
)
from tinyldm.engine.output import (
    WRITTEN,
    digest_of_model,
    image_paths,
    is_image_file,
    metadata_of,
    prepare_folder,
    save_images,
    settings_of,
)
from tinyldm.engine.processes import Machine, setup
from tinyldm.engine.ranges import check_ranges, flag_of
from tinyldm.engine.request import DECODERS, IMAGES, Given, Request, read_request
from tinyldm.errors import naming, require, trying
from tinyldm.guidance import guided
from tinyldm.lora import merge
from tinyldm.model import LatentDiffusion
from tinyldm.samplers import SAMPLERS, TIMESTEPS, later
from tinyldm.seeds import generator, slerp
from tinyldm.show.attention import attention_maps, record_z_0, save_attention
from tinyldm.show.grids import save_grid, save_samples
from tinyldm.unet import BACKBONES

DEFAULT_STRENGTH = 0.5
DEFAULT_GUIDE_SCALE = 5.0
DEFAULT_CLASSIFIER_SCALE = 2.0

# Flags that mean nothing without another one.
NEEDED = {
    "strength": "init",
    "guide_mask": "guide",
    "guide_scale": "guide",
    "classifier_scale": "classifier",
}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.new_parser(__doc__)
    add_condition_flags(parser)

    g = parser.add_argument_group("the model, and how it samples")
    g.add_argument("--ckpt", "--official", type=model_file, default=BUNDLED["emoji"],
                   metavar="FILE",
                   help="a bundled model, emoji or toy; a checkpoint of train_ldm.py; or a "
                        "released model's .ckpt or .safetensors; default: emoji")
    g.add_argument("--preset", type=str, metavar="NAME",
                   choices=[name for name, row in presets.LDM.items() if "data" not in row],
                   help="which released model it is; default: found out by its shapes")
    g.add_argument("--vocab", type=Path,
                   help="a released model's tokenizer: a folder, vocab.txt, tokenizer.json or "
                        "CLIP's bpe_simple_vocab_16e6.txt.gz")
    g.add_argument("--ema", action=BooleanOptionalAction, default=True,
                   help="use the averaged weights")
    g.add_argument("--lora", type=Path, action="append", default=[], metavar="FILE",
                   help="add what a LoRA of train_ldm.py has learned to the model; for several, "
                        "give it again")
    g.add_argument("--lora-scale", type=float, action="append", metavar="W",
                   help="the weight of --lora, once for all or once each; default: 1, as trained")
    g.add_argument("--sampler", type=str, choices=SAMPLERS, default="ddim",
                   help="the sampling method")
    g.add_argument("--steps", type=int,
                   help="sampling steps, 1..T; default: 25, or what a distilled model has learned")
    g.add_argument("--timesteps", type=str, choices=TIMESTEPS, default="even",
                   help="even: from T-1 to z_0 in --steps; official: the released code's rule; "
                        "karras: EDM's, which takes short steps at the end")
    g.add_argument("--eta", type=float, default=0.0,
                   help="DDIM's share of noise: 0 is none, 1 is as much as DDPM's")
    g.add_argument("--scale", type=float,
                   help="guidance scale s; 1 is no guidance; default: the task's")
    g.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
                   help="guide with --scale only while the noise, sigma, is in this range; "
                        "default: always")
    g.add_argument("--rescale", type=float, default=0.0, metavar="PHI",
                   help="give guided images the contrast again that they have without guidance: "
                        "0 is not at all, 1 all of it")
    g.add_argument("--pull", action="store_true",
                   help="put the kept part of the image back before each step, as is always done "
                        "for models that do not see the mask")
    g.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    g.add_argument("--to-seed", type=int,
                   help="sample --n images whose noise is interpolated from --seed to this seed")
    g.add_argument("--batch", type=int, default=64, help="images at a time")

    flags.add_system_flags(parser)

    g = parser.add_argument_group("what is written")
    g.add_argument("--out", type=Path, default=Path("out/samples.png"),
                   help="a grid if it ends in .png, .jpg or .webp, else a folder of images")
    g.add_argument("--resume", action="store_true",
                   help="sample only the batches that the folder does not have yet")
    g.add_argument("--replace", action="store_true",
                   help="remove the numbered images that the folder has, whatever made them, and "
                        "their metadata.jsonl")
    g.add_argument("--score", action="store_true",
                   help="print how well the images follow their conditions (the built-in world, "
                        "or superres with the true image)")
    g.add_argument("--merge", type=Path, metavar="FILE",
                   help="write the model with --lora as a model of its own, for --ckpt, and "
                        "sample from it as usual")
    g.add_argument("--attention", type=Path,
                   help="save this image file: where the U-Net looked for each word")
    g.add_argument("--trajectory", type=Path,
                   help="save this image file: z_0 as predicted along the way")
    g.add_argument("--at", type=int, nargs="+",
                   help="sampling steps (from 1) to show; default: all for --attention, 8 spread "
                        "evenly for --trajectory")
    args = parser.parse_args(argv)
    check_ranges(vars(args))
    return args


def add_condition_flags(parser: ArgumentParser) -> None:
    """Add the flags that say what to sample."""
    g = parser.add_argument_group(
        "what to sample; spatial conditions are by default the data set's held-out ones"
    )
    g.add_argument("prompt", type=str, nargs="*", metavar="prompt",
                   help="one or more prompts, each in quotes")
    g.add_argument("--prompts", type=Path, help="a text file with one prompt per line")
    g.add_argument("--to-prompt", type=str, metavar="TEXT",
                   help="sample a strip of --n images from each prompt to this one; all images "
                        "of a strip have the same noise")
    g.add_argument("--negative", type=str, metavar="TEXT",
                   help="what the images should not show: guidance leads away from it")
    g.add_argument("--label", type=str, nargs="+", default=[], help="names or numbers of classes")
    g.add_argument("--boxes", type=Path,
                   help="a JSON file: [[class, x0, y0, x1, y1 in pixels], ...]")
    g.add_argument("--map", type=Path, help="a label map: a grey or palette png of class numbers")
    g.add_argument("--image", type=Path,
                   help="the small image of superres, or with --mask the image to repaint")
    g.add_argument("--mask", type=Path, help="its white part is repainted; for any model")
    g.add_argument("--init", type=Path, help="an image to begin from, noised; for any model")
    g.add_argument("--strength", type=float,
                   help="share of the steps by which --init is noised first; default: 0.5")
    g.add_argument("--guide", type=Path,
                   help="guide any model to this image, which may be a smaller one, by the "
                        "gradient of the distance to it")
    g.add_argument("--guide-mask", type=Path, help="its white part of --guide does not count")
    g.add_argument("--guide-scale", type=float, help="how strongly --guide guides; default: 5")
    g.add_argument("--classifier", type=Path, metavar="FILE",
                   help="guide a model that is unconditional, or one of classes, to --label by "
                        "this classifier, which train_ldm.py --classifier has trained for its "
                        "latents")
    g.add_argument("--classifier-scale", type=float,
                   help="how strongly --classifier guides; default: 2")
    g.add_argument("--data", type=str,
                   help="take conditions from this set; default: the training set")
    g.add_argument("--n", type=int, help="images per condition; default: 16 in all")
    g.add_argument("--size", type=flags.image_size, metavar="HxW",
                   help="size of the images, as 64 or HxW as 64x128; default: as trained")


# ---- flags that must fit the model and one another

def check_condition_flags(args: Namespace, model: LatentDiffusion) -> None:
    """Raise BadInput if a condition is given that the model's task does not take."""
    takes = model.task.flags
    if "image" not in takes:
        takes = (*takes, "image", "mask")           # any model can repaint a part of an image
        require(
            (args.image is None) == (args.mask is None),
            "--image and --mask belong together: what is kept, and where it is repainted",
        )
    flags_of_task = [flag_of(name) for name in takes if name != "prompt"]
    listed = ", ".join((["a prompt in quotes"] if "prompt" in takes else []) + flags_of_task)
    every_flag = ("prompt", "prompts", "to_prompt", "label", "negative", "boxes", "map", "image",
                  "mask")
    for name in every_flag:
        flag = flag_of(name)
        require(
            name in takes or getattr(args, name) in (None, []),
            f"{flag}: this model's task is {model.config.task}, which takes {listed}",
        )


def check_combinations(args: Namespace) -> None:
    """Raise BadInput for flags that need another one, and for odd names of files to write."""
    for name, needed in NEEDED.items():
        require(
            getattr(args, needed) or getattr(args, name) is None,
            f"{flag_of(name)}: only with {flag_of(needed)}",
        )
    require(args.attention or args.trajectory or not args.at, "--at: for --attention, --trajectory")
    for name in ("score", "attention"):
        require(
            args.to_prompt is None or not getattr(args, name),
            f"--{name}: not with --to-prompt, as no caption is true between two prompts",
        )
    check_lora_flags(args)
    with naming("--out"):
        is_grid = is_image_file(args.out)
    require(not args.replace or not is_grid, "--replace: for a folder as --out only")
    require(not args.replace or not args.resume, "--replace, --resume: only one of them")

    for name in ("attention", "trajectory"):
        path = getattr(args, name)
        if path is not None:
            with naming(f"--{name}"):
                require(is_image_file(path), f"{path}: must end in {', '.join(WRITTEN)}")


def check_lora_flags(args: Namespace) -> None:
    """Raise BadInput if the flags of LoRAs do not fit one another."""
    scales = args.lora_scale or []
    for name in ("lora_scale", "merge"):
        flag = flag_of(name)
        require(args.lora or not getattr(args, name), f"{flag}: only with --lora")
    require(
        len(scales) in (0, 1, len(args.lora)),
        f"--lora-scale: {len(scales)} numbers for {len(args.lora)} files; give one, or one each",
    )
    exists = args.merge is not None and args.merge.exists()
    require(not exists, f"--merge {args.merge}: exists; give the name of a new file")


def check_sampling(args: Namespace, model: LatentDiffusion) -> None:
    """Raise BadInput if the model or the sampler cannot do what the flags ask for."""
    sampler = SAMPLERS[args.sampler]
    require(
        sampler.takes_eta or not args.eta,
        f"--eta {args.eta:g}: --sampler {args.sampler} has no such noise; use ddim",
    )
    has_negative = args.negative is not None
    require(
        model.can_be_guided or has_negative or args.scale in (None, 1),
        f"--scale {args.scale}: the model has learned no null condition to guide away from; "
        "use --scale 1",
    )
    require(
        not has_negative or args.scale != 1,
        "--negative: it has no effect without guidance, which is --scale 1; give another scale",
    )
    low, high = args.interval or (0, math.inf)
    require(low <= high, f"--interval {low:g} {high:g}: the first is the lower one")
    for name in ("interval", "rescale"):
        require(
            not getattr(args, name) or guidance_scale(args, model) != 1,
            f"{flag_of(name)}: it has no effect without guidance, which is --scale 1; give "
            "another scale",
        )
    require(
        not args.pull or model.sees_mask,
        f"--pull: a model of the task {model.config.task} does not see the mask, so what is kept "
        "is always put back; leave it out",
    )
    is_released = not is_ours(args.ckpt)
    for name in ("preset", "vocab"):
        require(is_released or getattr(args, name) is None, f"--{name}: only with a released model")
    channels = model.config.autoencoder.c_x
    require(
        is_image_file(args.out) or channels in LOADERS,
        f"--out {args.out}: image files have 1, 3 or 4 channels, the model's images {channels}; "
        "give the name of a .png for a grid",
    )
    takes_captions = "caption" in model.task.fields
    require(takes_captions or not args.attention, "--attention: is about words; use a text model")
    require(
        model.tokenizer or not takes_captions,
        "--vocab: the model needs its tokenizer's vocabulary",
    )


def image_size(args: Namespace, model: LatentDiffusion) -> tuple[int, int]:
    """Return --size as (H, W). Raises BadInput unless both are multiples of what is needed."""
    multiple = model.size_multiple
    size = args.size or model.config.size
    require(
        all(0 < side < 10 ** 5 and side % multiple == 0 for side in size),
        f"--size {size_text(size)}: must be a multiple of {multiple}, the autoencoder's f times "
        "the U-Net's factor, or two of them: HxW",
    )
    return size


# ---- LoRAs

def loras_of(args: Namespace) -> list[tuple[Path, float]]:
    """Return the files of --lora, each with its scale."""
    scales = args.lora_scale or [1.0]
    if len(scales) == 1:
        scales = scales * len(args.lora)
    return list(zip(args.lora, scales))


def merge_loras(args: Namespace, model: LatentDiffusion) -> None:
    """Add the LoRAs of the flags to the weights of a model."""
    for path, scale in loras_of(args):
        with naming("--lora"):
            state = open_lora(path)
            with naming(str(path)):
                merge(model.networks, state, scale)


# ---- what to sample

def prompt_condition(flag: str, text: str | None, model: LatentDiffusion) -> dict | None:
    """Return the text of a flag as a condition of the model, or None. Raises BadInput."""
    if text is None:
        return None
    with naming(flag):
        return model.task.read_prompt(clean_text(text).strip())


def guidance_scale(args: Namespace, model: LatentDiffusion) -> float:
    """Return --scale, or the model's default."""
    if args.scale is not None:
        return args.scale
    return model.default_scale(prompt_condition("--negative", args.negative, model))


def given_or(value: float | None, default: float) -> float:
    """Return the value of a flag, which may be 0, or its default if it is not given."""
    return default if value is None else value


def open_classifier(
    args: Namespace, model: LatentDiffusion, machine: Machine
) -> LatentDiffusion:
    """Open the classifier of --classifier. Raises BadInput if it does not belong to the model."""
    with naming("--classifier"):
        classifier = open_model(args.classifier, device=machine.device)
    require(
        not BACKBONES[classifier.config.backbone].is_eps_theta,
        f"--classifier {args.classifier}: not a classifier of train_ldm.py --classifier",
    )
    of_labels = classifier.task.fields
    require(
        model.task.fields in ((), of_labels),
        f"--classifier: the model's task is {model.config.task}; it is for models that are "
        "unconditional, or of classes",
    )
    require(
        not model.task.fields or model.config.class_names == classifier.config.class_names,
        "--classifier: it has other classes than the model",
    )
    for name in ("negative", "to_prompt", "scale", "interval", "rescale"):
        require(
            model.task.fields or not getattr(args, name),
            f"{flag_of(name)}: the model has no condition that it could be about; with "
            "--classifier, give --classifier-scale",
        )
    require(
        has_latents_of(classifier, model) and torch.equal(classifier.abar, model.abar),
        f"--classifier {args.classifier}: it was trained on another stage one or schedule than "
        "the model",
    )
    return classifier


def check_labels(classifier: LatentDiffusion, request: Request) -> None:
    """Raise BadInput for a class that the classifier does not know, which is the null class."""
    n_classes = classifier.config.unet.c_out
    for item in request.batch(0, len(request)):
        require(
            item["label"] < n_classes,
            f"--label {item['label']}: the classifier's classes are 0..{n_classes - 1}",
        )


def has_latents_of(a: LatentDiffusion, b: LatentDiffusion) -> bool:
    """Return whether two models have the same stage one, in whole or in half precision."""
    theirs = b.ae.state_dict()
    if a.ae.cfg != b.ae.cfg:
        return False
    pairs = [(x, theirs[key]) for key, x in a.ae.state_dict().items()]
    return all(torch.allclose(x, other, rtol=1e-2, atol=1e-3) for x, other in pairs)


def given_conditions(args: Namespace) -> Given:
    """Gather what the flags give as the condition."""
    prompts = list(args.prompt)
    if args.prompts:
        with trying(f"--prompts {args.prompts}: cannot be read"):
            prompts += text_lines(decode_text(args.prompts.read_bytes()))
    kinds = [*DECODERS, *IMAGES]
    files = {kind: getattr(args, kind) for kind in kinds if getattr(args, kind)}
    return Given(prompts, args.label, files)


def check_request(args: Namespace, model: LatentDiffusion, request: Request) -> None:
    """Raise BadInput if --to-seed, --to-prompt or --score cannot do what is asked for."""
    require(
        args.to_seed is None or not request.is_held_out,
        "--to-seed: needs one condition; give it as a file",
    )
    require(
        args.to_prompt is None or (request.n_each > 1 and not request.is_held_out),
        "--to-prompt: a strip has two images or more, of a condition that is given; raise --n",
    )
    require(
        args.data is None or request.is_held_out or args.score,
        "--data: it is for conditions of a data set, but a condition is given, or the task needs "
        "none; leave it out",
    )
    if not args.score:
        return

    if model.task.scores_any_world:
        can_score = "image" in request.conditions[0]
    else:
        can_score = (args.data or model.run.get("data")) == "shapes"
    require(can_score, "--score: needs the built-in world, or superres with the true images")
    h, w = request.size
    require(h == w or model.task.scores_any_world, "--score: needs square images")
    with naming("--score"):
        model.task.check_scorable(request.conditions)


def make_folders(args: Namespace) -> None:
    """Make the folders of the files that will be written."""
    for path in (args.out, args.attention, args.trajectory):
        if path is not None and is_image_file(path):
            path.parent.mkdir(parents=True, exist_ok=True)


# ---- sampling

@dataclass
class Steps:
    """The sampling steps of a run, and which calls of the U-Net belong to each."""

    asked_for: int                      # --steps, or its default
    n: int                              # as many are taken: fewer from --init
    first_calls: list[int]              # the number, from 0, of each step's first call
    n_calls: int


def plan_steps(args: Namespace, model: LatentDiffusion) -> Steps:
    """Count the steps that the flags ask for. Raises BadInput.

    Warns if a distilled model is to take other steps than those that it has learned.
    """
    T = len(model.abar)
    learned = model.run.get("distill")
    asked_for = min(learned or 25, T) if args.steps is None else args.steps
    asked = (asked_for, args.sampler, args.timesteps, args.eta)
    if learned and asked != (learned, "ddim", "even", 0):
        warnings.warn(
            f"the model has learned to sample in {learned} even steps of ddim without noise, and "
            "nothing else",
            stacklevel=2,
        )
    with naming("--steps"):
        ts = TIMESTEPS[args.timesteps](model.abar, asked_for)
    if args.init:
        ts = later(ts, args.strength or DEFAULT_STRENGTH)

    n = len(ts) - 1
    in_range = all(1 <= step <= n for step in args.at or ())
    require(in_range, f"--at: steps must be 1..{n}")
    sampler = SAMPLERS[args.sampler]
    n_calls = sampler.n_calls(n, to_z_0=ts[-1] == -1)
    return Steps(asked_for, n, sampler.first_calls(n), n_calls)


def settings(
    args: Namespace,
    model: LatentDiffusion,
    classifier: LatentDiffusion | None,
    request: Request,
    steps: Steps,
    machine: Machine,
) -> dict:
    """Return all that decides the images, for the folder that they are written to.

    --batch is left out: it changes an image by rounding only.
    """
    data = args.data or model.run.get("data")
    strength = args.strength or DEFAULT_STRENGTH
    guide_scale = given_or(args.guide_scale, DEFAULT_GUIDE_SCALE)
    classifier_scale = given_or(args.classifier_scale, DEFAULT_CLASSIFIER_SCALE)
    return settings_of(
        model,
        request,
        data=str(data) if request.is_held_out else None,
        sampler=args.sampler,
        steps=steps.asked_for,
        timesteps=args.timesteps,
        eta=args.eta,
        scale=guidance_scale(args, model),
        negative=args.negative,
        interval=args.interval,
        rescale=args.rescale,
        guide_scale=guide_scale if args.guide else None,
        classifier=digest_of_model(classifier) if classifier else None,
        classifier_scale=classifier_scale if classifier else None,
        pull=args.pull if model.sees_mask else None,
        strength=strength if args.init else None,
        lora=[(path.name, scale) for path, scale in loras_of(args)] or None,
        seed=args.seed,
        to_seed=args.to_seed,
        to_prompt=args.to_prompt,
        dtype="bf16" if machine.bf16 else "fp32",
    )


def weights_along_strips(first: int, n: int, n_each: int) -> list[float]:
    """Return how far along its strip of n_each images each is: 0..1, of images `first`..."""
    steps = max(1, n_each - 1)
    return [(first + i) % n_each / steps for i in range(n)]


def strip_noise(
    seed: int, to_seed: int, first: int, n: int, n_each: int, shape: tuple[int, ...]
) -> Tensor:
    """Return z_T (n, c, h, w) of images `first`... of strips from one seed to another.

    Each strip has n_each images, from image 0 of `seed` to image 0 of `to_seed`.
    """
    start = torch.randn(shape, generator=generator(seed, 0))
    end = torch.randn(shape, generator=generator(to_seed, 0))
    weights = weights_along_strips(first, n, n_each)
    return torch.stack([slerp(start, end, weight) for weight in weights])


def batches_to_sample(args: Namespace, n: int, machine: Machine) -> list[int]:
    """Return the first image of each batch of this process; with --resume, of missing ones."""
    starts = list(range(0, n, args.batch))[machine.rank::machine.world]
    if not args.resume:
        return starts
    return [i for i in starts if not all_exist(image_paths(args.out, i, min(i + args.batch, n)))]


def all_exist(paths: Sequence[Path]) -> bool:
    """Return whether all of the files exist."""
    return all(path.exists() for path in paths)


@torch.no_grad()
def save_trajectory(
    model: LatentDiffusion, z_0s: list[Tensor], machine: Machine, path: Path
) -> None:
    """Save a grid: a row for each of the first four images, a column for each predicted z_0."""
    with machine.autocast():
        columns = [model.ae.decode(z_0[:4]).float().cpu() for z_0 in z_0s]
    rows = torch.stack(columns, dim=1)                      # (4, steps, C, H, W)
    save_grid(rows.flatten(0, 1), path, len(z_0s))


def main(args: Namespace) -> None:
    # Open the model. Only one process prints.
    check_combinations(args)
    machine = setup(args.device, args.dtype)
    if not machine.main:
        sys.stdout = None
    keep_fp32 = machine.device.type == "cpu" or args.dtype == "fp32"
    with naming("--ckpt"):
        model = open_model(
            args.ckpt,
            ema=args.ema,
            device=machine.device,
            dtype=torch.float32 if keep_fp32 else None,
            preset=args.preset,
            vocab=args.vocab,
        )
    require(
        BACKBONES[model.config.backbone].is_eps_theta,
        f"--ckpt {args.ckpt}: a classifier, which samples nothing; it is for --classifier",
    )
    print(f"{args.ckpt}: {model.run.get('preset')}, {model.config.task}")
    merge_loras(args, model)
    # What is asked for is a condition of the model or, if it is guided by a classifier, of that.
    classifier = open_classifier(args, model, machine) if args.classifier else None
    asked = model if model.task.fields or classifier is None else classifier

    # What to sample, in how many steps; whether the images must stay in memory.
    check_condition_flags(args, asked)
    check_sampling(args, model)
    size = image_size(args, model)
    negative = prompt_condition("--negative", args.negative, model)
    toward = prompt_condition("--to-prompt", args.to_prompt, model)
    is_strip = args.to_seed is not None or toward is not None
    n_images = 8 if is_strip and args.n is None else args.n
    request = read_request(asked, given_conditions(args), size, n=n_images, data=args.data)
    check_request(args, asked, request)
    if classifier is not None:
        check_labels(classifier, request)
    if request.is_held_out:
        flags.print_found(request.conditions.dataset)
    steps = plan_steps(args, model)
    is_grid = is_image_file(args.out)
    keep_images = is_grid or args.score or args.attention or args.trajectory
    require(
        not keep_images or (machine.world == 1 and not args.resume),
        "torchrun and --resume: for a folder as --out only, without --score, --attention and "
        "--trajectory",
    )
    make_folders(args)
    if args.merge and machine.main:
        with naming("--merge"):
            save_model(model, args.merge)
    if not is_grid:
        with naming("--out"):
            made_with = settings(args, model, classifier, request, steps, machine)
            # Between two prompts no caption is true.
            has_captions = machine.main and toward is None
            metadata = metadata_of(asked, request) if has_captions else []
            prepare_folder(
                args.out, made_with, metadata, replace=args.replace, main=machine.main
            )

    # What is watched on the way: each call of the U-Net, attention, the predicted z_0.
    n = len(request)
    starts = batches_to_sample(args, n, machine)
    bar = tqdm(
        total=len(starts) * steps.n_calls, unit="step", dynamic_ncols=True, disable=not machine.main
    )
    if args.compile:
        model.unet.forward = torch.compile(model.unet.forward, dynamic=False)
    model.unet.register_forward_hook(lambda *_: bar.update() and None)  # a hook returns None
    attended_calls = set()
    if args.attention:
        attended_steps = args.at or range(1, steps.n + 1)
        attended_calls = {steps.first_calls[step - 1] for step in attended_steps}
    h, w = (side // model.ae.cfg.f for side in request.size)
    watched_attention = attention_maps(model.unet, min(args.batch, n), h, w, attended_calls)
    z_0s: list[Tensor] = []                     # of the first batch, one per call of the U-Net

    def around(eps_theta: Callable) -> Callable:
        if args.guide:
            shared = request.shared
            image = shared["guide"].to(machine.device)
            visible = shared["visible"].to(machine.device) if args.guide_mask else None
            scale = given_or(args.guide_scale, DEFAULT_GUIDE_SCALE)
            log_p = fits_image(model.ae.decode, model.abar, image, visible)
            eps_theta = gradient_guided(eps_theta, model.abar, log_p, scale)
        if classifier is not None:
            label = torch.tensor([item["label"] for item in batch], device=machine.device)
            scale = given_or(args.classifier_scale, DEFAULT_CLASSIFIER_SCALE)
            log_p = fits_class(classifier.unet, label)
            eps_theta = gradient_guided(eps_theta, model.abar, log_p, scale, through=False)
        if args.trajectory and not z_0s:
            eps_theta = record_z_0(eps_theta, model.abar, z_0s)
        return eps_theta

    guide = guided
    if args.interval or args.rescale:
        interval = args.interval or (0.0, math.inf)
        guide = guidance_of_today(model.abar, interval, args.rescale)

    # Sample, batch by batch.
    images = []
    with bar, machine.autocast(), watched_attention as maps:
        for first in starts:
            batch = request.batch(first, args.batch)
            indices = range(first, first + len(batch))
            z_T = None
            if toward is not None:
                weights = weights_along_strips(first, len(batch), request.n_each)
                batch = [item | {"toward": (toward, x)} for item, x in zip(batch, weights)]
                indices = [i // request.n_each for i in indices]        # one noise for a strip
            if args.to_seed is not None:
                shape = (model.ae.cfg.c_z, h, w)
                z_T = strip_noise(
                    args.seed, args.to_seed, first, len(batch), request.n_each, shape
                )
            sampled = model.sample(
                batch,
                seeds=[(args.seed, i) for i in indices],
                size=request.size,
                steps=steps.asked_for,
                timesteps=args.timesteps,
                sampler=args.sampler,
                eta=args.eta,
                guidance_scale=args.scale,
                negative=negative,
                pull=args.pull,
                strength=args.strength or DEFAULT_STRENGTH,
                z_T=z_T,
                guide=guide,
                around=around,
            )
            if keep_images:
                images.append(sampled)
            if not is_grid:
                save_images(sampled, image_paths(args.out, first, first + len(batch)))
    print(f"{n} image(s) in {bar.format_dict['elapsed']:.1f} s -> {args.out}")
    if not keep_images:
        return

    # The grid: a row per condition, or eight images in a row.
    images = torch.cat(images)
    items = request.batch(0, n)
    if is_grid:
        is_row = 1 < request.n_each < n or is_strip
        columns = request.n_each if is_row else 8
        shown = [asked.task.show(item, *request.size) for item in items]
        save_samples(images, shown, args.out, min(columns, n))

    # What else was asked for: attention by word, z_0 along the way, the score.
    if args.attention:
        captions = [item["caption"] for item in items[:args.batch]]
        words = model.tokenizer.encode_batch(cleaned(model.tokenizer, captions))
        mean_map = torch.stack(maps).mean(0)
        save_attention(images[:args.batch], mean_map, words, args.attention)
    if args.trajectory:
        steps_shown = args.at or [1 + round(i * (steps.n - 1) / 7) for i in range(8)]
        shown = [z_0s[steps.first_calls[step - 1]] for step in steps_shown]
        save_trajectory(model, shown, machine, args.trajectory)
    if args.score:
        figures = asked.task.score(images, items, min(model.config.size) / 32)
        text = ", ".join(f"{name} {v:.4g}" for name, v in figures.items())
        scale = guidance_scale(args, model)
        print(f"{n} images, s = {scale:g}, {steps.n} {args.sampler.upper()} steps: {text}")


if __name__ == "__main__":
    run(main, parse_args)
