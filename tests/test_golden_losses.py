"""patchgan.py and losses.py against the official code's numbers (tests/golden)."""
import json
import math

import pytest
import torch
from goldens import close, golden, weights
from torch import Tensor
from torch.nn import functional as F

from tinyldm.autoencoder import Posterior
from tinyldm.losses import (
    LossConfig,
    adversarial_loss,
    autoencoder_loss,
    discriminator_loss,
    reconstruction_loss,
    regularisation_loss,
)
from tinyldm.patchgan import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    hinge_loss,
    vanilla_loss,
)
from tinyldm.quantize import Quantised

G = golden("losses")
CASES = json.loads(str(G["config"]))["cases"]
MODES = ["train", "eval"]


def load_official(disc: Discriminator, state: dict) -> Discriminator:
    """Load the official discriminator's weights; its main.N is our layers.N."""
    renamed = {}
    for key, value in state.items():
        renamed[key.replace("main.", "layers.")] = torch.as_tensor(value)
    disc.load_state_dict(renamed)
    return disc


# ---- D_psi

@pytest.mark.parametrize("case", ["n3", "n2", "n4"])
def test_official_discriminator(case):
    """In eval, then in train with the buffers afterwards, then with small variances."""
    ref = golden("disc")
    config = json.loads(str(ref["config"]))["cases"][case]
    disc = Discriminator(DiscriminatorConfig(config["ndf"], config["n_layers"]))
    x = torch.from_numpy(ref["in/x"])

    state = weights(ref["recipe"], f"{case}/")
    stored = f"w/{case}/"
    state |= {k.removeprefix(stored): ref[k] for k in ref if k.startswith(stored)}
    load_official(disc, state)
    close(disc.eval()(x), ref[f"out/{case}/y_eval"])

    close(disc.train()(x), ref[f"out/{case}/y_train"])
    after = [k for k in ref if k.startswith(f"out/{case}/after_train/")]
    assert len(after) == 3 * config["n_layers"]
    for key in after:
        close(disc.state_dict()["layers" + key.split("main")[1]], ref[key])

    load_official(disc, state)
    for name, buffer in disc.named_buffers():
        if name.endswith("running_var"):
            buffer.mul_(2 ** -14)
    close(disc.eval()(x), ref[f"out/{case}/y_eval_smallvar"])


def test_official_discriminator_losses():
    real = torch.from_numpy(G["in/logits_real"])
    fake = torch.from_numpy(G["in/logits_fake"])
    close(hinge_loss(real, fake), G["out/hinge_d_loss"])
    close(vanilla_loss(real, fake), G["out/vanilla_d_loss"])


def test_official_adaptive_weight():
    """From gradients of known norm; the official number includes disc_weight = 0.5."""
    w = torch.zeros(3, 6, 3, 3, requires_grad=True)
    grad_rec = torch.from_numpy(G["out/adaptive/nll_grad"])
    grad_adv = torch.from_numpy(G["out/adaptive/g_grad"])
    lam = adaptive_weight((w * grad_rec).sum(), (w * grad_adv).sum(), w)
    close(0.5 * lam, G["out/adaptive/d_weight_official"])


# ---- whole steps of LPIPSWithDiscriminator and VQLPIPSWithDiscriminator, after disc_start

class Step:
    """A case of the reference in one mode: its networks, images, weights and numbers."""

    def __init__(self, case: str, mode: str):
        self.params = CASES[case]["params"]
        self.is_kl = case.startswith("kl")
        self.prefix = f"out/{case}/{mode}/step50/"
        self.cfg = LossConfig(
            pixel_loss=self.params.get("pixel_loss", "l1"),
            perceptual_weight=self.params.get("perceptual_weight", 1.0),
            kl_weight=self.params.get("kl_weight", 0.0),
            codebook_weight=self.params.get("codebook_weight", 1.0),
            disc_weight=self.params["disc_weight"],
            disc_loss=self.params.get("disc_loss", "hinge"),
        )

        stored = "w/discriminator."
        state = {k.removeprefix(stored): G[k] for k in G if k.startswith("w/")}
        disc = Discriminator(DiscriminatorConfig(ch=16, n_layers=3))
        self.disc = load_official(disc, state).train(mode == "train")

        # The reconstruction is a convolution, which stands for D's last layer.
        self.x = torch.from_numpy(G["in/x"])
        h = torch.from_numpy(G["in/feat"])
        bias = torch.from_numpy(G["in/last_layer_bias"])
        self.w = torch.from_numpy(G["in/last_layer_weight"]).requires_grad_()
        self.x_rec = F.conv2d(h, self.w, bias, padding=1)

        self.moments = torch.from_numpy(G["in/posterior_moments"]).requires_grad_()
        if self.is_kl:
            self.q = Posterior(*self.moments.chunk(2, dim=1))
        else:
            # Its loss is 1.25 * 0.3, the official 0.375.
            shape = (1, 3, 4, 4)
            self.q = Quantised(torch.zeros(shape), torch.full(shape, 0.3 ** 0.5), None)

    def ref(self, key: str):
        """The official number of that key."""
        return G[self.prefix + key]


