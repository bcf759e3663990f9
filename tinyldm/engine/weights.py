"""Weights from strangers: released models, torchvision's VGG16, the FID's Inception.

A pickle can run any program when it is loaded, and a .safetensors can lie about its
sizes. So only tensors are taken from files, and every size in a header is checked.
"""
import json
import math
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyldm.engine.checkpoint import atomic_write, check_finite, save_checkpoint, unpickle
from tinyldm.engine.recognise import recognise_state
from tinyldm.errors import BadInput, naming, require, trying
from tinyldm.perceptual import VGG16, Perceptual, random_vgg

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


# ---- networks that losses and metrics use

def load_public(net: nn.Module, url: str, path: str | Path | None, prefix: str = "") -> nn.Module:
    """Fill net with a published state dict, from a file or, once, from the internet.

    path: the file; None fetches url into torch's cache (~/.cache/torch).
    prefix: only the keys that begin with it are taken.
    Raises BadInput. TorchScript is refused, too: it is a program, not weights.
    """
    try:
        if path is None:
            state = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", check_hash=True, weights_only=True
            )
        else:
            state = read_state(path)
            kind = recognise_state(state)
            if kind is not None:
                raise BadInput(kind.what)
        wanted = {key: x for key, x in state.items() if key.startswith(prefix)}
        net.load_state_dict(wanted)
    except Exception as error:
        reason = type(error).__name__
        if isinstance(error, BadInput):
            reason = str(error).removeprefix(f"{path}: ")
        file_name = url.split("/")[-1]
        raise BadInput(
            f"{path or url}: no weights ({reason}); give the path of {file_name}, or choose "
            "what needs no file: the perceptual loss `random`, the features `texture`"
        ) from error
    with naming(str(path or url)):
        check_finite(net.state_dict())
    return net


def open_vgg16(path: str | Path | None = None) -> VGG16:
    """Return torchvision's VGG16, without its classifier; path as in load_public."""
    return load_public(VGG16(), VGG16_URL, path, "features.")


def open_perceptual(
    kind: str,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Perceptual | None:
    """Return the perceptual distance, frozen.

    kind: "vgg16", "random" (which needs no file), or "none", for which None is returned.
    weights: the file of the VGG16, as in load_public.
    """
    if kind == "none":
        return None
    vgg = random_vgg() if kind == "random" else open_vgg16(weights)
    return Perceptual(vgg).to(device)


# ---- state dicts of released models

class Inert(dict):
    """Takes the place of what a trainer left in a file; it does nothing."""

    def __init__(self, *ignored: object):
        pass

    def __setstate__(self, ignored: object) -> None:
        pass


# The objects that Lightning saves with a model: (what stands in for it, its name).
ALLOWED = [
    (Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (Inert, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
    (Inert, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (Inert, "numpy.core.multiarray.scalar"),
    (Inert, "numpy._core.multiarray.scalar"),
    (Inert, "numpy.dtype"),
]


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors, or of a pickle of torch or Lightning.

    They are mapped into memory, not read, where the format allows it.
    Raises BadInput that names the file.
    """
    return read_file(path)[0]


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, as read_state does, and the texts beside them, by name."""
    path = Path(path)
    with trying(f"{path}: not a checkpoint"):
        if is_safetensors(path):
            return read_safetensors(path)
        content = unpickle(path, mmap=zipfile.is_zipfile(path), allowed=ALLOWED)
        require(isinstance(content, dict), f"{path}: holds a {type(content).__name__}, no weights")
        state = content.get("state_dict", content)
        state = {str(key): x for key, x in state.items() if isinstance(x, Tensor)}
        return state, texts_in(content)


def texts_in(content: object) -> dict[str, str]:
    """Return the texts of a dict by name; none if it is something else."""
    entries = content.items() if isinstance(content, dict) else ()
    return {str(key): value for key, value in entries if isinstance(value, str)}


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins like a .safetensors, whatever its name is."""
    if not path.is_file() or zipfile.is_zipfile(path):
        return False
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def write_state(
    state: dict[str, Tensor], path: Path, texts: dict[str, str] | None = None
) -> None:
    """Write tensors as .safetensors or, for another suffix, as {"state_dict": ...}.

    texts: what read_file returns beside the tensors. Raises BadInput if the file cannot be
    written.
    """
    if path.suffix == ".safetensors":
        write_safetensors(state, path, texts)
    else:
        contiguous = {key: x.contiguous() for key, x in state.items()}
        save_checkpoint({"state_dict": contiguous} | (texts or {}), path)


# ---- .safetensors: 8 bytes, n, little-endian; n bytes of JSON, {name: {"dtype", "shape",
# "data_offsets": [begin, end]}}; then the data, to which the offsets refer. One name stands
# for no tensor: "__metadata__" has texts by name.

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 100_000_000


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a .safetensors, mapped into memory, and its texts.

    Raises BadInput for a header whose sizes do not fit the file.
    """
    size = path.stat().st_size
    with trying(f"{path}: its header is wrong"):
        with open(path, "rb") as file:
            n = int.from_bytes(file.read(8), "little")
            if n > LARGEST_HEADER:
                raise ValueError(f"it says that it has {n:,} bytes")
            require(8 + n <= size, f"{path}: truncated: it ends within its header")
            header = json.loads(file.read(n))
        texts = texts_in(header.pop("__metadata__", None))

        data = torch.from_file(str(path), size=size, dtype=torch.uint8)[8 + n:]
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        require(
            end <= len(data),
            f"{path}: truncated: it holds {len(data):,} bytes of data, and its header says {end:,}",
        )
        return {name: tensor_at(data, name, entry) for name, entry in header.items()}, texts


def tensor_at(data: Tensor, name: str, entry: dict) -> Tensor:
    """Return the tensor that an entry of the header describes.

    data: the bytes of all tensors. Raises ValueError if the entry does not fit the data.
    """
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name[:99]!r} has the dtype {entry['dtype']!r:.99}, which is not known")
    dtype = DTYPES[entry["dtype"]]
    shape = entry["shape"]
    begin, end = entry["data_offsets"]

    # bool is a kind of int in Python, and JSON has both.
    are_sizes = all(type(v) is int and v >= 0 for v in (begin, end, *shape))
    fits = are_sizes and end <= len(data) and math.prod(shape) * dtype.itemsize == end - begin
    if not fits:
        raise ValueError(f"{name[:99]!r} does not fit")

    raw = data[begin:end]
    if raw.storage_offset() % dtype.itemsize != 0:
        raw = raw.clone()                   # torch wants numbers at multiples of their size
    return raw.view(dtype).reshape(shape)


def write_safetensors(
    state: dict[str, Tensor], path: Path, texts: dict[str, str] | None = None
) -> None:
    """Write tensors as .safetensors. Raises BadInput if the file cannot be written."""
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict = {"__metadata__": texts} if texts else {}
    end = 0
    for name, x in state.items():
        begin = end
        end = begin + x.nbytes
        header[name] = {
            "dtype": dtype_names[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [begin, end],
        }

    # Spaces fill the header up to a multiple of 8, so that the data are aligned.
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for x in state.values():
            file.write(x.contiguous().reshape(-1).view(torch.uint8).numpy())
