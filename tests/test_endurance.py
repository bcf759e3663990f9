"""Training survives: kills at any moment, truncated checkpoints, a full disk, losses that are NaN.

The slow part (pytest -m slow -s tests/test_endurance.py) starts and kills real processes."""
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_AE, TINY_LDM, TINY_VQ
from test_scripts import lines, states
from torch.testing import assert_close

import train_ae
import train_ldm
from tinyldm import BadInput, patchgan
from tinyldm.checkpoint import load_checkpoint, save_checkpoint, write_state

RUN = ["--size", 16, "--no-cosine"]
TIMING = {"ms", "img_per_s", "gb", "eta_min"}


def figures(path):
    """log.jsonl, without what the clock and the machine say."""
    return [{k: v for k, v in x.items() if k not in TIMING} for x in lines(path)]


def same(a, b):
    """Every tensor and number that training made is the same, bit for bit."""
    assert_close(states(a), states(b), rtol=0, atol=0, equal_nan=False)


# ---- a checkpoint truncated anywhere
@pytest.fixture(scope="module")
def five(tmp_path_factory, cli):
    """A VQ stage one of five steps, each saved, and the command that made it."""
    out = tmp_path_factory.mktemp("five") / "ae"
    flags = [*TINY_VQ, *RUN, "--steps", 5, "--save-every", 1, "--eval-every", 2]
    cli("train_ae.py", *flags, "--out", out)
    return out, flags


def test_a_checkpoint_truncated_at_any_byte_is_replaced_by_the_one_before(tmp_path):
    path, old = tmp_path / "ckpt.pt", tmp_path / "ckpt.old.pt"
    for step in (4, 5):
        nets = {k: torch.randn(1000, generator=torch.manual_seed(step)) for k in "abcdefgh"}
        ckpt = {"kind": "tinyldm autoencoder", "step": step, "nets": nets}
        save_checkpoint(ckpt, path, keep=True)
    data = path.read_bytes()
    cuts = {*range(0, len(data), 100), *range(20), *range(len(data) - 200, len(data))}
    for n in sorted(cuts):
        path.write_bytes(data[:n])
        with pytest.warns(UserWarning, match=r"ckpt\.pt: .*ckpt\.old\.pt is used"):
            assert load_checkpoint(path, "autoencoder", "--out")["step"] == 4, n
    path.unlink()
    with pytest.warns(UserWarning, match=r"ckpt\.pt: No such file.*ckpt\.old\.pt is used"):
        assert load_checkpoint(path, "autoencoder", "--ae")["step"] == 4
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_checkpoint(path, "autoencoder", "--ae")["step"] == 5
    path.write_bytes(data[:1000])
    old.write_bytes(data[:1000])
    with pytest.warns(UserWarning), pytest.raises(BadInput, match=r"ckpt\.old\.pt: truncated"):
        load_checkpoint(path, "autoencoder", "--out")
    print(f"\n{len(cuts)} truncations, each replaced by the checkpoint before")


@pytest.mark.parametrize("damage", ["truncated", "gone", "half a log line"])
def test_a_run_with_a_damaged_end_goes_on_as_if_nothing_had_happened(five, tmp_path, cli, damage):
    out, (whole, flags) = tmp_path / "ae", five
    shutil.copytree(whole, out)
    path, log = out / "ckpt.pt", out / "log.jsonl"
    if damage == "half a log line":
        text = log.read_text()
        log.write_text(text[:len(text) - 30])           # step 5 was judged, and will be again
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    else:
        path.unlink()
    said = cli("train_ae.py", *flags, "--out", out)
    if damage == "half a log line":
        assert "5 of 5 steps are done" in said
    else:
        assert "warning" in said and "ckpt.old.pt is used" in said and "4 of 5 steps" in said
    same(whole, out)
    assert figures(whole) == figures(out)


