"""What is known of each image of a set, from its metadata or from the files beside it.

A row is a dict of what is known of one image, as the files say it:

    file_name  its path from the folder on, with "/" between the parts
    text       its caption, or a list of captions
    label      its class
    boxes      [[class, x0, y0, x1, y1], ...] in pixels
    mask       the file name of its label map
    small      the file name of the same image with fewer pixels
    where      the line or file that says so, for messages; only with boxes
    split      "train" or "held-out", if folders say so

data/README.md describes what people may write.
"""
import json
import math
import os.path
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from tinyldm.data.text import text_lines
from tinyldm.errors import require, trying

IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"
)

# Folders at the top that have these names say which images are held out.
SPLITS = {
    "train": "train",
    "training": "train",
    "trainval": "train",
    "val": "held-out",
    "valid": "held-out",
    "validation": "held-out",
    "dev": "held-out",
    "test": "held-out",
    "testing": "held-out",
}

# The columns that name files.
FILE_COLUMNS = ("file_name", "mask", "small")

# What sample.py writes beside its images: it says nothing of a single image.
SETTINGS = "settings.json"

YOLO_BOXES = re.compile(r"(\d+(\s+[\d.]+){4,}\s*)+")

LARGEST_SHARE = 1.5     # a box within this is not in pixels
BOX_FORMAT = "boxes are [[class, x0, y0, x1, y1], ...] in pixels, from the top left"


