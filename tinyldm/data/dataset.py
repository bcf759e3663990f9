"""What a data set is: ImageDataset, and ListDataset for a list that fits into memory.

An item is a dict of what is known about one image:

    image         (C, H, W) in [-1, 1]; all images of a data set have one size and as
                  many channels: C is 3 for RGB, 1 for grey, 4 for RGBA, or any number
    caption       str; where `load` gives several, each epoch takes one of them
    row           int, the image that the caption is of; by default it is k
    label         int, a class: its place in `label_names`
    boxes         (K, 5) [class, x0, y0, x1, y1]: a place in `box_names`, and corners as
                  shares of width and height, 0..1, from the top left
    segmentation  (H, W) int64, the class number of each pixel
    small         (C, H / 4, W / 4) in [-1, 1], the image with fewer pixels
    mask          (1, H, W), 1 in the holes of the image and 0 elsewhere

Only `image` is always there. A task needs some of the others (tasks.py); degrade.py
adds `small` and `mask` to any data set that lacks them.
"""
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from tinyldm.errors import require

# The fields that are images, which mirroring exchanges left and right in.
SPATIAL_FIELDS = ("image", "segmentation", "small", "mask")


class ImageDataset(Dataset):
    """A set of images. A new format is a subclass that defines `__len__` and `load`.

    Everything else has a default, which a subclass may replace. For example, images and
    labels from an .npz file:

        class Digits(ImageDataset):
            label_names = tuple("0123456789")

            def __init__(self, path):
                arrays = np.load(path)
                self.pixels = arrays["images"]          # (n, 32, 32) in 0..255
                self.labels = arrays["labels"]          # (n,)

            def __len__(self):
                return len(self.pixels)

            def load(self, k):
                grey = torch.tensor(self.pixels[k]) / 127.5 - 1
                image = grey.expand(3, 32, 32)
                return {"image": image, "label": int(self.labels[k])}
    """

    # With the epoch it decides which of several captions an image has.
    seed: int = 0

    # True if some image has several captions.
    has_several_captions: bool = False

    # True if the images of every second epoch are mirrored.
    flip: bool = False

    # The names of the classes of labels and of boxes.
    label_names: Sequence[str] = ()
    box_names: Sequence[str] = ()

    # The names of the classes 1, 2, ... of label maps whose 0 is the background.
    map_names: Sequence[str] = ()

    # The archive that each image lies in, if images are best read one after another.
    shards: Sequence[str] | None = None

    # How often an epoch has each image; None: once.
    repeats: Sequence[int] | None = None

    # True if images have small ones of their own, which need not be made (degrade.py).
    has_small: bool = False

    # True if scorer.py can tell whether an image fits its condition.
    has_exact_scorer: bool = False

    def __len__(self) -> int:
        """Return the number of images."""
        raise NotImplementedError

    def load(self, k: int) -> dict[str, Any]:
        """Return the item of image k, not mirrored; k is in 0..len(self)-1."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Return item i: with n images, image k in epoch e is item e * n + k."""
        epoch, k = divmod(i, len(self))
        item = self.load(k)
        if "caption" in item:
            caption = self.choose_caption(item["caption"], epoch, k)
            item = item | {"caption": caption, "row": item.get("row", k)}
        if self.flip and epoch % 2 == 1:
            return mirrored(item)
        return item

    @property
    def epochs_that_differ(self) -> int:
        """The number of epochs after which the items are the same again."""
        return 2 if self.flip else 1

    @property
    def n_distinct(self) -> int:
        """The number of items after which they repeat themselves."""
        return len(self) * self.epochs_that_differ

    def summary(self) -> list[str]:
        """Return one or two lines that say what was found, and what was left out."""
        return [f"{len(self):,} images"]

    def captions(self) -> list[str]:
        """Return all captions of all images. By default it loads the images."""
        captions = []
        for k in range(len(self)):
            found = self.load(k)["caption"]
            captions += [found] if isinstance(found, str) else found
        return captions

    def caption(self, i: int, row: int) -> str:
        """Return the caption of item i, which shows image `row` (the item's field `row`).

        By default it loads the image.
        """
        return self[i]["caption"]

    def choose_caption(self, found: str | Sequence[str], epoch: int, k: int) -> str:
        """Return the caption that image k has in an epoch; it follows from the seed."""
        if isinstance(found, str):
            return found
        rng = np.random.default_rng([self.seed, epoch, k])
        return found[rng.integers(len(found))]

    def name(self, k: int) -> str:
        """Return what messages call image k."""
        return f"image {k}"

    def prompts(self, n: int) -> list[str] | None:
        """Return n prompts to evaluate with; None means: take captions of images."""
        return None

    def seen_labels(self) -> Sequence[int]:
        """Return the classes that training images have."""
        return range(len(self.label_names))

    def require_field(self, name: str) -> None:
        """Raise BadInput if an item lacks a field. By default one item is looked at."""
        if len(self) > 0:
            require(name in self.load(0), f"the items of the data set have no {name}")

    def fingerprint(self) -> Any:
        """Return values, of the kinds that JSON has, that change whenever an item does.

        The latent cache belongs to them. By default they are a hash of all items, so
        each start of a run loads every image. A faster one has the sizes and times of
        change of the files, and everything else that `load` depends on.
        """
        contents = hashlib.sha256()
        for k in range(len(self)):
            item = self.load(k)
            for name in sorted(item):
                contents.update(name.encode())
                contents.update(content_bytes(item[name]))
        names = [list(self.label_names), list(self.box_names), list(self.map_names)]
        return [len(self), self.flip, names, contents.hexdigest()]


