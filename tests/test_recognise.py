"""engine/recognise.py: files that are no checkpoint are named for what they are."""
import functools
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch

from tinyldm.engine.checkpoint import load_checkpoint, save_checkpoint
from tinyldm.engine.open import open_model, open_stage_one
from tinyldm.engine.recognise import KINDS, recognise_state
from tinyldm.engine.weights import load_public, read_state, write_state
from tinyldm.errors import BadInput


def torch_file(content, **how):
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **how)
    return buffer.getvalue()


def zip_of(*names):
    """A .zip of empty files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def tar_of(name):
    """A .tar of one empty file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


WEIGHTS = {"a": torch.ones(1000)}

# Each kind by what it is: bytes of a file, names in a folder, or keys of a state dict.
EXAMPLES = {
    "a folder of diffusers": ["model_index.json", "unet", "vae"],
    "a folder": ["ckpt.pt", "log.jsonl"],
    "an empty file": b"",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "a web page": b"\n<!DOCTYPE html>\n<html lang='en'><head><title>Log in</title>",
    "a GGUF": b"GGUF\x03\0\0\0" + bytes(90),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(90),
    "an ONNX program": b"\x08\x07\x12\x07pytorch\x1a\x052.1.0:\x90\x01" + bytes(90),
    "an array of numpy": b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}" + bytes(90),
    "an archive": tar_of("model.ckpt"),
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(90),
    "truncated: only a few bytes": b"PK\x03\x04\0",
    "truncated: it begins like": torch_file(WEIGHTS)[:3000],
    "truncated or damaged": torch_file(WEIGHTS, _use_new_zipfile_serialization=False)[:-9],
    "a text file": b"Invalid username or password, or access was denied.",
    "TorchScript": zip_of("net/data.pkl", "net/constants.pkl", "net/code/a.py"),
    "a .zip with a checkpoint": zip_of("readme.txt", "model.SAFETENSORS"),
    "damaged: a checkpoint": zip_of("archive/data.pkl", "archive/version"),
    "a .zip that holds no": zip_of("a.png"),
    "a LoRA": ["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"],
    "a ControlNet": ["control_model.input_hint_block.0.weight"],
    "a textual inversion": ["emb_params"],
    "an autoencoder alone, in the layout of diffusers": [
        "decoder.conv_in.weight", "encoder.down_blocks.0.resnets.0.conv1.weight",
    ],
    "an autoencoder alone": ["encoder.conv_in.weight", "quant_conv.bias"],
    "a U-Net alone, in the layout of diffusers": ["conv_in.weight", "down_blocks.0.resnets.0.a"],
    "a U-Net alone": ["input_blocks.0.0.weight", "out.2.bias"],
    "a text encoder alone": ["text_model.embeddings.token_embedding.weight"],
    "Stable Diffusion XL": ["conditioner.embedders.0.a", "model.diffusion_model.out.2.bias"],
    "Stable Diffusion 2": ["cond_stage_model.model.a", "model.diffusion_model.out.2.bias"],
    "a diffusion transformer": ["model.diffusion_model.joint_blocks.0.a"],
}


def write_example(kind, path):
    """Write the example of a kind; a state dict is written as .safetensors."""
    example = EXAMPLES[max((name for name in EXAMPLES if kind.what.startswith(name)), key=len)]
    if isinstance(example, bytes):
        path.write_bytes(example)
    elif kind.place == "folder":
        path.mkdir()
        for name in example:
            (path / name).touch()
    else:
        state = {key: torch.ones(2, 2) for key in example}
        write_state(state, path)


READABLE = [
    kind for kind in KINDS if ".safetensors, which" not in kind.what
]


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.what)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_each_kind_is_named_and_says_what_to_do(tmp_path, kind, suffix):
    """Whatever its suffix is; in one line, which never speaks of code."""
    path = tmp_path / f"model{suffix}"
    write_example(kind, path)

    with pytest.raises(BadInput) as error:
        open_model(path)
    assert str(error.value) == f"{path}: {kind.what}; {kind.advice}"
    assert "run code" not in str(error.value)
    assert "\n" not in str(error.value)


NO_STAGE_ONE = [kind for kind in READABLE if "autoencoder" not in kind.what]


@pytest.mark.parametrize("kind", NO_STAGE_ONE, ids=lambda kind: kind.what)
def test_each_kind_is_refused_as_stage_one_and_as_public_weights(tmp_path, kind):
    """The line says what the file is, also where another file is needed."""
    path = tmp_path / "model.bin"
    write_example(kind, path)

    for message, read in (
        (kind.what, open_stage_one),
        (f"no weights ({kind.what}", functools.partial(load_public, torch.nn.ReLU(), "vgg.pth")),
    ):
        with pytest.raises(BadInput) as error:
            read(path)
        assert message in str(error.value)


# ---- what is no other kind

