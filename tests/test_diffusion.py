"""diffusion.py against closed forms and independent derivations.

What holds for every schedule and every prediction is tested in test_tables.py.
"""
import math

import pytest
import torch
from torch.testing import assert_close

from tinyldm import diffusion
from tinyldm.diffusion import (
    DiffusionConfig,
    as_eps_theta,
    at,
    cosine_betas,
    cumulative,
    draw_timesteps,
    ldm_loss,
    posterior,
    predict_z_0,
    q_sample,
    snr_weight,
    sqrt_linear_betas,
)
from tinyldm.errors import BadInput

ABAR = cumulative(sqrt_linear_betas())


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- schedules

def test_sqrt_linear_is_linear_in_the_root_and_has_the_papers_ends():
    betas = sqrt_linear_betas(1000, 0.0015, 0.0195)
    ends = torch.tensor([0.0015, 0.0195], dtype=torch.float64)
    assert_close(betas[[0, -1]], ends)
    steps = betas.sqrt().diff()
    assert_close(steps, steps[:1].expand(999), rtol=1e-9, atol=0)


def test_terminal_signal_is_the_papers():
    """sqrt(abar_T) = 0.0119 for betas from 0.0015 to 0.0195."""
    assert abs(ABAR[-1].sqrt().item() - 0.0119) < 5e-5


def test_cosine_follows_the_cosine_until_the_clamp():
    abar = cumulative(cosine_betas(1000))

    def squared_cosine(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 499, 900):
        want = squared_cosine(t + 1) / squared_cosine(0)
        assert_close(abar[t].item(), want, rtol=1e-9, atol=0)
    assert cosine_betas(1000).max() == 0.999


def test_config_gives_abar_and_its_defaults_are_the_papers():
    assert_close(DiffusionConfig().abar(), ABAR, rtol=0, atol=0)
    assert DiffusionConfig().predict == "eps"
    config = DiffusionConfig("sqrt-linear", T=20, beta_range=(0.1, 0.2))
    want = cumulative(sqrt_linear_betas(20, 0.1, 0.2))
    assert_close(config.abar(), want, rtol=0, atol=0)


def test_a_range_of_betas_for_the_cosine_schedule_is_bad_input():
    with pytest.raises(BadInput, match="beta_range .*cosine"):
        DiffusionConfig("cosine", beta_range=(0.1, 0.2))


# ---- the process

@pytest.mark.parametrize("betas", [sqrt_linear_betas(), cosine_betas()])
def test_ddpm_eq_4_q_sample_equals_the_chain_of_eq_2(betas):
    """Mean and variance of z_t | z by steps z_t = sqrt(1 - beta) z_s + sqrt(beta) eps."""
    abar = cumulative(betas)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    mean = 1.0
    variance = 0.0
    for t, beta in enumerate(betas.tolist()):
        mean = math.sqrt(1 - beta) * mean
        variance = (1 - beta) * variance + beta
        if t in (0, 1, 500, 999):
            z_t = q_sample(one, torch.tensor([t]), 0 * one, abar)
            noise = q_sample(0 * one, torch.tensor([t]), one, abar)
            assert_close(z_t.item(), mean, rtol=1e-9, atol=1e-12)
            assert_close(noise.item() ** 2, variance, rtol=1e-9, atol=0)


def test_q_sample_uses_each_samples_own_t():
    z = normal(3, 2, 4, 4)
    eps = normal(3, 2, 4, 4, seed=1)
    t = torch.tensor([0, 400, 999])
    alone = [q_sample(z[i:i + 1], t[i:i + 1], eps[i:i + 1], ABAR) for i in range(3)]
    assert_close(q_sample(z, t, eps, ABAR), torch.cat(alone))


