"""Two processes (gloo, on the CPU) train as one does: same losses, same weights, same files."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_AE, TINY_LDM

STEPS = ["--size", 16, "--log-every", 1, "--eval-n", 0, "--batch", 8]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(script, name, processes, *flags) -> OUT, of a run with 20 steps unless flags say less."""
    out = tmp_path_factory.mktemp("out")

    def run(script, name, world, *flags):
        way = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world]
        tiny = TINY_AE if script == "train_ae.py" else [*TINY_LDM, "--ae", out / "ae/ckpt.pt"]
        command = [sys.executable, *(way if world > 1 else ()), ROOT / script, *tiny, *STEPS,
                   "--steps", 20, "--out", out / name, *flags]
        p = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300,
                           env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
        assert p.returncode == 0, p.stderr
        return out / name
    run("train_ae.py", "ae", 1, "--steps", 2)
    return run


def told(out):
    """{step: figures} of log.jsonl, but for times and memory."""
    rows = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [*range(1, 21)]
    odd = ("ms", "img_per_s", "gb", "eta_min", "z_std")         # of which a process sees its own
    return [{k: v for k, v in r.items() if k not in odd} for r in rows]


def same(a, b):
    for x, y in zip(told(a), told(b)):
        assert x == pytest.approx(y, rel=1e-5, abs=1e-5), x["step"]


def weights(out):
    ckpt = torch.load(out / "ckpt.pt", weights_only=True)
    return {k: ckpt[k] for k in ("nets", "opt", "opts", "ema") if k in ckpt}


def test_stage_one_with_d_psi(run):
    """NB: on a CPU BatchNorm is not synchronised, so one process must take the same parts, too."""
    one = run("train_ae.py", "one", 1, "--micro-batch", 4, "--disc-start", 5)
    two = run("train_ae.py", "two", 2, "--disc-start", 5)
    same(one, two)
    assert "lam" in told(two)[-1] and "lam" not in told(two)[4]


@pytest.fixture(scope="module")
def alone(run):
    return run("train_ldm.py", "alone", 1)


def test_stage_two(run, alone):
    same(alone, run("train_ldm.py", "both", 2, "--micro-batch", 2))


def test_stage_two_in_parts(run, alone):
    """FSDP: the losses, and every tensor of the checkpoint, whole, with the same names."""
    parts = run("train_ldm.py", "parts", 2, "--fsdp", "--micro-batch", 2)
    same(alone, parts)
    torch.testing.assert_close(weights(parts), weights(alone), rtol=1e-3, atol=1e-4)
    sizes = [p.stat().st_size for p in (parts / "model.pt", alone / "model.pt")]
    assert abs(sizes[0] - sizes[1]) < 5000


@pytest.mark.parametrize("first,then", [
    pytest.param((2, "--fsdp"), (1,)), pytest.param((1,), (2, "--fsdp"), marks=pytest.mark.slow),
    pytest.param((2,), (1,), marks=pytest.mark.slow)], ids=str)
def test_checkpoints_are_interchangeable(run, first, then):
    """7 steps in one way, the rest in another; the lr must not know of the first --steps."""
    name = f"{first}{then}"
    out = run("train_ldm.py", name, *first, "--steps", 7, "--no-cosine")
    straight = run("train_ldm.py", "straight", 1, "--no-cosine")
    run("train_ldm.py", name, *then, "--no-cosine")
    same(straight, out)


@pytest.mark.slow
def test_a_model_in_parts_is_judged(run):
    """The pictures and figures that show progress come from the gathered average."""
    flags = ["--steps", 20, "--eval-n", 4, "--log-every", 20, "--eval-every", 20]
    a = run("train_ldm.py", "shown", 2, "--fsdp", *flags)
    b = run("train_ldm.py", "seen", 1, *flags)
    figures = [json.loads((p / "log.jsonl").read_text().splitlines()[-1]) for p in (a, b)]
    assert "held_out_loss_at_0" in figures[0]
    loss = [[v for k, v in f.items() if k.startswith("held_out")] for f in figures]
    assert loss[0] == pytest.approx(loss[1], rel=1e-3)
