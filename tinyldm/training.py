"""What both training scripts share: flags, device, processes, gradients, EMA, steps, log.

Paper: App. E.2 (EMA, learning rates); the method itself is elsewhere. Reads: checkpoint.py"""
import argparse
import copy
import gc
import json
import math
import os
import signal
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed as dist, nn
from tqdm import tqdm

from tinyldm import BadInput, checkpoint, require, trying

# ---- flags
def flags(doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)

def group(parser, title: str, **flags) -> None:
    """A group of flags, each NAME=(type or choices, help, default, nargs); bool: --[no-]NAME."""
    g = parser.add_argument_group(title)
    for name, (kind, told, *more) in flags.items():
        default, nargs, *_ = *more, None, None
        how = {"type": kind, "nargs": nargs} if callable(kind) else {"choices": kind}
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else how
        g.add_argument("--" + name.replace("_", "-"), help=told, default=default, **how)

def parse(parser: argparse.ArgumentParser, presets: dict, argv: list[str] | None):
    """-> args, parsed with the preset's row as defaults, so that a flag always wins."""
    parser.add_argument("--preset", default="toy", choices=presets, help="row of presets.py")
    parser.set_defaults(**presets[parser.parse_args(argv).preset])
    return parser.parse_args(argv)

SYSTEM = dict(device=(str, "auto (CUDA if there is any), cpu, cuda", "auto"),
              dtype=(["auto", "fp32", "bf16"], "auto: bf16 on CUDA", "auto"),
              compile=(bool, "torch.compile", False), seed=(int, "of all randomness", 0),
              workers=(int, "processes that load pictures", 0))

def training_flags(doc: str, out: str, every: int, n: int) -> argparse.ArgumentParser:
    parser = flags(doc)
    group(parser, "run", out=(Path, "folder of what is written", out), steps=(int, "in all"),
          save_every=(int, "steps a checkpoint", every), log_every=(int, "steps a log line", 50),
          eval_every=(int, "steps between figures and pictures", every),
          eval_n=(int, "how many pictures they are of; 0: none", n),
          dry_run=(bool, "print sizes and memory, then exit", False))
    group(parser, "optimisation", batch=(int, "pictures a step, of all processes together"),
          micro_batch=(int, "pictures at a time in a process; default: all"),
          lr=(float, "of the whole batch, whatever its size"), betas=(float, "Adam's", None, 2),
          clip=(float, "largest gradient norm", 1.0), cosine=(bool, "let lr fall to 0 at the end"),
          warmup=(int, "its steps"), skip_nan=(int, "steps to skip at most, if not finite", 0))
    group(parser, "system", **SYSTEM)
    return parser

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

def dry_run(args, *nets: nn.Module | None) -> None:
    """Print the configuration, and the memory of weights, gradients, Adam's two moments and EMA."""
    n = sum(map(n_params, nets))
    print(json.dumps(plain(args), indent=1))
    print(f"{n:,} parameters in training: {20 * n / 2 ** 30:.2f} GiB with gradients, Adam and EMA; "
          "activations come on top")

def n_params(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module else 0

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
    except torch.OutOfMemoryError as e:
        error = f"{str(e).splitlines()[0][:200]} Try a smaller --batch, --micro-batch, --ckpt-grad"
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            gc.collect()                # DDP first: the threads of both must end before Python
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
    """All randomness of training step i, or of picture i, is a function of (seed, i): whatever was
    resumed, whatever the batch. Training draws for the whole batch, then takes its process's rows.
    (The numbers are mixed first: torch's CPU generator looks at 32 bits of its seed.)"""
    mixed = np.random.SeedSequence([seed, i]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))

def lr_at(step: int, args) -> float:
    """Step 1, 2, ...: linear warm-up, then constant (the paper's) or a cosine down to zero."""
    fall = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / args.steps) if args.cosine else 1.0
    return args.lr * min(1.0, step / max(1, args.warmup)) * fall

class EMA:
    """Exponential moving average of the weights of some modules, {name: module}: .nets.
    Update n's decay is min(decay, (1 + n) / (10 + n)), the released code's warm-up.
    NB: the released code averages the U-Net only; here tau is averaged with it."""
    def __init__(self, nets: dict[str, nn.Module], decay: float):
        self.source, self.decay, self.n = nets, decay, 0
        self.nets = {k: copy.deepcopy(net).requires_grad_(False) for k, net in nets.items()}
    @torch.no_grad()
    def update(self) -> None:
        self.n += 1
        w = 1 - min(self.decay, (1 + self.n) / (10 + self.n))
        mean, now = (list(nn.ModuleDict(v).state_dict().values()) for v in (self.nets, self.source))
        torch._foreach_lerp_(mean, now, w)

# ---- steps
class Run:
    """A run's steps, its progress bar, log lines, and log.jsonl in args.out. Only rank 0 prints and
    writes. A resumed run keeps the lines up to its first step, so the file has no step twice."""
    def __init__(self, args, done: int, device: torch.device, rank: int):
        self.args, self.done, self.main = args, done, rank == 0
        self.note = tqdm.write if self.main else lambda text: None
        self.asked, self.stopping = torch.zeros((), device=device), False
        self.path, self.judged, self.skipped, self.sums = args.out / "log.jsonl", 0, 0, Counter()
        if self.main:
            old = self.path.read_text().split("\n")[:-1] if done and self.path.exists() else []
            old = [x for x in map(json.loads, old) if x["step"] <= done]    # half a line is dropped
            with checkpoint.written(self.path) as f:
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
        """The steps that are not done: 1, 2, ... (ask for one before its batch), between them log
        lines, save(step), judge(step) where they are due. At SIGINT or SIGTERM, of any process,
        saves and leaves; at a second one ends at once. Raises BadInput after too many skips."""
        args, last, seconds, asked = self.args, self.done, 0.0, self.asked
        def ask(number, _frame):
            asked.fill_(1)                  # not self's: the handler would keep the bar alive
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
                    dt, n = seconds / (step - last), self.sums.pop("", 0)
                    means = asked.new_tensor([float(v) / n for v in self.sums.values()])
                    if dist.is_initialized():
                        dist.all_reduce(means)
                        means /= dist.get_world_size()
                    self.write(step, **dict(zip(self.sums, means.tolist())), ms=dt * 1e3,
                               img_per_s=args.batch / dt, gb=peak_memory(asked.device) / 2 ** 30,
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
        """A step of each optimiser of clips, {optimiser: largest gradient norm}; logs what is told.
        -> False, and nothing is done, if loss or gradient is not finite in some process. The host
        waits for the device here only, and hears of signals, too."""
        norms = [checkpoint.whole(nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], clip))
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
    if device.type == "cuda" or sys.platform == "win32":
        return torch.cuda.max_memory_allocated()
    import resource  # which Windows has not
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)
