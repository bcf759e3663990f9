"""Stage two: train the latent diffusion model, eps_theta with tau, on the frozen encoder's latents.

    python train_ldm.py                                     # the toy, after train_ae.py: minutes
    python train_ldm.py --ae out/photos-ae/ckpt.pt --data photos/ --size 64 --n-token 24
    python train_ldm.py --task class --out out/class        # or uncond, layout, semantic, ...
    python train_ldm.py --init out/ldm/model.pt --data photos/ --out out/tuned      # fine-tuning
    python train_ldm.py --preset sd-v1 --dry-run            # a model of the paper: its sizes only
    torchrun --nproc-per-node 8 train_ldm.py --data ...     # the same run, each batch shared by 8

It writes to OUT: ckpt.pt (all that resuming or sampling needs; ckpt.old.pt is the one before),
log.jsonl, samples_*.png, curves.png (if matplotlib is installed) and, at the end, model.pt (fp16,
for sampling); stage_one_*.pt, the frozen stage one; with --lora, lora.safetensors in place of
model.pt. The latents go to OUT/../latents/, where other runs find them. The same command continues
a run where it stopped. Flags that are not given have the values of --preset's row or, with --init,
those of the model in its file.
"""
import copy
import math
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyldm.autoencoder import Autoencoder, Pixels, Posterior
from tinyldm.beyond.classifier import accuracy_by_noise, classifier_config, classifier_loss
from tinyldm.beyond.control import frozen_parts, with_control
from tinyldm.beyond.distill import Teacher
from tinyldm.beyond.dit import DiTConfig
from tinyldm.beyond.muon import Muon
from tinyldm.conditioning import TextConfig
from tinyldm.data.dataset import ImageDataset, spread
from tinyldm.data.images import size_text
from tinyldm.data.latents import Latents, encode_dataset, fingerprint
from tinyldm.data.loader import batch_order, load_batches
from tinyldm.data.prior import DEFAULT_WEIGHT, WithPrior
from tinyldm.diffusion import (
    DRAWS,
    SCHEDULES,
    DiffusionConfig,
    as_eps_theta,
    ldm_loss,
    output_weight,
    snr_weight,
)
from tinyldm.engine import flags, presets, start
from tinyldm.engine.checkpoint import half, keep_stage_one, resume, save_checkpoint
from tinyldm.engine.command import run
from tinyldm.engine.log import Log, StopOnSignal
from tinyldm.engine.open import (
    is_ours,
    model_file,
    open_model,
    open_stage_one,
    read_config,
)
from tinyldm.engine.optimiser import EMA, learning_rate
from tinyldm.engine.output import digest_of_model
from tinyldm.engine.processes import (
    Machine,
    any_process,
    clip_gradients,
    compiled,
    gathered_states,
    micro_batches,
    setup,
    shard_weights,
    wrap_ddp,
)
from tinyldm.engine.ranges import flag_of
from tinyldm.engine.weights import write_state
from tinyldm.errors import NotFinite, naming, require
from tinyldm.guidance import drop_condition
from tinyldm.lora import add_pairs, lora_state, pairs_of
from tinyldm.metrics.nearest import named_nearest, thumbnails
from tinyldm.metrics.sets import Statistics, compare, load_images
from tinyldm.model import LatentDiffusion, build_model
from tinyldm.seeds import generator
from tinyldm.show.curves import save_curves
from tinyldm.show.grids import save_samples
from tinyldm.tasks import TASKS, Task
from tinyldm.unet import BACKBONES, UNetConfig

