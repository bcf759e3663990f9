"""bench.py: what it prints is what was run; the clock itself is not tested."""
import re
import sys
import time

import pytest
import torch

from tinyldm import BadInput, bench

CPU = torch.device("cpu")
TINY = ["--ch", "16", "--batch", "2", "--n", "1", "--runs", "1", "--size", "16", "--n-shapes", "40"]
TWIN = """
from types import SimpleNamespace
import torch
from tinyldm import bench
from tinyldm.autoencoder import Autoencoder
from tinyldm.unet import UNet, UNetConfig
from dataclasses import replace

def unet(cfg):
    return UNet(replace(cfg, ch=cfg.ch * WIDER))

autoencoder = Autoencoder
sampling = bench.our_sampling
"""


def table(capsys, *flags):
    bench.main(bench.parse_args([*TINY, *flags]))
    out = capsys.readouterr().out
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in out.splitlines()
            if line.startswith("| ")]
    return out, {row[0]: row[1:] for row in rows[1:]}


def test_every_row_is_there_and_says_how_many_pictures(capsys):
    out, rows = table(capsys)
    assert {k: row[0] for k, row in rows.items()} == {
        "U-Net forward": "2", "U-Net step": "2", "sample, 50 steps": "1", "encode": "2",
        "decode": "2", "autoencoder step": "2", "load, 0 workers": "16"}
    assert all(len(row) == 6 for row in rows.values())
    assert re.search(r"toy, cpu, \d+ threads: a product of 2048 x 2048 matrices has [\d,]+ GFLOP",
                     out)


def test_against_a_file_with_the_same_networks(capsys, tmp_path):
    path = tmp_path / "twin.py"
    path.write_text(TWIN.replace("WIDER", "1"))
    _, rows = table(capsys, "--against", str(path), "--only", "U-Net")
    assert [*rows] == ["U-Net forward", "U-Net step"]
    for _, ms, *_, mib, ms_there, mib_there, ratio in rows.values():
        assert mib == mib_there                         # the same network needs the same memory
        expected = float(ms.replace(",", "")) / float(ms_there.replace(",", ""))
        assert float(ratio) == pytest.approx(expected, rel=.1)


def test_other_parameter_counts_are_refused(capsys, tmp_path):
    path = tmp_path / "twin.py"
    path.write_text(TWIN.replace("WIDER", "2"))
    with pytest.raises(BadInput, match="--against: .* parameters there, .* here"):
        table(capsys, "--against", str(path))


@pytest.mark.parametrize("flag,say", [("nobody", "against_nobody.py cannot be used"),
                                      ("gone.py", "gone.py cannot be used")])
def test_no_such_others(capsys, flag, say):
    with pytest.raises(BadInput, match=say):
        table(capsys, "--against", flag)


def test_diffusers_missing_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BadInput, match="--against diffusers: .*diffusers"):
        table(capsys, "--against", "diffusers")


def test_peak_is_what_lives_at_once():
    """Three megabyte tensors, two of them at a time, and one that was there before."""
    x = torch.zeros(2 ** 18)

    def work():
        y = x + 1
        y = y * 2                                       # the old y lives until the new one does
        return y + 3
    assert bench.peak(work, CPU) == pytest.approx(2 * 2 ** 20, rel=.01)


def test_medians_and_turns():
    order = []

    def job(name, naps):
        naps = iter(naps)

        def work():
            order.append(name)
            time.sleep(next(naps))
        return work
    a, b = bench.seconds([job("a", [.05, 0, 0]), job("b", [.05, .05, .4])], 3, CPU)
    assert "".join(order) == "ababab"
    assert a < .05 <= b < .4


def test_trainer_moves_weights_and_branches_that_begin_at_zero_are_drawn():
    net = torch.nn.Linear(4, 4)
    torch.nn.init.zeros_(net.weight)
    bench.prepare([net, None], CPU)
    assert net.weight.all()
    before = net.weight.clone()
    bench.trainer(net, lambda: net(torch.ones(1, 4)))()
    assert not torch.equal(net.weight, before)
