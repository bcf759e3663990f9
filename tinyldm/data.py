"""Image folders, batches in a fixed order, and the latent cache.

Paper:   Sec. 3.1 and App. E.2: E encodes the set once; stage two never sees a pixel again.
Shapes:  an item is a dict: image float (3, H, W) in [-1, 1], and what is known of caption str,
         label int, boxes (K, 5) [class, x0, y0, x1, y1 in 0..1], segmentation int (H, W), and of
         what degrade.py makes: small, mask.
Reads:   autoencoder.py (Posterior), shapes.py, degrade.py
A folder, or a .zip of one, holds pictures in any depth. What is known of them stands in
`metadata.jsonl` (file_name; text, label, boxes in pixels, mask = path of a label map), or else in a
.txt beside each picture, and the names of the sub-folders are labels."""
import functools
import io
import json
import os
import warnings
import zipfile
import zlib
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterable
from itertools import chain, count, islice
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tinyldm import BadInput, require, trying
from tinyldm.autoencoder import Posterior
from tinyldm.degrade import Degraded, to_tensor
from tinyldm.shapes import Shapes

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")         # an EPS would start GhostScript
COLUMNS = {                     # of metadata.jsonl, and what to do where a picture has none
    "caption": ("text", 'give it a .txt beside it, or a "text" in metadata.jsonl'),
    "label": ("label", 'put it into a sub-folder named so, or a "label" into metadata.jsonl'),
    "boxes": ("boxes", 'give it "boxes" in metadata.jsonl: [[class, x0, y0, x1, y1 in px], ...]'),
    "segmentation": ("mask", 'give it a "mask" in metadata.jsonl: the file of its label map')}
NEAREST, LANCZOS = Image.Resampling.NEAREST, Image.Resampling.LANCZOS
Image.MAX_IMAGE_PIXELS = 64_000_000                     # more is refused as a decompression bomb

@functools.cache
def open_zip(path: Path, changed: int, process: int) -> zipfile.ZipFile:
    """Opened once in each process, as an inherited file shares its position; anew when changed."""
    return zipfile.ZipFile(path)

def is_box(b) -> bool:
    """Is it [class, x0, y0, x1, y1] with finite sides?"""
    return isinstance(b, list) and len(b) > 4 and all(
        isinstance(v, int | float) and abs(v) < 1e9 for v in b[1:5])

