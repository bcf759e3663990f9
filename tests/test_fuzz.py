"""Strangers' files, mutated by chance: nothing runs, nothing is written, memory and time stay
bounded, and all that is wrong is BadInput in one line.

A child process reads them, as limits and an audit hook cannot be taken back:
    python tests/test_fuzz.py zips 1 60         # reader, seed, seconds; tells what it found
An input is a function of (reader, seed, number). `pytest -m slow` takes FUZZ_SECONDS a reader."""
import argparse
import copy
import functools
import io
import json
import os
import pickle
import random
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, PngImagePlugin

import sample
import train_ldm
from tinyldm import BadInput, generate, official, presets
from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.checkpoint import read_state, write_state
from tinyldm.data import Folder, load_rgb
from tinyldm.inside import save_attention
from tinyldm.tasks import TASKS, build_tau
from tinyldm.tokens import encode, open_vocab, train_tokenizer
from tinyldm.unet import UNet, UNetConfig

resource = pytest.importorskip("resource")
MEMORY, SECONDS = 2 ** 30, 10           # more than before: of one reader; of one input
CPU = torch.device("cpu")


# ---- mutations

def mutated(r: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Bytes flipped, cut off, doubled, taken from another file; or the file as it is."""
    out = bytearray(data)
    for _ in range(r.choice((0, 1, 1, 2, 5, 20))):
        i, n = (r.randrange(len(out) + 1), r.choice((1, 2, 4, 16, 200))) if out else (0, 1)
        kind = r.randrange(7)
        if kind == 0:
            out[i:i + n] = r.randbytes(len(out[i:i + n]))
        elif kind == 1:
            out[i:i + 4] = r.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1"))
        elif kind == 2:
            out[i:i + n] = b""
        elif kind == 3:
            out[i:i] = out[i:i + n] * r.choice((1, 3))
        elif kind == 4 and other:
            j = r.randrange(len(other))
            out[i:i + n] = other[j:j + n]
        elif kind == 5 and i < len(out):
            out[i] ^= 1 << r.randrange(8)
        elif kind == 6 and r.random() < .3:
            out = out[:i]
    return bytes(out)


DEEP, LONG = "@deep@", "@long@"         # what json.dumps does not say
ODD = [None, True, 0, -1, 1, 7, 2 ** 31, 2 ** 63, 10 ** 30, -10 ** 400, 0.5, -0.0, 1e308,
       float("nan"), float("inf"), -float("inf"), "", "a", "0", "\ud800", "\0", "\u202e\u0301", "٣",
       "../../x", "/etc/passwd", "a" * 100_000, [], {}, [[]], [None], {"a": 1}, DEEP, LONG]


def odd_json(r: random.Random, value) -> str:
    """value with some of its parts replaced, dropped, or doubled; as JSON or nearly so."""
    root = [copy.deepcopy(value)]
    for _ in range(r.choice((0, 1, 1, 1, 3))):
        at, key = root, 0
        while isinstance(at[key], (dict, list)) and at[key] and r.random() < .8:
            at = at[key]
            key = r.choice(list(at) if isinstance(at, dict) else range(len(at)))
        kind = r.randrange(6)
        if kind == 0 and at is not root:
            del at[key]
            if not at:
                break
        elif kind == 1 and isinstance(at, list) and at is not root:
            at.append(copy.deepcopy(at[key]))
        else:
            at[key] = copy.deepcopy(r.choice(ODD))
    text = json.dumps(root[0])
    text = text.replace(f'"{DEEP}"', "[" * 10_000 + "]" * 10_000)
    return text.replace(f'"{LONG}"', r.choice(("9" * 5000, "1e999", "-1e999", "1" + "0" * 4000)))


WORDS = ["a", "red", "circle", "above", "\ud800", "\udcff", "\0", "\x1b[2J", "\u202e", "\u200f",
         "\u0301" * 50, "\U0001f9d1\u200d\U0001f680", "\ufeff", "\uffff", "\U0010ffff", "日本",
         "ﷺ", "[PAD]", "[UNK]", "[CLS]", "<|endoftext|>", "'s", "\x85", "\u2028", "x" * 3000]


def odd_text(r: random.Random) -> str:
    if r.random() < .02:
        return r.choice(WORDS[:3]) * 300_000
    return r.choice((" ", " ", "", "\t")).join(
        r.choice(WORDS) if r.random() < .7 else chr(r.choice((r.randrange(0x300), r.randrange(
            0x110000)))) for _ in range(r.choice((0, 1, 5, 50))))


# ---- readers: one(r, path) makes one input below the folder `path` and reads it

def saved(image, kind, **more) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(w, h, depth=8, colour=2, more=b"") -> bytes:
    """A png that claims to be of any size."""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0,
            0)) + more + chunk(b"IDAT", zlib.compress(b"\0" * 2000)) + chunk(b"IEND", b""))


def zeros(n: int) -> bytes:
    """That many zero bytes, compressed, in little memory."""
    z, block = zlib.compressobj(1), bytes(2 ** 20)
    return b"".join([*(z.compress(block) for _ in range(n >> 20)), z.flush()])


@functools.cache
def zipped_bomb(name: str) -> bytes:
    """A zip with 1.5 GB of that name in less than 10 MB, beside a picture."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", 8, compresslevel=1) as z:
        z.writestr("version", "3")
        with z.open(name, "w") as f:
            for _ in range(1500):
                f.write(b"\n" * 10 ** 6)
    return file.getvalue()


