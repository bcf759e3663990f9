"""samplers.py and guidance.py: an oracle (Gaussian data, best eps_theta known) and closed forms."""
import pytest
import torch
from torch.testing import assert_close

from tinyldm.diffusion import cumulative, sqrt_linear_betas
from tinyldm.guidance import drop_condition, guided
from tinyldm.samplers import ddim, ddpm, timesteps

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
def test_any_number_of_steps_is_exactly_that_many_from_T_minus_1(T):
    for n in range(1, T + 1):
        ts = timesteps(T, n)
        assert len(ts) == n and ts[0] == T - 1 and ts[-1] >= 0
        assert all(a > b for a, b in zip(ts, ts[1:]))
    assert timesteps(T, T) == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("n", [0, -3, 1001])
def test_steps_outside_1_to_T_raise(n):
    with pytest.raises(ValueError, match="1..1000"):
        timesteps(1000, n)


@pytest.mark.parametrize("sampler,steps,kw,tol", [
    (ddpm, 1000, {}, .01), (ddim, 1000, {}, .01), (ddim, 1000, {"eta": 1.0}, .01),
    (ddim, 100, {}, .035), (ddim, 200, {"eta": 0.5}, .025)])
def test_samplers_return_the_data_distribution_untrained(sampler, steps, kw, tol):
    """DDPM Alg. 2 and DDIM Eq. (12) with the oracle give N(M, S^2), but for finite steps' error."""
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
    ddim(eps_theta, z_T, None, ABAR, [999, 499], lambda: n, eta=0.5)
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
        for sampler, kw in ((ddpm, {}), (ddim, {"eta": 1.0})):
            got = sampler(lambda *_: eps, z_t, None, ABAR, [t], lambda: 1 / 0, **kw)
            assert_close(got, z, rtol=1e-4, atol=1e-4)


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
