"""Draw pictures of prompts with a trained model.

    python sample.py "a red circle above a blue square"             # the bundled toy model
    python sample.py --ckpt out/ldm/ckpt.pt --n 16 --scale 4 "a small green cross"
    python sample.py --prompts prompts.txt --out pictures/          # one file a picture
    python sample.py --official sd-v1-4.ckpt --vocab clip/ --scale 7.5 "a photo of a red house"
    python sample.py --ckpt out/class/ckpt.pt --label "red circle"  # without: all its classes
    python sample.py --official cin256-v2.ckpt 88 207               # classes by their numbers

Writes one grid (--out FILE.png, a row a prompt) or, where --out does not end in .png, a folder.
"""
import argparse
from argparse import BooleanOptionalAction
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from tokenizers import Tokenizer
from tqdm import tqdm

from tinyldm import BadInput, official, presets, samplers, shapes
from tinyldm import training as tr
from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.checkpoint import load_checkpoint
from tinyldm.conditioning import TASKS, ClassEmbedder, TextTransformer, rebuild
from tinyldm.data import save_grid, to_uint8
from tinyldm.diffusion import SCHEDULES, as_eps_theta, cumulative
from tinyldm.guidance import guided
from tinyldm.tokens import open_vocab
from tinyldm.unet import UNet, UNetConfig

BUNDLED = Path(samplers.__file__).with_name("toy.pt")
SAMPLERS = {"ddim": samplers.ddim, "ddpm": samplers.ddpm, "plms": samplers.plms,
            "dpm++": samplers.dpm_solver_pp}
TIMESTEPS = {"even": samplers.timesteps, "official": samplers.official_timesteps}


class Model(NamedTuple):
    """What sampling needs."""
    ae: Autoencoder
    unet: UNet
    tau: TextTransformer | ClassEmbedder | None
    tokenizer: Tokenizer | None
    abar: torch.Tensor          # (T,) float64
    predict: str                # what unet says: "eps" or "v"
    task: str = "text"
    classes: tuple[str, ...] = ()       # their names, by number


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("prompt", nargs="*", help="one or more prompts, each in quotes")
    p.add_argument("--label", nargs="+", default=[], help="names or numbers of classes")
    p.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    p.add_argument("--ckpt", type=Path, default=BUNDLED, help="default: the bundled toy model")
    p.add_argument("--official", type=Path, help="a released model's file, .ckpt or .safetensors")
    p.add_argument("--preset", choices=[k for k in presets.LDM if k != "toy"],
                   help="which model that is; default: found out")
    p.add_argument("--vocab", type=Path, help="its tokenizer: a folder, vocab.txt, tokenizer.json")
    p.add_argument("--ema", action=BooleanOptionalAction, default=True, help="averaged weights")
    p.add_argument("--n", type=int, help="pictures a prompt (16; 1 where there are many prompts)")
    p.add_argument("--sampler", choices=SAMPLERS, default="ddim")
    p.add_argument("--steps", type=int, default=50, help="1..T; each calls the U-Net once")
    p.add_argument("--timesteps", choices=TIMESTEPS, default="even",
                   help="even: from T-1 to z_0; official: the released code's rule (near --steps)")
    p.add_argument("--eta", type=float, default=0.0, help="DDIM's noise: 0 none, 1 as DDPM")
    p.add_argument("--scale", type=float, default=2.0, help="guidance s; 1 is none")
    p.add_argument("--seed", type=int, default=0, help="same seed, same pictures")
    p.add_argument("--size", type=int, help="px; default: as trained")
    p.add_argument("--batch", type=int, default=64, help="pictures at a time")
    p.add_argument("--score", action="store_true",
                   help="print the share of prompts followed in full (built-in world only)")
    p.add_argument("--out", type=Path, default=Path("out/samples.png"), help="FILE.png or a folder")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"])
    return p.parse_args(argv)


