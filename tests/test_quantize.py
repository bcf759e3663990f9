"""quantize.py: brute force, gradients by hand, closed forms, the official numbers."""
import math

import pytest
import torch
from goldens import close, golden, weights
from torch.testing import assert_close

from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.quantize import Codebook, count_codes, perplexity, rows_of_latents


def latents():
    """Return z (2, 3, 4, 5), the same each time."""
    return torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def normal_codebook():
    """Return a codebook of 16 codes ~ N(0, 1), the same each time."""
    torch.manual_seed(1)
    codebook = Codebook(16, 3)
    torch.nn.init.normal_(codebook.codes)
    return codebook


# ---- the nearest code

def test_vq_vae_eq_1_and_2_nearest_code_by_brute_force():
    codebook = normal_codebook()
    z = latents()
    q = codebook(z)

    codes = codebook.codes.tolist()
    rows = rows_of_latents(z).tolist()
    for row, number in zip(rows, q.k.flatten().tolist()):
        distances = [math.dist(code, row) for code in codes]
        assert number == distances.index(min(distances))

    assert_close(rows_of_latents(q.zq), codebook.codes[q.k.flatten()], rtol=0, atol=0)
    assert q.z is z
    assert len(q.k.unique()) > 8


def test_rows_of_latents_are_the_channels_of_each_place():
    z = latents()
    rows = rows_of_latents(z)
    assert rows.shape == (40, 3)
    assert_close(rows[20 + 2 * 5 + 4], z[1, :, 2, 4], rtol=0, atol=0)


def test_nearest_codes_are_found_in_full_precision_under_autocast():
    """Codes 1e-4 apart, far from 0: bf16 and |z|^2 - 2 z e + |e|^2 mix them up."""
    codebook = Codebook(64, 3)
    codebook.codes.data = 40 + 1e-4 * torch.arange(64.0)[:, None].expand(64, 3)
    k = torch.randperm(64, generator=torch.Generator().manual_seed(0)).view(1, 8, 8)
    z = codebook.codes.data[k].movedim(-1, 1) + 2e-5

    with torch.autocast("cpu", torch.bfloat16):
        q = codebook(z)

    assert (q.k == k).all()
    assert q.zq.dtype == torch.float32
    assert codebook(z.bfloat16()).z.dtype == torch.float32


def test_codes_begin_uniform_in_1_over_n():
    codes = Codebook(1000, 8).codes.detach() * 1000
    assert codes.abs().max() <= 1
    assert abs(codes.std() - 3 ** -0.5) < 0.02


# ---- gradients

def test_straight_through_gives_the_gradient_to_z_alone():
    codebook = normal_codebook()
    z = latents().requires_grad_()
    cotangent = latents().flip(0)
    q = codebook(z)

    out = q.straight_through()
    (out * cotangent).sum().backward()

    assert_close(out, q.zq)
    assert_close(z.grad, cotangent, rtol=0, atol=0)
    assert codebook.codes.grad is None


@pytest.mark.parametrize("beta_on", ["codebook", "commitment"])
def test_vq_vae_eq_3_gradients_by_hand(beta_on):
    """The commitment term pulls latents to codes, the codebook term codes to latents.

    d/dz of mean((sg(zq) - z)^2) is 2 (z - zq) / n; d/de_j of mean((zq - sg(z))^2) is
    the sum of 2 (e_j - z) / n over the places with code j; beta weighs one of the two.
    """
    codebook = normal_codebook()
    z = latents().requires_grad_()
    beta = 0.3
    q = codebook(z)
    loss = q.loss(beta, beta_on)
    loss.backward()

    pull = 2 * (z - q.zq).detach() / z.numel()
    pull_on_codes = torch.zeros_like(codebook.codes)
    pull_on_codes.index_add_(0, q.k.flatten(), -rows_of_latents(pull))
    weight_on_codes = beta if beta_on == "codebook" else 1
    weight_on_z = beta if beta_on == "commitment" else 1

    assert_close(z.grad, weight_on_z * pull)
    assert_close(codebook.codes.grad, weight_on_codes * pull_on_codes)
    assert_close(loss, (1 + beta) * (z - q.zq).square().mean())


def test_the_default_loss_is_that_of_the_released_models():
    codebook = normal_codebook()
    q = codebook(latents())
    default = q.loss()
    released = q.loss(0.25, "codebook")

    assert default == released
    gradient = torch.autograd.grad(default, codebook.codes, retain_graph=True)
    assert_close(gradient, torch.autograd.grad(released, codebook.codes))


def test_beta_on_something_else_raises():
    with pytest.raises(ValueError, match="'codebook' or 'commitment'"):
        normal_codebook()(latents()).loss(0.25, "code")


