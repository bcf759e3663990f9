"""Checkpoints: one plain dict a file, written whole or not at all, read without executing code.

Of released models, too: Lightning's pickles (.ckpt) and .safetensors. Reads: nothing of ours."""
import contextlib
import json
import math
import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from tinyldm import BadInput, require, trying

@contextlib.contextmanager
def written(path: Path, keep: bool = False):
    """A file to write, which takes path's place when it is whole: a crash leaves the one before.
    keep: that stays, as NAME.old.pt, unless it is truncated. Raises BadInput."""
    part = path.with_name(path.name + ".part")
    with trying(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "wb") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            if keep and zipfile.is_zipfile(path):
                path.replace(path.with_suffix(".old.pt"))
            part.replace(path)
        except RuntimeError as e:               # torch's, which hides what the disk said
            raise e.__context__ or e from None
        finally:
            part.unlink(missing_ok=True)

def save_checkpoint(ckpt: dict, path: Path, keep: bool = False) -> None:
    """Of tensors and plain values; keep: as written(). Raises BadInput."""
    with written(path, keep) as f:
        torch.save(ckpt, f)

def unpickle(path: str | Path, where: str, mmap: bool, allowed=()) -> object:
    """What torch.save wrote: tensors, plain values, what is `allowed`; code in a file never runs: a
    pickle that asks for anything else is refused. Raises BadInput."""
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as e:
        raise BadInput(f"{where}: {e.strerror or e}") from e
    except pickle.UnpicklingError as e:
        asked = re.search(r"GLOBAL (\S+)", str(e))
        what = f"it asks for {asked[1]}" if asked else "no checkpoint, or more than plain values"
        raise BadInput(f"{where}: refused: {what}, which could run code when loaded") from e
    except Exception as e:
        raise BadInput(f"{where}: truncated, or not a checkpoint ({type(e).__name__})") from e

def load_checkpoint(path: str | Path, kind: str | None, flag: str) -> dict:
    """One of our files, of a kind ("autoencoder", "ldm", None: either); where it cannot be read,
    the one before it, with a warning. Raises BadInput."""
    old = Path(path).with_suffix(".old.pt")
    try:
        ckpt = unpickle(path, f"{flag} {path}", mmap=False)
    except BadInput as e:
        if not old.exists():
            raise
        warnings.warn(f"{e}; {old} is used, the one before", stacklevel=2)
        ckpt = unpickle(old, f"{flag} {old}", mmap=False)
    found = str(ckpt.get("kind", "")) if isinstance(ckpt, dict) else ""
    require(found.startswith("tinyldm "), f"{flag} {path}: not a checkpoint of tinyldm")
    require(kind in (None, found[8:]), f"{flag} {path}: holds a {found}; give one of kind {kind}")
    with trying(f"{flag} {path}: its config cannot be read"):
        for part in ckpt.get("config", {}).values():        # or it takes for ever to build
            n = max(part.get("n_res", 1), part.get("depth", 1), len(part.get("ch_mult", ())))
            require(n < 100 and part.get("T", 1) < 10 ** 5, f"{flag} {path}: it has absurd sizes")
    return ckpt

def resume(path: Path, kind: str, config: dict, parts: dict) -> dict:
    """Fill parts, a nested dict of modules and optimisers, from the checkpoint of a run with the
    same config. -> the checkpoint; where none is, its step: 0. Raises BadInput for another's."""
    if not path.exists() and not path.with_suffix(".old.pt").exists():
        return {"step": 0}
    ckpt = load_checkpoint(path, kind, "--out")
    old = {"task": {"name": "text"}} | ckpt["config"]
    changed = [f"{part} {k} = {old[part].get(k)}, now it is {v}" for part, new in config.items()
               for k, v in new.items() if v != old[part].get(k)]
    require(not changed, f"{path} was made with {'; '.join(changed)}; use the same flags, or "
            "another --out to start anew")
    def fill(parts, saved):
        for k, part in parts.items():
            if isinstance(part, dict):
                fill(part, saved[k])
            elif isinstance(part, torch.optim.Optimizer):
                params = part.param_groups[0]["params"]
                state = {i: {n: fitting(v, params[i]) if v.ndim else v for n, v in of.items()}
                         for i, of in saved[k]["state"].items()}
                part.load_state_dict(saved[k] | {"state": state})
            else:
                own = part.state_dict()
                part.load_state_dict({n: fitting(v, own[n]) for n, v in saved[k].items()})
    fill(parts, ckpt)
    return ckpt

