"""The bundled emoji, and the program that draws a colour font's: names, what is left out."""
import io
import json
import unicodedata
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

import sample
import train_ae
import train_ldm
from tinyldm.data import emoji
from tinyldm.data.emoji import Emoji
from tinyldm.data.open import BUNDLED_EMOJI, open_dataset
from tinyldm.engine.open import BUNDLED
from tinyldm.errors import BadInput


@pytest.fixture(scope="module")
def rows():
    """What the bundled set's metadata says, one row per picture."""
    with zipfile.ZipFile(BUNDLED_EMOJI) as archive:
        lines = archive.read("metadata.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


# ---- the bundled set

def test_the_bundled_set_is_small_and_has_its_licence_beside_it():
    """The licences of the font and of its images, in full."""
    assert BUNDLED_EMOJI.stat().st_size <= 6e6
    text = BUNDLED_EMOJI.with_name("emoji.LICENSE.txt").read_text()
    for words in ("Noto Color Emoji", "SIL OPEN FONT LICENSE", "Apache License", "END OF TERMS"):
        assert words in text


def test_every_picture_has_the_size_and_shows_something():
    """64 x 64, RGB, and not one of them is blank or twice there."""
    contents = Counter()
    with zipfile.ZipFile(BUNDLED_EMOJI) as archive:
        for name in archive.namelist():
            if name.endswith(".webp"):
                image = Image.open(io.BytesIO(archive.read(name)))
                assert (image.size, image.mode) == ((64, 64), "RGB")
                low, high = image.convert("L").getextrema()
                assert high - low > 20, name
                contents[image.tobytes()] += 1
    assert len(contents) == 1773
    assert set(contents.values()) == {1}


def test_each_picture_has_a_caption_of_its_own(rows):
    """Plain words: with and without an article; the first ones differ from one another."""
    captions = [row["text"][0] for row in rows]
    assert len(set(captions)) == len(rows) == 1773
    for row in rows:
        plain, other = row["text"]
        assert other.endswith(plain)
        assert plain == plain.lower()
    for caption in ("mushroom", "red heart", "grinning cat face with smiling eyes",
                    "boy with dark skin", "thumbs up with light skin", "large blue square"):
        assert caption in captions


def test_a_tenth_of_the_names_is_held_out_with_all_skin_tones(rows):
    """A name is in one split only, so that a held-out picture is not trained on in brown."""
    splits = {}
    for row in rows:
        name = row["text"][0]
        for tone in emoji.SKIN_TONES.values():
            name = name.removesuffix(f" with {tone}")
        splits.setdefault(name, set()).add(row["file_name"].partition("/")[0])
    assert all(len(found) == 1 for found in splits.values())

    held_out = [name for name, found in splits.items() if found == {"val"}]
    assert 0.08 < len(held_out) / len(splits) < 0.12
    assert all(zlib.crc32(name.encode()) % 10 == 0 for name in held_out)


def test_the_set_opens_by_its_name_and_holds_out_only_if_asked_to():
    """--data emoji; stage two trains on all names, as a word is known only if it was shown."""
    data = open_dataset("emoji", size=64, fields=["caption", "label"])
    held_out = open_dataset("emoji", "held-out", size=64)
    everything = open_dataset("emoji", size=64, hold_out=False)
    none = open_dataset("emoji", "held-out", size=64, hold_out=False)
    assert (len(data), len(held_out), len(everything), len(none)) == (1600, 173, 1773, 0)
    assert len(data.label_names) == 11
    assert data[0]["image"].shape == (3, 64, 64)


def test_the_rows_of_the_emoji_have_folders_of_their_own_and_fit_together():
    """Stage two finds stage one's checkpoint, whatever else was trained before."""
    for name in ("emoji", "emoji128"):
        stage_one = train_ae.parse_args(["--preset", name])
        stage_two = train_ldm.parse_args(["--preset", name])
        assert stage_two.ae == stage_one.out / "ckpt.pt"
        assert stage_two.out not in (stage_one.out, train_ldm.parse_args([]).out)
        assert (stage_one.data, stage_one.size) == (stage_two.data, stage_two.size)


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_are_called_by_their_names(name):
    """As a model to start from, and as a stage one; a file of that name is ./toy."""
    assert train_ldm.parse_args(["--ae", name]).ae == BUNDLED[name]
    assert train_ldm.parse_args(["--init", name]).init == BUNDLED[name]
    assert sample.parse_args(["--ckpt", name]).ckpt == BUNDLED[name]
    assert sample.parse_args(["--ckpt", f"./{name}"]).ckpt == Path(name)
    assert sample.parse_args([]).ckpt == BUNDLED["emoji"]


def test_the_set_is_what_the_program_makes_of_its_file_names(rows):
    """Caption, class and split of every row follow from its characters."""
    names = {}
    for row in rows:
        split, _, file = row["file_name"].partition("/")
        character, *tone = [chr(int(code, 16)) for code in file.removesuffix(".webp").split("-")]
        name = emoji.plain_name(character)
        if names.setdefault(name, character) != character:
            name = unicodedata.name(character).lower()
        picture = Emoji(character, name, None, emoji.SKIN_TONES[tone[0]] if tone else "")
        assert row["text"] == [picture.caption, emoji.with_article(picture.caption)]
        assert row["label"] == emoji.class_of(character)
        assert split == ("val" if picture.is_held_out else "train")


def test_a_training_that_starts_from_the_emoji_has_folders_and_held_out_images_of_its_own():
    """The run that made the file had others, and held nothing out."""
    args = train_ldm.parse_args(["--init", "emoji"])
    assert args.out == train_ldm.parse_args([]).out
    assert args.ae == BUNDLED["emoji"]
    assert args.hold_out


# ---- names

@pytest.mark.parametrize("character, name", [
    ("\U0001F344", "mushroom"),
    ("\u2764", "red heart"),
    ("\u2600", "sun with rays"),                # BLACK SUN WITH RAYS, which is yellow
    ("\u2b1b", "black large square"),           # which is black
    ("\U0001F5A4", "black heart"),
    ("\U0001F446", "up pointing index"),        # WHITE UP POINTING BACKHAND INDEX
    ("\U0001F44D", "thumbs up"),
    ("\U0001F1E6", "letter a"),
    ("\U0001F170", "squared capital letter a"),
])
def test_names_are_plain_words_and_true(character, name):
    """What Unicode calls black and white is left out where it means filled and outlined."""
    assert emoji.plain_name(character) == name


@pytest.mark.parametrize("name, caption", [
    ("mushroom", "a mushroom"),
    ("ox", "an ox"),
    ("eyes", "eyes"),
    ("octopus", "an octopus"),
    ("cactus", "a cactus"),
    ("european castle", "a european castle"),
    ("unicorn face", "a unicorn face"),
    ("one-piece swimsuit", "a one-piece swimsuit"),
    ("face with tears of joy", "a face with tears of joy"),
])
def test_articles(name, caption):
    assert emoji.with_article(name) == caption


@pytest.mark.parametrize("character, name", [
    ("\U0001F344", "plant"), ("\U0001F345", "food"), ("\U0001F600", "face"),
    ("\U0001F435", "animal"), ("\U0001F680", "vehicle"), ("\u2764", "symbol"),
    ("\U0001F9DF", "person"), ("\U0001F44D", "body"), ("\U0001F3E0", "place"),
    ("\U0001F577", "animal"), ("\u26c4", "sky"), ("\u26bd", "thing"), ("\u26f5", "vehicle"),
    ("\U0001F6B2", "vehicle"), ("\U0001F6AB", "symbol"), ("\U0001F9B8", "person"),
    ("\U0001F484", "thing"), ("\U0001F499", "symbol"), ("\U0001FAB4", "plant"),
])
def test_classes(character, name):
    assert emoji.class_of(character) == name


# ---- what is drawn

MUSHROOM = "\U0001F344"
THUMB = "\U0001F44D"
SNOWBOARDER = "\U0001F3C2"


class MadeUpFont:
    """A font with three emoji in colour, one outline, and a box for all that it lacks.

    The mushroom and a skin tone are two pictures, the snowboarder's skin is not seen.
    """

    layout_engine = ImageFont.Layout.RAQM

    def font_variant(self, layout_engine):
        return self

    def getlength(self, text):
        return len(text) if text[0] == MUSHROOM else 1


def made_up_draw(font, text, fill="black"):
    """Blank for a red heart; the copyright sign is an outline."""
    colours = {MUSHROOM: "red", THUMB: "gold", SNOWBOARDER: "blue", "\u00a9": fill}
    if text[0] == "\u2764":
        return None
    size = (6, 4) if text[0] in colours else (3, 3)
    image = Image.new("RGB", size, colours.get(text[0], "black"))
    if text[0] == THUMB and len(text) > 1:
        image.putpixel((0, 0), (0, 0, ord(text[1]) % 256))
    return image


def test_what_a_font_lacks_or_draws_without_colour_is_left_out(monkeypatch):
    """Blank, the box of a missing character, an outline; skin tones only where they join."""
    monkeypatch.setattr(emoji, "draw", made_up_draw)
    drawn, left_out = emoji.draw_all(MadeUpFont())
    assert [picture.caption for picture in drawn] == [
        "mushroom", "snowboarder", "thumbs up", "thumbs up with light skin",
        "thumbs up with medium skin", "thumbs up with dark skin",
    ]
    assert left_out == "1 signs without colour"


def test_a_set_that_is_written_opens_with_all_it_has(tmp_path):
    """A picture that is not square keeps its shape, in the middle of white."""
    pictures = [
        Emoji("\U0001F344", "mushroom", Image.new("RGB", (20, 10), "red")),
        Emoji("\U0001F44D\U0001F3FF", "thumbs up", Image.new("RGB", (8, 8), "gold"), "dark skin"),
    ]
    path = tmp_path / "new" / "x.zip"
    emoji.write_set(pictures, path, 16, style="in outline style")
    data = open_dataset(str(path), size=16, hold_out=False)
    assert data.captions() == [
        "mushroom in outline style",
        "a mushroom in outline style",
        "thumbs up with dark skin in outline style",
        "a thumbs up with dark skin in outline style",
    ]
    assert data.label_names == ("body", "plant")
    image = data[0]["image"]
    assert image[:, 8, 8].tolist() == [1, -1, -1]
    assert image[:, 1, 8].tolist() == [1, 1, 1]


def test_an_edge_is_blended_with_white_once():
    """Half a pixel of black is grey: drawn on nothing, it would be darkened twice."""
    font = ImageFont.load_default(40)
    image = emoji.draw(font, "o")
    mask = Image.new("L", image.size)
    left, top, _, _ = font.getbbox("o")
    ImageDraw.Draw(mask).text((-left, -top), "o", 255, font)
    greys = [255 - value for value in mask.tobytes()]
    found = list(image.convert("L").tobytes())
    assert max(abs(a - b) for a, b in zip(found, greys)) <= 1
    assert any(40 < grey < 215 for grey in greys)


def test_what_no_font_can_draw_ends_in_one_line(monkeypatch, tmp_path):
    """No font at all, no such file, no font, a font of outlines; each says what was found."""
    outlines = tmp_path / "outlines.ttf"
    outlines.write_bytes(ImageFont.load_default(20).font_bytes)
    (tmp_path / "text.ttf").write_text("no font")
    out = str(tmp_path / "x.zip")
    cases = [
        ([str(outlines), out], "no emoji in colour is drawn"),
        ([str(tmp_path / "gone.ttf"), out], "gone.ttf: no such file"),
        ([str(tmp_path / "text.ttf"), out], "text.ttf: is no font that can be read"),
        ([str(outlines), str(tmp_path / "x.tar")], "x.tar: must be the name of a .zip"),
        ([str(outlines), out, "--size", "4"], "--size 4: must be at least 16"),
        ([out], "no colour font of emoji is found; on Debian"),
    ]
    # A font that Pillow would find by its name elsewhere is not the one that was asked for.
    for found in emoji.SYSTEM_FONTS:
        cases.append(([str(tmp_path / found), out], f"{found}: no such file"))
    monkeypatch.setattr(emoji, "SYSTEM_FONTS", ["NoSuchFont.ttf"])
    monkeypatch.setattr(emoji, "openmoji_font", lambda: [])
    for argv, message in cases:
        with pytest.raises(BadInput, match=message):
            emoji.main(emoji.parse_args(argv))
    assert not (tmp_path / "x.zip").exists()


def system_font():
    """The emoji font of this machine, or None."""
    try:
        return emoji.open_font(None)
    except BadInput:
        return None


@pytest.mark.skipif(system_font() is None, reason="no emoji font is installed")
def test_the_font_of_this_machine_draws_a_mushroom_in_red():
    font = system_font()
    image = emoji.draw(font, "\U0001F344")
    assert emoji.is_coloured(font, "\U0001F344", image)
    pixels = emoji.in_square(image, 16).getcolors(256)
    assert any(r > 150 and g < 110 and b < 110 for _, (r, g, b) in pixels)
