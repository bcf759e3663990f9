"""A trained model, ours or a released one, and how it draws.

Paper: Sec. 3.3, 4.3-4.5; SDEdit (Meng et al. 2022). Reads: samplers, guidance, tasks, checkpoint.
Shapes: pictures (n, 3, H, W) in [-1, 1]; an item is a dict as in data.py, here of conditions."""
from argparse import Namespace
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tinyldm import require, samplers, trying
from tinyldm.autoencoder import build_autoencoder
from tinyldm.checkpoint import load_checkpoint
from tinyldm.diffusion import SCHEDULES, as_eps_theta, cumulative, q_sample
from tinyldm.guidance import guided
from tinyldm.tasks import TASKS, build_tau
from tinyldm.tokens import checked
from tinyldm.training import generator
from tinyldm.unet import UNet, UNetConfig

SAMPLERS = {"ddim": samplers.ddim, "ddpm": samplers.ddpm, "plms": samplers.plms,
            "dpm++": samplers.dpm_solver_pp}
TIMESTEPS = {"even": samplers.timesteps, "official": samplers.official_timesteps}

# What drawing needs: stage one, the U-Net, tau and tokenizer (or None); abar (T,) float64; what the
# U-Net says, "eps" or "v"; task; names of its classes, by number; flags that it was trained with.
Model = namedtuple("Model", "ae unet tau tokenizer abar predict task classes flags")

def load_model(path: Path, ema: bool, device: torch.device) -> Model:
    """The model in a checkpoint of stage two. Raises BadInput."""
    ckpt = load_checkpoint(path, "ldm", "--ckpt")
    require(ema or "nets" in ckpt, f"--no-ema: {path} has averaged weights only; take ckpt.pt")
    with trying(f"--ckpt {path}: its parts do not fit together"):
        config, nets = ckpt["config"], ckpt["ema" if ema else "nets"]
        task, schedule = config.get("task", {"name": "text"})["name"], config["schedule"]
        with torch.device("meta"):                          # memory is the file's, whatever it says
            built = (build_autoencoder(config["autoencoder"]), UNet(UNetConfig(**config["unet"])),
                     build_tau(task, config["tau"]))
        for net, state in zip(filter(None, built), (ckpt["ae"], nets["unet"], nets.get("tau"))):
            net.load_state_dict(state, assign=True)
            net.to(device, torch.float32).eval().requires_grad_(False)
        tokenizer = checked(Tokenizer.from_str(ckpt["tokenizer"]), built[2].cfg.n_vocab,
                            f"--ckpt {path}") if task == "text" else None
        betas = SCHEDULES[schedule["name"]](schedule["T"], *schedule.get("beta_range", ()))
        return Model(*built, tokenizer, cumulative(betas).to(device), schedule["predict"], task,
                     tuple(ckpt.get("classes", ())), ckpt["args"] | {"size": ckpt["size"]})

def timesteps(args, T: int) -> list[int]:
    """The timesteps to visit, and the end. Raises BadInput."""
    ts = TIMESTEPS[args.timesteps](T, min(50, T) if args.steps is None else args.steps)
    return samplers.later(ts, args.strength or 0.5) if args.init else ts

def draw_noise(n: int, args, first: int, shape: tuple, device) -> tuple[Tensor, Callable]:
    """z_T, and randn() for the steps: picture j of n has the noise of (args.seed, first + j).
    With args.to_seed, pictures 0..n-1 walk from picture 0 of args.seed to that of args.to_seed."""
    generators = [generator(args.seed, first + j) for j in range(n)]
    def randn():
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    z = randn()
    if args.to_seed is not None:
        a, b = (torch.randn(shape, generator=generator(s, 0)) for s in (args.seed, args.to_seed))
        w = [(first + j) % args.n / max(1, args.n - 1) for j in range(n)]
        z = torch.stack([samplers.slerp(a, b, v) for v in w]).to(device)
    return z, randn

@torch.no_grad()
def draw(m: Model, items: list[dict], args, first=0, wrap: Callable = lambda eps: eps) -> Tensor:
    """A picture an item, on the CPU; args as sample.py's parse_args makes them, size (H, W).
    An item has what m's task asks for; with `init`, drawing begins at that picture, noised; with
    `image` and `mask`, all but the mask's 1s is kept. wrap(eps_theta): what the sampler calls."""
    task, device, f, (H, W) = TASKS[m.task], m.abar.device, m.ae.cfg.f, args.size
    batch = {k: [item.get(k) for item in items] for k in ("image", *task.fields)}
    y, null = (task.y(b, m.tau, m.tokenizer).to(device) for b in (batch, task.null))
    ctx, ctx_null = (task.ctx(v, m.tau, m.ae) for v in (y, null.expand(1, *y.shape[1:])))
    def fields(name):
        return torch.stack([item[name] for item in items]).to(device)
    s = 1 if ctx is None else task.s if args.scale is None else args.scale
    eps = as_eps_theta(lambda *inputs: m.unet(*inputs).float(), m.abar, m.predict)
    eps = wrap(guided(eps, ctx_null, s))
    z, randn = draw_noise(len(items), args, first, (m.ae.cfg.c_z, H // f, W // f), device)
    ts = timesteps(args, len(m.abar))
    def sampler(z_t, ts):
        more = {"eta": args.eta} if args.sampler == "ddim" else {}
        return SAMPLERS[args.sampler](eps, z_t, ctx, m.abar, ts, randn, **more)
    if args.init:
        z = q_sample(m.ae.encode(fields("init")).mean, samplers.each(ts[0], z), z, m.abar)
    if "mask" not in items[0]:
        return m.ae.decode(sampler(z, ts)).float().clamp(-1, 1).cpu()
    image, mask = fields("image"), fields("mask")
    known = 1 - torch.max_pool2d(mask, f)                       # latents that no hole reaches into
    z = samplers.masked(sampler, z, m.ae.encode(image).mean, known, m.abar, ts, randn)
    return torch.where(mask > 0, m.ae.decode(z).float().clamp(-1, 1), image).cpu()

def defaults(**flags) -> Namespace:
    """What draw() asks of sample.py's flags."""
    return Namespace(**dict(steps=25, timesteps="even", sampler="ddim", eta=0.0, seed=0, scale=None,
                            init=None, strength=1.0, to_seed=None) | flags)