def states(tree):
    """The state_dicts of a nested dict of modules and optimisers; with FSDP all processes must ask,
    and the first gets them."""
    tree = tree.state_dict() if hasattr(tree, "state_dict") else tree
    if isinstance(tree, dict):
        return {k: states(v) for k, v in tree.items()}
    if not hasattr(tree, "full_tensor"):
        return tree
    return whole(tree).cpu() if torch.distributed.get_rank() == 0 else whole(tree)[:0]

def whole(x: Tensor) -> Tensor:
    """A tensor, gathered from all processes where FSDP holds it in parts."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x

def fitting(x: Tensor, like: Tensor) -> Tensor:
    """x, laid out in memory as like is; this process's part of it where FSDP has like in parts."""
    if hasattr(like, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # to import it takes a second
        x = x.to(like.device).contiguous()
        return distribute_tensor(x, like.device_mesh, like.placements)
    return torch.empty_like(like).copy_(x)

def half(tree: dict) -> dict:
    """A nested dict of tensors, in fp16."""
    return {k: half(v) if isinstance(v, dict) else v.half() for k, v in tree.items()}

# ---- released models
class Inert(dict):
    """Stands for what a trainer left in a file beside the weights: it holds and does nothing."""
    __init__ = __setstate__ = lambda self, *_: None

ALLOWED = [(Inert, name) for name in (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}

def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, or a pickle of torch with or without Lightning's wrapping,
    mapped into memory, not read, where the format allows. Raises BadInput."""
    with trying(f"{path}: not a checkpoint"):
        if Path(path).suffix == ".safetensors":
            return read_safetensors(Path(path))
        state = unpickle(path, path, zipfile.is_zipfile(path), ALLOWED)
        state = state.get("state_dict", state)
        return {str(k): v for k, v in state.items() if isinstance(v, Tensor)}

def read_safetensors(path: Path) -> dict[str, Tensor]:
    """8 bytes: n, little-endian; n bytes of JSON {name: {dtype, shape, data_offsets}}; the data.
    Nothing is believed: n and offsets must lie in the file, extents fit shapes. Raises BadInput."""
    size, out = path.stat().st_size, {}
    with trying(f"{path}: truncated, or its header is wrong"):
        with open(path, "rb") as f:
            n = int.from_bytes(f.read(8), "little")
            if n > min(size - 8, 100_000_000):
                raise ValueError(f"it says that it has {n:,} bytes")
            header = json.loads(f.read(n))
        header.pop("__metadata__", None)
        data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + n:]
        for name, entry in header.items():
            dtype, shape, (a, b) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if not (all(type(v) is int and v >= 0 for v in (a, b, *shape)) and b <= len(data)
                    and math.prod(shape) * dtype.itemsize == b - a):
                raise ValueError(f"{name[:99]!r} does not fit")
            raw = data[a:b]
            aligned = raw.storage_offset() % dtype.itemsize == 0
            out[name] = (raw if aligned else raw.clone()).view(dtype).reshape(shape)
    return out

def write_state(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors as .safetensors or, for another suffix, as {"state_dict": ...}; or BadInput."""
    if path.suffix != ".safetensors":
        return save_checkpoint({"state_dict": {k: v.contiguous() for k, v in state.items()}}, path)
    names, header, end = {v: k for k, v in DTYPES.items()}, {}, 0
    for k, v in state.items():
        start, end = end, end + v.nbytes
        header[k] = {"dtype": names[v.dtype], "shape": list(v.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with written(path) as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.writelines(v.contiguous().reshape(-1).view(torch.uint8).numpy() for v in state.values())
