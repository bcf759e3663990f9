"""Image folders, batches in a fixed order, the latent cache, and png grids.

Paper:   App. E.2 (training data), Sec. 3.1 (E encodes the set once; stage two never sees a pixel again).
Shapes:  an item is a dict: image float (3, H, W) in [-1, 1] and what the set has of caption str, label
         int, boxes (K, 5) [class, x0, y0, x1, y1 in 0..1], segmentation int (H, W).
Reads:   autoencoder.py (Posterior)

A folder, or a .zip of one, holds pictures in any depth. What is known of them is in `metadata.jsonl`
(file_name; text, label, boxes in pixels, mask = path of a label map), or else in a .txt beside each
picture, and the names of the sub-folders are labels.
"""
import io
import json
import warnings
import zipfile
import zlib
from argparse import BooleanOptionalAction
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from tinyldm import BadInput
from tinyldm.autoencoder import Posterior
from tinyldm.shapes import Shapes

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
Image.MAX_IMAGE_PIXELS = 64_000_000                  # twice that is refused as a decompression bomb


class Folder(torch.utils.data.Dataset):
    """The pictures of a folder or .zip as items of `size` px; split is `train` or `held-out` (one in 20).

    resize: the shorter side is scaled to `size` before the centre crop; without, the crop is cut as it is.
    flip: every second epoch is mirrored (epoch e of picture k is item e * len + k); boxes and maps too.
    Raises BadInput for an empty folder, bad metadata, or a picture smaller than the crop.
    """

    def __init__(self, path: str, size: int, split: str = "train", resize: bool = True, flip: bool = False):
        self.path, self.size, self.resize, self.flip, self.zip = Path(path), size, resize, flip, None
        names = self._names()
        rows = self._metadata(names)
        rows = [r for r in rows if (zlib.crc32(r["file_name"].encode()) % 20 == 0) == (split == "held-out")]
        if not rows and split == "train":
            raise BadInput(f"--data {path}: no pictures in it ({', '.join(PICTURES)})")
        self.rows, self.bad = rows, set()
        kinds = {r["label"] for r in rows if "label" in r} | {b[0] for r in rows for b in r.get("boxes", [])}
        self.classes = sorted(map(str, kinds))

    def __len__(self):
        return len(self.rows)

    def captions(self) -> list[str]:
        """A caption a picture, in order. Raises BadInput for a picture without."""
        for row in self.rows:
            if not isinstance(row.get("text"), str):
                raise BadInput(f"--data {self.path}: {row['file_name']} has no caption; give it a .txt beside it, or a "
                               '"text" in metadata.jsonl')
        return [row["text"] for row in self.rows]

    def _names(self) -> list[str]:
        try:
            if self.path.suffix == ".zip":
                with zipfile.ZipFile(self.path) as z:
                    return sorted(n for n in z.namelist() if not n.endswith("/"))
            if not self.path.is_dir():
                raise FileNotFoundError("no such folder")
            return sorted(p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file())
        except (OSError, zipfile.BadZipFile) as e:
            raise BadInput(f"--data {self.path}: cannot be read: {e}") from e

    def _metadata(self, names: list[str]) -> list[dict]:
        """One dict a picture, from metadata.jsonl or from names and .txt files."""
        have = set(names)
        if "metadata.jsonl" not in have:
            rows = []
            for n in names:
                if n.lower().endswith(PICTURES):
                    folder, text = PurePosixPath(n).parent, str(PurePosixPath(n).with_suffix(".txt"))
                    row = {"file_name": n} | ({"label": str(folder)} if str(folder) != "." else {})
                    rows.append(row | ({"text": self.read(text).decode("utf8", "replace").strip()}
                                       if text in have else {}))
            return rows
        rows = []
        for i, line in enumerate(self.read("metadata.jsonl").decode("utf8", "replace").splitlines(), 1):
            where = f"--data {self.path}: metadata.jsonl line {i}:"
            try:
                row = json.loads(line) if line.strip() else None
            except ValueError as e:
                raise BadInput(f"{where} not JSON ({e})") from None
            if row is None:
                continue
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise BadInput(f'{where} needs an object with a "file_name"')
            for key in ("file_name", "mask"):
                if row.get(key) is not None and row[key] not in have:
                    raise BadInput(f"{where} {key} {row[key]!r} is not in the folder")
            rows.append(row)
        return rows

    def read(self, name: str) -> bytes:
        if self.path.suffix != ".zip":
            return (self.path / name).read_bytes()
        if self.zip is None:                                    # opened once in each worker process
            self.zip = zipfile.ZipFile(self.path)
        return self.zip.read(name)

    def __getstate__(self):
        return self.__dict__ | {"zip": None}

    def _fit(self, image: Image.Image, name: str, mirror: bool, how=Image.Resampling.LANCZOS) -> Image.Image:
        s, short = self.size, min(image.size)
        if self.resize and short != s:
            image = image.resize([max(s, round(v * s / short)) for v in image.size], how)
        elif short < s:
            raise BadInput(f"--data: {name} is {image.width}x{image.height}, smaller than the crop of {s}; "
                           "drop --no-resize or take a smaller --size")
        x, y = (image.width - s) // 2, (image.height - s) // 2
        image = image.crop((x, y, x + s, y + s))
        return ImageOps.mirror(image) if mirror else image

    def __getitem__(self, i: int) -> dict:
        epoch, k = divmod(i, len(self.rows))
        mirror = self.flip and epoch % 2 == 1
        for step in range(len(self.rows)):                      # an unreadable picture: the next one instead
            row = self.rows[(k + step) % len(self.rows)]
            if row["file_name"] in self.bad:
                continue
            try:
                whole = load_rgb(self.read(row["file_name"]))
                break
            except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError,
                    Image.DecompressionBombWarning) as e:
                self.bad.add(row["file_name"])
                warnings.warn(f"{row['file_name']} is skipped: {e} ({len(self.bad)} so far)", stacklevel=2)
        else:
            raise BadInput(f"--data {self.path}: none of its {len(self.rows)} pictures can be read")
        image = self._fit(whole, row["file_name"], mirror)
        item = {"image": torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1}
        if isinstance(row.get("text"), str):
            item["caption"] = row["text"]
        if "label" in row:
            item["label"] = self.classes.index(str(row["label"]))
        if "boxes" in row:
            item["boxes"] = self._boxes(row["boxes"], whole.size, mirror)
        if row.get("mask"):
            m = self._fit(Image.open(io.BytesIO(self.read(row["mask"]))), row["mask"], mirror, Image.Resampling.NEAREST)
            item["segmentation"] = torch.from_numpy(np.array(m).astype(np.int64))
        return item

    def _boxes(self, boxes: list, whole: tuple[int, int], mirror: bool) -> torch.Tensor:
        """[class, x0, y0, x1, y1] in the file's pixels -> (K, 5) with sides in 0..1 of the crop."""
        w, h = whole
        scale = self.size / min(w, h) if self.resize else 1.0
        dx, dy = (w * scale - self.size) / 2, (h * scale - self.size) / 2
        out = torch.tensor([[self.classes.index(str(b[0])), *((b[j] * scale - (dx, dy)[j % 2 == 0]) / self.size
                             for j in (1, 2, 3, 4))] for b in boxes]).reshape(-1, 5)
        out[:, 1:] = out[:, 1:].clamp(0, 1)
        if mirror:
            out[:, [1, 3]] = 1 - out[:, [3, 1]]
        return out[(out[:, 3] > out[:, 1]) & (out[:, 4] > out[:, 2])]


