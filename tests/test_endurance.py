"""Training survives kills at any moment and a full disk (slow).

    pytest -m slow -s tests/test_endurance.py       # starts and kills real processes, minutes
"""
import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT, TINY_LDM, TINY_VQ
from runs import assert_same_state, figures, log_rows, step_in, steps_of
from torch.testing import assert_close

from tinyldm.engine.checkpoint import load_checkpoint

pytestmark = pytest.mark.slow

RUN = ["--size", 16, "--no-cosine"]
STEPS = 120
STAGES = {
    "ae": ["train_ae.py", *TINY_VQ, *RUN, "--steps", STEPS],
    "ldm": ["train_ldm.py", *TINY_LDM, *RUN, "--steps", STEPS],
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(stage, out, *flags) -> a process that trains."""
    # Without matplotlib: curves take longer than the steps.
    no_matplotlib = tmp_path_factory.mktemp("no_matplotlib")
    (no_matplotlib / "matplotlib.py").write_text("raise ImportError")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{no_matplotlib}:{ROOT}"}

    def start(stage, out, *flags, **how):
        script, *rest = STAGES[stage]
        command = [sys.executable, ROOT / script, *rest, *flags, "--out", out]
        return subprocess.Popen(
            [str(part) for part in command],
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **how,
        )

    return start


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, start):
    """Both stages, run in one go: {stage: (folder, flags besides those of STAGES)}."""
    out = tmp_path_factory.mktemp("unbroken")
    runs = {
        "ae": (out / "ae", ["--eval-every", 20]),
        "ldm": (out / "ldm", ["--eval-every", 20, "--ae", out / "ae/ckpt.pt"]),
    }
    for stage, (folder, flags) in runs.items():
        process = start(stage, folder, *flags)
        assert process.wait(600) == 0, process.stderr.read()
    return runs


def finish(process):
    """Wait for the end of a process that must succeed."""
    stderr = process.communicate(timeout=600)[1]
    assert process.returncode == 0, stderr


def assert_same_run(a, b):
    assert_same_state(a, b)
    assert figures(a) == figures(b)


def size(path):
    return path.stat().st_size if path.exists() else 0


def last_step(out):
    """The step of the last whole line of a log that is being written; 0 without one."""
    with contextlib.suppress(ValueError, IndexError, FileNotFoundError):
        return log_rows(out)[-1]["step"]
    return 0


def inode(path):
    """A number that changes when another file takes the place of this one."""
    return path.stat().st_ino if path.exists() else None


def wait_for(process, moment, out, rng):
    """Let a process run until a random moment while it is starting, training, saving, renaming."""
    if moment == "starting":
        time.sleep(rng.uniform(0, 4))
        return

    # A resumed run replaces its log first; then some steps.
    log = out / "log.jsonl"
    before = inode(log)
    while process.poll() is None and inode(log) == before:
        time.sleep(0.01)
    goal = last_step(out) + rng.randrange(1, 16)
    while process.poll() is None and last_step(out) < goal:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))

    # While a checkpoint is being written, or just when it is complete but not yet renamed.
    part = out / "ckpt.pt.part"
    if moment in ("saving", "renaming"):
        while process.poll() is None and not part.exists():
            pass
    if moment == "renaming":
        while process.poll() is None and 0 < size(part) < size(out / "ckpt.pt"):
            pass


def check_files(out, seen):
    """After a kill, all files can be read; return the step that the run goes on from.

    seen counts the unlikely moments that kills have hit.
    """
    seen["while a part was being written"] += (out / "ckpt.pt.part").exists()
    log = out / "log.jsonl"
    text = log.read_text() if log.exists() else ""
    seen["in the middle of a log line"] += text != "" and not text.endswith("\n")

    checkpoints = [path for path in (out / "ckpt.pt", out / "ckpt.old.pt") if path.exists()]
    for path in (*checkpoints, out / "model.pt"):
        if path.exists():
            load_checkpoint(path)
    if not checkpoints:
        return 0

    # The log reaches at least as far as the checkpoint.
    seen["between the two renames"] += not (out / "ckpt.pt").exists()
    step = step_in(out / "ckpt.pt")
    assert text.count("\n") >= step
    return step


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("every, n_kills, how", [
    (1, 6, signal.SIGKILL), (7, 5, signal.SIGKILL), (50, 3, signal.SIGTERM),
])
def test_killed_runs_end_as_the_unbroken_one(unbroken, start, tmp_path, stage, every, n_kills, how):
    """Bit for bit, in weights and in the log, however often they were killed on the way."""
    whole, flags = unbroken[stage]
    out = tmp_path / stage
    flags = [*flags, "--save-every", every]
    rng = random.Random(every)
    begin = time.time()
    seen = Counter()
    steps = []

    is_sudden = how == signal.SIGKILL
    moments = ["training", "saving", "starting", "renaming"] if is_sudden else ["training"]
    for i in range(n_kills):
        process = start(stage, out, *flags)
        wait_for(process, moments[i % len(moments)], out, rng)
        assert process.poll() is None, process.stderr.read()
        process.send_signal(how)
        stderr = process.communicate(timeout=120)[1]
        assert "Traceback" not in stderr
        assert process.returncode == (-how if is_sudden else 0), stderr
        steps.append(check_files(out, seen))

    finish(start(stage, out, *flags))
    assert_same_run(whole, out)
    trained = steps_of(row for row in log_rows(out) if "ms" in row)
    assert trained == list(range(1, STEPS + 1))
    assert not list(out.glob("*.part"))
    if stage == "ldm":
        a = load_checkpoint(whole / "model.pt", "ldm")
        b = load_checkpoint(out / "model.pt", "ldm")
        assert_close([a["ae"], a["ema"]], [b["ae"], b["ema"]], rtol=0, atol=0)
    print(
        f"\n{stage}, --save-every {every}: {n_kills} {how.name}s, went on from steps {steps}; "
        f"{dict(seen)}; {time.time() - begin:.0f} s"
    )


@pytest.mark.parametrize("moment", ["in the evaluation", "before model.pt", "before ckpt.pt"])
def test_killed_between_the_last_checkpoint_and_the_end(unbroken, start, tmp_path, moment):
    """The same command makes all that is missing: the last evaluation, model.pt, the checkpoint."""
    whole, flags = unbroken["ldm"]
    flags = [*flags, "--save-every", STEPS - 5]
    process = start("ldm", tmp_path, *flags)

    # ckpt.pt of step 115 becomes ckpt.old.pt when that of step 120 is there; then it evaluates.
    wanted = {
        "before model.pt": "ckpt.pt",
        "before ckpt.pt": "model.pt",
        "in the evaluation": "ckpt.old.pt",
    }
    while not (tmp_path / wanted[moment]).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.kill()
    process.communicate()
    if moment == "in the evaluation":
        assert step_in(tmp_path / "ckpt.old.pt") == STEPS - 5
    print(f"\nkilled {moment}: there are {sorted(path.name for path in tmp_path.glob('*.pt'))}")

    finish(start("ldm", tmp_path, *flags))
    assert_same_run(whole, tmp_path)
    load_checkpoint(tmp_path / "model.pt", "ldm")


def limit_files_to(n_bytes):
    """Return a function that makes writing more than n_bytes to a file fail in this process."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    return limit


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_line_and_costs_nothing(unbroken, start, tmp_path, stage):
    """Files may grow to so many bytes: then writing fails as on a full disk."""
    whole, flags = unbroken[stage]
    flags = [*flags, "--save-every", 20]
    enough = size(whole / "ckpt.pt")
    for limit, name in ((enough - 1, "ckpt.pt"), (4000, ".jsonl")):
        # Some steps with room on the disk.
        process = start(stage, tmp_path, *flags)
        wait_for(process, "training", tmp_path, random.Random(limit))
        process.send_signal(signal.SIGTERM)
        finish(process)
        before = (tmp_path / "ckpt.pt").read_bytes()

        process = start(stage, tmp_path, *flags, preexec_fn=limit_files_to(limit))
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 2, stderr
        assert "Traceback" not in stderr
        last = stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert name in last
        assert "File too large" in last
        assert (tmp_path / "ckpt.pt").read_bytes() == before
        assert not list(tmp_path.glob("*.part"))
        print(f"\n{stage}, at most {limit} bytes of {enough}: {last}")

    finish(start(stage, tmp_path, *flags))
    assert_same_run(whole, tmp_path)
