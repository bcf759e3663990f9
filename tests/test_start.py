"""train_ldm.py --init: training goes on from a model in a file, ours or a released one."""
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ONE_LEVEL, TINY_LDM
from PIL import Image
from runs import trained_state
from torch.testing import assert_close

import train_ldm
from tinyldm.data.dataset import ListDataset
from tinyldm.data.renumber import Renumbered
from tinyldm.engine import presets, start
from tinyldm.engine.checkpoint import load_checkpoint, save_checkpoint
from tinyldm.engine.open import BUNDLED, open_model
from tinyldm.errors import BadInput
from tinyldm.tasks import TASKS

ONE_STEP = ["--steps", 1, "--eval-n", 0, "--n-shapes", 40]
NO_CHANGE = ["--lr", 1e-30, "--warmup", 0]


def tune(cli, init, out, *flags, code=0):
    """Train from the model in a file."""
    return cli("train_ldm.py", "--init", init, *ONE_STEP, "--out", out, *flags, code=code)


# ---- all of the model comes from the file

def test_a_run_starts_with_the_weights_and_all_else_of_the_file(trained, tmp_path, cli):
    """The averaged weights, z_std, shapes, schedule, tokenizer; the step is 1 again."""
    file = trained / "ldm/ckpt.pt"
    output = tune(cli, file, tmp_path / "x", *NO_CHANGE)
    assert f"starts from {file}, preset toy" in output

    before = load_checkpoint(file)
    after = load_checkpoint(tmp_path / "x/ckpt.pt")
    assert after["step"] == 1
    for key in ("config", "tokenizer", "size", "p_drop"):
        assert after[key] == before[key]
    assert_close(after["nets"], before["ema"], rtol=0, atol=1e-6)
    assert_close(after["ae"], before["ae"], rtol=0, atol=0)
    assert after["init"].startswith("a model of hash ")


def test_the_bundled_model_is_a_start_and_what_comes_out_is_one_too(tmp_path, cli):
    """model.pt, of averaged weights alone; its images are those of the start."""
    tune(cli, BUNDLED["toy"], tmp_path / "x", *NO_CHANGE, "--batch", 4)
    tune(cli, tmp_path / "x/model.pt", tmp_path / "y", *NO_CHANGE, "--batch", 4)
    images = []
    for path in (BUNDLED["toy"], tmp_path / "y/model.pt"):
        model = open_model(path)
        caption = {"caption": "a red circle"}
        images.append(model.sample([caption], seeds=[(0, 0)], steps=4))
    assert_close(images[0], images[1], rtol=0, atol=2e-3)       # model.pt is in fp16


@pytest.mark.parametrize("preset", presets.LDM)
def test_the_optimiser_and_the_shapes_are_those_of_the_files_preset(preset, monkeypatch):
    """Not the toy's; a flag that is given wins."""
    row = presets.LDM[preset]
    tokens = {"n_token": 4, "vocab_size": 9}
    values = vars(train_ldm.parse_args(["--preset", preset])) | tokens
    values |= {"n_classes": row.get("n_classes", 5)}
    config = presets.model_config(values, presets.ae_config(row["ae_preset"]))
    monkeypatch.setattr(start, "read_config", lambda *_: (config, row | {"preset": preset}))

    args = train_ldm.parse_args(["--init", "x.ckpt"])
    for name in ("lr", "batch", "betas", "cosine", "ema", "loss", "snr_clamp", "steps"):
        if name in row:
            assert getattr(args, name) == row[name], name
    assert args.preset == preset
    assert args.warmup == 0
    assert args.size == config.size
    assert args.p_drop == config.p_drop
    start.check_flags(vars(args), config, "x.ckpt")
    assert train_ldm.parse_args(["--init", "x.ckpt", "--lr", "7"]).lr == 7

    with pytest.raises(BadInput, match=f"--ch 17: the model in x.ckpt has {row['ch']}"):
        start.check_flags(vars(args) | {"ch": 17}, config, "x.ckpt")


