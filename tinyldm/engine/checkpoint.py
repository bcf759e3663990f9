"""Checkpoints of ours: one plain dict per file, written completely or not at all.

Stage one:  {"kind": "tinyldm autoencoder", "step", "config", "args", "nets", "opts",
             "idle", "n_images"}
Stage two:  {"kind": "tinyldm ldm", "step", "config", "size", "classes", "tokenizer",
             "args", "init", "n_images", "nets", "ema", "ema_n", "opt", "stage_one",
             "z_std"}

LoRA:       {"kind": "tinyldm lora", ...}, as stage two, but with the low-rank pairs alone

"config" has one dict per network, the arguments that shape it; "args" has the flags of
the run; "init" says which model it started from; "stage_one" is the name of a file beside
this one; the rest are state dicts. A model.pt, which is for sampling, has two of these
alone: "ema", the averaged weights, and "ae", those of stage one. Reading a checkpoint never
executes code that the file contains.
"""
import contextlib
import dataclasses
import hashlib
import json
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
from tinyldm.errors import BadInput, naming, require, trying

KIND = "tinyldm "
STAGES = {
    "tinyldm autoencoder": "stage one (train_ae.py)",
    "tinyldm ldm": "stage two (train_ldm.py)",
    "tinyldm lora": "a LoRA in training",
}
FLAGS = {
    "tinyldm autoencoder": "; it is for train_ldm.py --ae",
    "tinyldm ldm": "; it is for sample.py --ckpt and train_ldm.py --init",
    "tinyldm lora": "; the lora.safetensors beside it is for sample.py --lora",
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
    return path.parent / f"{path.stem}.old.pt"


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
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")         # the error below says more
            if path.suffix != ".safetensors":
                return torch.load(path, mmap=mmap, **how)
            # torch takes such a name for the content; an open file is read for what it is.
            with open(path, "rb") as file:
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
            f"refused: it asks for {short(named[0])}, which could run code when loaded; give a "
            "state dict or a .safetensors"
        )
    kind = recognise_file(path)
    if kind is not None:
        return str(kind)
    return f"damaged, or not a checkpoint ({type(error).__name__})"


def load_checkpoint(path: str | Path, kind: str | None = None, mmap: bool = False) -> dict:
    """Return one of our checkpoints, of kind "autoencoder", "ldm" or "lora"; None: of a stage.

    Where the file cannot be read, the one before it is taken, with a warning.
    mmap: map the file into memory instead of reading it.
    Raises BadInput that names the file.
    """
    path = Path(path)
    try:
        checkpoint = unpickle(path, mmap)
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
    if "stage_one" in checkpoint:
        checkpoint["ae"] = stage_one_state(path, checkpoint, mmap)
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
    if kind is None:
        is_lora = found == KIND + "lora"
        require(not is_lora, f"{path}: a checkpoint of {STAGES[found]}{FLAGS[found]}")
    elif found != KIND + kind:
        stage = STAGES.get(found, "another kind")
        raise BadInput(
            f"{path}: a checkpoint of {stage}, where one of {STAGES[KIND + kind]} is needed"
            f"{FLAGS.get(found, '')}"
        )


def check_finite(state: dict[str, Tensor]) -> None:
    """Raise BadInput that names the first tensor with a value that is not a number."""
    for key, x in state.items():
        require(
            x.isfinite().all(),
            f"{key} holds values that are not numbers (NaN or infinite); take an "
            "earlier checkpoint, or download it again",
        )


def is_buildable(shape: dict) -> bool:
    """Return whether a config has a sane number of layers and timesteps.

    Why: building is fast on the meta device whatever the widths are, but a file that
    says that there are a billion layers would keep us busy for ever.
    """
    n_levels = len(shape.get("ch_mult", ()))
    n_layers = [shape.get(name, 1) for name in ("n_res", "depth", "n_block")]
    return max(*n_layers, n_levels) < 100 and shape.get("T", 1) < 10 ** 5


# ---- the frozen stage one of a run of stage two

def keep_stage_one(ae: nn.Module, folder: Path) -> str:
    """Write stage one into the folder of a run, once, and return the file's name.

    It is an ordinary checkpoint of stage one. A hash of its weights is in its name, so
    another stage one gets another file.
    Why not in ckpt.pt: these weights never change, but ckpt.pt is written again and
    again, and the one before it is kept.
    """
    state = ae.state_dict() | {"z_std": torch.ones(())}     # z_std belongs to stage two
    path = folder / f"stage_one_{digest(state)[:12]}.pt"
    if not path.exists():
        checkpoint = {"kind": "tinyldm autoencoder", "step": 0}
        checkpoint["config"] = {"autoencoder": dataclasses.asdict(ae.cfg)}
        save_checkpoint(checkpoint | {"nets": {"ae": state}}, path)
    return path.name


def stage_one_state(path: Path, checkpoint: dict, mmap: bool) -> dict[str, Tensor]:
    """Return the weights of the stage one that lies beside a checkpoint, with its z_std."""
    with trying(f"{path}: it does not say which stage one it has"):
        name = Path(checkpoint["stage_one"]).name           # a file beside it, no other
        z_std = checkpoint["z_std"]
        beside = path.with_name(name)
    require(
        beside.exists(),
        f"{path}: {name}, its stage one, is not beside it; copy it too, or take model.pt",
    )
    stage_one = load_checkpoint(beside, "autoencoder", mmap)
    with trying(f"{beside}: its parts do not fit together"):
        return stage_one["nets"]["ae"] | {"z_std": z_std}


def autoencoder_state(checkpoint: dict) -> dict[str, Tensor]:
    """Return the autoencoder's weights in a checkpoint of either stage."""
    return checkpoint["ae"] if "ae" in checkpoint else checkpoint["nets"]["ae"]