def load_model(path: Path, ema: bool, device: torch.device) -> tuple[Model, int]:
    """The model in a checkpoint of stage two, and the size it was trained at. Raises BadInput."""
    ckpt = load_checkpoint(path, "ldm", "--ckpt")
    if not ema and "nets" not in ckpt:
        raise BadInput(f"--no-ema: {path} holds averaged weights only; take the run's ckpt.pt")
    try:
        config, nets = ckpt["config"], ckpt["ema" if ema else "nets"]
        task = config.get("task", {"name": "text"})["name"]
        built = (Autoencoder(AEConfig(**config["autoencoder"])), UNet(UNetConfig(**config["unet"])),
                 rebuild(task, config["tau"]))
        for net, state in zip(filter(None, built), (ckpt["ae"], nets["unet"], nets.get("tau"))):
            net.load_state_dict(state)
            net.to(device).eval().requires_grad_(False)
        schedule = config["schedule"]
        tokenizer = Tokenizer.from_str(ckpt["tokenizer"]) if task == "text" else None
        betas = SCHEDULES[schedule["name"]](schedule["T"], *schedule.get("beta_range", ()))
        abar = cumulative(betas).to(device)
        return Model(*built, tokenizer, abar, schedule["predict"], task,
                     tuple(ckpt.get("classes", ()))), ckpt["size"]
    except Exception as e:
        raise BadInput(f"--ckpt {path}: its parts do not fit together ({type(e).__name__})") from e


def load_official(args, device: torch.device) -> tuple[Model, int]:
    """The model in a released file, and the size it was trained at. Raises BadInput."""
    m = official.load_model(args.official, args.preset, args.ema)
    row = presets.LDM[m.preset]
    if row["task"] not in ("text", "class", "none"):
        raise BadInput(f"--official: {m.preset} wants a condition (task {row['task']}) that cannot "
                       "be given here yet")
    if row["task"] == "text" and not args.vocab:
        raise BadInput(f"--vocab: {m.preset} needs its tokenizer's vocabulary, CLIP's or BERT's")
    if row["p_drop"] == 0:
        if m.tau and args.scale != 1:
            raise BadInput(f"--scale {args.scale:g}: {m.preset} has learned no null condition to "
                           "guide away from; use --scale 1")
        args.scale = 1.0
    tokenizer = None
    if row["task"] == "text":
        tokenizer = open_vocab(args.vocab, m.tau.cfg.n_vocab, m.tau.cfg.n_token)
    for net in filter(None, (m.ae, m.unet, m.tau)):
        net.to(device)
        if device.type == "cpu" or args.dtype == "fp32":        # a CPU is slow in fp16
            net.float()
    print(f"{args.official}: {m.preset}")
    return Model(m.ae, m.unet, m.tau, tokenizer, m.abar.to(device), "eps",
                 row["task"]), row["size"]


def read_prompts(m: Model, prompts: list[str]) -> torch.Tensor:
    """y: token ids, or class numbers, of which the last is the null one. Raises BadInput."""
    if m.task == "class":
        null, number = m.tau.embedding.num_embeddings - 1, {c: i for i, c in enumerate(m.classes)}
        prompts = [str(number.get(p, p)) or None for p in prompts]
        for p in filter(None, prompts):
            if not (p.isdecimal() and int(p) <= null):
                names = f", or a name, like {', '.join(m.classes[:3])}" if m.classes else ""
                raise BadInput(f"{p}: prompts of this model are class numbers, 0..{null}{names}")
    return TASKS[m.task].to_y(prompts, m.tau, m.tokenizer)


def timesteps(args, T: int) -> list[int]:
    """The timesteps to visit, and the end. Raises BadInput."""
    try:
        return TIMESTEPS[args.timesteps](T, args.steps)
    except ValueError as e:
        raise BadInput(f"--{e}") from e


