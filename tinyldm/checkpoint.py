"""Checkpoints: one plain dict a file, written whole or not at all, read without executing code.

Reads:   nothing of ours.
"""
import io
import os
import pickle
from pathlib import Path

import torch

from tinyldm import BadInput


def save_checkpoint(ckpt: dict, path: Path) -> None:
    """Write under a temporary name, then rename: a crash leaves the old file. Raises BadInput."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as e:
        raise BadInput(f"cannot write {path}: {e}") from e


def load_checkpoint(path: str | Path, kind: str, flag: str) -> dict:
    """A checkpoint of a kind ("autoencoder", "ldm"); code in it never runs. Raises BadInput."""
    try:
        data = Path(path).read_bytes()
        ckpt = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except OSError as e:
        raise BadInput(f"{flag} {path}: {e.strerror or e}") from e
    except pickle.UnpicklingError as e:
        raise BadInput(f"{flag} {path}: refused, because it holds more than tensors and plain "
                       "values (or is no checkpoint) and could run code when loaded") from e
    except Exception as e:
        raise BadInput(f"{flag} {path}: truncated, or not a checkpoint ({type(e).__name__})") from e
    found = str(ckpt.get("kind", "")) if isinstance(ckpt, dict) else ""
    if not found.startswith("tinyldm "):
        raise BadInput(f"{flag} {path}: not a checkpoint of tinyldm")
    if found != f"tinyldm {kind}":
        raise BadInput(f"{flag} {path}: holds a {found}, but a tinyldm {kind} belongs here")
    return ckpt


def same_config(old: dict, new: dict, path: Path) -> None:
    """Resuming needs the architecture that was saved. Raises BadInput naming what differs."""
    for part in new:
        for k, v in new[part].items():
            if old[part].get(k) != v:
                raise BadInput(f"{path} was made with {part} {k} = {old[part].get(k)}, now it is "
                               f"{v}; use the same flags, or another --out to start anew")


def half(tree: dict) -> dict:
    """A nested dict of tensors, in fp16."""
    return {k: half(v) if isinstance(v, dict) else v.half() for k, v in tree.items()}
