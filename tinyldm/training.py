"""What both training scripts share: flags, device, processes, EMA, learning rate, log.

Paper:   App. E.2 (EMA, learning rates); the method itself is elsewhere.
Reads:   nothing of ours."""
import argparse
import contextlib
import copy
import json
import math
import os
import signal
import sys
import time
import warnings
from argparse import BooleanOptionalAction
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from tqdm import tqdm

from tinyldm import BadInput, require

# ---- flags
def flags(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)

def parse(parser: argparse.ArgumentParser, presets: dict, argv: list[str] | None):
    """-> args, parsed with the preset's row as defaults, so that a flag always wins."""
    parser.add_argument("--preset", default="toy", choices=presets, help="row of presets.py")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="toy")
    parser.set_defaults(**presets.get(first.parse_known_args(argv)[0].preset, {}))
    return parser.parse_args(argv)

def optimisation_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("optimisation")
    g.add_argument("--batch", type=int, help="pictures a step, of all processes together")
    g.add_argument("--micro-batch", type=int, help="pictures at a time in a process; default: all")
    g.add_argument("--lr", type=float, help="of the whole batch, whatever its size")
    g.add_argument("--betas", type=float, nargs=2, help="Adam's")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up")
    g.add_argument("--cosine", action=BooleanOptionalAction, help="let the lr fall to 0 at the end")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")

def run_flags(parser: argparse.ArgumentParser, out: str, every: int, n: int) -> None:
    g = parser.add_argument_group("run")
    g.add_argument("--out", default=out, type=Path, help="folder of what is written")
    g.add_argument("--steps", type=int)
    g.add_argument("--save-every", type=int, default=every, help="steps between checkpoints")
    g.add_argument("--eval-every", type=int, default=every, help="steps between figures, pictures")
    g.add_argument("--eval-n", type=int, default=n, help="how many pictures they are of; 0: none")

def system_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("system")
    g.add_argument("--device", default="auto", help="auto (CUDA if there is any), cpu, cuda")
    g.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"],
                   help="auto: bf16 on CUDA, else fp32")
    g.add_argument("--compile", action=BooleanOptionalAction, default=False, help="torch.compile")
    g.add_argument("--workers", type=int, default=0, help="processes that load pictures")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    g.add_argument("--dry-run", action="store_true", help="print sizes and memory, then exit")

def plain(args: argparse.Namespace) -> dict:
    """The flags as plain values, for checkpoints and printing."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}

def check_batch(args, world: int) -> int:
    """Pictures at a time in one process. Raises BadInput when the batch cannot be split so."""
    for k in ("save_every", "eval_every", "log_every"):
        require(getattr(args, k, 1) > 0, f"--{k.replace('_', '-')}: must be at least 1")
    require(args.batch > 0 and args.batch % world == 0,
            f"--batch {args.batch} cannot be shared evenly by {world} process(es)")
    each = args.batch // world
    micro = args.micro_batch or each
    require(micro > 0 and each % micro == 0,
            f"--micro-batch {micro} does not divide the {each} pictures of each process")
    return micro

def dry_run(args, *nets: torch.nn.Module) -> None:
    """Print the configuration, and the memory of weights, gradients, Adam's two moments and EMA."""
    n = sum(map(n_params, nets))
    print(json.dumps(plain(args), indent=1))
    print(f"{n:,} parameters in training: {20 * n / 2 ** 30:.2f} GiB with gradients, Adam and EMA; "
          "activations come on top")

def n_params(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

# ---- processes
def run(main, parse_args) -> None:
    """main(parse_args()) for the command line: BadInput becomes one line and exit code 2."""
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
    error = None
    try:
        main(parse_args())
    except BadInput as e:
        error = f"error: {e}"
    except OSError as e:
        error = f"error: {e.filename or 'output'}: cannot be written: {e.strerror or e}"
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if error:                                   # main's frame is gone, and with it its progress bar
        print(error, file=sys.stderr)
        sys.exit(2)

def setup(device: str, dtype: str):
    """-> device, autocast context factory, rank, world size; joins torchrun's process group."""
    world, rank, local = (int(os.environ.get(k, d)) for k, d in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        dev = torch.device(f"cuda:{local}" if device == "cuda" else device)
    except RuntimeError:
        raise BadInput(f"--device {device}: no such device; use auto, cpu or cuda") from None
    if dev.type == "cuda":
        if not torch.cuda.is_available():
            raise BadInput(f"--device {device}: no CUDA here, or in this torch; use --device cpu")
        torch.cuda.set_device(dev)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
    bf16 = dtype == "bf16" or (dtype == "auto" and dev.type == "cuda")
    return dev, lambda: torch.autocast(dev.type, torch.bfloat16, enabled=bf16), rank, world

def rows(x: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """This process's share of what was drawn for the whole batch."""
    return x.chunk(world)[rank]

def sync_last(net, last: bool):
    """Let DDP exchange gradients only on the last micro-batch."""
    return contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync()

def steps(args, done: int, log: "Log", save, evaluate):
    """The steps after `done`: 1, 2, ... Between them save(step) and evaluate(step) where they are
    due, in the main process. At SIGINT or SIGTERM, of any process, saves and leaves; at a second
    one ends at once. (zip the batches behind it: it must be the first to be asked for more.)"""
    asked = torch.zeros((), device=log.device)

    def ask(number, _frame):
        asked.fill_(1)
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this step; the same command goes on from here", file=sys.stderr)
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, ask)
    for step in range(done + 1, args.steps + 1):
        yield step
        if dist.is_initialized():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        stopping, start = bool(asked), time.perf_counter()
        if log.main and (step % args.save_every == 0 or step == args.steps or stopping):
            save(step)
        if log.main and args.eval_n > 0 and (step % args.eval_every == 0 or step == args.steps):
            evaluate(step)
        log.since += time.perf_counter() - start        # this time is not training's
        if stopping:
            break
    log.bar.close()

# ---- optimisation
def generator(seed: int, i: int) -> torch.Generator:
    """All randomness of training step i, or of picture i, is a function of (seed, i): a resumed run
    equals an unbroken one, and a picture does not depend on the batch that it is drawn in. Training
    draws for the whole batch, then takes this process's rows: the world size changes nothing.
    (The numbers are mixed first: torch's CPU generator looks at 32 bits of its seed.)"""
    mixed = np.random.SeedSequence([seed, i]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))

def lr_at(step: int, args) -> float:
    """Step 1, 2, ...: linear warm-up, then constant (the paper's) or a cosine down to zero."""
    fall = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / args.steps) if args.cosine else 1.0
    return args.lr * min(1.0, step / max(1, args.warmup)) * fall

