"""samplers.py and guidance.py: an oracle (Gaussian data, best eps_theta known) and closed forms."""
import math

import pytest
import torch
from torch.testing import assert_close

from tinyldm import samplers
from tinyldm.diffusion import cumulative, q_sample, sqrt_linear_betas
from tinyldm.guidance import drop_condition, guided
from tinyldm.samplers import ddim, ddpm, dpm_solver_pp, masked, plms, timesteps

ABAR = cumulative(sqrt_linear_betas(1000))
M, S = 0.5, 0.3                                     # the data: N(M, S^2), independent everywhere


def oracle(z_t, t, ctx=None):
    """E[eps | z_t] when z_0 ~ N(M, S^2): the eps_theta that perfect training would reach."""
    a = ABAR[t].view(-1, 1, 1, 1)
    return ((1 - a).sqrt() * (z_t - a.sqrt() * M) / (a * S ** 2 + 1 - a)).to(z_t.dtype)


def noise():
    g = torch.Generator().manual_seed(0)
    return torch.randn(64, 1, 16, 16, generator=g), lambda: torch.randn(64, 1, 16, 16, generator=g)


@pytest.mark.parametrize("T", [1000, 37])
def test_any_number_of_steps_is_exactly_that_many_from_T_minus_1_to_z_0(T):
    for n in range(1, T + 1):
        ts = timesteps(T, n)
        assert len(ts) == n + 1 and ts[0] == T - 1 and ts[-1] == -1
        assert all(a > b for a, b in zip(ts, ts[1:]))
    assert timesteps(T, T) == list(range(T - 1, -2, -1))


@pytest.mark.parametrize("n", [0, -3, 1001])
def test_steps_outside_1_to_T_raise(n):
    with pytest.raises(ValueError, match="1..1000"):
        timesteps(1000, n)


@pytest.mark.parametrize("sampler,steps,kw,tol", [
    (ddpm, 1000, {}, .01), (ddim, 1000, {}, .01), (ddim, 1000, {"eta": 1.0}, .01),
    (ddim, 100, {}, .035), (ddim, 200, {"eta": 0.5}, .025), (plms, 100, {}, .015),
    (plms, 1000, {}, .005), (dpm_solver_pp, 100, {}, .025), (dpm_solver_pp, 1000, {}, .005)])
def test_samplers_return_the_data_distribution_untrained(sampler, steps, kw, tol):
    """All samplers with the oracle give N(M, S^2), but for finite steps' error."""
    z_T, randn = noise()
    z = sampler(oracle, z_T, None, ABAR, timesteps(1000, steps), randn, **kw)
    assert abs(z.mean() - M) < 0.01
    assert abs(z.std() - S) < tol


def test_ddim_eq_12_one_step_by_hand():
    """From t = 999 to 499 with eta = 0.5, from the paper's formula written out."""
    z_T, _ = noise()
    n = torch.randn_like(z_T)
    calls = []
    def eps_theta(z, t, ctx):
        calls.append((z, int(t[0])))
        return torch.full_like(z, 0.3)
    ddim(eps_theta, z_T, None, ABAR, [999, 499, -1], lambda: n, eta=0.5)
    a, b = ABAR[999].item(), ABAR[499].item()
    sigma = 0.5 * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
    z_0 = (z_T - (1 - a) ** 0.5 * 0.3) / a ** 0.5
    assert_close(calls[1][0], b ** 0.5 * z_0 + (1 - b - sigma ** 2) ** 0.5 * 0.3 + sigma * n)
    assert [t for _, t in calls] == [999, 499]


def test_the_last_step_lands_on_z_0_itself():
    """With true eps, one step from any t gives the data exactly; no noise is added at the end."""
    z, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for t in (0, 19, 700):
        z_t = ABAR[t].sqrt() * z + (1 - ABAR[t]).sqrt() * eps
        for sampler, kw in ((ddpm, {}), (ddim, {"eta": 1.0}), (plms, {}), (dpm_solver_pp, {})):
            got = sampler(lambda *_: eps, z_t, None, ABAR, [t, -1], lambda: 1 / 0, **kw)
            assert_close(got, z, rtol=1e-4, atol=1e-4)