@pytest.mark.parametrize("flags, message", [
    (["--task", "class"], "--task class: the model in {file} has text"),
    (["--ch", 32], "--ch 32: the model in {file} has 16"),
    (["--ch-mult", 1, 1], "--ch-mult (1, 1): the model in {file} has (1,)"),
    (["--n-token", 9], "--n-token 9: the model in {file} has 12"),
    (["--T", 500], "--T 500: the model in {file} has 1000"),
    (["--predict", "eps"], "--predict eps: the model in {file} has v"),
    (["--z-std", 7], "--z-std 7.0: the model in {file} has "),
    (["--ae", "x.pt"], "--ae x.pt: {file} has a stage one"),
    (["--preset", "sd-v1"], "--init: {file}: its preset is toy, not sd-v1"),
    (["--size", 17], "--size 17 is not a multiple of 2"),
    (["--lora-tau"], "--lora-tau: only with --lora"),
    (["--vocab", "x"], "--vocab: only with a released model"),
    (["--channels", 1], "--channels 1: {file} has images of 3"),
])
def test_a_flag_that_contradicts_the_file_is_named_with_both_values(
    trained, tmp_path, cli, flags, message
):
    file = trained / "ldm/ckpt.pt"
    output = tune(cli, file, tmp_path / "x", *flags, code=2)
    assert message.format(file=file) in output.splitlines()[-1]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("flag", [["--vocab", "x"], ["--lora", 4]])
def test_flags_that_need_a_start_say_so(tmp_path, cli, flag):
    output = cli("train_ldm.py", *flag, "--out", tmp_path / "x", code=2)
    assert f"{flag[0]}: only with --init" in output


# ---- what may differ

def test_another_size_keeps_which_levels_attend(trained, tmp_path, cli):
    """At 32 px the level has sides of 16, where a new model of --attn-res 8 attends nowhere."""
    output = tune(cli, trained / "ldm/ckpt.pt", tmp_path / "x", "--size", 32)
    assert "images of 32, after 16; the same levels of the U-Net attend" in output
    before = load_checkpoint(trained / "ldm/ckpt.pt")["config"]["unet"]
    after = load_checkpoint(tmp_path / "x/ckpt.pt")
    assert after["config"]["unet"] == before
    assert after["size"] == 32


def model_of(task, **tau):
    """A small stand-in for a model: its task, tau and config are real."""
    shape = {"text": {}, "class": {"n_classes": 3, "d": 4}}.get(task, {}) | tau
    return TASKS[task](shape, None, ("cat", "dog"))


def test_new_classes_are_new_rows_and_the_old_keep_theirs():
    """They begin as the mean of the rows; the null class stays the last."""
    task = model_of("class")
    tau = task.build_tau(task.tau)
    before = tau.embedding.weight.detach().clone()
    task.add_classes(["bird", "cow"], tau, has_null=True)

    assert task.class_names == ("cat", "dog", "bird", "cow")
    rows = tau.embedding.weight
    assert rows.requires_grad
    assert_close(rows[[0, 1, 4]], before, rtol=0, atol=0)
    assert_close(rows[2:4], before.mean(0).expand(2, 4))
    assert task.null()["label"].tolist() == [4]
    assert task.build_tau(task.tau).embedding.weight.shape == rows.shape


@pytest.mark.parametrize("has_null, n_known", [(True, 2), (False, 3)])
def test_a_released_model_calls_its_classes_by_their_numbers(has_null, n_known):
    """Where no condition was dropped in training, the last row is a class like any other."""
    task = TASKS["class"]({"n_classes": 3, "d": 4})
    tau = task.build_tau(task.tau)
    known = task.known_names(["0", "bird"], has_null)
    assert known == tuple("012"[:n_known])
    task.add_classes(["bird"], tau, has_null)
    assert task.class_names == (*known, "bird")
    assert len(tau.embedding.weight) == n_known + 2


