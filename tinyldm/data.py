"""Sets of pictures, and batches of them in a fixed order; the latent cache: E sees each once.

Shapes:  an item is a dict: image float (3, H, W) in [-1, 1], and what is known of caption str,
         label int, boxes (K, 5) [class, x0, y0, x1, y1 in 0..1], segmentation int (H, W), and of
         what degrade.py makes: small, mask. A cache's shard: mean, std (512, c_z, h, w) in fp16,
         unscaled; y (512, ...); in float64 sums (4,): how many values, of mean, mean^2, std^2.
Paper: Sec. 3.1, App. E.2. Reads: files.py, shapes.py, degrade.py, autoencoder.py, checkpoint.py"""
import hashlib
import io
import json
import os
import warnings
import zlib
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterable
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tinyldm import BadInput, require, trying
from tinyldm.autoencoder import Posterior
from tinyldm.checkpoint import save_checkpoint, unpickle
from tinyldm.degrade import Degraded, to_tensor
from tinyldm.files import COLUMNS, PICTURES, Files
from tinyldm.shapes import Shapes

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")         # an EPS would start GhostScript
NEAREST, LANCZOS = Image.Resampling.NEAREST, Image.Resampling.LANCZOS
Image.MAX_IMAGE_PIXELS = 64_000_000                     # more is refused as a decompression bomb
BUFFER = 5_000                  # pictures among which those that lie one behind another are mixed
SHARD = 512                     # latents in a file of the cache: never is more than one in memory

class Folder(Dataset):
    """The pictures of a folder, .zip or .tar as items of `size` px; one in 20 is held out.
    split: `train`, `held-out`, `all`. resize: the shorter side is scaled to `size` before the crop
    of the centre. flip: every second epoch is mirrored, maps and boxes, too (picture k in epoch e
    is item e * len + k). label: a column of metadata.jsonl. tars: which each picture is in, if any.
    Raises BadInput for an empty folder, bad metadata, or a picture smaller than the crop."""
    def __init__(self, path: str, size: int, split="train", resize=True, flip=False, label="label"):
        self.path, self.size, self.resize, self.flip = path, size, resize, flip
        self.files, self.bad = Files(path, label), set()
        rows = self.files.rows()
        self.labels = sorted({str(r["label"]) for r in rows if "label" in r})
        self.classes = sorted({str(b[0]) for r in rows for b in r.get("boxes", [])})
        self.rows = [r for r in rows if split == "all" or
                     (zlib.crc32(os.fsencode(r["file_name"])) % 20 == 0) == (split == "held-out")]
        require(self.rows or split == "held-out",
                f"--data {path}: no pictures in it ({', '.join(PICTURES)}, or plain .tar)")
        tars = [self.files.source(r["file_name"]) for r in self.rows]
        self.tars = tars if self.files.places else None
    def __len__(self):
        return len(self.rows)
    def need(self, field: str) -> None:
        """Raises BadInput naming a picture without this field, and what to do."""
        column, cure = COLUMNS.get(field, ("file_name", ""))
        lacks = next((row["file_name"] for row in self.rows if column not in row), None)
        require(lacks is None, f"--data {self.path}: {lacks} has no {field}; {cure}")
    def captions(self) -> list[str]:
        return [str(row["text"]) for row in self.rows]
    def told(self) -> list:
        """All that decides the items, with the state of each file that they are read from."""
        used = {self.files.source(r[k]) for r in self.rows for k in ("file_name", "mask") if k in r}
        return [self.size, self.resize, self.flip, self.labels, self.classes, self.rows,
                [self.files.state(name) for name in sorted(used)]]
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
                m = load_map(self.files.read(row["mask"]))
            part = [v * n / of for v, n, of in zip(shown, m.size * 2, whole.size * 2)]
            item["segmentation"] = torch.from_numpy(np.int64(m.resize(square, NEAREST, part)))
        if self.flip and epoch % 2 == 1:
            item |= {k: item[k].flip(-1) for k in {"image", "segmentation"} & item.keys()}
            if "boxes" in item:
                item["boxes"][:, [1, 3]] = 1 - item["boxes"][:, [3, 1]]
        return item
    def readable(self, k: int) -> tuple[dict, Image.Image]:
        """Row k and its picture; instead of an unreadable picture, the next readable one.
        It may be smaller than its file's, but not where boxes are in that one's pixels."""
        for j in range(k, k + len(self)):
            row = self.rows[j % len(self)]
            least = 2 * self.size if self.resize and "boxes" not in row else None
            if (name := row["file_name"]) not in self.bad:
                try:
                    return row, load_rgb(self.files.read(name), least)
                except Exception as e:                      # strangers' files raise anything
                    self.bad.add(name)
                    warnings.warn(f"{name} is skipped: {e} ({len(self.bad)} so far)", stacklevel=2)
        raise BadInput(f"--data {self.path}: none of its {len(self)} pictures can be read")

