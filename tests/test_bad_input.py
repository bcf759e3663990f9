"""Bad input of the three scripts: one line that says what is wrong, and exit code 2."""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_AE, TINY_LDM, TINY_VQ

from tinyldm.engine.open import BUNDLED

SIZE = ["--size", 16]

AE = ["train_ae.py", *TINY_AE, *SIZE]
VQ = ["train_ae.py", *TINY_VQ, *SIZE]
LDM = ["train_ldm.py", *TINY_LDM, *SIZE]
SAMPLE = ["sample.py", "--ckpt", "{ldm}/model.pt"]

# {ae} and {ldm} are folders of trained models, {empty} is one without images, {images} has
# images of its own, {file} is a file, {blank} a file of empty lines, {new} does not exist.
BAD_INPUT = [
    # Flags of stage one.
    (["train_ae.py", "--no-such-flag"], "--no-such-flag"),
    (["train_ae.py", "--preset", "kl-f8", "--out", "{new}"], "--data: preset kl-f8"),
    ([*AE, "--size", 17, "--out", "{new}"], "--size 17 is not divisible by f = 2"),
    ([*AE, "--data", "{empty}", "--out", "{new}"], "--data: {empty}: no images"),
    ([*AE, "--out", "{file}/x"], "file/x"),
    ([*AE, "--out", "{new}", "--device", "cuda"], "--device: cuda: there is no CUDA"),
    ([*AE, "--out", "{new}", "--lr", "1e30", "--steps", 30], "training stops"),
    ([*VQ, "--out", "{new}", "--n-codes", 0], "--n-codes 0"),
    # Another model than the one in --out.
    ([*AE, "--out", "{ae}", "--c-z", 5], "autoencoder c_z = 4, now it is 5"),
    ([*AE, "--out", "{ae}", "--reg", "vq"], "autoencoder n_codes = None, now it is 256"),
    ([*AE, "--out", "{ae}", "--attn-res", 8], "autoencoder attn_res = (), now it is (8,)"),
    ([*AE, "--out", "{ae}", "--size", 32], "autoencoder side = 16, now it is 32"),
    ([*LDM, "--out", "{ldm}", "--ae", "{ae}/ckpt.pt", "--ch", 32], "unet ch = 16, now it is 32"),
    ([*LDM, "--out", "{ldm}", "--ae", "{ae}/ckpt.pt", "--size", 32], "size = 16, now it is 32"),
    ([*LDM, "--out", "{ldm}", "--ae", "{ae}/ckpt.pt", "--data", "{images}"], "classes = ["),
    ([*LDM, "--out", "{ldm}", "--ae", "{ae}/ckpt.pt", "--data", "{images}"], "tokenizer words = ["),
    # Flags of stage two.
    ([*LDM, "--out", "{new}", "--ae", "{new}.pt"], "--ae: {new}.pt: no such file"),
    ([*LDM, "--out", "{new}", "--ae", "{ae}/ckpt.pt", "--size", 18], "not a multiple of 4"),
    ([*LDM, "--out", "{new}", "--ae", "{ae}/ckpt.pt", "--fsdp"], "--fsdp: "),
    ([*LDM, "--out", "{new}", "--loss-of", "output"], "--loss-of output: --snr-clamp 0.1 1"),
    ([*LDM, "--out", "{new}", "--blocks", 3], "--blocks: --backbone unet has no such part"),
    ([*LDM, "--out", "{new}", "--backbone", "dit"], "--groups: --backbone dit has no such part"),
    ([*LDM, "--out", "{new}", "--beta-range", 0.1], "beta_range has 1 numbers"),
    (
        ["train_ldm.py", "--init", "{ldm}/model.pt", "--distill", 4, "--snr-clamp", 0, 1],
        "--distill: Eq. (2) weighs the first step",
    ),
    # Flags of sampling.
    (SAMPLE, "no prompt"),
    ([*SAMPLE, "--prompts", "{blank}"], "no prompt"),
    ([*SAMPLE, "--steps", 1001, "a cross"], "steps 1001: must be 1..1000"),
    (
        [*SAMPLE, "--steps", 27, "--timesteps", "official", "a cross"],
        "the official rule would visit timestep 1000 of 0..999",
    ),
    ([*SAMPLE, "--eta", 1, "--sampler", "plms", "a cross"], "--eta 1"),
    ([*SAMPLE, "--sampler", "euler", "a cross"], "--sampler"),
    ([*SAMPLE, "--timesteps", "odd", "a cross"], "--timesteps"),
    ([*SAMPLE, "--size", 17, "a cross"], "--size 17"),
    ([*SAMPLE, "--out", "{file}/x.png", "a red circle"], "cannot be written"),
    ([*SAMPLE, "--score", "a dog"], "built-in world"),
    ([*SAMPLE, "--guide-scale", 3, "a cross"], "--guide-scale: only with --guide"),
    ([*SAMPLE, "--guide-mask", "{file}", "a cross"], "--guide-mask: only with --guide"),
    ([*SAMPLE, "--guide", "{new}", "a cross"], "/new: cannot be read"),
    ([*SAMPLE, "--scale", 1, "--rescale", 0.5, "a cross"], "--rescale: it has no effect"),
    ([*SAMPLE, "--scale", 1, "--interval", 0, 1, "a cross"], "--interval: it has no effect"),
    ([*SAMPLE, "--interval", 2, 1, "a cross"], "--interval 2 1: the first is the lower one"),
    (["sample.py", "--ckpt", "{ae}/ckpt.pt", "a cross"], "/ckpt.pt: a checkpoint of stage one"),
    (["sample.py", "--ckpt", "{ldm}/model.pt", "--no-ema", "a cross"], "averaged weights only"),
]