def load_rgb(data: bytes) -> Image.Image:
    """A picture file's bytes -> RGB, turned upright as its EXIF says, transparency laid on white."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def batch_indices(n: int, batch: int, step: int, seed: int) -> list[int]:
    """The items of training step `step` (0, 1, ...): a new shuffle each epoch, a function of (seed, step).

    Item e * n + k is picture k in epoch e, so a data set may show it another way round.
    """
    out, place = [], step * batch
    while len(out) < batch:
        epoch, k = divmod(place + len(out), n)
        order = np.random.default_rng([seed, epoch]).permutation(n)[k:k + batch - len(out)]
        out += (order + epoch * n).tolist()
    return out


class BatchOrder:
    """The index lists of steps start, start+1, ... for one of `world` processes: its slice of each batch."""

    def __init__(self, n: int, batch: int, start: int, steps: int, seed: int, rank: int = 0, world: int = 1):
        self.args, self.start, self.steps, self.part = (n, batch), start, steps, batch // world
        self.seed, self.rank = seed, rank

    def __len__(self):
        return self.steps - self.start

    def __iter__(self):
        for step in range(self.start, self.steps):
            whole = batch_indices(*self.args, step, self.seed)
            yield whole[self.rank * self.part:(self.rank + 1) * self.part]


def collate(items: list[dict]) -> dict:
    """image (B, 3, H, W); every other field that all items have as a list."""
    common = set.intersection(*(set(i) for i in items))
    return {k: torch.stack([i[k] for i in items]) if k == "image" else [i[k] for i in items] for k in common}


def loader(data: torch.utils.data.Dataset, order, workers: int, cuda: bool = False):
    """Batches (dicts) in the order of the index lists that `order` yields."""
    return torch.utils.data.DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=collate,
                                       pin_memory=cuda, persistent_workers=workers > 0)


@torch.no_grad()
def encode_set(ae: torch.nn.Module, data, n: int, workers: int, device, show: bool) -> tuple[Posterior, list[str]]:
    """The latent cache: E's posterior for items 0..n-1 (beyond len: mirrored ones), and their captions.

    Means and log-variances (n, c_z, h, w) stay on the CPU; z is still sampled anew at each step.
    """
    order = [list(range(i, min(i + 64, n))) for i in range(0, n, 64)]
    parts, captions = [], []
    for b in tqdm(loader(data, order, workers), "encoding", disable=not show, dynamic_ncols=True):
        q = ae.encode(b["image"].to(device))
        parts.append((q.mean.float().cpu(), q.logvar.float().cpu()))
        captions += b["caption"]
    return Posterior(torch.cat([m for m, _ in parts]), torch.cat([v for _, v in parts])), captions


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8, rounded to nearest."""
    return ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def save_grid(images: torch.Tensor, path: Path, columns: int, least: int = 96) -> None:
    """Write (n, 3, H, W) in [-1, 1] as one png, `columns` a row; small pictures are enlarged whole times."""
    k = max(1, -(-least // images.shape[-1]))
    tiles = [Image.fromarray(to_uint8(x)).resize((x.shape[2] * k, x.shape[1] * k), Image.Resampling.NEAREST)
             for x in images]
    (w, h), gap = tiles[0].size, 4
    sheet = Image.new("RGB", (columns * (w + gap) + gap, -(-len(tiles) // columns) * (h + gap) + gap), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * (w + gap), gap + i // columns * (h + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def open_data(args, split: str = "train", n: int = 20_000) -> torch.utils.data.Dataset:
    """--data: `shapes` (n pictures of the built-in world) or the path of a folder or .zip."""
    if args.data == "shapes":
        return Shapes(n, args.size, args.seed, split)
    return Folder(args.data, args.size, split, args.resize, args.flip and split == "train")


def data_flags(parser) -> None:
    g = parser.add_argument_group("data")
    g.add_argument("--data", help="shapes (the built-in world), or a folder or .zip of pictures")
    g.add_argument("--size", type=int, help="side of the square training pictures, px")
    g.add_argument("--resize", action=BooleanOptionalAction, default=True, help="scale the shorter side to --size first")
    g.add_argument("--flip", action=BooleanOptionalAction, default=False, help="mirror every second epoch")
