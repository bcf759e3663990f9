"""The three scripts end to end: both stages train, resume, sample."""
import functools
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_AE, TINY_LDM, TINY_VQ
from PIL import Image
from runs import assert_same_state, figures, log_rows, steps_of

from tinyldm.data.shapes import prompts
from tinyldm.engine.checkpoint import load_checkpoint
from tinyldm.engine.open import BUNDLED, open_model

SIZE = ["--size", 16]
CAPTION = "a red circle above a blue square"

# With them an evaluation takes 4 steps, not 25.
FEW_TIMESTEPS = ["--T", 4]


def pixels(path):
    """The pixels of an image file, which may be subtracted."""
    return np.array(Image.open(path).convert("RGB")).astype(int)


# ---- training

def test_stage_one_writes_what_it_promises(trained):
    """A checkpoint, images above their reconstructions, and a log with every figure."""
    rows = log_rows(trained / "ae")
    assert steps_of(rows)[:2] == [1, 2]
    assert {"rec", "perceptual", "kl", "z_std", "lam", "disc", "d_real", "d_fake", "gnorm"} <= set(
        rows[1]
    )
    assert {"held_out_psnr", "captions_still_true"} <= set(rows[-1])
    assert Image.open(trained / "ae/recon_000002.png").width > 100
    assert not list((trained / "ae").glob("*.part"))


def test_stage_two_writes_what_it_promises(trained):
    """A checkpoint with all that sampling needs, samples, and latents whose std is near 1."""
    rows = log_rows(trained / "ldm")
    assert steps_of(rows)[:2] == [1, 2]
    assert abs(rows[0]["z_std"] - 1) < 0.3
    assert {"prompts_followed", "held_out_loss_at_0", "fd_shapes"} <= set(rows[-1])
    assert Image.open(trained / "ldm/samples_000002.png").width > 100
    assert not list((trained / "ldm").glob("*.part"))

    checkpoint = load_checkpoint(trained / "ldm/ckpt.pt", "ldm")
    assert {"ae", "nets", "ema", "tokenizer", "config", "opt"} <= set(checkpoint)

    # The last layer begins with zeros, so it tells whether the average moves.
    assert checkpoint["ema"]["unet"]["conv_out.weight"].any()
    assert checkpoint["ema_n"] == 2


def test_a_vq_model_goes_the_whole_road(tmp_path, cli):
    """Stage two and sampling need no flag for it; codes are counted, restarted and written."""
    short = [*SIZE, "--steps", 2]
    output = cli("train_ae.py", *TINY_VQ, *short, "--out", tmp_path / "ae")
    assert "codebook 128)" in output
    assert "codes_used" in output

    row = log_rows(tmp_path / "ae")[1]
    assert {"rec", "codebook", "z_std", "codes_used", "perplexity", "lam"} <= set(row)
    assert "kl" not in row
    assert 1 <= row["perplexity"] <= row["codes_used"] <= 32

    checkpoint = load_checkpoint(tmp_path / "ae/ckpt.pt", "autoencoder")
    assert checkpoint["nets"]["ae"]["codebook.codes"].shape == (32, 4)
    assert checkpoint["config"]["autoencoder"]["n_codes"] == 32
    assert (checkpoint["idle"] == 0).all()

    cli("train_ldm.py", *TINY_LDM, *short, "--eval-n", 0, "--ae", tmp_path / "ae/ckpt.pt",
        "--out", tmp_path / "ldm")
    assert abs(log_rows(tmp_path / "ldm")[0]["z_std"] - 1) < 0.3
    cli("sample.py", "--ckpt", tmp_path / "ldm/model.pt", "--n", 1, "--steps", 3,
        "--out", tmp_path / "x.png", "a red circle")
    assert Image.open(tmp_path / "x.png").width > 90


def test_unused_codes_are_restarted_on_request_only(tmp_path, cli):
    """With --restart-codes, more codes are in use after a few steps."""
    n_used = {}
    for n in (0, 1):
        cli("train_ae.py", *TINY_VQ, *SIZE, "--steps", 6, "--disc-weight", 0, "--eval-n", 0,
            "--restart-codes", n, "--out", tmp_path / str(n))
        n_used[n] = log_rows(tmp_path / str(n))[-1]["codes_used"]
    assert n_used[1] > n_used[0] + 5


