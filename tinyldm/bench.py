"""How fast, and how near to what the machine can do? A preset's networks, timed row by row.

    python -m tinyldm.bench --against diffusers     # the toy's; pip install diffusers, by hand
    python -m tinyldm.bench --preset imagenet256 --ch 96 --batch 2 --compile    # 103M parameters

Reads:   presets.py, samplers.py, guidance.py, data.py, training.py. Random weights and inputs;
medians of --runs after two that do not count, others in turn with ours. FLOPs: torch's count of
products; 100%: a large square one's rate. MiB: of tensors at the peak, beside those that stay."""
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from timeit import timeit

import torch
from torch import Tensor, nn, profiler
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tinyldm import data, diffusion, guidance, presets, require, samplers, training as tr, trying
from tinyldm.autoencoder import Autoencoder
from tinyldm.unet import UNet

def parse_args(argv=None):
    p = tr.flags(__doc__)
    data.data_flags(p)
    p.add_argument("--ch", type=int, help="width of the U-Net")
    p.add_argument("--batch", type=int, help="pictures")
    p.add_argument("--n", type=int, default=16, help="pictures sampled, in 50 guided DDIM steps")
    p.add_argument("--runs", type=int, default=7, help="of each row")
    p.add_argument("--only", default="", help="rows with this in their name")
    p.add_argument("--against", help="diffusers, or a FILE.py like tests/against_diffusers.py")
    p.add_argument("--ckpt-grad", action="store_true", help="less memory: compute twice")
    tr.group(p, "system", **tr.SYSTEM)
    return tr.parse(p, presets.LDM, argv)

def prepare(nets: list[nn.Module | None], device: torch.device) -> list[nn.Module]:
    """As in training; branches that begin at zero are drawn, too. Raises BadInput."""
    nets = [net.to(device, memory_format=torch.channels_last) for net in nets if net]
    here, *_, there = map(tr.n_params, [nets[0], *nets])
    require(here == there, f"--against: {there:,} parameters there, {here:,} here")
    for p in (p for net in nets for p in net.parameters() if not p.any()):
        nn.init.normal_(p, std=0.02)
    return nets

def trainer(net: nn.Module, out: Callable) -> Callable:
    """A step of AdamW; the loss is the mean square of out()."""
    opt = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)
    @torch.enable_grad()
    def step():
        opt.zero_grad()
        out().float().square().mean().backward()
        opt.step()
    return step

def our_sampling(net: Callable, z: Tensor, ctx: Tensor, null: Tensor, betas: Tensor, steps, s):
    abar, ts = diffusion.cumulative(betas).to(z.device), samplers.timesteps(len(betas), steps)
    return samplers.ddim(guidance.guided(net, null, s), z, ctx, abar, ts)

def rows(args, other, device, call: Callable) -> Iterator[tuple]:
    """(name, pictures, ours, theirs if there are any) of each row. Raises BadInput."""
    row = presets.PAPER | presets.BERT | {"beta_range": (), "n_head": None} | vars(args)
    ae, B, n = presets.ae_config(args.ae_preset), args.batch, args.n
    cfg = presets.unet_config(row, ae)
    z_shape, M = (cfg.c_out, cfg.side, cfg.side), 1 if row["task"] == "class" else row["n_token"]
    seen = (M, cfg.d_ctx) if cfg.d_ctx else (cfg.c_in - cfg.c_out, *z_shape[1:])
    z, ctx, z_T, y = (torch.randn(k, *shape, device=device)
                      for k in (B, n) for shape in (z_shape, seen))
    betas, null = diffusion.SCHEDULES[row["schedule"]](1000, *row["beta_range"]), y[:1] * 0
    nets = prepare([UNet(cfg), other and other.unet(cfg)], device)
    nets[0].ckpt_grad = args.ckpt_grad
    forward = [partial(call(net), z, torch.arange(B, device=device) % 1000, ctx) for net in nets]
    yield "U-Net forward", B, *forward
    yield "U-Net step", B, *map(trainer, nets, forward)
    yield "sample, 50 steps", n, *(partial(draw, f.func, z_T, y, null, betas, 50, 2.0) for f, draw
                                   in zip(forward, (our_sampling, other and other.sampling)))
    if ae.ch:
        nets = prepare([Autoencoder(ae), other and other.autoencoder(ae)], device)
        x = torch.randn(B, ae.c_x, args.size, args.size, device=device)
        yield "encode", B, *(partial(call(net.encode), x) for net in nets)
        yield "decode", B, *(partial(call(net.decode), z) for net in nets)
        whole = [partial(call(net), x, eps) for net, eps in zip(nets, (z, True))]   # True: its own
        yield "autoencoder step", B, *map(trainer, nets, whole)
    if args.data:
        order = data.batch_order(len(pictures := data.open_data(args)), B, 0, 10 ** 9, args.seed)
        batches = data.loader(pictures, order, args.workers, device.type == "cuda")
        yield f"load, {args.workers} workers", 8 * B, lambda: [next(batches) for _ in range(8)]

def seconds(work: list[Callable], runs: int, device: torch.device) -> list[float]:
    """Medians; each of the work in turn, so that a slow minute of the machine meets all alike."""
    def done(f):
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
    times = [[timeit(partial(done, f), number=1) for f in work] for _ in range(runs)]
    return torch.tensor(times).quantile(0.5, 0).tolist()

def peak(f: Callable, device: torch.device) -> int:
    """Bytes of tensors at f's peak, beside those that were there before and stay."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        f()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        f()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(torch.tensor([0, *sizes]).cumsum(0).max())

@torch.no_grad()
def main(args):
    device, autocast, *_ = tr.setup(args.device, args.dtype)
    if other := args.against:
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
            return out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        return tensor
    with autocast():
        n = 8192 if device.type == "cuda" else 2048
        a = torch.randn(n, n, device=device)
        most = 2 * n ** 3 / seconds([lambda: a @ a], 2 + args.runs, device)[0]
    print(f"{args.preset}, {device}, {torch.get_num_threads()} threads: a product of {n} x {n} "
          f"matrices has {most / 1e9:,.0f} GFLOP/s\n\n| | pictures | ms | a second | GFLOP/s | of "
          "the product | MiB | theirs: ms | MiB | ours / theirs |\n|" + "---|" * 10)
    torch.manual_seed(args.seed)
    every = [row for row in rows(args, other, device, call) if args.only in row[0]]
    for name, n, *work in tqdm(every, leave=False):
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
