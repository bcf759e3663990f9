"""Hostile checkpoints and released models, and vocabularies to make odd ones of."""
import functools
import io
import json
import os
import pickle
import random
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from fuzz_files import zip_bomb
from fuzz_mutations import mutated, odd_json, odd_tree

from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.data.tokenizer import train_tokenizer
from tinyldm.engine import presets
from tinyldm.engine.released import networks_of, official_model, official_state, texts_of
from tinyldm.engine.weights import write_state
from tinyldm.tasks import TASKS
from tinyldm.unet import UNet, UNetConfig

# Values that no config or state dict should have.
ODD_PARTS = [10 ** 4, 10 ** 6, (10 ** 5, 10 ** 5), torch.zeros(3), [1] * 10_000]
# These take no memory in a file, and all of the machine's when they are computed with.
ENDLESS = [
    torch.zeros(1).expand(10 ** 12),
    torch.zeros(1).to(torch.float8_e5m2).expand(10 ** 12),
    torch.zeros(1).expand(10 ** 6, 10 ** 6),
]
ODD_TENSORS = [
    *ENDLESS, torch.zeros(()), torch.zeros(3).to_sparse(), torch.zeros(3).int(), torch.tensor(-1.0),
]


# ---- checkpoints and released models

class Evil:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function: Callable, *args):
        self.function = function
        self.args = args

    def __reduce__(self):
        return self.function, self.args


def evil(rng: random.Random, folder: Path) -> Evil:
    """What a pickle may ask for; each of them would make folder/canary."""
    canary = str(folder / "canary")
    return rng.choice((
        Evil(os.system, f"touch {canary}"),
        Evil(eval, f"open({canary!r}, 'w')"),
        Evil(exec, f"open({canary!r}, 'w')"),
        Evil(open, canary, "w"),
        Evil(subprocess.Popen, ["touch", canary]),
        Evil(torch.load, canary),
        Evil(os.mkdir, canary),
    ))