def test_boxes_of_new_classes_take_the_next_numbers_while_there_are_tokens():
    task = model_of("layout", n_vocab=5, n_token=6)
    task.add_classes(["bird"], None, has_null=True)
    assert task.class_names == ("cat", "dog", "bird")
    with pytest.raises(BadInput, match="enough for 4 classes, and there are 5 now"):
        task.add_classes(["a", "b"], None, has_null=True)

    released = TASKS["layout"]({"n_vocab": 5, "n_token": 6})
    assert released.known_names(["3", "0"], True) == ("0", "1", "2", "3")
    for others in (["3", "sheep"], ["3", "007"], ["3", "99"]):
        assert released.known_names(others, True) == ()


def test_labels_and_boxes_get_the_models_numbers():
    """Also those of training that the evaluation shows; the items of the set stay as they are."""
    items = [
        {"image": torch.zeros(3, 8, 8), "label": 0, "boxes": torch.tensor([[1, 0, 0, 0.5, 1]])},
        {"image": torch.zeros(3, 8, 8), "label": 1, "boxes": torch.zeros(0, 5)},
    ]
    data = ListDataset(items, label_names=("cow", "cat"), box_names=("dog", "cow"))
    data.seen_labels = lambda: [1]
    other = Renumbered(data, label_names=("cat", "dog", "cow"), box_names=("cow", "dog", "cat"))

    assert [other[i]["label"] for i in range(2)] == [2, 0]
    assert other[0]["boxes"][0].tolist() == [0, 0, 0, 0.5, 1]
    assert data[0]["boxes"][0, 0] == 1
    assert other.seen_labels() == [0]
    assert other.fingerprint() != data.fingerprint()


def test_a_class_model_learns_new_folders_of_images_beside_its_own(tmp_path, trained, cli):
    """From folders to samples by name: old names keep their numbers, new ones come after."""
    for name in ("cat", "bird"):
        (tmp_path / "one" / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), name == "cat" and "red" or "blue").save(
            tmp_path / "one" / name / "0.png"
        )
    shutil.copytree(tmp_path / "one/cat", tmp_path / "two/cat")
    shutil.copytree(tmp_path / "one/bird", tmp_path / "two/ant")

    cli("train_ldm.py", *TINY_LDM, *ONE_LEVEL, *ONE_STEP, "--task", "class", "--size", 16,
        "--data", tmp_path / "one", "--ae", trained / "ae/ckpt.pt", "--out", tmp_path / "a")
    output = tune(cli, tmp_path / "a/ckpt.pt", tmp_path / "b", "--data", tmp_path / "two")
    assert "known to the model: 1 class: cat" in output
    assert "new to the model: 1 class: ant" in output

    checkpoint = load_checkpoint(tmp_path / "b/ckpt.pt")
    assert checkpoint["classes"] == ["bird", "cat", "ant"]
    assert checkpoint["config"]["tau"]["n_classes"] == 4
    cli("sample.py", "--ckpt", tmp_path / "b/model.pt", "--steps", 2, "--n", 1, "ant", "bird",
        "--out", tmp_path / "x.png")
    output = cli("train_ldm.py", "--init", tmp_path / "a/ckpt.pt", *ONE_STEP, "--lora", 2,
                 "--data", tmp_path / "two", "--out", tmp_path / "c", code=2)
    assert "--lora: the model has no classes ant, and a LoRA adds none" in output


# ---- resuming

def test_a_run_with_a_start_goes_on_as_itself_only(trained, tmp_path, cli):
    """Two steps at once are one and one; another start, or none, is refused."""
    file = shutil.copy(trained / "ldm/model.pt", tmp_path / "model.pt")
    flags = ["--no-cosine", "--lr", 1e-3]
    tune(cli, file, tmp_path / "whole", *flags, "--steps", 2)
    tune(cli, file, tmp_path / "x", *flags)
    moved = shutil.move(file, tmp_path / "moved.pt")
    tune(cli, moved, tmp_path / "x", *flags, "--steps", 2)
    whole = trained_state(tmp_path / "whole")
    assert_close(trained_state(tmp_path / "x"), whole, rtol=0, atol=0)

    checkpoint = torch.load(moved, weights_only=True)
    next(iter(checkpoint["ema"]["unet"].values())).mul_(2)
    save_checkpoint(checkpoint, tmp_path / "other.pt")
    output = tune(cli, tmp_path / "other.pt", tmp_path / "x", code=2)
    assert "was made with init = a model of hash " in output

    shutil.copytree(trained / "ldm", tmp_path / "scratch")
    output = tune(cli, moved, tmp_path / "scratch", code=2)
    assert "was made with init = None, now it is a model of hash " in output


