"""samplers.py and guidance.py: closed forms, and the oracle of Gaussian data.

What holds for every sampler and every rule of timesteps is tested in test_tables.py.
"""
import math

import gaussian
import pytest
import torch
from gaussian import ABAR
from torch.testing import assert_close

from tinyldm.conditioning import Context
from tinyldm.diffusion import q_sample
from tinyldm.errors import BadInput
from tinyldm.guidance import drop_condition, guided
from tinyldm.samplers import (
    SAMPLERS,
    Sampler,
    ddim,
    ddpm,
    dpm_solver_pp,
    later,
    masked,
    official_timesteps,
    plms,
    timesteps,
)

# ---- timesteps


@pytest.mark.parametrize("T", [1000, 37])
def test_any_number_of_steps_is_exactly_that_many_from_T_minus_1_to_z_0(T):
    for S in range(1, T + 1):
        ts = timesteps(torch.ones(T), S)
        assert len(ts) == S + 1
        assert ts[0] == T - 1
        assert ts[-1] == -1
        assert all(t > s for t, s in zip(ts, ts[1:]))
    assert timesteps(torch.ones(T), T) == list(range(T - 1, -2, -1))


def test_later_keeps_a_share_of_the_steps_and_at_least_one():
    ts = timesteps(ABAR, 10)
    assert later(ts, 1.0) == ts
    assert later(ts, 0.5) == ts[5:]
    assert later(ts, 1e-6) == ts[-2:]


@pytest.mark.parametrize("n", [10, 50, 64, 100])
def test_later_takes_as_many_steps_as_the_released_program(n):
    """img2img.py: t_enc = int(strength * steps), but for rounding errors of the product."""
    ts = timesteps(ABAR, n)
    for percent in range(1, 101):
        t_enc = percent * n // 100
        assert len(later(ts, percent / 100)) - 1 == max(1, t_enc)
    assert int(0.29 * 100) == 28


def test_official_timesteps_leave_the_noise_of_timestep_0():
    z = torch.randn(2, 3, 4, 4)
    eps = torch.randn(2, 3, 4, 4)
    ts = official_timesteps(ABAR, 50)
    z_T = q_sample(z, torch.tensor([981, 981]), eps, ABAR)
    z_at_0 = q_sample(z, torch.tensor([0, 0]), eps, ABAR)
    for sampler in (ddim, plms, dpm_solver_pp):
        got = sampler(lambda z_t, t, ctx: eps, z_T, (), ABAR, ts)
        assert_close(got, z_at_0, rtol=1e-3, atol=1e-3)


# ---- samplers

@pytest.mark.parametrize("name,steps,eta,tolerance", [
    ("ddim", 100, 0.0, 0.035),
    ("ddim", 200, 0.5, 0.025),
    ("plms", 100, 0.0, 0.015),
    ("dpm++", 100, 0.0, 0.025),
])
def test_few_steps_come_close_to_the_distribution_of_the_data(name, steps, eta, tolerance):
    z_T, randn = gaussian.noise()
    ts = timesteps(ABAR, steps)
    z = SAMPLERS[name](gaussian.eps_theta, z_T, (), ABAR, ts, randn, eta)
    assert abs(z.mean() - gaussian.M) < 0.01
    assert abs(z.std() - gaussian.S) < tolerance


def test_ddim_eq_12_one_step_by_hand():
    """From t = 999 to 499 with eta = 0.5, from the paper's formula written out."""
    z_T, randn = gaussian.noise()
    noise = randn()
    calls = []

    def eps_theta(z_t, t, ctx):
        calls.append((z_t, int(t[0])))
        return torch.full_like(z_t, 0.3)

    ddim(eps_theta, z_T, (), ABAR, [999, 499, -1], lambda: noise, eta=0.5)

    a = ABAR[999].item()
    b = ABAR[499].item()
    sigma = 0.5 * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
    z_0 = (z_T - (1 - a) ** 0.5 * 0.3) / a ** 0.5
    z_499 = b ** 0.5 * z_0 + (1 - b - sigma ** 2) ** 0.5 * 0.3 + sigma * noise
    assert_close(calls[1][0], z_499)
    assert [t for _, t in calls] == [999, 499]


