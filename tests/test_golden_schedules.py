"""diffusion.py, timestep_embedding and EMA against the official code's numbers (tests/golden)."""
import json

import numpy as np
import pytest
import torch
from goldens import close, golden

from tinyldm import diffusion as d
from tinyldm.layers import timestep_embedding
from tinyldm.training import EMA

G = golden("schedules")
BETAS = {"cin256": d.sqrt_linear_betas(), "cosine": d.cosine_betas(),
         "txt2img_sd": d.sqrt_linear_betas(1000, 0.00085, 0.012),
         "churches_bsr": d.sqrt_linear_betas(end=0.0155),
         "inpaint_layout_semantic": d.sqrt_linear_betas(end=0.0205)}
ABAR = d.cumulative(BETAS["cin256"])
X0, NOISE, T = (torch.from_numpy(G[f"in/{k}"]) for k in ("x0", "noise", "t"))


def eps_theta(z_t, t, ctx=None):
    """The analytic net of the reference runs."""
    return 0.3 * z_t + 0.1 * (t / 100).sin().view(-1, 1, 1, 1)


@pytest.mark.parametrize("name", BETAS)
def test_betas_and_abar_are_the_official_ones(name):
    """In float64; sqrt_linear_betas() is what the official code calls "linear"."""
    assert name in json.loads(str(G["config"]))["schedules"]
    close(BETAS[name], G[f"out/{name}/betas_float64"], 1e-12)
    abar = d.cumulative(BETAS[name])
    close(abar, G[f"out/{name}/alphas_cumprod"], 1e-7)
    close(abar[-1:], G[f"out/{name}/alphas_cumprod"][-1:])
    close((1 - abar[:1]).sqrt(), G[f"out/{name}/sqrt_one_minus_alphas_cumprod"][:1])


def test_what_the_official_code_calls_sqrt_linear_is_linear_in_beta():
    b = torch.from_numpy(G["out/sqrt_linear/betas_float64"])
    close(b.diff(), b.diff()[:1].expand(999), 1e-9)
    with pytest.raises(AssertionError):
        close(d.sqrt_linear_betas(1000, 1e-4, 0.02), b)


@pytest.mark.parametrize("name", BETAS)
def test_posterior_variance_and_mean_are_the_official_ones_at_every_t(name):
    """var, and the weights of z_0 and of z_t in the mean, for all t with s = t - 1."""
    abar = d.cumulative(BETAS[name])
    one, zero = abar.new_ones(1), abar.new_zeros(1)
    abar_s = torch.cat([one, abar[:-1]])
    of_z_0, var = d.posterior(one, zero, abar, abar_s)
    of_z_t, _ = d.posterior(zero, one, abar, abar_s)
    close(var, G[f"out/{name}/posterior_variance"])
    close(of_z_0, G[f"out/{name}/posterior_mean_coef1"])
    close(of_z_t, G[f"out/{name}/posterior_mean_coef2"])


def test_q_sample_and_its_inverse():
    z_t = d.q_sample(X0, T, NOISE, ABAR)
    close(z_t, G["out/q_sample"])
    abar = d.cumulative(d.sqrt_linear_betas(1000, 0.00085, 0.012))
    close(d.q_sample(X0, T, NOISE, abar), G["out/q_sample_sd"])
    close(d.q_sample(X0, T, 0 * NOISE, ABAR), G["out/q_mean"])
    one = torch.ones(4, 1, 1, 1)
    close(d.q_sample(0 * one, T, one, ABAR) ** 2, G["out/q_variance"])
    close(d.predict_z_0(z_t, NOISE, d.at(ABAR, T, X0)), G["out/predict_start_from_noise"])


def test_posterior_of_whole_latents():
    z_t = torch.from_numpy(G["out/q_sample"])
    for i, t in enumerate(T.tolist()):
        abar_s = ABAR[t - 1] if t else torch.ones(())
        mean, var = d.posterior(X0[i], z_t[i], ABAR[t], abar_s)
        close(mean, G["out/q_posterior_mean"][i])
        close(var.view(1, 1, 1), G["out/q_posterior_variance"][i])


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_ldm_loss_is_p_losses(norm):
    close(eps_theta(d.q_sample(X0, T, NOISE, ABAR), T), G["out/eps_model"])
    loss = d.ldm_loss(eps_theta, X0, T, NOISE, ABAR, norm=norm)
    close(loss.mean(), G[f"out/p_losses/{norm}/loss"])


def test_timestep_embedding_of_any_width_and_of_fractions():
    g = golden("timestep_embedding")
    for dim in (2, 3, 8, 9, 32, 33, 128, 160, 192, 224, 256, 320):
        for t, name in (("t", f"out/dim{dim}"), ("t_fractional", f"out/dim{dim}_fractional")):
            close(timestep_embedding(torch.from_numpy(g[f"in/{t}"]), dim), g[name])


def test_ema_is_lit_ema():
    """Five updates of weight and bias, then the decay of update n up to a million."""
    g, net = golden("training_misc"), torch.nn.Linear(3, 2)

    def load(i):
        net.load_state_dict({k: torch.from_numpy(g[f"in/ema/{k}"][i]) for k in ("weight", "bias")})
    load(0)
    ema = EMA({"unet": net}, 0.9999)
    for i in range(5):
        load(i + 1)
        ema.update()
        for k, shadow in ema.nets["unet"].state_dict().items():
            close(shadow, g[f"out/ema/{k}"][i])
    assert ema.n == g["out/ema/num_updates"]
    torch.nn.init.ones_(net.bias)
    for n, decay in zip(g["in/ema/n"], g["out/ema/effective_decay"]):
        ema.n, shadow = int(n) - 1, ema.nets["unet"].bias.zero_()
        ema.update()
        close(1 - shadow, np.full(2, decay))
        close(shadow, np.full(2, 1 - decay), 1e-3)          # decay is stored in float32
