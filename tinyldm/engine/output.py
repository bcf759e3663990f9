"""What sample.py writes: one file of all images, or a folder with a file for each.

A folder keeps settings.json beside its images: all that decides what they show. Images of
other settings, or of unknown ones, are never mixed with them. metadata.jsonl has the caption or
the class of each image, so that the folder is a data set (data/README.md).
"""
import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tinyldm.data.images import to_image
from tinyldm.data.rows import SETTINGS
from tinyldm.engine.checkpoint import atomic_write, bytes_of, difference, digest
from tinyldm.engine.processes import wait_for_all
from tinyldm.engine.request import Request
from tinyldm.errors import require, trying
from tinyldm.model import LatentDiffusion

# Suffixes of files that are written, in any case, and of images that are not.
WRITTEN = (".png", ".jpg", ".jpeg", ".webp")
NOT_WRITTEN = (
    ".apng", ".avif", ".bmp", ".gif", ".heic", ".heif", ".ico", ".jfif", ".jp2", ".jpe", ".pdf",
    ".pgm", ".pnm", ".ppm", ".svg", ".tga", ".tif", ".tiff",
)

METADATA = "metadata.jsonl"
KIND = "tinyldm samples"            # what settings.json says that it is
NUMBERED = re.compile(r"\d{6,}\.png")


# ---- names

def is_image_file(path: Path) -> bool:
    """Return whether a path to write to is one image file, by its suffix; else it is a folder.

    Raises BadInput for the suffix of an image format that is not written, and for a folder
    that has a file's name.
    """
    suffix = path.suffix.lower()
    written = ", ".join(WRITTEN)
    require(
        suffix not in NOT_WRITTEN,
        f"{path}: images are written as {written}; any name without such a suffix is a folder",
    )
    is_file = suffix in WRITTEN
    require(not (is_file and path.is_dir()), f"{path}: is a folder, but its name is an image's")
    return is_file


def image_paths(folder: Path, first: int, last: int) -> list[Path]:
    """Return the files of images first, first + 1, ..., last - 1."""
    return [folder / f"{i:06d}.png" for i in range(first, last)]


def save_images(images: Tensor, paths: Sequence[Path]) -> None:
    """Save each image as a file of its own."""
    for x, path in zip(images, paths):
        with atomic_write(path) as file:
            to_image(x).save(file, "PNG")


# ---- settings

def settings_of(model: LatentDiffusion, request: Request, **how: object) -> dict:
    """Return all that decides what the images show, as JSON has it.

    how: how they are sampled: sampler, steps, seed, ...
    """
    # Held-out conditions are those of the data set as it is now.
    conditions = None
    held_out = None
    if request.is_held_out:
        fingerprint = json.dumps(request.conditions.dataset.fingerprint())
        held_out = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    else:
        conditions = plain_conditions(request)

    settings = {
        "kind": KIND,
        "model": digest_of_model(model),
        "task": model.config.task,
        "size": request.size,
        "n": len(request),
        "n_each": request.n_each,
        "conditions": conditions,
        "held_out": held_out,
        "shared": {name: plain(value) for name, value in request.shared.items()},
    }
    return json.loads(json.dumps(settings | how))


def digest_of_model(model: LatentDiffusion) -> str:
    """Return a hash of the weights that sample, and of the shapes and words around them."""
    config = dataclasses.asdict(model.config)
    parts = [repr(config)]
    for net in (model.ae, *model.networks.values()):
        parts.append(digest(net.state_dict()))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def plain_conditions(request: Request) -> dict[str, list]:
    """Return the given conditions, by field."""
    fields = request.conditions[0]
    return {field: [plain(c[field]) for c in request.conditions] for field in fields}


def plain(value: object) -> object:
    """Return a condition's value as JSON has it: a hash in the place of a tensor."""
    if isinstance(value, Tensor):
        return hashlib.sha256(bytes_of(value)).hexdigest()[:16]
    return value


# ---- metadata

def metadata_of(model: LatentDiffusion, request: Request) -> list[dict]:
    """Return a row of metadata.jsonl per image; none if the task has no captions or classes."""
    fields = model.task.fields
    if "caption" not in fields and "label" not in fields:
        return []

    rows = []
    for condition in request.conditions:
        known = {}
        if "caption" in fields:
            known["text"] = condition["caption"]
        if "label" in fields:
            known["label"] = class_name(model, condition["label"])
        for _ in range(request.n_each):
            [path] = image_paths(Path(), len(rows), len(rows) + 1)
            rows.append({"file_name": path.name} | known)
    return rows


def class_name(model: LatentDiffusion, label: int) -> str | int:
    """Return the name of a class; its number, if the model knows no name."""
    names = model.task.class_names
    return names[label] if label < len(names) else label


# ---- the folder

def prepare_folder(
    folder: Path, settings: dict, metadata: list[dict], *, replace: bool, main: bool
) -> None:
    """Make a folder ready for images of these settings; write settings and metadata into it.

    metadata: a row per image; only the process that writes needs them.
    replace: remove the numbered images that are there.
    main: whether this process writes, or another one. All processes must call this.
    Raises BadInput if there are images of other settings, or of unknown ones, or metadata of
    something else.
    """
    # All processes look before one of them writes, so that all find the same.
    saved = read_settings(folder / SETTINGS)
    require(
        saved or not (folder / METADATA).exists(),
        f"{folder}: has a {METADATA} that is not of samples; take another folder",
    )
    if not replace and numbered_images(folder):
        check_same(folder, saved, settings)
    wait_for_all()

    # Images go before the settings that they were made with.
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        if replace:
            for path in numbered_images(folder):
                path.unlink()
        if changes(saved or {}, settings):
            (folder / METADATA).unlink(missing_ok=True)
        with atomic_write(folder / SETTINGS) as file:
            file.write(json.dumps(settings, indent=1, ensure_ascii=False).encode())
        # Metadata of the same settings stay: a user may have corrected them.
        if metadata and not (folder / METADATA).exists():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in metadata]
            with atomic_write(folder / METADATA) as file:
                file.write("".join(lines).encode())
    wait_for_all()


def check_same(folder: Path, saved: dict | None, settings: dict) -> None:
    """Raise BadInput unless the images in a folder, of the saved settings, are of these."""
    advice = "take another folder, or --replace them"
    require(saved, f"{folder}: has numbered images, but no {SETTINGS} that says of what; {advice}")

    changed = changes(saved, settings)
    require(not changed, f"{folder}: its images have {'; '.join(changed)}; {advice}")


def changes(saved: dict, settings: dict) -> list[str]:
    """Return what differs in the saved settings from these, one text per setting."""
    changed = []
    for name, new in settings.items():
        old = saved.get(name)
        if old != new:
            changed.append(difference(name, old, new))
    return changed


def read_settings(path: Path) -> dict | None:
    """Return what prepare_folder wrote; None if there is nothing.

    Raises BadInput for a file of the same name that is something else.
    """
    if not path.exists():
        return None
    with trying(f"{path}: cannot be read"):
        saved = json.loads(path.read_bytes())
    is_ours = isinstance(saved, dict) and saved.get("kind") == KIND
    require(is_ours, f"{path}: holds no settings of samples; take another folder")
    return saved


def numbered_images(folder: Path) -> list[Path]:
    """Return the images in a folder that are named as image_paths names them."""
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.iterdir()) if NUMBERED.fullmatch(path.name)]
