"""The latent cache: E sees each image once, and stage two reads the results from disk.

Paper:  Sec. 3.1, App. G (sigma-hat).
Shapes: a cache consists of shards, files of up to 512 items:
            mean, std  (n, c_z, h, w) of q(z | x) in fp16, not divided by z_std
            y          {name: (n, ...)}, the conditions
            sums       (4,) float64: how many values the means have; the sums of mean,
                       mean^2 and std^2

A cache holds q(z | x) and no z, which training samples anew at each step. Shards are
mapped into memory, so a cache may be larger than the memory.
"""
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed as dist, nn
from tqdm import tqdm

from tinyldm.autoencoder import Posterior
from tinyldm.data.dataset import ImageDataset
from tinyldm.data.loader import load_batches
from tinyldm.engine.checkpoint import save_checkpoint, unpickle
from tinyldm.errors import NotFinite

SHARD = 512     # items of a file; no more latents are in memory while they are made
BATCH = 64      # images that E sees at a time
VERSION = 2     # of the shards; version 1 had a tensor in the place of the dict y

Conditions = dict[str, Tensor]


@torch.no_grad()
def encode_dataset(
    ae: nn.Module,
    data: ImageDataset,
    parts: Sequence[range],
    workers: int,
    device: torch.device | str,
    to_y: Callable[[dict], Conditions],
    show: bool = False,
) -> Iterator[tuple[Posterior, Conditions]]:
    """Yield q(z | x), on the CPU, and the conditions y of each part of a data set.

    parts: ranges of items; those from len(data) on belong to the second epoch.
    to_y: makes y from a batch.
    show: show a progress bar.
    """
    batches = []
    for part in parts:
        starts = range(0, len(part), BATCH)
        batches += [list(part[start:start + BATCH]) for start in starts]
    loaded = load_batches(data, batches, workers)

    disable = not (show and batches)
    with tqdm(batches, "encoding", disable=disable, dynamic_ncols=True) as bar:
        for part in parts:
            means = []
            logvars = []
            conditions = []
            n_batches = -(-len(part) // BATCH)
            for batch in islice(loaded, n_batches):
                q = ae.encode(batch["image"].to(device))
                means.append(q.mean.float().cpu())
                logvars.append(q.logvar.float().cpu())
                check_latents(means[-1], logvars[-1], part[len(means) * BATCH - BATCH:], len(data))
                conditions.append(to_y(batch))
                bar.update()
            q = Posterior(torch.cat(means), torch.cat(logvars))
            yield q, concatenate(conditions)


def check_latents(mean: Tensor, logvar: Tensor, items: range, n_images: int) -> None:
    """Raise NotFinite, which names the first image, for latents that are not numbers.

    mean, logvar (B, c_z, h, w): q(z | x) of the first B items; a logvar may be -inf. A cache
    holds means in fp16, so these must be numbers there too.
    """
    is_bad = ~mean.half().isfinite() | ~logvar.exp().isfinite()     # (B, c_z, h, w)
    bad_rows = is_bad.flatten(1).any(1).nonzero()[:, 0]
    if len(bad_rows):
        k = items[int(bad_rows[0])] % n_images
        raise NotFinite(
            f"stage one's encoder gives latents of image {k} (from 0) that are not numbers (NaN "
            "or infinite); in half precision large values overflow, so try fp32; else stage one "
            "is damaged, or its training diverged"
        )


def concatenate(conditions: Sequence[Conditions]) -> Conditions:
    """Return the conditions of several batches as those of one."""
    whole = {}
    for name in conditions[0]:
        whole[name] = torch.cat([y[name] for y in conditions])
    return whole


def fingerprint(ae: nn.Module, data: ImageDataset, *others: Any) -> str:
    """Return a hash of all that a cache depends on: E's weights, the items, and others.

    others: values that JSON can hold, such as the task and its tokenizer. z_std is not
    part of it, because a cache holds latents that are not divided by z_std.
    """
    values = json.dumps([VERSION, data.fingerprint(), *others])
    digest = hashlib.sha256(values.encode())
    for name, weight in ae.state_dict().items():
        if name != "z_std":
            digest.update(weight.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


class Latents:
    """q(z | x) and y of items 0..n-1 of a data set, from the shards in a folder.

    Shards that are missing are made first, by all processes together. A file gets its
    name when it is complete, so a run that was killed goes on with the shard that it
    was making.

    A shard of an earlier version with values that are not numbers is made anew.

    Raises BadInput if a shard is damaged, cannot be written, or would hold such values.
    """

    def __init__(
        self,
        folder: Path,
        ae: nn.Module,
        data: ImageDataset,
        n: int,
        workers: int,
        device: torch.device | str,
        to_y: Callable[[dict], Conditions],
        rank: int = 0,
        world: int = 1,
    ):
        n_shards = -(-n // SHARD)
        paths = [folder / f"{i:06}.pt" for i in range(n_shards)]

        # The missing ones among every world-th shard are made by this process.
        missing = [i for i in range(rank, n_shards, world) if not is_usable(paths[i])]
        parts = [range(i * SHARD, min((i + 1) * SHARD, n)) for i in missing]
        encoded = encode_dataset(ae, data, parts, workers, device, to_y, show=rank == 0)
        for i, (q, y) in zip(missing, encoded):
            unscaled = q.scaled(1 / ae.z_std.cpu())
            write_shard(paths[i], unscaled, y)

        if world > 1:
            dist.barrier()
        self.shards = [unpickle(path, mmap=True) for path in paths]

    def __getitem__(self, items: Sequence[int]) -> tuple[Posterior, Conditions]:
        """Return q(z | x), not divided by z_std, and y of some items."""
        rows = [(self.shards[i // SHARD], i % SHARD) for i in items]
        mean = torch.stack([shard["mean"][row] for shard, row in rows]).float()
        std = torch.stack([shard["std"][row] for shard, row in rows]).float()
        y = {}
        for name in self.shards[0]["y"]:
            y[name] = torch.stack([shard["y"][name][row] for shard, row in rows])
        return Posterior(mean, 2 * std.log()), y

    def std(self) -> Tensor:
        """Return Posterior.std() over all items: the paper's sigma-hat.

        The variance of z is the variance of the means plus the mean of the variances.
        """
        sums = sum(shard["sums"] for shard in self.shards)
        n, mean, mean_squared, variance = sums
        variance_of_means = (mean_squared - mean * mean / n) / (n - 1)
        return (variance_of_means + variance / n).sqrt()


def is_usable(path: Path) -> bool:
    """Return whether a shard exists and all its latents are numbers, which their sums tell.

    Raises BadInput if the file is damaged.
    """
    return path.exists() and bool(unpickle(path, mmap=True)["sums"].isfinite().all())


def write_shard(path: Path, q: Posterior, y: Conditions) -> None:
    """Write one shard."""
    mean = q.mean.double()
    variance = q.logvar.double().exp()
    n = torch.tensor(mean.numel())
    shard = {
        "mean": mean.half(),
        "std": variance.sqrt().half(),
        "y": y,
        "sums": torch.stack([n, mean.sum(), mean.square().sum(), variance.sum()]),
    }

    # Another run may be making the same shard, so each writes to a file of its own.
    own = path.with_suffix(f".{os.getpid()}")
    save_checkpoint(shard, own)
    own.replace(path)
