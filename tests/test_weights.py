"""Strangers' weights: tensors come back, and a file that lies or wants to run code is refused."""
import io
import json
import os
import pickle
import struct
import sys

import pytest
import torch
from torch.testing import assert_close

from tinyldm.engine.weights import load_public, open_perceptual, read_state, write_state
from tinyldm.errors import BadInput


def check_refused(path, match):
    """Reading must raise BadInput, one line that names the file."""
    with pytest.raises(BadInput, match=match) as error:
        read_state(path)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message


# ---- both kinds of file

@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_tensors_come_back_from_both_kinds_of_file(tmp_path, suffix):
    """Every dtype and shape, none and strided ones too, bit for bit."""
    state = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).half(),
        "c": torch.arange(4),
        "d": torch.tensor(2.5),
        "e": torch.zeros(0, 3),
        "f": torch.randn(4, 6).T.bfloat16(),
    }
    path = tmp_path / f"x{suffix}"
    write_state(state, path)

    assert_close(read_state(path), state, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_truncated_and_missing_files_are_refused(tmp_path, suffix):
    """Whatever is left of a file, the error names it."""
    path = tmp_path / f"x{suffix}"
    check_refused(path, "No such file")

    write_state({"a": torch.randn(1000), "b": torch.randn(1000)}, path)
    content = path.read_bytes()
    for n in (0, 4, 9, 100, 5000, len(content) - 1):
        path.write_bytes(content[:n])
        check_refused(path, "truncated|an empty file")


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_list_is_no_state_dict(tmp_path, suffix):
    """A file of torch that holds something else is refused."""
    path = tmp_path / f"x{suffix}"
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    path.write_bytes(buffer.getvalue())

    check_refused(path, "holds a list, no weights")


# ---- pickles

class Evil:
    """A pickle of it runs a program when it is loaded, if the reader lets it."""

    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


class ModelCheckpoint:
    """As Lightning pickles it, by this name."""


def test_a_pickle_that_asks_for_code_is_refused_by_name(tmp_path):
    """The error says which function the file wants to have called."""
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "x": Evil()}, path)
    check_refused(path, r"asks for \w+\.system")

    path.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    check_refused(path, r"evil.ckpt: ")


def test_what_lightning_leaves_beside_the_weights_does_not_disturb(tmp_path, monkeypatch):
    """Its callbacks and numpy's numbers are ignored; the weights are read."""
    module = "pytorch_lightning.callbacks.model_checkpoint"
    monkeypatch.setattr(ModelCheckpoint, "__module__", module)
    lightning = type(sys)(module)
    lightning.ModelCheckpoint = ModelCheckpoint
    parts = module.split(".")
    for i in range(1, 4):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), lightning)

    callback = ModelCheckpoint()
    callback.best_k_models = {"a": 1}
    numpy_number = torch.ones(()).numpy()[()]
    content = {
        "state_dict": {"a": torch.ones(2)},
        "callbacks": {ModelCheckpoint: {"best": numpy_number}},
        "hooks": [callback],
        "epoch": 3,
    }
    torch.save(content, tmp_path / "x.ckpt")

    assert_close(read_state(tmp_path / "x.ckpt"), {"a": torch.ones(2)})


# ---- .safetensors

def write_raw(path, header, data=b"", n=None):
    """Write a .safetensors by hand; header is JSON or bytes, n what it says of its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if n is None:
        n = len(text)
    path.write_bytes(struct.pack("<Q", n) + text + data)
    return path


@pytest.mark.parametrize("n", [10, 2 ** 63, 99_999_999])
def test_a_header_that_lies_about_its_length_is_refused(tmp_path, n):
    """Nothing is read beyond the file, and no memory is asked for."""
    check_refused(write_raw(tmp_path / "x.safetensors", {}, n=n), "header")


@pytest.mark.parametrize("header", [
    b"{not json",
    b"[1]",
    b"[" * 100_000,
    {"a": 7},
    {"a": {"shape": [0]}},
])
def test_a_header_that_is_none_is_refused(tmp_path, header):
    """Not JSON, not a dict, or an entry without its fields."""
    check_refused(write_raw(tmp_path / "x.safetensors", header), "header")


@pytest.mark.parametrize("dtype, shape, offsets, n_bytes", [
    ("F32", [2], [0, 8], 4),                            # the data are too short
    ("F32", [2], [0, 4], 8),                            # the extent is too short
    ("F32", [2], [-8, 0], 8),
    ("F32", [2], [8, 0], 8),
    ("F32", [-1, -2], [0, 8], 8),
    ("F32", [10 ** 30], [0, 4 * 10 ** 30], 0),
    ("X9", [2], [0, 8], 8),
    ("F32", 2, [0, 8], 8),
    ("F32", [True, 2], [0, 8], 8),
    ("U8", [True], [1, 0], 8),
    ("U8", [True], [0, 1], 8),
])
def test_an_entry_that_does_not_fit_the_data_is_refused(
    tmp_path, dtype, shape, offsets, n_bytes
):
    """Sizes must be whole numbers, extents must fit the shape and lie in the file."""
    header = {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}
    path = write_raw(tmp_path / "x.safetensors", header, bytes(n_bytes))
    check_refused(path, "header")


def test_unaligned_tensors_are_read(tmp_path):
    """A float32 at an odd offset, as other writers leave it."""
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},
    }
    data = b"\7" + struct.pack("<f", 1.5)
    path = write_raw(tmp_path / "x.safetensors", header, data)

    assert_close(read_state(path), {"a": torch.tensor([7]).byte(), "b": torch.tensor([1.5])})


# ---- networks that losses and metrics use

def test_a_public_file_fills_a_network_and_its_other_keys_are_left_out(tmp_path):
    """prefix takes VGG16's convolutions and leaves its classifier."""
    path = tmp_path / "x.pth"
    net = torch.nn.ModuleDict({"features": torch.nn.Linear(3, 2)})
    state = {name: torch.ones_like(x) for name, x in net.state_dict().items()}
    torch.save(state | {"classifier.weight": torch.zeros(1)}, path)

    load_public(net, "https://example.org/x.pth", path, "features.")
    assert net["features"].weight.eq(1).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused(tmp_path):
    """It is a program, so it is not even loaded."""
    path = tmp_path / "x.pth"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))

    with pytest.raises(BadInput, match="x.pth: no weights .*give the path of vgg.pth"):
        load_public(torch.nn.Linear(2, 2), "https://example.org/vgg.pth", path)


def test_the_perceptual_distance_without_a_file(tmp_path):
    """random needs no file and is always the same; none is None; vgg16 says what it lacks."""
    x = torch.zeros(1, 3, 16, 16)
    y = torch.ones(1, 3, 16, 16)
    distance = open_perceptual("random")(x, y)

    assert torch.equal(distance, open_perceptual("random")(x, y))
    assert open_perceptual("none") is None
    with pytest.raises(BadInput, match="gone.pth: no weights .*vgg16-397923af.pth"):
        open_perceptual("vgg16", tmp_path / "gone.pth")
