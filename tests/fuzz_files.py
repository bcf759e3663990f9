"""Good files of strangers and hostile ones: images, archives, checkpoints, released models."""
import functools
import io
import json
import os
import pickle
import random
import struct
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fuzz_mutations import mutated, odd_json, odd_tree
from PIL import Image, PngImagePlugin

from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.data.tokenizer import train_tokenizer
from tinyldm.engine import presets
from tinyldm.engine.released import networks_of, official_state
from tinyldm.engine.weights import write_state
from tinyldm.tasks import TASKS
from tinyldm.unet import UNet, UNetConfig

# Values that no config or state dict should have.
ODD_PARTS = [10 ** 4, 10 ** 6, (10 ** 5, 10 ** 5), torch.zeros(3), [1] * 10_000]


# ---- images

def image_file(image: Image.Image, kind: str, **options) -> bytes:
    """An image as a file of some kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def claiming_png(w: int, h: int, depth: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    """A png that claims to have any size; there are few pixels in it."""
    header = struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + more
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 2000))
        + png_chunk(b"IEND", b"")
    )


def compressed_zeros(n: int) -> bytes:
    """About n zero bytes, compressed, made in little memory."""
    compressor = zlib.compressobj(1)
    block = bytes(2 ** 20)
    parts = [compressor.compress(block) for _ in range(n >> 20)]
    return b"".join(parts) + compressor.flush()


@functools.cache
def image_files() -> list[bytes]:
    """Files of all kinds of images: good ones, refused ones, bombs."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (24, 20, 3), np.uint8))
    rgba = rgb.convert("RGBA")
    frames = [rgb.rotate(90 * k).convert("P") for k in range(3)]
    animated = {"save_all": True, "append_images": frames[1:]}
    exif = Image.Exif()
    exif[0x0112] = 6                        # orientation: turned by 90 degrees
    exif[0x010e] = "a picture"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "x" * 99, zip=True)

    files = [image_file(rgb, "PNG", exif=exif, pnginfo=text), image_file(rgba, "PNG")]
    files += [image_file(rgb.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "I;16")]
    files += [
        image_file(rgb, "JPEG", exif=exif),
        image_file(rgb.convert("CMYK"), "JPEG", progressive=True),
        image_file(frames[0], "GIF", transparency=3, **animated),
        image_file(rgb, "WEBP", exif=exif),
        image_file(rgba, "WEBP", lossless=True),
        image_file(frames[0], "WEBP", **animated),
    ]
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files.append(image_file(rgb, "TIFF", compression=compression))
    files.append(image_file(rgb.convert("1"), "TIFF", compression="group4"))
    files += [image_file(rgb.convert(mode), "TIFF") for mode in "FI"]
    files += [image_file(rgb.convert(mode), "BMP") for mode in ("RGB", "P")]

    # Formats that must not be opened.
    files += [image_file(rgb, kind) for kind in ("PPM", "ICO", "PDF", "EPS")]

    # Absurd sizes, and much in little.
    zeros = compressed_zeros(30_000_000)
    files += [
        claiming_png(60_000, 60_000),
        claiming_png(8000, 8000),
        claiming_png(8000, 8000, 16, 6),
        claiming_png(0, 0),
        claiming_png(2 ** 31, 1),
        claiming_png(9, 9, more=png_chunk(b"zTXt", b"a\0\0" + zeros)),
        claiming_png(9, 9, more=png_chunk(b"iCCP", b"a\0\0" + zeros)),
    ]
    return files


@functools.cache
def label_map_files() -> list[bytes]:
    files = []
    for mode in ("1", "L", "P", "I;16"):
        for kind in ("PNG", "TIFF"):
            files.append(image_file(Image.new(mode, (20, 24), 3), kind))
    return files


# ---- archives

ROW = {"text": "a red circle", "label": 3, "boxes": [["dog", 1, 2, 9, 10]], "mask": "m.png"}

ZIPPED_NAMES = [
    "a.png", "b/c.PNG", "../../canary.png", "/canary.png", "b/../../../canary.png",
    "C:\\canary.png", "a\0.png", "x" * 5000 + ".png", "\udcff.png", "link.png", "b/", ".png",
    "a.txt", "metadata.jsonl", "日本.png", "a.png", "con.jpg",
]
TARRED_NAMES = [
    "a.png", "a.txt", "a.cls", "a.json", "b/c.1.PNG", "b/c.1.json", "../../canary.png",
    "/canary.png", "b/../../../canary.png", "./a.png", "x" * 300 + ".png", "日本.png", ".png",
    "metadata.jsonl", "link.png", "a.tar", "\udcff.png", "con.jpg",
]

# Fields in the directory of a .zip: its mark, offset from there, and width, in bytes.
ZIP_FIELDS = [
    (b"PK\1\2", 8, 2),          # flags
    (b"PK\3\4", 6, 2),          # flags, in front of the file
    (b"PK\1\2", 10, 2),         # method
    (b"PK\1\2", 20, 4),         # size, compressed
    (b"PK\1\2", 24, 4),         # size
    (b"PK\1\2", 42, 4),         # place
    (b"PK\5\6", 8, 2),          # number of files on this disk
    (b"PK\5\6", 12, 4),         # size of the directory
]