@functools.cache
def pictures_of_all_kinds() -> list[bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8))
    exif, text = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010e] = 6, "a picture"
    text.add_text("Comment", "x" * 99, zip=True)
    frames = [rgb.rotate(90 * k).convert("P") for k in range(3)]
    bomb = zeros(30_000_000)
    return [saved(rgb, "PNG", exif=exif, pnginfo=text), saved(rgb.convert("RGBA"), "PNG"),
            *(saved(rgb.convert(m), "PNG") for m in ("1", "L", "LA", "P", "I;16")),
            saved(rgb, "JPEG", exif=exif), saved(rgb.convert("CMYK"), "JPEG", progressive=True),
            saved(frames[0], "GIF", save_all=True, append_images=frames[1:], transparency=3),
            saved(rgb, "WEBP", exif=exif), saved(rgb.convert("RGBA"), "WEBP", lossless=True),
            saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
            *(saved(rgb, "TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_adobe_deflate",
                                                          "jpeg", "packbits")),
            saved(rgb.convert("1"), "TIFF", compression="group4"),
            *(saved(rgb.convert(m), "TIFF") for m in "FI"),
            *(saved(rgb.convert(m), "BMP") for m in ("RGB", "P")),
            *(saved(rgb, kind) for kind in ("PPM", "ICO", "PDF", "EPS")),       # not to be opened
            png(60_000, 60_000), png(8000, 8000), png(8000, 8000, 16, 6), png(0, 0),
            png(2 ** 31, 1), png(9, 9, more=chunk(b"zTXt", b"a\0\0" + bomb)),
            png(9, 9, more=chunk(b"iCCP", b"a\0\0" + bomb))]


def pictures(r, path):
    """As --image, and in a folder beside a good one."""
    a, b = r.choices(pictures_of_all_kinds(), k=2)
    data = mutated(r, a, b)
    if r.random() < .1 and (i := data.find(b"Exif\0\0")) > 0:
        data = data[:i + 6] + mutated(r, data[i + 6:])
    (path / "0.png").write_bytes(data)
    if r.random() < .2:
        (path / "1.png").write_bytes(pictures_of_all_kinds()[0])
        return Folder(str(path), 16, "all")[0]
    return sample.read(argparse.Namespace(image=path / "0.png"), "image", load_rgb)


def model(task, classes=()):
    """What asked() wants to know of a model."""
    tau = SimpleNamespace(cfg=SimpleNamespace(n_vocab=1025, n_token=92, f=1),
                          conv=SimpleNamespace(in_channels=9),
                          embedding=SimpleNamespace(num_embeddings=9))
    return generate.Model(SimpleNamespace(cfg=SimpleNamespace(f=4)), None, tau, None, None, "eps",
                          task, classes, {})