def test_both_checkpoints_unreadable_are_one_line(five, tmp_path, cli):
    out = tmp_path / "ae"
    shutil.copytree(five[0], out)
    for name in ("ckpt.pt", "ckpt.old.pt"):
        (out / name).write_bytes(b"PK")
    said = cli("train_ae.py", *five[1], "--out", out, code=2)
    assert said.splitlines()[-1].startswith("error: --out") and "ckpt.old.pt" in said


def test_no_step_of_saving_leaves_nothing_whole(tmp_path, monkeypatch):
    """Stop before and after each rename, also when the newest is truncated; save again."""
    real, path = Path.replace, tmp_path / "ckpt.pt"
    def readable():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_checkpoint(path, None, "--out")["step"]
    for broken in (False, True):
        for stop in (0, 1, 2):
            for p in tmp_path.iterdir():
                p.unlink()
            for step in (1, 2):
                save_checkpoint({"kind": "tinyldm ldm", "step": step}, path, keep=True)
            if broken:
                path.write_bytes(path.read_bytes()[:-1])
            calls = iter(range(9))
            def replace(self, target, calls=calls, stop=stop):
                if next(calls) >= stop:
                    raise KeyboardInterrupt
                return real(self, target)
            monkeypatch.setattr(Path, "replace", replace)
            with contextlib.suppress(KeyboardInterrupt):
                save_checkpoint({"kind": "tinyldm ldm", "step": 3}, path, keep=True)
            monkeypatch.setattr(Path, "replace", real)
            assert readable() in ((1, 3) if broken else (2, 3))
            assert not list(tmp_path.glob("*.part"))
            save_checkpoint({"kind": "tinyldm ldm", "step": 4}, path, keep=True)
            assert readable() == 4
            path.unlink()
            assert readable() in (1, 2, 3)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt", "new/x.safetensors"])
def test_an_export_is_written_whole_or_not_at_all(tmp_path, name):
    path, part = tmp_path / name, tmp_path / (name + ".part")
    part.mkdir(parents=True)                            # so that nothing can be written there
    with contextlib.suppress(FileNotFoundError):
        path.write_bytes(b"before")
    with pytest.raises(BadInput, match=f"cannot write .*{path.name}"):
        write_state({"a": torch.ones(3)}, path)
    assert path.read_bytes() == b"before"


# ---- losses that are NaN
def at_call(n, f, spoil):
    """f, whose n-th result (1, 2, ...) is spoiled."""
    calls = iter(range(1, 10 ** 6))
    return lambda *a, **k: spoil(f(*a, **k)) if next(calls) == n else f(*a, **k)


def nan_picture(n):
    def loader(*args):
        for i, batch in enumerate(train_ae_loader(*args), 1):
            if i == n:
                batch["image"][1, 0, 5, 5] = torch.nan
            yield batch
    return loader


train_ae_loader = train_ae.loader
CASES = ["picture", "D_psi", "vq", "ldm", "gradient"]