DEFAULT_AE = Path("out/ae/ckpt.pt")


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.new_parser(__doc__)
    flags.add_training_flags(parser, out="out/ldm", every=1000, eval_n=64)
    flags.add_data_flags(parser)

    group = parser.add_argument_group("start from a model")
    group.add_argument("--init", type=model_file, metavar="FILE",
                       help="start from the model in this file, ours or a released one, or from "
                            "a bundled one: emoji, toy")
    group.add_argument("--vocab", type=Path,
                       help="a released text model's tokenizer, as for sample.py")
    group.add_argument("--lora", type=int,
                       help="train a LoRA of this rank, and none of the model's own weights")
    group.add_argument("--lora-tau", action="store_true",
                       help="let the LoRA change tau, too")
    group.add_argument("--control", action="store_true",
                       help="train a branch (ControlNet) that makes the text model of --init "
                            "follow edges, and none of the model's own weights")
    group.add_argument("--distill", type=int, metavar="STEPS",
                       help="teach the model of --init to sample in this many steps what it now "
                            "samples in twice as many, with guidance if it has learned it")
    group.add_argument("--prior", type=str,
                       help="a set of images of what the model knows already, mixed with --data: "
                            "a folder that sample.py wrote")
    group.add_argument("--prior-weight", type=float,
                       help="share of --prior in each epoch; default: 0.5")

    group = parser.add_argument_group("stage one and task")
    group.add_argument("--ae", type=model_file, metavar="FILE",
                       help="stage one: a checkpoint of train_ae.py, a released autoencoder, or a "
                            "model that has one, also a bundled one: emoji, toy; 'none' diffuses "
                            "pixels, whose --attn-res must be given; default: out/ae/ckpt.pt")
    group.add_argument("--task", type=str, choices=TASKS, default="text",
                       help="what the condition is")
    group.add_argument("--classifier", action="store_true",
                       help="train a classifier of noisy latents in place of eps_theta, to guide "
                            "an unconditional model with: with --task class")
    group.add_argument("--n-classes", type=int,
                       help="number of classes of labels or label maps; default: the data set's")
    group.add_argument("--label-column", type=str, default="label",
                       help="column of metadata.jsonl that is the class label")
    group.add_argument("--small", type=str,
                       help="small images of superres: a folder, .zip or .tar of the same names "
                            "as --data; default: the column small of metadata.jsonl, if any")
    group.add_argument("--degrade", type=str, choices=["bicubic", "chain"],
                       help="make the small images of superres; chain adds blur, noise, JPEG; "
                            "default: bicubic, only if the set has none of its own")
    group.add_argument("--cache-latents", action=BooleanOptionalAction, default=True,
                       help="encode every image once and keep the latents on disk")

    # Those that begin from nothing: a ControlNet has a model, and a classifier is none.
    backbones = [name for name, row in BACKBONES.items() if row.is_eps_theta and row.concatenates]
    group = parser.add_argument_group("eps_theta")
    group.add_argument("--backbone", type=str, choices=backbones, default="unet",
                       help="the network that eps_theta is; the paper's is a U-Net")
    flags.add_config_flags(parser, UNetConfig, "U-Net")
    flags.add_config_flags(
        parser,
        DiTConfig,
        "DiT, which also has the U-Net's --ch, --n-head, --d-head and --d-ctx",
        besides=UNetConfig,
    )
    flags.add_config_flags(parser, TextConfig, "tau of captions and of boxes")
    flags.add_config_flags(parser, DiffusionConfig, "diffusion")

    group = parser.add_argument_group("training")
    group.add_argument("--loss", type=str, choices=["l1", "l2"], default="l2",
                       help="train with the l1 or the l2 loss of eps")
    group.add_argument("--loss-of", type=str, choices=["eps", "output"], default="eps",
                       help="what the loss is an error of: eps, as in Eq. (2), or what the U-Net "
                            "predicts")
    group.add_argument("--draw-t", type=str, choices=DRAWS, default="uniform",
                       help="how the timesteps of training are drawn")
    group.add_argument("--snr-clamp", type=float, nargs=2,
                       help="clamp the SNR weight of z_0's error to this range; Eq. (2): 0 inf")
    group.add_argument("--p-drop", type=float, default=0.1,
                       help="share of conditions dropped, for guidance")
    group.add_argument("--ema", type=float, help="decay of the averaged weights")
    group.add_argument("--z-std", type=float,
                       help="std of stage one's latents; default: measured")
    group.add_argument("--ckpt-grad", action="store_true",
                       help="save memory: compute the U-Net's activations again in backward")
    group.add_argument("--fsdp", action="store_true",
                       help="each process holds only a part of the weights")
    flags.add_feature_flags(parser)
    args = flags.parse(parser, presets.LDM, argv, row_to_start_from)
    for name in ("vocab", "lora"):
        require(args.init or getattr(args, name) is None, f"--{name}: only with --init")
    for name in ("control", "distill"):
        require(args.init or not getattr(args, name), f"--{name}: only with --init")
    n_ways = sum(bool(way) for way in (args.lora, args.control, args.distill))
    require(n_ways <= 1, "--lora, --control, --distill: only one of them")
    if args.classifier:
        learns_labels = TASKS[args.task].fields == ("label",)
        require(learns_labels, f"--classifier: needs --task class, not {args.task}")
        require(
            not args.init and args.backbone == "unet",
            "--classifier: it has the U-Net's way down and begins from nothing: leave out --init "
            "and --backbone",
        )
        require(not args.fsdp, "--classifier: it is small, and not sharded; leave out --fsdp")
    check_backbone_flags(parser, args)
    check_flags_of_loss(parser, args)
    if args.distill or args.classifier:
        args.p_drop = 0.0               # neither of them has a use for the null condition
    require(args.lora or not args.lora_tau, "--lora-tau: only with --lora")
    require(args.prior or args.prior_weight is None, "--prior-weight: only with --prior")
    check_loss(args)
    if args.prior:
        args.prior_weight = args.prior_weight or DEFAULT_WEIGHT
    args.ae = args.ae or args.init or DEFAULT_AE
    return args


def is_given(parser: ArgumentParser, args: Namespace, name: str) -> bool:
    """Return whether a flag has another value than its row's."""
    given, default = getattr(args, name), parser.get_default(name)
    if isinstance(default, list | tuple):
        return tuple(given) != tuple(default)
    return given != default


def check_flags_of_loss(parser: ArgumentParser, args: Namespace) -> None:
    """Raise BadInput for flags about a loss that a classifier or a student does not have."""
    ignored = {
        "classifier": ("loss", "loss_of", "snr_clamp", "predict", "p_drop"),
        "distill": ("draw_t", "p_drop"),
    }
    for way, names in ignored.items():
        for name in names:
            require(
                not getattr(args, way) or not is_given(parser, args, name),
                f"{flag_of(name)}: it has no effect with --{way}; leave it out",
            )


def check_backbone_flags(parser: ArgumentParser, args: Namespace) -> None:
    """Raise BadInput for a flag of another network than --backbone, which would do nothing."""
    own = {field.name for field in flags.option_fields(BACKBONES[args.backbone].config)}
    for backbone in BACKBONES.values():
        for field in flags.option_fields(backbone.config):
            require(
                field.name in own or not is_given(parser, args, flags.destination(field)),
                f"{flags.flag_name(field)}: --backbone {args.backbone} has no such part; "
                "leave it out",
            )


