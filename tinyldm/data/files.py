"""The images of a folder, .zip or .tar: which there are, and what is known of each.

Images lie at any depth. What is known of them stands in metadata.jsonl, or else in
files beside them, or in the names of their folders. README.md here describes all of it.

A row is a dict of what is known of one image, as the files say it:

    file_name  its path from the folder on, with "/" between the parts
    text       its caption
    label      its class
    boxes      [[class, x0, y0, x1, y1], ...] in pixels
    mask       the file name of its label map

A .tar is read as if it were a folder; its file names begin with the name of the .tar.
"""
import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tinyldm.data import archives
from tinyldm.errors import require, trying

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# It takes long to list many files, so a list of this many images or more is kept on
# disk.
KEEP_FROM = 10_000
CACHE_HOME = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
LIST_FOLDER = Path(CACHE_HOME, "tinyldm")
LIST_VERSION = 1


class Files:
    """The files at a path: rows of its images, and the bytes of any file.

    path: a folder, a .zip or a .tar.
    label_column: the key in metadata that holds an image's class, besides "label".
    """

    def __init__(self, path: str | Path, label_column: str = "label"):
        self.path = Path(path)
        self.label_column = label_column
        self.is_zip = self.path.suffix == ".zip"
        self.root = self.path if self.path.is_dir() else self.path.parent

        # Where the files in tars lie: {name: [tar, offset, size]}.
        self.places: dict[str, list] = {}
        # The states of all that the list of rows depends on: {name: [size, time]}.
        self.seen: dict[str, list[int]] = {}

    # ---- bytes

    def container(self, name: str) -> str:
        """Return the file on disk that a file is in: its archive, or itself."""
        if self.is_zip:
            return self.path.name
        if name in self.places:
            return self.places[name][0]
        return name

    def state(self, name: str) -> list[int]:
        """Return the size and the time of change (ns) of the file on disk."""
        status = os.stat(self.root / self.container(name))
        return [status.st_size, status.st_mtime_ns]

    def read(self, name: str) -> bytes:
        """Return the contents of a file."""
        if self.is_zip:
            changed = self.state(name)[1]
            return archives.read_zipped(self.path, changed, name)
        if name in self.places:
            tar, offset, size = self.places[name]
            return archives.read_part(self.root / tar, offset, size)
        return (self.root / name).read_bytes()

    def read_text(self, name: str) -> str:
        """Return the contents of a text file; what is not UTF-8 is replaced."""
        return self.read(name).decode("utf8", "replace")

    # ---- rows

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per image.

        A long list is kept until a folder, metadata.jsonl, .zip or .tar changes. NB: to
        rewrite a .txt in place does not change its folder; touch the folder then.

        Raises BadInput if the path cannot be read, or if metadata is wrong.
        """
        rows = self._read_kept_rows()
        if rows is not None:
            return rows

        with trying(f"{self.path}: cannot be read"):
            rows = self._find_rows()

        # From now on, only images and label maps are read.
        used = {row["file_name"] for row in rows} | {row.get("mask") for row in rows}
        self.places = {name: self.places[name] for name in self.places if name in used}
        if len(rows) >= KEEP_FROM:
            self._keep_rows(rows)
        return rows

    def _kept_file(self) -> Path:
        """The file in which the rows of this path are kept."""
        key = repr((LIST_VERSION, str(self.path.resolve()), self.label_column))
        return LIST_FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _read_kept_rows(self) -> list[dict] | None:
        """Return the rows that were kept, unless something has changed since."""
        # Whatever is wrong with the file, the answer is to look for the images again.
        with contextlib.suppress(Exception):
            seen, places, rows = json.loads(self._kept_file().read_bytes())
            if all(self.state(name) == state for name, state in seen.items()):
                self.places = places
                return rows
        return None

    def _keep_rows(self, rows: list[dict]) -> None:
        """Keep rows for later runs, if that is possible."""
        with contextlib.suppress(OSError):
            LIST_FOLDER.mkdir(parents=True, exist_ok=True)
            self._kept_file().write_text(json.dumps([self.seen, self.places, rows]))

    def _find_rows(self) -> list[dict]:
        """Look through all files."""
        names = self._names()
        known_names = set(names)
        if "metadata.jsonl" in known_names:
            return self._rows_from_metadata(known_names)
        return self._rows_from_files(names, known_names)

    def _rows_from_metadata(self, known_names: set[str]) -> list[dict]:
        """One row per line of metadata.jsonl."""
        self.seen["metadata.jsonl"] = self.state("metadata.jsonl")
        rows = []
        for number, line in enumerate(self.read_text("metadata.jsonl").splitlines(), 1):
            if line.strip():
                where = f"{self.path}: metadata.jsonl line {number}"
                rows.append(parse_row(line, {}, self.label_column, known_names, where))
        return rows

    def _rows_from_files(self, names: list[str], known_names: set[str]) -> list[dict]:
        """One row per image, from its folder and from the files of the same name."""
        rows = []
        for name in names:
            # In a .tar, as in WebDataset, files belong together up to the first dot.
            folder, _, base = name.rpartition("/")
            in_tar = name in self.places
            stem, _, suffix = base.partition(".") if in_tar else base.rpartition(".")
            if not stem or f".{suffix.lower()}" not in IMAGE_SUFFIXES:
                continue

            row = {"file_name": name}
            key = name.removesuffix(suffix)
            if key + "txt" in known_names:
                row["text"] = self.read_text(key + "txt").strip()
            if key + "cls" in known_names:
                row["label"] = self.read_text(key + "cls").strip()
            if in_tar and key + "json" in known_names:
                text = self.read(key + "json")
                where = f"{self.path}: {key}json"
                row = parse_row(text, row, self.label_column, known_names, where)
            if folder:
                row.setdefault("label", folder)
            rows.append(row)
        return rows

    # ---- names

    def _names(self) -> list[str]:
        """Return the names of all files, sorted, then of those in tars, as they lie."""
        if self.path.is_dir():
            names = self._walk()
        else:
            names = [self.path.name]
            self.seen[self.path.name] = self.state(self.path.name)
        if self.is_zip:
            return archives.zip_names(self.path)

        # Tars beside loose images are left alone. If the path itself is a file, it is
        # an image or a .tar, however it is called.
        names.sort()
        has_images = any(name.lower().endswith(IMAGE_SUFFIXES) for name in names)
        if not has_images:
            for name in names:
                if name.endswith(".tar") or self.path.is_file():
                    self._index_tar(name)
        return names + list(self.places)

    def _walk(self) -> list[str]:
        """Return the names of all files in the folder and its sub-folders."""
        names = []
        for folder, _, files in os.walk(self.path):
            prefix = Path(folder).relative_to(self.path).as_posix() + "/"
            prefix = prefix.removeprefix("./")
            self.seen[prefix] = self.state(prefix)
            for file in files:
                if os.path.isfile(os.path.join(folder, file)):
                    names.append(prefix + file)
        return names

    def _index_tar(self, tar: str) -> None:
        """Note where the files of a .tar lie."""
        self.seen[tar] = self.state(tar)
        message = (
            f"{self.path}: {tar} is damaged, cut off or compressed; "
            "give whole, plain .tar files"
        )
        for name, place in archives.index_tar(self.root / tar, message).items():
            self.places[f"{tar}/{name}"] = [tar, *place]


def parse_row(
    text: str | bytes, known: dict, label_column: str, known_names: set[str], where: str
) -> dict[str, Any]:
    """Return the row of an image from JSON about it.

    known: what other files say of the image; it wins over the JSON. A null in the JSON
    says nothing. Raises BadInput, which begins with `where`, for what is wrong.
    """
    with trying(f"{where}: not JSON"):
        said = json.loads(text)
    needs_name = f'{where}: needs an object with "file_name"'
    require(isinstance(said, dict), needs_name)
    said = said | known
    require(isinstance(said.get("file_name"), str), needs_name)

    # A column may have two sources; the later wins. WebDataset calls a text "caption".
    sources = [("text", "caption"), ("label", "label"), ("label", label_column)]
    sources += [(name, name) for name in ("file_name", "text", "boxes", "mask")]
    row = {}
    for column, source in sources:
        if said.get(source) is not None:
            row[column] = said[source]

    for column in ("file_name", "mask"):
        if column in row:
            file = row[column]
            exists = isinstance(file, str) and file in known_names
            require(exists, f"{where}: {column} {file!r:.99} is not in the folder")
    check_boxes(row.get("boxes", []), where)
    return row


def check_boxes(boxes: Any, where: str) -> None:
    """Raise BadInput unless boxes are [[class, x0, y0, x1, y1], ...], all finite."""
    message = f'{where}: "boxes" must be [[class, x0, y0, x1, y1], ...] in pixels'
    with trying(message):
        for _, *corners in boxes:
            are_finite = all(abs(value) < 1e9 for value in corners[:4])
            require(len(corners) >= 4 and are_finite, message)
