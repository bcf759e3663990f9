"""Readers of strangers' files: each makes one odd input in a folder, and reads it as programs do.

An input that is wrong must be BadInput; one that is read must be sound.
"""
import functools
import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from fuzz_files import image_file, image_files, label_map_files, odd_tar, odd_zip
from fuzz_models import (
    BERT_PIECES,
    CLIP_MERGES,
    CLIP_PIECES,
    odd_checkpoint,
    odd_export,
    odd_released_pickle,
    odd_safetensors,
    own_tokenizer,
)
from fuzz_mutations import mutated, odd_json, odd_text
from PIL import Image
from tokenizers import Tokenizer

import sample
from tinyldm.data.folder import Folder
from tinyldm.data.images import LOADERS
from tinyldm.data.tokenizer import CLIP_GZ, encode, open_vocab, train_tokenizer
from tinyldm.engine.open import BUNDLED, open_model, open_stage_one
from tinyldm.engine.released import load_released, load_stage_one
from tinyldm.engine.request import Given, Request, read_request
from tinyldm.engine.weights import read_state
from tinyldm.show.attention import save_attention
from tinyldm.tasks import TASKS, Task

SIZE = (16, 16)
SEMANTIC = TASKS["semantic"]({"c_in": 9, "c_out": 3, "n": 2})
LAYOUT = TASKS["layout"]({"n_vocab": 1025, "n_token": 92}, class_names=("red", "dog", "cat", "3"))
CLASS = TASKS["class"]({"n_classes": 9, "d": 1}, class_names=("red", "a"))
TEXT = TASKS["text"]({})
SUPERRES = TASKS["superres"]({})


def request(task: Task, given: Given, channels: int = 3) -> Request:
    """What sample.py makes of a condition, for a model of this task."""
    config = SimpleNamespace(autoencoder=SimpleNamespace(c_x=channels))
    model = SimpleNamespace(task=task, config=config, size_multiple=4, run={})
    return read_request(model, given, SIZE, n=1)


def file_request(task: Task, kind: str, path: Path, channels: int = 3) -> list[dict]:
    """The conditions in the file of a flag."""
    return list(request(task, Given([], [], {kind: path}), channels).conditions)


def encode_boxes(boxes: torch.Tensor) -> None:
    ids = LAYOUT.encode({"boxes": [boxes]})["boxes"]
    assert 0 <= ids.min() and ids.max() < 1025


# ---- images

def images(rng: random.Random, folder: Path) -> None:
    """As --image, and in a folder beside a good one; with any number of channels."""
    channels = rng.choice(list(LOADERS))
    one, other = rng.choices(image_files(), k=2)
    data = mutated(rng, one, other)
    exif = data.find(b"Exif\0\0")
    if rng.random() < 0.1 and exif > 0:
        data = data[:exif + 6] + mutated(rng, data[exif + 6:])
    (folder / "0.png").write_bytes(data)

    if rng.random() < 0.2:
        (folder / "1.png").write_bytes(image_files()[0])
        item = Folder(str(folder), (16, 24), "all", channels=channels)[0]
        assert item["image"].shape == (channels, 16, 24)
    else:
        item, = file_request(SUPERRES, "image", folder / "0.png", channels)
        assert len(item["small"]) == channels


def maps(rng: random.Random, folder: Path) -> None:
    """As --map, and in a folder."""
    good = label_map_files()
    data = mutated(rng, rng.choice(good * 9 + image_files()), rng.choice(good))
    (folder / "map.png").write_bytes(data)

    if rng.random() < 0.2:
        (folder / "0.png").write_bytes(image_files()[0])
        (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "mask": "map.png"}')
        items = [Folder(str(folder), 16, "all")[0]]
    else:
        items = file_request(SEMANTIC, "map", folder / "map.png")
    SEMANTIC.encode({"segmentation": [item["segmentation"] for item in items]})


# ---- what is said of images

def boxes(rng: random.Random, folder: Path) -> None:
    """As --boxes."""
    rows = [["red", 1, 2, 9, 10], [3, 8.5, 8, 16, 16], ["dog", 0, 0, 1, 1]]
    data = odd_json(rng, rows).encode()
    if rng.random() < 0.3:
        data = mutated(rng, data)
    (folder / "boxes.json").write_bytes(data)
    item, = file_request(LAYOUT, "boxes", folder / "boxes.json")
    encode_boxes(item["boxes"])


def metadata(rng: random.Random, folder: Path) -> None:
    """A folder whose metadata.jsonl is odd, read as all tasks would."""
    for name in ("0.png", "1.png", "2.png"):
        (folder / name).write_bytes(image_files()[0])
    (folder / "m.png").write_bytes(image_file(Image.new("L", (20, 24), 3), "PNG"))
    row = {
        "text": "a red circle",
        "label": "red",
        "mask": "m.png",
        "small": "m.png",
        "boxes": [["dog", 1, 2, 9, 10], ["cat", 0, 0, 20, 24]],
    }
    lines = [json.dumps(row | {"file_name": f"{i}.png"}) for i in range(2)]
    lines.append(odd_json(rng, row | {"file_name": "2.png"}))
    data = "\n".join(lines).encode()
    if rng.random() < 0.2:
        data = mutated(rng, data)
    (folder / "metadata.jsonl").write_bytes(data)

    label_column = rng.choice(("label", "text", "boxes"))
    dataset = Folder(str(folder), 16, "all", flip=True, label_column=label_column)
    for field in rng.sample(("caption", "label", "boxes", "segmentation", "small"), 2):
        dataset.require_field(field)
    for i in range(2 * len(dataset)):
        item = dataset[i]
        if "boxes" in item:
            encode_boxes(item["boxes"])
    if all("text" in row for row in dataset.rows):
        captions = dataset.captions()
        encode(train_tokenizer(captions), captions, 9)