def check_loss(args: Namespace) -> None:
    """Raise BadInput for choices of the loss that contradict one another, or warn of them."""
    is_of_eps = args.loss_of == "eps"
    low, high = args.snr_clamp
    require(is_of_eps or args.loss == "l2", "--loss-of output: with --loss l2 only")
    require(
        is_of_eps or (low == 0 and high == math.inf),
        f"--loss-of output: --snr-clamp {low:g} {high:g} would weigh it again; give "
        "--snr-clamp 0 inf",
    )
    is_eq_2 = is_of_eps and low == 0 and not args.classifier
    if is_eq_2 and SCHEDULES[args.schedule].ends_in_noise:
        warnings.warn(
            f"--schedule {args.schedule}: Eq. (2) gives its end, which is pure noise, no weight, "
            "though sampling begins there; --snr-clamp 0.1 1 does, and so does --loss-of output",
            stacklevel=2,
        )
    require(
        not args.distill or low > 0 or not is_of_eps,
        "--distill: Eq. (2) weighs the first step, of almost pure noise, next to nothing; give "
        "--snr-clamp 1 inf, or --loss-of output",
    )


def row_to_start_from(args: Namespace) -> dict | None:
    """Return the defaults of all flags that the model of --init has; None without --init."""
    if args.init is None:
        return None
    with naming("--init"):
        return start.row_of_file(args.init, args.preset, args.vocab)


# ---- set-up

def dry_run_without_data(args: Namespace) -> None:
    """Print the sizes of the networks of a preset or of --init, stage one's too."""
    if args.init:
        with torch.device("meta"):
            model = build_model(read_config(args.init, args.preset, args.vocab)[0])
            start.check_flags(vars(args), model.config, args.init)
            if args.control:
                model = with_control(model)
    else:
        model = presets.build_networks(vars(args))
    choose_trained(args, model)
    name = "of the file" if args.init else args.ae_preset
    network = BACKBONES[model.config.backbone].name
    print(
        f"{network} {flags.n_params(model.unet):,} | tau {flags.n_params(model.tau):,} | "
        f"autoencoder {name} {flags.n_params(model.ae):,} parameters | "
        f"task {args.task}, its input {input_shape(model)}"
    )
    flags.print_dry_run(args, model.unet, model.tau)


def check_shapes(args: Namespace) -> None:
    """Raise BadInput for widths of which there is no U-Net, and for a schedule that is none."""
    with naming("--ch, --ch-mult, --groups, --n-head, --d-head"):
        unet_shape(args)
    with naming("--T, --beta-range"):
        DiffusionConfig(**flags.config_values(DiffusionConfig, vars(args))).abar()


def unet_shape(args: Namespace, **more: int) -> UNetConfig | DiTConfig:
    """Return the shape of eps_theta that the flags describe. Raises BadInput."""
    config = BACKBONES[args.backbone].config
    return config(**flags.config_values(config, vars(args)), **more)


def check_small(args: Namespace) -> None:
    """Raise BadInput if small images are given where they are not needed."""
    require(
        not args.small or "small" in TASKS[args.task].fields,
        f"--small {args.small}: --task {args.task} takes no small images",
    )
    require(
        not args.small or Path(args.small).exists(),
        f"--small {args.small}: no such file or folder",
    )
    require(
        not args.small or not args.degrade,
        f"--small {args.small}: --degrade {args.degrade} makes small images; give one of them",
    )


