"""How fast the networks of a preset are, and how near to what the machine can do.

    python -m tinyldm.engine.bench                      # the toy's
    python -m tinyldm.engine.bench --against diffusers  # after `pip install diffusers`
    python -m tinyldm.engine.bench --preset imagenet256 --ch 96 --batch 2 --compile

It prints a table. Weights and inputs are random. Times are medians of --runs, after two
runs that do not count; another implementation takes turns with ours. FLOPs are what
torch counts for convolutions and matrix products; their rate is compared with that of a
large matrix product. MiB are those of the tensors at the peak, on top of those that
stay.
"""
import importlib.util
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tinyldm.autoencoder import Autoencoder
from tinyldm.conditioning import Context
from tinyldm.data.images import size_text
from tinyldm.data.loader import batch_order, load_batches
from tinyldm.diffusion import SCHEDULES, cumulative
from tinyldm.engine import flags, presets
from tinyldm.engine.command import run
from tinyldm.engine.processes import Machine, setup
from tinyldm.engine.timing import TABLE_HEAD, Row, measure, product_rate
from tinyldm.errors import naming, require, trying
from tinyldm.guidance import guided
from tinyldm.samplers import ddim, timesteps
from tinyldm.unet import UNet

STEPS = 50
SCALE = 2.0                     # s of guidance
BATCHES_LOADED = 8


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.new_parser(__doc__)
    flags.add_data_flags(parser)
    g = parser.add_argument_group("what is measured")
    g.add_argument("--ch", type=int, help="width of the U-Net")
    g.add_argument("--batch", type=int, help="images at a time")
    g.add_argument("--n", type=int, default=16,
                   help=f"images sampled at a time, in {STEPS} guided DDIM steps")
    g.add_argument("--runs", type=int, default=7, help="runs of each row that count")
    g.add_argument("--only", type=str, default="",
                   help="measure only rows with this text in their name")
    g.add_argument("--against", type=str,
                   help="another implementation: diffusers, or a file like "
                        "tests/against_diffusers.py")
    g.add_argument("--ckpt-grad", action="store_true",
                   help="save memory: compute the U-Net's activations again in backward")
    flags.add_system_flags(parser)
    flags.add_loading_flags(parser)
    return flags.parse(parser, presets.LDM, argv)


# ---- what is measured

