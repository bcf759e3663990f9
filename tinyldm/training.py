"""What both training scripts share: flags, device, processes, gradients, EMA, steps, log.

Paper:   App. E.2 (EMA, learning rates); the method itself is elsewhere.
Reads:   checkpoint.py"""
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
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed as dist, nn
from tqdm import tqdm

from tinyldm import BadInput, require, trying
from tinyldm.checkpoint import whole, written

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

def training_flags(doc: str, out: str, every: int, n: int) -> argparse.ArgumentParser:
    parser = flags(doc)
    g = parser.add_argument_group("run")
    g.add_argument("--out", default=out, type=Path, help="folder of what is written")
    g.add_argument("--steps", type=int)
    g.add_argument("--save-every", type=int, default=every, help="steps between checkpoints")
    g.add_argument("--eval-every", type=int, default=every, help="steps between figures, pictures")
    g.add_argument("--eval-n", type=int, default=n, help="how many pictures they are of; 0: none")
    g.add_argument("--log-every", type=int, default=50, help="steps between log lines")
    g.add_argument("--dry-run", action="store_true", help="print sizes and memory, then exit")
    g = parser.add_argument_group("optimisation")
    g.add_argument("--batch", type=int, help="pictures a step, of all processes together")
    g.add_argument("--micro-batch", type=int, help="pictures at a time in a process; default: all")
    g.add_argument("--lr", type=float, help="of the whole batch, whatever its size")
    g.add_argument("--betas", type=float, nargs=2, help="Adam's")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up")
    g.add_argument("--cosine", action=BooleanOptionalAction, help="let the lr fall to 0 at the end")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--skip-nan", type=int, default=0, help="steps to skip at most, if not finite")
    system_flags(parser)
    return parser

def system_flags(parser: argparse.ArgumentParser) -> None:
    g = parser.add_argument_group("system")
    g.add_argument("--device", default="auto", help="auto (CUDA if there is any), cpu, cuda")
    g.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="bf16 on CUDA")
    g.add_argument("--compile", action=BooleanOptionalAction, default=False, help="torch.compile")
    g.add_argument("--workers", type=int, default=0, help="processes that load pictures")
    g.add_argument("--seed", type=int, default=0)

def plain(args: argparse.Namespace) -> dict:
    """The flags as plain values, for checkpoints and printing."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}

def check(args, world: int) -> int:
    """-> micro-batches a step. Raises BadInput where flags do not go together."""
    for k, least in dict(save_every=1, eval_every=1, log_every=1, size=16).items():
        require(getattr(args, k) >= least, f"--{k.replace('_', '-')}: must be at least {least}")
    require(args.batch > 0 and args.batch % world == 0,
            f"--batch {args.batch} cannot be shared evenly by {world} process(es)")
    each, micro = args.batch // world, args.micro_batch or args.batch // world
    require(micro > 0 and each % micro == 0,
            f"--micro-batch {micro} does not divide the {each} pictures of each process")
    return each // micro

def dry_run(args, *nets: nn.Module) -> None:
    """Print the configuration, and the memory of weights, gradients, Adam's two moments and EMA."""
    n = sum(map(n_params, nets))
    print(json.dumps(plain(args), indent=1))
    print(f"{n:,} parameters in training: {20 * n / 2 ** 30:.2f} GiB with gradients, Adam and EMA; "
          "activations come on top")

def n_params(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())

# ---- processes
def run(main, parse_args) -> None:
    """main(parse_args()) for the command line: BadInput becomes one line and exit code 2."""
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", file=sys.stderr)
    try:
        return main(parse_args())
    except BadInput as e:
        error = str(e)
    except OSError as e:
        error = f"{e.filename or 'output'}: cannot be written: {e.strerror or e}"
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    print(f"error: {error}", file=sys.stderr)   # main's frame is gone, and with it its progress bar
    sys.exit(2)

