"""A folder, .zip or .tar of images as a data set.

files.py finds the images and what is known of them. Here they become items: an image is
scaled and cropped to one size, and its boxes and its label map with it.
"""
import os
import warnings
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tinyldm.data.crops import (
    Crop,
    central_crop,
    cropped_boxes,
    has_shape,
    largest_crop,
    scaled_crop,
)
from tinyldm.data.dataset import ImageDataset
from tinyldm.data.files import Files
from tinyldm.data.images import (
    BICUBIC,
    LANCZOS,
    NEAREST,
    both_sides,
    image_loader,
    load_map,
    map_to_tensor,
    stored_orientation,
    to_tensor,
    turned_like,
    upright_size,
    why_unreadable,
)
from tinyldm.data.rows import (
    BOX_FORMAT,
    box_names,
    common_folder,
    files_of,
    label_names,
)
from tinyldm.data.summary import found_nothing, summarise
from tinyldm.errors import BadInput, require, trying

# Images with a shorter side are skipped: little but stripes would come of them.
LEAST_SIDE = 8

# For each field: the column of a row that it comes from, and what to do if it is
# missing.
FIELD_SOURCES = {
    "caption": ("text", 'give it a .txt beside it, or a "text" in metadata.jsonl'),
    "label": (
        "label",
        'put it into a sub-folder named so, or a "label" into metadata.jsonl',
    ),
    "boxes": (
        "boxes",
        'give it "boxes" in metadata.jsonl: [[class, x0, y0, x1, y1 in pixels], ...]',
    ),
    "segmentation": (
        "mask",
        'give it a "mask" in metadata.jsonl: the file of its label map',
    ),
    "small": (
        "small",
        'give it a "small" in metadata.jsonl, or a file of the same name in the folder of '
        "small images",
    ),
}


