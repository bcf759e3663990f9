"""A model whose eps_theta is a DiT goes the whole road: training, files, sampling."""
import pytest
from conftest import TINY_LDM
from PIL import Image
from runs import assert_same_state

from tinyldm.beyond.dit import DiT, DiTConfig
from tinyldm.engine import released
from tinyldm.engine.open import open_model
from tinyldm.errors import BadInput

of_groups = TINY_LDM.index("--groups")          # a DiT has no GroupNorm
TINY_DIT = [
    *TINY_LDM[:of_groups], *TINY_LDM[of_groups + 2:],
    "--backbone", "dit", "--blocks", 2, "--patch", 2, "--size", 16,
]


@pytest.fixture(scope="module")
def dit(trained, tmp_path_factory, cli):
    """The folder of a tiny DiT of captions, trained for two steps. Only read it."""
    out = tmp_path_factory.mktemp("dit") / "ldm"
    output = cli("train_ldm.py", *TINY_DIT, "--ae", trained / "ae/ckpt.pt", "--steps", 2,
                 "--no-cosine", "--eval-n", 4, "--out", out)
    assert "DiT " in output
    return out


def test_a_dit_is_opened_as_what_it_is(dit):
    model = open_model(dit / "model.pt")
    assert isinstance(model.unet, DiT)
    assert model.config.unet == DiTConfig(
        c_in=4, c_out=4, side=8, ch=16, d_head=16, d_ctx=32, n_block=2, patch=2
    )


def test_it_samples_at_other_sizes_with_attention_by_word(dit, tmp_path, cli):
    cli("sample.py", "--ckpt", dit / "model.pt", "--size", "16x32", "--n", 2, "--steps", 2,
        "--attention", tmp_path / "words.png", "--out", tmp_path / "x.png", "a red circle")
    assert Image.open(tmp_path / "words.png").width > 100


def test_it_goes_on_bit_for_bit_and_computes_twice(trained, dit, tmp_path, cli):
    command = [*TINY_DIT, "--ae", trained / "ae/ckpt.pt", "--no-cosine", "--eval-n", 0]
    cli("train_ldm.py", *command, "--steps", 1, "--out", tmp_path / "ldm")
    cli("train_ldm.py", *command, "--steps", 2, "--out", tmp_path / "ldm")
    assert_same_state(dit, tmp_path / "ldm")


@pytest.mark.parametrize("flags", [[], ["--task", "class"], ["--task", "inpaint"], ["--ckpt-grad"],
                                   ["--task", "uncond"]])
def test_every_port_trains(trained, tmp_path, cli, flags):
    cli("train_ldm.py", *TINY_DIT, *flags, "--ae", trained / "ae/ckpt.pt", "--steps", 1,
        "--eval-n", 0, "--out", tmp_path / "ldm")
    assert (tmp_path / "ldm/model.pt").exists()


def test_it_can_be_tuned_and_have_a_lora(dit, tmp_path, cli):
    start = ["train_ldm.py", "--init", dit / "model.pt", "--steps", 1, "--eval-n", 0,
             "--n-shapes", 40, "--batch", 4]
    cli(*start, "--out", tmp_path / "tuned")
    cli(*start, "--lora", 2, "--out", tmp_path / "lora")
    assert (tmp_path / "lora/lora.safetensors").exists()
    output = cli(*start, "--patch", 1, "--out", tmp_path / "other", code=2)
    assert "--patch 1: the model in" in output


def test_another_backbone_in_the_same_folder_is_bad_input(trained, dit, tmp_path, cli):
    output = cli("train_ldm.py", *TINY_LDM, "--size", 16, "--ae", trained / "ae/ckpt.pt",
                 "--steps", 2, "--out", dit, code=2)
    assert "now it is" in output


def test_it_is_not_exported_as_a_u_net(dit, tmp_path):
    for export in (released.export, released.export_diffusers):
        with pytest.raises(BadInput, match="U-Net"):
            export(dit / "ckpt.pt", tmp_path / "x.safetensors")


def test_widths_of_which_there_is_no_dit_are_named(trained, tmp_path, cli):
    output = cli("train_ldm.py", *TINY_DIT, "--d-head", 5, "--ae", trained / "ae/ckpt.pt",
                 "--out", tmp_path / "x", code=2)
    assert "ch = 16 cannot be divided into heads" in output
