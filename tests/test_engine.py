"""The engine of training runs: flags, learning rate, EMA, seeds, processes, errors, the log."""
import dataclasses
import importlib
import os
import re
import signal
import warnings
from argparse import Namespace
from dataclasses import dataclass

import pytest
import torch
from conftest import signal_handlers_kept
from runs import log_rows
from torch import nn
from torch.testing import assert_close

from tinyldm.autoencoder import AEConfig
from tinyldm.conditioning import TextConfig
from tinyldm.config import option
from tinyldm.diffusion import DiffusionConfig
from tinyldm.engine import flags
from tinyldm.engine.command import run
from tinyldm.engine.log import Log, StopOnSignal, add_weighted
from tinyldm.engine.optimiser import EMA, learning_rate
from tinyldm.engine.processes import Machine, micro_batches, setup
from tinyldm.errors import BadInput, naming, require, trying
from tinyldm.losses import LossConfig
from tinyldm.patchgan import DiscriminatorConfig
from tinyldm.seeds import generator
from tinyldm.unet import UNetConfig

CONFIGS = [
    AEConfig, DiffusionConfig, DiscriminatorConfig, LossConfig, TextConfig, UNetConfig,
]
PROGRAMS = ["train_ae", "train_ldm", "sample", "tinyldm.metrics.__main__"]


# ---- optimiser

def test_ema_is_the_weighted_sum_and_warms_up():
    """The decay of update n is min(0.99, (1 + n) / (10 + n)); here it is unrolled in float64."""
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = EMA({"net": net}, 0.99)
    average = ema.nets["net"].weight
    expected = 0.0
    for n in range(1, 1201):
        net.weight.data.fill_(float(n % 7))
        ema.update()
        decay = min(0.99, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n % 7)
        assert abs(average.item() - expected) < 1e-4 * expected
    assert net.weight.item() == 1200 % 7


def test_the_learning_rate_warms_up_and_falls():
    def rate(step, cosine):
        return learning_rate(step, lr=2.0, warmup=10, steps=100, cosine=cosine)

    assert rate(1, False) == 0.2
    assert rate(10, False) == rate(100, False) == 2.0
    assert_close(rate(51, True), 1.0)
    assert rate(100, True) < 0.001
    assert learning_rate(1, lr=2.0, warmup=0, steps=100, cosine=False) == 2.0


# ---- seeds

def test_seeds_differ_by_seed_and_index_and_repeat():
    pairs = [(seed, index) for seed in (0, 1) for index in (0, 1, 2)]
    noises = [torch.randn(3, generator=generator(*pair)) for pair in pairs]
    assert len({tuple(noise.tolist()) for noise in noises}) == 6
    assert torch.equal(torch.randn(3, generator=generator(1, 2)), noises[5])


# ---- flags of hyperparameters

@dataclass(frozen=True)
class MadeUp:
    """Options of each type that a hyperparameter may have."""

    inner: int = 7
    width: int = option(3, "width of the layers")
    rate: float | None = option(None, "rate of change")
    sides: tuple[int, ...] = option((1, 2), "sides of the maps")
    ends: tuple[float, float] | tuple[()] = option((), "both ends")
    wide: bool = option(False, "widen the layers")
    kind: str = option("a", "kind of layer", choices={"a": 1, "b": 2})
    n_x: int = option(0, "number of x", flag="--x-number")


def parse_made_up(*argv: str) -> MadeUp:
    parser = flags.new_parser("A program.")
    flags.add_config_flags(parser, MadeUp, "group")
    values = vars(parser.parse_args(argv))
    return MadeUp(**flags.config_values(MadeUp, values))


def test_without_flags_a_config_has_its_defaults():
    assert parse_made_up() == MadeUp()


def test_flags_of_each_type_fill_a_config():
    given = "--width 5 --rate 0.5 --sides 4 8 16 --ends 1 2 --wide --kind b --x-number 9"
    found = parse_made_up(*given.split())
    assert found == MadeUp(7, 5, 0.5, (4, 8, 16), (1.0, 2.0), True, "b", 9)
    assert parse_made_up("--wide", "--no-wide", "--sides").sides == ()


@pytest.mark.parametrize("argv", [
    ["--inner", "3"],               # no option
    ["--n-x", "3"],                 # has another name
    ["--kind", "c"],
    ["--width", "wide"],
    ["--wid", "3"],                 # no abbreviations
])
def test_what_is_no_option_is_no_flag(argv):
    with pytest.raises(SystemExit, match="2"):
        parse_made_up(*argv)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_of_a_dataclass_is_a_flag(config):
    parser = flags.new_parser("A program.")
    flags.add_config_flags(parser, config, "group")
    values = flags.config_values(config, vars(parser.parse_args([])))
    defaults = {field.name: field.default for field in flags.option_fields(config)}
    assert values == defaults
    assert dataclasses.replace(config(), **values) == config()


