"""checkpoint.py: never half-written, never runs code, and clear about what is wrong."""
import os
import pickle

import pytest
import torch
from torch.testing import assert_close

from tinyldm import BadInput
from tinyldm.checkpoint import half, load_checkpoint, resume, save_checkpoint, states

def good(path, kind="autoencoder"):
    save_checkpoint({"kind": f"tinyldm {kind}", "x": torch.arange(1000)}, path)
    return path


def test_a_checkpoint_comes_back(tmp_path):
    path = good(tmp_path / "new" / "ckpt.pt")
    assert_close(load_checkpoint(path, "autoencoder", "--ae")["x"], torch.arange(1000))
    assert os.listdir(path.parent) == ["ckpt.pt"]


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    path = good(tmp_path / "ckpt.pt")
    def half(ckpt, f):
        f.write(b"half a file")
        raise OSError("No space left on device")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(BadInput, match="No space"):
        good(path)
    assert_close(load_checkpoint(path, "autoencoder", "--ae")["x"], torch.arange(1000))


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
        load_checkpoint("evil.pt", "ldm", "--ckpt")
    assert not os.path.exists("pwned")


def test_truncated_foreign_and_missing_checkpoints_are_bad_input(tmp_path):
    path = good(tmp_path / "ckpt.pt")
    data = path.read_bytes()
    for n in (0, 1, 10, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises(BadInput, match="--ae .*ckpt.pt"):
            load_checkpoint(path, "autoencoder", "--ae")
    torch.save({"state_dict": {}}, path)
    with pytest.raises(BadInput, match="not a checkpoint of tinyldm"):
        load_checkpoint(path, "autoencoder", "--ae")
    torch.save(torch.zeros(3), path)
    with pytest.raises(BadInput, match="not a checkpoint of tinyldm"):
        load_checkpoint(path, "autoencoder", "--ae")
    with pytest.raises(BadInput, match="No such file"):
        load_checkpoint(tmp_path / "gone.pt", "ldm", "--ckpt")
    with pytest.raises(BadInput, match="holds a tinyldm autoencoder"):
        load_checkpoint(good(path), "ldm", "--ckpt")


def test_a_run_goes_on_with_all_its_parts_and_only_with_its_own_architecture(tmp_path):
    def parts(seed):
        torch.manual_seed(seed)
        net = torch.nn.Linear(3, 2)
        opt = torch.optim.Adam(net.parameters())
        net(torch.ones(1, 3)).sum().backward()
        opt.step()
        return {"nets": {"net": net}, "opt": opt}
    path, config = tmp_path / "ckpt.pt", {"unet": {"ch": 64, "ch_mult": (1, 2)}}
    a, b = parts(0), parts(1)
    assert resume(path, "ldm", config, b) == {"step": 0}
    head = {"kind": "tinyldm ldm", "step": 7, "config": config}
    save_checkpoint(head | states(a), path)
    assert resume(path, "ldm", config, b)["step"] == 7
    assert_close(states(a), states(b), rtol=0, atol=0)
    with pytest.raises(BadInput, match="unet ch = 64, now it is 32"):
        resume(path, "ldm", {"unet": {"ch": 32}}, b)


def test_half_keeps_the_shape_of_the_tree():
    got = half({"a": {"b": torch.ones(2)}, "c": torch.zeros(())})
    assert got["a"]["b"].dtype == got["c"].dtype == torch.float16