# ---- how codes are used

@pytest.mark.parametrize(
    "counts,wanted",
    [
        ([7, 7, 7, 7], 4),
        ([0, 9, 0], 1),
        ([0, 3, 1], 4 / 27 ** 0.25),        # exp(H(3/4, 1/4)) = 4 / 3^(3/4)
    ],
)
def test_perplexity_in_closed_form(counts, wanted):
    assert_close(perplexity(torch.tensor(counts)).item(), float(wanted))


def test_codes_are_counted():
    k = torch.tensor([[[2, 0], [2, 2]]])
    assert count_codes(k, 4).tolist() == [1, 0, 3, 0]


def restarted(idle, seed):
    """Return a codebook whose idle codes are replaced by rows of latents()."""
    codebook = normal_codebook()
    generator = torch.Generator().manual_seed(seed)
    codebook.restart(idle, rows_of_latents(latents()), generator)
    return codebook.codes


def test_restart_replaces_idle_codes_by_latents_and_keeps_the_others():
    idle = torch.arange(16) % 3 == 0
    old = normal_codebook().codes
    new = restarted(idle, seed=5)

    assert_close(new[~idle], old[~idle], rtol=0, atol=0)
    rows = rows_of_latents(latents()).tolist()
    assert all(code in rows for code in new[idle].tolist())
    assert len(new[idle].unique(dim=0)) > 2
    assert new.requires_grad


def test_restart_follows_from_the_generator():
    idle = torch.arange(16) % 3 == 0
    assert_close(restarted(idle, seed=5), restarted(idle, seed=5), rtol=0, atol=0)
    assert (restarted(idle, seed=5) != restarted(idle, seed=6)).any()


def test_a_vq_autoencoder_learns_one_batch():
    """The loss falls to a tenth with several codes in use; idle ones restart once."""
    torch.manual_seed(0)
    config = AEConfig(ch=8, ch_mult=(1, 2), n_res=1, c_z=3, groups=4, n_codes=32)
    ae = Autoencoder(config)
    coarse = torch.rand(1, 3, 4, 4) * 2 - 1
    x = torch.nn.functional.interpolate(coarse, scale_factor=2)
    no_noise = torch.zeros(1, 3, 4, 4)
    optimiser = torch.optim.Adam(ae.parameters(), 5e-3, fused=True)
    history = []

    for step in range(40):
        x_rec, q = ae(x, no_noise)
        loss_rec = (x_rec - x).square().mean()
        history.append(loss_rec.item())
        optimiser.zero_grad()
        (loss_rec + q.loss()).backward()
        optimiser.step()

        counts = count_codes(q.k, 32)
        if step == 5:
            generator = torch.Generator().manual_seed(step)
            ae.codebook.restart(counts == 0, rows_of_latents(q.z), generator)

    assert history[-1] < 0.1 * history[0], history
    assert (counts > 0).sum() > 4


# ---- the official code's numbers

def test_official_perplexity_and_number_of_codes_in_use():
    ref = golden("losses")
    counts = count_codes(torch.from_numpy(ref["in/indices"]), 16)
    close(perplexity(counts), ref["out/perplexity"])
    assert (counts > 0).sum() == ref["out/cluster_use"]


def official_codebook(ref):
    """Return the codebook of the golden ae_vq, and z, what its E returns."""
    codebook = Codebook(64, 3)
    codebook.codes.data = weights(ref["recipe"])["quantize.embedding.weight"]
    z = torch.from_numpy(ref["out/h"]).requires_grad_()
    return codebook, z


def test_official_codes():
    """The numbers of the codes agree exactly."""
    ref = golden("ae_vq")
    codebook, z = official_codebook(ref)
    q = codebook(z)
    assert (q.k.numpy() == ref["out/indices"]).all()
    close(q.zq, ref["out/codebook_entry"], 0)
    close(q.straight_through(), ref["out/quant"], 1e-7)


@pytest.mark.parametrize(
    "name,beta_on", [("legacy", "codebook"), ("fixed", "commitment")]
)
def test_official_codebook_loss_and_its_gradients(name, beta_on):
    """The released code's legacy=True has beta on the codebook term, by its slip."""
    ref = golden("ae_vq")
    codebook, z = official_codebook(ref)

    loss = codebook(z).loss(0.25, beta_on)
    close(loss, ref[f"out/loss_{name}"])
    close(loss, ref["out/codebook_loss"])

    on_z, on_codes = torch.autograd.grad(loss, (z, codebook.codes))
    close(on_z, ref[f"out/loss_grad_h_{name}"], 2e-4)
    close(on_codes, ref[f"out/loss_grad_codebook_{name}"], 2e-4)
