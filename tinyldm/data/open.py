"""Open the data set that a run asks for."""
from collections.abc import Sequence
from pathlib import Path

from tinyldm.data.dataset import ImageDataset
from tinyldm.data.degrade import Degraded
from tinyldm.data.folder import Folder
from tinyldm.data.images import both_sides
from tinyldm.data.shapes import Shapes
from tinyldm.errors import require

N_HELD_OUT_SHAPES = 256
BUNDLED_EMOJI = Path(__file__).parent.parent / "emoji.zip"     # drawn by data/emoji.py


def open_dataset(
    path: str,
    split: str = "train",
    *,
    size: int | tuple[int, int],
    channels: int = 3,
    seed: int = 0,
    n_shapes: int = 10_000,
    resize: bool = True,
    flip: bool = False,
    hold_out: bool = True,
    label_column: str = "label",
    fields: Sequence[str] = (),
    degrade: str | None = None,
    small: str | None = None,
    share_hidden: float = 0.0,
) -> ImageDataset:
    """Open a data set. To make `--data` know a new kind of data set, open it here.

    path: "shapes" for the built-in world, "emoji" for the bundled emoji, or a folder, .zip
        or .tar.
    split: "train" or "held-out".
    size: (H, W) of the images, in pixels, or the side of square ones.
    channels: 1 for grey images, 3 for RGB, 4 for RGBA.
    seed: of the built-in world, of what images lack (degrade.py), and of the choice
        among several captions.
    n_shapes: the number of training images of the built-in world.
    resize, label_column: see Folder.
    hold_out: keep images back as the split "held-out"; else all are for training. The built-in
        world always holds scenes out.
    flip: mirror training images in every second epoch.
    fields: what each item must have for the task; `mask` is made for it, and `small`
        too, unless the set has small images of its own.
    degrade: make `small` in this way, "bicubic" or "chain" (degrade.py); default: bicubic,
        only if the set has none.
    small: a folder, .zip or .tar of small images (see Folder).
    share_hidden: the share of masks, 0..1, that hide all of their image.

    Raises BadInput if there are no images at the path, or one of them lacks a field.
    """
    flip = flip and split == "train"
    if path == "shapes":
        require(small is None, "shapes: the small images of the built-in world are made")
        h, w = both_sides(size)
        require(h == w, f"shapes: the images of the built-in world are square, not {h}x{w}")
        require(channels == 3, f"shapes: the built-in world has 3 channels, not {channels}")
        n = n_shapes if split == "train" else N_HELD_OUT_SHAPES
        data = Shapes(n, h, seed, split)
        # NB: this world is not mirrored; as always, its second epoch has new images.
        data.flip = flip
    else:
        if path == "emoji":
            path = str(BUNDLED_EMOJI)
        data = Folder(
            path, size, split, resize, flip, label_column, channels, seed, small, hold_out
        )

    require(
        degrade != "chain" or "small" not in fields or channels in (1, 3),
        f"degrade {degrade}: its JPEGs have 1 or 3 channels, not {channels}; take bicubic",
    )
    makes_small = degrade is not None or not data.has_small
    for field in fields:
        if field == "mask" or (field == "small" and makes_small):
            data = Degraded(data, field, seed, degrade == "chain", share_hidden)
        else:
            data.require_field(field)
    return data