def test_ddim_with_eta_1_is_ddpm():
    z_T, randn = gaussian.noise()
    noise = randn()
    ts = timesteps(ABAR, 20)
    by_ddim = ddim(gaussian.eps_theta, z_T, (), ABAR, ts, lambda: noise, eta=1.0)
    by_ddpm = ddpm(gaussian.eps_theta, z_T, (), ABAR, ts, lambda: noise)
    assert_close(by_ddim, by_ddpm, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("degree,first_exact_step", [(1, 0), (2, 2), (3, 3)])
def test_plms_averages_polynomials_exactly(degree, first_exact_step):
    """Each step's eps is the mean of eps over the step, by an integral.

    It is exact for lines in the first two steps, for parabolas in the third, for cubics
    from then on, as Adams and Bashforth's formulas are.
    """
    ts = list(range(950, 0, -50))
    seen = []

    def eps_theta(z_t, t, ctx):
        seen.append(z_t)
        return (t.double() / 1000).view(-1, 1, 1, 1) ** degree

    z = plms(eps_theta, torch.ones(1, 1, 1, 1).double(), (), ABAR, ts)
    zs = [*seen, z]
    del zs[1]                                   # the second call of the first step

    for i, (t, s) in enumerate(zip(ts, ts[1:])):
        # The eps that takes zs[i] to zs[i + 1] in a DDIM step.
        change = zs[i + 1] / ABAR[s].sqrt() - zs[i] / ABAR[t].sqrt()
        eps = change / ((1 / ABAR[s] - 1).sqrt() - (1 / ABAR[t] - 1).sqrt())
        power = degree + 1
        mean = ((t / 1000) ** power - (s / 1000) ** power) / power / 0.05
        is_exact = abs(eps.item() - mean) < 1e-9
        assert is_exact == (i >= first_exact_step), (degree, i)


def test_dpm_solver_pp_alg_2_by_hand():
    """Steps 900 -> 600 -> 200 from the paper's formulas: r, D and exp(-h) written out."""
    def eps_theta(z_t, t, ctx):
        return 0.3 * z_t + t.view(-1, 1, 1, 1) / 2000

    z_T = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    z = dpm_solver_pp(eps_theta, z_T, (), ABAR, [900, 600, 200])

    alpha = [ABAR[t].item() ** 0.5 for t in (900, 600, 200)]
    sigma = [(1 - a * a) ** 0.5 for a in alpha]
    lam = [math.log(a / s) for a, s in zip(alpha, sigma)]
    h_1 = lam[1] - lam[0]
    h_2 = lam[2] - lam[1]

    x_0 = (0.7 - sigma[0] * (0.3 * 0.7 + 0.45)) / alpha[0]
    z_1 = sigma[1] / sigma[0] * 0.7 - alpha[1] * (math.exp(-h_1) - 1) * x_0
    x_1 = (z_1 - sigma[1] * (0.3 * z_1 + 0.3)) / alpha[1]
    r = h_1 / h_2
    D = (1 + 1 / (2 * r)) * x_1 - 1 / (2 * r) * x_0
    want = sigma[2] / sigma[1] * z_1 - alpha[2] * (math.exp(-h_2) - 1) * D
    assert_close(z.item(), want)


# ---- a row of the table

def test_eta_is_handed_on_or_refused():
    z_T, randn = gaussian.noise()
    inputs = (gaussian.eps_theta, z_T, (), ABAR, [999, 400, -1])
    noise = randn()
    by_row = SAMPLERS["ddim"](*inputs, lambda: noise, eta=0.5)
    assert_close(by_row, ddim(*inputs, lambda: noise, 0.5), rtol=0, atol=0)
    with pytest.raises(BadInput, match="eta 0.5"):
        SAMPLERS["plms"](*inputs, randn, eta=0.5)


def test_calls_of_a_run_by_hand():
    """PLMS calls twice in its first step; a Heun sampler in all that do not reach z_0."""
    plms_row = SAMPLERS["plms"]
    heun_row = Sampler(ddim, order=2, has_past=False, takes_eta=False, step_calls=2)
    assert plms_row.first_calls(4) == [0, 2, 3, 4]
    assert heun_row.first_calls(4) == [0, 2, 4, 6]
    assert plms_row.n_calls(4) == 5
    assert heun_row.n_calls(4) == 7
    assert heun_row.n_calls(4, to_z_0=False) == 8
    assert plms_row.n_calls(1) == 1
    assert plms_row.n_calls(1, to_z_0=False) == 2
    assert SAMPLERS["ddim"].n_calls(1) == 1


# ---- masks

def test_masked_with_nothing_known_is_the_sampler():
    z_T, randn = gaussian.noise()
    ts = timesteps(ABAR, 10)

    def step(z_t, ts):
        return ddim(gaussian.eps_theta, z_t, (), ABAR, ts)

    z = masked(step, z_T, z_T, torch.zeros(1), ABAR, ts, randn)
    assert_close(z, ddim(gaussian.eps_theta, z_T, (), ABAR, ts))


# ---- guidance

def mean_condition(z_t, t, ctx):
    """An eps_theta that is z_t times the mean of all of its condition."""
    factor = 0
    for values in ctx:
        if values is not None:
            factor = factor + values.flatten(1).mean(1)
    return z_t * factor.view(-1, 1, 1, 1)


CONTEXTS = {
    "tokens": (Context(tokens=torch.randn(3, 7, 8)), Context(tokens=torch.randn(1, 7, 8))),
    "beside": (
        Context(beside=torch.randn(3, 2, 4, 4)),
        Context(beside=torch.randn(1, 2, 4, 4)),
    ),
    "both": (
        Context(torch.randn(3, 7, 8), torch.randn(3, 2, 4, 4)),
        Context(torch.randn(1, 7, 8), torch.randn(1, 2, 4, 4)),
    ),
}


@pytest.mark.parametrize("port", CONTEXTS)
def test_guidance_extrapolates_from_null_in_one_call(port):
    """Ho and Salimans Eq. (6) with s = 1 + w: (1 + w) eps(ctx) - w eps(null)."""
    ctx, null = CONTEXTS[port]
    batch_sizes = []

    def eps_theta(z_t, t, ctx):
        batch_sizes.append(len(z_t))
        return mean_condition(z_t, t, ctx)

    z_t = torch.randn(3, 2, 4, 4)
    t = torch.tensor([5, 6, 7])
    w = 1.5
    got = guided(eps_theta, null, 1 + w)(z_t, t, ctx)
    assert batch_sizes == [6]

    with_ctx = mean_condition(z_t, t, ctx)
    with_null = mean_condition(z_t, t, null)
    assert_close(got, (1 + w) * with_ctx - w * with_null)


def test_guidance_asks_for_null_first_with_the_same_z_t_and_t():
    ctx, null = CONTEXTS["both"]
    calls = []

    def eps_theta(z_t, t, ctx):
        calls.append((z_t, t, ctx))
        return z_t

    z_t = torch.randn(3, 2, 4, 4)
    t = torch.tensor([5, 6, 7])
    guided(eps_theta, null, 3.0)(z_t, t, ctx)

    z_both, t_both, ctx_both = calls[0]
    assert_close(z_both, torch.cat([z_t, z_t]), rtol=0, atol=0)
    assert t_both.tolist() == [5, 6, 7, 5, 6, 7]
    for values, null_values, both_values in zip(ctx, null, ctx_both):
        repeated = null_values.expand_as(values)
        assert_close(both_values, torch.cat([repeated, values]), rtol=0, atol=0)


def test_scales_of_1_and_0():
    ctx, null = CONTEXTS["tokens"]
    z_t = torch.randn(3, 2, 4, 4)
    t = torch.tensor([5, 6, 7])
    assert guided(mean_condition, null, 1) is mean_condition
    unconditional = guided(mean_condition, null, 0)(z_t, t, ctx)
    assert_close(unconditional, mean_condition(z_t, t, null))


def test_drop_condition_replaces_whole_rows_of_every_tensor():
    ids = torch.arange(12).view(4, 3)
    maps = torch.arange(16.0).view(4, 1, 2, 2)
    drop = torch.tensor([True, False, False, True])
    y_null = {"ids": torch.full((1, 3), -1.0), "maps": torch.full((1, 1, 2, 2), -2)}
    dropped = drop_condition({"ids": ids, "maps": maps}, y_null, drop)

    assert dropped["ids"].tolist() == [[-1] * 3, [3, 4, 5], [6, 7, 8], [-1] * 3]
    assert dropped["ids"].dtype == ids.dtype
    assert (dropped["maps"][[0, 3]] == -2).all()
    assert_close(dropped["maps"][1:3], maps[1:3], rtol=0, atol=0)
    assert dropped["maps"].dtype == maps.dtype


def test_without_a_condition_nothing_is_dropped():
    assert drop_condition({}, {}, torch.tensor([True, False])) == {}