def test_official_timesteps_leave_the_noise_of_timestep_0():
    z, eps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    z_T = q_sample(z, torch.tensor([981, 981]), eps, ABAR)
    for sampler in (ddim, plms, dpm_solver_pp):
        got = sampler(lambda *_: eps, z_T, None, ABAR, samplers.official_timesteps(1000, 50))
        assert_close(got, q_sample(z, torch.tensor([0, 0]), eps, ABAR), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", [ddpm, ddim, plms, dpm_solver_pp])
@pytest.mark.parametrize("rule", [timesteps, samplers.official_timesteps])
def test_a_step_calls_the_net_once_and_plms_once_more(sampler, rule):
    z_T, _ = noise()
    for n in (1, 2, 4, 20):
        calls, ts = [], rule(1000, n)
        sampler(lambda z, t, ctx, calls=calls: calls.append(t) or z, z_T, None, ABAR, ts,
                lambda: z_T)
        asked = [int(t[0]) for t in calls]
        if sampler is plms and ts[1] >= 0:
            assert asked.pop(1) == ts[1]
        assert asked == ts[:-1]
        assert all(t.shape == (64,) and (t == t[0]).all() for t in calls)


@pytest.mark.parametrize("sampler,low,high", [
    (ddim, 1.9, 2.1), (plms, 3.6, math.inf), (dpm_solver_pp, 3.6, 4.4)])
def test_order_of_convergence(sampler, low, high):
    """Twice the steps halve DDIM's error from t = 900 to 100, and quarter the others', at least.

    For Gaussian data the exact way is known: the z_t keep their place in each marginal.
    """
    z = noise()[0].double()
    a, b = ABAR[900], ABAR[100]
    exact = b.sqrt() * M + ((b * S ** 2 + 1 - b) / (a * S ** 2 + 1 - a)).sqrt() * (z - a.sqrt() * M)

    def error(n):
        ts = list(range(900, 99, -800 // n))
        return (sampler(oracle, z, None, ABAR, ts) - exact).abs().max()
    assert low < error(10) / error(20) < high


def test_plms_averages_polynomials_exactly():
    """Each step's eps is the mean of eps over the step: exact for lines in the first two steps,

    for parabolas in the third, cubics from then on (Adams and Bashforth, by an integral instead).
    """
    ts, one = list(range(950, 0, -50)), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for degree, first in ((1, 0), (2, 2), (3, 3)):
        zs = []

        def eps_theta(z, t, ctx, degree=degree, zs=zs):
            zs.append(z)
            return (t.double() / 1000).view(-1, 1, 1, 1) ** degree
        zs.append(plms(eps_theta, one, None, ABAR, ts))
        del zs[1]
        for i, (t, s) in enumerate(zip(ts, ts[1:])):
            a, b = ABAR[t], ABAR[s]
            eps = zs[i + 1] / b.sqrt() - zs[i] / a.sqrt()
            eps = eps / ((1 / b - 1).sqrt() - (1 / a - 1).sqrt())
            mean = ((t / 1000) ** (degree + 1) - (s / 1000) ** (degree + 1)) / (degree + 1) / .05
            assert (abs(eps.item() - mean) < 1e-9) == (i >= first), (degree, i)


def test_dpm_solver_pp_alg_2_by_hand():
    """Steps 900 -> 600 -> 200 from the paper's formulas: r, D and exp(-h) written out."""
    z_T = torch.tensor(0.7, dtype=torch.float64).view(1, 1, 1, 1)
    z = dpm_solver_pp(lambda z, t, ctx: 0.3 * z + t.view(-1, 1, 1, 1) / 2000, z_T, None, ABAR,
                      [900, 600, 200])
    a = [ABAR[t].item() ** 0.5 for t in (900, 600, 200)]
    sigma = [(1 - x * x) ** 0.5 for x in a]
    lam = [math.log(x / y) for x, y in zip(a, sigma)]
    h1, h2 = lam[1] - lam[0], lam[2] - lam[1]
    x0 = (0.7 - sigma[0] * (0.3 * 0.7 + 0.45)) / a[0]
    z1 = sigma[1] / sigma[0] * 0.7 - a[1] * (math.exp(-h1) - 1) * x0
    x1 = (z1 - sigma[1] * (0.3 * z1 + 0.3)) / a[1]
    r = h1 / h2
    D = (1 + 1 / (2 * r)) * x1 - 1 / (2 * r) * x0
    assert_close(z.item(), sigma[2] / sigma[1] * z1 - a[2] * (math.exp(-h2) - 1) * D)


def test_masked_with_nothing_known_is_the_sampler():
    z_T, randn = noise()
    ts = timesteps(1000, 10)
    got = masked(lambda z, ts: ddim(oracle, z, None, ABAR, ts), z_T, z_T, torch.zeros(1), ABAR, ts,
                 randn)
    assert_close(got, ddim(oracle, z_T, None, ABAR, ts))


def test_ddim_with_eta_1_is_ddpm():
    z_T, _ = noise()
    ts, n = timesteps(1000, 20), torch.randn(64, 1, 16, 16)
    assert_close(ddim(oracle, z_T, None, ABAR, ts, lambda: n, eta=1.0),
                 ddpm(oracle, z_T, None, ABAR, ts, lambda: n), rtol=1e-3, atol=1e-4)


def test_ddim_with_eta_0_asks_for_no_noise():
    z_T, _ = noise()
    ddim(oracle, z_T, None, ABAR, timesteps(1000, 7), randn=None)


def test_guidance_extrapolates_from_null_in_one_call():
    """Ho and Salimans Eq. (6) in terms of s = 1 + w: (1 + w) e_c - w e_null."""
    calls = []
    def eps_theta(z, t, ctx):
        calls.append(len(z))
        return z * ctx.mean((1, 2)).view(-1, 1, 1, 1)
    z, t = torch.randn(3, 2, 4, 4), torch.tensor([5, 6, 7])
    ctx, null, w = torch.randn(3, 7, 8), torch.randn(1, 7, 8), 1.5
    got = guided(eps_theta, null, 1 + w)(z, t, ctx)
    e, e_null = eps_theta(z, t, ctx), eps_theta(z, t, null.expand(3, 7, 8))
    assert calls[0] == 6
    assert_close(got, (1 + w) * e - w * e_null)
    assert guided(eps_theta, null, 1) is eps_theta


def test_drop_condition_replaces_whole_rows_only():
    y = torch.arange(12).view(4, 3)
    got = drop_condition(y, torch.full((3,), -1), torch.tensor([True, False, False, True]))
    assert got.tolist() == [[-1] * 3, [3, 4, 5], [6, 7, 8], [-1] * 3]
