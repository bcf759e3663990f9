"""Checkpoints of ours: one plain dict per file, written completely or not at all.

Stage one:  {"kind": "tinyldm autoencoder", "step", "config", "args", "nets", "opts",
             "idle"}
Stage two:  {"kind": "tinyldm ldm", "step", "config", "size", "classes", "tokenizer",
             "args", "nets", "ema", "ema_n", "ae", "opt"}

"config" has one dict per network, the arguments that shape it; "args" has the flags of
the run; the rest are state dicts. Reading a checkpoint never executes code that the
file contains.
"""
import contextlib
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from tinyldm.engine.processes import fit_to
from tinyldm.engine.recognise import names_in_pickle, recognise_file, recognise_state
from tinyldm.errors import BadInput, require, trying

KIND = "tinyldm "
STAGES = {
    "tinyldm autoencoder": "stage one (train_ae.py)",
    "tinyldm ldm": "stage two (train_ldm.py)",
}


# ---- writing

@contextlib.contextmanager
def atomic_write(path: Path, keep: bool = False) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when it is complete.

    The bytes go to a temporary file in the same folder, which is renamed at the end. So
    a crash leaves the file that was there before, or none.

    keep: rename the file that was there before to NAME.old.pt, unless it is truncated.
    Raises BadInput if the file cannot be written.
    """
    temporary = path.with_name(path.name + ".part")
    with trying(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                # Make sure that the bytes are on the disk before the name is.
                file.flush()
                os.fsync(file.fileno())

            # torch.save writes a zip, whose directory is at its end. So a truncated file
            # is no zip.
            if keep and zipfile.is_zipfile(path):
                path.replace(previous_path(path))
            temporary.replace(path)
        except RuntimeError as error:
            # torch.save raises this on a full disk, and hides the OSError that says so.
            raise error.__context__ or error from None
        finally:
            temporary.unlink(missing_ok=True)


def previous_path(path: Path) -> Path:
    """Return where the checkpoint before `path` is kept: ckpt.pt -> ckpt.old.pt."""
    return path.with_suffix(".old.pt")


def save_checkpoint(checkpoint: dict, path: Path, keep: bool = False) -> None:
    """Write a dict of tensors and plain values, as atomic_write does."""
    with atomic_write(path, keep) as file:
        torch.save(checkpoint, file)


def half(tree: dict) -> dict:
    """Return a nested dict of tensors in fp16."""
    halved = {}
    for name, value in tree.items():
        halved[name] = half(value) if isinstance(value, dict) else value.half()
    return halved


# ---- reading

def unpickle(path: str | Path, mmap: bool = False, allowed: Sequence = ()) -> object:
    """Return what torch.save wrote to a file: tensors and plain values, on the CPU.

    Why weights_only: a pickle can name any function and have it called, so a checkpoint
    from a stranger could run any program. Here a file that names anything is refused,
    unless the name is one of `allowed` (see torch.serialization.safe_globals).

    mmap: map the file into memory instead of reading it.
    Raises BadInput that names the file, and what it is where that is known.
    """
    path = Path(path)
    how = {"map_location": "cpu", "weights_only": True}
    try:
        with torch.serialization.safe_globals(allowed), open(path, "rb") as file:
            # torch takes a name that ends so for the content, and maps no open file.
            if mmap and path.suffix != ".safetensors":
                return torch.load(path, mmap=True, **how)
            return torch.load(file, **how)
    except Exception as error:
        with trying(f"{path}: damaged, or not a checkpoint"):
            reason = why_unreadable(path, error)
        raise BadInput(f"{path}: {reason}") from error


def why_unreadable(path: Path, error: Exception) -> str:
    """Return why torch could not load a file, from its error and the file's content."""
    if path.is_dir():
        return str(recognise_file(path))
    if isinstance(error, OSError):
        return error.strerror or str(error)

    # torch names what a pickle asks for, but only in the protocol that torch writes.
    named = re.findall(r"GLOBAL (\S+)", str(error)) or names_in_pickle(path)
    if named:
        return (
            f"refused: it asks for {named[0]}, which could run code when loaded; give a state "
            "dict or a .safetensors"
        )
    kind = recognise_file(path)
    if kind is not None:
        return str(kind)
    return f"damaged, or not a checkpoint ({type(error).__name__})"


def load_checkpoint(path: str | Path, kind: str | None = None) -> dict:
    """Return one of our checkpoints, of kind "autoencoder" or "ldm"; None takes either.

    Where the file cannot be read, the one before it is taken, with a warning.
    Raises BadInput that names the file.
    """
    path = Path(path)
    try:
        checkpoint = unpickle(path)
    except BadInput as error:
        previous = previous_path(path)
        if not previous.exists():
            raise
        warnings.warn(f"{error}; {previous}, the one before it, is used", stacklevel=2)
        checkpoint = unpickle(previous)

    check_kind(path, checkpoint, kind)
    with trying(f"{path}: its config cannot be read"):
        for shape in checkpoint.get("config", {}).values():
            require(is_buildable(shape), f"{path}: its config has absurd sizes")
    return checkpoint


