"""beyond/classifier.py: a classifier of noisy latents, and an unconditional model led by it."""
import json

import gaussian
import pytest
import torch
from conftest import TINY_LDM
from runs import assert_same_state, log_rows
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm.beyond.classifier import Classifier, accuracy_by_noise, classifier_loss, fits_class
from tinyldm.beyond.gradient_guidance import gradient_guided
from tinyldm.data.shapes import CLASSES
from tinyldm.diffusion import cumulative, q_sample, sqrt_linear_betas
from tinyldm.engine.open import open_model
from tinyldm.samplers import ddim, timesteps
from tinyldm.unet import UNetConfig

ABAR = cumulative(sqrt_linear_betas())
CFG = UNetConfig(c_in=2, c_out=3, side=8, ch=16, ch_mult=(1, 2), n_res=1, attn_res=(8,), d_head=16,
                 groups=4)


def batch() -> tuple[torch.Tensor, ...]:
    """Return z (6, 2, 8, 8), one of whose parts is bright by its class, t, eps and the label."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(6) % 3
    z = torch.randn(6, 2, 8, 8, generator=generator)
    z[label == 0, :, :4] += 4
    z[label == 1, :, :, :4] += 4
    z[label == 2, 0] += 4
    eps = torch.randn(6, 2, 8, 8, generator=generator)
    return z, torch.tensor([0, 10, 100, 300, 500, 999]), eps, label


def test_it_begins_with_equally_likely_classes():
    z, t, eps, label = batch()
    loss = classifier_loss(Classifier(CFG), z, t, eps, ABAR, label)
    assert_close(loss, torch.full((6,), 3.0).log())


def test_the_loss_is_that_of_the_noised_latents():
    z, t, eps, label = batch()
    net = Classifier(CFG)
    torch.nn.init.normal_(net.out.weight)
    logits = net(q_sample(z, t, eps, ABAR), t)
    wanted = F.cross_entropy(logits, label, reduction="none")
    assert_close(classifier_loss(net, z, t, eps, ABAR, label), wanted)

    log_p = fits_class(net, label)(z, t, eps)
    assert_close(log_p, -F.cross_entropy(net(z, t), label, reduction="none"))


def test_it_learns_and_knows_less_where_there_is_more_noise():
    z, t, eps, label = batch()
    torch.manual_seed(0)
    net = Classifier(CFG)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        noise = torch.randn_like(z)
        t = torch.randint(1000, (6,))
        classifier_loss(net, z, t, noise, ABAR, label).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    figures = accuracy_by_noise(net, z, eps, ABAR, label)
    assert list(figures) == [f"accuracy_at_{t}" for t in (125, 375, 625, 875)]
    assert figures["accuracy_at_125"] > 0.9
    assert figures["accuracy_at_875"] < figures["accuracy_at_125"]


def test_each_sample_is_led_to_a_class_of_its_own():
    """By a classifier that finds class k likely if channel k is bright."""
    def net(z_t, t):
        return 20 * z_t.mean((2, 3))

    label = torch.tensor([0, 1, 2, 1])
    log_p = fits_class(net, label)
    eps_theta = gradient_guided(gaussian.eps_theta, ABAR, log_p, 3.0, through=False)
    z_T = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    z_0 = ddim(eps_theta, z_T, (), ABAR, timesteps(ABAR, 50))
    assert_close(z_0.mean((2, 3)).argmax(1), label)


# ---- the whole road

@pytest.fixture(scope="module")
def both(trained, tmp_path_factory, cli):
    """The folders of a tiny unconditional model and of its classifier. Only read them."""
    out = tmp_path_factory.mktemp("classifier")
    start = ["train_ldm.py", *TINY_LDM, "--size", 16, "--ae", trained / "ae/ckpt.pt", "--no-cosine"]
    cli(*start, "--task", "uncond", "--steps", 1, "--eval-n", 0, "--out", out / "uncond")
    cli(*start, "--task", "class", "--classifier", "--steps", 2, "--eval-every", 1,
        "--out", out / "classifier")
    return out, start


def test_it_has_a_class_for_each_of_the_data_set(both):
    out, _ = both
    model = open_model(out / "classifier/model.pt")
    assert isinstance(model.unet, Classifier)
    assert model.unet.out.out_features == len(CLASSES)


def test_training_logs_how_often_it_is_right(both):
    out, _ = both
    rows = [row for row in log_rows(out / "classifier") if "accuracy_at_125" in row]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["accuracy_at_125"] < 0.2             # after a step it knows next to nothing


def test_it_goes_on_bit_for_bit(both, tmp_path, cli):
    out, start = both
    for steps in (1, 2):
        cli(*start, "--task", "class", "--classifier", "--steps", steps, "--eval-n", 0,
            "--out", tmp_path / "x")
    assert_same_state(out / "classifier", tmp_path / "x")


def test_an_unconditional_model_is_led_to_classes(both, tmp_path, cli):
    """The scale decides how far: 0 is the model itself."""
    out, _ = both
    pictures = {}
    for scale in (0, 30):
        folder = tmp_path / str(scale)
        cli("sample.py", "--ckpt", out / "uncond/model.pt", "--classifier",
            out / "classifier/model.pt", "--classifier-scale", scale, "--label", "red circle", "2",
            "--n", 1, "--steps", 4, "--out", folder)
        pictures[scale] = (folder / "000000.png").read_bytes()
    assert pictures[0] != pictures[30]
    labels = [json.loads(line)["label"] for line in (folder / "metadata.jsonl").open()]
    assert labels == [CLASSES[0], CLASSES[2]]
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["classifier_scale"] == 30
    assert len(settings["conditions"]["label"]) == 2

    cli("sample.py", "--ckpt", out / "uncond/model.pt", "--n", 1, "--steps", 4,
        "--out", tmp_path / "plain")
    assert (tmp_path / "plain/000000.png").read_bytes() == pictures[0]


def test_what_does_not_fit_is_one_line(trained, both, tmp_path, cli):
    out, start = both
    uncond = ["sample.py", "--ckpt", out / "uncond/model.pt", "--out", tmp_path / "x.png"]
    classifier = out / "classifier/model.pt"
    for command, message in (
        ([*uncond, "--label", "2"], "--label: this model's task is uncond"),
        ([*uncond, "--classifier-scale", 2], "--classifier-scale: only with --classifier"),
        ([*uncond, "--classifier", out / "uncond/model.pt"], "not a classifier of train_ldm.py"),
        ([*uncond, "--classifier", classifier, "--label", "99"], "'99' is no class"),
        (["sample.py", "--ckpt", classifier, "--out", tmp_path / "x.png"], "samples nothing"),
        (["sample.py", "--ckpt", trained / "ldm/model.pt", "--classifier", classifier, "a cross"],
         "it is for models that are unconditional, or of classes"),
        ([*uncond, "--classifier", classifier, "--label", "2", "--scale", 3],
         "--scale: the model has no condition"),
        ([*uncond, "--classifier", classifier, "--label", "2", "--negative", "3"],
         "--negative: the model has no condition"),
        ([*uncond, "--classifier", classifier, "--label", len(CLASSES)],
         f"--label {len(CLASSES)}: the classifier's classes are 0..{len(CLASSES) - 1}"),
        (["train_ldm.py", "--init", classifier, "--out", tmp_path / "x"],
         "a classifier, from which no training starts"),
        ([*start, "--classifier", "--task", "class", "--fsdp", "--out", tmp_path / "x"],
         "leave out --fsdp"),
        ([*start, "--classifier", "--task", "class", "--loss", "l1", "--out", tmp_path / "x"],
         "--loss: it has no effect with --classifier"),
        ([*start, "--classifier", "--out", tmp_path / "x"], "--classifier: needs --task class"),
        ([*start, "--classifier", "--task", "class", "--backbone", "dit", "--out", tmp_path / "x"],
         "leave out --init and --backbone"),
    ):
        assert message in cli(*command, code=2)