def spoil(monkeypatch, case, n):
    """Make step n of a run NaN, in one of several ways."""
    if case == "D_psi":                                 # which begins at step 2
        hinge = at_call(n - 1, patchgan.hinge_loss, lambda loss: loss * torch.nan)
        monkeypatch.setattr(patchgan, "hinge_loss", hinge)
    elif case == "ldm":
        loss = at_call(n, train_ldm.ldm_loss, lambda loss: loss * torch.inf)
        monkeypatch.setattr(train_ldm, "ldm_loss", loss)
    elif case == "gradient":                            # of a loss that is finite
        def finite(loss):
            return loss + (loss * 0).sqrt() * (loss > -1)
        monkeypatch.setattr(train_ldm, "ldm_loss", at_call(n, train_ldm.ldm_loss, finite))
    else:
        monkeypatch.setattr(train_ae, "loader", nan_picture(n))


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_nan_changes_nothing(five, tmp_path, cli, monkeypatch, case):
    """Skipped as step 3 of 3, the state is step 2's: of Adam, BatchNorm, EMA and the codes, too;
    without --skip-nan the run stops there, and the same command with it goes on."""
    flags = {"ldm": TINY_LDM, "gradient": TINY_LDM, "vq": TINY_VQ}.get(case, TINY_AE)
    flags = [*flags, *RUN, "--eval-n", 0, "--save-every", 9]
    script, key = ("train_ae.py", "rec") if flags[1] == "8" else ("train_ldm.py", "loss")
    flags += ["--ae", five[0] / "ckpt.pt"] if key == "loss" else []
    cli(script, *flags, "--steps", 2, "--out", tmp_path / "two")
    with monkeypatch.context() as patch:
        spoil(patch, case, 3)
        said = cli(script, *flags, "--steps", 3, "--skip-nan", 1, "--out", tmp_path / "three")
    assert "step 3 is not finite" in said
    two, three = states(tmp_path / "two"), states(tmp_path / "three")
    assert two.pop("step") == 2 and three.pop("step") == 3
    assert_close(two, three, rtol=0, atol=0)
    told = figures(tmp_path / "three")
    assert [x["step"] for x in told] == [1, 2, 3] and key in told[1] and told[2] == {"step": 3}

    with monkeypatch.context() as patch:
        spoil(patch, case, 3)
        said = cli(script, *flags, "--steps", 5, "--out", tmp_path / "stops", code=2)
    assert "error: step 3: loss or gradient is not finite" in said.splitlines()[-1]
    assert all(k in said for k in ("keeps step 2", "--lr", "--skip-nan"))
    same(tmp_path / "two", tmp_path / "stops")
    with monkeypatch.context() as patch:
        spoil(patch, case, 2 if case == "D_psi" else 1)
        cli(script, *flags, "--steps", 5, "--out", tmp_path / "stops", "--skip-nan", 1)
    told = figures(tmp_path / "stops")
    assert [x["step"] for x in told] == [1, 2, 3, 4, 5]
    assert [key in x for x in told] == [True, True, False, True, True]


def test_more_than_skip_nan_steps_stop_the_run_and_means_leave_them_out(tmp_path, cli, monkeypatch):
    flags = [*TINY_AE[:-4], *RUN, "--n-shapes", 40, "--eval-n", 0, "--log-every", 4]
    whole = cli("train_ae.py", *flags, "--steps", 4, "--log-every", 1, "--out", tmp_path / "a")
    assert "not finite" not in whole
    monkeypatch.setattr(train_ae, "loader", nan_picture(4))
    cli("train_ae.py", *flags, "--steps", 4, "--skip-nan", 2, "--out", tmp_path / "b")
    (mean,), each = figures(tmp_path / "b"), figures(tmp_path / "a")
    assert_close(mean["rec"], sum(x["rec"] for x in each[:3]) / 3)
    real = train_ae.losses
    def nan(*args):
        loss, reg, told = real(*args)
        return loss * torch.nan, reg, told
    monkeypatch.setattr(train_ae, "losses", nan)
    flags += ["--steps", 9, "--skip-nan", 2, "--out", tmp_path / "b"]
    assert "error: step 7:" in cli("train_ae.py", *flags, code=2)
    assert load_checkpoint(tmp_path / "b/ckpt.pt", "autoencoder", "--out")["step"] == 6


def test_too_small_pictures_are_one_line_at_the_start(tmp_path, cli):
    for flags, say in ((["--size", 4], "--size: must be at least 16"),
                       (["--size", 16, "--disc-layers", 3], "--disc-layers 3 are too many")):
        said = cli("train_ae.py", *TINY_AE, *flags, "--out", tmp_path / "ae", code=2)
        assert say in said and not (tmp_path / "ae").exists()


