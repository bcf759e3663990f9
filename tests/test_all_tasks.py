"""Every task end to end, over the table TASKS; and what sample.py makes of a user's files.

A new row of TASKS is tested by being there: it trains, resumes, samples from held-out items,
shows its conditions and scores the samples.
"""
import json
import re

import numpy as np
import pytest
import torch
from conftest import TINY_LDM, write_images
from PIL import Image

from tinyldm.data.folder import Folder
from tinyldm.data.open import open_dataset
from tinyldm.engine.open import open_model
from tinyldm.tasks import TASKS

# With so few timesteps an evaluation samples in 8 steps, not in 25.
SMALL = [*TINY_LDM, "--size", 16, "--T", 8, "--text-heads", 2, "--attn-res", 4]

# What a new folder's images can be without; the other fields are made of the image.
GIVEN_FIELDS = {"caption", "label", "boxes", "segmentation"}

pytestmark = pytest.mark.usefixtures("few_are_held_out")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images that have every field."""
    path = tmp_path_factory.mktemp("folder") / "images"
    write_images(path, 40, kind="cat", boxes=[["dog", 10, 14, 30, 24]], mask="map.png")
    Image.fromarray(np.full((48, 40), 2, np.uint8)).save(path / "map.png")
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory, trained, cli):
    """models(task) -> the folder of a tiny model of it: a run of one step, then of one more."""
    out = tmp_path_factory.mktemp("tasks")
    how = [*SMALL, "--ae", trained / "ae/ckpt.pt", "--no-cache-latents"]

    def model(task):
        folder = out / task
        if not folder.exists():
            flags = [*how, "--task", task, "--out", folder]
            cli("train_ldm.py", *flags, "--steps", 1, "--eval-n", 0)
            output = cli("train_ldm.py", *flags, "--steps", 2)
            assert "1 of 2 steps are done" in output
        return folder

    return model


@pytest.fixture
def sample(models, tmp_path, cli):
    """sample(task, *flags, code=0) -> what sample.py prints; it writes tmp_path/x.png."""
    def run(task, *flags, code=0):
        checkpoint = models(task) / "model.pt"
        how = ["--steps", 2, "--out", tmp_path / "x.png"]
        return cli("sample.py", "--ckpt", checkpoint, *how, *flags, code=code)

    return run


def pixels(path) -> np.ndarray:
    """The pixels of an image file, as integers that may be subtracted."""
    return np.asarray(Image.open(path)).astype(int)


def default_conditions(task) -> list[dict] | None:
    """What sample.py takes if no condition is given: None is for held-out items."""
    conditions, _ = task.read({"prompts": [], "label": []}, (16, 16), 8)
    return conditions


def prompt_for(task) -> list[str]:
    """A prompt, for a task that has nothing to sample from without one."""
    return ["a red circle"] if default_conditions(task) == [] else []


def is_shown(task) -> bool:
    """True if samples of a task are shown below their conditions."""
    data = open_dataset("shapes", "held-out", size=16, fields=task.fields)
    return task.show(data[0], 16, 16) is not None


# ---- every task

@pytest.mark.parametrize("name", TASKS)
def test_a_task_trains_resumes_and_is_evaluated(models, trained, cli, name):
    """Its figures are in the log, its samples in a grid, below conditions that can be shown."""
    task = open_model(models(name) / "model.pt").task
    data = open_dataset("shapes", "held-out", size=16, fields=task.fields)
    items = [data[0], data[1]]
    figures = task.score(torch.stack([item["image"] for item in items]), items)
    log = (models(name) / "log.jsonl").read_text().splitlines()
    assert set(figures) <= set(json.loads(log[-1]))

    # A row of eight samples, each 96 pixels wide, and a row of conditions if there is one.
    n_rows = 2 if is_shown(task) else 1
    grid = Image.open(models(name) / "samples_000002.png")
    assert grid.size == (8 * 100 + 4, n_rows * 100 + 4)

    # A run of another task does not continue it.
    other = "class" if name == "uncond" else "uncond"
    flags = [*SMALL, "--ae", trained / "ae/ckpt.pt", "--task", other, "--out", models(name)]
    output = cli("train_ldm.py", *flags, "--steps", 2, code=2)
    assert f"was made with task name = {name}, now it is {other}" in output


@pytest.mark.parametrize("name", TASKS)
def test_a_task_samples_and_scores(models, sample, tmp_path, name):
    """From a prompt where the task takes one, else from held-out items or all its classes."""
    task = open_model(models(name) / "model.pt").task
    conditions = default_conditions(task)
    n = 2 if conditions is None else 2 * max(1, len(conditions))
    output = sample(name, *prompt_for(task), "--n", 2, "--score")

    line = rf"^{n} images, s = {task.guidance_scale:g}, 2 DDIM steps: (.*)"
    found = re.search(line, output, re.M)
    assert found, output
    data = open_dataset("shapes", "held-out", size=16, fields=task.fields)
    figures = task.score(data[0]["image"][None], [data[0]])
    assert [part.split()[0] for part in found[1].split(", ")] == list(figures)

    # Two columns; a row per condition, or one above its samples.
    grid = Image.open(tmp_path / "x.png")
    assert grid.width == 2 * 100 + 4
    assert grid.height == (n // 2) * (2 if is_shown(task) else 1) * 100 + 4


@pytest.mark.parametrize("name", TASKS)
def test_a_task_learns_from_a_folder_with_cached_latents(trained, images, tmp_path, cli, name):
    """Its class names are those of the folder; samples take conditions from held-out images."""
    of_data = ["--data", images, "--label-column", "kind", "--degrade", "chain", "--flip"]
    flags = [*SMALL, "--ae", trained / "ae/ckpt.pt", "--task", name, *of_data]
    cli("train_ldm.py", *flags, "--steps", 1, "--eval-n", 0, "--out", tmp_path / "x")

    data = open_dataset(str(images), size=16, label_column="kind", fields=TASKS[name].fields)
    checkpoint = torch.load(tmp_path / "x/model.pt", weights_only=True)
    assert checkpoint["classes"] == list(TASKS[name].names_in(data))

    prompt = prompt_for(open_model(tmp_path / "x/model.pt").task)
    cli("sample.py", "--ckpt", tmp_path / "x/model.pt", "--steps", 2, "--n", 2,
        "--out", tmp_path / "x.png", *prompt)
    assert Image.open(tmp_path / "x.png").width > 90


LACKING = [name for name, task in TASKS.items() if GIVEN_FIELDS & set(task.fields)]


@pytest.mark.parametrize("name", LACKING)
def test_a_folder_that_lacks_a_field_is_named(trained, tmp_path, folder, cli, name):
    path = folder(8, text=None)
    flags = [*SMALL, "--ae", trained / "ae/ckpt.pt", "--task", name, "--data", path]
    output = cli("train_ldm.py", *flags, "--out", tmp_path / "x", code=2)
    lacking, = GIVEN_FIELDS & set(TASKS[name].fields)
    assert re.search(rf"error: --data: {path}: \d+\.png has no {lacking}; ", output), output


def test_labels_that_only_held_out_maps_have_are_counted(trained, tmp_path, folder, cli):
    """Else training would end at its first evaluation of a held-out map."""
    path = folder(40, mask="low.png")
    for name, label in (("low", 1), ("high", 6)):
        Image.fromarray(np.full((48, 40), label, np.uint8)).save(path / f"{name}.png")
    held_out = {row["file_name"] for row in Folder(str(path), 16, "held-out").rows}
    assert held_out

    metadata = path / "metadata.jsonl"
    rows = [json.loads(line) for line in metadata.read_text().splitlines()]
    for row in rows:
        if row["file_name"] in held_out:
            row["mask"] = "high.png"
    metadata.write_text("".join(json.dumps(row) + "\n" for row in rows))

    flags = [*SMALL, "--ae", trained / "ae/ckpt.pt", "--task", "semantic", "--data", path]
    cli("train_ldm.py", *flags, "--steps", 1, "--eval-n", 1, "--out", tmp_path / "x")
    checkpoint = torch.load(tmp_path / "x/ckpt.pt", weights_only=True)
    assert checkpoint["config"]["tau"]["c_in"] == 7


def test_pixels_as_stage_one_and_a_diffusion_of_one_step(tmp_path, cli):
    """--ae none, and with it Table 5's regression: with T = 1 the U-Net predicts the image at once.
    """
    flags = [*SMALL, "--ae", "none", "--attn-res", 8, "--task", "superres"]
    flags += ["--eval-n", 0, "--steps", 1]
    one_step = ["--T", 1, "--beta-range", 0.9999, 0.9999]
    for name, more, n_steps in (("pixels", [], 8), ("one", one_step, 1)):
        cli("train_ldm.py", *flags, *more, "--out", tmp_path / name)
        output = cli("sample.py", "--ckpt", tmp_path / name / "model.pt", "--n", 2, "--score",
                     "--out", tmp_path / "x.png")
        assert f"{n_steps} DDIM steps: psnr" in output


# ---- files of a user

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with images, masks, label maps and boxes of a user. Only read it."""
    path = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for name, w, h in (("photo", 16, 16), ("wide", 40, 24), ("small", 6, 8), ("odd", 7, 9)):
        image = Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8))
        image.save(path / f"{name}.png")
    Image.new("L", (2001, 2001)).save(path / "large.png")

    hole = np.zeros((16, 16), np.uint8)
    hole[4:10, 6:12] = 255
    grey = {
        "hole": hole,
        "all": np.full_like(hole, 255),
        "nothing": np.zeros_like(hole),
        "map": hole // 255 * 3,
        "high": hole,
    }
    for name, values in grey.items():
        Image.fromarray(values).save(path / f"{name}.png")
    Image.fromarray(hole).resize((8, 8), Image.Resampling.NEAREST).save(path / "hole8.png")

    boxes = {
        "boxes": [["red circle", 1, 2, 9, 10], [3, 8, 8, 16, 16]],
        "outside": [[1, 1, 2, 17, 10]],
        "flat": [[1, 9, 2, 9, 10]],
        "ant": [["red ant", 1, 2, 9, 10]],
        "dict": {"a": 1},
    }
    for name, values in boxes.items():
        (path / f"{name}.json").write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("task,flags,n", [
    ("layout", ["--boxes", "{files}/boxes.json"], 1),
    ("semantic", ["--map", "{files}/map.png"], 1),
    ("superres", ["--image", "{files}/small.png"], 1),
    ("class", ["--label", "red circle"], 1),
    ("class", ["--label", "red circle", "3"], 2),
])
def test_a_condition_from_a_file_or_a_name(sample, files, task, flags, n):
    flags = [flag.format(files=files) for flag in flags]
    output = sample(task, *flags, "--n", 1)
    assert f"\n{n} image(s) in " in output
    assert "warning" not in output


