"""Inputs that are wrong by chance: bytes, JSON and texts, made from good ones.

Everything follows from a random.Random, rng.
"""
import copy
import json
import random
from typing import Any

# ---- bytes

EXTREMES = (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1")


def mutated(rng: random.Random, data: bytes, other: bytes = b"") -> bytes:
    """Bytes replaced, cut out, doubled, taken from another file; or the file as it is."""
    changed = bytearray(data)
    for _ in range(rng.choice((0, 1, 1, 2, 5, 20))):
        mutate_once(rng, changed, other)
    return bytes(changed)


def mutate_once(rng: random.Random, data: bytearray, other: bytes) -> None:
    """Change some bytes of data, in place, or none."""
    if data:
        i = rng.randrange(len(data) + 1)
        n = rng.choice((1, 2, 4, 16, 200))
    else:
        i = 0
        n = 1
    part = data[i:i + n]

    kind = rng.randrange(7)
    if kind == 0:
        data[i:i + n] = rng.randbytes(len(part))
    elif kind == 1:
        data[i:i + 4] = rng.choice(EXTREMES)
    elif kind == 2:
        del data[i:i + n]
    elif kind == 3:
        data[i:i] = part * rng.choice((1, 3))
    elif kind == 4 and other:
        j = rng.randrange(len(other))
        data[i:i + n] = other[j:j + n]
    elif kind == 5 and i < len(data):
        data[i] ^= 1 << rng.randrange(8)
    elif kind == 6 and rng.random() < 0.3:
        del data[i:]


# ---- JSON

# They stand for JSON that json.dumps does not write: deep nesting, long numbers.
DEEP = "@deep@"
LONG = "@long@"

ODD_VALUES = [
    None, True, 0, -1, 1, 7, 2 ** 31, 2 ** 63, 10 ** 30, -10 ** 400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), -float("inf"),
    "", "a", "0", "\ud800", "\0", "\u202e\u0301", "٣", "../../x", "/etc/passwd", "a" * 100_000,
    [], {}, [[]], [None], {"a": 1}, DEEP, LONG,
]


def odd_json(rng: random.Random, value: Any) -> str:
    """value with some of its parts replaced, dropped, or doubled; as JSON or nearly so."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((0, 1, 1, 1, 3))):
        change_part(rng, root)
        if root[0] in ([], {}):
            break

    text = json.dumps(root[0])
    text = text.replace(f'"{DEEP}"', "[" * 10_000 + "]" * 10_000)
    number = rng.choice(("9" * 5000, "1e999", "-1e999", "1" + "0" * 4000))
    return text.replace(f'"{LONG}"', number)


def change_part(rng: random.Random, root: list) -> None:
    """Go down a nested value at random, and change what is there."""
    parent = root
    key = 0
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.8:
        parent = parent[key]
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        key = rng.choice(keys)

    kind = rng.randrange(6)
    if kind == 0 and parent is not root:
        del parent[key]
    elif kind == 1 and isinstance(parent, list) and parent is not root:
        parent.append(copy.deepcopy(parent[key]))
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))


def odd_tree(rng: random.Random, tree: dict, more_odd_values: list) -> dict:
    """A nested dict in which one value is replaced, or is missing."""
    name = rng.choice(list(tree))
    if "config" in tree and rng.random() < 0.6:
        name = "config"
    if isinstance(tree[name], dict) and tree[name] and rng.random() < 0.9:
        return tree | {name: odd_tree(rng, tree[name], more_odd_values)}
    if rng.random() < 0.1:
        return {key: v for key, v in tree.items() if key != name}
    return tree | {name: rng.choice(ODD_VALUES + more_odd_values)}


# ---- texts

WORDS = [
    "a", "red", "circle", "above", "\ud800", "\udcff", "\0", "\x1b[2J", "\u202e", "\u200f",
    "\u0301" * 50, "\U0001f9d1\u200d\U0001f680", "\ufeff", "\uffff", "\U0010ffff", "日本", "ﷺ",
    "[PAD]", "[UNK]", "[CLS]", "<|endoftext|>", "'s", "\x85", "\u2028", "x" * 3000,
]


def odd_text(rng: random.Random) -> str:
    """Words and single characters, of which many occur in no caption."""
    if rng.random() < 0.02:
        return rng.choice(WORDS[:3]) * 300_000

    separator = rng.choice((" ", " ", "", "\t"))
    n = rng.choice((0, 1, 5, 50))
    return separator.join(odd_word(rng) for _ in range(n))


def odd_word(rng: random.Random) -> str:
    if rng.random() < 0.7:
        return rng.choice(WORDS)
    return chr(rng.randrange(rng.choice((0x300, 0x110000))))
