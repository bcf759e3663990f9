"""Every task end to end: trains, resumes, samples, scores; and what sample.py does with files."""
import json

import numpy as np
import pytest
import torch
from conftest import TINY_AE, TINY_LDM
from PIL import Image

from tinyldm.data import Folder
from tinyldm.tasks import TASKS

FIGURES = {"uncond": "well_formed", "class": "classes_right", "text": "prompts_followed",
           "layout": "mean_iou", "semantic": "object_pixels_right", "superres": "bicubic_psnr",
           "inpaint": "holes_sensible"}


@pytest.fixture(scope="module")
def models(tmp_path_factory, cli):
    """models(task) -> folder of a model of a task, 2 steps old, trained at 16 px."""
    out = tmp_path_factory.mktemp("tasks")
    cli("train_ae.py", *TINY_AE, "--size", 16, "--steps", 1, "--out", out / "ae")

    def model(task):
        if not (out / task).exists():
            flags = [*TINY_LDM, "--ae", out / "ae/ckpt.pt", "--size", 16, "--task", task]
            said = cli("train_ldm.py", *flags, "--steps", 1, "--out", out / task)
            assert FIGURES[task] in said
            assert "1 of 2 steps are done" in cli("train_ldm.py", *flags, "--steps", 2,
                                                  "--out", out / task)
        return out / task
    return model


@pytest.fixture
def draw(models, tmp_path, cli):
    """draw(task, *flags, code=0) -> what sample.py says; it writes tmp_path/x.png."""
    def run(task, *flags, code=0):
        return cli("sample.py", "--ckpt", models(task) / "model.pt", "--steps", 2,
                   "--out", tmp_path / "x.png", *flags, code=code)
    return run


