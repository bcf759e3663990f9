"""The log of a training run: a progress bar, lines on the terminal and in OUT/log.jsonl."""
import contextlib
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tinyldm.engine.checkpoint import atomic_write
from tinyldm.engine.processes import Machine, from_main_process, mean_over_processes
from tinyldm.errors import trying


class Log:
    """Writes means of training figures and results of evaluations.

    Only the main process prints and writes. `evaluated` is the last step that has evaluation
    results in the log. A resumed run keeps the lines up to its first step, so the file has no
    step twice.
    """

    def __init__(self, folder: Path, *, done: int, steps: int, batch: int, machine: Machine):
        self.path = folder / "log.jsonl"
        self.done = done
        self.steps = steps
        self.batch = batch
        self.machine = machine

        # The sums of the figures since the last line, and the time that they took.
        self.sums: Counter[str] = Counter()
        self.n_added = 0
        self.last_written = done
        self.clock_started = time.perf_counter()

        evaluated = self._keep_lines_up_to(done) if machine.main else 0
        self.evaluated = from_main_process(evaluated, machine.device)

        if done:
            self.note(f"{folder}: {done} of {steps} steps are done")
        self.bar = tqdm(total=steps, initial=done, disable=not machine.main, dynamic_ncols=True)

    def _keep_lines_up_to(self, done: int) -> int:
        """Drop the lines after step `done`; return the last step that was evaluated."""
        kept = []
        if done and self.path.exists():
            # A killed run may have left half a line, which has no line end.
            lines = self.path.read_text().split("\n")[:-1]
            kept = [row for row in map(json.loads, lines) if row["step"] <= done]
        with atomic_write(self.path) as file:
            for row in kept:
                file.write(f"{json.dumps(row)}\n".encode())

        # Lines of training figures have the time of a step, "ms"; evaluations have not.
        return max((row["step"] for row in kept if "ms" not in row), default=0)

    def is_due(self, step: int, every: int) -> bool:
        """Return whether something that happens every `every` steps, and at the end, is due."""
        return step % every == 0 or step == self.steps

    def evaluation_is_missing(self, every: int) -> bool:
        """Return whether an earlier run was stopped between its last step and its evaluation."""
        return self.evaluated < self.done and self.is_due(self.done, every)

    def note(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.machine.main:
            tqdm.write(text)

    def add(self, **figures: Tensor | float) -> None:
        """Add a step's figures to the means of the next line."""
        self.sums.update(figures)
        self.n_added += 1

    def step_done(self) -> None:
        """Move the progress bar by one step."""
        self.bar.update()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock: what happens inside is not part of a step's time."""
        start = time.perf_counter()
        yield
        self.clock_started += time.perf_counter() - start

    def write_means(self, step: int) -> None:
        """Write the means of what was added since the last line, over all processes."""
        now = time.perf_counter()
        seconds = (now - self.clock_started) / max(1, step - self.last_written)
        values = [float(v) / self.n_added for v in self.sums.values()]
        means = torch.tensor(values, dtype=torch.float32, device=self.machine.device)
        means = mean_over_processes(means).tolist()

        self.write(
            step,
            **dict(zip(self.sums, means)),
            ms=seconds * 1e3,
            img_per_s=self.batch / seconds,
            gb=peak_memory(self.machine.device) / 2 ** 30,
            eta_min=seconds * (self.steps - step) / 60,
        )
        self.sums.clear()
        self.n_added = 0
        self.last_written = step
        self.clock_started = now

    def write(self, step: int, **values: Tensor | float) -> None:
        """Write one line on the terminal and in log.jsonl."""
        if not self.machine.main:
            return
        row = {name: float(v) for name, v in values.items()}
        text = " | ".join(f"{name} {readable(v)}" for name, v in row.items())
        tqdm.write(f"step {step:05d}/{self.steps:05d} | {text}")
        with trying(f"cannot write {self.path}"), open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")

    def close(self) -> None:
        """Leave the progress bar as it is."""
        self.bar.close()


def readable(v: float) -> str:
    """Return a number with three digits, or with thousands separated."""
    return f"{v:,.0f}" if abs(v) >= 1e3 else f"{v:.3g}"


class StopOnSignal:
    """Notes SIGINT and SIGTERM in `requested`: the run then saves and ends.

    A second signal ends the run at once.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def as_tensor(self, device: torch.device) -> Tensor:
        """Return `requested` as a scalar on a device, to be shared among processes."""
        return torch.tensor(self.requested, device=device)

    def _note(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)
        text = "stopping after this step; the same command continues from there"
        tqdm.write(text, file=sys.stderr)


def peak_memory(device: torch.device) -> int:
    """Return the most memory that this process has used, in bytes.

    On CUDA it is the device's memory, elsewhere the process's; 0 on Windows without CUDA,
    which does not tell.
    """
    if device.type == "cuda" or sys.platform == "win32":
        return torch.cuda.max_memory_allocated()
    import resource  # Windows does not have it

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    return peak * unit


def add_weighted(sums: dict[str, Tensor], figures: dict[str, Tensor], weight: float) -> None:
    """Add weight * figures to sums: a batch's mean from those of its micro-batches."""
    for name, v in figures.items():
        sums[name] = sums.get(name, 0) + v.detach() * weight
