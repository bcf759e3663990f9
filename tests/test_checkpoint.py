"""Checkpoints: never half-written, never a program, and clear about what is wrong."""
import os
import pickle

import pytest
import torch
from torch.testing import assert_close

from tinyldm.data.tokenizer import train_tokenizer
from tinyldm.engine.checkpoint import half, load_checkpoint, resume, save_checkpoint
from tinyldm.engine.processes import gathered_states
from tinyldm.errors import BadInput


def save_good(path, kind="autoencoder"):
    """Write a small checkpoint of a kind; return its path."""
    save_checkpoint({"kind": f"tinyldm {kind}", "x": torch.arange(1000)}, path)
    return path


# ---- writing and reading

def test_a_checkpoint_comes_back(tmp_path):
    """Writing makes the folder, leaves one file, and reading returns what was written."""
    path = save_good(tmp_path / "new" / "ckpt.pt")

    assert_close(load_checkpoint(path, "autoencoder")["x"], torch.arange(1000))
    assert os.listdir(path.parent) == ["ckpt.pt"]


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """A full disk is one clear error, and the file is as it was before."""
    path = save_good(tmp_path / "ckpt.pt")

    def write_half(checkpoint, file):
        file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(BadInput, match="cannot write .*ckpt.pt: No space"):
        save_good(path)

    assert_close(load_checkpoint(path, "autoencoder")["x"], torch.arange(1000))
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_the_checkpoint_before_is_kept_and_used_if_the_last_one_is_damaged(tmp_path):
    """keep renames a whole file to .old.pt, but never replaces it by a truncated one."""
    path = tmp_path / "ckpt.pt"
    for step in (1, 2):
        save_checkpoint({"kind": "tinyldm ldm", "step": step}, path, keep=True)
    path.write_bytes(path.read_bytes()[:-50])

    with pytest.warns(UserWarning, match="ckpt.old.pt, the one before it, is used"):
        assert load_checkpoint(path, "ldm")["step"] == 1

    save_checkpoint({"kind": "tinyldm ldm", "step": 3}, path, keep=True)
    assert load_checkpoint(path, "ldm")["step"] == 3
    assert load_checkpoint(tmp_path / "ckpt.old.pt", "ldm")["step"] == 1


def test_half_keeps_the_shape_of_the_tree():
    """A nested dict of tensors stays one, in fp16."""
    halved = half({"a": {"b": torch.ones(2)}, "c": torch.zeros(())})

    assert halved["a"]["b"].dtype == torch.float16
    assert halved["c"].dtype == torch.float16


# ---- what is refused

class Evil:
    """A pickle of it runs a program when it is loaded, if the reader lets it."""

    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_that_would_run_code_is_refused(tmp_path, monkeypatch, zipped):
    """Neither torch's zip nor a bare pickle gets to run a program."""
    monkeypatch.chdir(tmp_path)
    content = {"kind": "tinyldm ldm", "x": Evil()}
    if zipped:
        torch.save(content, "evil.pt")
    else:
        with open("evil.pt", "wb") as file:
            pickle.dump(content, file, protocol=2)

    with pytest.raises(BadInput, match="evil.pt: refused.*run code"):
        load_checkpoint("evil.pt", "ldm")
    assert not os.path.exists("pwned")


@pytest.mark.parametrize("n_bytes", [0, 1, 10, 100, -1000, -1])
def test_a_truncated_checkpoint_is_bad_input(tmp_path, n_bytes):
    """Whatever is left of a file, the error names it; negative: so many bytes are missing."""
    path = save_good(tmp_path / "ckpt.pt")
    path.write_bytes(path.read_bytes()[:n_bytes])

    with pytest.raises(BadInput, match="ckpt.pt"):
        load_checkpoint(path, "autoencoder")


@pytest.mark.parametrize("content", [{"state_dict": {}}, torch.zeros(3)])
def test_a_foreign_checkpoint_is_bad_input(tmp_path, content):
    """A file of torch that is not one of ours is said to be so."""
    path = tmp_path / "ckpt.pt"
    torch.save(content, path)

    with pytest.raises(BadInput, match="not a checkpoint of tinyldm"):
        load_checkpoint(path, "autoencoder")