@pytest.fixture
def files(tmp_path):
    """Pictures, masks, maps and boxes of a user."""
    rng = np.random.default_rng(0)
    for name, w, h in (("photo", 16, 16), ("wide", 40, 24), ("small", 6, 8)):
        Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)).save(tmp_path / f"{name}.png")
    Image.new("L", (2001, 2001)).save(tmp_path / "large.png")
    hole = np.zeros((16, 16), np.uint8)
    hole[4:10, 6:12] = 255
    for name, v in (("hole", hole), ("all", hole * 0 + 255), ("nothing", hole * 0),
                    ("map", hole // 255 * 3), ("high", hole)):
        Image.fromarray(v).save(tmp_path / f"{name}.png")
    Image.fromarray(hole).resize((8, 8), 0).save(tmp_path / "hole8.png")
    for name, v in (("boxes", [["red circle", 1, 2, 9, 10], [3, 8, 8, 16, 16]]),
                    ("outside", [[1, 1, 2, 17, 10]]), ("flat", [[1, 9, 2, 9, 10]]),
                    ("ant", [["red ant", 1, 2, 9, 10]]), ("odd", {"a": 1})):
        (tmp_path / f"{name}.json").write_text(json.dumps(v))
    return tmp_path


@pytest.mark.parametrize("task", TASKS)
def test_a_task_trains_resumes_samples_and_scores(models, draw, task, tmp_path, cli):
    prompt = ["a red circle"] if task == "text" else []
    said = draw(task, *prompt, "--n", 3 if task != "class" else 1, "--score")
    assert FIGURES[task] in said and f"{24 if task == 'class' else 3} pictures" in said
    assert Image.open(tmp_path / "x.png").width > 90
    assert Image.open(models(task) / "samples_000002.png").width > 90
    flags = [*TINY_LDM, "--ae", models(task).parent / "ae/ckpt.pt", "--size", 16, "--task"]
    other = "class" if task == "uncond" else "uncond"
    said = cli("train_ldm.py", *flags, other, "--steps", 2, "--out", models(task), code=2)
    assert f"was made with task name = {task}, now it is {other}" in said


def test_conditions_from_files(draw, files, tmp_path):
    at = {p.name: p for p in files.iterdir()}
    assert "1 picture" in draw("layout", "--boxes", at["boxes.json"], "--n", 1)
    assert "1 picture" in draw("semantic", "--map", at["map.png"], "--n", 1)
    assert "1 picture" in draw("class", "--label", "red circle", "--n", 1)
    assert "2 picture" in draw("class", "--label", "red circle", "3", "--n", 1)
    said = draw("superres", "--image", at["small.png"], "--n", 1, "--out", tmp_path / "out")
    assert Image.open(tmp_path / "out/000000.png").size == (24, 32) and "cropped" not in said
    for task in ("inpaint", "uncond", "class", "layout", "text"):
        prompt = {"text": ["a red circle"], "class": ["--label", "3"]}.get(task, [])
        draw(task, *prompt, "--image", at["photo.png"], "--mask", at["hole.png"], "--n", 1,
             "--out", tmp_path / task)
        a, b = (np.asarray(Image.open(p)).astype(int) for p in (
            tmp_path / task / "000000.png", at["photo.png"]))
        hole = np.asarray(Image.open(at["hole.png"])) > 0
        assert (a[~hole] == b[~hole]).all() and (a[hole] != b[hole]).any(), task


def test_files_of_another_size_are_fitted_with_a_notice(draw, files, tmp_path):
    at = {p.name: p for p in files.iterdir()}
    said = draw("inpaint", "--image", at["wide.png"], "--mask", at["hole8.png"], "--n", 1)
    assert "--mask: 8x8 is resized (nearest) to --image's 40x24" in said
    assert "--image: 40x24 is scaled and cropped to 16x16" in said
    said = draw("semantic", "--map", at["map.png"], "--n", 1, "--size", 32)
    assert "--map: 16x16 is scaled and cropped to 32x32 (nearest)" in said
    said = draw("superres", "--image", at["wide.png"], "--n", 1)
    assert "cropped" not in said
    Image.open(at["small.png"]).resize((7, 9)).save(tmp_path / "odd.png")
    assert "--image: 7x9 is cropped to 7x9" not in draw("superres", "--image", tmp_path / "odd.png",
                                                        "--n", 1)


def test_init_seeds_attention_trajectory_and_larger_sizes(draw, files, tmp_path):
    photo, prompt = files / "wide.png", "a red circle above a blue square"
    assert "scaled" in draw("text", prompt, "--init", photo, "--strength", 1, "--n", 1)
    draw("text", prompt, "--to-seed", 1, "--n", 3, "--out", tmp_path / "strip")
    for j, seed in ((0, 0), (2, 1)):
        draw("text", prompt, "--seed", seed, "--n", 1, "--out", tmp_path / f"end{j}")
        ends = [np.asarray(Image.open(tmp_path / p)).astype(int)
                for p in (f"strip/00000{j}.png", f"end{j}/000000.png")]
        assert abs(ends[0] - ends[1]).max() <= 1
    draw("text", prompt, "--n", 2, "--attention", tmp_path / "a.png", "--at", 1,
         "--trajectory", tmp_path / "t.png")
    assert Image.open(tmp_path / "a.png").size == (8 * 128, 2 * 144)       # a picture and 7 words
    assert Image.open(tmp_path / "t.png").width < 210
    for size, shape in ((24, (24, 24)), ("24x32", (32, 24))):
        draw("uncond", "--size", size, "--n", 1, "--out", tmp_path / "big")
        assert Image.open(tmp_path / "big/000000.png").size == shape


def test_bad_input_is_one_line_and_exit_code_2(draw, files):
    def at(name):
        return files / name
    cases = [("text", ["--label", "3"], "--label: this model's task is text, which takes --prompt"),
             ("class", ["a", "--map", at("map.png")], "--map: this model's task is class"),
             ("uncond", ["a red circle"], "--prompt: this model's task is uncond"),
             ("class", ["--label", "red ant"], "'red ant' is no class of this model; they are"),
             ("class", ["--label", "29"], "0..28, or a name, like red circle"),
             ("layout", ["--boxes", at("outside.json")], "must have 0 <= x0 < x1 <= 16"),
             ("layout", ["--boxes", at("flat.json")], "must have 0 <= x0 < x1"),
             ("layout", ["--boxes", at("ant.json")], "'red ant' is no class"),
             ("layout", ["--boxes", at("odd.json")], "a box is [class, x0, y0, x1, y1]"),
             ("layout", ["--boxes", at("map.png")], "cannot be read"),
             ("layout", ["--boxes", at("gone.json")], "gone.json: cannot be read"),
             ("semantic", ["--map", at("photo.png")], "has 3 channels"),
             ("semantic", ["--map", at("high.png")], "there are labels 0..255, but"),
             ("inpaint", ["--image", at("photo.png")], "belong together"),
             ("inpaint", ["--image", at("photo.png"), "--mask", at("all.png")], "covers all"),
             ("inpaint", ["--image", at("photo.png"), "--mask", at("nothing.png")], "covers noth"),
             ("superres", ["--image", at("small.png"), "--mask", at("hole.png")], "--mask: this"),
             ("superres", ["--image", at("small.png"), "--score"], "the truth"),
             ("superres", ["--image", at("large.png")], "4,000,000 px at most"),
             ("superres", ["--image", at("boxes.json")], "boxes.json: cannot be read"),
             ("text", ["a cat", "--strength", 0, "--init", at("photo.png")], "--strength 0"),
             ("text", ["a cat", "--strength", 0.5], "--strength: only with --init"),
             ("text", ["a cat", "--vocab", at("photo.png")], "--vocab: only with --official"),
             ("text", ["a cat", "--at", 1], "--at: for --attention, --traj"),
             ("text", ["a cat", "--eta", "nan"], "--eta nan"),
             ("text", ["a cat", "--scale", "nan"], "--scale nan"),
             ("text", ["a cat", "--size", "16x18"], "--size 16x18: must be"),
             ("text", ["a cat", "--size", "16x16x16"], "--size 16x16x16: must be"),
             ("text", ["a cat", "--size", -16], "--size -16: must be"),
             ("semantic", ["--size", "16x24"], "--size 16x24: a set's pictures are square"),
             ("text", ["a red circle", "--size", "16x24", "--score"], "needs square"),
             ("text", ["a cat", "--resume"], "--resume: for a folder"),
             ("text", ["a cat", "--init", at("gone.png")], "--init"),
             ("text", ["a cat", "--at", 3, "--trajectory", at("t.png")], "--at: steps must be"),
             ("uncond", ["--attention", at("a.png")], "--attention: is of words")]
    for task, flags, say in cases:
        said = draw(task, *flags, code=2)
        assert say in said, said
        assert said.strip().splitlines()[-1].startswith("error: "), said


@pytest.mark.parametrize("task,field,cure", [
    ("class", "label", "sub-folder"), ("layout", "boxes", "metadata.jsonl"),
    ("semantic", "segmentation", "label map"), ("text", "caption", ".txt")])
def test_a_folder_that_lacks_the_field_is_named(models, tmp_path, folder, cli, task, field, cure):
    path = folder(30, text=None)
    said = cli("train_ldm.py", *TINY_LDM, "--ae", models("uncond").parent / "ae/ckpt.pt", "--size",
               16, "--task", task, "--data", path, "--out", tmp_path / "x", code=2)
    assert f".png has no {field}; " in said and cure in said


@pytest.mark.parametrize("task", ["class", "layout", "semantic", "superres", "inpaint"])
def test_tasks_on_a_folder_with_and_without_the_cache(models, tmp_path, folder, cli, task):
    path = folder(40, kind="cat", boxes=[["dog", 10, 14, 30, 24]], mask="map.png")
    Image.fromarray(np.full((48, 40), 2, np.uint8)).save(path / "map.png")
    flags = [*TINY_LDM, "--ae", models("uncond").parent / "ae/ckpt.pt", "--size", 16, "--task",
             task, "--data", path, "--label-column", "kind", "--degrade", "chain", "--flip",
             "--steps", 2]
    for more in (["--cache-latents"], ["--no-cache-latents"]):
        cli("train_ldm.py", *flags, *more, "--out", tmp_path / more[0])
    cli("sample.py", "--ckpt", tmp_path / "--cache-latents/model.pt", "--steps", 2, "--n", 2,
        "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").width > 90
    a, b = (torch.load(tmp_path / k / "ckpt.pt", weights_only=True)
            for k in ("--cache-latents", "--no-cache-latents"))
    assert a["config"] == b["config"]
    classes = {"class": ["cat"], "semantic": []}
    assert a["classes"] == classes.get(task, ["dog"])


def test_pixels_as_stage_one_and_a_diffusion_of_one_step(tmp_path, cli):
    """--ae none, and with it Table 5's regression: T = 1, so the net says the picture at once."""
    flags = [*TINY_LDM, "--ae", "none", "--size", 16, "--task", "superres", "--steps", 2]
    cli("train_ldm.py", *flags, "--out", tmp_path / "pixels")
    cli("train_ldm.py", *flags, "--T", 1, "--beta-range", 0.9999, 0.9999, "--out", tmp_path / "one")
    for name, steps in (("pixels", 50), ("one", 1)):
        said = cli("sample.py", "--ckpt", tmp_path / name / "model.pt", "--n", 2, "--score",
                   "--out", tmp_path / "x.png")
        assert f"{steps} DDIM steps: psnr" in said


@pytest.mark.parametrize("row,say", [
    ({"boxes": 7}, '"boxes" must be'), ({"boxes": ["a", 1, 2, 3, 4]}, '"boxes" must be'),
    ({"boxes": [["a", 1, 2, 3]]}, '"boxes" must be'), ({"mask": ["m.png"]}, "not in the folder"),
    ({"boxes": [["a", 1, 2, float("nan"), 4]]}, '"boxes" must be'),
    ({"mask": "0.png"}, "has 3 channels")])
def test_odd_metadata_is_one_line(models, tmp_path, folder, cli, row, say):
    said = cli("train_ldm.py", *TINY_LDM, "--ae", models("uncond").parent / "ae/ckpt.pt", "--size",
               16, "--data", folder(30, **row), "--out", tmp_path / "x", code=2)
    assert say in said and said.strip().splitlines()[-1].startswith("error: ")


def test_a_map_of_another_shape_than_its_picture_lies_on_the_whole_of_it(tmp_path):
    """A picture of 64 x 32, white on 3/8 of it from the left; its map of 32 x 32, 1 on as much."""

    image, labels = np.zeros((32, 64, 3), np.uint8), np.zeros((32, 32), np.uint8)
    image[:, :24], labels[:, :12] = 255, 1
    (tmp_path / "a").mkdir()
    Image.fromarray(image).save(tmp_path / "a/a.png")
    Image.fromarray(labels).save(tmp_path / "a/m.png")
    rows = [{"file_name": f"{name}.png", "mask": "m.png"} for name in "abc"]
    for name in "bc":
        Image.fromarray(image).save(tmp_path / f"a/{name}.png")
    (tmp_path / "a/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    item = Folder(str(tmp_path / "a"), 32)[0]
    assert torch.equal(item["segmentation"], (item["image"][0] > 0).long())
    Image.fromarray((np.arange(4) * 16000).astype(np.uint16).repeat(1024).reshape(64, 64)).save(
        tmp_path / "a/a.png")
    deep = Folder(str(tmp_path / "a"), 32)[0]["image"]
    assert deep.min() < -0.9 and 0.3 < deep.max() < 0.6         # 48,000 of 65,535


def test_labels_that_only_held_out_maps_have_count_too(models, tmp_path, folder, cli):
    """Else training would die at its first picture of a held-out map."""
    path = folder(40, mask="low.png")
    Image.fromarray(np.full((48, 40), 1, np.uint8)).save(path / "low.png")
    Image.fromarray(np.full((48, 40), 6, np.uint8)).save(path / "high.png")
    held = {r["file_name"] for r in Folder(str(path), 16, "held-out").rows}
    rows = [json.loads(x) for x in (path / "metadata.jsonl").read_text().splitlines()]
    assert held
    for r in rows:
        r["mask"] = "high.png" if r["file_name"] in held else "low.png"
    (path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cli("train_ldm.py", *TINY_LDM, "--ae", models("uncond").parent / "ae/ckpt.pt", "--size", 16,
        "--task", "semantic", "--data", path, "--steps", 1, "--out", tmp_path / "x")
    ckpt = torch.load(tmp_path / "x/ckpt.pt", weights_only=True)
    assert ckpt["config"]["tau"]["c_in"] == 7
