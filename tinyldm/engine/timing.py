"""How long work takes, how much memory it needs, and how many FLOPs it is.

Work is any function without arguments. bench.py prints what is measured here.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from timeit import timeit

import torch
from torch import profiler
from torch.utils.flop_counter import FlopCounterMode

from tinyldm.engine.processes import Machine

WARMUP_RUNS = 2

TABLE_HEAD = (
    "| | images | ms | images/s | GFLOP/s | of the product | MiB "
    "| theirs: ms | MiB | ours / theirs |\n" + "|---" * 10 + "|"
)


@dataclass(frozen=True)
class Row:
    """A row of the table: work on n_images, by our code and, maybe, by another's."""

    name: str
    n_images: int
    ours: Callable[[], object]
    theirs: Callable[[], object] | None = None

    @property
    def work(self) -> list[Callable[[], object]]:
        """Ours and, if there is one, theirs."""
        return [self.ours] if self.theirs is None else [self.ours, self.theirs]


def measure(row: Row, runs: int, device: torch.device, highest_rate: float) -> str:
    """Run a row's work; return its line of the table. highest_rate is in FLOP/s."""
    median_seconds(row.work, WARMUP_RUNS, device)
    mib = [peak_bytes(work, device) / 2 ** 20 for work in row.work]
    flops = count_flops(row.ours)
    seconds = median_seconds(row.work, runs, device)

    ours = seconds[0]
    rate = flops / ours
    cells = [
        row.name,
        f"{row.n_images}",
        f"{1e3 * ours:,.1f}",
        f"{row.n_images / ours:,.3g}",
        f"{rate / 1e9:,.0f}",
        f"{rate / highest_rate:.0%}",
        f"{mib[0]:,.0f}",
    ]
    if row.theirs is not None:
        theirs = seconds[1]
        cells += [f"{1e3 * theirs:,.1f}", f"{mib[1]:,.0f}", f"{ours / theirs:.2f}"]
    return f"| {' | '.join(cells)} |"


def median_seconds(work: Sequence[Callable], runs: int, device: torch.device) -> list[float]:
    """Return the median time of each piece of work, in seconds.

    They take turns, so that a slow minute of the machine meets all alike.
    """

    def finish(piece: Callable) -> None:
        piece()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    times = []
    for _ in range(runs):
        times.append([timeit(partial(finish, piece), number=1) for piece in work])
    return torch.tensor(times).quantile(0.5, 0).tolist()


def peak_bytes(work: Callable, device: torch.device) -> int:
    """Return the bytes of tensors at the peak of some work, on top of those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()

    # On a CPU, add up all that is allocated and freed along the way.
    activities = [profiler.ProfilerActivity.CPU]
    with profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    changes = [event.nbytes() for event in events]
    in_use = torch.tensor([0, *changes]).cumsum(0)
    return int(in_use.max())


def count_flops(work: Callable) -> int:
    """Return the FLOPs of the convolutions and matrix products in some work."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def product_rate(machine: Machine, runs: int) -> tuple[int, float]:
    """Return n and the FLOP/s of a product of two n x n matrices."""
    n = 8192 if machine.device.type == "cuda" else 2048
    a = torch.randn(n, n, device=machine.device)
    with machine.autocast():
        seconds, = median_seconds([lambda: a @ a], WARMUP_RUNS + runs, machine.device)
    return n, 2 * n ** 3 / seconds