def setup(device: str, dtype: str):
    """-> device, autocast context factory, rank, world size; joins torchrun's process group."""
    world, rank, local = (int(os.environ.get(k, d)) for k, d in
                          (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    with trying(f"--device {device}: no such device; use auto, cpu or cuda"):
        dev = torch.device(f"cuda:{local}" if device == "cuda" else device)
    if dev.type == "cuda":
        require(torch.cuda.is_available(),
                f"--device {device}: no CUDA here, or in this torch; use --device cpu")
        torch.cuda.set_device(dev)
        torch.set_float32_matmul_precision("high")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if dev.type == "cuda" else "gloo")
    bf16 = dtype == "bf16" or (dtype == "auto" and dev.type == "cuda")
    return dev, lambda: torch.autocast(dev.type, torch.bfloat16, enabled=bf16), rank, world

# ---- optimisation
def accumulate(loss_of, batch, n: int, autocast, nets, **more) -> tuple[Tensor, dict, list[Tensor]]:
    """Adds gradients of nets: of the mean, over n micro-batches, of loss_of(*tensors, **more) -> (a
    loss, what to log, tensors to keep) -> its mean, the means to log, the kept, joined again."""
    means, kept = Counter(), []                                     # its update() adds
    for i, part in enumerate(zip(*(v.chunk(n) for v in batch)), 1):
        for net in nets:                                            # exchange the sum, once
            net.require_backward_grad_sync = i == n                 # DDP
            getattr(net, "set_requires_gradient_sync", bool)(i == n)            # FSDP
        with autocast():
            loss, told, keep = loss_of(*part, **more)
            (loss / n).backward()
        means.update({k: v.detach() * (1 / n) for k, v in (told | {"": loss}).items()})
        kept.append([v.detach() for v in keep])
    return means.pop(""), dict(means), [torch.cat(v) for v in zip(*kept)]

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

class EMA:
    """Exponential moving average of the weights of some modules, {name: module}: .nets.
    Update n's decay is min(decay, (1 + n) / (10 + n)), the released code's warm-up. The paper's
    0.9999 needs 100k steps; a toy run of 2,000 wants 0.99.
    NB: the released code averages the U-Net only; here tau is averaged with it."""
    def __init__(self, nets: dict[str, nn.Module], decay: float):
        self.source, self.decay, self.n = nets, decay, 0
        self.nets = {k: copy.deepcopy(net).requires_grad_(False) for k, net in nets.items()}

    @torch.no_grad()
    def update(self) -> None:
        self.n += 1
        w = 1 - min(self.decay, (1 + self.n) / (10 + self.n))
        for k, net in self.nets.items():
            mean, now = (list(v.state_dict().values()) for v in (net, self.source[k]))
            torch._foreach_lerp_(mean, now, w)

# ---- steps
class Run:
    """A run's steps, its progress bar, log lines, and log.jsonl in args.out. Only rank 0 prints and
    writes. A resumed run keeps the lines up to its first step, so the file has no step twice."""
    def __init__(self, args, done: int, device: torch.device, rank: int):
        self.args, self.done, self.device, self.main = args, done, device, rank == 0
        self.note = tqdm.write if self.main else lambda text: None
        self.asked, self.stopping = torch.zeros((), device=device), False
        self.path, self.judged, self.skipped, self.sums = args.out / "log.jsonl", 0, 0, Counter()
        if self.main:
            old = self.path.read_text().split("\n")[:-1] if done and self.path.exists() else []
            old = [x for x in map(json.loads, old) if x["step"] <= done]    # half a line is dropped
            with written(self.path) as f:
                f.writelines(f"{json.dumps(x)}\n".encode() for x in old)
            self.judged = max((x["step"] for x in old if "ms" not in x), default=0)
        if dist.is_initialized():
            judged = torch.tensor(self.judged, device=device)
            dist.broadcast(judged, 0)
            self.judged = int(judged)
        if done:
            self.note(f"{args.out}: {done} of {args.steps} steps are done")
        self.bar = tqdm(total=args.steps, initial=done, disable=not self.main, dynamic_ncols=True)

    def steps(self, save, judge):
        """The steps that are not done: 1, 2, ... Between them log lines, and save(step) and
        judge(step) where they are due, in the main process. At SIGINT or SIGTERM, of any process,
        saves and leaves; at a second one ends at once. (zip the batches behind it: it must be the
        first to be asked for more.) Raises BadInput after more than --skip-nan skipped steps."""
        args, last, seconds, asked = self.args, self.done, 0.0, self.asked
        def ask(number, _frame):
            asked.fill_(1)
            signal.signal(number, signal.SIG_DFL)
            tqdm.write("stopping after this step; the same command then goes on", file=sys.stderr)
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, ask)
        for step in range(self.done, args.steps + 1):
            end = step == args.steps
            if step > self.done:                        # else: killed before it was judged, perhaps
                start = time.perf_counter()
                yield step
                seconds += time.perf_counter() - start
                if self.skipped > args.skip_nan:        # the step has changed nothing
                    if step - 1 > self.done and (step - 1) % args.save_every:
                        save(step - 1)
                    raise BadInput(f"step {step}: loss or gradient is not finite: training stops; "
                                   f"{args.out} keeps step {step - 1}, ckpt.old.pt an earlier one; "
                                   "try a lower --lr, more --warmup, --dtype fp32, --skip-nan 10")
                self.bar.update()
                if step % args.log_every == 0 or end:                   # means since the last line
                    dt = seconds / (step - last)
                    self.write(step, **self.means(), ms=dt * 1e3,
                               img_per_s=args.batch / dt, gb=peak_memory(self.device) / 2 ** 30,
                               eta_min=dt * (args.steps - step) / 60)
                    self.sums, seconds, last = Counter(), 0.0, step
                if step % args.save_every == 0 or end or self.stopping:
                    save(step)
            if args.eval_n > 0 and step > self.judged and (step % args.eval_every == 0 or end):
                judge(step)
            if self.stopping:
                break
        self.bar.close()

    def update(self, step: int, loss: Tensor, clips: dict, told: dict) -> bool:
        """A step of each optimiser of clips, {optimiser: its gradient's largest norm}; to the log
        goes what is told. -> False, and nothing is done, if loss or gradient is not finite in some
        process. The host waits for the device here only, and hears of signals, too."""
        norms = [whole(nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], clip))
                 for opt, clip in clips.items()]
        said = torch.stack([self.asked, 1.0 - torch.isfinite(loss + sum(norms)).float()])
        if dist.is_initialized():
            dist.all_reduce(said, dist.ReduceOp.MAX)
        self.stopping, bad = said.tolist()
        for opt in clips:
            if not bad:
                opt.param_groups[0]["lr"] = lr = lr_at(step, self.args)
                opt.step()
            opt.zero_grad()
        if bad:
            self.skipped += 1
            self.note(f"step {step} is not finite: no update, {self.skipped} of --skip-nan")
        else:
            self.sums.update(told | {"lr": lr, "gnorm": norms[0], "": 1})
        return not bad

    def means(self) -> dict[str, float]:
        """Of what update() was told since the last line, over all processes."""
        n = self.sums.pop("", 0)
        means = torch.tensor([float(v) / n for v in self.sums.values()], device=self.device)
        if dist.is_initialized():
            dist.all_reduce(means)
            means /= dist.get_world_size()
        return dict(zip(self.sums, means.tolist()))

    def write(self, step: int, **values: float) -> None:
        """A line on the terminal and in log.jsonl."""
        values = {k: float(v) for k, v in values.items()}
        if self.main:
            body = " | ".join(f"{k} {v:,.0f}" if abs(v) >= 1e3 else f"{k} {v:.3g}"
                              for k, v in values.items())
            tqdm.write(f"step {step:05d}/{self.args.steps:05d} | {body}")
            with trying(f"cannot write {self.path}"), open(self.path, "a") as f:
                f.write(json.dumps({"step": step, **values}) + "\n")

def peak_memory(device: torch.device) -> int:
    """Most memory this process has held there, bytes; 0 where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(ImportError):
        import resource
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kib * (1 if sys.platform == "darwin" else 1024)
    return 0