def maps(r, path):
    """As --map, and in a folder."""
    seeds = [saved(Image.new(mode, (20, 24), 3), kind)
             for mode in ("1", "L", "P", "I;16") for kind in ("PNG", "TIFF")]
    data = mutated(r, r.choice([*seeds * 9, *pictures_of_all_kinds()]), r.choice(seeds))
    (path / "map.png").write_bytes(data)
    if r.random() < .2:
        (path / "0.png").write_bytes(pictures_of_all_kinds()[0])
        (path / "metadata.jsonl").write_text('{"file_name": "0.png", "mask": "map.png"}')
        items = [Folder(str(path), 16, "all")[0]]
    else:
        args = argparse.Namespace(size=(16, 16), boxes=None, mask=None, map=path / "map.png")
        items = sample.asked(args, model("semantic"))
    m = model("semantic")
    TASKS["semantic"].y({"segmentation": [i["segmentation"] for i in items]}, m.tau, None)


def boxes(r, path):
    rows = [["red", 1, 2, 9, 10], [3, 8.5, 8, 16, 16], ["dog", 0, 0, 1, 1]]
    text = odd_json(r, rows).encode()
    (path / "boxes.json").write_bytes(mutated(r, text) if r.random() < .3 else text)
    args = argparse.Namespace(size=(16, 16), boxes=path / "boxes.json", mask=None)
    m = model("layout", ("red", "dog", "cat", "3"))
    items = sample.asked(args, m)
    y = TASKS["layout"].y({"boxes": [i["boxes"] for i in items]}, m.tau, None)
    assert 0 <= y.min() and y.max() < 1025


def metadata(r, path):
    """A folder whose metadata.jsonl is odd, read as all tasks would."""
    image, row = pictures_of_all_kinds()[0], {
        "text": "a red circle", "label": "red", "mask": "m.png",
        "boxes": [["dog", 1, 2, 9, 10], ["cat", 0, 0, 20, 24]]}
    for name in ("0.png", "1.png", "m.png"):
        (path / name).write_bytes(image if name != "m.png" else saved(
            Image.new("L", (20, 24), 3), "PNG"))
    lines = [json.dumps(row | {"file_name": f"{k}.png"}) for k in range(2)]
    lines.append(odd_json(r, row | {"file_name": "0.png"}))
    data = "\n".join(lines).encode()
    (path / "metadata.jsonl").write_bytes(mutated(r, data) if r.random() < .2 else data)
    whole = Folder(str(path), 16, "all", flip=True, label=r.choice(("label", "text", "boxes")))
    for field in r.sample(("caption", "label", "boxes", "segmentation"), 2):
        whole.need(field)
    for i in range(2 * len(whole)):
        item = whole[i]
        if "boxes" in item:
            TASKS["layout"].y({"boxes": [item["boxes"]]}, model("layout").tau, None)
    if all("text" in row for row in whole.rows):
        encode(train_tokenizer(whole.captions()), whole.captions(), 9)


def zips(r, path):
    """Odd names, links, encryption, bombs, lies in the directory."""
    good = pictures_of_all_kinds()[0]
    names = ["a.png", "b/c.PNG", "../../canary.png", "/canary.png", "b/../../../canary.png",
             "C:\\canary.png", "a\0.png", "x" * 5000 + ".png", "\udcff.png", "link.png", "b/",
             ".png", "a.txt", "metadata.jsonl", "日本.png", "a.png", "con.jpg"]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as z:
        for name in r.sample(names, r.randrange(1, 8)) * r.choice((1, 1, 2)):
            data = good if name.lower().endswith(("png", "jpg")) else b'{"file_name": "a.png"}'
            info = zipfile.ZipInfo(name.encode("utf8", "replace").decode())
            info.compress_type = r.choice((0, 8, 8, 12, 14))
            if name == "link.png":
                info.external_attr, data = 0o120777 << 16, b"/etc/passwd"
            z.writestr(info, data, compresslevel=1)
    data = bytearray(file.getvalue())
    for mark, at in ((b"PK\1\2", 8), (b"PK\3\4", 6), (b"PK\1\2", 10), (b"PK\1\2", 20),
                     (b"PK\1\2", 24), (b"PK\1\2", 42), (b"PK\5\6", 8), (b"PK\5\6", 12)):
        if r.random() < .1 and (i := data.find(mark)) >= 0:             # flags, method, sizes ...
            width = 2 if at in (6, 8, 10) else 4
            data[i + at:i + at + width] = r.choice((
                r.randbytes(width), b"\xff" * width, b"\1".ljust(width, b"\0")))
    if r.random() < .02:
        data = zipped_bomb(r.choice(("metadata.jsonl", "a.png", "a.txt")))
    (path / "x.zip").write_bytes(mutated(r, bytes(data)) if r.random() < .3 else data)
    whole = Folder(str(path / "x.zip"), 8, "all")
    for i in range(min(3, len(whole))):
        whole[i]


