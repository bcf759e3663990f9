"""Damaged files: a checkpoint truncated anywhere, half a log line, a save that was stopped."""
import contextlib
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY_VQ
from runs import assert_same_state, figures, step_in

from tinyldm.engine.checkpoint import load_checkpoint, save_checkpoint
from tinyldm.engine.weights import write_state
from tinyldm.errors import BadInput

# ---- checkpoints damaged anywhere


@pytest.fixture
def two_checkpoints(tmp_path):
    """ckpt.pt of step 5, and ckpt.old.pt of step 4 beside it."""
    path = tmp_path / "ckpt.pt"
    for step in (4, 5):
        rng = torch.manual_seed(step)
        nets = {name: torch.randn(200, generator=rng) for name in "abcdefgh"}
        checkpoint = {"kind": "tinyldm autoencoder", "step": step, "nets": nets}
        save_checkpoint(checkpoint, path, keep=True)
    return path


def test_a_checkpoint_truncated_at_any_byte_is_replaced_by_the_one_before(two_checkpoints):
    """With a warning that names both; a whole one is read without."""
    path = two_checkpoints
    data = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(path, "autoencoder")["step"] == 5

    n_bytes = {*range(20), *range(0, len(data), 100), *range(len(data) - 100, len(data))}
    for n in sorted(n_bytes):
        path.write_bytes(data[:n])
        with pytest.warns(UserWarning, match=r"ckpt\.pt: .*ckpt\.old\.pt, .*is used"):
            assert load_checkpoint(path, "autoencoder")["step"] == 4, n


def test_a_checkpoint_that_is_gone_is_replaced_by_the_one_before(two_checkpoints):
    """A run killed between the two renames of saving leaves it so."""
    two_checkpoints.unlink()
    with pytest.warns(UserWarning, match=r"ckpt\.pt: No such file.*ckpt\.old\.pt, .*is used"):
        assert load_checkpoint(two_checkpoints, "autoencoder")["step"] == 4


def test_two_truncated_checkpoints_are_bad_input(two_checkpoints):
    """The error names the older one, the last that was tried."""
    for path in (two_checkpoints, two_checkpoints.with_name("ckpt.old.pt")):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning), pytest.raises(BadInput, match=r"ckpt\.old\.pt: truncated"):
        load_checkpoint(two_checkpoints, "autoencoder")


@pytest.mark.parametrize("n_renames", [0, 1, 2])
@pytest.mark.parametrize("newest_is_broken", [False, True])
def test_saving_leaves_a_whole_checkpoint_whenever_it_is_stopped(
    tmp_path, monkeypatch, n_renames, newest_is_broken
):
    """Stopped before or after each rename, also if the newest one is truncated."""
    path = tmp_path / "ckpt.pt"

    def save(step):
        save_checkpoint({"kind": "tinyldm ldm", "step": step}, path, keep=True)

    save(1)
    save(2)
    if newest_is_broken:
        path.write_bytes(path.read_bytes()[:-1])

    n_done = 0
    original = Path.replace

    def replace(self, target):
        nonlocal n_done
        if n_done == n_renames:
            raise KeyboardInterrupt
        n_done += 1
        return original(self, target)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace)
        save(3)
    assert step_in(path) in ((1, 3) if newest_is_broken else (2, 3))
    assert not list(tmp_path.glob("*.part"))

    save(4)
    assert step_in(path) == 4
    path.unlink()
    assert step_in(path) in (1, 2, 3)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "new/x.safetensors"])
def test_an_export_is_written_whole_or_not_at_all(tmp_path, name):
    """A folder in the place of the temporary file makes writing impossible."""
    path = tmp_path / name
    path.with_name(path.name + ".part").mkdir(parents=True)
    path.write_bytes(b"before")
    with pytest.raises(BadInput, match=f"cannot write .*{path.name}"):
        write_state({"a": torch.ones(3)}, path)
    assert path.read_bytes() == b"before"


# ---- runs that were damaged

@pytest.fixture(scope="module")
def finished(tmp_path_factory, cli):
    """A VQ stage one of five steps, each saved: its folder, and the command that made it."""
    out = tmp_path_factory.mktemp("finished") / "ae"
    command = ["train_ae.py", *TINY_VQ, "--size", 16, "--no-cosine", "--steps", 5,
               "--save-every", 1, "--eval-every", 2, "--eval-n", 2]
    cli(*command, "--out", out)
    return out, command


@pytest.mark.parametrize("damage", ["truncated", "gone", "half a log line"])
def test_a_damaged_run_goes_on_as_if_nothing_had_happened(finished, tmp_path, cli, damage):
    """A damaged checkpoint costs a step; an evaluation that is not in the log is done again."""
    unbroken, command = finished
    out = tmp_path / "ae"
    shutil.copytree(unbroken, out)
    if damage == "half a log line":
        text = (out / "log.jsonl").read_text()
        (out / "log.jsonl").write_text(text[:-30])
    elif damage == "truncated":
        data = (out / "ckpt.pt").read_bytes()
        (out / "ckpt.pt").write_bytes(data[:5000])
    else:
        (out / "ckpt.pt").unlink()

    output = cli(*command, "--out", out)
    if damage == "half a log line":
        assert "5 of 5 steps are done" in output
    else:
        assert "warning: " in output
        assert "ckpt.old.pt, the one before it, is used" in output
        assert "4 of 5 steps are done" in output
    assert_same_state(unbroken, out)
    assert figures(unbroken) == figures(out)


def test_two_unreadable_checkpoints_are_one_line(finished, tmp_path, cli):
    """It does not begin anew, which would write over what is left."""
    unbroken, command = finished
    out = tmp_path / "ae"
    shutil.copytree(unbroken, out)
    for name in ("ckpt.pt", "ckpt.old.pt"):
        (out / name).write_bytes(b"PK")

    output = cli(*command, "--out", out, code=2)
    last = output.splitlines()[-1]
    assert last.startswith("error: --out: ")
    assert "ckpt.old.pt" in last


@pytest.mark.parametrize("flags, message", [
    (["--size", 4], "--size 4: must be at least 16"),
    (["--size", 16, "--disc-layers", 3], "--disc-layers 3 are too many"),
])
def test_too_small_images_are_one_line_at_the_start(tmp_path, cli, flags, message):
    """Not an error of some layer later on; nothing is written."""
    output = cli("train_ae.py", *TINY_VQ, *flags, "--out", tmp_path / "ae", code=2)
    assert message in output
    assert not (tmp_path / "ae").exists()