@pytest.mark.parametrize("name,w,h", [("small", 24, 32), ("odd", 28, 36)])
def test_a_small_image_is_enlarged_fourfold(sample, files, tmp_path, name, w, h):
    sample("superres", "--image", files / f"{name}.png", "--n", 1, "--out", tmp_path / "x")
    assert Image.open(tmp_path / "x/000000.png").size == (w, h)


REPAINTING = [name for name, task in TASKS.items() if "image" not in task.flags]


@pytest.mark.parametrize("name", REPAINTING)
def test_any_model_repaints_the_hole_alone(models, sample, files, tmp_path, name):
    prompt = ["a red circle"] if "caption" in TASKS[name].fields else []
    flags = ["--image", files / "photo.png", "--mask", files / "hole.png", "--n", 1]
    sample(name, *prompt, *flags, "--out", tmp_path / "x")
    repainted = pixels(tmp_path / "x/000000.png")
    photo = pixels(files / "photo.png")
    hole = pixels(files / "hole.png") > 0
    assert (repainted[~hole] == photo[~hole]).all()
    assert (repainted[hole] != photo[hole]).any()


@pytest.mark.parametrize("task,flags,messages", [
    (
        "inpaint",
        ["--image", "{files}/wide.png", "--mask", "{files}/hole8.png"],
        [
            "mask: 8x8 is resized (nearest) to the image's 40x24",
            "image: 40x24 is scaled and cropped to 16x16",
        ],
    ),
    (
        "semantic",
        ["--map", "{files}/map.png", "--size", "32"],
        ["map: 16x16 is scaled and cropped to 32x32 (nearest)"],
    ),
    (
        "text",
        ["a red circle", "--init", "{files}/wide.png", "--strength", "1"],
        ["init: 40x24 is scaled and cropped to 16x16"],
    ),
])
def test_files_of_another_size_are_fitted_with_a_notice(sample, files, task, flags, messages):
    output = sample(task, *[flag.format(files=files) for flag in flags], "--n", 1)
    for message in messages:
        assert message in output