def test_dry_run_needs_no_data_and_counts_what_is_trained(trained, cli):
    """20 bytes for a weight that is trained, 4 for one that is frozen."""
    file = trained / "ldm/ckpt.pt"
    model = open_model(file)
    n = sum(p.numel() for net in (model.unet, model.tau) for p in net.parameters())
    output = cli("train_ldm.py", "--init", file, "--dry-run", "--data", "")
    assert f"{n:,} parameters in training: {20 * n / 2 ** 30:.2f} GiB" in output
    output = cli("train_ldm.py", "--init", file, "--dry-run", "--data", "", "--lora", 2)
    assert f"parameters in training and {n:,} frozen" in output


# ---- a LoRA

def test_a_lora_trains_its_pairs_alone(trained, tmp_path, cli):
    """Nothing else is in its checkpoint; two steps at once are one and one."""
    file = trained / "ldm/model.pt"
    flags = ["--lora", 2, "--lora-tau", "--no-cosine", "--lr", 1e-2]
    tune(cli, file, tmp_path / "whole", *flags, "--steps", 2, "--eval-n", 2)
    tune(cli, file, tmp_path / "x", *flags)
    tune(cli, file, tmp_path / "x", *flags, "--steps", 2)
    checkpoint = load_checkpoint(tmp_path / "x/ckpt.pt", "lora")
    assert_close(checkpoint["nets"], load_checkpoint(tmp_path / "whole/ckpt.pt", "lora")["nets"],
                 rtol=0, atol=0)
    assert list(checkpoint["nets"]) == list(checkpoint["ema"]) == ["lora"]
    assert "ae" not in checkpoint
    assert not (tmp_path / "x/model.pt").exists()
    assert (tmp_path / "x/lora.safetensors").exists()
    assert list((tmp_path / "whole").glob("samples_*.png"))

    output = tune(cli, file, tmp_path / "x", "--lora", 4, "--lora-tau", code=2)
    assert "lora rank = 2, now it is 4" in output
    output = tune(cli, file, tmp_path / "x", "--lora", 2, code=2)
    assert "lora tau = True, now it is False" in output
    output = tune(cli, file, tmp_path / "x", code=2)
    assert "a checkpoint of a LoRA in training, where one of stage two" in output
    output = cli("sample.py", "--ckpt", tmp_path / "x/ckpt.pt", "a", code=2)
    assert "the lora.safetensors beside it is for sample.py --lora" in output
    output = cli("train_ldm.py", "--ae", tmp_path / "x/ckpt.pt", "--out", tmp_path / "y", code=2)
    assert "ckpt.pt: a checkpoint of a LoRA in training; the lora.safetensors" in output

    # The prompt may come after the file.
    cli("sample.py", "--ckpt", file, "--steps", 2, "--out", tmp_path / "x.png",
        "--lora", tmp_path / "x/lora.safetensors", "a red circle")


def test_the_z_std_of_a_preset_is_that_of_its_own_autoencoder():
    """With another one it is measured, unless a flag gives it."""
    args = train_ldm.parse_args(["--preset", "sd-v1"])
    own = SimpleNamespace(cfg=presets.ae_config("kl-f8"))
    other = SimpleNamespace(cfg=presets.ae_config("kl-f4"))
    assert train_ldm.z_std_flag(args, own) == pytest.approx(1 / 0.18215)
    assert train_ldm.z_std_flag(args, other) is None
    args = train_ldm.parse_args(["--preset", "sd-v1", "--z-std", "3"])
    assert train_ldm.z_std_flag(args, other) == 3