def check_finite(value: torch.Tensor, step: int, path: Path) -> None:
    if not torch.isfinite(value):
        raise BadInput(f"loss or gradient is {value.item()} at step {step}: training stops, {path} "
                       "keeps the last good state; try a lower --lr, more --warmup or --dtype fp32")

class EMA:
    """Exponential moving average of the weights of some modules, {name: module}: .nets.
    Update n's decay is min(decay, (1 + n) / (10 + n)), the released code's warm-up. The paper's
    0.9999 needs 100k steps; a toy run of 2,000 wants 0.99.
    NB: the released code averages the U-Net only; here tau is averaged with it."""
    def __init__(self, nets: dict[str, torch.nn.Module], decay: float):
        self.source, self.decay, self.n = nets, decay, 0
        self.nets = {k: copy.deepcopy(net).requires_grad_(False) for k, net in nets.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.n += 1
        w = 1 - min(self.decay, (1 + self.n) / (10 + self.n))
        for k, net in self.nets.items():
            mean, now = (list(v.state_dict().values()) for v in (net, self.source[k]))
            torch._foreach_lerp_(mean, now, w)

    def state(self) -> dict:
        return {k: net.state_dict() for k, net in self.nets.items()}

# ---- log
def add(total: dict, values: dict, weight: float) -> None:
    """total += weight * values, key by key; numbers or tensors."""
    for k, v in values.items():
        v = v.detach() if isinstance(v, torch.Tensor) else v
        total[k] = total.get(k, 0.0) + weight * v

class Log:
    """The progress bar, log lines, and log.jsonl in args.out. Only rank 0 prints and writes.
    A resumed run keeps the lines up to its first step, so the file has no step twice."""
    def __init__(self, args, step: int, device: torch.device, rank: int):
        self.args, self.device, self.main = args, device, rank == 0
        self.path = args.out / "log.jsonl"
        if self.main:
            args.out.mkdir(parents=True, exist_ok=True)
            old = self.path.read_text().splitlines() if step and self.path.exists() else []
            self.path.write_text("".join(x + "\n" for x in old if json.loads(x)["step"] <= step))
        if step:
            self.note(f"{args.out}: {step} of {args.steps} steps are done")
        self.bar = tqdm(total=args.steps, initial=step, disable=not self.main, unit="step",
                        dynamic_ncols=True)
        self.last, self.since, self.sums = step, time.perf_counter(), {}

    def note(self, text: str) -> None:
        if self.main:
            tqdm.write(text)

    def step(self, step: int, **values) -> None:
        """After each step; every --log-every-th prints the means since the last print."""
        self.bar.update()
        add(self.sums, values, 1.0)
        if step % self.args.log_every == 0 or step == self.args.steps:
            n = step - self.last
            dt = (time.perf_counter() - self.since) / n
            self.write(step, **{k: float(v) / n for k, v in self.sums.items()}, ms=dt * 1e3,
                       img_per_s=self.args.batch / dt, gb=peak_memory(self.device) / 2 ** 30,
                       eta_min=dt * (self.args.steps - step) / 60)
            self.last, self.since, self.sums = step, time.perf_counter(), {}

    def write(self, step: int, **values: float) -> None:
        """A line on the terminal and in log.jsonl."""
        values = {k: float(v) for k, v in values.items()}
        if self.main:
            body = " | ".join(f"{k} {v:,.0f}" if abs(v) >= 1e3 else f"{k} {v:.3g}"
                              for k, v in values.items())
            tqdm.write(f"step {step:05d}/{self.args.steps:05d} | {body}")
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **values}) + "\n")

def peak_memory(device: torch.device) -> int:
    """Most memory this process has held there, bytes; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return 0
    kib = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib
