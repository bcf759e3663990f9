"""What lies in a folder, a .zip or .tar files: the pictures, what is known of them, their bytes.

Reads:   nothing of ours.
Pictures may lie in any depth. What is known of them stands in `metadata.jsonl` (file_name; text,
label, boxes in pixels, mask = path of a label map), or else beside each picture in a .txt (text) or
.cls (label), and the names of sub-folders are labels.
A .tar, or .tar files in a folder without pictures of its own, are read as sub-folders, in
WebDataset's way: what is of one name up to its first dot belongs together, and a .json is as a line
of metadata.jsonl. Nothing is unpacked: where the members lie is found once, so that all else
(length, held-out pictures, resuming, any number of processes) is as for a folder."""
import contextlib
import functools
import hashlib
import json
import os
import posixpath
import tarfile
import zipfile
from pathlib import Path

from tinyldm import require, trying

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
COLUMNS = {                     # of metadata.jsonl, and what to do where a picture has none
    "caption": ("text", 'give it a .txt beside it, or a "text" in metadata.jsonl'),
    "label": ("label", 'put it into a sub-folder named so, or a "label" into metadata.jsonl'),
    "boxes": ("boxes", 'give it "boxes" in metadata.jsonl: [[class, x0, y0, x1, y1 in px], ...]'),
    "segmentation": ("mask", 'give it a "mask" in metadata.jsonl: the file of its label map')}
LISTS = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "tinyldm")
MANY = 10_000                   # pictures; shorter lists are made anew each time

@functools.cache
def open_zip(path: Path, changed: int, process: int) -> zipfile.ZipFile:
    """Opened once in each process, as an inherited file shares its position; anew when changed."""
    return zipfile.ZipFile(path)

class Files:
    """The files of a path. label: which column of metadata.jsonl is the label.
    places: {name: [tar, offset, size]} of members of tars; seen: what the list depends on."""
    def __init__(self, path: str, label: str):
        self.path, self.label, self.places, self.seen = Path(path), label, {}, {}
        self.root = str(self.path if self.path.is_dir() else self.path.parent)
        self.zipped = self.path.suffix == ".zip"
    def source(self, name: str) -> str:
        """The file that a file is in: itself, or a .zip or .tar."""
        return self.path.name if self.zipped else self.places.get(name, [name])[0]
    def state(self, name: str) -> list[int]:
        """Size and time of change, ns, of the file that it is in."""
        s = os.stat(os.path.join(self.root, self.source(name)))
        return [s.st_size, s.st_mtime_ns]
    def read(self, name: str) -> bytes:
        if self.zipped:
            f = open_zip(self.path, self.state(name)[1], os.getpid())
            size = f.getinfo(name).file_size                    # read() gives no more than this
            require(size < 2 ** 28,
                    f"--data {self.path}: {name!r:.99} has {size:,} bytes; unpack it")
            return f.read(name)
        _, start, size = self.places.get(name, (name, 0, -1))
        with open(os.path.join(self.root, self.source(name)), "rb") as f:
            f.seek(start)
            return f.read(size)
    def rows(self) -> list[dict]:
        """What is known of each picture: file_name, and what it has of COLUMNS' columns.
        A list of MANY is kept (JSON, in LISTS) until a folder, metadata.jsonl, .zip or .tar of it
        changes. NB: a .txt rewritten in place changes no folder: touch that. Raises BadInput."""
        key = repr((1, str(self.path.resolve()), self.label))
        kept = LISTS / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
        with contextlib.suppress(Exception):                # there is none, or none of any use
            seen, places, rows = json.loads(kept.read_bytes())
            if all(self.state(name) == was for name, was in seen.items()):
                self.places = places
                return rows
        with trying(f"--data {self.path}: cannot be read"):
            rows = self._list()
        used = {row.get(k) for row in rows for k in ("file_name", "mask")}
        self.places = {name: at for name, at in self.places.items() if name in used}
        if len(rows) >= MANY:
            with contextlib.suppress(OSError):              # nowhere to write is no error
                LISTS.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps([self.seen, self.places, rows]))
        return rows
    def _list(self) -> list[dict]:
        names, rows = self._names(), []
        if "metadata.jsonl" in (have := set(names)):
            self.seen["metadata.jsonl"] = self.state("metadata.jsonl")
            lines = self.read("metadata.jsonl").decode("utf8", "replace").splitlines()
            return [self._row({}, line, f"--data {self.path}: metadata.jsonl line {i}:", have)
                    for i, line in enumerate(lines, 1) if line.strip()]
        for name in names:
            folder, _, base = name.rpartition("/")
            stem, _, kind = (base.partition if name in self.places else base.rpartition)(".")
            if stem and f".{kind.lower()}" in PICTURES:
                row, key = {"file_name": name}, name[:-len(kind)]
                for column, end in (("text", "txt"), ("label", "cls")):
                    if key + end in have:
                        row[column] = self.read(key + end).decode("utf8", "replace").strip()
                if name in self.places and key + "json" in have:
                    where = f"--data {self.path}: {key}json:"
                    row = self._row(row, self.read(key + "json"), where, have)
                rows.append(({"label": folder} if folder else {}) | row)
        return rows
    def _row(self, known: dict, text: str | bytes, where: str, have: set[str]) -> dict:
        """What is known of a picture, and what JSON adds to it, checked, without nulls."""
        with trying(f"{where} not JSON"):
            row = json.loads(text)
        row = row | known if isinstance(row, dict) else {}
        require(isinstance(row.get("file_name"), str), f'{where} needs an object with "file_name"')
        named = (("text", "caption"), ("label", "label"), ("label", self.label),
                 *((k, k) for k in ("file_name", "text", "boxes", "mask")))
        row = {k: row[name] for k, name in named if row.get(name) is not None}
        for key in {"file_name", "mask"} & row.keys():
            require(isinstance(row[key], str) and row[key] in have,
                    f"{where} {key} {row[key]!r:.99} is not in the folder")
        with trying(say := f'{where} "boxes" must be [[class, x0, y0, x1, y1], ...] in pixels'):
            for _, *box in row.get("boxes", []):
                require(len(box) > 3 and all(abs(v) < 1e9 for v in box[:4]), say)
        return row
    def _names(self) -> list[str]:
        """All files, sorted, and members of tars, as they lie."""
        names = [] if self.path.is_dir() else [self.path.name]
        self.seen = {name: self.state(name) for name in names}
        if self.zipped:
            return sorted(n for n in zipfile.ZipFile(self.path).namelist() if n[-1:] != "/")
        for folder, _, files in os.walk(self.path):
            at = folder.replace(os.sep, "/")[len(self.root):].strip("/")
            self.seen[at] = self.state(at)
            names += [f"{at}/{f}".strip("/") for f in files if os.path.isfile(f"{folder}/{f}")]
        if not any(name.lower().endswith(PICTURES) for name in names):
            for name in sorted(n for n in names if n.endswith(".tar") or self.path.is_file()):
                self._index(name)
        return sorted(names) + [*self.places]
    def _index(self, tar: str) -> None:
        """Notes where a tar's plain files with names within it lie; nothing else in it is used.
        Raises BadInput for one that is cut off, damaged or compressed: no random access."""
        say = f"--data {self.path}: {tar} is damaged, cut off or compressed; give whole, plain .tar"
        with trying(say), tarfile.open(os.path.join(self.root, tar), "r:") as f:
            self.seen[tar] = self.state(tar)
            while m := f.next():
                f.members.clear()                           # else it would remember them all
                plain, name = m.isreg() and not m.issparse(), posixpath.normpath(m.name)
                require(m.size >= 0, say)                   # else it might go round in circles
                if plain and not name.startswith(("/", "../")):
                    self.places[f"{tar}/{name}"] = [tar, m.offset_data, m.size]
            f.fileobj.seek(f.offset)
            require(f.fileobj.read(512) == bytes(512), say)         # a whole tar's end
