"""training.py: EMA, learning rate, seeds, batches and flags."""
import argparse

import pytest
import torch
from torch.testing import assert_close

from tinyldm import BadInput, training as tr

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
    assert_close(ema.nets["net"].weight.item(), want, rtol=1e-4, atol=0)
    assert net.weight.item() == 2000 % 7


def test_learning_rate_warms_up_and_falls():
    flat, fall = (argparse.Namespace(lr=2.0, warmup=10, steps=100, cosine=c) for c in (False, True))
    assert tr.lr_at(1, flat) == 0.2 and tr.lr_at(10, flat) == tr.lr_at(100, flat) == 2.0
    assert_close(tr.lr_at(51, fall), 1.0)
    assert tr.lr_at(100, fall) < 0.001


def test_step_seeds_differ_by_step_and_seed_and_repeat():
    draws = [torch.randn(3, generator=tr.generator(s, i)) for s in (0, 1) for i in (0, 1, 2)]
    assert len({tuple(d.tolist()) for d in draws}) == 6
    assert (torch.randn(3, generator=tr.generator(1, 2)) == draws[5]).all()


def flags(**changed):
    least = dict(batch=4, micro_batch=None, save_every=1, eval_every=1, log_every=1, size=16)
    return argparse.Namespace(**least | changed)


@pytest.mark.parametrize("batch,micro,world,say", [
    (7, None, 2, "--batch 7"), (0, None, 1, "--batch 0"),
    (8, 3, 2, "--micro-batch 3"), (8, 8, 2, "--micro-batch 8")])
def test_batches_that_cannot_be_split_are_bad_input(batch, micro, world, say):
    with pytest.raises(BadInput, match=say):
        tr.check(flags(batch=batch, micro_batch=micro), world)


@pytest.mark.parametrize("flag,value", [
    ("save_every", 0), ("eval_every", 0), ("log_every", 0), ("size", 15)])
def test_intervals_of_0_and_tiny_pictures_are_bad_input(flag, value):
    assert tr.check(flags(micro_batch=2), 1) == 2
    with pytest.raises(BadInput, match="--" + flag.replace("_", "-")):
        tr.check(flags(**{flag: value}), 1)


def test_flags_win_over_the_preset():
    def parse(*argv):
        p = argparse.ArgumentParser(allow_abbrev=False)
        p.add_argument("--ch", type=int)
        return tr.parse(p, {"toy": {"ch": 16}, "big": {"ch": 128}}, argv).ch
    assert parse() == 16 and parse("--preset", "big") == 128
    assert parse("--ch", "3", "--preset", "big") == 3


def test_cuda_without_cuda_is_bad_input():
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device cuda.*no CUDA"):
            tr.setup("cuda", "auto")
    with pytest.raises(BadInput, match="--device dog"):
        tr.setup("dog", "auto")


def test_memory_that_is_out_is_one_line(capsys):
    def main(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")
    with pytest.raises(SystemExit, match="2"):
        tr.run(main, list)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "Tried to allocate 3 GiB. Try a smaller --batch" in said[0]
