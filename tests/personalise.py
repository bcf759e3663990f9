"""Teach the bundled model one new thing from 8 images: the table in notebooks/README.md.

    python tests/personalise.py out/personalise

The new thing is a colour outside the built-in world. The word for it is not in the model's
vocabulary, which a text model keeps: it is read as [UNK], a token that training never used,
as DreamBooth (Ruiz et al. 2023) takes a rare one. The colour lies between red and purple.
Why: stage one stays as it is, and its decoder turns colours far from those it has learned,
such as pink, into the nearest that it knows.

Every step is a command of the package, which is printed; this program makes the images,
chooses the prompts and scores the samples.
"""
import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinyldm.data import scorer, world
from tinyldm.data.finder import find
from tinyldm.data.images import load_rgb, to_image, to_tensor
from tinyldm.data.shapes import place, render
from tinyldm.data.world import COLOURS, RELATIONS, SHAPES, SIZES, Scene, Thing
from tinyldm.show.grids import save_grid

ROOT = Path(__file__).parent.parent
SIDE = 32
NEW = "magenta"
COLOURS_AND_NEW = COLOURS | {NEW: (0.74, 0.13, 0.42)}

N_ASKED = 64                # new captions that are sampled
N_OLD = 256                 # held-out prompts of the built-in world
N_PRIOR = 256

# Flags of the trainings; the others are the bundled model's.
COMMON = ["--steps", "500", "--batch", "32", "--warmup", "0"]
IN_FULL = [*COMMON, "--lr", "3e-4"]
BY_LORA = [*COMMON, "--lr", "4e-3", "--lora", "8", "--lora-tau"]
PRIOR_WEIGHT = "0.5"

TOY = ["--ckpt", "toy"]     # flags of sample.py


# ---- the new thing

def few_scenes() -> list[Scene]:
    """Return what the 8 images show: each shape once alone and once beside another object."""
    others = [
        Thing("square", "orange", "big"),
        Thing("triangle", "cyan", "small"),
        Thing("cross", "blue", "big"),
        Thing("circle", "green", "small"),
    ]
    scenes = []
    for shape, other, relation in zip(SHAPES, others, RELATIONS):
        scenes.append(Scene((Thing(shape, NEW, "small"),)))
        scenes.append(Scene((Thing(shape, NEW, "big"), other), relation))
    return scenes


def asked_scenes() -> list[Scene]:
    """Return N_ASKED scenes with the new colour that none of the 8 images shows."""
    new_things = [Thing(shape, NEW, size) for size in SIZES for shape in SHAPES]
    others = [scene.things[0] for scene in world.scenes_of("train")[0]]
    singles = [Scene((thing,)) for thing in new_things]
    pairs = []
    for thing in new_things:
        for other in others:
            for relation in RELATIONS:
                pairs.append(Scene((thing, other), relation))
                pairs.append(Scene((other, thing), relation))

    few = few_scenes()
    order = np.random.default_rng(0).permutation(len(pairs))
    scenes = [scene for scene in [*singles, *(pairs[i] for i in order)] if scene not in few]
    return scenes[:N_ASKED]


def write_few(folder: Path) -> None:
    """Write the 8 images, with their captions in metadata.jsonl."""
    folder.mkdir()
    lines = []
    for k, scene in enumerate(few_scenes()):
        rng = np.random.default_rng(k)
        image = render(place(scene, rng), SIDE, rng, COLOURS_AND_NEW)
        to_image(image).save(folder / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "text": scene.caption()}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))


# ---- scores

def new_score(images: list[Tensor], scenes: list[Scene]) -> dict[str, float]:
    """Return the shares of images that show the new thing, and that are right in all.

    The new thing is shown if there is an object of its colour and shape.
    """
    shown = []
    followed = []
    for image, scene in zip(images, scenes, strict=True):
        things = find(image, colours=COLOURS_AND_NEW)
        found = [thing.class_name for thing in things]
        [wanted] = [thing.class_name for thing in scene.things if thing.colour == NEW]
        shown.append(wanted in found)
        followed.append(scorer.are_as_wanted(things, scene.things, scene.relation))
    return {"shown": float(np.mean(shown)), "followed": float(np.mean(followed))}


def old_score(images: list[Tensor], prompts: list[str]) -> float:
    """Return the share of images that follow prompts of the built-in world."""
    followed = []
    for image, prompt in zip(images, prompts, strict=True):
        followed.append(scorer.follows(find(image, colours=COLOURS_AND_NEW), prompt))
    return float(np.mean(followed))


# ---- commands

def run(*command: object) -> float:
    """Run one of the programs, and return the minutes that it took."""
    words = [str(word) for word in command]
    print("python", shlex.join(words), flush=True)
    start = time.monotonic()
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return (time.monotonic() - start) / 60


def sample(folder: Path, prompts: list[str], *model: object) -> list[Tensor]:
    """Sample an image for each prompt by sample.py into a folder, and return them."""
    listed = folder.with_suffix(".txt")
    listed.parent.mkdir(exist_ok=True)
    listed.write_text("\n".join(prompts))
    run("sample.py", *model, "--prompts", listed, "--n", 1, "--out", folder)
    paths = sorted(folder.glob("*.png"))
    return [to_tensor(load_rgb(path.read_bytes())) for path in paths]


def main(args: argparse.Namespace) -> None:
    # The 8 images of the new thing, and the prior set, sampled from the model as it is.
    out = args.out.resolve()
    out.mkdir(parents=True)             # a training that is there already would be resumed
    few = out / "few"
    prior = out / "prior"
    write_few(few)
    sample(prior, world.prompts(N_PRIOR, "train"), *TOY)

    # The trainings, each with the flags that sample.py then needs.
    models = {"before": (0, TOY)}
    for name, how in (("in full", IN_FULL), ("LoRA", BY_LORA)):
        for with_prior in (True, False):
            label = f"{name}, {'with' if with_prior else 'without'} prior"
            folder = out / label.replace(", ", "_").replace(" ", "_")
            mixed = ["--prior", prior, "--prior-weight", PRIOR_WEIGHT] if with_prior else []
            minutes = run(
                "train_ldm.py", "--init", "toy", "--data", few, *mixed, *how,
                "--eval-n", 0, "--out", folder,
            )
            flags = [*TOY, "--lora", folder / "lora.safetensors"]
            if name == "in full":
                flags = ["--ckpt", folder / "model.pt"]
            models[label] = (minutes, flags)

    # Sample what is new and what is old from each model, and score it.
    scenes = asked_scenes()
    asked = [scene.caption() for scene in scenes]
    old = world.prompts(N_OLD)
    shown = [load_rgb(path.read_bytes()) for path in sorted(few.glob("*.png"))]
    rows = [to_tensor(image) for image in shown]
    print("| training | minutes | new thing shown | new captions followed | old prompts followed |")
    print("|---|---|---|---|---|")
    for label, (minutes, flags) in models.items():
        folder = out / f"samples_{label.replace(', ', '_').replace(' ', '_')}"
        images = sample(folder / "new", asked, *flags)
        new = new_score(images, scenes)
        followed = old_score(sample(folder / "old", old, *flags), old)
        percents = [f"{100 * x:.1f} %" for x in (*new.values(), followed)]
        print(f"| {label} | {minutes:.1f} | {' | '.join(percents)} |", flush=True)
        rows += images[:8]
    save_grid(torch.stack(rows), out / "personalise.png", 8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of everything that is written")
    main(parser.parse_args())
