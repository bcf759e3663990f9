"""What both training scripts share: device, precision, processes, EMA, learning rate, checkpoints, log.

Paper:   App. E.2 (EMA, learning rates); the method itself is elsewhere.
Reads:   nothing of ours.
"""
import argparse
import contextlib
import io
import json
import math
import os
import pickle
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from tqdm import tqdm

from tinyldm import BadInput


def parse(parser: argparse.ArgumentParser, presets: dict, argv: list[str] | None) -> argparse.Namespace:
    """Parse argv with the preset's row as defaults, so that a flag always wins."""
    parser.add_argument("--preset", default="toy", choices=presets, help="row of presets.py that sets the defaults")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="toy")
    name = first.parse_known_args(argv)[0].preset
    parser.set_defaults(**presets.get(name, {}))
    return parser.parse_args(argv)


def system_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("system")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (auto: CUDA if there is one)")
    g.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on CUDA, else fp32")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the nets")
    g.add_argument("--workers", type=int, default=0, help="processes that load pictures")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    g.add_argument("--dry-run", action="store_true", help="print sizes and memory, then exit")


def run(main, args) -> None:
    """main(args) for the command line: a BadInput becomes one line on stderr and exit code 2."""
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
    try:
        main(args)
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def setup(device: str, dtype: str):
    """-> device, autocast context factory, rank, world size; starts the process group under torchrun."""
    world, rank, local = (int(os.environ.get(k, d)) for k, d in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        dev = torch.device(f"cuda:{local}" if device == "cuda" else device)
    except RuntimeError:
        raise BadInput(f"--device {device}: no such device; use auto, cpu or cuda") from None
    if dev.type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"--device {device}: this machine, or this build of torch, has no CUDA; use --device cpu")
    if dev.type == "cuda":
        torch.cuda.set_device(dev)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
    bf16 = dtype == "bf16" or (dtype == "auto" and dev.type == "cuda")
    return dev, lambda: torch.autocast(dev.type, torch.bfloat16, enabled=bf16), rank, world


def generator(seed: int, i: int) -> torch.Generator:
    """All randomness of training step i, or of picture i, is a function of (seed, i): a resumed run
    equals an unbroken one, and a picture does not depend on the batch that it is drawn in.

    In training, draw for the whole batch, then take this process's rows: the world size changes nothing.
    (The seeds are mixed because torch's CPU generator looks at 32 bits only.)
    """
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, i]).generate_state(1)[0]))


def lr_at(step: int, lr: float, warmup: int, steps: int, cosine: bool) -> float:
    """Linear warm-up, then constant (the paper's), or a cosine that falls to zero at the end (short runs)."""
    fall = 0.5 + 0.5 * math.cos(math.pi * step / steps) if cosine else 1.0
    return lr * min(1.0, (step + 1) / max(1, warmup)) * fall