class Wrapped(ImageDataset):
    """The items of another data set, changed: a subclass defines `change`.

    Everything else that is known of them stays as it is, unless the subclass replaces it.
    """

    def __init__(self, data: ImageDataset):
        self.data = data
        self.seed = data.seed
        self.flip = data.flip
        self.label_names = data.label_names
        self.box_names = data.box_names
        self.map_names = data.map_names
        self.shards = data.shards
        self.repeats = data.repeats
        self.has_small = data.has_small
        self.has_exact_scorer = data.has_exact_scorer
        self.has_several_captions = data.has_several_captions

    def change(self, item: dict[str, Any], i: int) -> dict[str, Any]:
        """Return item i, changed; `item` is a dict of its own."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.data)

    def load(self, k: int) -> dict[str, Any]:
        return self[k]

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.change(dict(self.data[i]), i)

    @property
    def epochs_that_differ(self) -> int:
        return self.data.epochs_that_differ

    def summary(self) -> list[str]:
        return self.data.summary()

    def captions(self) -> list[str]:
        return self.data.captions()

    def caption(self, i: int, row: int) -> str:
        return self.data.caption(i, row)

    def name(self, k: int) -> str:
        return self.data.name(k)

    def prompts(self, n: int) -> list[str] | None:
        return self.data.prompts(n)

    def seen_labels(self) -> Sequence[int]:
        return self.data.seen_labels()

    def require_field(self, name: str) -> None:
        self.data.require_field(name)

    def fingerprint(self) -> Any:
        return self.data.fingerprint()


class ListDataset(ImageDataset):
    """A list of items is a data set:

        items = [{"image": x, "caption": "a red square"}, ...]
        data = ListDataset(items)

    If label_names is not given, the classes of labels are named after their numbers.
    """

    def __init__(
        self,
        items: Sequence[dict[str, Any]],
        *,
        label_names: Sequence[str] = (),
        box_names: Sequence[str] = (),
        map_names: Sequence[str] = (),
        flip: bool = False,
    ):
        if not label_names:
            n_classes = 1 + max((item.get("label", -1) for item in items), default=-1)
            label_names = [str(label) for label in range(n_classes)]
        self.items = items
        self.label_names = label_names
        self.box_names = box_names
        self.map_names = map_names
        self.flip = flip

    def __len__(self) -> int:
        return len(self.items)

    def load(self, k: int) -> dict[str, Any]:
        return self.items[k]

    def require_field(self, name: str) -> None:
        for k, item in enumerate(self.items):
            require(name in item, f"item {k} of the data set has no {name}")


def spread(n: int, length: int) -> list[int]:
    """Return n of the indices 0..length-1, spread evenly, as sets may be sorted.

    If n is larger than the length, they begin again from 0.
    """
    return [i * max(length, n) // n % length for i in range(n)]


def mirrored(item: dict[str, Any]) -> dict[str, Any]:
    """Return the item with left and right exchanged. NB: the caption stays as it is."""
    turned = dict(item)
    for name in SPATIAL_FIELDS:
        if name in item:
            turned[name] = item[name].flip(-1)

    if "boxes" in item:
        # The new left end is the old right end: x0 = 1 - x1, x1 = 1 - x0.
        boxes = item["boxes"].clone()
        boxes[:, [1, 3]] = 1 - boxes[:, [3, 1]]
        turned["boxes"] = boxes
    return turned


def content_bytes(value: Any) -> bytes:
    """Return bytes that are the same for two values only if they are equal."""
    if isinstance(value, Tensor):
        kind = f"{value.dtype} {tuple(value.shape)}"
        return kind.encode() + value.contiguous().numpy().tobytes()
    return repr(value).encode()