def test_a_small_image_is_cropped_to_what_the_model_can_sample(files):
    """Sides of 8 px in the sample are sides of 2 px in the small image."""
    given = {"image": Image.open(files / "odd.png")}
    task = TASKS["superres"]({})
    with pytest.warns(UserWarning, match="image: 7x9 is cropped to 6x8, multiples of 2"):
        conditions, size = task.read(given, (16, 16), 8)
    assert conditions[0]["small"].shape == (3, 8, 6)
    assert size == (32, 24)


def test_a_strip_goes_from_one_seeds_image_to_anothers(sample, tmp_path):
    prompt = "a red circle above a blue square"
    sample("text", prompt, "--to-seed", 1, "--n", 3, "--out", tmp_path / "strip")
    for i, seed in ((0, 0), (2, 1)):
        sample("text", prompt, "--seed", seed, "--n", 1, "--out", tmp_path / f"end{seed}")
        end = pixels(tmp_path / f"end{seed}/000000.png")
        assert abs(pixels(tmp_path / f"strip/{i:06d}.png") - end).max() <= 1


def test_a_strip_goes_from_one_prompt_to_another_with_one_noise(sample, tmp_path):
    """A huge scale shows the condition after two steps of training. No caption is written."""
    begin, other, end = "a red circle", "a green cross", "a blue square"
    scale = ["--scale", 1e6]
    sample("text", begin, other, "--to-prompt", end, *scale, "--n", 3, "--batch", 2,
           "--out", tmp_path / "strip")

    # Strip 0 has the noise of (seed, 0), and strip 1 that of (seed, 1).
    sample("text", begin, end, *scale, "--n", 1, "--out", tmp_path / "of_0")
    sample("text", end, other, *scale, "--n", 1, "--out", tmp_path / "of_1")
    sample("text", end, end, *scale, "--n", 1, "--out", tmp_path / "ends")
    strip = [pixels(tmp_path / f"strip/{i:06d}.png") for i in range(6)]
    same = {0: "of_0/000000", 2: "ends/000000", 3: "of_1/000001", 5: "ends/000001"}
    for i, alone in same.items():
        assert abs(strip[i] - pixels(tmp_path / f"{alone}.png")).max() <= 1
    assert (strip[0] != strip[1]).any()
    assert (strip[1] != strip[2]).any()
    assert not (tmp_path / "strip/metadata.jsonl").exists()
    settings = json.loads((tmp_path / "strip/settings.json").read_text())
    assert settings["to_prompt"] == "a blue square"