def pickled(rng: random.Random, tree: dict, folder: Path) -> bytes:
    """A dict as torch saves it, in its old or new format; some are evil, some are mutated."""
    if rng.random() < 0.1:
        tree = tree | {rng.choice(list(tree)): evil(rng, folder)}
    file = io.BytesIO()
    if rng.random() < 0.05:
        pickle.dump(tree, file)
    else:
        torch.save(tree, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    data = file.getvalue()
    if rng.random() < 0.02:
        data = zip_bomb("data.pkl")
    return mutated(rng, data) if rng.random() < 0.5 else data


@functools.cache
def own_checkpoint() -> dict:
    """A whole text-to-image model of ours, small."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red circle"])
    ae = AEConfig(c_x=2, ch=4, ch_mult=(1, 2), n_res=1, c_z=2, groups=2)
    unet = {
        "c_in": 2, "c_out": 2, "side": 8, "ch": 4, "ch_mult": (1, 2), "n_res": 1,
        "attn_res": (4,), "d_head": 4, "n_head": None, "d_ctx": 8, "depth": 1, "groups": 2,
    }
    tau = {
        "n_vocab": tokenizer.get_vocab_size(), "n_token": 5, "d": 8, "depth": 1, "n_head": 1,
        "d_head": 8, "clip": False,
    }
    schedule = {"name": "sqrt-linear", "T": 50, "beta_range": (0.001, 0.02), "predict": "v"}
    weights = {
        "unet": UNet(UNetConfig(**unet)).state_dict(),
        "tau": TASKS["text"].build_tau(tau).state_dict(),
    }
    return {
        "kind": "tinyldm ldm",
        "step": 1,
        "size": 16,
        "args": {"data": "shapes"},
        "classes": [],
        "tokenizer": tokenizer.to_str(),
        "config": {
            "task": {"name": "text"},
            "autoencoder": vars(ae),
            "unet": unet,
            "tau": tau,
            "schedule": schedule,
        },
        "ae": Autoencoder(ae).state_dict(),
        "ema": weights,
    }


def odd_checkpoint(rng: random.Random, folder: Path) -> tuple[bytes, bool]:
    """A checkpoint of ours, and whether it is one of stage one."""
    tree = own_checkpoint()
    if rng.random() >= 0.4:
        tree = odd_tree(rng, tree, ODD_PARTS)
    if rng.random() < 0.1:
        tokenizer = json.loads(own_checkpoint()["tokenizer"])
        tree = tree | {"tokenizer": odd_json(rng, tokenizer)}
    is_stage_one = rng.random() < 0.2
    if is_stage_one:
        tree = tree | {"kind": "tinyldm autoencoder", "nets": {"ae": tree.get("ae")}}
    return pickled(rng, tree, folder), is_stage_one


@functools.cache
def released_model() -> tuple[bytes, dict]:
    """A small released model, which is the preset "tiny" then: a .safetensors, and its tensors."""
    presets.AE["tiny"] = {
        "size": 16, "ch": 32, "ch_mult": (1, 1), "n_res": 1, "c_z": 3, "groups": 32, "n_codes": 4,
    }
    presets.LDM["tiny"] = presets.PAPER | {
        "task": "class", "ae_preset": "tiny", "size": 16, "ch": 32, "ch_mult": (1,),
        "attn_res": (8,), "d_head": None, "n_head": 1, "n_res": 1, "d_ctx": 4, "n_classes": 3,
        "beta_range": (0.001, 0.02),
    }
    model = presets.build_networks(presets.LDM["tiny"])
    state = {"scale_factor": torch.tensor(0.5), "alphas_cumprod": model.abar.float()}
    for net, prefix in networks_of(model):
        net.to_empty(device="cpu").half()
        state |= official_state(net, prefix)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        write_state(state, file)
        return file.read_bytes(), state


def odd_safetensors(rng: random.Random) -> bytes:
    """A header that is not JSON, or says what is not true, before the data."""
    whole, _ = released_model()
    end = 8 + int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:end])
    if rng.random() < 0.3:
        some = dict(rng.sample(list(header.items()), 9))
        text = odd_json(rng, some).encode()
    else:
        text = json.dumps(header | odd_texts(rng)).encode()
    if rng.random() < 0.2:
        text = mutated(rng, text)
    size = len(text)
    if rng.random() < 0.2:
        size = rng.choice((0, 2 ** 63, len(text) + 99, 10 ** 8))
    return size.to_bytes(8, "little") + text + whole[end:]


def odd_texts(rng: random.Random) -> dict:
    """What a file says beside its tensors: a config of ours, or something else."""
    if rng.random() < 0.5:
        return {}
    head = own_checkpoint()
    head = {key: head[key] for key in ("config", "size", "tokenizer")}
    texts = {"tinyldm": odd_json(rng, head), "modelspec.prediction_type": rng.choice("v?")}
    return {"__metadata__": texts}


def odd_released_pickle(rng: random.Random, folder: Path) -> bytes:
    """A .ckpt as Lightning writes it."""
    _, state = released_model()
    if rng.random() >= 0.4:
        state = odd_tree(rng, state, ODD_PARTS + ODD_TENSORS)
    if rng.random() < 0.2:
        name = rng.choice(("scale_factor", "alphas_cumprod", "v_pred"))
        state = state | {name: rng.choice(ODD_TENSORS)}
    return pickled(rng, {"state_dict": state, "epoch": 1}, folder)


def odd_export(rng: random.Random, folder: Path) -> bytes:
    """A model of ours in the official layout, with another config beside its tensors."""
    checkpoint = own_checkpoint()
    content = {"state_dict": official_model(checkpoint)} | texts_of(checkpoint)
    if rng.random() < 0.6:
        head = odd_tree(rng, json.loads(content["tinyldm"]), [10 ** 4, 10 ** 6, [1] * 10_000])
        content["tinyldm"] = json.dumps(head, default=str)
    return pickled(rng, content, folder)


# ---- vocabularies

CLIP_PIECES = [
    *"abcd", "a</w>", "b</w>", "c</w>", "d</w>", "ab", "ab</w>", "cd</w>", "<|startoftext|>",
    "<|endoftext|>",
]
CLIP_MERGES = ["#version: 0.2", "a b", "a b</w>", "c d</w>"]
BERT_PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circ", "##le", "!"]


@functools.cache
def own_tokenizer() -> str:
    return train_tokenizer(["a red circle", "a blue cross"]).to_str()
