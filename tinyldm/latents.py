"""The latent cache: E sees each picture once, and training reads its latents from disk.

Paper:   Sec. 3.1 and App. E.2: E encodes the set once; stage two never sees a pixel again.
Shapes:  a shard has mean and std (512, c_z, h, w) in fp16, unscaled, y (512, ...) as it is, and
         in float64 sums (4,): the number of values, the sums of mean, mean^2 and std^2.
Reads:   autoencoder.py (Posterior), checkpoint.py, data.py
No more than a shard is ever in memory. z is still sampled anew at each step."""
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import distributed as dist
from tqdm import tqdm

from tinyldm.autoencoder import Posterior
from tinyldm.checkpoint import save_checkpoint, unpickle
from tinyldm.data import loader

SHARD = 512

@torch.no_grad()
def encode(ae: torch.nn.Module, data, parts: list[range], workers: int, device, to_y: Callable,
           show: bool = False) -> Iterator[tuple[Posterior, torch.Tensor]]:
    """E's posterior, and y, of the items of each part (from len(data) on: mirrored), on the CPU."""
    order = [list(part[i:i + 64]) for part in parts for i in range(0, len(part), 64)]
    bar = tqdm(order, "encoding", disable=not (show and order), dynamic_ncols=True)
    batches = loader(data, bar, workers)
    for part in parts:
        rows = []
        for b in islice(batches, -(-len(part) // 64)):
            q = ae.encode(b["image"].to(device))
            rows.append((q.mean.float().cpu(), q.logvar.float().cpu(), to_y(b)))
        mean, logvar, y = map(torch.cat, zip(*rows))
        yield Posterior(mean, logvar), y

def fingerprint(ae: torch.nn.Module, *what) -> str:
    """A hash of E's weights and of all else, a data set, too, that decides what a cache holds."""
    told = json.dumps(what, default=lambda v: v.told() if hasattr(v, "told") else vars(v))
    h = hashlib.sha256(told.encode())
    for name, v in ae.state_dict().items():
        h.update(v.cpu().contiguous().numpy() if name != "z_std" else b"")
    return h.hexdigest()[:16]

class Latents:
    """The latents and y of items 0..n-1 of a set, mapped from the shards in `folder`.
    Missing shards are made first, by all processes together; a killed run goes on at its first
    unfinished one. Raises BadInput where one cannot be written, or is damaged."""
    def __init__(self, folder: Path, ae: torch.nn.Module, data, n: int, workers: int, device,
                 to_y: Callable, rank: int = 0, world: int = 1):
        paths = [folder / f"{i:06}.pt" for i in range(-(-n // SHARD))]
        todo = [i for i in range(rank, len(paths), world) if not paths[i].exists()]
        parts = [range(i * SHARD, min((i + 1) * SHARD, n)) for i in todo]
        for i, (q, y) in zip(todo, encode(ae, data, parts, workers, device, to_y, rank == 0)):
            q = q.scaled(1 / ae.z_std.cpu())
            m, v = q.mean.double(), q.logvar.double().exp()
            sums = torch.stack([torch.tensor(m.numel()), m.sum(), m.square().sum(), v.sum()])
            part = paths[i].with_suffix(f".{os.getpid()}")      # another run may be making it, too
            save_checkpoint({"mean": m.half(), "std": v.sqrt().half(), "y": y, "sums": sums}, part)
            part.replace(paths[i])
        if world > 1:
            dist.barrier()
        self.shards = [unpickle(path, f"{path}", mmap=True) for path in paths]

    def __getitem__(self, items: list[int]) -> tuple[Posterior, torch.Tensor]:
        """q(z | x), unscaled, and y of some items."""
        mean, std, y = (torch.stack([self.shards[i // SHARD][k][i % SHARD] for i in items])
                        for k in ("mean", "std", "y"))
        return Posterior(mean.float(), 2 * std.float().log()), y

    def std(self) -> torch.Tensor:
        """Posterior.std() of all of them: the paper's sigma-hat."""
        n, m, m2, v = sum(shard["sums"] for shard in self.shards)
        return ((m2 - m * m / n) / (n - 1) + v / n).sqrt()