def test_a_folder_of_images_goes_the_whole_road(tmp_path, folder, cli):
    """Its captions become the model's words; a word that none has is named in a warning."""
    short = ["--data", folder(40), *SIZE, "--steps", 2, "--flip"]
    cli("train_ae.py", *TINY_AE, *short, "--out", tmp_path / "ae", "--workers", 1)
    cli("train_ldm.py", *TINY_LDM, *short, *FEW_TIMESTEPS, "--ae", tmp_path / "ae/ckpt.pt",
        "--out", tmp_path / "ldm")
    output = cli("sample.py", "--ckpt", tmp_path / "ldm/model.pt", "--n", 2, "--steps", 3,
                 "--out", tmp_path / "x.png", "picture 2 dog")
    assert "'dog'" in output
    assert Image.open(tmp_path / "x.png").width > 100


def test_dry_run_prints_sizes_and_trains_nothing(tmp_path, trained, cli):
    """The numbers are those of the released kl-f8 and vq-f4."""
    output = cli("train_ae.py", "--dry-run", "--out", tmp_path / "ae", "--ch", 128,
                 "--ch-mult", 1, 2, 4, 4, "--n-res", 2, "--groups", 32, "--c-z", 4, "--size", 256)
    assert "83,653,863" in output
    assert "z (4, 32, 32)" in output

    output = cli("train_ae.py", "--dry-run", "--out", tmp_path / "ae", "--preset", "vq-f4")
    for part in ("55,322,782", "encoder 22,337,411", "decoder 32,960,771", "codebook 24,576",
                 "D_psi 2,765,633", "z (3, 64, 64)"):
        assert part in output

    output = cli("train_ldm.py", "--dry-run", "--ae", trained / "ae/ckpt.pt", *SIZE,
                 "--out", tmp_path / "ldm")
    assert "parameters" in output
    assert not list(tmp_path.iterdir())


# ---- resuming

def stage_command(stage, trained, data):
    """The script and the flags of a stage, as it is resumed below."""
    if stage == "ae":
        return ["train_ae.py", *TINY_AE]
    if stage == "vq":
        return ["train_ae.py", *TINY_VQ, "--restart-codes", 3]
    return ["train_ldm.py", *TINY_LDM, *FEW_TIMESTEPS, "--ae", trained / "ae/ckpt.pt",
            "--no-cache-latents", "--data", data, "--eval-n", 2]