def is_image(name: str) -> bool:
    return name.lower().endswith(("png", "jpg"))


@functools.cache
def zip_bomb(name: str) -> bytes:
    """A .zip with a file of 1.5 GB in less than 10 MB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("version", "3")
        with archive.open(name, "w") as member:
            for _ in range(1500):
                member.write(b"\n" * 10 ** 6)
    return file.getvalue()


def odd_zip(rng: random.Random) -> bytes:
    """Odd names, links, encryption, and lies in the directory; sometimes a bomb."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        names = rng.sample(ZIPPED_NAMES, rng.randrange(1, 8))
        for name in names * rng.choice((1, 1, 2)):
            info = zipfile.ZipInfo(name.encode("utf8", "replace").decode())
            info.compress_type = rng.choice((0, 8, 8, 12, 14))
            data = image_files()[0] if is_image(name) else b'{"file_name": "a.png"}'
            if name == "link.png":
                info.external_attr = 0o120777 << 16
                data = b"/etc/passwd"
            archive.writestr(info, data, compresslevel=1)

    data = bytearray(file.getvalue())
    for mark, offset, width in ZIP_FIELDS:
        if rng.random() < 0.1 and mark in data:
            i = data.find(mark) + offset
            one = b"\1".ljust(width, b"\0")
            data[i:i + width] = rng.choice((rng.randbytes(width), b"\xff" * width, one))
    if rng.random() < 0.02:
        return zip_bomb(rng.choice(("metadata.jsonl", "a.png", "a.txt")))
    return mutated(rng, bytes(data)) if rng.random() < 0.3 else bytes(data)


MEMBER_TYPES = [tarfile.REGTYPE] * 12 + [
    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE,
    tarfile.GNUTYPE_SPARSE, tarfile.CONTTYPE, b"\x00", b"Z",
]
PAX_HEADERS = ("size", "path", "GNU.sparse.map", "GNU.sparse.major", "linkpath", "mtime")
PAX_VALUES = ("-1", "99999999999999", "/canary.png", "0,9", "é")
TAR_SIZES = (
    b"77777777777\0", b"\x80" + bytes(10) + b"\7", b"\xff" * 12, b"-0000000001\0", b"00000000001\0",
)


def odd_tar(rng: random.Random) -> bytes:
    """Odd names, links, devices, sparse members, pax headers, and sizes that lie."""
    file = io.BytesIO()
    how = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    mode = rng.choice(("w", "w", "w", "w", "w", "w", "w:gz", "w:xz"))
    with tarfile.open(fileobj=file, mode=mode, format=how, errors="surrogateescape") as archive:
        for name in rng.choices(TARRED_NAMES, k=rng.randrange(1, 12)):
            is_short = how == tarfile.USTAR_FORMAT
            member = tarfile.TarInfo(name[:90] if is_short else name)
            data = image_files()[0]
            if not is_image(name):
                data = odd_json(rng, ROW).encode("utf8", "surrogatepass")
            member.type = rng.choice(MEMBER_TYPES)
            member.linkname = rng.choice(("/etc/passwd", "a.png", "../../canary"))
            if how == tarfile.PAX_FORMAT and rng.random() < 0.1:
                member.pax_headers = {rng.choice(PAX_HEADERS): rng.choice(PAX_VALUES)}
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

    data = bytearray(file.getvalue())
    if rng.random() < 0.2 and len(data) > 512:
        lie_about_a_size(rng, data)
    return mutated(rng, bytes(data)) if rng.random() < 0.3 else bytes(data)


def lie_about_a_size(rng: random.Random, tar: bytearray) -> None:
    """Change the size in one of the first headers; its checksum holds."""
    i = 512 * rng.randrange(min(len(tar) // 512, 9))
    tar[i + 124:i + 136] = rng.choice(TAR_SIZES)
    tar[i + 148:i + 156] = b" " * 8
    tar[i + 148:i + 156] = b"%06o\0 " % sum(tar[i:i + 512])


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
    state = {"scale_factor": torch.tensor(0.5)}
    for net, prefix in networks_of(presets.build_networks(presets.LDM["tiny"])):
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
        text = json.dumps(header).encode()
    if rng.random() < 0.2:
        text = mutated(rng, text)
    size = len(text)
    if rng.random() < 0.2:
        size = rng.choice((0, 2 ** 63, len(text) + 99, 10 ** 8))
    return size.to_bytes(8, "little") + text + whole[end:]


def odd_released_pickle(rng: random.Random, folder: Path) -> bytes:
    """A .ckpt as Lightning writes it."""
    _, state = released_model()
    if rng.random() >= 0.4:
        state = odd_tree(rng, state, ODD_PARTS)
    return pickled(rng, {"state_dict": state, "epoch": 1}, folder)


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
