"""diffusion.py, timestep_embedding and EMA against the official code (tests/golden)."""
import json

import numpy as np
import pytest
import torch
from goldens import close, golden

from tinyldm.diffusion import (
    at,
    cosine_betas,
    cumulative,
    ldm_loss,
    posterior,
    predict_z_0,
    q_sample,
    sqrt_linear_betas,
)
from tinyldm.engine.optimiser import EMA
from tinyldm.layers import timestep_embedding

G = golden("schedules")
BETAS = {
    "cin256": sqrt_linear_betas(),
    "cosine": cosine_betas(),
    "txt2img_sd": sqrt_linear_betas(1000, 0.00085, 0.012),
    "churches_bsr": sqrt_linear_betas(end=0.0155),
    "inpaint_layout_semantic": sqrt_linear_betas(end=0.0205),
}
ABAR = cumulative(BETAS["cin256"])
X0 = torch.from_numpy(G["in/x0"])
NOISE = torch.from_numpy(G["in/noise"])
T = torch.from_numpy(G["in/t"])


def eps_theta(z_t, t, ctx=()):
    """The analytic net of the reference runs."""
    return 0.3 * z_t + 0.1 * (t / 100).sin().view(-1, 1, 1, 1)


# ---- schedules

@pytest.mark.parametrize("name", BETAS)
def test_betas_and_abar_are_the_official_ones(name):
    """In float64; sqrt_linear_betas() is what the official code calls "linear"."""
    assert name in json.loads(str(G["config"]))["schedules"]
    close(BETAS[name], G[f"out/{name}/betas_float64"], 1e-12)
    abar = cumulative(BETAS[name])
    official = G[f"out/{name}/alphas_cumprod"]
    noise_std = G[f"out/{name}/sqrt_one_minus_alphas_cumprod"]
    close(abar, official, 1e-7)
    close(abar[-1:], official[-1:])
    close((1 - abar[:1]).sqrt(), noise_std[:1])


def test_what_the_official_code_calls_sqrt_linear_is_linear_in_beta():
    betas = torch.from_numpy(G["out/sqrt_linear/betas_float64"])
    steps = betas.diff()
    close(steps, steps[:1].expand(999), 1e-9)
    with pytest.raises(AssertionError):
        close(sqrt_linear_betas(1000, 1e-4, 0.02), betas)


# ---- the process

@pytest.mark.parametrize("name", BETAS)
def test_posterior_is_the_official_one_at_every_t(name):
    """The variance, and the factors of z_0 and of z_t in the mean, with s = t - 1."""
    abar = cumulative(BETAS[name])
    one = abar.new_ones(1)
    zero = abar.new_zeros(1)
    abar_s = torch.cat([one, abar[:-1]])
    factor_of_z_0, variance = posterior(one, zero, abar, abar_s)
    factor_of_z_t, _ = posterior(zero, one, abar, abar_s)
    close(variance, G[f"out/{name}/posterior_variance"])
    close(factor_of_z_0, G[f"out/{name}/posterior_mean_coef1"])
    close(factor_of_z_t, G[f"out/{name}/posterior_mean_coef2"])


def test_posterior_of_latents():
    z_t = torch.from_numpy(G["out/q_sample"])
    for i, t in enumerate(T.tolist()):
        abar_s = ABAR[t - 1] if t > 0 else torch.ones(())
        mean, variance = posterior(X0[i], z_t[i], ABAR[t], abar_s)
        close(mean, G["out/q_posterior_mean"][i])
        close(variance.view(1, 1, 1), G["out/q_posterior_variance"][i])


def test_q_sample_and_its_inverse():
    z_t = q_sample(X0, T, NOISE, ABAR)
    close(z_t, G["out/q_sample"])
    close(q_sample(X0, T, NOISE, cumulative(BETAS["txt2img_sd"])), G["out/q_sample_sd"])
    close(q_sample(X0, T, 0 * NOISE, ABAR), G["out/q_mean"])
    one = torch.ones(4, 1, 1, 1)
    close(q_sample(0 * one, T, one, ABAR) ** 2, G["out/q_variance"])
    close(predict_z_0(z_t, NOISE, at(ABAR, T, X0)), G["out/predict_start_from_noise"])


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_ldm_loss_is_p_losses(norm):
    close(eps_theta(q_sample(X0, T, NOISE, ABAR), T), G["out/eps_model"])
    loss = ldm_loss(eps_theta, X0, T, NOISE, ABAR, norm=norm)
    close(loss.mean(), G[f"out/p_losses/{norm}/loss"])


# ---- what surrounds it

@pytest.mark.parametrize("dim", [2, 3, 8, 9, 32, 33, 128, 160, 192, 224, 256, 320])
def test_timestep_embedding_of_any_width_and_of_fractions(dim):
    ref = golden("timestep_embedding")
    t = torch.from_numpy(ref["in/t"])
    fractional = torch.from_numpy(ref["in/t_fractional"])
    close(timestep_embedding(t, dim), ref[f"out/dim{dim}"])
    close(timestep_embedding(fractional, dim), ref[f"out/dim{dim}_fractional"])


def test_ema_is_lit_ema():
    """Five updates of a weight and a bias."""
    ref = golden("training_misc")
    net = torch.nn.Linear(3, 2)

    def load(update):
        state = {k: ref[f"in/ema/{k}"][update] for k in ("weight", "bias")}
        net.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})

    load(0)
    ema = EMA({"unet": net}, 0.9999)
    for update in range(5):
        load(update + 1)
        ema.update()
        for key, average in ema.nets["unet"].state_dict().items():
            close(average, ref[f"out/ema/{key}"][update])
    assert ema.n_updates == ref["out/ema/num_updates"]


def test_ema_decays_as_lit_ema_up_to_a_million_updates():
    """The average of ones, begun at 0, is 1 - decay after one update."""
    ref = golden("training_misc")
    net = torch.nn.Linear(3, 2)
    torch.nn.init.ones_(net.bias)
    ema = EMA({"unet": net}, 0.9999)
    for update, decay in zip(ref["in/ema/n"], ref["out/ema/effective_decay"]):
        ema.n_updates = int(update) - 1
        average = ema.nets["unet"].bias.zero_()
        ema.update()
        close(1 - average, np.full(2, decay))
        close(average, np.full(2, 1 - decay), 1e-3)     # decay is stored in float32
