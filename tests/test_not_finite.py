"""Values that are not finite: a step is skipped or ends the run; no image, cache or figure has any.
"""
import pytest
import torch
from conftest import ONE_LEVEL, TINY_AE, TINY_LDM, TINY_VQ
from PIL import Image
from runs import (
    assert_same_state,
    figures,
    log_rows,
    spoiled_at,
    steps_of,
    times_nan,
    trained_state,
)
from torch.testing import assert_close

import sample
import train_ae
import train_ldm
from tinyldm.engine.checkpoint import load_checkpoint, save_checkpoint
from tinyldm.engine.open import open_model, open_stage_one
from tinyldm.errors import NotFinite
from tinyldm.metrics.features import ShapesNet
from tinyldm.metrics.sets import Statistics
from tinyldm.model import finite

RUN = ["--size", 16, "--no-cosine", "--eval-n", 0]


# ---- ways to spoil a step

def nan_image(n):
    """load_batches, whose n-th batch (1, 2, ...) has a pixel that is NaN."""
    original = train_ae.load_batches

    def load_batches(*args, **kwargs):
        for i, batch in enumerate(original(*args, **kwargs), 1):
            if i == n:
                batch["image"][1, 0, 5, 5] = torch.nan
            yield batch

    return load_batches


def nan_loss_of_d_psi(result):
    loss, figures = result
    return times_nan(loss), figures


def infinite(loss):
    return loss * torch.inf


def nan_gradient(loss):
    """The loss is finite, but the slope of a square root at 0 is not."""
    return loss + (loss * 0).sqrt() * (loss > -1)


def spoil_step(monkeypatch, case, n):
    """Let the n-th step of the next run go wrong, in one of several ways."""
    if case == "D_psi":
        # It has no loss in step 1.
        spoiled = spoiled_at(n - 1, train_ae.discriminator_loss, nan_loss_of_d_psi)
        monkeypatch.setattr(train_ae, "discriminator_loss", spoiled)
    elif case == "loss":
        monkeypatch.setattr(train_ldm, "ldm_loss", spoiled_at(n, train_ldm.ldm_loss, infinite))
    elif case == "gradient":
        monkeypatch.setattr(train_ldm, "ldm_loss", spoiled_at(n, train_ldm.ldm_loss, nan_gradient))
    else:
        monkeypatch.setattr(train_ae, "load_batches", nan_image(n))


@pytest.fixture
def command(trained):
    """command(case) -> the script and flags of the stage that is spoiled."""
    def make(case):
        if case in ("loss", "gradient"):
            return ["train_ldm.py", *TINY_LDM, *ONE_LEVEL, *RUN, "--ae", trained / "ae/ckpt.pt"]
        tiny = TINY_VQ if case == "codebook" else TINY_AE
        return ["train_ae.py", *tiny, *RUN]

    return make


# ---- what must happen

@pytest.mark.parametrize("case", ["image", "D_psi", "codebook", "loss", "gradient"])
def test_a_skipped_step_changes_nothing(tmp_path, cli, monkeypatch, command, case):
    """Adam, BatchNorm, the EMA and the codes are after step 3 what they were after step 2."""
    spoil_step(monkeypatch, case, 3)
    output = cli(*command(case), "--steps", 3, "--save-every", 1, "--skip-nan", 1,
                 "--out", tmp_path)
    assert "step 3 is not finite" in output

    before = trained_state(tmp_path / "ckpt.old.pt")
    after = trained_state(tmp_path / "ckpt.pt")
    assert before.pop("step") == 2
    assert after.pop("step") == 3
    assert_close(before, after, rtol=0, atol=0)

    rows = figures(tmp_path)
    assert steps_of(rows) == [1, 2, 3]
    assert "gnorm" in rows[1]
    assert rows[2] == {"step": 3}


@pytest.mark.parametrize("case", ["image", "loss"])
def test_a_run_stops_at_such_a_step_and_goes_on_with_skip_nan(
    tmp_path, cli, monkeypatch, command, case
):
    """It keeps the step before; to go on is the same as to have skipped at once."""
    run = [*command(case), "--steps", 4]
    with monkeypatch.context() as patch:
        spoil_step(patch, case, 3)
        output = cli(*run, "--out", tmp_path / "stops", code=2)
    assert "error: step 3: loss or gradient is not finite" in output.splitlines()[-1]
    for advice in ("keeps step 2", "--lr", "--skip-nan"):
        assert advice in output
    assert trained_state(tmp_path / "stops")["step"] == 2

    with monkeypatch.context() as patch:
        spoil_step(patch, case, 1)
        cli(*run, "--out", tmp_path / "stops", "--skip-nan", 1)
    with monkeypatch.context() as patch:
        spoil_step(patch, case, 3)
        cli(*run, "--out", tmp_path / "skips", "--skip-nan", 1)
    assert_same_state(tmp_path / "stops", tmp_path / "skips")
    assert figures(tmp_path / "stops") == figures(tmp_path / "skips")
    assert ["gnorm" in row for row in log_rows(tmp_path / "skips")] == [True, True, False, True]


def test_means_of_the_log_leave_skipped_steps_out(tmp_path, cli, monkeypatch):
    """A line of four steps, the last of which is skipped, has the means of the other three."""
    run = ["train_ae.py", *TINY_AE, *RUN, "--steps", 4]
    cli(*run, "--out", tmp_path / "each")
    monkeypatch.setattr(train_ae, "load_batches", nan_image(4))
    cli(*run, "--log-every", 4, "--skip-nan", 1, "--out", tmp_path / "mean")

    each = [row["rec"] for row in log_rows(tmp_path / "each")]
    mean, = log_rows(tmp_path / "mean")
    assert_close(mean["rec"], sum(each[:3]) / 3)


