"""A run goes on only as the same run: what has changed is named, with both values."""
import json
import shutil

import pytest
import torch
from conftest import ONE_LEVEL, TINY_AE, TINY_LDM, write_images
from torch.testing import assert_close

from tinyldm.engine.checkpoint import differences, half, load_checkpoint, save_checkpoint

QUICK = ["--size", 16, "--eval-n", 0, "--no-cosine"]
LDM = ["train_ldm.py", *TINY_LDM, *ONE_LEVEL, *QUICK]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cli):
    """Eight captioned images, and one step of both stages: images/, ae/, ldm/. Only read it."""
    path = tmp_path_factory.mktemp("runs")
    data = ["--data", write_images(path / "images", 8), "--steps", 1]
    cli("train_ae.py", *TINY_AE, *QUICK, *data, "--out", path / "ae")
    cli(*LDM, *data, "--ae", path / "ae/ckpt.pt", "--out", path / "ldm")
    return path


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the runs that a test may go on with."""
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def add_images(folder, n, caption):
    """Copy an image n times, with a caption of its own."""
    with open(folder / "metadata.jsonl", "a") as file:
        for i in range(n):
            shutil.copy(folder / "0.png", folder / f"new{i}.png")
            row = {"file_name": f"new{i}.png", "text": caption}
            file.write(json.dumps(row) + "\n")


def change_weight(path, key):
    """Change a weight of stage one in its checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["nets"]["ae"][key] += 1
    save_checkpoint(checkpoint, path)


# ---- a data set of another size

@pytest.mark.parametrize("stage", ["ae", "ldm"])
def test_a_data_set_that_grew_is_said_to_have_grown_and_the_run_goes_on(run, cli, stage):
    command = ["train_ae.py", *TINY_AE, *QUICK]
    if stage == "ldm":
        command = [*LDM, "--ae", run / "ae/ckpt.pt"]
    n_before = load_checkpoint(run / stage / "ckpt.pt")["n_images"]
    add_images(run / "images", 40, "picture 1")
    output = cli(*command, "--data", run / "images", "--steps", 2, "--out", run / stage)

    checkpoint = load_checkpoint(run / stage / "ckpt.pt")
    n_after = checkpoint["n_images"]
    assert n_after > n_before + 30
    change = f"the data set had {n_before} images at step 1, and has {n_after} now"
    assert output.count(f"warning: {run / stage / 'ckpt.pt'}: {change}; the run goes on") == 1
    assert checkpoint["step"] == 2

    output = cli(*command, "--data", run / "images", "--steps", 3, "--out", run / stage)
    assert "the data set had" not in output


def test_new_words_are_refused_with_what_grew(run, cli):
    """Because the tokenizer is learned from the captions, a grown set may have another one."""
    add_images(run / "images", 40, "picture of a zebra")
    output = cli(*LDM, "--ae", run / "ae/ckpt.pt", "--data", run / "images", "--steps", 2,
                 "--out", run / "ldm", code=2)
    message = output.splitlines()[-1]
    assert message.startswith(f"error: --out: {run / 'ldm/ckpt.pt'} was made with ")
    assert "tokenizer words = " in message
    assert "zebra" in message
    assert "the data set had " in message
    assert len(message) < 1000


# ---- stage one

def test_a_stage_one_that_was_moved_is_the_same(run, cli):
    """Also one that trained no further, and was saved again."""
    checkpoint = torch.load(run / "ae/ckpt.pt", weights_only=True)
    save_checkpoint(checkpoint | {"step": 9}, run / "moved.pt")
    shutil.rmtree(run / "ae")
    cli(*LDM, "--data", run / "images", "--ae", run / "moved.pt", "--steps", 2,
        "--out", run / "ldm")
    assert load_checkpoint(run / "ldm/ckpt.pt")["step"] == 2


def test_another_stage_one_is_refused(run, cli):
    """Both files are named, and the first tensor that differs."""
    other = shutil.copy(run / "ae/ckpt.pt", run / "other.pt")
    change_weight(other, "decoder.layers.0.weight")
    before = (run / "ldm/ckpt.pt").read_bytes()
    output = cli(*LDM, "--data", run / "images", "--ae", other, "--steps", 2,
                 "--out", run / "ldm", code=2)
    assert "ae/ckpt.pt, now it is " in output
    assert "other.pt, whose decoder.layers.0.weight has other values" in output
    assert (run / "ldm/ckpt.pt").read_bytes() == before