# ---- archives

def read_some(dataset: Folder) -> None:
    """Read the first three items."""
    for i in range(min(3, len(dataset))):
        item = dataset[i]
        if "boxes" in item:
            encode_boxes(item["boxes"])


def zips(rng: random.Random, folder: Path) -> None:
    """A .zip as a data set."""
    (folder / "x.zip").write_bytes(odd_zip(rng))
    read_some(Folder(str(folder / "x.zip"), 8, "all"))


def tars(rng: random.Random, folder: Path) -> None:
    """A .tar as a data set, and a folder of one."""
    (folder / "x.tar").write_bytes(odd_tar(rng))
    path = folder / rng.choice(("x.tar", ""))
    read_some(Folder(str(path), 8, "all"))


# ---- models

def checkpoints(rng: random.Random, folder: Path) -> None:
    """Ours, as sample.py and train_ldm.py read them."""
    data, is_stage_one = odd_checkpoint(rng, folder.parent)
    path = folder / "x.pt"
    path.write_bytes(data)
    if is_stage_one:
        open_stage_one(path)
        return

    model = open_model(path)
    if model.config.task == "text":
        ids = encode(model.tokenizer, ["a red circle", odd_text(rng)], 5)
        assert 0 <= ids.min() and ids.max() < model.config.tau["n_vocab"]


def released(rng: random.Random, folder: Path) -> None:
    """Pickles and .safetensors under any name, as sample.py and train_ldm.py read them."""
    path = folder / rng.choice(("x.safetensors", "x.ckpt", "x.bin"))
    kind = rng.random()
    if kind < 0.4:
        path.write_bytes(odd_safetensors(rng))
    elif kind < 0.7:
        path.write_bytes(odd_released_pickle(rng, folder.parent))
    else:
        path.write_bytes(odd_export(rng, folder.parent))
    read_state(path)

    model = load_released(path, rng.choice(("tiny", None)))
    load_stage_one(path)
    if model.tokenizer is not None:
        ids = encode(model.tokenizer, ["a red circle"], 5)
        assert 0 <= ids.min() and ids.max() < model.config.tau["n_vocab"]


# ---- words

def vocabularies(rng: random.Random, folder: Path) -> None:
    """CLIP's two files or its one, BERT's list, tokenizer.json; what can be opened encodes."""
    def write(name: str, text: str, compress: Callable[[bytes], bytes] = bytes) -> None:
        data = text.encode("utf8", "surrogatepass")
        if rng.random() < 0.3:
            data = mutated(rng, data)
        data = compress(data)
        if compress is not bytes and rng.random() < 0.2:
            data = mutated(rng, data)
        (folder / name).write_bytes(data)

    kind = rng.choice(("clip", "clip.gz", "bert", "ours"))
    if kind == "clip":
        n_vocab = len(CLIP_PIECES)
        merges = list(CLIP_MERGES)
        if rng.random() < 0.3:
            merges.insert(rng.randrange(5), odd_text(rng))
        write("vocab.json", odd_json(rng, {piece: i for i, piece in enumerate(CLIP_PIECES)}))
        write("merges.txt", "\n".join(merges))
    elif kind == "clip.gz":
        merges = list(CLIP_MERGES)
        if rng.random() < 0.3:
            merges.insert(rng.randrange(5), odd_text(rng))
        n_vocab = 2 * 256 + len(merges) - 1 + 2
        write(CLIP_GZ, "\n".join(merges), gzip.compress)
    elif kind == "bert":
        n_vocab = len(BERT_PIECES)
        lines = list(BERT_PIECES)
        if rng.random() < 0.5:
            lines[rng.randrange(n_vocab)] = odd_text(rng)
        write("vocab.txt", "\n".join(lines))
    else:
        n_vocab = Tokenizer.from_str(own_tokenizer()).get_vocab_size()
        write("tokenizer.json", odd_json(rng, json.loads(own_tokenizer())))

    tokenizer = open_vocab(folder, n_vocab, rng.choice((6, 77)))
    ids = encode(tokenizer, ["a red circle", "", odd_text(rng)], 77)
    assert 0 <= ids.min() and ids.max() < n_vocab


@functools.cache
def bundled_tokenizer() -> Tokenizer:
    return open_model(BUNDLED["toy"]).tokenizer


def prompts(rng: random.Random, folder: Path) -> None:
    """A file and words of the command line; encoded, warned of, and shown."""
    text = "\n".join(odd_text(rng) for _ in range(rng.choice((0, 1, 3))))
    data = text.encode("utf8", rng.choice(("surrogatepass", "replace", "ignore")))
    if rng.random() < 0.2:
        data = mutated(rng, data)
    path = folder / "p.txt"
    path.write_bytes(data)
    words = [odd_text(rng).replace("\0", "") for _ in range(rng.randrange(2))]

    flags = sample.parse_args(["--prompts", str(path), "--", *words])
    task = rng.choice((TEXT, TEXT, CLASS))
    conditions = request(task, sample.given_conditions(flags)).conditions
    if task is TEXT:
        captions = [condition["caption"] for condition in conditions]
        encode(bundled_tokenizer(), captions, 12)
        encodings = bundled_tokenizer().encode_batch(captions[:2])
        n = len(encodings)
        shown = torch.zeros(n, 3, 8, 8)
        save_attention(shown, torch.rand(n, 12, 8, 8), encodings, folder / "a.png")


READERS: dict[str, Callable] = {
    "images": images,
    "maps": maps,
    "boxes": boxes,
    "metadata": metadata,
    "zips": zips,
    "tars": tars,
    "checkpoints": checkpoints,
    "released": released,
    "vocabularies": vocabularies,
    "prompts": prompts,
}