class Folder(Dataset):
    """The pictures of a folder or .zip as items of `size` px; one in 20 is held out.
    split: `train`, `held-out` or `all`. resize: the shorter side is scaled to `size` before the
    centre crop; without, the crop is cut as it is. flip: every second epoch is mirrored, maps and
    boxes, too (picture k in epoch e is item e * len + k). Raises BadInput for an empty folder, bad
    metadata, or a picture smaller than the crop."""
    def __init__(self, path: str, size: int, split: str = "train", resize: bool = True,
                 flip: bool = False, label: str = "label"):
        self.path, self.size, self.resize, self.flip = Path(path), size, resize, flip
        self.zipped, self.bad = self.path.suffix == ".zip", set()
        rows = [r | {"label": r[label]} if label in r else r for r in self._rows()]
        self.labels = sorted({str(r["label"]) for r in rows if "label" in r})
        self.classes = sorted({str(b[0]) for r in rows for b in r.get("boxes", [])})
        self.rows = [r for r in rows if split == "all" or
                     (zlib.crc32(r["file_name"].encode()) % 20 == 0) == (split == "held-out")]
        require(self.rows or split == "held-out",
                f"--data {path}: no pictures in it ({', '.join(PICTURES)})")

    def __len__(self):
        return len(self.rows)

    def need(self, field: str) -> None:
        """Raises BadInput naming a picture without this field, and what to do."""
        column, cure = COLUMNS.get(field, ("file_name", ""))
        for row in self.rows:
            require(column in row, f"--data {self.path}: {row['file_name']} has no {field}; {cure}")

    def captions(self) -> list[str]:
        return [str(row["text"]) for row in self.rows]

    def read(self, name: str) -> bytes:
        if not self.zipped:
            return (self.path / name).read_bytes()
        size = self._zip().getinfo(name).file_size              # read() gives no more than this
        require(size < 2 ** 28, f"--data {self.path}: {name!r:.99} has {size:,} bytes; unpack it")
        return self._zip().read(name)

    def _zip(self) -> zipfile.ZipFile:
        return open_zip(self.path, os.stat(self.path).st_mtime_ns, os.getpid())

    def _rows(self) -> list[dict]:
        """What is known of each picture, from metadata.jsonl or from names and .txt files."""
        require(self.zipped or self.path.is_dir(), f"--data {self.path}: no such folder")
        with trying(f"--data {self.path}: cannot be read"):
            names = self._zip().namelist() if self.zipped else (
                p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
            names = sorted(n for n in names if not n.endswith("/"))
            have, rows = set(names), []
            if "metadata.jsonl" in have:
                lines = self.read("metadata.jsonl").decode("utf8", "replace").splitlines()
                return [self._row(line, f"--data {self.path}: metadata.jsonl line {i}:", have)
                        for i, line in enumerate(lines, 1) if line.strip()]
            for path in map(PurePosixPath, names):
                if path.suffix.lower() in PICTURES:
                    rows.append({"file_name": str(path)})
                    if path.parent.name:
                        rows[-1]["label"] = str(path.parent)
                    if (text := str(path.with_suffix(".txt"))) in have:
                        rows[-1]["text"] = self.read(text).decode("utf8", "replace").strip()
            return rows

    def _row(self, line: str, where: str, have: set[str]) -> dict:
        """A line of metadata.jsonl, without what is null in it."""
        with trying(f"{where} not JSON"):
            row = json.loads(line)
        require(isinstance(row, dict) and isinstance(row.get("file_name"), str),
                f'{where} needs an object with a "file_name"')
        row = {k: v for k, v in row.items() if v is not None}
        for key in {"file_name", "mask"} & row.keys():
            require(isinstance(row[key], str) and row[key] in have,
                    f"{where} {key} {row[key]!r:.99} is not in the folder")
        boxes = row.get("boxes", [])
        require(isinstance(boxes, list) and all(map(is_box, boxes)),
                f'{where} "boxes" must be [[class, x0, y0, x1, y1], ...] in pixels')
        return row

    def __getitem__(self, i: int) -> dict:
        epoch, k = divmod(i, len(self))
        row, whole = self.readable(k)
        side = min(whole.size) if self.resize else self.size
        require(side <= min(whole.size),
                f"--data: {row['file_name']} is {whole.width}x{whole.height}, smaller than the "
                f"crop of {side}; drop --no-resize or take a smaller --size")
        x, y = ((v - side) // 2 for v in whole.size)
        shown, square = (x, y, x + side, y + side), (self.size, self.size)
        item = {"image": to_tensor(whole.resize(square, LANCZOS, shown))}
        if "text" in row:
            item["caption"] = str(row["text"])
        if "label" in row:
            item["label"] = self.labels.index(str(row["label"]))
        if "boxes" in row:
            b = [[float(self.classes.index(str(kind))), *at[:4]] for kind, *at in row["boxes"]]
            b = torch.tensor(b).reshape(-1, 5)
            b[:, 1:] = ((b[:, 1:] - torch.tensor([x, y, x, y])) / side).clamp(0, 1)
            item["boxes"] = b[(b[:, 3:] > b[:, 1:3]).all(1)]
        if "mask" in row:
            with trying(f"--data {self.path}: {row['mask']} cannot be read"):
                m = load_map(self.read(row["mask"]))
            part = [v * n / of for v, n, of in zip(shown, m.size * 2, whole.size * 2)]
            item["segmentation"] = torch.from_numpy(np.int64(m.resize(square, NEAREST, part)))
        if self.flip and epoch % 2 == 1:
            item |= {k: item[k].flip(-1) for k in {"image", "segmentation"} & item.keys()}
            if "boxes" in item:
                item["boxes"][:, [1, 3]] = 1 - item["boxes"][:, [3, 1]]
        return item

    def readable(self, k: int) -> tuple[dict, Image.Image]:
        """Row k and its picture; instead of an unreadable picture, the next readable one."""
        for j in range(k, k + len(self)):
            row = self.rows[j % len(self)]
            if (name := row["file_name"]) not in self.bad:
                try:
                    return row, load_rgb(self.read(name))
                except Exception as e:                      # strangers' files raise anything
                    self.bad.add(name)
                    warnings.warn(f"{name} is skipped: {e} ({len(self.bad)} so far)", stacklevel=2)
        raise BadInput(f"--data {self.path}: none of its {len(self)} pictures can be read")

def load(data: bytes) -> Image.Image:
    """A picture file's bytes, decoded and upright as its EXIF says; a bomb is an error before."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=FORMATS))

def load_map(data: bytes) -> Image.Image:
    """A label map's bytes -> a picture of one channel of class numbers. Raises as load()."""
    image = load(data)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"has {len(image.getbands())} channels; a label map has one, or a palette")
    return image

def load_rgb(data: bytes) -> Image.Image:
    """A picture file's bytes -> RGB, transparency laid on white. Raises as load()."""
    image = load(data)
    if image.mode.startswith("I;16"):                       # which Pillow would clip at 255
        image = image.point(lambda v: v / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def batch_order(n: int, batch: int, done: int, steps: int, seed: int, rank=0, world=1):
    """The items of each training step: a new shuffle each epoch, a function of (seed, epoch).
    Yields a list of items for the steps after `done`, up to `steps`: this process's slice of the
    batch. Picture k in epoch e is item e * n + k, so that a set may show it another way round."""
    epoch, k = divmod(done * batch, n)
    epochs = (e * n + np.random.default_rng([seed, e]).permutation(n) for e in count(epoch))
    items = islice(chain.from_iterable(epochs), k, None)
    for _ in range(done, steps):
        whole = [int(i) for i in islice(items, batch)]
        yield whole[rank * batch // world:(rank + 1) * batch // world]

def collate(items: list[dict]) -> dict:
    """A batch: image (B, 3, H, W), and as a list every other field that all items have."""
    batch = {k: [i[k] for i in items] for k in set.intersection(*map(set, items))}
    return batch | {"image": torch.stack(batch["image"])}

def loader(data: Dataset, order: Iterable, workers: int, cuda: bool = False) -> Iterable[dict]:
    """Batches of items in the order of the lists that `order` yields. Raises BadInput."""
    try:
        yield from DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=collate,
                              pin_memory=cuda)
    except BadInput as e:                           # a worker's has its whole traceback as message
        raise BadInput(str(e).rpartition("BadInput: ")[2].strip()) from e.with_traceback(None)

@torch.no_grad()
def encode_set(ae: torch.nn.Module, data, n: int, workers: int, device, show: bool,
               to_y: Callable) -> tuple[Posterior, torch.Tensor]:
    """The latent cache: E's posterior for items 0..n-1 (from len on: mirrored), and their y.
    Means and log-variances (n, c_z, h, w) stay on the CPU; z is still sampled anew at each step."""
    order, parts = [list(range(i, min(i + 64, n))) for i in range(0, n, 64)], []
    order = tqdm(order, "encoding", disable=not show, dynamic_ncols=True)
    for b in loader(data, order, workers):
        q = ae.encode(b["image"].to(device))
        parts.append((q.mean.float().cpu(), q.logvar.float().cpu(), to_y(b)))
    mean, logvar, y = (torch.cat(v) for v in zip(*parts))
    return Posterior(mean, logvar), y

def data_flags(parser) -> None:
    g = parser.add_argument_group("data")
    g.add_argument("--data", help="shapes (the built-in world), or a folder or .zip of pictures")
    g.add_argument("--n-shapes", type=int, default=10_000, help="pictures of the built-in world")
    g.add_argument("--size", type=int, help="side of the square training pictures, px")
    g.add_argument("--resize", action=BooleanOptionalAction, default=True, help="before the crop")
    g.add_argument("--flip", action="store_true", help="mirror pictures in every second epoch")
    g.add_argument("--label-column", default="label", help="of metadata.jsonl, for --task class")
    g.add_argument("--degrade", choices=["bicubic", "chain"], default="bicubic",
                   help="for superres; chain: blur, noise and JPEG, too")

def open_data(args, split: str = "train", fields: tuple[str, ...] = ()) -> Dataset:
    """The data set of the flags, with these fields in its items. Raises BadInput."""
    if args.data is None:
        raise BadInput(f"--data: preset {args.preset} has none of its own; give a folder or .zip")
    if args.data == "shapes":
        data = Shapes(args.n_shapes if split == "train" else 256, args.size, args.seed, split)
    else:
        flip = split == "train" and args.flip
        data = Folder(args.data, args.size, split, args.resize, flip, args.label_column)
        for field in fields:
            data.need(field)
    for field in {"small", "mask"} & set(fields):
        data = Degraded(data, field, args.seed, args.degrade == "chain")
    return data