class Bench:
    """What all rows share: the configs, the device, and how networks are called."""

    def __init__(self, args: Namespace, machine: Machine, other: ModuleType | None):
        self.args = args
        self.machine = machine
        self.device = machine.device
        self.other = other

        # What neither a flag nor the preset's row says is as in the paper's models.
        defaults = presets.PAPER | presets.BERT | {"beta_range": (), "n_head": None}
        self.values = defaults | vars(args)
        self.ae_cfg = presets.ae_config(args.ae_preset, args.channels or 3)
        with naming("--ch"):
            config = presets.model_config(self.values, self.ae_cfg)
        self.unet_cfg = config.unet
        self.size = config.size
        multiple = self.ae_cfg.f * self.unet_cfg.factor
        require(
            all(side % multiple == 0 for side in self.size),
            f"--size {size_text(self.size)}: must be a multiple of {multiple}",
        )
        self.n_token = config.tau.get("n_token", 1)     # a class is one token

    def rows(self) -> Iterator[Row]:
        """Yield all rows. Raises BadInput if the other networks are not the same."""
        yield from self.unet_rows()
        if self.ae_cfg.ch > 0:
            yield from self.autoencoder_rows()
        if self.args.data:
            yield self.loading_row()

    def unet_rows(self) -> list[Row]:
        """The U-Net: forward, a step of training, sampling."""
        ours = UNet(self.unet_cfg)
        theirs = self.other.unet(self.unet_cfg) if self.other else None
        prepare(ours, theirs, self.device)
        ours.ckpt_grad = self.args.ckpt_grad

        work = self.unet_work(ours, our_sampling)
        their_work = None
        if theirs is not None:
            their_work = self.unet_work(theirs, self.other.sampling)

        B = self.args.batch
        names = ["U-Net forward", "U-Net step", f"sample, {STEPS} steps"]
        return make_rows(names, [B, B, self.args.n], work, their_work)

    def unet_work(self, net: nn.Module, sampling: Callable) -> list[Callable]:
        """Return what the rows of the U-Net time: forward, a step, sampling."""
        call = self.callable(net)

        z_t, ctx = self.unet_inputs(self.args.batch)
        t = torch.arange(len(z_t), device=self.device) % 1000
        forward = partial(call, z_t, t, *ports_of(ctx))

        z_T, ctx = self.unet_inputs(self.args.n)
        ctx_null = null_context(ctx)
        schedule = SCHEDULES[self.values["schedule"]]
        betas = schedule.betas(1000, *self.values["beta_range"])
        sample = partial(sampling, call, z_T, ctx, ctx_null, betas, STEPS, SCALE)

        return [forward, training_step(net, forward), sample]

    def unet_inputs(self, n: int) -> tuple[Tensor, Context]:
        """Return random z_t (n, c_z, h, w) and conditions, as the U-Net takes them."""
        cfg = self.unet_cfg
        h, w = (side // self.ae_cfg.f for side in self.size)
        z_t = torch.randn(n, cfg.c_out, h, w, device=self.device)

        tokens = None
        if cfg.d_ctx:
            tokens = torch.randn(n, self.n_token, cfg.d_ctx, device=self.device)

        beside = None
        c = cfg.c_in - cfg.c_out
        if c > 0:
            beside = torch.randn(n, c, h, w, device=self.device)
        return z_t, Context(tokens, beside)

    def autoencoder_rows(self) -> list[Row]:
        """Stage one: E, D, a step of training without the discriminator."""
        ours = Autoencoder(self.ae_cfg)
        theirs = self.other.autoencoder(self.ae_cfg) if self.other else None
        prepare(ours, theirs, self.device)

        work = self.autoencoder_work(ours)
        their_work = None
        if theirs is not None:
            their_work = self.autoencoder_work(theirs, own_noise=True)

        names = ["encode", "decode", "autoencoder step"]
        return make_rows(names, [self.args.batch] * 3, work, their_work)

    def autoencoder_work(self, ae: nn.Module, own_noise: bool = False) -> list[Callable]:
        """Return what the rows of stage one time: E, D, a step.

        Our autoencoder takes the noise of q(z|x) as its second argument. own_noise:
        diffusers' takes True there, and makes the noise itself.
        """
        cfg = self.ae_cfg
        B = self.args.batch
        H, W = self.size
        x = torch.randn(B, cfg.c_x, H, W, device=self.device)
        z = torch.randn(B, cfg.c_z, H // cfg.f, W // cfg.f, device=self.device)

        noise = True if own_noise else z
        encode = partial(self.callable(ae.encode), x)
        decode = partial(self.callable(ae.decode), z)
        reconstruct = partial(self.callable(ae), x, noise)
        return [encode, decode, training_step(ae, reconstruct)]

    def loading_row(self) -> Row:
        """The data set: loading and decoding images."""
        args = self.args
        data = flags.open_data(args, "train", self.ae_cfg.c_x)
        order = batch_order(len(data), args.batch, 0, 10 ** 9, args.seed)
        pin = self.device.type == "cuda"
        batches = load_batches(data, order, args.workers, pin)

        def load() -> None:
            for _ in range(BATCHES_LOADED):
                next(batches)

        return Row(f"load, {args.workers} workers", BATCHES_LOADED * args.batch, load)

    def callable(self, network: Callable) -> Callable[..., Tensor]:
        """Return a network, or a method of one, as a function that returns a tensor.

        It computes in the precision of the run and, if the run asks for that, compiled.
        Of a tuple the first is returned, of diffusers' outputs the attribute `sample`.
        """
        compiled = network
        if self.args.compile:
            compiled = torch.compile(network, dynamic=False)

        def call(*inputs: object) -> Tensor:
            with self.machine.autocast():
                output = compiled(*inputs)
            if isinstance(output, tuple):
                return output[0]
            return getattr(output, "sample", output)

        return call


def make_rows(
    names: list[str],
    counts: list[int],
    work: list[Callable],
    their_work: list[Callable] | None,
) -> list[Row]:
    """Return the rows of some work on `counts` images each, with theirs, if there is any."""
    if their_work is None:
        their_work = [None] * len(work)
    return [Row(*values) for values in zip(names, counts, work, their_work)]


def null_context(ctx: Context) -> Context:
    """Return a condition of batch size 1 that is zero, by the same ports."""
    ports = [None if x is None else torch.zeros_like(x[:1]) for x in ctx]
    return Context(*ports)


def ports_of(ctx: Context) -> tuple[Tensor | None, ...]:
    """Return what a U-Net is called with behind (z_t, t): tokens, and maps if any.

    So another's network, which may have tokens only, is called as net(z_t, t, tokens).
    """
    return (ctx.tokens,) if ctx.beside is None else tuple(ctx)


def our_sampling(
    net: Callable,
    z_T: Tensor,
    ctx: Context,
    ctx_null: Context,
    betas: Tensor,
    steps: int,
    s: float,
) -> Tensor:
    """Sample with guidance and DDIM: what another's `sampling` is compared with."""
    abar = cumulative(betas)

    def eps_theta(z_t: Tensor, t: Tensor, ctx: Context) -> Tensor:
        return net(z_t, t, *ports_of(ctx))

    ts = timesteps(abar, steps)
    return ddim(guided(eps_theta, ctx_null, s), z_T, ctx, abar, ts)


def prepare(ours: nn.Module, theirs: nn.Module | None, device: torch.device) -> None:
    """Put both networks on the device, as in training.

    They must have as many parameters, else it raises BadInput.
    Branches begin at zero, which makes gradients of zero and may be faster than others.
    So weights that are zero get random values.
    """
    nets = [ours] if theirs is None else [ours, theirs]
    counts = [flags.n_params(net) for net in nets]
    require(
        counts[0] == counts[-1],
        f"--against: {counts[-1]:,} parameters there, {counts[0]:,} here",
    )
    for net in nets:
        net.to(device, memory_format=torch.channels_last)
        for p in net.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.02)


def training_step(net: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    """Return a function that does a step of AdamW with the loss mean(forward()^2)."""
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=True)

    @torch.enable_grad()
    def step() -> None:
        optimiser.zero_grad()
        loss = forward().float().square().mean()
        loss.backward()
        optimiser.step()

    return step


def load_other(name: str) -> ModuleType:
    """Import another implementation: tests/against_NAME.py, or a file. Raises BadInput.

    The file defines unet(cfg: UNetConfig) and autoencoder(cfg: AEConfig), each a
    network with as many parameters as ours or, where it has no such, None; and
    `sampling` with the arguments of our_sampling. Its U-Net is called as net(z_t, t,
    tokens).
    """
    path = Path(name)
    if path.suffix != ".py":
        path = Path(__file__).parents[2] / "tests" / f"against_{name}.py"
    with trying(f"--against {name}: {path} cannot be used"):
        spec = importlib.util.spec_from_file_location("other", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@torch.no_grad()
def main(args: Namespace) -> None:
    machine = setup(args.device, args.dtype)
    other = load_other(args.against) if args.against else None
    bench = Bench(args, machine, other)

    n, highest_rate = product_rate(machine, args.runs)
    print(
        f"{args.preset}, {machine.device}, {torch.get_num_threads()} threads: a product of "
        f"{n} x {n} matrices has {highest_rate / 1e9:,.0f} GFLOP/s\n\n{TABLE_HEAD}"
    )

    torch.manual_seed(args.seed)
    rows = [row for row in bench.rows() if args.only in row.name]
    for row in tqdm(rows, leave=False):
        tqdm.write(measure(row, args.runs, machine.device, highest_rate))


if __name__ == "__main__":
    run(main, parse_args)
