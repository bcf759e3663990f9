"""Every number of a command line has a range, and a wrong one is one line before any work."""
import argparse
import importlib
import math

import pytest
from conftest import TINY_AE, TINY_LDM

import train_ae
import train_ldm
from tinyldm.autoencoder import AEConfig
from tinyldm.diffusion import DiffusionConfig
from tinyldm.engine import presets
from tinyldm.engine.flags import image_size
from tinyldm.engine.ranges import ASCENDING, RANGES, Range, check_ranges
from tinyldm.errors import BadInput
from tinyldm.unet import UNetConfig

# Each program, with files that do not exist: were one of them opened, it would be named.
PROGRAMS = {
    "train_ae.py": ["--data", "gone"],
    "train_ldm.py": ["--data", "gone", "--ae", "gone.pt"],
    "sample.py": ["--ckpt", "gone.pt"],
    "tinyldm.metrics.__main__": ["--real", "gone", "--fake", "gone"],
    "tinyldm.engine.bench": ["--data", "gone"],
}


NUMBER_TYPES = (int, float, image_size)


def number_flags(program):
    """The actions of a program's parser whose values are numbers."""
    parsers = []

    def remember(parser, *args, **kwargs):
        parsers.append(parser)
        return parse_args(parser, *args, **kwargs)

    parse_args = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", remember)
        module = importlib.import_module(program.removesuffix(".py"))
        module.parse_args(PROGRAMS[program])
    return [action for action in parsers[0]._actions if action.type in NUMBER_TYPES]


NUMBERS = [(program, action) for program in PROGRAMS for action in number_flags(program)]


def ranges_of(action):
    """The range of each number that a flag takes."""
    row = RANGES[action.dest]
    if isinstance(row, tuple):
        return row
    return [row] * (action.nargs if isinstance(action.nargs, int) else 1)


def just_outside(allowed, kind):
    """Numbers next to both ends of a range, which do not belong to it."""
    step = 0.001 if kind is float else 1
    numbers = [allowed.low if allowed.low_open else allowed.low - step]
    if allowed.high_open:
        numbers.append(allowed.high)
    elif allowed.high < math.inf:
        numbers.append(allowed.high + step)
    if kind is float:
        numbers.append(math.nan)
    return numbers


def just_inside(allowed):
    """A number that belongs to a range."""
    return 1 if 1 in allowed else (allowed.low + min(allowed.high, 1)) / 2


@pytest.mark.parametrize("program, action", NUMBERS, ids=lambda v: getattr(v, "dest", v))
def test_a_number_outside_its_range_is_one_line_before_anything_is_opened(program, action, cli):
    """The line names the flag and its range; the flag is in the table, or this fails."""
    flag = action.option_strings[0]
    ranges = ranges_of(action)
    for place, allowed in enumerate(ranges):
        for x in just_outside(allowed, action.type):
            values = [just_inside(each) for each in ranges]
            values[place] = x
            output = cli(program, *PROGRAMS[program], flag, *values, code=2)
            line, = output.strip().splitlines()
            assert line.startswith(f"error: {flag} ")
            assert line.endswith(f": must be {allowed}")


@pytest.mark.parametrize("name", ASCENDING)
def test_the_ends_of_a_range_are_in_order(name):
    check_ranges({name: [0.1, 0.1]})
    with pytest.raises(BadInput, match="the first must not be above the second"):
        check_ranges({name: [0.2, 0.1]})


def test_a_range_holds_its_closed_ends_and_says_so():
    half_open = Range(0, 1, high_open=True)
    assert 0 in half_open
    assert 1 not in half_open
    assert math.nan not in half_open
    assert str(half_open) == "at least 0 and below 1"
    assert math.inf in Range(0, low_open=True)
    assert math.inf not in Range(0, high_open=True)


def test_every_row_of_the_table_is_a_flag():
    """A row without a flag would be a range that nobody checks."""
    assert {action.dest for _, action in NUMBERS} == RANGES.keys()


def test_the_rows_of_presets_are_within_the_ranges_and_their_widths_divide():
    for name in presets.AE:
        args = train_ae.parse_args(["--preset", name])
        train_ae.autoencoder_config(args)
    for name, row in presets.LDM.items():
        args = train_ldm.parse_args(["--preset", name])
        train_ldm.check_shapes(args)
        config = presets.model_config(row | vars(args), presets.ae_config(row["ae_preset"]))
        config.unet.check_attention()