def check_size(args: Namespace, ae: Autoencoder | Pixels, task: type[Task]) -> None:
    """Raise BadInput if the images do not fit stage one, the U-Net or the task."""
    shape = unet_shape(args, side=min(args.size) // ae.cfg.f)
    factor = shape.factor
    multiple = ae.cfg.f * factor
    require(
        all(side % multiple == 0 for side in args.size),
        f"--size {size_text(args.size)} is not a multiple of {multiple}, the autoencoder's "
        f"f = {ae.cfg.f} times the U-Net's factor {factor}",
    )
    require(
        all(side % task.size_multiple == 0 for side in args.size),
        f"--size {size_text(args.size)}: --task {args.task} needs multiples of "
        f"{task.size_multiple}",
    )
    if not args.init:
        with naming("--attn-res, --d-head"):
            shape.check_attention()


def open_datasets(args: Namespace, c_x: int) -> tuple[ImageDataset, ImageDataset]:
    """Open the training set, with --prior mixed in, and the held-out set; of c_x channels."""
    task = TASKS[args.task]
    what_items_have = {
        "fields": task.fields,
        "label_column": args.label_column,
        "degrade": args.degrade,
        "small": args.small,
    }
    how = what_items_have | {"share_hidden": task.share_hidden}
    data = flags.open_data(args, "train", c_x, **how)
    held_out = flags.open_data(args, "held-out", c_x, **what_items_have)
    if args.prior:
        # A folder that sample.py wrote: the small images and the column of --data are not its own.
        own = how | {"small": None, "label_column": "label"}
        prior = flags.open_data(args, "train", c_x, source="prior", **own)
        with naming("--prior"):
            data = WithPrior(data, prior, args.prior_weight)
    return data, held_out


def open_start(args: Namespace) -> LatentDiffusion:
    """Open the model of --init, with a branch if --control is given.

    Raises BadInput, also for flags that contradict the model.
    """
    require(args.vocab is None or not is_ours(args.init), "--vocab: only with a released model")
    with naming("--init"):
        model = open_model(args.init, preset=args.preset, vocab=args.vocab)
    require(
        BACKBONES[model.config.backbone].is_eps_theta,
        f"--init {args.init}: a classifier, from which no training starts",
    )
    require(
        not args.distill or not frozen_parts(model),
        f"--distill: most of the model in {args.init} is frozen, and so cannot learn",
    )
    start.check_flags(vars(args), model.config, args.init)
    require(args.ae == args.init, f"--ae {args.ae}: {args.init} has a stage one; leave it out")
    require(
        args.z_std is None or model.z_std == args.z_std,
        f"--z-std {args.z_std}: the model in {args.init} has {float(model.z_std):g}; leave it out",
    )
    c_x = model.ae.cfg.c_x
    require(
        args.channels in (None, c_x),
        f"--channels {args.channels}: {args.init} has images of {c_x}; leave it out",
    )
    if args.control:
        torch.manual_seed(args.seed)
        with naming("--control"):
            model = with_control(model)
        args.task = model.config.task
        args.backbone = model.config.backbone
    require(
        model.tokenizer or "caption" not in model.task.fields,
        "--vocab: a released text model needs its tokenizer's vocabulary",
    )
    return model


def distillation(args: Namespace, model: LatentDiffusion, machine: Machine) -> Teacher:
    """Return the model of --init, as it is, as the teacher of the one to be trained."""
    learned = model.run.get("distill")
    require(
        learned in (None, 2 * args.distill),
        f"--distill {args.distill}: the model in {args.init} samples in {learned} steps, so the "
        "next number is half of it",
    )
    teacher = copy.copy(model)
    teacher.unet = copy.deepcopy(model.unet)
    teacher.tau = copy.deepcopy(model.tau)
    with naming("--distill"):
        return Teacher(teacher.for_sampling(machine.device), args.distill)


def check_lora(args: Namespace, model: LatentDiffusion, data: ImageDataset) -> None:
    """Raise BadInput for what a LoRA, or a teacher, cannot teach a model."""
    require(not args.lora_tau or model.tau is not None, "--lora-tau: the model has no tau")
    new = ", ".join(start.new_names(model, data))
    require(
        not new or not args.distill,
        f"--distill: the model has no classes {new}, so it cannot teach them",
    )
    if not args.lora:
        return
    require(not new, f"--lora: the model has no classes {new}, and a LoRA adds none; train in full")
    require(
        model.can_be_guided or args.p_drop == 0,
        f"--p-drop {args.p_drop}: the model has no null condition, and a LoRA adds none",
    )


def build(
    args: Namespace, ae: Autoencoder | Pixels, data: ImageDataset, held_out: ImageDataset
) -> LatentDiffusion:
    """Build the model that the flags and the data set describe, with random weights."""
    task = TASKS[args.task]
    with naming(f"--task {args.task}"):
        decided = task.decide(vars(args), data, held_out)
    values = vars(args) | decided
    config = presets.model_config(
        values, ae.cfg, task.names_in(data), tokenizer=decided.get("tokenizer")
    )
    if args.classifier:
        config = classifier_config(config)
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):
        return build_model(config, ae)


def input_shape(model: LatentDiffusion) -> tuple[int, ...]:
    """Return the shape of what eps_theta is given: z_t and what lies beside it."""
    h, w = (side // model.ae.cfg.f for side in model.config.size)
    return model.config.unet.c_in, h, w


def print_sizes(model: LatentDiffusion, n_images: int) -> None:
    """Print the numbers of parameters, the task, the shape of z and the number of images."""
    network = BACKBONES[model.config.backbone].name
    print(
        f"{network} {flags.n_params(model.unet):,} parameters | tau {flags.n_params(model.tau):,}, "
        f"task {model.config.task}, z {input_shape(model)}, {n_images:,} images"
    )


def healthy_values(z_std_is_measured: bool) -> str:
    """What a learner should look for in the log, whatever the images and the row are."""
    text = "healthy: loss and gnorm fall, fast at first, then slowly"
    return f"{text}; z_std stays near 1" if z_std_is_measured else text


def choose_trained(args: Namespace, model: LatentDiffusion) -> dict[str, nn.Module]:
    """Make the model's networks trainable or, with --lora, put pairs beside them -> by name.

    What is returned is trained; the rest is frozen.
    """
    networks = model.networks
    for net in networks.values():
        net.train().requires_grad_(not args.lora)
    for part in frozen_parts(model):
        part.requires_grad_(False)
    if args.classifier:
        model.tau.requires_grad_(False)         # labels are what it predicts, not its condition
    if not args.lora:
        return networks

    torch.manual_seed(args.seed)
    with_pairs = networks if args.lora_tau else {"unet": model.unet}
    for name, net in with_pairs.items():
        with naming("--lora" if name == "unet" else "--lora-tau"):
            add_pairs(net, args.lora)
    return {"lora": pairs_of(with_pairs)}


def prepare_networks(
    args: Namespace, model: LatentDiffusion, machine: Machine
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], EMA]:
    """Move the model's networks to the device -> what is trained, the forms that run, EMA.

    The forms that run are those to call in training: compiled if that is wanted and, among
    several processes, wrapped in DDP or sharded by FSDP.
    """
    trained = choose_trained(args, model)
    model.unet.ckpt_grad = args.ckpt_grad
    model.unet.to(machine.device, memory_format=torch.channels_last)
    if model.tau is not None:
        model.tau.to(machine.device)
    ema = EMA(trained, args.ema)

    if args.fsdp:
        for net in (*trained.values(), *ema.nets.values()):
            shard_weights(net)
    run_nets = {}
    for name, net in model.networks.items():
        run_nets[name] = compiled(net, args.compile)
        is_trained = any(p.requires_grad for p in net.parameters())
        if is_trained and not args.fsdp:
            run_nets[name] = wrap_ddp(run_nets[name], machine)
    return trained, run_nets, ema