def load(data: bytes, least: int | None = None) -> Image.Image:
    """A picture file's bytes, decoded and upright as its EXIF says; a bomb is an error before.
    least: a JPEG is decoded at 1/2, 1/4 or 1/8, much faster, if no side becomes less than this."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if least:
            image.draft(None, (least, least))
        return ImageOps.exif_transpose(image)

def load_map(data: bytes) -> Image.Image:
    """A label map's bytes -> a picture of one channel of class numbers. Raises as load()."""
    image = load(data)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(f"has {len(image.getbands())} channels; a label map has one, or a palette")
    return image

def load_rgb(data: bytes, least: int | None = None) -> Image.Image:
    """A picture file's bytes -> RGB, transparency laid on white. Arguments, errors: load()'s."""
    image = load(data, least)
    if image.mode.startswith("I;16"):                       # which Pillow would clip at 255
        image = image.point(lambda v: v / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def shuffled(n: int, rng: np.random.Generator, tars: list[str] | None) -> np.ndarray:
    """0..n-1 in any order; or, of pictures in tars, in one that reads disks almost from start to
    end: tar by tar, these in any order, and each picture up to BUFFER places from where it lies."""
    if tars is None:
        return rng.permutation(n)
    names, at = np.unique(tars, return_inverse=True)
    lie = np.argsort(rng.permutation(len(names))[at], kind="stable")
    return lie[np.argsort(np.arange(n) + rng.uniform(0, BUFFER, n))]

def batch_order(n: int, batch: int, done: int, steps: int, seed: int, rank=0, world=1, tars=None):
    """This process's items in each of the steps after `done`, up to `steps`: picture k in epoch e
    is item e * n + k, so that a set may show it another way round. The order: by (seed, epoch)."""
    epoch, k = divmod(done * batch, n)
    epochs = (e * n + shuffled(n, np.random.default_rng([seed, e]), tars) for e in count(epoch))
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

def data_flags(parser) -> None:
    g = parser.add_argument_group("data")
    g.add_argument("--data", help="shapes (the built-in world), or a folder, .zip or .tar")
    g.add_argument("--n-shapes", type=int, default=10_000, help="pictures of the built-in world")
    g.add_argument("--size", type=int, help="side of the square training pictures, px")
    g.add_argument("--resize", action=BooleanOptionalAction, default=True, help="before the crop")
    g.add_argument("--flip", action="store_true", help="mirror pictures in every second epoch")
    g.add_argument("--label-column", default="label", help="of metadata.jsonl, for --task class")
    g.add_argument("--degrade", choices=["bicubic", "chain"], default="bicubic",
                   help="for superres; chain: blur, noise and JPEG, too")

def open_data(args, split: str = "train", fields: tuple[str, ...] = ()) -> Dataset:
    """The data set of the flags, with these fields in its items. Raises BadInput."""
    require(args.data, f"--data: preset {args.preset} has none of its own; give a folder of some")
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

# ---- the latent cache; z is still sampled anew at each step
@torch.no_grad()
def encode(ae, data, parts: list[range], workers: int, device, to_y: Callable, show=False):
    """Yields E's Posterior, on the CPU, and y of each part's items; from len(data) on: mirrored."""
    order = [list(part[i:i + 64]) for part in parts for i in range(0, len(part), 64)]
    bar = tqdm(order, "encoding", disable=not (show and order), dynamic_ncols=True)
    rows, ends = [], {part[-1] for part in parts}
    for b, items in zip(loader(data, bar, workers), order):
        q = ae.encode(b["image"].to(device))
        rows.append((q.mean.float().cpu(), q.logvar.float().cpu(), to_y(b)))
        if items[-1] in ends:
            mean, logvar, y = map(torch.cat, zip(*rows))
            yield Posterior(mean, logvar), y
            rows = []

def fingerprint(ae: torch.nn.Module, *what) -> str:
    """A hash of E's weights and of all else, a data set, too, that decides what a cache holds."""
    told = json.dumps(what, default=lambda v: v.told() if hasattr(v, "told") else vars(v))
    h = hashlib.sha256(told.encode())
    for name, v in ae.state_dict().items():
        h.update(v.cpu().contiguous().numpy() if name != "z_std" else b"")
    return h.hexdigest()[:16]

class Latents:
    """The latents and y of items 0..n-1 of a set, mapped from the shards in `folder`; the missing
    are made, by all processes together. Raises BadInput where one is damaged, or not writable."""
    def __init__(self, folder: Path, ae, data, n: int, workers, device, to_y, rank=0, world=1):
        paths = [folder / f"{i:06}.pt" for i in range(-(-n // SHARD))]
        todo = [i for i in range(rank, len(paths), world) if not paths[i].exists()]
        parts = [range(i * SHARD, min((i + 1) * SHARD, n)) for i in todo]
        for (q, y), i in zip(encode(ae, data, parts, workers, device, to_y, rank == 0), todo):
            q = q.scaled(1 / ae.z_std.cpu())
            m, v = q.mean.double(), q.logvar.double().exp()
            sums = torch.stack([torch.tensor(m.numel()), m.sum(), m.square().sum(), v.sum()])
            part = paths[i].with_suffix(f".{os.getpid()}")      # another run may be making it, too
            save_checkpoint({"mean": m.half(), "std": v.sqrt().half(), "y": y, "sums": sums}, part)
            part.replace(paths[i])
        if world > 1:
            torch.distributed.barrier()
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