def mean_square(x: Tensor, x_rec: Tensor) -> Tensor:
    """The reference's stand-in for LPIPS."""
    return (x - x_rec).square().mean((1, 2, 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_official_autoencoders_step(case, mode):
    """n = 3HW turns means into the official KL loss's sums over pixels.

    Its logvar, which is always 0 here, makes of L_rec exp(-logvar) L_rec + logvar.
    """
    step = Step(case, mode)
    loss_rec, rec_figures = reconstruction_loss(step.cfg, mean_square, step.x, step.x_rec)
    loss_reg, reg_figures = regularisation_loss(step.cfg, step.x, step.q)
    loss_adv = adversarial_loss(step.cfg, step.disc, step.x_rec)
    lam = adaptive_weight(loss_rec, loss_adv, step.w)

    n = step.x[0].numel() if step.is_kl else 1
    logvar = step.params.get("logvar_init", 0.0)
    nll = n * (math.exp(-logvar) * loss_rec + logvar)
    d_weight = n * math.exp(-logvar) * step.cfg.disc_weight * lam
    total = nll + n * loss_reg + d_weight * loss_adv
    total.backward()

    close(loss_rec, step.ref("opt0/rec_loss"))
    close(nll, step.ref("opt0/nll_loss"))
    close(loss_adv, step.ref("opt0/g_loss"))
    close(total, step.ref("opt0/total_loss"))
    close(d_weight, step.ref("opt0/d_weight"), 2e-4)
    close(step.w.grad, step.ref("opt0/grad_last_layer"), 2e-4)
    if step.is_kl:
        close(reg_figures["kl"] * step.q.mean[0].numel(), step.ref("opt0/kl_loss"))
        close(step.moments.grad, step.ref("opt0/grad_moments"))
    else:
        close(reg_figures["codebook"], step.ref("opt0/quant_loss"))
        close(rec_figures["perceptual"], step.ref("opt0/p_loss"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_autoencoder_loss_is_the_official_total(case, mode):
    """Up to the factor n = 3HW for KL, where logvar is 0 as it is in all released models."""
    step = Step(case, mode)
    loss, figures = autoencoder_loss(
        step.cfg, mean_square, step.disc, step.w, step.x, step.x_rec, step.q, True
    )
    n = step.x[0].numel() if step.is_kl else 1
    if "logvar_init" not in step.params:
        close(n * loss, step.ref("opt0/total_loss"))
        close(n * step.cfg.disc_weight * figures["lam"], step.ref("opt0/d_weight"), 2e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_official_discriminators_step(case, mode):
    """D_psi sees real and reconstructed images one after the other, in both modes."""
    step = Step(case, mode)
    loss, figures = discriminator_loss(step.cfg, step.disc, step.x, step.x_rec)
    loss.backward()
    norms = torch.stack([p.grad.norm() for p in step.disc.parameters()])

    close(figures["d_real"], step.ref("opt1/logits_real"))
    close(figures["d_fake"], step.ref("opt1/logits_fake"))
    close(loss, step.ref("opt1/disc_loss"))
    close(norms.norm(), step.ref("opt1/disc_grad_norm"), 2e-4)


def running_mean_norms(disc: Discriminator) -> Tensor:
    """The norm of each BatchNorm's running mean."""
    means = [v for k, v in disc.named_buffers() if k.endswith("running_mean")]
    return torch.stack([mean.norm() for mean in means])


@pytest.mark.parametrize("case", CASES)
def test_both_steps_move_the_running_means_of_batch_norm(case):
    """D_psi's step moves them twice, the autoencoder's step once."""
    step = Step(case, "train")
    discriminator_loss(step.cfg, step.disc, step.x, step.x_rec)
    close(running_mean_norms(step.disc), step.ref("opt1/disc_running_mean_norm"))

    step = Step(case, "train")
    adversarial_loss(step.cfg, step.disc, step.x_rec)
    close(running_mean_norms(step.disc), step.ref("opt0/disc_running_mean_norm"))