def test_a_given_flag_wins_over_the_preset():
    presets = {"toy": {"ch": 16, "size": 32}, "big": {"ch": 128, "size": 256}}

    def parsed(*argv):
        parser = flags.new_parser("A program.")
        parser.add_argument("--ch", type=int, help="width")
        return flags.parse(parser, presets, argv).ch

    assert parsed() == 16
    assert parsed("--preset", "big") == 128
    assert parsed("--ch", "3", "--preset", "big") == 3


# ---- flags of training runs

def training_flags(**changed):
    least = {"batch": 4, "micro_batch": None}
    return Namespace(**least | changed)


@pytest.mark.parametrize("batch,micro_batch,world,n_micro", [
    (4, None, 1, 1),
    (4, 2, 1, 2),
    (8, 2, 2, 2),
])
def test_a_batch_is_shared_by_processes_and_split_into_micro_batches(
    batch, micro_batch, world, n_micro
):
    args = training_flags(batch=batch, micro_batch=micro_batch)
    assert flags.check_training_flags(args, world) == n_micro


@pytest.mark.parametrize("batch,micro_batch,world,message", [
    (7, None, 2, "--batch 7"),
    (8, 3, 2, "--micro-batch 3"),
    (8, 8, 2, "--micro-batch 8"),
])
def test_batches_that_cannot_be_shared_are_bad_input(batch, micro_batch, world, message):
    with pytest.raises(BadInput, match=message):
        flags.check_training_flags(training_flags(batch=batch, micro_batch=micro_batch), world)


# ---- help

@pytest.fixture(params=PROGRAMS)
def parser(request, monkeypatch, capsys):
    """The parser of each program in turn."""
    parsers = []

    def remembered(doc):
        parsers.append(new_parser(doc))
        return parsers[-1]

    module = importlib.import_module(request.param)
    new_parser = flags.new_parser
    for place in (flags, module):
        if hasattr(place, "new_parser"):
            monkeypatch.setattr(place, "new_parser", remembered)
    with pytest.raises(SystemExit, match="0"):
        module.parse_args(["--help"])
    parser, = parsers
    assert module.__doc__.splitlines()[0] in capsys.readouterr().out
    return parser


def test_help_lists_each_flag_once(parser):
    text = parser.format_help()
    listed = re.findall(r"^  (?:-h, )?(--[\w-]+)", text, re.M)
    assert len(listed) == len(set(listed))
    for action in parser._actions:
        if action.option_strings:
            assert len({*action.option_strings} & set(listed)) == 1


def test_help_explains_every_flag_in_one_plain_phrase(parser):
    """It says on its own what the flag is: it does not continue the help of another flag."""
    for action in parser._actions:
        text = action.help or ""
        assert len(text.split()) >= 2, action.dest
        assert len(text) < 450, action.dest
        first_word = text.split()[0].strip(",;:")
        assert first_word not in ("of", "and", "or", "as", "with", "by"), text
        assert not text.endswith((".", ",", ";")), text
        assert not text[0].isspace(), text


# ---- processes

@pytest.mark.parametrize("device,message", [
    ("cuda", "--device: cuda: there is no CUDA"),
    ("dog", "--device: dog: no such device"),
])
def test_a_device_that_is_not_there_is_bad_input(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match=message):
        setup(device, "auto")


def test_alone_on_a_cpu_this_is_the_main_process_in_fp32_unless_bf16_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine = setup("auto", "auto")
    assert machine == Machine(torch.device("cpu"), bf16=False, rank=0, world=1)
    assert machine.main
    a = torch.ones(2, 2)
    with machine.autocast():
        assert (a @ a).dtype == torch.float32
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with setup("cpu", "bf16").autocast():
        assert (a @ a).dtype == torch.bfloat16