class EMA:
    """Exponential moving average of the weights of some modules, {name: module}, in float32.

    decay at update n is min(decay, (1 + n) / (10 + n)), the released code's warm-up. The paper's 0.9999
    needs 100k steps; a toy run of 2,000 wants 0.99.
    NB: the released code averages the U-Net only; here tau is averaged with it.
    """

    def __init__(self, nets: dict[str, torch.nn.Module], decay: float):
        self.nets, self.decay, self.n = nets, decay, 0
        self.shadow = {k: {n: p.detach().clone() for n, p in net.state_dict().items()} for k, net in nets.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.n += 1
        w = 1 - min(self.decay, (1 + self.n) / (10 + self.n))
        for k, net in self.nets.items():
            torch._foreach_lerp_(list(self.shadow[k].values()), list(net.state_dict().values()), w)

    @contextlib.contextmanager
    def swapped(self):
        """Within this context the nets hold the averaged weights."""
        raw = {k: {n: p.clone() for n, p in net.state_dict().items()} for k, net in self.nets.items()}
        for k, net in self.nets.items():
            net.load_state_dict(self.shadow[k])
        try:
            yield
        finally:
            for k, net in self.nets.items():
                net.load_state_dict(raw[k])


def save_checkpoint(ckpt: dict, path: Path) -> None:
    """Write under a temporary name, then rename: a crash leaves the old file whole. Raises BadInput."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as e:
        raise BadInput(f"cannot write {path}: {e}") from e


def load_checkpoint(path: str | Path, kind: str, flag: str) -> dict:
    """Read one of our checkpoints of a kind ("autoencoder", "ldm"), never executing code. Raises BadInput."""
    try:
        with open(path, "rb") as f:
            data = f.read()
        ckpt = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except OSError as e:
        raise BadInput(f"{flag} {path}: {e.strerror or e}") from e
    except pickle.UnpicklingError as e:
        raise BadInput(f"{flag} {path}: refused, because it holds more than tensors and plain values and could run "
                       "code when loaded") from e
    except Exception as e:
        raise BadInput(f"{flag} {path}: truncated, or not a checkpoint ({type(e).__name__})") from e
    if not isinstance(ckpt, dict) or not str(ckpt.get("kind", "")).startswith("tinyldm "):
        raise BadInput(f"{flag} {path}: not a checkpoint of tinyldm")
    if ckpt["kind"] != f"tinyldm {kind}":
        raise BadInput(f"{flag} {path}: holds a {ckpt['kind'].split()[1]}, but here belongs a tinyldm {kind}")
    return ckpt


def same_config(old: dict, new: dict, path: Path) -> None:
    """Resuming needs the architecture that was saved. Raises BadInput naming what differs."""
    for part in new:
        for k, v in new[part].items():
            if old[part].get(k) != v:
                raise BadInput(f"{path} was made with {part} {k} = {old[part].get(k)}, now it is {v}; "
                               "use the same flags, or another --out to start anew")


class Stop:
    """Notes SIGINT and SIGTERM, so that the loop can save before it leaves; a second one ends at once."""

    def __init__(self):
        self.asked = False
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self._ask)

    def _ask(self, number, _frame):
        self.asked = True
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this step; the same command goes on from here", file=sys.stderr)


class Log:
    """The progress bar, log lines, and log.jsonl. Only rank 0 prints and writes.

    A resumed run keeps the lines up to its first step, so the file has no step twice.
    """

    def __init__(self, out: Path, step: int, steps: int, batch: int, device: torch.device, rank: int, every: int):
        self.path, self.steps, self.batch, self.device = out / "log.jsonl", steps, batch, device
        self.main, self.every = rank == 0, every
        if self.main:
            try:
                out.mkdir(parents=True, exist_ok=True)
                old = self.path.read_text().splitlines() if step and self.path.exists() else []
                self.path.write_text("".join(x + "\n" for x in old if json.loads(x)["step"] <= step))
            except OSError as e:
                raise BadInput(f"--out {out}: cannot be written: {e.strerror or e}") from e
        self.bar = tqdm(total=steps, initial=step, disable=not self.main, unit="step", dynamic_ncols=True)
        self.last, self.time, self.spent, self.sums = step, time.perf_counter(), 0.0, {}

    def note(self, text: str) -> None:
        if self.main:
            tqdm.write(text)

    @contextlib.contextmanager
    def aside(self):
        """Time spent in here (pictures, saving) is not counted as training speed."""
        start = time.perf_counter()
        yield
        self.spent += time.perf_counter() - start

    def step(self, step: int, **values) -> None:
        """After each step, with numbers or 0-dim tensors; every `every`-th prints their means since the last."""
        self.bar.update()
        add(self.sums, values, 1.0)
        if step % self.every == 0 or step == self.steps:
            n = step - self.last
            dt = (time.perf_counter() - self.time - self.spent) / n
            memory = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else peak_memory()
            self.write(step, **{k: float(v) / n for k, v in self.sums.items()}, ms=dt * 1e3, img_per_s=self.batch / dt,
                       gb=memory / 2 ** 30, eta_min=dt * (self.steps - step) / 60)
            self.last, self.time, self.spent, self.sums = step, time.perf_counter(), 0.0, {}

    def write(self, step: int, **values: float) -> None:
        """A line on the terminal and in log.jsonl."""
        if self.main:
            body = " | ".join(f"{k} {v:.3g}" if abs(v) < 1e3 else f"{k} {v:,.0f}" for k, v in values.items())
            tqdm.write(f"step {step:05d}/{self.steps:05d} | {body}")
            with open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **values}) + "\n")


def peak_memory() -> int:
    """Most memory this process has held, bytes; 0 where the system does not say."""
    try:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:
        return 0


def n_params(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def check_batch(args, world: int) -> int:
    """Pictures at a time in one process. Raises BadInput when batch, micro-batch and processes do not fit."""
    if args.batch < 1 or args.batch % world:
        raise BadInput(f"--batch {args.batch} cannot be shared evenly by {world} process(es)")
    micro = args.micro_batch or args.batch // world
    if micro < 1 or args.batch // world % micro:
        raise BadInput(f"--micro-batch {micro} does not divide the {args.batch // world} pictures of each process")
    return micro


def rows(x: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """This process's share of what was drawn for the whole batch."""
    return x.chunk(world)[rank]


def sync_last(net, last: bool):
    """Let DDP exchange gradients only on the last micro-batch."""
    return contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync()


def add(total: dict, values: dict, weight: float) -> None:
    """total += weight * values, key by key: the mean over micro-batches."""
    for k, v in values.items():
        total[k] = total.get(k, 0.0) + weight * (v.detach() if isinstance(v, torch.Tensor) else v)


def check_finite(value: torch.Tensor, step: int, path: Path) -> None:
    if not torch.isfinite(value):
        raise BadInput(f"the loss or its gradient is {float(value)} at step {step}, so training stops; {path} keeps the "
                       "last good state. Try a lower --lr, a longer --warmup, or --dtype fp32")


def dry_run(args, *nets: torch.nn.Module) -> None:
    """Print the configuration and what the weights need while training: value, gradient, AdamW's two, EMA."""
    print(json.dumps(plain(args), indent=1))
    n = sum(map(n_params, nets))
    print(f"{n:,} parameters in training: {20 * n / 2 ** 30:.2f} GiB with gradients, Adam and EMA, plus activations")


def plain(args: argparse.Namespace) -> dict:
    """The flags as plain values, for checkpoints and printing."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def half(tree: dict) -> dict:
    """A nested dict of tensors with the floating ones in fp16."""
    return {k: half(v) if isinstance(v, dict) else v.half() if v.is_floating_point() else v for k, v in tree.items()}
