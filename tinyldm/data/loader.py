"""Batches of items, in an order that follows from (seed, epoch) alone.

The number of processes, the number of workers and the step at which a run is resumed do
not change it.
"""
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tinyldm.errors import BadInput

# How many places an image in an archive may be moved by shuffling.
SHUFFLE_BUFFER = 5_000


def batch_order(
    n: int,
    batch: int,
    done: int,
    steps: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    shards: Sequence[str] | None = None,
    repeats: Sequence[int] | None = None,
) -> Iterator[list[int]]:
    """Yield this process's items for each step from `done` up to `steps`.

    Each epoch has every one of n images once, in a new order; image k in epoch e is
    item e * n + k. With `repeats` an epoch has image k repeats[k] times instead. A batch
    may have the last images of an epoch and the first of the next.

    rank, world: each process gets a part of the batch that a single process would get.
    shards: the archive that each image lies in, if any; see epoch_order.
    """
    items = endless_items(n, batch * done, seed, shards, repeats)
    for _ in range(done, steps):
        whole_batch = [int(item) for item in itertools.islice(items, batch)]
        start = rank * batch // world
        stop = (rank + 1) * batch // world
        yield whole_batch[start:stop]


def endless_items(
    n: int,
    n_skipped: int,
    seed: int,
    shards: Sequence[str] | None,
    repeats: Sequence[int] | None,
) -> Iterator[np.integer]:
    """Yield the items of epoch after epoch, without end, from a number of items on."""
    images = np.repeat(np.arange(n), 1 if repeats is None else repeats)
    if shards is not None:
        shards = np.asarray(shards)[images]
    first_epoch, k = divmod(n_skipped, len(images))
    for epoch in itertools.count(first_epoch):
        rng = np.random.default_rng([seed, epoch])
        items = epoch * n + images[epoch_order(len(images), rng, shards)]
        yield from items[k:]
        k = 0


def epoch_order(
    n: int, rng: np.random.Generator, shards: Sequence[str] | None = None
) -> np.ndarray:
    """Return 0..n-1 in random order.

    Images in archives get an order in which disks are read almost from start to end:
    the archives come one after another, at random, and each image at most
    SHUFFLE_BUFFER places from where it lies.
    """
    if shards is None:
        return rng.permutation(n)

    names, shard_of_image = np.unique(shards, return_inverse=True)
    rank_of_shard = rng.permutation(len(names))
    one_after_another = np.argsort(rank_of_shard[shard_of_image], kind="stable")

    moved_to = np.arange(n) + rng.uniform(0, SHUFFLE_BUFFER, n)
    return one_after_another[np.argsort(moved_to)]


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch: a dict with the fields that all items have.

    image is a tensor (B, C, H, W), each other field a list.
    """
    fields = set.intersection(*(set(item) for item in items))
    batch = {field: [item[field] for item in items] for field in fields}
    batch["image"] = torch.stack(batch["image"])
    return batch


def load_batches(
    data: Dataset, order: Iterable[list[int]], workers: int, pin: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield a batch for each list of items in `order`.

    workers: processes that load images; with 0, this process does.
    pin: put batches into page-locked memory, from which they go faster to a GPU.
    Raises BadInput where `data` does.
    """
    batches = DataLoader(
        data,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
    )
    try:
        yield from batches
    except BadInput as error:
        # The message of a worker's error is its traceback; our message is at the end.
        message = str(error).rpartition("BadInput: ")[2].strip()
        raise BadInput(message) from error.with_traceback(None)