def test_a_processor_without_bf16_is_told_of(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.warns(UserWarning, match="--dtype bf16: this processor has no arithmetic for it"):
        setup("cpu", "bf16")


def test_processes_take_their_rows_of_every_tensor():
    a = torch.arange(6)
    b = torch.arange(12).view(6, 2)
    parts = [Machine(torch.device("cpu"), False, rank, 3).shard(a, b) for rank in range(3)]
    for rank, (a_part, b_part) in enumerate(parts):
        assert a_part.tolist() == [2 * rank, 2 * rank + 1]
        assert torch.equal(b_part, b[2 * rank:2 * rank + 2])


def test_micro_batches_are_parts_of_the_batch_and_gradients_are_exchanged_at_the_last():
    net = nn.Linear(1, 1)
    a = torch.arange(6)
    seen = []
    for a_i, b_i in micro_batches(3, (a, 10 * a), [net]):
        seen.append((a_i.tolist(), b_i.tolist(), net.require_backward_grad_sync))
    assert seen == [
        ([0, 1], [0, 10], False),
        ([2, 3], [20, 30], False),
        ([4, 5], [40, 50], True),
    ]


def test_figures_of_micro_batches_add_up_to_those_of_the_batch():
    sums = {}
    for value in (1.0, 2.0, 6.0):
        add_weighted(sums, {"loss": torch.tensor(value)}, 1 / 3)
    assert_close(sums["loss"], torch.tensor(3.0))


# ---- errors

def test_trying_makes_one_line_of_any_error_and_leaves_bad_input_alone():
    with pytest.raises(BadInput, match=r"^file: it is bad$"):
        with trying("file"):
            raise RuntimeError("it\n  is bad")
    with pytest.raises(BadInput, match=r"^file: KeyError|^file: 'x'$"):
        with trying("file"):
            raise KeyError("x")
    with pytest.raises(BadInput, match=r"^file: StopIteration$"):
        with trying("file"):
            raise StopIteration
    with pytest.raises(BadInput, match=r"^as it is$"):
        with trying("file"):
            raise BadInput("as it is")
    with pytest.raises(BadInput, match=r"^file: No such file or directory$"):
        with trying("file"), open("/no/such/file"):
            pass


def test_naming_puts_a_flag_before_bad_input_and_leaves_other_errors_alone():
    with pytest.raises(BadInput, match=r"^--ae: file: gone$"):
        with naming("--ae"):
            require(False, "file: gone")
    with pytest.raises(KeyError):
        with naming("--ae"):
            raise KeyError("x")
    with naming("--ae"):
        require(True, "all is well")


@pytest.fixture
def warnings_kept(monkeypatch):
    """A program prints warnings in its own way; put Python's way back afterwards."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def test_a_program_prints_each_warning_once_and_a_second_run_again(capsys, warnings_kept):
    """Python would print it for each line of code that gives it, or each time."""
    def main(args):
        warnings.simplefilter("always")
        for words in ("unknown: 'a'", "unknown: 'b'", "unknown: 'a'"):
            warnings.warn(words, stacklevel=1)

    for _ in range(2):
        with warnings.catch_warnings():
            run(main, Namespace)
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["warning: unknown: 'a'", "warning: unknown: 'b'"]


@pytest.mark.parametrize("error,line", [
    (BadInput("--x 3: is too few"), "error: --x 3: is too few"),
    (OSError(28, "No space left", "out/x"), "error: out/x: cannot be written: No space left"),
    (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore"),
        "error: CUDA out of memory. Tried to allocate 3 GiB. Try a smaller --batch or "
        "--micro-batch, or --ckpt-grad",
    ),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 99 bytes."),
        "error: DefaultCPUAllocator: can't allocate memory: 99 bytes. Try a smaller --batch or "
        "--micro-batch, or --ckpt-grad",
    ),
])
def test_an_expected_error_is_one_line_and_exit_code_2(capsys, warnings_kept, error, line):
    def main(args):
        raise error

    with pytest.raises(SystemExit, match="2"):
        run(main, Namespace)
    assert capsys.readouterr().err.splitlines() == [line]


def test_interrupts_are_exit_code_130_and_bugs_stay_tracebacks(warnings_kept):
    def interrupted(args):
        raise KeyboardInterrupt

    def wrong(args):
        raise ZeroDivisionError

    with pytest.raises(SystemExit, match="130"):
        run(interrupted, Namespace)
    with pytest.raises(ZeroDivisionError):
        run(wrong, Namespace)


# ---- the log

def open_log(folder, done=0):
    machine = Machine(torch.device("cpu"), False, 0, 1)
    return Log(folder, done=done, steps=10, batch=4, machine=machine)


def test_a_line_of_the_log_is_the_mean_since_the_last_one(tmp_path):
    log = open_log(tmp_path)
    for loss in (1.0, 2.0, 6.0):
        log.add(loss=torch.tensor(loss), lr=0.5)
    log.write_means(3)
    log.add(loss=torch.tensor(4.0), lr=0.5)
    log.write_means(4)
    log.close()
    rows = log_rows(tmp_path)
    assert [(row["step"], row["loss"], row["lr"]) for row in rows] == [(3, 3.0, 0.5), (4, 4.0, 0.5)]
    assert {"ms", "img_per_s", "gb", "eta_min"} <= set(rows[0])


def test_a_continued_log_has_no_step_twice_and_knows_what_was_evaluated(tmp_path):
    """Lines after the checkpoint's step go, and half a line at the end."""
    log = open_log(tmp_path)
    for step in (2, 4, 6):
        log.add(loss=torch.tensor(1.0))
        log.write_means(step)
        log.write(step, score=0.5)
    log.close()
    with open(log.path, "a") as file:
        file.write('{"step": 8, "lo')

    continued = open_log(tmp_path, done=4)
    continued.close()
    assert [row["step"] for row in log_rows(tmp_path)] == [2, 2, 4, 4]
    assert continued.evaluated == 4
    assert not continued.evaluation_is_missing(2)

    # Stopped between the last step and its evaluation.
    rows = log.path.read_text().splitlines(keepends=True)
    log.path.write_text("".join(rows[:-1]))
    continued = open_log(tmp_path, done=4)
    continued.close()
    assert continued.evaluated == 2
    assert continued.evaluation_is_missing(2)
    assert not continued.evaluation_is_missing(3)


def test_a_signal_asks_the_run_to_stop_and_a_second_one_ends_it():
    with signal_handlers_kept():
        stop = StopOnSignal()
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        assert stop.as_tensor(torch.device("cpu")).item()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
