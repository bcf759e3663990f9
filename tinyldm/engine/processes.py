"""The device and the processes of a run: DDP and FSDP, each in one place.

torchrun starts N processes; each takes its rows of every batch. All random numbers are drawn
for the whole batch first, so that the numbers of a step do not depend on N.
"""
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed as dist, nn
from torch.nn.parallel import DistributedDataParallel

from tinyldm.attention import SpatialTransformer
from tinyldm.beyond.dit import DiTBlock
from tinyldm.conditioning import TextBlock
from tinyldm.errors import naming, require, trying
from tinyldm.layers import ResBlock


@dataclass(frozen=True)
class Machine:
    """Where this process computes: its device, its precision, its rank among `world`."""

    device: torch.device
    bf16: bool
    rank: int
    world: int

    @property
    def main(self) -> bool:
        """True in the one process that prints and writes files."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager:
        """Compute in bfloat16 inside this context, if the run asks for it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def part(self, x: Tensor) -> Tensor:
        """Return this process's rows of a whole-batch tensor."""
        return x.chunk(self.world)[self.rank]

    def shard(self, *tensors: Tensor) -> list[Tensor]:
        """Return this process's rows of each whole-batch tensor, on its device."""
        return [self.part(x).to(self.device) for x in tensors]


def fastest_device() -> str:
    """Return the name of the first that is there: CUDA, Apple's GPU, the CPU."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def setup(device: str, dtype: str) -> Machine:
    """Find the device, and join torchrun's process group if there is one.

    device is auto, cpu, cuda, mps, or a torch device such as cuda:1; dtype is auto (bfloat16
    on CUDA), fp32 or bf16. Raises BadInput for a device that is not there.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))

    if device == "auto":
        device = fastest_device()
    with naming("--device"):
        with trying(f"{device}: no such device; use auto, cpu, cuda or mps"):
            found = torch.device(f"cuda:{local_rank}" if device == "cuda" else device)
        if found.type == "cuda":
            require(
                torch.cuda.is_available(),
                f"{device}: there is no CUDA here, or none in this torch; use --device cpu",
            )
            n_devices = torch.cuda.device_count()
            require(
                (found.index or 0) < n_devices,
                f"{found}: there are {n_devices} CUDA devices, and the first is cuda:0",
            )
            torch.cuda.set_device(found)
            torch.set_float32_matmul_precision("high")
        with trying(f"{device}: it cannot compute here; use auto or cpu"):
            torch.ones((), device=found).item()

    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo")

    bf16 = dtype == "bf16" or (dtype == "auto" and found.type == "cuda")
    if bf16 and found.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        warnings.warn(
            "--dtype bf16: this processor has no arithmetic for it, so it is slower than fp32",
            stacklevel=2,
        )
    return Machine(found, bf16, rank, world)


# ---- what the processes tell one another

def any_process(*values: Tensor) -> list[bool]:
    """Return, for each scalar tensor, whether it is nonzero in any process.

    This is where a training step waits for the device, and the only place.
    """
    flags = torch.stack([v.float() for v in values])
    if dist.is_initialized():
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [flag > 0 for flag in flags.tolist()]


def sum_over_processes(x: Tensor) -> Tensor:
    """Return x, summed over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def mean_over_processes(x: Tensor) -> Tensor:
    """Return x, averaged over all processes."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def gather_rows(x: Tensor) -> Tensor:
    """Return the rows of x (n, ...) of all processes, in the order of their ranks."""
    if not dist.is_initialized():
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def from_main_process(value: int, device: torch.device) -> int:
    """Return the value that the main process has."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, device=device)
    dist.broadcast(shared, 0)
    return int(shared)


def wait_for_all() -> None:
    """Return when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


# ---- DDP: every process holds all weights, and gradients are averaged

def wrap_ddp(net: nn.Module, machine: Machine, **how: bool) -> nn.Module:
    """Return net, wrapped so that gradients are averaged; net itself if it runs alone."""
    if machine.world == 1:
        return net
    return DistributedDataParallel(net, **how)


def micro_batches(
    n: int, tensors: Iterable[Tensor], nets: Iterable[nn.Module]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batch's tensors in n equal parts, for gradients that add up.

    Why here: the processes need to exchange only the sum of the gradients, so the nets are
    told to do so at the last part and not before.
    """
    parts = zip(*(v.chunk(n) for v in tensors))
    for i, part in enumerate(parts, 1):
        exchange = i == n
        for net in nets:
            net.require_backward_grad_sync = exchange           # DDP reads this
            if hasattr(net, "set_requires_gradient_sync"):      # FSDP has this
                net.set_requires_gradient_sync(exchange)
        yield part


# ---- FSDP: every process holds a part of the weights, gradients, moments and EMA

def shard_weights(net: nn.Module) -> None:
    """Divide net's weights among the processes, block by block (torch's FSDP2)."""
    # Why imported here: it takes a second, which every start would pay.
    from torch.distributed.fsdp import fully_shard

    net.to(memory_format=torch.contiguous_format)
    for module in net.modules():
        if isinstance(module, ResBlock | SpatialTransformer | TextBlock | DiTBlock):
            fully_shard(module)
    fully_shard(net)


def whole(x: Tensor) -> Tensor:
    """Return the whole tensor, gathered from all processes if each holds a part of it."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def fit_to(x: Tensor, like: Tensor) -> Tensor:
    """Return x with `like`'s memory layout; only this process's part if `like` is a part."""
    if not hasattr(like, "full_tensor"):
        return torch.empty_like(like).copy_(x)
    from torch.distributed.tensor import distribute_tensor  # slow to import, as above

    x = x.to(like.device).contiguous()
    return distribute_tensor(x, like.device_mesh, like.placements)


def gathered_states(tree: object) -> object:
    """Return the state_dicts of a nested dict of modules and optimisers, with whole tensors.

    With FSDP every process must call this, as all take part in gathering; only the main
    process gets the values, the others get empty tensors.
    """
    if hasattr(tree, "state_dict"):
        tree = tree.state_dict()
    if isinstance(tree, dict):
        return {k: gathered_states(v) for k, v in tree.items()}
    if not hasattr(tree, "full_tensor"):
        return tree
    gathered = whole(tree)
    return gathered.cpu() if dist.get_rank() == 0 else gathered[:0]


def clip_gradients(params: Iterable[Tensor], largest: float) -> Tensor:
    """Scale the gradients to a norm of at most `largest`; return the norm they had."""
    return whole(nn.utils.clip_grad_norm_(params, largest))


def compiled(net: nn.Module, wanted: bool) -> Callable:
    """Return net, through torch.compile if that is wanted."""
    return torch.compile(net) if wanted else net