@pytest.mark.parametrize("written", ["x.ckpt", "x.safetensors"])
@pytest.mark.parametrize("named", ["x.bin", "x.pth", "x.safetensors", "x.ckpt", "x"])
def test_a_file_is_read_by_its_content(tmp_path, written, named):
    """A pickle called .safetensors opens, and a .safetensors called .ckpt."""
    write_state(WEIGHTS, tmp_path / written)
    path = (tmp_path / written).rename(tmp_path / named)
    assert torch.equal(read_state(path)["a"], WEIGHTS["a"])


def test_a_checkpoint_of_ours_opens_under_any_name(trained, tmp_path):
    """Also stage one."""
    for name in ("x.safetensors", "x.bin", "x"):
        (tmp_path / name).write_bytes((trained / "ldm/model.pt").read_bytes())
        assert open_model(tmp_path / name).config.task == "text"
        (tmp_path / name).write_bytes((trained / "ae/ckpt.pt").read_bytes())
        ae, knows_z_std = open_stage_one(tmp_path / name)
        assert ae.cfg.f == 2 and not knows_z_std


def test_the_two_stages_are_not_confused(trained):
    with pytest.raises(BadInput, match="of stage one .*where one of stage two .train_ldm.py. is"):
        open_model(trained / "ae/ckpt.pt")
    with pytest.raises(BadInput, match="of stage two .*where one of stage one .train_ae.py. is"):
        load_checkpoint(trained / "ldm/ckpt.pt", "autoencoder")


def test_a_foreign_state_dict_as_stage_one_is_named(tmp_path):
    """An official stage one cannot be trained on; the line says what the file is."""
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.ones(2)}}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="not a checkpoint of tinyldm, but an autoencoder alone; "):
        load_checkpoint(tmp_path / "x.pt")


def test_a_truncated_safetensors_says_how_much_is_missing(tmp_path):
    path = tmp_path / "x.safetensors"
    write_state(WEIGHTS, path)
    content = path.read_bytes()
    path.write_bytes(content[:-1000])
    with pytest.raises(BadInput, match="truncated: it holds 3,000 bytes .* says 4,000$"):
        read_state(path)
    path.write_bytes(content[:20])
    with pytest.raises(BadInput, match="truncated: it ends within its header"):
        read_state(path)


def test_a_dtype_that_is_not_known_is_named(tmp_path):
    """The file is whole, so nothing is said of truncation."""
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "x.ckpt").write_bytes(struct.pack("<Q", len(header)) + header + b"x")
    with pytest.raises(BadInput, match="'a' has the dtype 'F4', which is not known") as error:
        read_state(tmp_path / "x.ckpt")
    assert "truncated" not in str(error.value)


# ---- code

class Evil:
    """A pickle of it runs a program when it is loaded, if the reader lets it."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_with_code_is_named_as_such_and_not_run(
    tmp_path, monkeypatch, protocol, zipped
):
    """In every protocol of pickle, under every name."""
    monkeypatch.chdir(tmp_path)
    content = {"a": Evil()}
    if zipped:
        data = torch_file(content, pickle_protocol=protocol)
    else:
        data = pickle.dumps(content, protocol=protocol)
    (tmp_path / "x.safetensors").write_bytes(data)

    for read in (read_state, load_checkpoint):
        with pytest.raises(BadInput, match=r"asks for \w+\.system, which could run code"):
            read(tmp_path / "x.safetensors")
    assert not (tmp_path / "pwned").exists()


def test_a_truncated_pickle_with_code_is_refused(tmp_path, monkeypatch):
    """Nothing runs, however much of it is left."""
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"a": Evil()}, protocol=2)
    for n in range(len(data)):
        (tmp_path / "x.pt").write_bytes(data[:n])
        with pytest.raises(BadInput):
            read_state(tmp_path / "x.pt")
    assert not (tmp_path / "pwned").exists()


# ---- values that are not numbers

def test_weights_that_are_not_numbers_are_named_when_a_model_is_opened(trained, tmp_path):
    """By part and tensor."""
    for part, value in (("unet", torch.nan), ("tau", torch.inf), ("ae", -torch.inf)):
        checkpoint = torch.load(trained / "ldm/model.pt", weights_only=True)
        state = checkpoint["ae"] if part == "ae" else checkpoint["ema"][part]
        key = list(state)[1]
        state[key].fill_(value)
        save_checkpoint(checkpoint, tmp_path / "x.pt")
        with pytest.raises(BadInput, match=f"x.pt: {part}: {key} holds values that are not num"):
            open_model(tmp_path / "x.pt")

    checkpoint = torch.load(trained / "ae/ckpt.pt", weights_only=True)
    checkpoint["nets"]["ae"]["z_std"].fill_(torch.nan)
    save_checkpoint(checkpoint, tmp_path / "x.pt")
    with pytest.raises(BadInput, match="x.pt: z_std holds values that are not numbers"):
        open_stage_one(tmp_path / "x.pt")


def test_whole_models_are_no_other_kind():
    """Official layouts have the same names behind a prefix."""
    state = {}
    for key in ("first_stage_model.encoder.conv_in.weight", "model_ema.out2bias",
                "cond_stage_model.transformer.text_model.a",
                "model.diffusion_model.input_blocks.0.0.weight"):
        state[key] = torch.ones(1)
    assert recognise_state(state) is None
