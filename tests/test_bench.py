"""The benchmark: what it prints is what was run; the clock itself is not tested."""
import re
import sys
import time

import pytest
import torch

from tinyldm.engine import bench, timing
from tinyldm.engine.processes import setup
from tinyldm.errors import BadInput

CPU = torch.device("cpu")
TINY = [
    "--ch", "16", "--batch", "2", "--n", "1", "--runs", "1", "--size", "16", "--n-shapes", "40",
]

# Another implementation, which is ours again; WIDER is a factor of its width.
TWIN = """
from dataclasses import replace

from tinyldm.autoencoder import Autoencoder as autoencoder
from tinyldm.engine.bench import our_sampling as sampling
from tinyldm.unet import UNet


def unet(cfg):
    return UNet(replace(cfg, ch=cfg.ch * WIDER))
"""


@pytest.fixture(autouse=True)
def two_steps(monkeypatch):
    """Fifty steps take long, and show no more than two."""
    monkeypatch.setattr(bench, "STEPS", 2)


def run_bench(capsys, *flags):
    """Run the program; return its output, and its table {name of the row: other cells}."""
    bench.main(bench.parse_args([*TINY, *flags]))
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    table = {}
    for line in lines[1:]:
        name, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        table[name] = cells
    return output, table


# ---- the program

def test_every_row_is_there_and_says_how_many_images(capsys):
    """The toy has a U-Net, an autoencoder and a data set."""
    output, table = run_bench(capsys)

    assert {name: cells[0] for name, cells in table.items()} == {
        "U-Net forward": "2",
        "U-Net step": "2",
        "sample, 2 steps": "1",
        "encode": "2",
        "decode": "2",
        "autoencoder step": "2",
        "load, 0 workers": "16",
    }
    assert {len(cells) for cells in table.values()} == {6}
    product = r"toy, cpu, \d+ threads: a product of 2048 x 2048 matrices has [\d,]+ GFLOP"
    assert re.search(product, output)


@torch.no_grad()
@pytest.mark.parametrize("preset", ["celebahq256", "semantic256"])
def test_conditions_by_the_other_port_and_none_at_all(preset):
    """Maps beside z_t, and an unconditional U-Net: all that is timed can be run."""
    flags = ["--preset", preset, "--ch", "32", "--size", "64", "--batch", "1"]
    args = bench.parse_args([*TINY, *flags])
    rows = bench.Bench(args, setup("cpu", "fp32"), other=None).unet_rows()
    for row in rows:
        row.ours()


# ---- another implementation

def test_against_a_file_with_the_same_networks(capsys, tmp_path):
    """Both columns and their ratio are there, for networks and for sampling."""
    path = tmp_path / "twin.py"
    path.write_text(TWIN.replace("WIDER", "1"))
    _, table = run_bench(capsys, "--against", str(path))

    assert len(table.pop("load, 0 workers")) == 6
    assert len(table) == 6
    for cells in table.values():
        _, ours, *_, our_mib, theirs, their_mib, ratio = cells
        assert our_mib == their_mib                 # the same network needs the same memory
        expected = float(ours.replace(",", "")) / float(theirs.replace(",", ""))
        assert float(ratio) == pytest.approx(expected, rel=0.1)


def test_other_parameter_counts_are_refused(capsys, tmp_path):
    """Only the same network can be compared."""
    path = tmp_path / "twin.py"
    path.write_text(TWIN.replace("WIDER", "2"))
    with pytest.raises(BadInput, match="--against: .* parameters there, .* here"):
        run_bench(capsys, "--against", str(path))


@pytest.mark.parametrize("name, message", [
    ("nobody", "against_nobody.py cannot be used"),
    ("gone.py", "gone.py cannot be used"),
])
def test_an_implementation_that_does_not_exist_is_one_line(name, message):
    """Whether it is given by name or as a file."""
    with pytest.raises(BadInput, match=message):
        bench.load_other(name)


def test_diffusers_missing_is_one_line(monkeypatch):
    """It is no dependency."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BadInput, match="--against diffusers: .*diffusers"):
        bench.load_other("diffusers")


# ---- how it is measured

def test_peak_is_what_lives_at_once():
    """Three tensors of 1 MiB, two of them at a time; the one that was there does not count."""
    x = torch.zeros(2 ** 18)

    def work():
        y = x + 1
        y = y * 2                   # the old y lives until the new one does
        return y + 3

    assert timing.peak_bytes(work, CPU) == pytest.approx(2 * 2 ** 20, rel=0.01)


def test_flops_are_those_of_the_products():
    """A product of (2, 3) and (3, 4): a multiplication and an addition for each term."""
    assert timing.count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 4)) == 2 * 2 * 3 * 4


def test_times_are_medians_and_work_takes_turns():
    """One slow run of b does not count, and a and b alternate."""
    order = []

    def job(name, naps):
        naps = iter(naps)

        def work():
            order.append(name)
            time.sleep(next(naps))

        return work

    a = job("a", [0.05, 0, 0])
    b = job("b", [0.05, 0.05, 0.4])
    seconds_a, seconds_b = timing.median_seconds([a, b], 3, CPU)

    assert order == ["a", "b"] * 3
    assert seconds_a < 0.05 <= seconds_b < 0.15


def test_weights_that_are_zero_become_random_and_a_training_step_moves_them():
    """A branch of zeros would be measured with gradients of zero."""
    net = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(net.weight)
    bench.prepare(net, None, CPU)
    assert net.weight.all()

    before = net.weight.clone()
    bench.training_step(net, lambda: net(torch.ones(1, 4)))()
    assert not torch.equal(net.weight, before)