# ---- widths

SMALL_AE = {"ch": 8, "ch_mult": (1, 2), "groups": 4, "side": 16}
SMALL_UNET = {"ch": 8, "ch_mult": (1, 2), "groups": 4, "side": 16, "attn_res": (8,), "d_head": 8}


@pytest.mark.parametrize("config, values", [(AEConfig, SMALL_AE), (UNetConfig, SMALL_UNET)])
@pytest.mark.parametrize("wrong, message", [
    ({"ch": 50}, "ch = 50 is not divisible by groups = 4"),
    ({"groups": 0}, "not divisible by groups = 0"),
    ({"ch_mult": ()}, "ch_mult is empty"),
])
def test_widths_of_which_there_is_no_network_are_bad_input(config, values, wrong, message):
    config(**values)
    with pytest.raises(BadInput, match=message):
        config(**values | wrong)


@pytest.mark.parametrize("wrong, message", [
    ({"n_head": 3}, "16 channels, which attend, cannot be divided"),
    ({"d_head": 32}, "16 channels, which attend, cannot be divided"),
    ({"d_head": None}, "one of n_head and d_head"),
])
def test_heads_that_do_not_share_a_width_are_bad_input(wrong, message):
    with pytest.raises(BadInput, match=message):
        UNetConfig(**SMALL_UNET | wrong)


def test_attention_is_as_attn_res_and_d_head_say_or_it_is_bad_input():
    """A side that no level has is an error if it is alone, else a warning."""
    shape = SMALL_UNET | {"ch": 24, "d_head": 16}
    UNetConfig(**shape).check_attention()
    with pytest.raises(BadInput, match="d_head = 16 does not divide 24"):
        UNetConfig(**shape | {"attn_res": (16,)}).check_attention()
    for config, values in [(AEConfig, SMALL_AE), (UNetConfig, SMALL_UNET)]:
        with pytest.raises(BadInput, match="attn_res 7: no level .* choose among 16, 8"):
            config(**values | {"attn_res": (7,)}).check_attention()
        with pytest.warns(UserWarning, match="attn_res 4: "):
            config(**values | {"attn_res": (8, 4)}).check_attention()


def test_a_schedule_that_leaves_no_signal_is_bad_input():
    """float32 would divide by zero."""
    assert DiffusionConfig(T=5000).abar()[-1] > 0
    with pytest.raises(BadInput, match="T 20000: abar falls to"):
        DiffusionConfig(T=20_000).abar()


AE = ["train_ae.py", *TINY_AE, "--size", 16, "--data", "gone"]
LDM = ["train_ldm.py", *TINY_LDM, "--size", 16, "--data", "gone", "--ae", "gone.pt"]


@pytest.mark.parametrize("command, message", [
    ([*AE, "--ch", 50], "error: --ch, --ch-mult, --groups: ch = 50 is not"),
    ([*AE, "--attn-res", 7], "error: --attn-res: attn_res 7: no level has feature maps"),
    ([*AE, "--ch-mult"], "error: --ch, --ch-mult, --groups: ch_mult is empty"),
    ([*LDM, "--ch", 50], "--d-head: ch = 50 is not"),
    ([*LDM, "--n-head", 3], "--d-head: 32 channels, which attend"),
    ([*LDM, "--T", 20_000], "error: --T, --beta-range: T 20000"),
    (["tinyldm.engine.bench", "--ch", 50], "error: --ch: ch = 50 is not"),
    (["tinyldm.engine.bench", "--size", 17], "error: --size 17: must be a multiple of 8"),
])
def test_shapes_that_do_not_fit_are_one_line_before_anything_is_opened(cli, command, message):
    assert message in cli(*command, code=2).strip().splitlines()[-1]


def test_attn_res_of_the_u_net_is_checked_as_soon_as_f_is_known(trained, cli):
    command = [*LDM, "--ae", trained / "ae/ckpt.pt", "--attn-res", 7]
    assert "error: --attn-res, --d-head: attn_res 7: " in cli(*command, code=2)


def test_a_device_that_cannot_compute_is_one_line(cli):
    output = cli("train_ae.py", "--device", "meta", code=2)
    assert "error: --device: meta: it cannot compute here" in output
