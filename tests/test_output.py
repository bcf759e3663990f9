"""What sample.py writes: files by their suffix, and folders that hold images of one setting."""
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tinyldm.data.open import open_dataset
from tinyldm.engine.open import open_model
from tinyldm.engine.output import (
    NOT_WRITTEN,
    WRITTEN,
    digest_of_model,
    is_image_file,
    metadata_of,
    prepare_folder,
)
from tinyldm.engine.request import Request
from tinyldm.errors import BadInput
from tinyldm.tasks import TASKS

PROMPT = "a red circle"


@pytest.fixture
def sampled(trained, tmp_path, cli):
    """sampled(*flags, code=0) -> what sample.py says, sampling two tiny images to a folder."""
    def run(*flags, code=0):
        command = ["sample.py", "--ckpt", trained / "ldm/model.pt", "--n", 2, "--steps", 2]
        return cli(*command, "--out", tmp_path / "images", *flags, code=code)

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- names

@pytest.mark.parametrize("suffix", WRITTEN)
def test_a_suffix_in_any_case_says_the_format_of_the_grid(trained, tmp_path, cli, suffix):
    """Of what --attention and --trajectory save, too."""
    paths = [tmp_path / f"{name}{suffix.upper()}" for name in ("grid", "words", "way")]
    cli("sample.py", "--ckpt", trained / "ldm/model.pt", "--n", 1, "--steps", 2, PROMPT,
        "--out", paths[0], "--attention", paths[1], "--trajectory", paths[2])
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    for path in paths:
        with Image.open(path) as image:
            assert image.format == formats[suffix]


@pytest.mark.parametrize("suffix", NOT_WRITTEN)
def test_a_format_that_is_not_written_is_no_folder_name(tmp_path, suffix):
    for name in (f"x{suffix}", f"x{suffix.upper()}"):
        with pytest.raises(BadInput, match="images are written as .png, .jpg"):
            is_image_file(tmp_path / name)


def test_any_other_name_is_a_folder(tmp_path):
    assert not is_image_file(tmp_path / "samples")
    assert not is_image_file(tmp_path / "s1.5")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(BadInput, match="is a folder"):
        is_image_file(tmp_path / "x.png")


@pytest.mark.parametrize("flags, message", [
    (["--out", "x.gif"], "error: --out: x.gif: images are written as"),
    (["--attention", "words"], "error: --attention: words: must end in .png"),
    (["--trajectory", "x.bmp"], "error: --trajectory: x.bmp: images are written as"),
    (["--replace"], "error: --replace: for a folder"),
    (["--replace", "--resume", "--out", "x"], "error: --replace, --resume: only one"),
])
def test_odd_names_are_one_line_before_the_model_is_opened(cli, flags, message):
    assert cli("sample.py", "--ckpt", "gone.pt", *flags, PROMPT, code=2).startswith(message)


# ---- settings

def test_the_same_settings_write_the_same_folder_again(sampled, tmp_path):
    """settings.json says in plain words how the images were made."""
    sampled(PROMPT)
    first = contents(tmp_path / "images")
    assert first.keys() == {"000000.png", "000001.png", "metadata.jsonl", "settings.json"}
    settings = json.loads(first["settings.json"])
    assert settings["conditions"] == {"caption": [PROMPT]}
    assert (settings["n"], settings["steps"], settings["sampler"]) == (2, 2, "ddim")

    sampled(PROMPT)
    assert contents(tmp_path / "images") == first
    (tmp_path / "images/000001.png").unlink()
    sampled(PROMPT, "--resume")
    assert contents(tmp_path / "images") == first


