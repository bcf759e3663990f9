"""Nothing is left behind on the CPU, and no float64 goes to a device that may not have it.

The programs run on a device that is only pretended (elsewhere.py), which refuses both.
"""
import importlib
from contextlib import nullcontext

import pytest
import torch
from conftest import ONE_LEVEL, TINY_AE, TINY_LDM, TINY_VQ
from elsewhere import DEVICE, PretendDevice
from PIL import Image
from runs import trained_state
from torch.testing import assert_close

from tinyldm.data.open import open_dataset
from tinyldm.engine.open import open_model
from tinyldm.engine.processes import fastest_device
from tinyldm.samplers import SAMPLERS
from tinyldm.tasks import TASKS

AE = [*TINY_AE, "--size", 16, "--steps", 2, "--disc-start", 1, "--eval-n", 4]
LDM = [*TINY_LDM, *ONE_LEVEL, "--size", 16, "--T", 4, "--steps", 1, "--eval-n", 0]
ELSEWHERE = ["--device", DEVICE.type]

pytestmark = pytest.mark.usefixtures("few_are_held_out")


@pytest.fixture
def device(monkeypatch):
    """There is a device more. What torch can do on few devices only, it is told to do there."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **how: nullcontext())
    optimizer = importlib.import_module("torch.optim.optimizer")
    monkeypatch.setattr(
        optimizer, "_get_fused_kernels_supported_devices", lambda: ["cpu", DEVICE.type]
    )
    with PretendDevice():
        yield


def test_the_pretended_device_refuses_what_a_real_one_does(device):
    x = torch.ones(2, 3).to(DEVICE)
    assert x.device == DEVICE
    assert (x * torch.tensor(2.0, dtype=torch.float64)).sum().item() == 12
    with pytest.raises(AssertionError, match="of the CPU among"):
        x + torch.ones(3)
    with pytest.raises(AssertionError, match="float64"):
        x.double()


@pytest.mark.parametrize("flags", [TINY_AE, TINY_VQ], ids=["kl", "vq"])
def test_stage_one(device, cli, tmp_path, flags):
    cli("train_ae.py", *AE, *flags, *ELSEWHERE, "--out", tmp_path / "ae")


@pytest.mark.parametrize("task", TASKS)
def test_stage_two(device, trained, cli, tmp_path, task):
    """A step, and samples for held-out conditions."""
    cli("train_ldm.py", *LDM, "--ae", trained / "ae/ckpt.pt", "--task", task, *ELSEWHERE,
        "--out", tmp_path)
    model = open_model(tmp_path / "model.pt", device=DEVICE)
    data = open_dataset("shapes", "held-out", size=16, fields=model.task.fields)
    model.sample([data[0], data[1]], seeds=[(0, 0), (0, 1)], steps=1)


@pytest.mark.parametrize("flags", [
    ["--no-cache-latents", "--micro-batch", 2, "--eval-n", 2],
    ["--schedule", "straight", "--predict", "flow", "--loss-of", "output", "--draw-t",
     "logit-normal", "--snr-clamp", 0, "inf"],
    ["--task", "class", "--classifier", "--eval-n", 2],
], ids=["no cache", "flow", "classifier"])
def test_other_ways_of_training(device, trained, cli, tmp_path, flags):
    cli("train_ldm.py", *LDM, *flags, "--ae", trained / "ae/ckpt.pt", *ELSEWHERE,
        "--out", tmp_path / "ldm")


@pytest.mark.parametrize("flags", [
    ["--distill", 2], ["--control"], ["--lora", 2, "--lora-tau"],
], ids=lambda flags: flags[0])
def test_from_a_trained_model(device, trained, cli, tmp_path, flags):
    cli("train_ldm.py", "--init", trained / "ldm/model.pt", *flags, "--data", "shapes",
        "--n-shapes", 40, "--steps", 1, "--eval-n", 0, *ELSEWHERE, "--out", tmp_path / "ldm")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(device, trained, sampler):
    model = open_model(trained / "ldm/model.pt", device=DEVICE)
    items = [{"caption": "a red circle"}]
    images = model.sample(items, seeds=[(0, 0)], steps=2, sampler=sampler, guidance_scale=2.0)
    assert images.device.type == "cpu"


@pytest.mark.parametrize("flags", [
    ["--interval", 0.5, 20, "--rescale", 0.5, "--scale", 3, "--init", "{png}"],
    ["--image", "{png}", "--mask", "{mask}", "--guide", "{png}"],
    ["--trajectory", "{steps}", "--attention", "{words}", "--negative", "a cross"],
], ids=["from an image", "repaint", "look inside"])
def test_ways_of_sampling(device, trained, cli, tmp_path, flags):
    places = {name: tmp_path / f"{name}.png" for name in ("png", "mask", "steps", "words")}
    Image.new("RGB", (16, 16), "white").save(places["png"])
    half = Image.new("L", (16, 16))
    half.paste("white", (0, 0, 16, 8))
    half.save(places["mask"])

    flags = [str(flag).format(**places) for flag in flags]
    cli("sample.py", "--ckpt", trained / "ldm/model.pt", "--n", 2, "--steps", 2, *flags,
        *ELSEWHERE, "--out", tmp_path / "x.png", "a red circle")


def test_what_is_found_there_is_found_here(trained, cli, tmp_path, request):
    """The same weights after a step, but for the order of sums."""
    command = ["train_ldm.py", *LDM, "--ae", trained / "ae/ckpt.pt", "--out"]
    cli(*command, tmp_path / "here")
    request.getfixturevalue("device")
    cli(*command, tmp_path / "there", *ELSEWHERE)
    assert_close(trained_state(tmp_path / "there"), trained_state(tmp_path / "here"))


def test_auto_takes_cuda_then_apples_gpu_then_the_cpu(monkeypatch):
    there_is = {"cuda": True, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there_is["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there_is["mps"])
    assert fastest_device() == "cuda"
    there_is["cuda"] = False
    assert fastest_device() == "mps"
    there_is["mps"] = False
    assert fastest_device() == "cpu"