# ---- the latents

def z_std_flag(args: Namespace, ae: Autoencoder | Pixels) -> float | None:
    """Return --z-std; None where it is only the preset's, and of another autoencoder than this."""
    row = presets.LDM[args.preset]
    is_preset = args.z_std == row.get("z_std")
    is_its_ae = ae.cfg == presets.ae_config(row["ae_preset"], ae.cfg.c_x)
    return None if is_preset and not is_its_ae else args.z_std


def latents_of(
    args: Namespace, model: LatentDiffusion, data: ImageDataset, machine: Machine
) -> Latents:
    """Open the cache of stage one's latents and of y; encode what it lacks."""
    config = model.config
    task = config.task_and_version()
    name = fingerprint(model.ae, data, task, config.tau, config.tokenizer)

    def to_y(batch: dict) -> dict[str, Tensor]:
        y = model.task.encode(batch)
        if data.has_several_captions:
            y["row"] = torch.tensor(batch["row"])       # for latent_batches
        return y

    with machine.autocast():
        return Latents(
            args.out.parent / "latents" / name,
            model.ae,
            data,
            data.n_distinct,
            args.workers,
            machine.device,
            to_y,
            machine.rank,
            machine.world,
        )


def z_std_of(
    args: Namespace,
    model: LatentDiffusion,
    data: ImageDataset,
    cache: Latents | None,
    machine: Machine,
) -> Tensor:
    """Return the std of stage one's latents, by which they are divided (App. G).

    It is --z-std if given. Else it is measured over the whole cache or, without a cache, over the
    first 4,096 images.
    """
    if args.z_std is not None:
        return torch.tensor(args.z_std)
    if cache is not None:
        return cache.std()

    n = min(data.n_distinct, 4096)
    unconditional = Task({})            # only the latents are needed
    with machine.autocast():
        encoded = encode_dataset(
            model.ae,
            data,
            [range(n)],
            args.workers,
            machine.device,
            unconditional.encode,
            show=machine.main,
        )
        posterior, _ = next(iter(encoded))
    return posterior.std()


def latent_batches(
    args: Namespace,
    model: LatentDiffusion,
    data: ImageDataset,
    cache: Latents | None,
    done: int,
    machine: Machine,
) -> Iterator[tuple[Posterior, dict[str, Tensor]]]:
    """Yield q(z | x) and y of this process's images, step by step, from step done + 1 on."""
    order = batch_order(
        len(data), args.batch, done, args.steps, args.seed, machine.rank, machine.world,
        data.shards, data.repeats,
    )
    if cache is not None:
        for indices in order:
            posterior, y = cache[[i % data.n_distinct for i in indices]]
            # The cache has one caption of each image, but each epoch takes another.
            rows = y.pop("row", None)
            if rows is not None and "caption" in model.task.fields:
                pairs = zip(indices, rows.tolist())
                captions = [data.caption(i, row) for i, row in pairs]
                y |= model.task.encode({"caption": captions})
            # The cache holds latents as they are; Autoencoder.encode, below, divides by itself.
            yield posterior.scaled(model.z_std.cpu()), y
        return

    for batch in load_batches(data, order, args.workers, pin=machine.device.type == "cuda"):
        with torch.no_grad(), machine.autocast():
            posterior = model.ae.encode(batch["image"].to(machine.device))
        yield posterior, model.task.encode(batch)


# ---- evaluation

@torch.no_grad()
def held_out_loss(
    model: LatentDiffusion, posterior: Posterior, y: dict[str, Tensor]
) -> dict[str, float]:
    """Eq. (2) on held-out pairs, the mean over a latent, by noise level: each quarter of T.

    Within each chunk of 64 latents, t is spread evenly over the quarter.
    """
    device = model.device
    T = len(model.abar)
    eps_theta = model.eps_theta()
    rng = generator(0, 0)

    losses = []
    for i in range(0, len(posterior.mean), 64):
        part = Posterior(posterior.mean[i:i + 64], posterior.logvar[i:i + 64]).to(device)
        y_i = {name: v[i:i + 64].to(device) for name, v in y.items()}
        noise = torch.randn(part.mean.shape, generator=rng).to(device)
        eps = torch.randn(part.mean.shape, generator=rng).to(device)
        z = part.sample(noise)
        ctx = model.task.context(y_i, model.tau, model.ae)

        position = (torch.arange(len(z)) + 0.5) / len(z) / 4
        of_quarters = []
        for quarter in range(4):
            t = ((position + quarter / 4) * T).long()
            of_quarters.append(ldm_loss(eps_theta, z, t, eps, model.abar, ctx))
        losses.append(torch.stack(of_quarters))                 # (4, B)
    means = torch.cat(losses, dim=1).mean(1).tolist()
    return {f"held_out_loss_at_{quarter * T // 4}": v for quarter, v in enumerate(means)}