def test_predict_z_0_undoes_q_sample():
    z = normal(1, 2, 3, 3)
    eps = normal(1, 2, 3, 3, seed=1)
    z_t = q_sample(z, torch.tensor([700]), eps, ABAR)
    assert_close(predict_z_0(z_t, eps, ABAR[700]), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("t,s", [(1, 0), (500, 499), (999, 998), (999, 600), (40, 3)])
def test_ddpm_eq_7_posterior_is_bayes_rule(t, s):
    """q(z_s | z_t, z_0) by multiplying the two Gaussians q(z_s | z_0) and q(z_t | z_s)."""
    z_0 = 0.7
    z_t = -0.4
    abar_s = ABAR[s].item()
    alpha = ABAR[t].item() / abar_s
    precision = 1 / (1 - abar_s) + alpha / (1 - alpha)
    from_z_0 = math.sqrt(abar_s) * z_0 / (1 - abar_s)
    from_z_t = math.sqrt(alpha) * z_t / (1 - alpha)

    values = torch.tensor([z_0, z_t], dtype=torch.float64)
    mean, variance = posterior(values[0], values[1], ABAR[t], ABAR[s])
    assert_close(mean.item(), (from_z_0 + from_z_t) / precision, rtol=1e-9, atol=0)
    assert_close(variance.item(), 1 / precision, rtol=1e-9, atol=0)


def test_posterior_at_the_end_is_z_0_itself():
    z_0 = normal(1, 2, 3, 3).double()
    z_t = normal(1, 2, 3, 3, seed=1).double()
    mean, variance = posterior(z_0, z_t, ABAR[30], torch.ones_like(ABAR[30]))
    assert_close(mean, z_0)
    assert variance == 0


# ---- what the network predicts

def test_a_net_that_predicts_eps_is_eps_theta():
    """It is called with z_t, t and the parts of ctx; its output becomes float32."""
    z_t = normal(2, 3, 4, 4)
    t = torch.tensor([5, 600])
    calls = []

    def net(*inputs):
        calls.append(inputs)
        return z_t.half()

    eps_theta = as_eps_theta(net, ABAR, "eps")
    assert_close(eps_theta(z_t, t, ("tokens", None)), z_t.half().float(), rtol=0, atol=0)
    assert calls[0][0] is z_t
    assert calls[0][1] is t
    assert calls[0][2:] == ("tokens", None)


def test_a_net_that_predicts_v_gives_eps_back():
    """(z_t, v) is (z, eps), rotated; from the true v follows the eps that was added."""
    z = normal(3, 2, 4, 4)
    eps = normal(3, 2, 4, 4, seed=1)
    t = torch.tensor([0, 300, 999])
    abar_t = at(ABAR, t, z)
    z_t = q_sample(z, t, eps, ABAR)
    v = abar_t.sqrt() * eps - (1 - abar_t).sqrt() * z
    assert_close(z_t ** 2 + v ** 2, z ** 2 + eps ** 2, rtol=1e-4, atol=1e-4)

    eps_theta = as_eps_theta(lambda z_t, t: v, ABAR, "v")
    assert_close(eps_theta(z_t, t, ()), eps, rtol=1e-4, atol=1e-4)


# ---- the loss

@pytest.mark.parametrize("norm,want", [("l1", [0, 0.5, 2]), ("l2", [0, 0.25, 4])])
def test_ldm_eq_2_loss_by_hand(norm, want):
    """Zero for the true eps, else the error's norm; eps_theta is given z_t, t and ctx."""
    z = normal(3, 2, 4, 4)
    eps = normal(3, 2, 4, 4, seed=1)
    t = torch.tensor([1, 50, 900])
    ctx = (normal(3, 5, 8), None)
    error = torch.tensor([0.0, 0.5, -2.0]).view(3, 1, 1, 1)
    calls = []

    def eps_theta(z_t, t, ctx):
        calls.append((z_t, t, ctx))
        return eps + error

    loss = ldm_loss(eps_theta, z, t, eps, ABAR, ctx, norm)
    assert_close(loss, torch.tensor(want).float())
    assert_close(calls[0][0], q_sample(z, t, eps, ABAR))
    assert calls[0][1] is t
    assert calls[0][2] is ctx


def test_a_net_that_knows_nothing_has_loss_1():
    z = normal(64, 4, 16, 16)
    eps = normal(64, 4, 16, 16, seed=1)
    t = torch.arange(64) * 1000 // 64
    loss = ldm_loss(lambda z_t, t, ctx: torch.zeros_like(z_t), z, t, eps, ABAR)
    assert loss.shape == (64,)
    assert abs(loss.mean() - 1) < 0.02


@pytest.mark.parametrize("t", [10, 300, 500, 990])
def test_snr_weight_clamps_the_weight_of_errors_of_z_0(t):
    """An error of z_0 by 0.3 costs 0.09 SNR in Eq. (2), and 0.09 clamp(SNR) if weighted."""
    z = normal(1, 2, 4, 4)
    eps = normal(1, 2, 4, 4, seed=1)
    abar_t = ABAR[t].item()
    snr = abar_t / (1 - abar_t)
    t = torch.tensor([t])
    z_t = q_sample(z, t, eps, ABAR)
    wrong_eps = (z_t - abar_t ** 0.5 * (z + 0.3)) / (1 - abar_t) ** 0.5

    loss = ldm_loss(lambda z_t, t, ctx: wrong_eps, z, t, eps, ABAR)
    assert_close(loss.item(), 0.09 * snr, rtol=1e-2, atol=0)
    weighted = loss * snr_weight(t, ABAR, 0.05, 1.0)
    assert_close(weighted.item(), 0.09 * min(max(snr, 0.05), 1.0), rtol=1e-2, atol=0)
    assert snr_weight(t, ABAR, 0.0, math.inf) == 1


# ---- timesteps of training

def test_timesteps_are_spread_over_0_to_T_minus_1():
    """Each 64th of 0..T-1 has one t of a batch of 64, in random order."""
    generator = torch.Generator().manual_seed(0)
    t = torch.stack([draw_timesteps(64, 1000, generator) for _ in range(300)])
    part = t.sort().values * 64 / 1000
    assert ((part - torch.arange(64)).abs() < 1.1).all()
    assert (t[:, 0].float().mean() - 499.5).abs() < 80
    assert t.min() == 0
    assert t.max() == 999


def test_timesteps_stay_in_range_where_the_random_part_rounds_up(monkeypatch):
    """In float32, 63 + the largest number below 1 is 64. It happens once in 500,000 steps."""
    largest = 1 - 2 ** -24
    monkeypatch.setattr(
        diffusion.torch, "rand", lambda n, generator: torch.full((n,), largest)
    )
    assert draw_timesteps(64, 1000, torch.Generator()).max() == 999
