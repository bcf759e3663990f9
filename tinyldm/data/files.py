"""The files of a folder, .zip or .tar: which there are, and the bytes of each.

A .tar is read as if it were a folder; its file names begin with the name of the .tar.
rows.py says which of the files are images, and what is known of each.
"""
import contextlib
import hashlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from tinyldm.data import archives
from tinyldm.data.rows import files_of, find_rows, is_image
from tinyldm.data.text import decode_text
from tinyldm.errors import BadInput, trying

# It takes long to list many files, so a list of this many images or more is kept on
# disk.
KEEP_FROM = 10_000
CACHE_HOME = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
LIST_FOLDER = Path(CACHE_HOME, "tinyldm")
LIST_VERSION = 3            # of what is kept; raise it if a row changes

# Folders that programs add to a set.
ADDED = ("__MACOSX", "@eaDir")


class Files:
    """The files at a path: rows of its images, and the bytes of any file.

    path: a folder, a .zip or a .tar.
    label_column: the key in metadata that holds an image's class, besides "label".
    """

    def __init__(self, path: str | Path, label_column: str = "label"):
        self.path = Path(path)
        self.label_column = label_column
        self.is_zip = self.path.suffix.lower() == ".zip" and not self.path.is_dir()
        self.root = self.path if self.path.is_dir() else self.path.parent

        # Where the files in tars lie: {name: [tar, offset, size]}.
        self.places: dict[str, list] = {}
        # The states of all that the list of rows depends on: {name: [size, time]}.
        self.seen: dict[str, list[int]] = {}
        # The text files that were read.
        self.texts: set[str] = set()
        # The keys of all metadata.
        self.columns: set[str] = set()
        # What is there but not used: {what: how many}.
        self.left_out: Counter[str] = Counter()

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
        """Return the contents of a text file. Raises BadInput if it is not UTF-8."""
        data = self.read(name)
        self.texts.add(name)
        try:
            return decode_text(data)
        except ValueError as error:
            raise BadInput(f"{self.path}: {name} {error}") from error

    # ---- rows

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per image (rows.py), and note in left_out what is not used.

        A long list is kept until a folder, metadata.jsonl, .zip or .tar changes. NB: to
        rewrite a .txt in place does not change its folder; touch the folder then.

        Raises BadInput if the path cannot be read, or if metadata is wrong.
        """
        rows = self._read_kept_rows()
        if rows is not None:
            return rows

        with trying(f"{self.path}: cannot be read"):
            rows = self._find_rows()
        self.left_out = +self.left_out          # without what there is none of

        # From now on, only images and what belongs to them are read.
        used = files_of(rows)
        self.places = {name: self.places[name] for name in self.places if name in used}
        if len(rows) >= KEEP_FROM:
            self._keep_rows(rows)
        return rows

    def _find_rows(self) -> list[dict]:
        """Look through all files."""
        names = self._names()
        return find_rows(self, names)

    def _kept_file(self) -> Path:
        """The file in which the rows of this path are kept."""
        key = repr((LIST_VERSION, str(self.path.resolve()), self.label_column))
        return LIST_FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def _read_kept_rows(self) -> list[dict] | None:
        """Return the rows that were kept, unless something has changed since."""
        # Whatever is wrong with the file, the answer is to look for the images again.
        with contextlib.suppress(Exception):
            seen, places, left_out, rows = json.loads(self._kept_file().read_bytes())
            if all(self.state(name) == state for name, state in seen.items()):
                self.places = places
                self.left_out = Counter(left_out)
                return rows
        return None

    def _keep_rows(self, rows: list[dict]) -> None:
        """Keep rows for later runs, if that is possible."""
        with contextlib.suppress(OSError):
            LIST_FOLDER.mkdir(parents=True, exist_ok=True)
            kept = [self.seen, self.places, self.left_out, rows]
            self._kept_file().write_text(json.dumps(kept))

    # ---- names

    def _names(self) -> list[str]:
        """Return the names of all files that are looked at.

        They are sorted; those in tars come as they lie in them.
        """
        if self.path.is_dir():
            names = sorted(self._walk())
        else:
            names = [self.path.name]
            self.seen[self.path.name] = self.state(self.path.name)
        if self.is_zip:
            return [name for name in archives.zip_names(self.path) if not is_hidden(name)]

        # If the path itself is a file, it is an image or a .tar, however it is called.
        if self.path.is_file():
            tars = [name for name in names if not is_image(name)]
        else:
            tars = [name for name in names if name.lower().endswith(".tar")]
        for tar in tars:
            self._index_tar(tar)

        # Images may lie in tars or beside them. The set is where there are more.
        n_in_tars = sum(map(is_image, self.places))
        n_beside = sum(map(is_image, names))
        if n_beside > n_in_tars:
            self.places = {}
            self.left_out["images in .tar files, as there are more beside them"] += n_in_tars
            return names
        if tars:
            self.left_out["images beside .tar files"] += n_beside
            names = [name for name in names if not is_image(name) and name not in tars]
        return names + list(self.places)

    def _walk(self) -> list[str]:
        """Return the names of all files in the folder and its sub-folders.

        Links are followed, but no folder is entered twice.
        """
        names = []
        entered = set()
        waiting = [""]
        while waiting:
            prefix = waiting.pop()
            folder = self.path / prefix
            with trying(f"{folder}: cannot be read"):
                status = os.stat(folder)
                place = (status.st_dev, status.st_ino)
                if place in entered:
                    continue
                entered.add(place)
                self.seen[prefix] = self.state(prefix)
                entries = list(os.scandir(folder))

            for entry in entries:
                name = prefix + entry.name
                if is_hidden(entry.name):
                    continue
                try:
                    is_folder = entry.is_dir()
                    is_file = entry.is_file()
                except OSError:                 # such as a link to itself
                    is_folder = is_file = False
                if is_folder:
                    waiting.append(name + "/")
                elif is_file:
                    names.append(name)
                else:
                    self.left_out["broken links"] += 1
        return names

    def _index_tar(self, tar: str) -> None:
        """Note where the files of a .tar lie."""
        self.seen[tar] = self.state(tar)
        message = (
            f"{self.path}: {tar} is damaged, cut off or compressed; "
            "give whole, plain .tar files"
        )
        if self.path.is_file() and self.path.suffix.lower() != ".tar":
            message = f"{self.path}: no image, .zip or .tar; give one, or a folder of images"
        places, n_left_out = archives.index_tar(self.root / tar, message)
        self.left_out["links and odd names in .tar files"] += n_left_out
        for name, place in places.items():
            if not is_hidden(name):
                self.places[f"{tar}/{name}"] = [tar, *place]


def is_hidden(name: str) -> bool:
    """Return whether a file or one of its folders is never looked at.

    Their names begin with a dot, or are those of folders that Finder or a NAS adds.
    """
    may_be_hidden = name.startswith(".") or "/." in name or any(x in name for x in ADDED)
    if not may_be_hidden:
        return False
    parts = name.split("/")
    hidden = [part for part in parts if part.startswith(".") and part.strip(".")]
    return bool(hidden) or any(x in parts for x in ADDED)