# Flags that change the images, and what the message says of them.
OTHER_SETTINGS = [
    (["a cross"], "conditions = {'caption': ['a red circle']}, now it is {'caption': ['a cross']}"),
    ([PROMPT, "--n", 3], "n = 2, now it is 3; n_each = 2, now it is 3"),
    ([PROMPT, "--steps", 3], "steps = 2, now it is 3"),
    ([PROMPT, "--sampler", "ddpm"], "sampler = ddim, now it is ddpm"),
    ([PROMPT, "--timesteps", "official"], "timesteps = even, now it is official"),
    ([PROMPT, "--eta", 0.5], "eta = 0.0, now it is 0.5"),
    ([PROMPT, "--scale", 3], "scale = 2.0, now it is 3.0"),
    ([PROMPT, "--seed", 1], "seed = 0, now it is 1"),
    ([PROMPT, "--to-seed", 1], "to_seed = None, now it is 1"),
    ([PROMPT, "--size", 32], "size = [16, 16], now it is [32, 32]"),
    ([PROMPT, "--dtype", "bf16"], "dtype = fp32, now it is bf16"),
    ([PROMPT, "--init", "{init}"], "strength = None, now it is 0.5"),
    ([PROMPT, "--init", "{init}"], "shared = {}, now it is {'init': '"),
    ([PROMPT, "--ckpt", "{ldm}/ckpt.pt", "--no-ema"], "model = "),
]