@pytest.mark.parametrize("task,flags", [
    ("text", ["a red circle"]),
    ("class", ["--label", "red circle"]),
])
def test_a_negative_prompt_changes_samples_and_is_among_the_settings(sample, tmp_path, task, flags):
    """After two steps of training, only a huge scale shows a condition."""
    found = {}
    for negative in ([], ["--negative", "red square"]):
        folder = tmp_path / f"x{len(negative)}"
        sample(task, *flags, *negative, "--scale", 1e6, "--n", 1, "--out", folder)
        settings = json.loads((folder / "settings.json").read_text())
        assert settings["negative"] == (negative[1] if negative else None)
        found[len(negative)] = pixels(folder / "000000.png")
    assert (found[0] != found[2]).any()


def test_pull_changes_samples_and_is_among_the_settings(sample, tmp_path):
    found = []
    for flags in ([], ["--pull"]):
        folder = tmp_path / f"x{len(flags)}"
        sample("inpaint", *flags, "--n", 1, "--out", folder)
        settings = json.loads((folder / "settings.json").read_text())
        assert settings["pull"] == bool(flags)
        found.append(pixels(folder / "000000.png"))
    assert (found[0] != found[1]).any()


def test_attention_and_trajectory_are_saved(sample, tmp_path):
    prompt = "a red circle above a blue square"
    files = ["--attention", tmp_path / "a.png", "--trajectory", tmp_path / "t.png"]
    sample("text", prompt, "--n", 2, *files, "--at", 1)
    assert Image.open(tmp_path / "a.png").size == (8 * 128, 2 * 144)    # an image and 7 words
    assert Image.open(tmp_path / "t.png").size == (104, 2 * 100 + 4)


@pytest.mark.parametrize("size,w,h", [("24", 24, 24), ("24x32", 32, 24)])
def test_images_may_be_larger_than_in_training(sample, tmp_path, size, w, h):
    sample("uncond", "--size", size, "--n", 1, "--out", tmp_path / "large")
    assert Image.open(tmp_path / "large/000000.png").size == (w, h)


# ---- bad input