def tars(r, path):
    """Odd names, links, devices, sparse members, pax headers and sizes that lie, cut and mixed."""
    good, file = pictures_of_all_kinds()[0], io.BytesIO()
    names = ["a.png", "a.txt", "a.cls", "a.json", "b/c.1.PNG", "b/c.1.json", "../../canary.png",
             "/canary.png", "b/../../../canary.png", "./a.png", "x" * 300 + ".png", "日本.png",
             ".png", "metadata.jsonl", "link.png", "a.tar", "\udcff.png", "con.jpg"]
    row = {"text": "a red circle", "label": 3, "boxes": [["dog", 1, 2, 9, 10]], "mask": "m.png"}
    how = r.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    mode = r.choice(("w", "w", "w", "w", "w", "w", "w:gz", "w:xz"))
    with tarfile.open(fileobj=file, mode=mode, format=how, errors="surrogateescape") as t:
        for name in r.choices(names, k=r.randrange(1, 12)):
            m, data = tarfile.TarInfo(name[:90] if how == tarfile.USTAR_FORMAT else name), good
            if not name.lower().endswith(("png", "jpg")):
                data = odd_json(r, row).encode("utf8", "surrogatepass")
            m.type = r.choice([tarfile.REGTYPE] * 12 + [
                tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
                tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"\x00", b"Z"])
            m.linkname = r.choice(("/etc/passwd", "a.png", "../../canary"))
            if how == tarfile.PAX_FORMAT and r.random() < .1:
                m.pax_headers = {r.choice(("size", "path", "GNU.sparse.map", "GNU.sparse.major",
                                           "linkpath", "mtime")):
                                 r.choice(("-1", "99999999999999", "/canary.png", "0,9", "é"))}
            m.size = len(data)
            t.addfile(m, io.BytesIO(data))
    data = bytearray(file.getvalue())
    if r.random() < .2 and len(data) > 512:             # a header whose checksum holds, but which
        at = 512 * r.randrange(min(len(data) // 512, 9))            # lies about its size
        data[at + 124:at + 136] = r.choice((b"77777777777\0", b"\x80" + bytes(10) + b"\7",
                                            b"\xff" * 12, b"-0000000001\0", b"00000000001\0"))
        data[at + 148:at + 156] = b" " * 8
        data[at + 148:at + 156] = b"%06o\0 " % sum(data[at:at + 512])
    (path / "x.tar").write_bytes(mutated(r, bytes(data)) if r.random() < .3 else data)
    whole = Folder(str(path / r.choice(("x.tar", ""))), 8, "all")
    for i in range(min(3, len(whole))):
        item = whole[i]
        if "boxes" in item:
            TASKS["layout"].y({"boxes": [item["boxes"]]}, model("layout").tau, None)


class Evil:
    def __init__(self, f, *args):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


def evil(r, path):
    """What a pickle might ask for."""
    canary = str(path.parent / "canary")
    return r.choice((Evil(os.system, f"touch {canary}"), Evil(eval, f"open({canary!r}, 'w')"),
                     Evil(exec, f"open({canary!r}, 'w')"), Evil(open, canary, "w"),
                     Evil(subprocess.Popen, ["touch", canary]), Evil(torch.load, canary),
                     Evil(os.mkdir, canary)))


@functools.cache
def parts() -> dict:
    """A whole model of ours, small."""
    torch.manual_seed(0)
    ae, tokenizer = AEConfig(2, 4, (1, 2), 1, 2, 2), train_tokenizer(["a red circle"])
    shape = dict(n_vocab=tokenizer.get_vocab_size(), n_token=5, d=8, depth=1, n_head=1, d_head=8,
                 clip=False)
    unet = dict(c_in=2, c_out=2, side=8, ch=4, ch_mult=(1, 2), n_res=1, attn_res=(4,), d_head=4,
                n_head=None, d_ctx=8, depth=1, groups=2)
    nets = {"unet": UNet(UNetConfig(**unet)).state_dict(),
            "tau": build_tau("text", shape).state_dict()}
    schedule = dict(name="sqrt-linear", T=50, beta_range=(0.001, 0.02), predict="v")
    return {"kind": "tinyldm ldm", "step": 1, "size": 16, "args": {"data": "shapes"},
            "classes": [], "tokenizer": tokenizer.to_str(),
            "config": {"task": {"name": "text"}, "autoencoder": vars(ae), "unet": unet,
                       "tau": shape, "schedule": schedule},
            "ae": Autoencoder(ae).state_dict(), "ema": nets}


def odd_tree(r, tree):
    """A nested dict in which one value is replaced."""
    k = "config" if "config" in tree and r.random() < .6 else r.choice(list(tree))
    if isinstance(tree[k], dict) and tree[k] and r.random() < .9:
        return tree | {k: odd_tree(r, tree[k])}
    odd = r.choice([*ODD, 10 ** 4, 10 ** 6, (10 ** 5, 10 ** 5), torch.zeros(3), [1] * 10_000])
    return {i: v for i, v in tree.items() if i != k} if r.random() < .1 else tree | {k: odd}


def packed(r, tree, path, evil_share=.1):
    """Pickled as torch does, old or new, with something evil in some; then mutated in some."""
    if r.random() < evil_share:
        tree = tree | {r.choice(list(tree)): evil(r, path)}
    file = io.BytesIO()
    if r.random() < .05:
        pickle.dump(tree, file)
    else:
        torch.save(tree, file, _use_new_zipfile_serialization=r.random() < .8)
    data = file.getvalue()
    if r.random() < .02:
        data = zipped_bomb("data.pkl")
    return mutated(r, data) if r.random() < .5 else data


def checkpoints(r, path):
    """Ours, as sample.py and train_ldm.py read them."""
    tree = parts() if r.random() < .4 else odd_tree(r, parts())
    if r.random() < .1:
        tree = tree | {"tokenizer": odd_json(r, json.loads(parts()["tokenizer"]))}
    if r.random() < .2:
        tree = tree | {"kind": "tinyldm autoencoder", "nets": {"ae": tree.get("ae")}}
        (path / "x.pt").write_bytes(packed(r, tree, path))
        return train_ldm.load_stage_one(path / "x.pt")
    (path / "x.pt").write_bytes(packed(r, tree, path))
    m = generate.load_model(path / "x.pt", True, CPU)
    if m.task == "text":
        y = encode(m.tokenizer, ["a red circle", odd_text(r)], 5)
        assert 0 <= y.min() and y.max() < m.tau.cfg.n_vocab


@functools.cache
def official_file() -> tuple[bytes, dict]:
    """A small released model, which is a preset then: as .safetensors, and its tensors."""
    row = presets.PAPER | dict(
        task="class", ae_preset="tiny", size=16, ch=32, ch_mult=(1,), attn_res=(8,), d_head=None,
        n_head=1, n_res=1, d_ctx=4, n_classes=3, beta_range=(.001, .02))
    presets.AE["tiny"] = dict(size=16, ch=32, ch_mult=(1, 1), n_res=1, c_z=3, groups=32, n_codes=4)
    presets.LDM["tiny"], state = row, {"scale_factor": torch.tensor(.5)}
    for net, prefix in zip(presets.networks(row), (official.AE, official.UNET, official.TAU)):
        net.to_empty(device="cpu").half()
        state |= official.official_state(net, prefix)
    with tempfile.TemporaryDirectory() as folder:
        write_state(state, file := Path(folder) / "x.safetensors")
        return file.read_bytes(), state


def released(r, path):
    """Pickles and .safetensors, as --official reads them."""
    whole, state = official_file()
    if r.random() < .5:
        n = 8 + int.from_bytes(whole[:8], "little")
        header, data = json.loads(whole[8:n]), whole[n:]
        text = odd_json(r, dict(r.sample(list(header.items()), 9)) if r.random() < .3 else header)
        text = mutated(r, text.encode()) if r.random() < .2 else text.encode()
        size = len(text) if r.random() < .8 else r.choice((0, 2 ** 63, len(text) + 99, 10 ** 8))
        file = path / "x.safetensors"
        file.write_bytes(size.to_bytes(8, "little") + text + data)
    else:
        state = state if r.random() < .4 else odd_tree(r, state)
        file = path / "x.ckpt"
        file.write_bytes(packed(r, {"state_dict": state, "epoch": 1}, path))
    read_state(file)
    official.load_model(file, "tiny")


def vocabularies(r, path):
    """CLIP's two files, BERT's list, tokenizer.json; what can be opened encodes."""
    if not hasattr(vocabularies, "json"):
        vocabularies.json = json.loads(train_tokenizer(["a red circle", "a blue cross"]).to_str())
    pieces = [*"abcd", "a</w>", "b</w>", "c</w>", "d</w>", "ab", "ab</w>", "cd</w>",
              "<|startoftext|>", "<|endoftext|>"]
    kind, n = r.randrange(3), 13

    def written(name, text):
        data = text.encode("utf8", "surrogatepass")
        (path / name).write_bytes(mutated(r, data) if r.random() < .3 else data)
    if kind == 0:
        written("vocab.json", odd_json(r, {p: i for i, p in enumerate(pieces)}))
        merges = ["#version: 0.2", "a b", "a b</w>", "c d</w>"]
        if r.random() < .3:
            merges.insert(r.randrange(5), odd_text(r))
        written("merges.txt", "\n".join(merges))
    elif kind == 1:
        lines, n = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circ", "##le", "!"], 9
        if r.random() < .5:
            lines[r.randrange(9)] = odd_text(r)
        written("vocab.txt", "\n".join(lines))
    else:
        n = len(vocabularies.json["model"]["vocab"])
        written("tokenizer.json", odd_json(r, vocabularies.json))
    t = open_vocab(path, n, r.choice((6, 77)))
    y = encode(t, ["a red circle", "", odd_text(r)], 77)
    assert 0 <= y.min() and y.max() < n


def prompts(r, path):
    """A file, and words of the command line; encoded, warned of, and drawn."""
    if not hasattr(prompts, "tokenizer"):
        prompts.tokenizer = generate.load_model(sample.BUNDLED, True, CPU).tokenizer
    text = "\n".join(odd_text(r) for _ in range(r.choice((0, 1, 3))))
    data = text.encode("utf8", r.choice(("surrogatepass", "replace", "ignore")))
    (path / "p.txt").write_bytes(mutated(r, data) if r.random() < .2 else data)
    given = [odd_text(r).replace("\0", "") for _ in range(r.randrange(2))]
    args = argparse.Namespace(size=(16, 16), prompts=path / "p.txt", prompt=given, label=[])
    task = r.choice(("text", "text", "class"))
    items = sample.asked(args, model(task, ("red", "a")))
    if task == "text" and items:
        captions = [i["caption"] for i in items]
        encode(prompts.tokenizer, captions, 12)
        words = prompts.tokenizer.encode_batch(captions[:2])
        save_attention(torch.zeros(2, 3, 8, 8), torch.rand(2, 12, 8, 8), words, path / "a.png")


READERS = {f.__name__: f for f in (pictures, maps, boxes, metadata, zips, tars, checkpoints,
                                   released, vocabularies, prompts)}


# ---- the child

class Slow(BaseException):
    """No Exception, so that no reader can take it for a fault of the file."""


def too_slow(*_):
    raise Slow(f"more than {SECONDS} s")


def peak() -> int:
    """Most memory since the last call, bytes."""
    said = dict(x.split(":", 1) for x in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(said["VmHWM"].split()[0])


def watch(folder: Path) -> list[str]:
    """-> a list that fills with what is run, or written anywhere but in the folder."""
    seen, ours = [], (str(folder), "/proc/self/clear_refs")

    def hook(event, args):
        if event == "open":
            writes = isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in ("os.mkdir", "os.remove", "os.rename", "os.symlink", "os.link",
                               "os.chmod", "os.rmdir", "os.truncate")
        runs = event.startswith(("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
                                 "subprocess.", "socket.", "ctypes.dlopen", "pty.", "shutil."))
        if runs or writes and not os.path.abspath(str(args[0])).startswith(ours):
            seen.append(f"{event} {args}"[:200])
    sys.addaudithook(hook)
    return seen


def fuzz(names, seed: int, seconds: float, most: int, folder: Path, only: int = None) -> dict:
    """-> by reader: numbers of inputs, of those read and refused, and what should not have been."""
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode, told = True, {}
    signal.signal(signal.SIGPROF, too_slow)
    Image.init()
    for make in (pictures_of_all_kinds, parts, official_file):      # before anything is watched
        make()
    path, seen = folder / "in", watch(folder)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * MEMORY,) * 2)
    for name in names:
        counts, faults, end, before = {"read": 0, "refused": 0}, {}, time.time() + seconds, peak()
        for i in range(most) if only is None else [only]:
            if time.time() > end:
                break
            path.mkdir()
            (folder / "now").write_text(f"{name} {seed} {i}")       # for one that ends all
            signal.setitimer(signal.ITIMER_PROF, SECONDS)           # of this process's time
            try:
                READERS[name](random.Random(f"{name} {seed} {i}"), path)
                counts["read"] += 1
            except BadInput as e:
                counts["refused"] += 1
                why = repr(e.__cause__)
                if "\n" in str(e) or len(str(e)) > 2000 or "allocate" in why:
                    faults.setdefault(f"{str(e)[:200]!r} from {why[:200]}", []).append(i)
            except BaseException as e:
                where = traceback.extract_tb(e.__traceback__)[-1]
                what = f"{type(e).__name__} {str(e)[:150]!r} at {where.filename}:{where.lineno}"
                faults.setdefault(what, []).append(i)
                if only is not None:
                    traceback.print_exc()
            signal.setitimer(signal.ITIMER_PROF, 0)
            if seen:
                faults.setdefault("; ".join(seen), []).append(i)
                seen.clear()
            for f in path.iterdir():
                f.unlink()
            path.rmdir()
        if (more := peak() - before) > MEMORY:
            faults[f"{more / 2 ** 20:.0f} MiB"] = []
        told[name] = counts | {"MiB": more >> 20, "faults": {k: v[:3] + [len(v)]
                                                              for k, v in faults.items()}}
    return told


def child(tmp_path, names, seed, seconds, most):
    env = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false",
                        "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    flags = [",".join(names), str(seed), str(seconds), str(most), "--folder", tmp_path]
    p = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True,
                       cwd=tmp_path, env=env)
    now = tmp_path / "now"
    assert p.returncode == 0, (now.read_text() if now.exists() else "", p.stderr[-2000:])
    told = json.loads(p.stdout.splitlines()[-1])
    for name, counts in told.items():
        print(name, counts)
    assert not (tmp_path / "canary").exists()
    assert not {k: v["faults"] for k, v in told.items() if v["faults"]}
    return told


def test_some_mutated_files_of_each_kind(tmp_path):
    told = child(tmp_path, READERS, 0, 600, 20)
    assert told.keys() == READERS.keys()
    assert all(v["read"] > 1 and v["refused"] > 1 for v in told.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_mutated_files_for_a_minute(name, tmp_path):
    seed = int(os.environ.get("FUZZ_SEED", time.time()))
    child(tmp_path, [name], seed, float(os.environ.get("FUZZ_SECONDS", 60)), 10 ** 9)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", help="readers, with commas between")
    parser.add_argument("seed", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("most", type=int, nargs="?", default=10 ** 9)
    parser.add_argument("--only", type=int, help="this input alone, with its traceback")
    parser.add_argument("--folder", type=Path, required=True)
    a = parser.parse_args()
    print(json.dumps(fuzz(a.names.split(","), a.seed, a.seconds, a.most, a.folder, a.only)))