@pytest.mark.parametrize("command, message", BAD_INPUT, ids=[message for _, message in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_code_2(trained, tmp_path, folder, cli, command, message):
    """The last line says which flag or file is wrong, and no traceback comes before it."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "blank").write_text("\n")
    (tmp_path / "empty").mkdir()
    places = {"ae": trained / "ae", "ldm": trained / "ldm"}
    for name in ("file", "blank", "empty", "new", "images"):
        places[name] = tmp_path / name
    folder(8)

    output = cli(*(str(part).format(**places) for part in command), code=2)
    last = output.strip().splitlines()[-1]
    assert "error: " in last
    assert message.format(**places) in last
    assert "Traceback" not in output


def test_bad_input_leaves_no_traceback(tmp_path):
    """In a real process: one line on stderr, nothing on stdout."""
    command = [sys.executable, ROOT / "sample.py", "--ckpt", tmp_path / "gone.pt", "x"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stdout == ""
    assert len(process.stderr.splitlines()) == 1
    assert process.stderr.startswith("error: --ckpt: ")
    assert "gone.pt: No such file" in process.stderr


@pytest.mark.parametrize("name, broken", [
    ("config", {}), ("tokenizer", "{"), ("ema", {"unet": {}, "tau": {}}),
])
def test_a_checkpoint_whose_parts_do_not_fit_is_bad_input(trained, tmp_path, cli, name, broken):
    """Whichever part of a model's file is damaged."""
    checkpoint = torch.load(trained / "ldm/model.pt", weights_only=True)
    torch.save(checkpoint | {name: broken}, tmp_path / "x.pt")
    output = cli("sample.py", "--ckpt", tmp_path / "x.pt", "a cross", code=2)
    assert "do not fit together" in output


@pytest.mark.parametrize("network, name, value, message", [
    ("unet", "n_res", 10 ** 6, "absurd"),
    ("tau", "depth", 100, "absurd"),
    ("unet", "ch_mult", [1] * 1000, "absurd"),
    ("schedule", "T", 10 ** 9, "absurd"),
    ("unet", "ch", 48 * 10 ** 4, "do not fit together"),
    ("autoencoder", "ch", 32 * 10 ** 4, "do not fit together"),
])
def test_a_checkpoint_of_absurd_sizes_is_not_built(tmp_path, cli, network, name, value, message):
    """Neither with more layers than time allows, nor with wider ones than memory does."""
    checkpoint = torch.load(BUNDLED["toy"], weights_only=True)
    checkpoint["config"][network][name] = value
    torch.save(checkpoint, tmp_path / "x.pt")
    assert message in cli("sample.py", "--ckpt", tmp_path / "x.pt", "a cross", code=2)


def test_a_model_without_null_condition_is_not_guided(trained, tmp_path, cli):
    """It has learned no condition that says nothing, as p_drop was 0."""
    checkpoint = torch.load(trained / "ldm/model.pt", weights_only=True)
    torch.save(checkpoint | {"p_drop": 0.0}, tmp_path / "x.pt")
    command = ["sample.py", "--ckpt", tmp_path / "x.pt", "--steps", 1, "--n", 1,
               "--out", tmp_path / "x", "a cross"]
    assert "no null condition" in cli(*command, "--scale", 2, code=2)
    cli(*command)