class Folder(ImageDataset):
    """The images of a folder, .zip or .tar, all scaled and cropped to one size.

    size: (H, W) in pixels, or the side of a square.
    split: "train", "held-out" (one image in 20, by a hash of its name) or "all".
    resize: scale an image so that it covers `size` before the central crop; else only
        crop.
    flip: mirror images, boxes and label maps in every second epoch.
    label_column: the key in metadata that holds an image's class.
    channels: 1 for grey images, 3 for RGB, 4 for RGBA.
    seed: decides which of several captions an epoch takes.
    small: a second folder, .zip or .tar, with a small image of the same name for each
        image; default: metadata says which are the small images, if there are any.
    hold_out: if not, no image is held out, and "train" has them all.

    Raises BadInput if there are no images, or if metadata is wrong. An image that
    cannot be read is replaced by the next one, with a warning.
    """

    def __init__(
        self,
        path: str,
        size: int | tuple[int, int],
        split: str = "train",
        resize: bool = True,
        flip: bool = False,
        label_column: str = "label",
        channels: int = 3,
        seed: int = 0,
        small: str | None = None,
        hold_out: bool = True,
    ):
        self.path = path
        self.size = both_sides(size)
        self.resize = resize
        self.flip = flip
        self.channels = channels
        self.load_image = image_loader(channels)
        self.seed = seed
        self.files = Files(path, label_column)

        rows = self.files.rows()

        # The small images, in metadata or in a folder of their own.
        self.small_files = self.files
        if small is not None:
            self.small_files = Files(small)
            rows = with_small(rows, self.small_files.rows())
        self.has_small = small is not None or any("small" in row for row in rows)

        # The classes of all images, so that they are the same for each split.
        self.label_names = label_names(rows)
        self.box_names = box_names(rows)
        self.has_several_captions = any(isinstance(row.get("text"), list) for row in rows)

        held_out = held_out_rows(rows) if hold_out else [False] * len(rows)
        self.rows = rows_of_split(rows, held_out, split)
        small_source = self.small_files.path
        left_out = self.files.left_out
        self.summary_lines = summarise(path, rows, sum(held_out), left_out, small_source)
        require(rows, found_nothing(path, left_out))
        require(
            self.rows or split == "held-out",
            f"{path}: its folders say that all of its {len(rows)} images are held out; put "
            "those to train on into a folder train beside them",
        )

        self.warned_of_turned = False

        # Which images could not be read. All processes that load images share it.
        self.unreadable = torch.zeros(len(self.rows), dtype=torch.bool).share_memory_()
        if self.files.places:
            self.shards = [self.files.container(row["file_name"]) for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def captions(self) -> list[str]:
        captions = []
        for row in self.rows:
            text = row["text"]
            captions += text if isinstance(text, list) else [text]
        return captions

    def caption(self, i: int, row: int) -> str:
        epoch, k = divmod(i, len(self))
        return self.choose_caption(self.rows[row]["text"], epoch, k)

    def name(self, k: int) -> str:
        return f"{self.path}: {self.rows[k]['file_name']}"

    def seen_labels(self) -> list[int]:
        seen = {row["label"] for row in self.rows if "label" in row}
        return [i for i, name in enumerate(self.label_names) if name in seen]

    def require_field(self, name: str) -> None:
        """Raise BadInput that names an image without the field, and says what to do.

        Boxes are also compared with the sizes of their images.
        """
        column, advice = FIELD_SOURCES.get(name, ("file_name", ""))
        for row in self.rows:
            message = f"{self.path}: {row['file_name']} has no {name}; {advice}"
            require(column in row, message)
        if name == "boxes":
            self._check_boxes()

    def _check_boxes(self) -> None:
        """Raise BadInput for a box outside its image; warn of those partly outside."""
        n_clipped = 0
        example = ""
        for row in tqdm(self.rows, "boxes", delay=1, dynamic_ncols=True):
            try:
                w, h = upright_size(self.files.read(row["file_name"]))
            except Exception:               # it is skipped later, with a warning
                continue
            for box in row["boxes"]:
                _, x0, y0, x1, y1 = box
                require(
                    x0 < w and y0 < h and x1 > 0 and y1 > 0,
                    f"{row['where']}: {box} lies outside its image of {w}x{h} (width x "
                    f"height); {BOX_FORMAT}",
                )
                if x0 < 0 or y0 < 0 or x1 > w or y1 > h:
                    n_clipped += 1
                    example = example or f"{row['where']}: {box} in {w}x{h}"
        if n_clipped:
            warnings.warn(
                f"{n_clipped:,} boxes reach beyond their images and are clipped (are they "
                f"x, y, width, height?), like {example}; {BOX_FORMAT}",
                stacklevel=3,
            )

    def summary(self) -> list[str]:
        return self.summary_lines

    def fingerprint(self) -> list:
        """Return what decides the items, and the states of the files they come from."""
        states = file_states(self.files, files_of(self.rows, ("file_name", "mask")))
        states += file_states(self.small_files, files_of(self.rows, ("small",)))
        how = [self.size, self.channels, self.resize, self.flip]
        return [how, self.label_names, self.box_names, self.rows, states]

    # ---- from files to items

    def load(self, k: int) -> dict[str, Any]:
        """Return the item of image k; BadInput if it is smaller than the crop."""
        j, image, data = self.readable(k)
        row = self.rows[j]
        crop = self.crop_of(j, image)
        h, w = self.size
        cropped = image.resize((w, h), LANCZOS, crop)
        item: dict[str, Any] = {"image": to_tensor(cropped)}
        if "text" in row:
            item["caption"] = row["text"]
            item["row"] = j
        if "label" in row:
            item["label"] = self.label_names.index(row["label"])
        if "boxes" in row:
            item["boxes"] = cropped_boxes(row["boxes"], self.box_names, crop)
        if "mask" in row:
            item["segmentation"] = self._label_map(row, crop, image.size, data)
        if "small" in row:
            item["small"] = self._small_image(row, crop, image.size, data)
        return item

    def readable(self, k: int) -> tuple[int, Image.Image, bytes]:
        """Return k, image k and its file's bytes, or those of the next that can be read.

        Raises BadInput if no image can be read.
        """
        for j in range(k, k + len(self)):
            j %= len(self)
            if self.unreadable[j]:
                continue
            try:
                data = self.read_image(j)
                return j, self.open_image(j, data), data
            except Exception as error:      # a stranger's file may raise anything
                self.unreadable[j] = True
                name = self.rows[j]["file_name"]
                count = f"({int(self.unreadable.sum())} so far)"
                warnings.warn(f"{name} is skipped: {why_unreadable(error)} {count}", stacklevel=2)

        raise BadInput(f"{self.path}: none of its {len(self)} images can be read")

    def read_image(self, k: int) -> bytes:
        """Return the bytes of the file of image k; raise any error."""
        return self.files.read(self.rows[k]["file_name"])

    def open_image(self, k: int, data: bytes) -> Image.Image:
        """Return image k from the bytes of its file; raise any error if it is damaged.

        The image may be smaller than its file says, except if it has boxes in pixels, or
        a small image, whose shape is compared with its own.
        """
        row = self.rows[k]
        may_be_smaller = self.resize and "boxes" not in row and "small" not in row
        least_side = 2 * max(self.size) if may_be_smaller else None
        image = self.load_image(data, least_side)
        check_sides(image)
        return image

    def crop_of(self, k: int, image: Image.Image) -> Crop:
        """Return the crop of image k, in its pixels.

        It is in the centre of the image, and has the shape of `size`. Raises BadInput if
        the image is smaller.
        """
        h, w = self.size
        crop_w, crop_h = largest_crop(image.size, (w, h)) if self.resize else (w, h)
        require(
            crop_w <= image.width and crop_h <= image.height,
            f"{self.path}: {self.rows[k]['file_name']} is {image.width}x{image.height} (width "
            f"x height), smaller than the crop of {w}x{h}; allow scaling, or take a smaller "
            "size",
        )
        return central_crop(image.size, (crop_w, crop_h))

    def _label_map(
        self, row: dict, crop: Crop, image_size: tuple[int, int], data: bytes
    ) -> Tensor:
        """The label map of a row, in the shape of its image but of any size -> (H, W)."""
        source = f"{self.path}: {row['mask']}"
        with trying(f"{source} cannot be read"):
            label_map = load_map(self.files.read(row["mask"]))
        label_map = self._turned_as_image(label_map, source, row, image_size, data)

        h, w = self.size
        map_crop = scaled_crop(crop, image_size, label_map.size)
        cropped = label_map.resize((w, h), NEAREST, map_crop)
        return map_to_tensor(cropped)

    def _small_image(
        self, row: dict, crop: Crop, image_size: tuple[int, int], data: bytes
    ) -> Tensor:
        """The small image of a row, cropped as its image -> (C, H / 4, W / 4).

        It is resized by the bicubic filter if it is not a quarter of the size already.
        """
        source = f"{self.small_files.path}: {row['small']}"
        with trying(f"{source} cannot be read"):
            small = self.load_image(self.small_files.read(row["small"]))
        small = self._turned_as_image(small, source, row, image_size, data)

        h, w = self.size
        small_crop = scaled_crop(crop, image_size, small.size)
        return to_tensor(small.resize((w // 4, h // 4), BICUBIC, small_crop))

    def _turned_as_image(
        self,
        other: Image.Image,
        source: str,
        row: dict,
        image_size: tuple[int, int],
        data: bytes,
    ) -> Image.Image:
        """Return the label map or the small image of a row, upright.

        data: the bytes of the image's file, which say how it is stored.

        It is upright, or lies as the image is stored in its file. Then it is turned with
        it. Raises BadInput, which begins with `source`, for one of another shape than its
        image.
        """
        if has_shape(other.size, image_size):
            self._warn_of_turned(row["file_name"], source, image_size, data)
            return other

        turned = turned_like(other, data)
        width, height = upright_size(data)
        require(
            has_shape(turned.size, image_size),
            f"{source} is {other.width}x{other.height} (width x height), but its image "
            f"{row['file_name']} is {width}x{height}; it must have the shape of its image",
        )
        return turned

    def _warn_of_turned(
        self, name: str, source: str, image_size: tuple[int, int], data: bytes
    ) -> None:
        """Warn once if EXIF data turn an image so that no shape shows how its map lies."""
        if self.warned_of_turned:
            return
        turn = stored_orientation(data)
        width, height = image_size
        shape_tells = turn >= 5 and not has_shape((width, height), (height, width))
        if turn > 1 and not shape_tells:
            self.warned_of_turned = True
            warnings.warn(
                f"{self.path}: EXIF data turn {name}, and the shape of {source} does not "
                "show whether it is turned too; it is taken as upright, as are all such",
                stacklevel=2,
            )


def check_sides(image: Image.Image) -> None:
    """Raise ValueError for an image that is too narrow to be scaled."""
    if min(image.size) < LEAST_SIDE:
        raise ValueError(
            f"it is {image.width}x{image.height}, narrower than {LEAST_SIDE} pixels"
        )


def with_small(rows: list[dict], small_rows: list[dict]) -> list[dict]:
    """Return rows with the names of the small images that have the same names.

    Folders around all images of a set do not count.
    """
    names = [row["file_name"] for row in small_rows]
    around_small = common_folder(names)
    small_names = {name.removeprefix(around_small): name for name in names}
    small_names |= {name: name for name in names}

    around = common_folder([row["file_name"] for row in rows])
    paired = []
    for row in rows:
        name = row["file_name"]
        row = {column: value for column, value in row.items() if column != "small"}
        small = small_names.get(name) or small_names.get(name.removeprefix(around))
        if small is not None:
            row["small"] = small
        paired.append(row)
    return paired


def file_states(files: Files, names: set[str]) -> list[list[int]]:
    """Return the states of the files on disk that some files are in."""
    containers = {files.container(name) for name in names}
    return [files.state(name) for name in sorted(containers)]


def held_out_rows(rows: Sequence[dict]) -> list[bool]:
    """Return for each row whether its image is held out.

    Folders like train/ and val/ say so. Elsewhere a hash of the file's name decides. Why:
    an image stays in its split while others come and go. A set so small that no image
    would be left to train on has none held out.
    """
    held_out = []
    for row in rows:
        if "split" in row:
            held_out.append(row["split"] == "held-out")
        else:
            by_hash = zlib.crc32(os.fsencode(row["file_name"])) % 20 == 0
            held_out.append(by_hash)

    by_folders = any("split" in row for row in rows)
    if all(held_out) and not by_folders:
        return [False] * len(rows)
    return held_out


def rows_of_split(rows: list[dict], held_out: list[bool], split: str) -> list[dict]:
    """Return the rows of a split: "train", "held-out" or "all"."""
    if split == "all":
        return rows
    wanted = split == "held-out"
    return [row for row, is_held_out in zip(rows, held_out) if is_held_out == wanted]
