"""Two processes (gloo, on the CPU) do what one does: same losses, same weights, same files.

Starting torchrun takes long, so all programs below run in one start of it (together.py).
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ONE_LEVEL, ROOT, TINY_AE, TINY_LDM, TINY_VQ, write_images
from runs import TIMING, figures, log_rows, steps_of, trained_state
from torch.testing import assert_close

STEPS = 6
HALFWAY = 3

RUN = ["--size", 16, "--batch", 8, "--steps", STEPS, "--save-every", HALFWAY, "--no-cosine"]

# D_psi begins at step 3.
STAGE_ONE = ["train_ae.py", *TINY_AE, *RUN, "--eval-n", 0, "--disc-start", 2]

# Without D_psi, whose BatchNorm sees one process only.
VQ = ["train_ae.py", *TINY_VQ, *RUN, "--eval-n", 0, "--disc-weight", 0, "--batch", 4]

# Without Muon, which FSDP refuses (stage one has it). With one level, few timesteps and few
# held-out images, as FSDP and evaluations are slow here.
STAGE_TWO = ["train_ldm.py", *TINY_LDM, *ONE_LEVEL, *RUN, "--T", 8, "--muon", 0]

PROMPTS = "a red circle\na blue square\na big green cross above a small cyan circle\n"
N_IMAGES = 9
SAMPLE = ["sample.py", "--n", 3, "--batch", 2, "--steps", 3, "--eta", 1]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of all runs; a file of prompts is in it."""
    out = tmp_path_factory.mktemp("out")
    (out / "prompts.txt").write_text(PROMPTS)
    return out


@pytest.fixture(scope="module")
def stage_two(trained, out):
    images = write_images(out / "data", 30)
    return [*STAGE_TWO, "--ae", trained / "ae/ckpt.pt", "--data", images]


@pytest.fixture(scope="module")
def sampling(trained, out):
    return [*SAMPLE, "--ckpt", trained / "ldm/ckpt.pt", "--prompts", out / "prompts.txt"]


@pytest.fixture(scope="module")
def run(cli):
    """run(command, out) runs a program in this process."""
    def run(command, out):
        # NB: it has one thread (conftest.py), as each process of torchrun; with more, sums are
        # rounded otherwise.
        assert torch.get_num_threads() == 1
        cli(*command, "--out", out)
        return out

    return run


def halfway(run_folder, copy):
    """Copy a run as it was halfway, to be resumed from there."""
    copy.mkdir(parents=True)
    shutil.copy(run_folder / "ckpt.old.pt", copy / "ckpt.pt")
    shutil.copy(run_folder / "log.jsonl", copy)
    for stage_one in run_folder.glob("stage_one_*.pt"):
        shutil.copy(stage_one, copy)
    return copy


@pytest.fixture(scope="module")
def alone(out, run, stage_two, sampling):
    """The folder of the runs of one process."""
    folder = out / "alone"

    # NB: on a CPU BatchNorm is not synchronised, so D_psi must see the same images at a time.
    run([*STAGE_ONE, "--micro-batch", 4], folder / "ae")
    run(VQ, folder / "vq")
    run(stage_two, folder / "ldm")
    run(sampling, folder / "images")
    return folder


def sampled_in_part(images, folder):
    """Copy images of a run that was stopped: 5 is missing, 1 and 4 are marked."""
    shutil.copytree(images, folder)
    (folder / "000005.png").unlink()
    for name in ("000001.png", "000004.png"):
        (folder / name).write_bytes(b"as it was")


def run_in_two_processes(commands, folder, nan_at=None):
    """Run {name: command} in one start of torchrun, each with folder/name as --out.

    nan_at: {name: step whose loss is NaN in one of the processes}.
    Return, for each name, what each of the two processes printed, and its error.
    """
    jobs = []
    for name, (script, *flags) in commands.items():
        flags = [str(flag) for flag in (*flags, "--out", folder / name)]
        jobs.append({"script": script.removesuffix(".py"), "flags": flags})
        if nan_at and name in nan_at:
            jobs[-1]["nan_at"] = nan_at[name]

    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", ROOT / "tests/together.py", path],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode == 0, process.stderr

    main = json.loads((folder / "jobs.json.0").read_text())
    other = json.loads((folder / "jobs.json.1").read_text())
    return dict(zip(commands, zip(main, other)))


@pytest.fixture(scope="module")
def together(out, alone, stage_two, sampling):
    """The folder of the runs of two processes, and what each process said of each run."""
    folder = out / "together"
    folder.mkdir()
    sampled_in_part(alone / "images", folder / "resumed images")
    shutil.copytree(alone / "images", folder / "other images")

    without_evaluation = [*stage_two, "--eval-n", 0]
    commands = {
        "ae": STAGE_ONE,
        "vq": [*VQ, "--micro-batch", 1],
        "ldm": [*without_evaluation, "--micro-batch", 2],
        "parts": [*stage_two, "--micro-batch", 2, "--fsdp"],
        "skips": [*without_evaluation, "--skip-nan", 1],
        "stops": without_evaluation,
        "images": sampling,
        "resumed images": [*sampling, "--resume"],
        "other images": [*sampling, "--seed", 5],
        "grid.png": sampling,
    }
    return folder, run_in_two_processes(commands, folder, nan_at={"skips": 3, "stops": 3})


# ---- training

def training_figures(folder):
    """The figures of each training step that two equal runs have in common."""
    left_out = TIMING | {"z_std"}               # of which each process sees its own images
    rows = figures(folder, left_out)[:STEPS]
    assert steps_of(rows) == list(range(1, STEPS + 1))
    return rows