def prepare_evaluation(
    args: Namespace,
    model: LatentDiffusion,
    ema: EMA,
    data: ImageDataset,
    held_out: ImageDataset,
    log: Log,
    machine: Machine,
) -> Callable[[int], None]:
    """Return evaluate(step), which evaluates the averaged weights.

    It writes to the log: Eq. (2) on up to 256 held-out pairs (of the training set, if none are
    held out; not of a student, whose loss is another one), the scores of --eval-n samples, and
    their distance to 2,048 images of the set; and, if each of these has a caption of its own,
    whether the image of a sample's caption is the nearest to it. It saves 16 samples, and the
    curves. Only the main process evaluates.
    """
    device = machine.device

    # With FSDP, the other processes take part in gathering the averaged weights.
    if not machine.main:
        def take_part(step: int) -> None:
            if args.fsdp:
                gathered_states(ema.nets)

        return take_part

    averaged = averaged_model(model, ema, args.fsdp)
    features = flags.open_feature_net(args, device, data.has_exact_scorer)
    items = model.task.examples(args.eval_n, data, held_out)
    thumbs = []

    def real_images() -> Iterator[Tensor]:
        for part in spread_images(data, 2048, args.workers, device):
            thumbs.append(thumbnails(part).cpu())
            yield part

    real = Statistics(features, real_images())
    gallery = None
    if "image" in items[0] and has_a_name_for_each(model, data):
        gallery = torch.cat(thumbs)
    in_grid = spread(min(16, len(items)), len(items))
    posterior, y = encode_pairs(args, model, held_out if len(held_out) else data, machine)
    if "caption" in model.task.fields:
        captions = [items[i]["caption"] for i in in_grid]
        log.note("each grid shows\n  " + "\n  ".join(captions))

    def evaluate(step: int) -> None:
        if args.fsdp:
            load_averaged(averaged, gathered_states(ema.nets))
        try:
            with machine.autocast():
                # A student knows only the timesteps that it visits.
                losses = {} if args.distill else held_out_loss(averaged, posterior, y)
                images = sample_all(averaged, items, args.distill or 25)
            fake = Statistics(features, (part.to(device) for part in images.split(64)))
        except NotFinite as error:
            log.note(f"step {step} is not evaluated: {error}")
            return
        can_score = data.has_exact_scorer or model.task.scores_any_world
        scores = model.task.score(images, items) if can_score else {}
        if gallery is not None:
            wanted = torch.stack([item["image"] for item in items])
            scores = scores | named_nearest(images, wanted, gallery)
        log.write(step, **losses, **scores, **compare(real, fake))

        path = args.out / f"samples_{step:06d}.png"
        shown = [model.task.show(items[i], *args.size) for i in in_grid]
        save_samples(images[in_grid], shown, path, columns=8)
        save_curves(log.path, args.out / "curves.png")

    return evaluate


def has_a_name_for_each(model: LatentDiffusion, data: ImageDataset) -> bool:
    """Return whether the condition is a caption alone, and hardly two images share one."""
    if model.task.fields != ("caption",) or data.has_exact_scorer:
        return False
    captions = data.captions()
    return len(set(captions)) > 0.9 * len(captions)


def averaged_model(model: LatentDiffusion, ema: EMA, fsdp: bool) -> LatentDiffusion:
    """Return the model with the EMA's networks; with FSDP, with whole ones to be filled."""
    averaged = copy.copy(model)
    if fsdp:
        whole = build_model(model.config, model.ae)
        nets = whole.networks
    elif "lora" in ema.nets:
        nets = {}
        for name, net in model.networks.items():
            nets[name] = with_other_pairs(net, ema.source["lora"], ema.nets["lora"])
    else:
        nets = ema.nets
    averaged.unet = nets["unet"].to(model.device)
    averaged.tau = nets.get("tau")
    if averaged.tau is not None:
        averaged.tau.to(model.device)
    return averaged


def with_other_pairs(net: nn.Module, pairs: nn.ModuleDict, others: nn.ModuleDict) -> nn.Module:
    """Return a copy of a network with other low-rank pairs; the frozen weights are shared."""
    stand_ins = {id(p): p for p in net.parameters() if not p.requires_grad}
    stand_ins |= {id(pair): others[name] for name, pair in pairs.items()}
    return copy.deepcopy(net, stand_ins)


def load_averaged(averaged: LatentDiffusion, states: dict) -> None:
    """Fill the averaged model with the gathered weights."""
    averaged.unet.load_state_dict(states["unet"])
    if averaged.tau is not None:
        averaged.tau.load_state_dict(states["tau"])


