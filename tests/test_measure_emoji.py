"""The programs that measure the emoji models: the judge, what is asked for, the two styles."""
import json

import emoji_styles
import measure_emoji
import torch
from PIL import Image

from tinyldm.data import emoji
from tinyldm.data.emoji import Emoji
from tinyldm.data.open import open_dataset
from tinyldm.metrics.nearest import ranks


def emoji_set():
    return open_dataset("emoji", size=64, hold_out=False)


def test_changed_names_begin_at_names_of_the_set_and_leave_it():
    """The first of each pair is a caption, the second is one or is made of known words."""
    captions = set(measure_emoji.first_captions(emoji_set()))
    assert captions.issuperset(measure_emoji.FACE)
    words = {word for caption in captions for word in caption.split()}
    for name, changed in measure_emoji.CHANGED:
        assert name in captions
        assert set(changed.split()) - words <= {"pink"}
    combined = [f"{c} {thing}" for c in measure_emoji.COLOURS for thing in measure_emoji.THINGS]
    assert len(combined) == 24
    assert len(captions.intersection(combined)) <= 3


def test_the_judge_knows_noisy_and_shifted_pictures_and_no_others():
    """Trained for seconds on 24 pictures; a picture that it is not shown is not the nearest."""
    data = emoji_set()
    pictures = torch.stack([data[i * 60]["image"] for i in range(24)])
    judge = measure_emoji.train_judge(pictures, steps=40, batch=32)
    noisy = (pictures + 0.3 * torch.randn_like(pictures)).roll((2, -1), (2, 3))
    features = judge(pictures)
    assert (ranks(judge(noisy), features, features) == 0).float().mean() > 0.9
    assert (ranks(judge(noisy), features.roll(1, 0), features) == 0).float().mean() < 0.2


def test_captions_are_below_their_images_and_cut_to_fit(tmp_path):
    measure_emoji.save_captioned(
        -torch.ones(3, 3, 32, 32), ["a", "a very long caption of many words", ""],
        tmp_path / "x.png", 2,
    )
    sheet = Image.open(tmp_path / "x.png")
    assert sheet.size == (2 * 96, 2 * (32 + 22))
    assert sheet.getpixel((96 // 2, 16)) == (0, 0, 0)
    assert min(sheet.crop((0, 36, 96, 54)).convert("L").tobytes()) < 128
    assert min(sheet.crop((0, 54 + 36, 96, 108)).convert("L").tobytes()) == 255


def test_of_two_styles_a_tenth_of_one_is_held_out_and_its_name_is_shown(monkeypatch, tmp_path):
    """Each name is trained on in Noto's style; names that one font lacks are left out."""
    names = measure_emoji.first_captions(emoji_set())[:400]
    red = Image.new("RGB", (64, 64), "red")
    drawn = [Emoji("x", name, red) for name in [*names, "no such thing"]]
    monkeypatch.setattr(emoji, "openmoji_font", lambda: ["OpenMoji.ttf"])
    monkeypatch.setattr(emoji, "open_font", lambda path: None)
    monkeypatch.setattr(emoji, "draw_all", lambda font: (drawn, ""))
    emoji_styles.write_both(tmp_path / "set")

    lines = (tmp_path / "set/metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    shown = {row["text"] for row in rows if row["file_name"].startswith("train/")}
    held_out = {row["text"] for row in rows if row["file_name"].startswith("val/")}
    assert len(shown) + len(held_out) == 800
    assert 20 < len(held_out) < 60
    for caption in held_out:
        assert caption.endswith(emoji_styles.STYLE)
    assert shown.issuperset(names)