BAD_INPUT = [
    # Conditions that the task does not take.
    ("text", ["--label", "3"], "--label: this model's task is text, which takes a prompt"),
    ("class", ["a", "--map", "{files}/map.png"], "--map: this model's task is class"),
    ("uncond", ["a red circle"], "--prompt: this model's task is uncond"),
    (
        "superres",
        ["--image", "{files}/small.png", "--mask", "{files}/hole.png"],
        "--mask: this model's task is superres, which takes --image",
    ),
    # Classes and boxes.
    ("class", ["--label", "red ant"], "'red ant' is no class of this model; classes are numbers"),
    ("class", ["--label", "29"], "0..28, or a name, like red circle"),
    ("layout", ["--boxes", "{files}/outside.json"], "must have 0 <= x0 < x1 <= 16"),
    ("layout", ["--boxes", "{files}/flat.json"], "must have 0 <= x0 < x1"),
    ("layout", ["--boxes", "{files}/ant.json"], "ant.json: 'red ant' is no class"),
    ("layout", ["--boxes", "{files}/dict.json"], "a box is [class, x0, y0, x1, y1]"),
    ("layout", ["--boxes", "{files}/map.png"], "map.png: cannot be read"),
    ("layout", ["--boxes", "{files}/gone.json"], "gone.json: cannot be read: No such file"),
    # Images, maps and masks.
    ("semantic", ["--map", "{files}/photo.png"], "photo.png: cannot be read: has 3 channels"),
    ("semantic", ["--map", "{files}/high.png"], "there are labels 0..255, but the model's are 0.."),
    ("superres", ["--image", "{files}/large.png"], "4,000,000 px at most"),
    ("superres", ["--image", "{files}/boxes.json"], "boxes.json: cannot be read"),
    ("text", ["a cat", "--init", "{files}/gone.png"], "gone.png: cannot be read: No such file"),
    ("inpaint", ["--image", "{files}/photo.png"], "--image and --mask belong together"),
    (
        "inpaint",
        ["--image", "{files}/photo.png", "--mask", "{files}/all.png"],
        "mask: it covers all",
    ),
    (
        "inpaint",
        ["--image", "{files}/photo.png", "--mask", "{files}/nothing.png"],
        "mask: it covers nothing",
    ),
    ("inpaint", ["--pull", "--sampler", "plms"], "sampler plms: it builds on its past steps"),
    ("uncond", ["--pull"], "--pull: a model of the task uncond does not see the mask"),
    ("text-inpaint", ["a red circle"], "give an image and a mask, too"),
    (
        "text-inpaint",
        ["--image", "{files}/photo.png", "--mask", "{files}/hole.png"],
        "no prompt: give one",
    ),
    # Negative prompts.
    ("layout", ["--negative", ""], "--negative: this model's task is layout, which takes --boxes"),
    ("class", ["--negative", "red ant"], "--negative: 'red ant' is no class of this model"),
    ("text", ["a cat", "--negative", "a", "--scale", "1"], "--negative: it has no effect without"),
    # Sizes.
    ("text", ["a cat", "--size", "16x18"], "--size 16x18: must be"),
    ("text", ["a cat", "--size", "0"], "--size 0: must be"),
    ("semantic", ["--size", "16x24"], "shapes: the images of the built-in world are square"),
    # Scores.
    ("text", ["a red circle", "--size", "16x24", "--score"], "--score: needs square images"),
    ("text", ["a cat", "--score"], "--score: prompt 'a cat' is no sentence"),
    ("superres", ["--image", "{files}/small.png", "--score"], "or superres with the true images"),
    # Numbers, and flags that need another one.
    ("text", ["a cat", "--strength", "0", "--init", "{files}/photo.png"], "--strength 0"),
    ("text", ["a cat", "--strength", "0.5"], "--strength: only with --init"),
    ("text", ["a cat", "--vocab", "{files}/photo.png"], "--vocab: only with a released model"),
    ("text", ["a cat", "--eta", "nan"], "--eta nan"),
    ("text", ["a cat", "--scale", "nan"], "--scale nan"),
    ("text", ["a cat", "--resume"], "--resume: for a folder"),
    ("text", ["a cat", "--at", "1"], "--at: for --attention, --trajectory"),
    ("text", ["a cat", "--at", "3", "--trajectory", "{files}/t.png"], "--at: steps must be 1..2"),
    ("uncond", ["--attention", "{files}/a.png"], "--attention: is about words"),
    ("layout", ["--to-seed", "1"], "--to-seed: needs one condition"),
    ("layout", ["--to-prompt", "a cat"], "--to-prompt: this model's task is layout, which takes"),
    ("text", ["a", "--to-prompt", "b", "--n", "1"], "--to-prompt: a strip has two images or more"),
    ("text", ["a", "--to-prompt", "b", "--score"], "--score: not with --to-prompt"),
]


@pytest.mark.parametrize("task,flags,message", BAD_INPUT, ids=[case[2] for case in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_code_2(sample, files, task, flags, message):
    output = sample(task, *[flag.format(files=files) for flag in flags], code=2)
    last_line = output.strip().splitlines()[-1]
    assert last_line.startswith("error: ")
    assert message in last_line
