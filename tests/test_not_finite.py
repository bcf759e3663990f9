"""Losses and gradients that are not finite: a step is skipped and changes nothing, or ends the run.
"""
import pytest
import torch
from conftest import ONE_LEVEL, TINY_AE, TINY_LDM, TINY_VQ
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

import train_ae
import train_ldm
from tinyldm.engine.checkpoint import load_checkpoint

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