# ---- real processes, killed
STEPS = 120
STAGES = {"ae": ["train_ae.py", *TINY_VQ, *RUN, "--steps", STEPS],
          "ldm": ["train_ldm.py", *TINY_LDM, *RUN, "--steps", STEPS]}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(stage, out, *flags) -> a process that trains, without matplotlib: it takes longer."""
    fake = tmp_path_factory.mktemp("fake")
    (fake / "matplotlib.py").write_text("raise ImportError")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{fake}:{ROOT}"}
    def start(stage, out, *flags, **how):
        script, *rest = STAGES[stage]
        return subprocess.Popen(
            [sys.executable, ROOT / script, *map(str, (*rest, *flags)), "--out", out], env=env,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **how)
    return start


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, start):
    """Both stages, run in one go: {stage: folder, flags beside STAGES'}."""
    out, made = tmp_path_factory.mktemp("unbroken"), {}
    for stage in STAGES:
        flags = ["--eval-every", 20] + (["--ae", out / "ae/ckpt.pt"] if stage == "ldm" else [])
        p = start(stage, out / stage, *flags)
        assert p.wait(600) == 0, p.stderr.read()
        made[stage] = out / stage, flags
    return made


def size(path):
    return path.stat().st_size if path.exists() else 0


def wait_for(p, moment, out, rng):
    """Let the process p run until a random moment of a kind: while it starts, trains or saves."""
    log, part = out / "log.jsonl", out / "ckpt.pt.part"
    def file():
        return log.stat().st_ino if log.exists() else None
    def step():
        with contextlib.suppress(ValueError, IndexError):           # half a line, or none yet
            return lines(out)[-1]["step"]
        return 0
    before = file()
    if moment == "starting":
        return time.sleep(rng.uniform(0, 4))
    while p.poll() is None and file() == before:                    # which a resumed run replaces
        time.sleep(0.01)
    goal = step() + rng.randrange(1, 16)
    while p.poll() is None and step() < goal:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05))
    while moment in ("saving", "renaming") and p.poll() is None and not part.exists():
        pass
    while moment == "renaming" and p.poll() is None and 0 < size(part) < size(out / "ckpt.pt"):
        pass                                                        # until the part is written


def check_files(out, seen):
    """After a kill: what is there can be read, the log reaches as far as the checkpoint."""
    seen["while a part was being written"] += (out / "ckpt.pt.part").exists()
    seen["in the middle of a log line"] += size(out / "log.jsonl") > 0 and (
        not (out / "log.jsonl").read_text().endswith("\n"))
    paths = [p for p in (out / "ckpt.pt", out / "ckpt.old.pt", out / "model.pt") if p.exists()]
    for path in paths:
        load_checkpoint(path, None, "--out")
    if paths and paths != [out / "model.pt"]:
        seen["between the two renames"] += not (out / "ckpt.pt").exists()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = load_checkpoint(out / "ckpt.pt", None, "--out")["step"]
        text = (out / "log.jsonl").read_text().split("\n")[:-1]
        assert len(text) >= step
        return step
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("every,kills,how", [
    (1, 6, signal.SIGKILL), (7, 5, signal.SIGKILL), (50, 3, signal.SIGTERM)])
def test_killed_runs_end_as_the_unbroken_one(unbroken, start, tmp_path, stage, every, kills, how):
    whole, flags = unbroken[stage]
    out, flags, seen, steps = tmp_path / stage, [*flags, "--save-every", every], Counter(), []
    rng, since = random.Random(every), time.time()
    moments = ["training", "saving", "starting", "renaming"] if how == signal.SIGKILL else [""]
    for i in range(kills):
        p = start(stage, out, *flags)
        wait_for(p, moments[i % len(moments)], out, rng)
        assert p.poll() is None, p.stderr.read()
        p.send_signal(how)
        said = p.communicate(timeout=120)[1]
        assert "Traceback" not in said
        assert p.returncode == (-how if how == signal.SIGKILL else 0), said
        steps.append(check_files(out, seen))
    p = start(stage, out, *flags)
    said = p.communicate(timeout=600)[1]
    assert p.returncode == 0, said
    same(whole, out)
    assert figures(whole) == figures(out)
    trained = [x["step"] for x in lines(out) if "ms" in x]
    assert trained == list(range(1, STEPS + 1)) and not list(out.glob("*.part"))
    if stage == "ldm":
        a, b = (load_checkpoint(k / "model.pt", "ldm", "--ckpt") for k in (whole, out))
        assert_close([a["ae"], a["ema"]], [b["ae"], b["ema"]], rtol=0, atol=0)
    print(f"\n{stage}, --save-every {every}: {kills} {how.name}s, went on from steps {steps}; "
          f"{dict(seen)}; {time.time() - since:.0f} s")


