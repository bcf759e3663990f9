"""training.py: EMA, learning rate, seeds, and checkpoints that are never half-written nor run code."""
import argparse
import os
import pickle

import pytest
import torch
from torch.testing import assert_close

from tinyldm import BadInput
from tinyldm import training as tr


def test_ema_is_the_weighted_sum_and_warms_up():
    """Decay min(.99, (1 + n) / (10 + n)) after n updates, unrolled by hand in float64."""
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema, want = tr.EMA({"net": net}, 0.99), 0.0
    for n in range(1, 2001):
        net.weight.data.fill_(float(n % 7))
        ema.update()
        decay = min(0.99, (1 + n) / (10 + n))
        want = decay * want + (1 - decay) * (n % 7)
    assert_close(ema.shadow["net"]["weight"].item(), want, rtol=1e-4, atol=0)
    with ema.swapped():
        assert_close(net.weight.item(), want, rtol=1e-4, atol=0)
    assert net.weight.item() == 2000 % 7


def test_learning_rate_warms_up_and_falls():
    assert tr.lr_at(0, 1.0, 10, 100, cosine=False) == 0.1
    assert tr.lr_at(50, 1.0, 10, 100, cosine=False) == 1.0
    assert_close(tr.lr_at(50, 1.0, 10, 100, cosine=True), 0.5)
    assert tr.lr_at(99, 1.0, 10, 100, cosine=True) < 0.001


def test_step_seeds_differ_by_step_and_seed_and_repeat():
    draws = [torch.randn(3, generator=tr.generator(s, i)) for s in (0, 1) for i in (0, 1, 2)]
    assert len({tuple(d.tolist()) for d in draws}) == 6
    assert (torch.randn(3, generator=tr.generator(1, 2)) == draws[5]).all()


def good(path, kind="autoencoder"):
    tr.save_checkpoint({"kind": f"tinyldm {kind}", "x": torch.arange(1000)}, path)
    return path


def test_a_checkpoint_comes_back(tmp_path):
    path = good(tmp_path / "new" / "ckpt.pt")
    assert_close(tr.load_checkpoint(path, "autoencoder", "--ae")["x"], torch.arange(1000))
    assert os.listdir(path.parent) == ["ckpt.pt"]


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = good(tmp_path / "ckpt.pt")
    def half(ckpt, f):
        f.write(b"half a file")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(BadInput, match="No space"):
        good(path)
    assert_close(tr.load_checkpoint(path, "autoencoder", "--ae")["x"], torch.arange(1000))


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    if zipped:
        torch.save({"kind": "tinyldm ldm", "x": Evil()}, "evil.pt")
    else:
        with open("evil.pt", "wb") as f:
            pickle.dump({"kind": "tinyldm ldm", "x": Evil()}, f)
    with pytest.raises(BadInput, match="refused.*run code"):
        tr.load_checkpoint("evil.pt", "ldm", "--ckpt")
    assert not os.path.exists("pwned")


def test_truncated_foreign_and_missing_checkpoints_are_bad_input(tmp_path):
    path = good(tmp_path / "ckpt.pt")
    data = path.read_bytes()
    for n in (0, 1, 10, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises(BadInput, match="--ae .*ckpt.pt"):
            tr.load_checkpoint(path, "autoencoder", "--ae")
    torch.save({"state_dict": {}}, path)
    with pytest.raises(BadInput, match="not a checkpoint of tinyldm"):
        tr.load_checkpoint(path, "autoencoder", "--ae")
    torch.save(torch.zeros(3), path)
    with pytest.raises(BadInput, match="not a checkpoint of tinyldm"):
        tr.load_checkpoint(path, "autoencoder", "--ae")
    with pytest.raises(BadInput, match="No such file"):
        tr.load_checkpoint(tmp_path / "gone.pt", "ldm", "--ckpt")
    with pytest.raises(BadInput, match="holds a autoencoder|holds an autoencoder"):
        tr.load_checkpoint(good(path), "ldm", "--ckpt")


def test_a_changed_architecture_is_named():
    with pytest.raises(BadInput, match="unet ch = 64, now it is 32"):
        tr.same_config({"unet": {"ch": 64}}, {"unet": {"ch": 32}}, "out/ckpt.pt")
    tr.same_config({"unet": {"ch_mult": (1, 2)}}, {"unet": {"ch_mult": (1, 2)}}, "out/ckpt.pt")


def test_non_finite_values_stop_the_run(tmp_path):
    tr.check_finite(torch.tensor(1.0), 7, tmp_path)
    for v in ("nan", "inf"):
        with pytest.raises(BadInput, match="step 7.*last good"):
            tr.check_finite(torch.tensor(float(v)), 7, tmp_path)


@pytest.mark.parametrize("batch,micro,world,say", [(7, None, 2, "--batch 7"), (0, None, 1, "--batch 0"),
                                                   (8, 3, 2, "--micro-batch 3"), (8, 8, 2, "--micro-batch 8")])
def test_batches_that_cannot_be_split_are_bad_input(batch, micro, world, say):
    with pytest.raises(BadInput, match=say):
        tr.check_batch(argparse.Namespace(batch=batch, micro_batch=micro), world)


def test_flags_win_over_the_preset():
    def parse(*argv):
        p = argparse.ArgumentParser(allow_abbrev=False)
        p.add_argument("--ch", type=int)
        return tr.parse(p, {"toy": {"ch": 16}, "big": {"ch": 128}}, argv).ch
    assert (parse(), parse("--preset", "big"), parse("--ch", "3", "--preset", "big")) == (16, 128, 3)


def test_cuda_without_cuda_is_bad_input():
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device cuda.*no CUDA"):
            tr.setup("cuda", "auto")
    with pytest.raises(BadInput, match="--device dog"):
        tr.setup("dog", "auto")