@pytest.mark.parametrize("stage", ["ae", "vq", "ldm"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(trained, tmp_path, folder, cli, stage):
    """Weights, moments, averages, idle codes, and all figures of the log."""
    command = stage_command(stage, trained, folder(30))
    command += [*SIZE, "--no-cosine", "--save-every", 2, "--eval-every", 2]
    cli(*command, "--steps", 4, "--out", tmp_path / "unbroken")
    cli(*command, "--steps", 2, "--out", tmp_path / "resumed")
    output = cli(*command, "--steps", 4, "--out", tmp_path / "resumed")

    assert "2 of 4 steps are done" in output
    assert_same_state(tmp_path / "unbroken", tmp_path / "resumed")
    rows = figures(tmp_path / "unbroken")
    evaluated = "precision"         # a figure of evaluations, whatever their features
    assert steps_of(row for row in rows if evaluated in row) == [2, 4]
    assert rows == figures(tmp_path / "resumed")


def test_sigterm_saves_before_leaving(tmp_path):
    """A real process, told to end, finishes its step, saves it, and ends without an error."""
    command = [sys.executable, ROOT / "train_ae.py", *TINY_AE, *SIZE, "--steps", 100_000,
               "--save-every", 100_000, "--eval-n", 0, "--out", tmp_path]
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)

    assert process.returncode == 0
    step = load_checkpoint(tmp_path / "ckpt.pt", "autoencoder")["step"]
    assert 2 <= step < 100_000
    assert steps_of(log_rows(tmp_path))[-1] == step


# ---- sampling

def test_a_prompt_alone_samples_from_the_bundled_emoji_model(tmp_path, cli):
    """It needs no flag; a folder as --out gets one file per image."""
    output = cli("sample.py", "a mushroom", "--n", 2, "--steps", 5, "--out", tmp_path)
    assert "emoji.pt: emoji-long, text" in output
    assert pixels(tmp_path / "000001.png").shape == (64, 64, 3)
    assert pixels(tmp_path / "000001.png").std() > 5


@pytest.mark.parametrize("name, preset, largest", [
    ("toy", "toy", 8e6), ("emoji", "emoji-long", 16e6),
])
def test_the_bundled_models_are_small_and_have_names(name, preset, largest, tmp_path, cli):
    """What is printed says which preset trains such a model."""
    assert BUNDLED.keys() == {"toy", "emoji"}
    assert BUNDLED[name].stat().st_size <= largest
    output = cli("sample.py", "--ckpt", name, "a red circle", "--n", 1, "--steps", 1,
                 "--out", tmp_path / "x.png")
    assert f"{name}.pt: {preset}, text" in output


def test_the_same_seed_gives_the_same_image_whatever_the_batch(trained, tmp_path, cli):
    """Image i has its own noise, also that of stochastic steps; another seed, another image."""
    lines = tmp_path / "prompts.txt"
    lines.write_text("a red circle\n\na blue square\n")
    command = ["sample.py", "--ckpt", trained / "ldm/ckpt.pt", "--prompts", lines, "--n", 2,
               "--steps", 3, "--eta", 1]
    cli(*command, "--out", tmp_path / "together")
    cli(*command, "--out", tmp_path / "alone", "--batch", 1)
    cli(*command, "--out", tmp_path / "other", "--seed", 1)

    files = [path.name for path in (tmp_path / "together").glob("*.png")]
    assert len(files) == 4
    for file in files:
        image = pixels(tmp_path / "together" / file)
        assert abs(image - pixels(tmp_path / "alone" / file)).max() <= 1
        assert abs(image - pixels(tmp_path / "other" / file)).max() > 8


def test_the_bits_of_an_image_depend_on_the_size_of_its_batch_only():
    """The same bits in one batch after another; in a batch of another size, nearly the same."""
    model = open_model(BUNDLED["toy"])
    conditions = [{"caption": prompt} for prompt in prompts(3)]
    seeds = [(0, 0), (0, 1), (0, 2)]

    def sample_some(part):
        return model.sample(conditions[part], seeds=seeds[part], steps=3, eta=1)

    images = sample_some(slice(0, 3))
    assert torch.equal(sample_some(slice(0, 3)), images)

    two_and_one = torch.cat([sample_some(slice(0, 2)), sample_some(slice(2, 3))])
    torch.testing.assert_close(two_and_one, images, rtol=0, atol=1e-4)


def test_each_sampler_makes_an_image_of_its_own_and_the_bar_counts_its_calls(tmp_path, cli):
    """The number of calls of the U-Net: PLMS has one more, the official rule other steps."""
    cases = [
        (6, []),
        (6, ["--eta", 0.5]),
        (7, ["--timesteps", "official"]),
        (6, ["--sampler", "ddpm"]),
        (6, ["--sampler", "dpm++"]),
        (7, ["--sampler", "plms"]),
    ]
    images = set()
    for i, (n_calls, flags) in enumerate(cases):
        path = tmp_path / f"{i}.png"
        output = cli("sample.py", "--ckpt", "toy", "--n", 1, "--steps", 6, "--out", path,
                     *flags, CAPTION)
        assert f"{n_calls}/{n_calls} " in output
        images.add(Image.open(path).tobytes())
    assert len(images) == len(cases)


@pytest.mark.parametrize("flags, side", [
    (["--sampler", "ddpm"], 16),
    (["--no-ema"], 16),
    (["--size", "32", "--scale", "1"], 32),
])
def test_sampling_flags(trained, tmp_path, cli, flags, side):
    """Flags that change the model or the size run; images have the size asked for."""
    cli("sample.py", "--ckpt", trained / "ldm/ckpt.pt", "--n", 1, "--steps", 2,
        "--out", tmp_path, *flags, "a red circle")
    assert Image.open(tmp_path / "000000.png").size == (side, side)


@pytest.mark.parametrize("attention", [False, True])
def test_the_unet_is_compiled_on_request(trained, tmp_path, cli, monkeypatch, attention):
    """Once, for a single shape; also where hooks observe it."""
    compiled = []

    def compile_nothing(function, dynamic):
        compiled.append((type(function.__self__).__name__, dynamic))
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    flags = ["--attention", tmp_path / "words.png"] if attention else []
    cli("sample.py", "--ckpt", trained / "ldm/ckpt.pt", "--n", 1, "--steps", 3,
        "--out", tmp_path / "x.png", "--compile", *flags, CAPTION)
    assert compiled == [("UNet", False)]


@pytest.mark.slow
def test_the_compiled_unet_gives_the_same_image(tmp_path, cli, monkeypatch):
    """torch can trace all of it; the backend is one that needs no compiler."""
    eager = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", eager)
    command = ["sample.py", "--ckpt", "toy", "--n", 1, "--steps", 3, CAPTION]
    cli(*command, "--out", tmp_path / "a.png")
    cli(*command, "--out", tmp_path / "b.png", "--compile")
    assert abs(pixels(tmp_path / "a.png") - pixels(tmp_path / "b.png")).max() <= 1