@pytest.mark.slow
def test_killed_between_the_last_checkpoint_and_the_end(unbroken, start, tmp_path):
    """In the last evaluation, or before model.pt or the checkpoint: the same command makes all."""
    whole, flags = unbroken["ldm"]
    for gone in ("evaluation", "model.pt is older", "ckpt.pt"):
        out = tmp_path / gone
        p = start("ldm", out, *flags, "--save-every", STEPS - 5)
        while not (out / "ckpt.pt").exists():
            time.sleep(0.01)
        if gone == "evaluation":
            while not (out / "ckpt.old.pt").exists():
                assert p.poll() is None
            last = load_checkpoint(out / "ckpt.old.pt", "ldm", "--out")["step"]
            assert last == STEPS - 5
        elif gone == "ckpt.pt":
            while not (out / "model.pt").exists():
                assert p.poll() is None
        p.kill()
        p.communicate()
        print(f"\nkilled, {gone}: {sorted(x.name for x in out.iterdir() if x.suffix == '.pt')}")
        p = start("ldm", out, *flags, "--save-every", STEPS - 5)
        said = p.communicate(timeout=600)[1]
        assert p.returncode == 0, said
        same(whole, out)
        assert figures(whole) == figures(out)
        load_checkpoint(out / "model.pt", "ldm", "--ckpt")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_is_one_line_and_costs_nothing(unbroken, start, tmp_path, stage):
    """Files may grow to so many bytes: then writing fails as on a full disk."""
    whole, flags = unbroken[stage]
    out, flags, ckpt = tmp_path / "out", [*flags, "--save-every", 20], size(whole / "ckpt.pt")
    for limit, name in ((ckpt - 1, "ckpt.pt"), (4000, ".jsonl")):
        wait_for(p := start(stage, out, *flags), "training", out, random.Random(limit))
        p.send_signal(signal.SIGTERM)                       # some steps with room
        assert p.wait(60) == 0
        before = (out / "ckpt.pt").read_bytes()
        p = start(stage, out, *flags, preexec_fn=lambda limit=limit: resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, limit)))
        said = p.communicate(timeout=120)[1]
        assert p.returncode == 2 and "Traceback" not in said, said
        last = said.strip().splitlines()[-1]
        assert last.startswith("error: ") and name in last and "File too large" in last, last
        assert (out / "ckpt.pt").read_bytes() == before and not list(out.glob("*.part"))
        print(f"\n{stage}, at most {limit} bytes of {ckpt}: {last}")
    p = start(stage, out, *flags)
    assert p.communicate(timeout=600) and p.returncode == 0
    same(whole, out)
    assert figures(whole) == figures(out)


@pytest.mark.slow
def test_processes_skip_together(unbroken, tmp_path):
    """A loss that is NaN in one of two processes: both skip the step, none waits for the other."""
    script = tmp_path / "spoiled.py"
    script.write_text(f"""import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import train_ldm, torch
from test_endurance import at_call
if os.environ["RANK"] == "1":
    train_ldm.ldm_loss = at_call(3, train_ldm.ldm_loss, lambda loss: loss * torch.nan)
train_ldm.tr.run(train_ldm.main, train_ldm.parse_args)
""")
    flags = [*STAGES["ldm"][1:], *unbroken["ldm"][1], "--eval-n", 0, "--steps", 5]
    for skip, code in ((1, 0), (0, 1)):                     # torchrun's own code for a failure is 1
        p = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             script, *map(str, flags), "--skip-nan", str(skip), "--out", tmp_path / str(skip)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=300)
        assert p.returncode == code, p.stderr
    step = [load_checkpoint(tmp_path / k / "ckpt.pt", "ldm", "--out")["step"] for k in "10"]
    assert step == [5, 2]
    told = figures(tmp_path / "1")
    assert told[2] == {"step": 3} and "loss" in told[3]