def spread_images(
    data: ImageDataset, n: int, workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield at most n images of a data set, in batches, spread evenly."""
    return load_images(data, spread(min(n, len(data)), len(data)), workers, device)


def encode_pairs(
    args: Namespace, model: LatentDiffusion, data: ImageDataset, machine: Machine
) -> tuple[Posterior, dict[str, Tensor]]:
    """Return q(z | x) and y of up to 256 images of a data set, spread evenly."""
    indices = spread(min(256, len(data)), len(data))
    with machine.autocast():
        encoded = encode_dataset(
            model.ae, data, [indices], args.workers, machine.device, model.task.encode
        )
        return next(iter(encoded))


def sample_all(model: LatentDiffusion, items: list[dict], steps: int) -> Tensor:
    """Sample an image for each item's condition, 16 at a time, by DDIM."""
    steps = min(steps, len(model.abar))
    images = []
    for i in range(0, len(items), 16):
        batch = items[i:i + 16]
        seeds = [(0, i + j) for j in range(len(batch))]
        images.append(model.sample(batch, seeds=seeds, steps=steps))
    return torch.cat(images)


def classifier_evaluation(
    args: Namespace,
    model: LatentDiffusion,
    ema: EMA,
    held_out: ImageDataset,
    log: Log,
    machine: Machine,
) -> Callable[[int], None]:
    """Return evaluate(step), which logs how often the averaged classifier is right, by noise."""
    posterior, y = encode_pairs(args, model, held_out, machine)
    rng = generator(0, 0)
    z = posterior.sample(torch.randn(posterior.mean.shape, generator=rng)).to(machine.device)
    eps = torch.randn(posterior.mean.shape, generator=rng).to(machine.device)
    label = y["label"].to(machine.device)

    def evaluate(step: int) -> None:
        if machine.main:
            with machine.autocast():
                figures = accuracy_by_noise(ema.nets["unet"], z, eps, model.abar, label)
            log.write(step, **figures)
            save_curves(log.path, args.out / "curves.png")

    return evaluate


def loss_weights(args: Namespace, t: Tensor, abar: Tensor) -> Tensor:
    """Return the factors (B,) on Eq. (2) that the flags ask for."""
    weights = snr_weight(t, abar, *args.snr_clamp)
    if args.loss_of == "output":
        weights = weights * output_weight(t, abar, args.predict)
    return weights


def main(args: Namespace) -> None:
    # Set-up: the processes; the model to start from or, for a new one, the frozen stage one; the
    # data; the networks.
    check_shapes(args)
    if args.dry_run and not args.data:
        dry_run_without_data(args)
        return
    machine = setup(args.device, args.dtype)
    device = machine.device
    n_micro = flags.check_training_flags(args, machine.world)
    require(
        machine.world > 1 or not args.fsdp,
        "--fsdp: it shares the weights among several processes; start them with torchrun",
    )
    require(not (args.fsdp and args.lora), "--fsdp: not with --lora, which trains few weights")
    require(
        not (args.fsdp and args.muon),
        "--fsdp: not with --muon, which needs whole matrices; give --muon 0",
    )
    check_small(args)
    init = None
    teacher = None
    if args.init:
        model = open_start(args)
        init = f"a model of hash {digest_of_model(model)}"
        ae = model.ae
        teacher = distillation(args, model, machine) if args.distill else None
        knows_z_std = True
    else:
        with naming("--ae"):
            ae, knows_z_std = open_stage_one(args.ae, args.channels)
        args.z_std = z_std_flag(args, ae)
    ae.to(device, memory_format=torch.channels_last)
    check_size(args, ae, TASKS[args.task])
    data, held_out = open_datasets(args, ae.cfg.c_x)
    if machine.main:
        flags.print_found(data)
    if args.init:
        check_lora(args, model, data)
        what_differs = start.adapt(model, args.size, args.p_drop, data)
        data = start.with_numbers_of(model, data)
        held_out = start.with_numbers_of(model, held_out)
        if machine.main:
            print(f"starts from {args.init}, preset {args.preset}", *what_differs, sep="\n")
    else:
        model = build(args, ae, data, held_out)
    if machine.main:
        print_sizes(model, len(data))
    if args.dry_run:
        choose_trained(args, model)
        flags.print_dry_run(args, model.unet, model.tau)
        return

    # The networks, their EMA, and the forms of them that run; the optimiser; then everything as
    # an earlier run left it, if there was one.
    nets, run_nets, ema = prepare_networks(args, model, machine)
    eps_theta = as_eps_theta(run_nets["unet"], model.abar, args.predict)
    params = [p for net in nets.values() for p in net.parameters() if p.requires_grad]
    if args.muon:
        opt = Muon(params, nets.values(), args.lr, args.muon, args.betas)
    else:
        opt = torch.optim.AdamW(params, betas=args.betas, fused=True)
    # The keys of `parts` are those of the checkpoint, and a resumed run fills all of it; stage
    # one gets its z_std, unless it belongs to the model that a LoRA is for.
    parts = {"nets": nets, "ema": ema.nets, "opt": opt}
    kind = "lora" if args.lora else "ldm"
    lora = {"rank": args.lora, "tau": args.lora_tau} if args.lora else None
    head = model.config.to_checkpoint() | {"init": init, "lora": lora}
    head |= {"prior weight": args.prior_weight, "distill": args.distill}
    to_fill = parts if args.lora else parts | {"ae": model.ae}
    with naming("--out"):
        ckpt = resume(args.out / "ckpt.pt", kind, head, to_fill, len(data), args.ae)
    done = ckpt["step"]
    ema.n_updates = ckpt.get("ema_n", 0)

    # The latents, as q(z | x) of every image; their std, unless the file of stage one or the run
    # before knows it; the null condition.
    cache = latents_of(args, model, data, machine) if args.cache_latents else None
    if done == 0 and not (knows_z_std and args.z_std is None):
        model.ae.z_std.copy_(z_std_of(args, model, data, cache, machine))
    require(
        args.z_std is None or model.z_std == args.z_std,
        f"--z-std {args.z_std}: the run in {args.out} has {float(model.z_std):g}",
    )
    y_null = {name: v.to(device) for name, v in model.task.null().items()}

    stage_one = {}
    if machine.main and not args.lora:
        stage_one = {"stage_one": keep_stage_one(model.ae, args.out), "z_std": model.z_std.cpu()}

    def save(step: int) -> None:
        states = gathered_states(parts)
        if not machine.main:
            return
        ckpt = {"kind": f"tinyldm {kind}", "step": step, "args": flags.plain_values(args)}
        ckpt |= head | {"n_images": len(data)}
        # Write the result first: if the run is killed between the two writes, the resumed run
        # repeats the last steps and writes both again.
        if step == args.steps and args.lora:
            write_state(lora_state(ema.nets["lora"]), args.out / "lora.safetensors")
        elif step == args.steps:
            weights = {"ae": model.ae.state_dict(), "ema": states["ema"]}
            save_checkpoint(ckpt | half(weights), args.out / "model.pt")
        ckpt |= stage_one | states | {"ema_n": ema.n_updates}
        save_checkpoint(ckpt, args.out / "ckpt.pt", keep=True)

    # The log, the evaluation (again, if the run was stopped before it), and the batches.
    log = Log(args.out, done=done, steps=args.steps, batch=args.batch, machine=machine)
    log.note(healthy_values(z_std_is_measured=not knows_z_std and args.z_std is None))
    evaluate = None
    if args.eval_n > 0 and log.evaluated < args.steps:
        if args.classifier:
            data_for_it = held_out if len(held_out) else data
            evaluate = classifier_evaluation(args, model, ema, data_for_it, log, machine)
        else:
            evaluate = prepare_evaluation(args, model, ema, data, held_out, log, machine)
        if log.evaluation_is_missing(args.eval_every):
            evaluate(done)
    stop = StopOnSignal()
    batches = latent_batches(args, model, data, cache, done, machine)
    n_skipped = 0

    # The loop.
    for step, (posterior, y) in enumerate(batches, done + 1):
        # One batch: the noise of z ~ q(z | x), the eps and t of Eq. (2), and which conditions are
        # dropped. All of it is drawn for the whole batch, then each process takes its part, so
        # that nothing depends on the number of processes.
        rng = generator(args.seed, step)
        latent_shape = posterior.mean.shape[1:]
        noise = torch.randn(args.batch, *latent_shape, generator=rng)
        eps = torch.randn(args.batch, *latent_shape, generator=rng)
        if teacher is None:
            t = DRAWS[args.draw_t](args.batch, args.T, rng)
        else:
            t = teacher.draw(args.batch, rng)
        drop = torch.rand(args.batch, generator=rng) < args.p_drop
        noise, eps, drop = machine.shard(noise, eps, drop)
        t = machine.part(t)                         # it stays on the CPU, as the schedule does

        z = posterior.to(device).sample(noise)
        y = {name: v.to(device) for name, v in y.items()}
        y = drop_condition(y, y_null, drop)

        # The gradient of the mean loss, Eq. (2), accumulated over micro-batches.
        total_loss = 0
        tensors = (z, t, eps, *y.values())
        for z_i, t_i, eps_i, *y_values in micro_batches(n_micro, tensors, run_nets.values()):
            y_i = dict(zip(y, y_values))
            with machine.autocast():
                if teacher is not None:
                    z_i, eps_i = teacher.targets(z_i, t_i, eps_i, y_i)
                if args.classifier:
                    net = run_nets["unet"]
                    losses = classifier_loss(net, z_i, t_i, eps_i, model.abar, y_i["label"])
                else:
                    ctx = model.task.context(y_i, run_nets.get("tau"), model.ae)
                    losses = ldm_loss(eps_theta, z_i, t_i, eps_i, model.abar, ctx, args.loss)
                    losses = losses * loss_weights(args, t_i, model.abar).to(device)    # (B,)
                loss = losses.mean()
                (loss / n_micro).backward()
            total_loss = total_loss + loss.detach() * (1 / n_micro)

        # The update, and the EMA's. If loss or gradient is not finite in any process, all of
        # them skip the update.
        lr = learning_rate(step, args.lr, args.warmup, args.steps, args.cosine)
        grad_norm = clip_gradients(params, args.clip)
        is_bad = ~torch.isfinite(total_loss + grad_norm)
        is_bad, stopping = any_process(is_bad, stop.as_tensor(device))
        if is_bad:
            n_skipped += 1
            log.note(f"step {step} is not finite: no update, {n_skipped} of --skip-nan")
            if n_skipped > args.skip_nan:
                # Nothing has changed since the step before, so this saves its state.
                if step - 1 > done and (step - 1) % args.save_every != 0:
                    save(step - 1)
                raise flags.not_finite(step, args.out)
        else:
            opt.param_groups[0]["lr"] = lr
            opt.step()
            ema.update()
            log.add(loss=total_loss, z_std=z.std(), lr=lr, gnorm=grad_norm)
        opt.zero_grad()

        # Now and then: log, save, evaluate.
        log.step_done()
        if log.is_due(step, args.log_every):
            log.write_means(step)
        with log.paused():
            if stopping or log.is_due(step, args.save_every):
                save(step)
            if evaluate and log.is_due(step, args.eval_every):
                evaluate(step)
        if stopping:
            break
    log.close()


if __name__ == "__main__":
    run(main, parse_args)