@torch.no_grad()
def draw(m: Model, prompts: list[str], args, first: int = 0, tick=lambda: None) -> torch.Tensor:
    """One picture a prompt, (n, 3, size, size) in [-1, 1]; args as parse_args makes them.

    Picture j has the noise of (args.seed, first + j). tick() is called at each call of the U-Net.
    """
    device, side = m.abar.device, args.size // m.ae.cfg.f
    generators = [tr.generator(args.seed, first + j) for j in range(len(prompts))]

    def randn():
        shape = (m.ae.cfg.c_z, side, side)
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    def net(z_t, t, ctx):
        tick()
        return m.unet(z_t, t, ctx).float()

    ctx, ctx_null = (m.tau(read_prompts(m, p).to(device)) if m.tau else None
                     for p in (prompts, [""]))
    eps = guided(as_eps_theta(net, m.abar, m.predict), ctx_null, args.scale if m.tau else 1)
    ts, more = timesteps(args, len(m.abar)), {"eta": args.eta} if args.sampler == "ddim" else {}
    z = SAMPLERS[args.sampler](eps, randn(), ctx, m.abar, ts, randn, **more)
    return m.ae.decode(z).float().clamp(-1, 1).cpu()


def check(args, m: Model, trained: int) -> list[str]:
    """Fill in --size and --n, make the folder of --out, return a prompt a picture; or BadInput."""
    prompts = args.prompt + args.label
    if args.label and m.task != "class":
        raise BadInput(f"--label: this model's task is {m.task}, not class")
    if args.prompts:
        try:
            prompts += args.prompts.read_text("utf8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise BadInput(f"--prompts {args.prompts}: cannot be read: {e}") from e
    prompts = [p.strip() for p in prompts if p.strip()]
    if m.tau is None:
        prompts, args.scale = [""], 1.0
    elif m.task == "class":
        prompts = prompts or list(m.classes)
        read_prompts(m, prompts)
    if not prompts:
        raise BadInput('no prompt: give one, like "a red circle above a blue square", or --prompts')
    timesteps(args, len(m.abar))
    if args.eta and args.sampler != "ddim":
        raise BadInput(f"--eta {args.eta:g}: only --sampler ddim takes it")
    args.n = 16 // min(len(prompts), 16) if args.n is None else args.n
    for flag in ("n", "batch"):
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag} {getattr(args, flag)}: must be at least 1")
    factor = m.ae.cfg.f * m.unet.cfg.factor
    args.size = trained if args.size is None else args.size
    if args.size < factor or args.size % factor:
        raise BadInput(f"--size {args.size}: must be a multiple of {factor}, the autoencoder's f "
                       "times the U-Net's factor")
    if args.score and m.task == "text":
        for p in prompts:
            shapes.parse_prompt(p)
    try:
        folder = args.out.parent if args.out.suffix == ".png" else args.out
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out {args.out}: cannot be written: {e.strerror or e}") from e
    return [p for p in prompts for _ in range(args.n)]


def write(images: torch.Tensor, args) -> None:
    """A grid, or one file a picture. Raises BadInput."""
    try:
        if args.out.suffix == ".png":
            save_grid(images, args.out, args.n if args.n < len(images) else min(args.n, 8))
        else:
            for i, x in enumerate(images):
                Image.fromarray(to_uint8(x)).save(args.out / f"{i:06d}.png")
    except OSError as e:
        raise BadInput(f"--out {args.out}: cannot be written: {e.strerror or e}") from e


def main(args):
    device, autocast, _, _ = tr.setup(args.device, args.dtype)
    if args.official:
        m, trained = load_official(args, device)
    else:
        m, trained = load_model(args.ckpt, args.ema, device)
    prompts = check(args, m, trained)
    chunks, n_steps = range(0, len(prompts), args.batch), len(timesteps(args, len(m.abar))) - 1
    calls = n_steps + (args.sampler == "plms")
    with tqdm(total=len(chunks) * calls, unit="step", dynamic_ncols=True) as bar, autocast():
        images = torch.cat([draw(m, prompts[i:i + args.batch], args, i, bar.update)
                            for i in chunks])
    write(images, args)
    print(f"{len(images)} picture(s) -> {args.out}")
    if args.score:
        share = shapes.score(images, prompts, trained / 32, m.task)
        print(f"{share:.1%} of {len(images)} prompts followed in full (s = {args.scale:g}, "
              f"{n_steps} {args.sampler.upper()} steps)")


if __name__ == "__main__":
    tr.run(main, parse_args)
