"""How fast, and how near to what the machine can do? A preset's networks, timed row by row.

    python -m tinyldm.bench                                             # the toy
    python -m tinyldm.bench --preset imagenet256 --ch 96 --batch 2      # 103M parameters
    python -m tinyldm.bench --preset text2img --batch 32 --compile      # on a GPU, in bf16
    python -m tinyldm.bench --against diffusers             # pip install diffusers, by hand

Reads:   presets.py, samplers.py, guidance.py, data.py, training.py
Random weights and inputs; medians of --runs after two that do not count; others run in turn with
ours. FLOPs are torch's count of products (convolutions, matrices, attention); 100% is the rate of a
large square product. MiB: of tensors at the peak, beside weights, moments and inputs. --against: a
file like tests/against_diffusers.py, or the name in it."""
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tinyldm import presets, require, samplers, training as tr, trying
from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.data import batch_order, data_flags, loader, open_data
from tinyldm.diffusion import SCHEDULES, cumulative
from tinyldm.guidance import guided
from tinyldm.unet import UNet, UNetConfig

def parse_args(argv=None):
    p = tr.flags(__doc__)
    data_flags(p)
    p.add_argument("--ch", type=int, help="width of the U-Net")
    p.add_argument("--batch", type=int, help="pictures")
    p.add_argument("--n", type=int, default=16, help="pictures sampled, in 50 guided DDIM steps")
    p.add_argument("--runs", type=int, default=7, help="of each row")
    p.add_argument("--only", default="", help="rows with this in their name")
    p.add_argument("--against", help="the same networks of others: diffusers, or a FILE.py")
    p.add_argument("--ckpt-grad", action="store_true", help="less memory: compute twice")
    tr.system_flags(p)
    return tr.parse(p, presets.LDM, argv)

# ---- what is timed: rows (name, pictures, ours, theirs if there are any)
def prepare(nets: list[nn.Module | None], device: torch.device) -> list[nn.Module]:
    """As in training; branches that begin at zero are drawn, too. Raises BadInput."""
    nets = [net.to(device, memory_format=torch.channels_last) for net in nets if net]
    n = [tr.n_params(net) for net in nets]
    require(n[0] == n[-1], f"--against: {n[-1]:,} parameters there, {n[0]:,} here")
    for p in (p for net in nets for p in net.parameters() if not p.any()):
        nn.init.normal_(p, std=0.02)
    return nets

def trainer(net: nn.Module, out: Callable) -> Callable:
    """A step of AdamW; the loss is the mean square of out()."""
    opt = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
    @torch.enable_grad()
    def step():
        opt.zero_grad()
        out().square().mean().backward()
        opt.step()
    return step

def our_sampling(net: Callable, z: Tensor, ctx: Tensor, null: Tensor, betas: Tensor, steps, s):
    abar = cumulative(betas).to(z.device)
    return samplers.ddim(guided(net, null, s), z, ctx, abar, samplers.timesteps(len(abar), steps))

def unet_rows(cfg: UNetConfig, row: dict, other, device, call: Callable) -> Iterator[tuple]:
    M = 1 if row["task"] == "class" else row["n_token"]
    z_shape, B, n = (cfg.c_out, cfg.side, cfg.side), row["batch"], row["n"]
    seen = (M, cfg.d_ctx) if cfg.d_ctx else (cfg.c_in - cfg.c_out, *z_shape[1:])
    z, ctx, z_T, y = (torch.randn(k, *shape, device=device)
                      for k in (B, n) for shape in (z_shape, seen))
    t, null = torch.arange(B, device=device) % 1000, torch.zeros_like(y[:1])
    betas, columns = SCHEDULES[row["schedule"]](1000, *row["beta_range"]), []
    nets = prepare([UNet(cfg), other and other.unet(cfg)], device)
    nets[0].ckpt_grad = row["ckpt_grad"]
    for net, sampling in zip(nets, (our_sampling, other and other.sampling)):
        forward = partial(run := call(net), z, t, ctx)
        sample = partial(sampling, run, z_T, y, null, betas, 50, 2.0)
        columns.append((forward, trainer(net, forward), sample))
    return zip(("U-Net forward", "U-Net step", "sample, 50 steps"), (B, B, n), *columns)