def digest(state: dict[str, Tensor]) -> str:
    """Return a hash of the names and values of a state dict."""
    found = hashlib.sha256()
    for name, x in state.items():
        found.update(name.encode())
        found.update(bytes_of(x))
    return found.hexdigest()


def bytes_of(x: Tensor) -> memoryview:
    """Return the bytes of a tensor's values."""
    values = x.detach().cpu().contiguous().flatten()
    return values.view(torch.uint8).numpy().data


# ---- resuming

def resume(
    path: Path,
    kind: str,
    config: dict,
    parts: dict,
    n_images: int,
    stage_one: str | Path = "",
) -> dict:
    """Fill modules and optimisers from the checkpoint of the run so far.

    config: nested dict of all that the checkpoint must say of the model: what shapes
        each network, {"autoencoder": {...}, ...}, or a whole head of a checkpoint,
        {"config": {"autoencoder": {...}, ...}, "size": 32, "tokenizer": ...}.
    parts: nested dict of modules and optimisers, named as in the checkpoint, to be
        filled. If it has a stage one as "ae", this must have the checkpoint's weights,
        and gets its z_std.
    n_images: the number of training images. If it has changed, a warning says so.
    stage_one: the file that "ae" comes from.

    Returns the checkpoint; {"step": 0} where there is none yet.
    Raises BadInput that names each difference, or says that the file is damaged.
    """
    if not path.exists() and not previous_path(path).exists():
        return {"step": 0}
    checkpoint = load_checkpoint(path, kind)

    with trying(f"{path}: its parts do not fit together"):
        # The first checkpoints of stage two did not name their task, which was text, nor
        # their backbone. They started from no other model, and knew no prior set and no
        # teacher.
        saved_config = {"task": {"name": "text"}, "backbone": {"name": "unet"}}
        saved_config |= checkpoint["config"]
        saved = {"init": None, "prior weight": None, "distill": None} | checkpoint
        saved |= {"config": saved_config} | saved_config
        changed = differences(saved, config)
        if "ae" in parts and not changed:
            changed = stage_one_differences(checkpoint, parts["ae"], stage_one)
        grown = set_change(checkpoint, n_images)
        require(
            not changed,
            f"{path} was made with {'; '.join([*changed, *grown])}; give the same values "
            "again, or another folder",
        )
        for phrase in grown:
            warnings.warn(f"{path}: {phrase}; the run goes on with these", stacklevel=2)

        with naming(str(path)):
            fill(parts, checkpoint)
    return checkpoint


def set_change(checkpoint: dict, n_images: int) -> list[str]:
    """Return a phrase if the data set had another number of images; else none."""
    before = checkpoint.get("n_images", n_images)       # an older version did not save it
    if before == n_images:
        return []
    step = checkpoint["step"]
    return [f"the data set had {before:,} images at step {step:,}, and has {n_images:,} now"]


def stage_one_differences(checkpoint: dict, ae: nn.Module, path: str | Path) -> list[str]:
    """Return a phrase if stage one has other weights than the one in the checkpoint.

    z_std is not compared: it is measured in stage two. Nor is the name of the file, which
    may have been moved.
    """
    for key, x in ae.state_dict().items():
        if key != "z_std" and not torch.equal(x.cpu(), checkpoint["ae"][key]):
            before = checkpoint.get("args", {}).get("ae")
            return [f"stage one = {before}, now it is {path}, whose {key} has other values"]
    return []


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
        if key == "tokenizer" and old and new:
            old = tokenizer_parts(old)
            new = tokenizer_parts(new)
        if isinstance(new, dict) and isinstance(old, dict):
            phrases += differences(old, new, "" if key == "config" else f"{name}{key} ")
        elif new != old:
            phrases.append(difference(f"{name}{key}", old, new))
    return phrases


def difference(name: str, old: object, new: object) -> str:
    """Return a phrase that says what has changed, from which value to which."""
    old_text, new_text = both_texts(old, new)
    return f"{name} = {old_text}, now it is {new_text}"


def tokenizer_parts(text: str) -> dict:
    """Return what the JSON of a tokenizer says, with its vocabulary as a list of words."""
    parts = json.loads(text)
    vocab = parts["model"].pop("vocab")
    return {"words": sorted(vocab, key=vocab.get)} | parts


def both_texts(old: object, new: object) -> tuple[str, str]:
    """Return two values as short texts that show how they differ.

    Long lists are shown from the first item that differs.
    """
    if not (isinstance(old, list) and isinstance(new, list)):
        return short(old), short(new)
    n_same = 0
    while old[:n_same + 1] == new[:n_same + 1]:
        n_same += 1
    start = n_same if max(len(old), len(new)) > 10 else 0
    return list_text(old, start), list_text(new, start)


def list_text(values: list, start: int) -> str:
    """Return up to ten values of a list as text, from number `start` on."""
    shown = [short(value) for value in values[start:start + 10]]
    if start > 0:
        shown.insert(0, "...")
    if start + 10 < len(values):
        shown.append("...")
    total = f" ({len(values):,} in all)" if "..." in shown else ""
    return f"[{', '.join(shown)}]{total}"


def short(value: object) -> str:
    """Return a value as one line of at most 80 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


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
    """Load a module's state dict. Raises BadInput for values that are not numbers."""
    check_finite(saved)
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
            require(
                x.isfinite().all(),
                f"the optimiser's {name} holds values that are not numbers (NaN or infinite); "
                "take an earlier checkpoint",
            )
            is_moment = x.ndim > 0          # else it is the number of steps
            state[i][name] = fit_to(x, params[i]) if is_moment else x
    optimiser.load_state_dict(saved | {"state": state})