def assert_same_figures(a, b):
    """The training figures of two runs agree at every step."""
    for a_row, b_row in zip(training_figures(a), training_figures(b)):
        assert a_row == pytest.approx(b_row, rel=1e-5, abs=1e-5)


def assert_same_weights(a, b):
    """Every tensor of two checkpoints has the same name, and the same values but for rounding."""
    a_state = trained_state(a)
    b_state = trained_state(b)
    for name in ("nets", "opt", "opts", "ema"):
        assert_close(a_state.get(name), b_state.get(name), rtol=1e-3, atol=1e-4)


def test_stage_one_with_d_psi(alone, together):
    """E, D and D_psi train with the whole batch's gradients."""
    folder, _ = together
    assert_same_figures(alone / "ae", folder / "ae")
    rows = log_rows(folder / "ae")
    assert ["lam" in row for row in rows] == [False, False, True, True, True, True]


def test_two_processes_restart_the_same_codes_as_one(alone, together):
    """The codes that nobody chose are replaced by latents of the whole batch."""
    folder, _ = together
    a = trained_state(alone / "vq")["nets"]["ae"]
    b = trained_state(folder / "vq")["nets"]["ae"]
    assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(a["codebook.codes"].unique(dim=0)) > 16


def test_stage_two(alone, together):
    """DDP: gradients are averaged, so losses and weights are those of one process."""
    folder, _ = together
    assert_same_figures(alone / "ldm", folder / "ldm")
    assert_same_weights(alone / "ldm", folder / "ldm")


def test_stage_two_in_parts(alone, together):
    """FSDP: each process has a part of the weights; the files hold them whole, as always."""
    folder, _ = together
    assert_same_figures(alone / "ldm", folder / "parts")
    assert_same_weights(alone / "ldm", folder / "parts")

    size = (alone / "ldm/model.pt").stat().st_size
    assert abs((folder / "parts/model.pt").stat().st_size - size) < 5000


def test_a_model_in_parts_is_evaluated(alone, together):
    """The figures that show progress come from the averaged weights, gathered."""
    folder, _ = together
    evaluated = log_rows(folder / "parts")[-1]
    names = [name for name in evaluated if name.startswith("held_out")]
    assert len(names) == 4

    expected = log_rows(alone / "ldm")[-1]
    for name in names:
        assert evaluated[name] == pytest.approx(expected[name], rel=1e-3)


@pytest.mark.parametrize("name", ["ldm", "parts"])
def test_one_process_continues_what_two_began(alone, together, run, stage_two, out, name):
    """Checkpoints are interchangeable: from DDP or FSDP to one process."""
    folder, _ = together
    resumed = halfway(folder / name, out / "alone" / f"resumed from {name}")
    run([*stage_two, "--eval-n", 0], resumed)
    assert_same_figures(alone / "ldm", resumed)
    assert_same_weights(alone / "ldm", resumed)


@pytest.mark.slow
def test_two_processes_continue_what_one_began(alone, stage_two, out):
    """Checkpoints are interchangeable: from one process to FSDP and to DDP."""
    commands = {"parts": [*stage_two, "--fsdp"], "ldm": stage_two}
    for name in commands:
        halfway(alone / "ldm", out / "continued" / name)
    run_in_two_processes(commands, out / "continued")

    for name in commands:
        assert_same_figures(alone / "ldm", out / "continued" / name)
        assert_same_weights(alone / "ldm", out / "continued" / name)


def test_processes_skip_together(together):
    """A loss that is NaN in one process: both skip the step, and neither waits for the other."""
    folder, said = together
    rows = figures(folder / "skips")
    assert rows[2] == {"step": 3}
    assert "loss" in rows[3]
    assert trained_state(folder / "skips")["step"] == STEPS
    assert [result["error"] for result in said["skips"]] == [None, None]


def test_processes_stop_together(together):
    """Without --skip-nan both end with the same error, and the last good step is saved."""
    folder, said = together
    for result in said["stops"]:
        assert result["error"].startswith("step 3: loss or gradient is not finite")
    assert trained_state(folder / "stops")["step"] == 2


# ---- sampling

def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def images_in(folder):
    return {name: data for name, data in files(folder).items() if name.endswith(".png")}


def test_two_processes_write_the_bytes_of_one(alone, together):
    """Each process samples its own batches; only the main one reports, and writes settings."""
    folder, said = together
    assert files(folder / "images") == files(alone / "images")
    images = images_in(alone / "images")
    assert sorted(images) == [f"{i:06d}.png" for i in range(N_IMAGES)]
    assert len(set(images.values())) == N_IMAGES

    main, other = said["images"]
    assert main["output"].count(f"{N_IMAGES} image(s)") == 1
    assert other["output"] == ""


def test_resume_samples_the_batches_that_lack_an_image(alone, together):
    """Batches are of two images: 4 and 5 are sampled anew, all else stays as it was."""
    folder, _ = together
    images = images_in(alone / "images")
    assert images_in(folder / "resumed images") == images | {"000001.png": b"as it was"}


def test_two_processes_refuse_a_folder_of_other_settings(alone, together):
    """Both say so, and neither waits for the other."""
    folder, said = together
    assert files(folder / "other images") == files(alone / "images")
    for result in said["other images"]:
        assert "its images have seed = 0, now it is 5" in result["error"]


def test_two_processes_cannot_share_a_grid(together):
    """A grid is one file, so --out must be a folder."""
    _, said = together
    for result in said["grid.png"]:
        assert result["error"].startswith("torchrun and --resume")