def is_image(name: str) -> bool:
    """Return whether a file is an image by its name."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def find_rows(files: Any, names: list[str]) -> list[dict[str, Any]]:
    """Return one row per image, and note in files.left_out what is not used.

    files: a Files; names: its files that are looked at.
    A metadata.jsonl alone says what is in its folder. Elsewhere each image has a row.
    Raises BadInput for what is wrong.
    """
    known_names = set(names)
    rows = []
    described: set[str] = set()         # the folders that a metadata.jsonl describes
    for name in metadata_files(names):
        folder = name.removesuffix("metadata.jsonl")
        if not is_within(folder, described):
            described.add(folder)
            rows += rows_from_metadata(files, folder, known_names)
    others = [name for name in names if not is_within(name, described)]
    rows += rows_from_files(files, others, known_names)

    check_label_column(files, rows)
    add_folders(files, rows)
    count_left_out(files, names, rows)
    return rows


def is_within(name: str, folders: set[str]) -> bool:
    """Return whether a file or folder is in one of the folders, which end in "/" or are ""."""
    if not folders:
        return False
    ends = [i + 1 for i, letter in enumerate(name) if letter == "/"]
    return "" in folders or any(name[:end] in folders for end in ends)


def files_of(rows: list[dict], columns: Sequence[str] = FILE_COLUMNS) -> set[str]:
    """Return the names of the files in some columns of rows."""
    names = set()
    for column in columns:
        names.update([row[column] for row in rows if column in row])
    return names


def label_names(rows: Sequence[dict]) -> tuple[str, ...]:
    """Return the classes of images, sorted."""
    return tuple(sorted({row["label"] for row in rows if "label" in row}))


def box_names(rows: Sequence[dict]) -> tuple[str, ...]:
    """Return the classes of boxes, sorted."""
    found = set()
    for row in rows:
        if "boxes" in row:
            found.update(box[0] for box in row["boxes"])
    return tuple(sorted(found))


def metadata_files(names: list[str]) -> list[str]:
    """Return the metadata files, those of outer folders first."""
    found = []
    for name in names:
        if name == "metadata.jsonl" or name.endswith("/metadata.jsonl"):
            found.append(name)
    return sorted(found, key=lambda name: name.count("/"))


# ---- from metadata.jsonl

def rows_from_metadata(files: Any, folder: str, known_names: set[str]) -> list[dict]:
    """Return one row per line of the metadata.jsonl of a folder."""
    name = folder + "metadata.jsonl"
    files.seen[files.container(name)] = files.state(name)
    rows = {}
    for number, line in enumerate(text_lines(files.read_text(name)), 1):
        if not line.strip():
            continue
        where = f"{files.path}: {name} line {number}"
        row = parse_row(line, {}, folder, known_names, where, files)
        image = row["file_name"]
        require(
            image not in rows,
            f"{where}: {image} has a line already; several captions are a list",
        )
        rows[image] = row
    return list(rows.values())


def parse_row(
    text: str, known: dict, folder: str, known_names: set[str], where: str, files: Any
) -> dict[str, Any]:
    """Return the row of an image from JSON about it.

    known: what other files say of the image; it wins over the JSON. A null in the JSON
    says nothing. folder: what file names in the JSON are relative to. Raises BadInput,
    which begins with `where`, for what is wrong.
    """
    with trying(f"{where}: not JSON"):
        said = json.loads(text)
    require(isinstance(said, dict), f'{where}: needs an object with "file_name"')
    files.columns.update(said)
    said = {name: value for name, value in said.items() if value is not None}

    row = dict(known)
    for column in FILE_COLUMNS:
        if column in said and column not in known:
            name = name_in_set(said[column], folder, known_names)
            message = f"{where}: {column} {said[column]!r:.99} is not in the folder"
            require(name is not None, message)
            suffix = PurePosixPath(name).suffix
            require(
                is_image(name) or not suffix,
                f"{where}: {column} {name:.99} is no image that can be read; convert it",
            )
            row[column] = name
    require("file_name" in row, f'{where}: needs an object with "file_name"')

    # WebDataset calls a text "caption".
    caption = said.get("text", said.get("caption"))
    label = said.get(files.label_column)
    if caption is not None:
        check_caption(caption, where)
        row.setdefault("text", caption)
    if label is not None:
        name = class_name(label, f"{where}: the label")
        row.setdefault("label", name)
    if "boxes" in said:
        row["boxes"] = read_boxes(said["boxes"], where)
        row["where"] = where
    return row


def name_in_set(file: Any, folder: str, known_names: set[str]) -> str | None:
    """Return the name in the set of a file that metadata names; None if there is none.

    "./a.png" and, from Windows, "images\\a.png" are understood.
    """
    if not isinstance(file, str):
        return None
    plain = posixpath.normpath(folder + file.replace("\\", "/"))
    spellings = [folder + file, plain]
    spellings += [unicodedata.normalize(form, plain) for form in ("NFC", "NFD")]
    return next((name for name in spellings if name in known_names), None)


def check_caption(value: Any, where: str) -> None:
    """Raise BadInput unless a caption is a string, or a list of one string or more."""
    captions = value if isinstance(value, list) else [value]
    are_strings = all(isinstance(caption, str) for caption in captions)
    require(
        captions and are_strings,
        f"{where}: the caption {short(value)} is neither a string nor a list of strings",
    )


def class_name(value: Any, what: str) -> str:
    """Return the name of a class: a string, or a whole number as text.

    Raises BadInput, which begins with `what`, for anything else.
    """
    is_whole = isinstance(value, float) and value.is_integer()
    if is_whole:
        value = int(value)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    require(
        is_number or isinstance(value, str),
        f"{what} {short(value)} is neither a string nor a whole number",
    )
    name = unicodedata.normalize("NFC", str(value)).strip()
    require(name, f"{what} is empty")
    return name


def read_boxes(boxes: Any, where: str) -> list[list]:
    """Return boxes as [[class, x0, y0, x1, y1], ...], the classes as text.

    Raises BadInput for another format, as far as it can be seen without the image.
    """
    require(isinstance(boxes, list), f"{where}: {short(boxes)} is no list; {BOX_FORMAT}")
    read = []
    for box in boxes:
        is_box = isinstance(box, list) and len(box) >= 5
        require(is_box, f"{where}: {short(box)} is no box; {BOX_FORMAT}")
        name = class_name(box[0], f"{where}: the class of a box:")
        corners = box[1:5]
        require(
            all(map(is_finite, corners)),
            f"{where}: {short(box)} has corners that are no numbers; {BOX_FORMAT}",
        )
        x0, y0, x1, y1 = corners
        require(
            x0 < x1 and y0 < y1,
            f"{where}: {short(box)} ends before it begins (are these x, y, width, "
            f"height?); {BOX_FORMAT}",
        )
        read.append([name, *corners])

    # Shares of the image may be rounded to a little above 1. NB: boxes of one pixel at the
    # top left are refused, too.
    largest = max((max(box[1:]) for box in read), default=math.inf)
    require(
        largest > LARGEST_SHARE,
        f"{where}: {short(boxes)} lie in 0..1 (are these shares of the image?); "
        f"{BOX_FORMAT}",
    )
    return read


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number; True and False are none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e9


def short(value: Any) -> str:
    """Return a value as JSON writes it, cut to a readable length."""
    return json.dumps(value, ensure_ascii=False)[:80]


# ---- from the files beside images

def rows_from_files(
    files: Any, names: list[str], known_names: set[str]
) -> list[dict[str, Any]]:
    """Return one row per image, with what the files of the same name say.

    They are NAME.txt and NAME.cls and, in a .tar as in WebDataset, NAME.json.
    """
    rows = []
    for name in names:
        if not is_image(name):
            continue

        row = {"file_name": name}
        key = name[:name.rindex(".")]
        caption = with_suffix(key, ".txt", known_names)
        if caption:
            row["text"] = files.read_text(caption).strip()
            require(
                not YOLO_BOXES.fullmatch(row["text"]),
                f"{files.path}: {caption} has boxes in YOLO's format, but a .txt is a caption; "
                "boxes stand in metadata.jsonl",
            )
        label = with_suffix(key, ".cls", known_names)
        if label:
            row["label"] = class_name(files.read_text(label), f"{files.path}: {label}")
        about = with_suffix(key, ".json", known_names)
        if about and name in files.places:
            where = f"{files.path}: {about}"
            folder = name[:name.rindex("/") + 1]
            text = files.read_text(about)
            row = parse_row(text, row, folder, known_names, where, files)
        rows.append(row)

    # A label map or a small image is no image of its own.
    others = files_of(rows, ("mask", "small"))
    return [row for row in rows if row["file_name"] not in others]


def with_suffix(key: str, suffix: str, known_names: set[str]) -> str | None:
    """Return the name of a file beside an image, its suffix in lower or upper case."""
    for name in (key + suffix, key + suffix.upper()):
        if name in known_names:
            return name
    return None


def check_label_column(files: Any, rows: list[dict]) -> None:
    """Raise BadInput if the label column is not the default, and no image has it."""
    column = files.label_column
    columns = ", ".join(sorted(files.columns)) or "none, as there is no metadata"
    require(
        column == "label" or column in files.columns,
        f"{files.path}: no image has the label column {column!r}; there are: {columns}",
    )


# ---- what folders say

def add_folders(files: Any, rows: list[dict]) -> None:
    """Add to each row what its folder says: its split, and a class if none has one.

    Folders around all images say nothing, and neither does the name of a .tar.
    """
    places = within_tars(files, [row["file_name"] for row in rows])
    around_all = common_folder(places)
    folders = []
    for place in places:
        folder = place.removeprefix(around_all).rpartition("/")[0]
        folders.append(folder)

    # Folders like train/ and val/ at the top, whose own folders around all say nothing.
    tops = {folder.partition("/")[0] for folder in folders} - {""}
    if are_splits(tops, files.path):
        for i, row in enumerate(rows):
            top, _, folders[i] = folders[i].partition("/")
            if top:
                row["split"] = split_of(top)
        around_all = common_folder([folder + "/" for folder in folders])
        folders = [(folder + "/").removeprefix(around_all).rstrip("/") for folder in folders]

    if not any("label" in row for row in rows):
        for row, folder in zip(rows, folders):
            if folder:
                row["label"] = unicodedata.normalize("NFC", folder)


def split_of(folder: str) -> str | None:
    """Return the split that a folder names, such as train, Val or test2017; else None."""
    return SPLITS.get(folder.lower().rstrip("0123456789_-"))


def are_splits(tops: set[str], path: Any) -> bool:
    """Return whether the folders at the top are splits.

    Raises BadInput if train and a held-out one are there, and others beside them.
    """
    found = {split_of(top) for top in tops}
    others = ", ".join(sorted(top for top in tops if not split_of(top)))
    require(
        not others or not {"train", "held-out"} <= found,
        f"{path}: its folders are splits like train and val, but there are images in "
        f"{others:.200}, too; move these elsewhere",
    )
    return bool(tops) and not others


def within_tars(files: Any, names: list[str]) -> list[str]:
    """Return the path of each file as if its .tar were unpacked where it lies.

    The folder of a numbered shard that has the shard's own name is left out, too.
    """
    # For each tar: its path, the folder that it is in, and the folder of its own name.
    parts = {}
    for tar in {files.places[name][0] for name in names if name in files.places}:
        folder = tar[:tar.rfind("/") + 1]
        shard = PurePosixPath(tar).stem
        own_folder = shard + "/" if re.search(r"\d$", shard) else ""
        parts[tar] = (tar + "/", folder, own_folder)

    inner = []
    for name in names:
        if name in files.places:
            of_tar, folder, own_folder = parts[files.places[name][0]]
            name = folder + name.removeprefix(of_tar).removeprefix(own_folder)
        inner.append(name)
    return inner


def common_folder(names: list[str]) -> str:
    """Return the folder that all files are in, with a "/" at its end, or ""."""
    common = os.path.commonprefix([min(names, default=""), max(names, default="")])
    return common[:common.rfind("/") + 1]


# ---- what is left out

def count_left_out(files: Any, names: list[str], rows: list[dict]) -> None:
    """Count the files that are neither an image of the set nor belong to one."""
    used = files_of(rows)
    counts: Counter[str] = Counter()
    for name in names:
        if name in used or name in files.texts or posixpath.basename(name) == SETTINGS:
            continue
        _, dot, suffix = name.rpartition(".")
        suffix = suffix.lower()
        if is_image(name):
            counts["images that metadata.jsonl does not name"] += 1
        elif dot and "/" not in suffix:
            counts[f".{suffix}"] += 1
        else:
            counts["without a suffix"] += 1
    files.left_out.update(counts)