def test_a_folder_of_other_settings_is_refused_and_stays_as_it_is(sampled, trained, tmp_path):
    """With --resume, too. The line names what differs."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "init.png")
    sampled(PROMPT)
    first = contents(tmp_path / "images")
    for i, (flags, message) in enumerate(OTHER_SETTINGS):
        files = {"init": tmp_path / "init.png", "ldm": trained / "ldm"}
        flags = [str(flag).format(**files) for flag in flags]
        resume = ["--resume"] if i % 2 else []
        last = sampled(*flags, *resume, code=2).strip().splitlines()[-1]
        assert last.startswith(f"error: --out: {tmp_path / 'images'}: its images have ")
        assert message in last
        assert contents(tmp_path / "images") == first


def test_replace_removes_the_numbered_images_and_nothing_else(sampled, tmp_path):
    folder = tmp_path / "images"
    sampled(PROMPT)
    first = contents(folder)
    for name in ("000007.png", "photo.png", "12.png"):
        (folder / name).write_bytes(b"there")
    sampled(PROMPT, "--seed", 1, "--replace")
    files = contents(folder)
    assert files.keys() == first.keys() | {"photo.png", "12.png"}
    assert json.loads(files["settings.json"])["seed"] == 1


def test_numbered_images_of_unknown_origin_are_refused(sampled, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "000001.png").write_bytes(b"there")
    assert "has numbered images, but no settings.json" in sampled(PROMPT, code=2)
    assert "has numbered images, but no settings.json" in sampled(PROMPT, "--resume", code=2)
    assert contents(folder) == {"000001.png": b"there"}
    sampled(PROMPT, "--replace")


@pytest.mark.parametrize("text, message", [
    ("{", "settings.json: cannot be read"),
    ('{"editor": 1}', "settings.json: holds no settings of samples"),
    ("[1]", "settings.json: holds no settings of samples"),
])
def test_a_settings_file_of_something_else_is_not_overwritten(sampled, tmp_path, text, message):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "settings.json").write_text(text)
    for flags in ([], ["--replace"]):
        assert message in sampled(PROMPT, *flags, code=2)
    assert contents(folder) == {"settings.json": text.encode()}


# ---- metadata

def test_a_folder_of_samples_is_a_data_set_with_their_captions(sampled, tmp_path):
    """And nothing in it is reported as left out."""
    sampled(PROMPT, 'a "blue\u2028" square')
    data = open_dataset(str(tmp_path / "images"), "train", size=16, fields=["caption"])
    captions = [PROMPT, PROMPT, 'a "blue\u2028" square', 'a "blue\u2028" square']
    assert data.captions() == captions
    assert [data[k]["caption"] for k in range(4)] == captions
    [line] = data.summary()
    assert "4 images" in line and "4 captions" in line


def test_metadata_has_the_class_of_each_image_by_name():
    """Or by number, for a class without a name, such as the null condition."""
    model = SimpleNamespace(task=TASKS["class"]({}, class_names=["cat", "dog"]))
    conditions = [{"label": 1}, {"label": 2}]
    request = Request(conditions, {}, (16, 16), n_each=2, is_held_out=False)
    assert metadata_of(model, request) == [
        {"file_name": "000000.png", "label": "dog"},
        {"file_name": "000001.png", "label": "dog"},
        {"file_name": "000002.png", "label": 2},
        {"file_name": "000003.png", "label": 2},
    ]


def test_tasks_without_captions_or_classes_have_no_metadata(tmp_path):
    model = SimpleNamespace(task=TASKS["uncond"]({}))
    metadata = metadata_of(model, Request([{}], {}, (16, 16), n_each=4, is_held_out=False))
    assert metadata == []
    prepare_folder(tmp_path, {"seed": 0}, metadata, replace=False, main=True)
    assert contents(tmp_path).keys() == {"settings.json"}


def test_metadata_are_complete_before_sampling_and_new_with_new_images(sampled, tmp_path):
    """Corrected captions stay with their images, also where more of them are sampled."""
    metadata = tmp_path / "images/metadata.jsonl"
    sampled(PROMPT)
    written = metadata.read_text()
    corrected = written.replace("red", "dark red")
    metadata.write_text(corrected)
    (tmp_path / "images/000001.png").unlink()
    sampled(PROMPT, "--resume")
    assert metadata.read_text() == corrected

    sampled("a cross", "--replace")
    assert metadata.read_text() == written.replace(PROMPT, "a cross")
    metadata.unlink()
    sampled("a cross", "--resume")
    assert metadata.read_text() == written.replace(PROMPT, "a cross")


def test_metadata_of_something_else_are_not_overwritten(sampled, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text("{}")
    for flags in ([], ["--replace"]):
        message = sampled(PROMPT, *flags, code=2)
        assert f"{folder}: has a metadata.jsonl that is not of samples" in message
    assert contents(folder) == {"metadata.jsonl": b"{}"}


def test_any_weight_changes_the_hash_of_a_model(trained):
    """A file that is opened twice has the same hash."""
    model = open_model(trained / "ldm/model.pt")
    digests = {digest_of_model(model)}
    assert digest_of_model(open_model(trained / "ldm/model.pt")) in digests
    for net in (model.ae, model.unet, model.tau):
        for weight in list(net.state_dict().values())[::7]:
            with torch.no_grad():
                weight.flatten()[-1:].add_(1)
            digests.add(digest_of_model(model))
    assert len(digests) > 20


# ---- prompts

@pytest.mark.parametrize("data", [
    "a red circle\r\na\u2028blue\x0bsquare\x85\n\n".encode(),
    b"\xef\xbb\xbfa red circle\na\xe2\x80\xa8blue\x0bsquare\xc2\x85\n",
])
def test_prompts_end_at_line_feeds_only(sampled, tmp_path, data):
    (tmp_path / "p.txt").write_bytes(data)
    sampled("--prompts", tmp_path / "p.txt", "--n", 1)
    settings = json.loads((tmp_path / "images/settings.json").read_text())
    first, second = settings["conditions"]["caption"]
    assert first == PROMPT
    assert second == "a\u2028blue\x0bsquare"


@pytest.mark.parametrize("data", [
    "a red circle".encode("utf-16"),
    "a red circle".encode("utf-16-le"),
    "красный круг".encode("cp1251"),
    "un été".encode("latin-1"),
])
def test_prompts_in_another_encoding_are_refused_by_name(sampled, tmp_path, data):
    (tmp_path / "p.txt").write_bytes(data)
    message = f"error: --prompts {tmp_path / 'p.txt'}: cannot be read: is not UTF-8 text"
    assert message in sampled("--prompts", tmp_path / "p.txt", code=2)
