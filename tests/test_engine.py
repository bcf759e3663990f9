"""engine/: learning rate, EMA, seeds, flags from dataclasses, devices, exit codes."""
import argparse
import re
from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

import sample
import train_ae
import train_ldm
from tinyldm.config import option
from tinyldm.engine import flags
from tinyldm.engine.command import run
from tinyldm.engine.optimiser import EMA, learning_rate
from tinyldm.engine.processes import setup
from tinyldm.errors import BadInput, naming, require, trying
from tinyldm.seeds import generator

# ---- optimiser.py


def test_ema_is_the_weighted_sum_and_warms_up():
    """The decay of update n is min(0.99, (1 + n) / (10 + n)); unrolled by hand in float64."""
    net = torch.nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = EMA({"net": net}, 0.99)
    expected = 0.0
    for n in range(1, 2001):
        net.weight.data.fill_(float(n % 7))
        ema.update()
        decay = min(0.99, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n % 7)
    assert_close(ema.nets["net"].weight.item(), expected, rtol=1e-4, atol=0)
    assert net.weight.item() == 2000 % 7


def test_the_learning_rate_warms_up_and_falls():
    def flat(step):
        return learning_rate(step, lr=2.0, warmup=10, steps=100, cosine=False)

    def falling(step):
        return learning_rate(step, lr=2.0, warmup=10, steps=100, cosine=True)

    assert flat(1) == 0.2
    assert flat(10) == flat(100) == 2.0
    assert_close(falling(51), 1.0)
    assert falling(100) < 0.001


# ---- seeds.py

def test_seeds_differ_by_seed_and_index_and_repeat():
    numbers = set()
    for seed in (0, 1):
        for index in (0, 1, 2):
            numbers.add(tuple(torch.randn(3, generator=generator(seed, index)).tolist()))
    assert len(numbers) == 6
    again = torch.randn(3, generator=generator(1, 2))
    assert tuple(again.tolist()) in numbers


# ---- flags.py

@dataclass(frozen=True)
class Shape:
    """A made-up config with a field of each kind."""

    side: int = 7
    width: int = option(3, "width of it")
    mult: tuple[int, ...] = option((1, 2), "multiples of the width")
    ends: tuple[float, float] | tuple[()] = option((), "first and last value")
    heads: int | None = option(None, "number of heads", flag="--text-heads")
    deep: bool = option(False, "make it deep")
    kind: str = option("a", "kind of it", choices=["a", "b"])


def parse_shape(*argv: str) -> Shape:
    parser = flags.new_parser("A program.")
    flags.add_config_flags(parser, Shape, "shape")
    values = vars(parser.parse_args(argv))
    return Shape(**flags.config_values(Shape, values))


def test_every_option_of_a_dataclass_is_a_flag():
    assert parse_shape() == Shape()
    given = ["--width", "5", "--mult", "1", "4", "--ends", ".1", ".2", "--text-heads", "8"]
    shape = parse_shape(*given, "--deep", "--kind", "b")
    assert shape == Shape(7, 5, (1, 4), (0.1, 0.2), 8, True, "b")
    assert parse_shape("--no-deep", "--mult") == Shape(mult=())


@pytest.mark.parametrize("argv", [
    ["--side", "3"], ["--kind", "c"], ["--ends", "1"], ["--heads", "2"],
])
def test_what_is_no_option_is_no_flag(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_shape(*argv)
    assert argv[0] in capsys.readouterr().err


def test_a_given_flag_wins_over_the_preset():
    def parse(*argv):
        parser = flags.new_parser("A program.")
        parser.add_argument("--ch", type=int)
        return flags.parse(parser, {"toy": {"ch": 16}, "big": {"ch": 128}}, argv).ch

    assert parse() == 16
    assert parse("--preset", "big") == 128
    assert parse("--ch", "3", "--preset", "big") == 3


@pytest.mark.parametrize("script", [train_ae, train_ldm, sample], ids=lambda m: m.__name__)
def test_help_begins_with_the_docstring_and_explains_every_flag(script, capsys):
    """Each flag has a help text: some words that begin in lower case and end without a stop."""
    with pytest.raises(SystemExit, match="0"):
        script.parse_args(["--help"])
    text = capsys.readouterr().out
    assert script.__doc__.splitlines()[0] in text
    entries = re.split(r"\n  (?=-|prompt)", text)[1:]
    assert len(entries) > 20
    for entry in entries:
        words = entry.split("\n\n")[0].split()
        assert len(words) >= 4, entry
        assert not words[-1].endswith("."), entry


def training_flags(**changed) -> argparse.Namespace:
    values = {
        "batch": 4, "micro_batch": None, "save_every": 1, "eval_every": 1, "log_every": 1,
        "size": 16,
    }
    return argparse.Namespace(**values | changed)


@pytest.mark.parametrize("batch,micro_batch,world,message", [
    (7, None, 2, "--batch 7"),
    (0, None, 1, "--batch 0"),
    (8, 3, 2, "--micro-batch 3"),
    (8, 8, 2, "--micro-batch 8"),
])
def test_batches_that_cannot_be_shared_are_bad_input(batch, micro_batch, world, message):
    args = training_flags(batch=batch, micro_batch=micro_batch)
    with pytest.raises(BadInput, match=message):
        flags.check_training_flags(args, world)


@pytest.mark.parametrize("name,value", [
    ("save_every", 0), ("eval_every", 0), ("log_every", 0), ("size", 15),
])
def test_intervals_of_0_and_tiny_images_are_bad_input(name, value):
    assert flags.check_training_flags(training_flags(micro_batch=2), 1) == 2
    with pytest.raises(BadInput, match="--" + name.replace("_", "-")):
        flags.check_training_flags(training_flags(**{name: value}), 1)


# ---- processes.py, command.py, errors.py

def test_devices_that_are_not_there_are_bad_input():
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device: cuda.*no CUDA"):
            setup("cuda", "auto")
    with pytest.raises(BadInput, match="--device: dog"):
        setup("dog", "auto")


@pytest.mark.parametrize("error,line", [
    (BadInput("a.png: it is no image"), "error: a.png: it is no image"),
    (FileNotFoundError(2, "No such file", "x/y.png"), "error: x/y.png: cannot be written: No such"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore"),
     "Tried to allocate 3 GiB. Try a smaller --batch"),
], ids=lambda v: type(v).__name__)
def test_an_expected_error_is_one_line_and_exit_code_2(error, line, capsys):
    def main(args):
        raise error

    with pytest.raises(SystemExit, match="2"):
        run(main, argparse.Namespace)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert line in printed[0]


def test_an_unexpected_error_keeps_its_traceback():
    def main(args):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run(main, argparse.Namespace)


def test_errors_say_where_and_why_in_one_line():
    with pytest.raises(BadInput, match="^--ae: a.pt: cannot be read: two words$"):
        with naming("--ae"), trying("a.pt: cannot be read"):
            raise ValueError("two\n  words")
    with pytest.raises(BadInput, match="^a.pt: cannot be read: KeyError$"):
        with trying("a.pt: cannot be read"):
            raise KeyError()
    with pytest.raises(BadInput, match="^kept as it is$"):
        with trying("a.pt: cannot be read"):
            require(False, "kept as it is")