def autoencoder_rows(cfg: AEConfig, row: dict, other, device, call: Callable) -> Iterator[tuple]:
    B, side, columns = row["batch"], row["size"], []
    x, z = (torch.randn(B, c, h, h, device=device)
            for c, h in ((cfg.c_x, side), (cfg.c_z, side // cfg.f)))
    nets = prepare([Autoencoder(cfg), other and other.autoencoder(cfg)], device)
    for net, noise in zip(nets, (z, True)):             # True: theirs draws its own
        step = trainer(net, partial(call(net), x, noise))
        columns.append((partial(call(net.encode), x), partial(call(net.decode), z), step))
    return zip(("encode", "decode", "autoencoder step"), (B, B, B), *columns)

def loading_row(args, device) -> tuple:
    data = open_data(args)
    order = batch_order(len(data), args.batch, 0, 10 ** 9, args.seed)
    batches = loader(data, order, args.workers, device.type == "cuda")
    return f"load, {args.workers} workers", 8 * args.batch, lambda: [next(batches) for _ in "8" * 8]

# ---- how it is timed
def seconds(work: list[Callable], runs: int, device: torch.device) -> list[float]:
    """Medians; each of the work in turn, so that a slow minute of the machine meets all alike."""
    times = [[] for _ in work]
    for _ in range(runs):
        for f, kept in zip(work, times):
            start = time.perf_counter()
            f()
            if device.type == "cuda":
                torch.cuda.synchronize()
            kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]

def peak(f: Callable, device: torch.device) -> int:
    """Bytes of tensors at f's peak, beside those that were there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(torch.tensor([0, *sizes]).cumsum(0).max())

@torch.no_grad()
def main(args):
    device, autocast, *_ = tr.setup(args.device, args.dtype)
    row = presets.PAPER | presets.BERT | {"beta_range": (), "n_head": None} | vars(args)
    ae, other = presets.ae_config(row["ae_preset"]), None
    if args.against:
        named = Path(__file__).parents[1] / "tests" / f"against_{args.against}.py"
        path = args.against if args.against.endswith(".py") else named
        with trying(f"--against {args.against}: {path} cannot be used"):
            spec = importlib.util.spec_from_file_location("other", path)
            spec.loader.exec_module(other := importlib.util.module_from_spec(spec))

    def call(f):
        """f, compiled where asked, in the precision asked; -> its tensor, where it has one."""
        run = torch.compile(f, dynamic=False) if args.compile else f

        def tensor(*inputs):
            with autocast():
                out = run(*inputs)
            out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
            return out.float() if isinstance(out, Tensor) else out
        return tensor
    with autocast():
        n = 8192 if device.type == "cuda" else 2048
        a = torch.randn(n, n, device=device)
        most = 2 * n ** 3 / seconds([lambda: a @ a], 2 + args.runs, device)[0]
    print(f"{args.preset}, {device}, {torch.get_num_threads()} threads: a product of {n} x {n} "
          f"matrices has {most / 1e9:,.0f} GFLOP/s\n\n| | pictures | ms | a second | GFLOP/s | of "
          "the product | MiB | theirs: ms | MiB | ours / theirs |\n|" + "---|" * 10)
    torch.manual_seed(args.seed)
    rows = [*unet_rows(presets.unet_config(row, ae), row, other, device, call)]
    rows += autoencoder_rows(ae, row, other, device, call) if ae.ch else []
    rows += [loading_row(args, device)] if args.data else []
    for name, n, *work in tqdm([r for r in rows if args.only in r[0]], leave=False):
        seconds(work, 2, device)
        mib = [peak(f, device) / 2 ** 20 for f in work]
        with FlopCounterMode(display=False) as flops:
            work[0]()
        ours, *theirs = seconds(work, args.runs, device)
        rate = flops.get_total_flops() / ours
        tqdm.write(f"| {name} | {n} | {1e3 * ours:,.1f} | {n / ours:,.3g} | {rate / 1e9:,.0f} | "
                   f"{rate / most:.0%} | {mib[0]:,.0f} |" + "".join(
                       f" {1e3 * v:,.1f} | {mib[1]:,.0f} | {ours / v:.2f} |" for v in theirs))

if __name__ == "__main__":
    tr.run(main, parse_args)
