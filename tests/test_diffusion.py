"""diffusion.py against closed forms and independent derivations."""
import math

import pytest
import torch
from torch.testing import assert_close

from tinyldm import diffusion as d

BETAS = [d.sqrt_linear_betas(), d.cosine_betas()]


def test_sqrt_linear_is_linear_in_the_root_and_has_the_papers_ends():
    b = d.sqrt_linear_betas(1000, 0.0015, 0.0195)
    assert b.dtype == torch.float64
    assert_close(b[[0, -1]], torch.tensor([0.0015, 0.0195], dtype=torch.float64))
    step = b.sqrt().diff()
    assert_close(step, step[:1].expand(999), rtol=1e-9, atol=0)


def test_terminal_signal_is_the_papers():
    """sqrt(abar_T) = .0119 for 0.0015..0.0195 (computed from the released config)."""
    assert abs(d.cumulative(d.sqrt_linear_betas())[-1].sqrt().item() - 0.0119) < 5e-5


def test_cosine_follows_the_cosine_until_the_clamp():
    abar = d.cumulative(d.cosine_betas(1000))
    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 10, 499, 900):
        assert_close(abar[t].item(), f(t + 1) / f(0), rtol=1e-9, atol=0)
    assert d.cosine_betas(1000).max() == 0.999


@pytest.mark.parametrize("betas", BETAS)
def test_ddpm_eq_4_q_sample_equals_the_chain_of_eq_2(betas):
    """Mean and variance of z_t | z by steps z_t = sqrt(1 - beta) z_{t-1} + sqrt(beta) eps."""
    abar, mean, var = d.cumulative(betas), 1.0, 0.0
    for t, b in enumerate(betas.tolist()):
        mean, var = math.sqrt(1 - b) * mean, (1 - b) * var + b
        if t in (0, 1, 500, 999):
            z, tt = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.tensor([t])
            zero, one = torch.zeros_like(z), torch.ones_like(z)
            got = d.q_sample(z, tt, zero, abar)
            assert_close(got.item(), mean, rtol=1e-9, atol=1e-12)
            assert_close((d.q_sample(z, tt, one, abar) - got).item() ** 2, var, rtol=1e-9, atol=0)


def test_q_sample_uses_each_samples_own_t():
    z, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    abar, t = d.cumulative(BETAS[0]), torch.tensor([0, 400, 999])
    each = torch.cat([d.q_sample(z[i:i + 1], t[i:i + 1], eps[i:i + 1], abar) for i in range(3)])
    assert_close(d.q_sample(z, t, eps, abar), each)


@pytest.mark.parametrize("t,s", [(1, 0), (500, 499), (999, 998), (999, 600), (40, 3)])
def test_ddpm_eq_7_posterior_is_bayes_rule(t, s):
    """q(z_s | z_t, z_0) by multiplying the two Gaussians q(z_s | z_0) and q(z_t | z_s)."""
    abar, z_0, z_t = d.cumulative(BETAS[0]), 0.7, -0.4
    a_t, a_s = abar[t].item(), abar[s].item()
    alpha = a_t / a_s
    precision = 1 / (1 - a_s) + alpha / (1 - alpha)
    want = (math.sqrt(a_s) * z_0 / (1 - a_s) + math.sqrt(alpha) * z_t / (1 - alpha)) / precision
    mean, var = d.posterior(*torch.tensor([z_0, z_t], dtype=torch.float64), abar[t], abar[s])
    assert_close(mean.item(), want, rtol=1e-9, atol=0)
    assert_close(var.item(), 1 / precision, rtol=1e-9, atol=0)


def test_predict_z_0_undoes_q_sample():
    z, eps, abar = torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3), d.cumulative(BETAS[0])
    z_t = d.q_sample(z, torch.tensor([700]), eps, abar)
    assert_close(d.predict_z_0(z_t, eps, abar[700]), z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_ldm_eq_2_loss(norm):
    """Zero for true eps, by hand for a constant error; one number a sample; gets z_t, t, ctx."""
    abar, z, eps = d.cumulative(BETAS[0]), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t, ctx, seen = torch.tensor([1, 50, 900]), torch.randn(3, 5, 8), []
    off = torch.tensor([0.0, 0.5, -2.0]).view(3, 1, 1, 1)

    def eps_theta(z_t, t_, ctx_):
        seen.append((z_t, t_, ctx_))
        return eps + off
    loss = d.ldm_loss(eps_theta, z, t, eps, abar, ctx, norm)
    assert_close(loss, torch.tensor([0.0, 0.5, 2.0] if norm == "l1" else [0.0, 0.25, 4.0]))
    assert_close(seen[0][0], d.q_sample(z, t, eps, abar))
    assert seen[0][1] is t and seen[0][2] is ctx


def test_a_net_that_knows_nothing_has_loss_1():
    z = torch.randn(64, 4, 16, 16)
    t, eps = torch.randint(0, 1000, (64,)), torch.randn_like(z)
    loss = d.ldm_loss(lambda z_t, t, c: 0 * z_t, z, t, eps, d.cumulative(BETAS[0]))
    assert abs(loss.mean() - 1) < 0.02


def test_snr_weight_clamps_the_weight_of_errors_of_z_0():
    """An error of z_0 by 0.3 everywhere costs 0.09 SNR in Eq. (2), and 0.09 clamp(SNR) weighted."""
    abar, z, eps = d.cumulative(BETAS[0]), torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    for k in (10, 300, 500, 990):
        t, a = torch.tensor([k]), abar[k].item()
        snr = a / (1 - a)
        e = (d.q_sample(z, t, eps, abar) - a ** 0.5 * (z + 0.3)) / (1 - a) ** 0.5
        loss = d.ldm_loss(lambda *_, e=e: e, z, t, eps, abar)
        assert_close(loss.item(), 0.09 * snr, rtol=1e-2, atol=0)
        got = (loss * d.snr_weight(t, abar, 0.05, 1.0)).item()
        assert_close(got, 0.09 * min(max(snr, 0.05), 1.0), rtol=1e-2, atol=0)
        assert d.snr_weight(t, abar, 0.0, math.inf) == 1


def test_a_net_that_says_v_gives_eps_back():
    """z_t and v are z and eps, rotated; read as eps_theta, the true v is the eps that was added."""
    abar, z, eps = d.cumulative(BETAS[0]), torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0, 300, 999])
    a = d.at(abar, t, z)
    v, z_t = a.sqrt() * eps - (1 - a).sqrt() * z, d.q_sample(z, t, eps, abar)
    assert_close(z_t ** 2 + v ** 2, z ** 2 + eps ** 2, rtol=1e-4, atol=1e-4)
    got = d.as_eps_theta(lambda z_t, t, ctx: v, abar, "v")(z_t, t, None)
    assert_close(got, eps, rtol=1e-4, atol=1e-4)
    assert d.as_eps_theta(max, abar, "eps") is max


def test_timesteps_are_spread_over_0_to_T_minus_1(monkeypatch):
    """One in each B-th of 0..T-1, in any order; also where the last one's fraction rounds up to 1,
    as in one of 500,000 steps it does."""
    g = torch.Generator().manual_seed(0)
    t = torch.stack([d.draw_t(64, 1000, g) for _ in range(300)])
    assert ((t.sort().values * 64 / 1000 - torch.arange(64)).abs() < 1.1).all()
    assert (t[:, 0].float().mean() - 499.5).abs() < 80 and t.min() == 0 and t.max() == 999
    monkeypatch.setattr(torch, "rand", lambda n, generator: torch.full((n,), 1 - 2 ** -24))
    assert d.draw_t(64, 1000, g).max() == 999