def test_a_missing_checkpoint_and_one_of_another_kind_are_bad_input(tmp_path):
    """The error says what is in the file, and what is needed."""
    with pytest.raises(BadInput, match="gone.pt: No such file"):
        load_checkpoint(tmp_path / "gone.pt", "ldm")

    path = save_good(tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match="of stage one .*, where one of stage two .* is needed"):
        load_checkpoint(path, "ldm")
    assert load_checkpoint(path)["kind"] == "tinyldm autoencoder"


@pytest.mark.parametrize(
    "shape", [{"n_res": 10 ** 9}, {"depth": 500}, {"ch_mult": [1] * 999}, {"T": 10 ** 9}]
)
def test_absurd_sizes_are_refused_before_anything_is_built(tmp_path, shape):
    """A file cannot keep us busy for ever."""
    path = tmp_path / "ckpt.pt"
    save_checkpoint({"kind": "tinyldm ldm", "config": {"unet": shape}}, path)

    with pytest.raises(BadInput, match="absurd sizes"):
        load_checkpoint(path, "ldm")


# ---- resuming

CONFIG = {"unet": {"ch": 64, "ch_mult": (1, 2)}, "tau": {"depth": 2}}


def make_parts(seed):
    """Return a network and its optimiser after one step."""
    torch.manual_seed(seed)
    net = torch.nn.Linear(3, 2)
    optimiser = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    return {"nets": {"net": net}, "opt": optimiser}


def tokenizer(*captions):
    """Return the JSON of a tokenizer of these words."""
    return train_tokenizer(captions).to_str()


@pytest.fixture
def saved(tmp_path):
    """Return the path of a run's checkpoint, and the parts that are in it."""
    path = tmp_path / "ckpt.pt"
    parts = make_parts(0)
    head = {"kind": "tinyldm ldm", "step": 7, "config": CONFIG}
    head |= {"size": 32, "classes": ["a", "b"], "tokenizer": tokenizer("a", "b")}
    save_checkpoint(head | gathered_states(parts), path)
    return path, parts


def test_a_run_continues_with_all_its_parts(saved):
    """Weights and moments come back bit for bit; without a checkpoint nothing is done."""
    path, parts = saved
    other = make_parts(1)

    assert resume(path.with_name("none.pt"), "ldm", CONFIG, other, 9) == {"step": 0}
    assert resume(path, "ldm", CONFIG, other, 9)["step"] == 7
    assert_close(gathered_states(other), gathered_states(parts), rtol=0, atol=0)


def test_a_run_of_another_model_is_refused_with_every_difference(saved):
    """Networks' shapes, task, size, class names and words are all compared, by name."""
    path, _ = saved
    config = {"unet": {"ch": 32, "ch_mult": (1, 2)}, "tau": {"depth": 3}}
    config["task"] = {"name": "class"}
    head = {"config": config, "size": 64, "classes": ["a", "c"], "tokenizer": tokenizer("a", "c")}

    with pytest.raises(BadInput) as error:
        resume(path, "ldm", head, make_parts(1), 9)

    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path} was made with unet ch = 64, now it is 32; ")
    assert message.endswith("; give the same values again, or another folder")
    for difference in (
        "tau depth = 2, now it is 3",
        "task name = text, now it is class",
        "size = 32, now it is 64",
        "classes = [a, b], now it is [a, c]",
        "tokenizer words = [[PAD], [UNK], a, b], now it is [[PAD], [UNK], a, c]",
    ):
        assert difference in message
    assert "ch_mult" not in message


def test_parts_that_do_not_fit_are_bad_input(saved):
    """A checkpoint whose tensors have other shapes than its config says is damaged."""
    path, _ = saved
    parts = make_parts(1)
    parts["nets"]["net"] = torch.nn.Linear(4, 2)

    with pytest.raises(BadInput, match="ckpt.pt: its parts do not fit together"):
        resume(path, "ldm", CONFIG, parts, 9)