def test_more_than_skip_nan_steps_end_the_run(tmp_path, cli, monkeypatch):
    """Two are skipped, the third ends it; the weights are those of the last good step."""
    original = train_ae.autoencoder_loss

    def always_nan(*args):
        loss, figures = original(*args)
        return times_nan(loss), figures

    run = ["train_ae.py", *TINY_AE, *RUN, "--steps", 9, "--skip-nan", 2, "--out", tmp_path]
    monkeypatch.setattr(train_ae, "autoencoder_loss", always_nan)
    assert "error: step 3:" in cli(*run, code=2)
    assert load_checkpoint(tmp_path / "ckpt.pt", "autoencoder")["step"] == 2


# ---- samples, latents and features

def overflowing(net):
    """Let the last layer with a bias give values that are not numbers; the weights are finite."""
    *_, last = [module for module in net.modules() if getattr(module, "bias", None) is not None]
    last.register_forward_hook(lambda module, inputs, output: output * 1e38 * 1e38)


@pytest.mark.parametrize("part, name", [
    ("tau", "tau, the condition's network,"),
    ("unet", "the U-Net"),
    ("decoder", "stage one's decoder"),
    ("encoder", "stage one's encoder"),
])
def test_the_part_that_gives_nan_is_named_and_no_image_is_written(
    trained, tmp_path, cli, monkeypatch, part, name
):
    """By the program, with exit code 2."""
    def open_spoiled(*args, **how):
        model = open_model(*args, **how)
        overflowing(getattr(model, part, None) or getattr(model.ae, part))
        return model

    monkeypatch.setattr(sample, "open_model", open_spoiled)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "init.png")
    output = cli("sample.py", "--ckpt", trained / "ldm/ckpt.pt", "--n", 2, "--steps", 2,
                 "--init", tmp_path / "init.png", "--out", tmp_path / "x.png", "a red circle",
                 code=2)
    assert f"error: {name} gave values that are not numbers" in output.splitlines()[-1]
    assert "fp32" in output
    assert not (tmp_path / "x.png").exists()


def test_an_evaluation_that_is_not_finite_is_left_out_and_the_run_goes_on(
    tmp_path, cli, monkeypatch, trained
):
    """No black grid is written, and no figure."""
    def gives_nan(*args, **how):
        finite(torch.tensor(torch.nan), "the U-Net")

    monkeypatch.setattr(train_ldm, "sample_all", gives_nan)
    run = ["--size", 16, "--no-cosine", "--eval-n", 4, "--steps", 2]
    output = cli("train_ldm.py", *TINY_LDM, *ONE_LEVEL, *run, "--ae", trained / "ae/ckpt.pt",
                 "--out", tmp_path / "x")
    assert "step 2 is not evaluated: the U-Net gave values that are not numbers" in output
    assert not list((tmp_path / "x").glob("samples*"))
    assert trained_state(tmp_path / "x")["step"] == 2


def test_a_stage_one_that_gives_nan_is_named_with_the_image_and_leaves_no_cache(
    tmp_path, cli, monkeypatch, trained
):
    """Training ends before its first step."""
    def open_spoiled(*args):
        ae, knows_z_std = open_stage_one(*args)
        ae.quant_conv.register_forward_hook(nan_of_the_fourth)
        return ae, knows_z_std

    def nan_of_the_fourth(module, inputs, output):
        spoiled = output.clone()
        spoiled[3] = torch.nan
        return spoiled

    monkeypatch.setattr(train_ldm, "open_stage_one", open_spoiled)
    output = cli("train_ldm.py", *TINY_LDM, *ONE_LEVEL, *RUN, "--steps", 2,
                 "--ae", trained / "ae/ckpt.pt", "--out", tmp_path / "x", code=2)
    last = output.splitlines()[-1]
    assert "stage one's encoder gives latents of image 3 (from 0) that are not numbers" in last
    assert not list(tmp_path.rglob("*.pt"))


def test_a_cache_of_an_earlier_version_with_nan_is_made_anew(tmp_path, cli, monkeypatch, trained):
    """It is on disk under the name that a good one would have."""
    command = ["train_ldm.py", *TINY_LDM, *ONE_LEVEL, *RUN, "--ae", trained / "ae/ckpt.pt"]
    cli(*command, "--steps", 1, "--out", tmp_path / "a")
    shard, = tmp_path.rglob("000000.pt")
    whole = torch.load(shard, weights_only=True)
    save_checkpoint(whole | {"sums": whole["sums"] * torch.nan, "mean": whole["mean"] * 0}, shard)

    assert "encoding" in cli(*command, "--steps", 1, "--out", tmp_path / "b")
    assert_close(torch.load(shard, weights_only=True), whole, rtol=0, atol=0)
    assert "encoding" not in cli(*command, "--steps", 1, "--out", tmp_path / "c")


def test_features_that_are_not_finite_are_refused():
    """With the numbers of the images; else every figure would be NaN."""
    net = ShapesNet()
    good = torch.zeros(3, 3, 32, 32)
    Statistics(net, [good])
    with pytest.raises(NotFinite, match=r"the shapes features of images 3\.\.5 are not all num"):
        Statistics(net, [good, good * torch.nan])
