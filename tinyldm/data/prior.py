"""A few images of something new, mixed with many of what a model knows already.

Paper: DreamBooth (Ruiz et al. 2023), Sec. 3.2, the prior-preservation loss.

Why: a model that goes on training on a few images alone learns them, and forgets the rest.
The prior set, sampled from the model itself before, keeps what it knew.
"""
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from tinyldm.data.dataset import ImageDataset, content_bytes
from tinyldm.data.renumber import Renumbered
from tinyldm.errors import require

DEFAULT_WEIGHT = 0.5


class WithPrior(ImageDataset):
    """The images of a few, then those of a prior set, of which an epoch has a given share.

    weight: the share of the prior set, 0..1, both excluded. An epoch has every image at least
        once, and those of one of the two sets more often, so that the share is right.
        NB: DreamBooth adds lambda times the loss of the prior set to that of the few. Here
        both are in one batch; lambda = weight / (1 - weight), so 0.5 is the paper's 1.

    Classes of one name are one class. Raises BadInput if an image is in both sets.
    """

    def __init__(self, few: ImageDataset, prior: ImageDataset, weight: float = DEFAULT_WEIGHT):
        check_apart(few, prior)
        label_names = joined_names(few.label_names, prior.label_names)
        box_names = joined_names(few.box_names, prior.box_names)
        names = {"label_names": label_names, "box_names": box_names}
        self.few = Renumbered(few, **names)
        self.prior = Renumbered(prior, **names)
        self.weight = weight
        self.repeats = numbers_of_repeats(len(few), len(prior), weight)

        self.label_names = label_names
        self.box_names = box_names
        self.map_names = few.map_names
        self.has_exact_scorer = few.has_exact_scorer
        self.has_several_captions = few.has_several_captions or prior.has_several_captions

    def __len__(self) -> int:
        return len(self.few) + len(self.prior)

    def load(self, k: int) -> dict[str, Any]:
        return self[k]

    def __getitem__(self, i: int) -> dict[str, Any]:
        data, own_i, first_row = self.locate(i)
        item = data[own_i]
        if "row" in item:
            item["row"] += first_row
        return item

    def locate(self, i: int) -> tuple[ImageDataset, int, int]:
        """Return the set that item i is from, its number there, and the set's first image."""
        epoch, k = divmod(i, len(self))
        n_few = len(self.few)
        if k < n_few:
            return self.few, epoch * n_few + k, 0
        return self.prior, epoch * len(self.prior) + k - n_few, n_few

    @property
    def epochs_that_differ(self) -> int:
        return max(self.few.epochs_that_differ, self.prior.epochs_that_differ)

    def summary(self) -> list[str]:
        mixed = f"{len(self.few):,} images, and {len(self.prior):,} of the prior set mixed in"
        share = f"{mixed}: {100 * self.weight:g} % of each epoch"
        return [*self.few.summary(), *self.prior.summary(), share]

    def captions(self) -> list[str]:
        return self.few.captions() + self.prior.captions()

    def caption(self, i: int, row: int) -> str:
        data, own_i, first_row = self.locate(i)
        return data.caption(own_i, row - first_row)

    def name(self, k: int) -> str:
        data, own_k, _ = self.locate(k)
        return data.name(own_k)

    def prompts(self, n: int) -> list[str] | None:
        return self.few.prompts(n)

    def seen_labels(self) -> Sequence[int]:
        return sorted({*self.few.seen_labels(), *self.prior.seen_labels()})

    def require_field(self, name: str) -> None:
        self.few.require_field(name)
        self.prior.require_field(name)

    def fingerprint(self) -> list:
        return [self.few.fingerprint(), self.prior.fingerprint()]


def joined_names(names: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    """Return the names of both lists, each once."""
    return tuple(dict.fromkeys([*names, *others]))


def numbers_of_repeats(n_few: int, n_prior: int, weight: float) -> np.ndarray:
    """Return how often an epoch has each image, those of the few first.

    The share of the prior set is weight, to the nearest number of images.
    """
    odds = weight / (1 - weight)                # images of the prior set per image of the few
    from_few = max(n_few, round(n_prior / odds))
    from_prior = max(n_prior, round(n_few * odds))

    # Where images cannot all come equally often, the first ones come once more.
    few = np.bincount(np.arange(from_few) % n_few)
    prior = np.bincount(np.arange(from_prior) % n_prior)
    return np.concatenate([few, prior])


def check_apart(few: ImageDataset, prior: ImageDataset) -> None:
    """Raise BadInput that names two images with the same pixels, one of each set."""
    names = {}
    for k in range(len(few)):
        names[digest_of_image(few, k)] = few.name(k)

    for k in tqdm(range(len(prior)), "prior set", delay=1, dynamic_ncols=True):
        same = names.get(digest_of_image(prior, k))
        require(
            same is None,
            f"{prior.name(k)} is the same image as {same}; a prior set holds others, which "
            "the model knew before",
        )


def digest_of_image(data: ImageDataset, k: int) -> bytes:
    """Return a hash of the pixels of image k."""
    image = data.load(k)["image"]
    return hashlib.sha256(content_bytes(image)).digest()