def test_stage_one_is_kept_once_beside_the_checkpoints(run, cli):
    """ckpt.pt names its file, an ordinary checkpoint of stage one; model.pt has its weights."""
    folder = run / "ldm"
    [stage_one] = folder.glob("stage_one_*.pt")
    trained = load_checkpoint(run / "ae/ckpt.pt")["nets"]["ae"]
    kept = load_checkpoint(stage_one, "autoencoder")["nets"]["ae"]
    assert_close(kept, trained, rtol=0, atol=0)
    assert "ae" not in torch.load(folder / "ckpt.pt", weights_only=True)

    # From it the run goes on, also with the weights of stage one at another place.
    shutil.rmtree(run / "ae")
    written = stage_one.stat().st_mtime_ns
    cli(*LDM, "--data", run / "images", "--ae", stage_one, "--steps", 2, "--out", folder)
    assert list(folder.glob("stage_one_*.pt")) == [stage_one]
    assert stage_one.stat().st_mtime_ns == written
    whole = load_checkpoint(folder / "ckpt.pt")["ae"]
    for_sampling = load_checkpoint(folder / "model.pt")["ae"]
    assert_close(half(whole), for_sampling, rtol=0, atol=0)

    # Without it, the line says what is missing, and what to do.
    stage_one.unlink()
    output = cli("sample.py", "--ckpt", folder / "ckpt.pt", "a", code=2)
    assert f"{stage_one.name}, its stage one, is not beside it; copy it too, or take" in output


def test_the_stage_one_of_another_model_is_taken_with_its_z_std(run, cli):
    """--ae takes a checkpoint of stage two, too; z_std is then known, and not measured."""
    model = run / "ldm/model.pt"
    z_std = load_checkpoint(model)["ae"]["z_std"].float()
    output = cli(*LDM, "--data", run / "images", "--ae", model, "--steps", 1,
                 "--out", run / "second", "--z-std", 7)
    assert load_checkpoint(run / "second/ckpt.pt")["ae"]["z_std"] == 7

    cli(*LDM, "--task", "uncond", "--data", run / "images", "--ae", model, "--steps", 1,
        "--out", run / "third")
    assert "error" not in output
    assert load_checkpoint(run / "third/ckpt.pt")["ae"]["z_std"] == z_std


def test_another_z_std_is_refused(run, cli):
    output = cli(*LDM, "--data", run / "images", "--ae", run / "ae/ckpt.pt", "--steps", 2,
                 "--z-std", 7, "--out", run / "ldm", code=2)
    assert "--z-std 7.0: the run in " in output


# ---- everything else that makes the model

@pytest.mark.parametrize("flags, message", [
    (["--task", "uncond"], "task name = text, now it is uncond"),
    (["--ch", 32], "unet ch = 16, now it is 32"),
    (["--predict", "eps"], "schedule predict = v, now it is eps"),
    (["--schedule", "cosine"], "schedule name = sqrt-linear, now it is cosine"),
    (["--T", 500], "schedule T = 1000, now it is 500"),
    (["--n-token", 9], "tau n_token = 12, now it is 9"),
    (["--size", "16x32"], "size = 16, now it is (16, 32)"),
])
def test_each_part_of_the_model_is_compared(run, cli, flags, message):
    output = cli(*LDM, "--data", run / "images", "--ae", run / "ae/ckpt.pt", "--steps", 2,
                 *flags, "--out", run / "ldm", code=2)
    assert message in output.splitlines()[-1]


@pytest.mark.parametrize("flags, message", [
    (["--reg", "vq"], "autoencoder n_codes = None, now it is 256"),
    (["--c-z", 3], "autoencoder c_z = 4, now it is 3"),
    (["--disc-ch", 8], "discriminator ch = 4, now it is 8"),
    (["--channels", 1], "autoencoder c_x = 3, now it is 1"),
])
def test_each_part_of_stage_one_is_compared(run, cli, flags, message):
    output = cli("train_ae.py", *TINY_AE, *QUICK, "--data", run / "images", "--steps", 2,
                 *flags, "--out", run / "ae", code=2)
    assert message in output.splitlines()[-1]


def test_long_lists_are_shown_from_where_they_differ():
    """A thousand class names are no message."""
    old = [f"class {i}" for i in range(1000)]
    new = old[:500] + ["zebra"] + old[500:]
    phrase, = differences({"classes": old}, {"classes": new})
    assert phrase.startswith("classes = [..., class 500, class 501, ")
    assert "], now it is" not in phrase.split("(1,000 in all)")[0]
    assert ", ...] (1,000 in all), now it is [..., zebra, class 500, " in phrase
    assert phrase.endswith("...] (1,001 in all)")
    assert len(phrase) < 400

    phrase, = differences({"classes": ["cat", "dog"]}, {"classes": ["dog", "owl", "ox"]})
    assert phrase == "classes = [cat, dog], now it is [dog, owl, ox]"