def check_kind(path: Path, checkpoint: object, kind: str | None) -> None:
    """Raise BadInput, which says what a file holds, unless it is a checkpoint of this kind."""
    is_dict = isinstance(checkpoint, dict)
    found = str(checkpoint.get("kind")) if is_dict else ""
    if not found.startswith(KIND):
        state = checkpoint.get("state_dict", checkpoint) if is_dict else None
        other = recognise_state(state) if isinstance(state, dict) else None
        but = f", but {other.what}" if other else ""
        raise BadInput(
            f"{path}: not a checkpoint of tinyldm{but}; give one of train_ae.py or train_ldm.py"
        )
    if kind is not None and found != KIND + kind:
        stage = STAGES.get(found, found)
        raise BadInput(
            f"{path}: a checkpoint of {stage}, where one of {STAGES[KIND + kind]} is needed"
        )


def check_finite(state: dict[str, Tensor], source: str) -> None:
    """Raise BadInput that names the first tensor with a value that is not a number.

    source: what the state dict is of, such as the path of its file.
    """
    for key, x in state.items():
        require(
            x.isfinite().all(),
            f"{source}: {key} holds values that are not numbers (NaN or infinite); take an "
            "earlier checkpoint, or download it again",
        )


def is_buildable(shape: dict) -> bool:
    """Return whether a config has a sane number of layers and timesteps.

    Why: building is fast on the meta device whatever the widths are, but a file that
    says that there are a billion layers would keep us busy for ever.
    """
    n_levels = len(shape.get("ch_mult", ()))
    n_layers = max(shape.get("n_res", 1), shape.get("depth", 1), n_levels)
    return n_layers < 100 and shape.get("T", 1) < 10 ** 5


# ---- resuming

def resume(path: Path, kind: str, config: dict, parts: dict) -> dict:
    """Fill modules and optimisers from the checkpoint of the run so far.

    config: nested dict of all that the checkpoint must say of the model: what shapes
        each network, {"autoencoder": {...}, ...}, or a whole head of a checkpoint,
        {"config": {"autoencoder": {...}, ...}, "size": 32, "tokenizer": ...}.
    parts: nested dict of modules and optimisers, named as in the checkpoint, to be
        filled.

    Returns the checkpoint; {"step": 0} where there is none yet.
    Raises BadInput that names each difference, or says that the file is damaged.
    """
    if not path.exists() and not previous_path(path).exists():
        return {"step": 0}
    checkpoint = load_checkpoint(path, kind)

    # The first checkpoints of stage two did not name their task, which was text.
    saved_config = {"task": {"name": "text"}} | checkpoint["config"]
    saved = checkpoint | {"config": saved_config} | saved_config
    changed = differences(saved, config)
    require(
        not changed,
        f"{path} was made with {'; '.join(changed)}; give the same values again, or "
        "another folder",
    )

    with trying(f"{path}: its parts do not fit together"):
        fill(parts, checkpoint)
    return checkpoint


def differences(saved: dict, current: dict, name: str = "") -> list[str]:
    """Return one phrase for each value of `current` that is another in `saved`.

    Both are nested dicts; `name` is that of the dict that they are in. Values that
    `saved` does not have are not compared: an older version wrote the file.
    """
    phrases = []
    for key, new in current.items():
        if key not in saved:
            continue
        old = saved[key]
        if isinstance(new, dict):
            phrases += differences(old, new, "" if key == "config" else f"{key} ")
        elif new != old:
            phrases.append(difference(f"{name}{key}", old, new))
    return phrases


def difference(name: str, old: object, new: object) -> str:
    """Return a phrase that says what has changed; a long value is not printed."""
    if len(f"{old}{new}") > 150:
        return f"another value of {name}"
    return f"{name} = {old}, now it is {new}"


def fill(parts: dict, saved: dict) -> None:
    """Load the states of a nested dict of modules and optimisers."""
    for name, part in parts.items():
        if isinstance(part, dict):
            fill(part, saved[name])
        elif isinstance(part, torch.optim.Optimizer):
            fill_optimiser(part, saved[name])
        else:
            fill_module(part, saved[name])


def fill_module(net: nn.Module, saved: dict) -> None:
    """Load a module's state dict."""
    own = net.state_dict()
    state = {name: fit_to(x, own[name]) for name, x in saved.items()}
    net.load_state_dict(state)


def fill_optimiser(optimiser: torch.optim.Optimizer, saved: dict) -> None:
    """Load an optimiser's state dict; moments get the memory layout of their weights."""
    params = optimiser.param_groups[0]["params"]
    state = {}
    for i, values in saved["state"].items():
        state[i] = {}
        for name, x in values.items():
            is_moment = x.ndim > 0          # else it is the number of steps
            state[i][name] = fit_to(x, params[i]) if is_moment else x
    optimiser.load_state_dict(saved | {"state": state})
