"""beyond/flow.py, heun.py and zero_snr.py: what the tests over the tables do not say."""
import gaussian
import pytest
import torch
from conftest import TINY_LDM
from gaussian import ABAR
from runs import log_rows
from torch.testing import assert_close

from tinyldm.beyond.flow import VELOCITY, draw_logit_normal, straight_betas
from tinyldm.beyond.heun import flow_heun, heun, karras_timesteps
from tinyldm.beyond.zero_snr import zero_snr_betas
from tinyldm.diffusion import (
    at,
    cumulative,
    draw_timesteps,
    ldm_loss,
    output_weight,
    predict_z_0,
    q_sample,
    sqrt_linear_betas,
)
from tinyldm.engine.start import row_of_file
from tinyldm.samplers import ddim, plms, timesteps

STRAIGHT = cumulative(straight_betas())


def time_of(t: torch.Tensor | int) -> torch.Tensor:
    """r of timestep t."""
    return (torch.as_tensor(t, dtype=torch.float64) + 0.5) / 1000


def two_latents() -> tuple[torch.Tensor, torch.Tensor]:
    """Return z and eps (4, 2, 3, 3), float64."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    eps = torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64)
    return z, eps


# ---- the flow

def test_z_t_is_a_point_of_the_straight_line_scaled_to_variance_1():
    z, eps = two_latents()
    t = torch.tensor([0, 200, 499, 999])
    r = time_of(t).view(-1, 1, 1, 1)
    x = (1 - r) * z + r * eps
    assert_close(q_sample(z, t, eps, STRAIGHT), x / ((1 - r) ** 2 + r ** 2).sqrt())


def test_the_loss_of_the_output_is_flow_matchings():
    """|eps - z_0 - u_theta|^2, whatever u_theta says, at every t."""
    z, eps = two_latents()
    t = torch.tensor([0, 200, 499, 999])
    u_theta = torch.sin(z + 2 * eps)

    def eps_theta(z_t, t, ctx):
        return VELOCITY.eps(u_theta, z_t, at(STRAIGHT, t, z_t))

    loss = ldm_loss(eps_theta, z, t, eps, STRAIGHT) * output_weight(t, STRAIGHT, "flow")
    wanted = (eps - z - u_theta) ** 2
    assert_close(loss, wanted.flatten(1).mean(1), rtol=1e-3, atol=0)


def test_ddim_is_eulers_method_along_the_flow():
    """x_s = x_r + (s - r) u, from pure noise to z_0."""
    _, noise = two_latents()
    ts = timesteps(STRAIGHT, 7)

    def u_theta(x, r):
        return torch.cos(3 * x) + r

    def eps_theta(z_t, t, ctx):
        abar_t = at(STRAIGHT, t, z_t)
        r = time_of(t).view(-1, 1, 1, 1)
        x = z_t * ((1 - r) ** 2 + r ** 2).sqrt()
        return VELOCITY.eps(u_theta(x, r), z_t, abar_t)

    r = time_of(999)
    x = noise * ((1 - r) ** 2 + r ** 2).sqrt()
    for t, s in zip(ts, ts[1:]):
        r = time_of(t)
        r_next = time_of(s) if s >= 0 else 0.0
        x = x + (r_next - r) * u_theta(x, r)
    assert_close(ddim(eps_theta, noise, (), STRAIGHT, ts), x)


def test_heuns_method_along_the_flow_is_exact_where_u_is_linear_in_r():
    """Euler is not: u = c r has the solution x_s = x_r + c (s^2 - r^2) / 2."""
    _, noise = two_latents()

    def eps_theta(z_t, t, ctx):
        u = 4 * time_of(t).view(-1, 1, 1, 1) * torch.ones_like(z_t)
        return VELOCITY.eps(u, z_t, at(STRAIGHT, t, z_t))

    def x_at(z, t):
        r = time_of(t)
        return z * ((1 - r) ** 2 + r ** 2).sqrt()

    ts = [999, 100]
    wanted = x_at(noise, 999) + 2 * (time_of(100) ** 2 - time_of(999) ** 2)
    z = flow_heun(eps_theta, noise, (), STRAIGHT, ts)
    assert_close(x_at(z, 100), wanted)
    euler = ddim(eps_theta, noise, (), STRAIGHT, ts)
    assert (x_at(euler, 100) - wanted).abs().min() > 0.1


def test_logit_normal_timesteps_have_a_normal_logit():
    t = draw_logit_normal(100_000, 1000, torch.Generator().manual_seed(0))
    assert t.min() >= 0
    assert t.max() <= 999
    logits = time_of(t).logit()
    assert abs(logits.mean()) < 0.01
    assert abs(logits.std() - 1) < 0.01

    uniform = draw_timesteps(100_000, 1000, torch.Generator().manual_seed(0))
    assert time_of(uniform).logit().std() > 1.5


def test_training_takes_the_loss_and_the_draw_of_the_flags(trained, tmp_path, cli):
    """An untrained U-Net says u = 0, and the loss is the mean of (eps - z_0)^2 at any t.

    In terms of eps it is (1 - r)^2 times that: for a uniform r the mean factor is 1/3, for
    a logit-normal one 0.293.
    """
    def first_loss(*flags):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        output = cli("train_ldm.py", *TINY_LDM, "--preset", "toy-flow", "--ae",
                     trained / "ae/ckpt.pt", "--size", 16, "--batch", 128, "--steps", 1,
                     "--eval-n", 0, "--out", out, *flags)
        assert ("gives its end, which is pure noise, no weight" in output) == ("eps" in flags)
        return log_rows(out)[0]["loss"]

    of_output = first_loss()
    assert abs(of_output - 2) < 0.5
    of_eps = first_loss("--loss-of", "eps")
    assert abs(of_eps / of_output - 0.293) < 0.015
    uniform = first_loss("--loss-of", "eps", "--draw-t", "uniform")
    assert abs(uniform / of_output - 1 / 3) < 0.015


def test_training_goes_on_from_a_model_with_the_loss_that_it_had(trained, tmp_path, cli):
    """Its file says how, though most rows have no such column."""
    cli("train_ldm.py", *TINY_LDM, "--preset", "toy-flow", "--ae", trained / "ae/ckpt.pt",
        "--size", 16, "--steps", 1, "--eval-n", 0, "--out", tmp_path / "flow")
    row = row_of_file(tmp_path / "flow/model.pt", None, None)
    assert (row["loss_of"], row["draw_t"], row["predict"]) == ("output", "logit-normal", "flow")


# ---- Heun's method in sigma

def test_heuns_first_step_is_the_first_of_plms():
    """Both take the mean of eps at the two ends of a DDIM step."""
    z_T, _ = gaussian.noise()
    ts = [900, 700]
    by_heun = heun(gaussian.eps_theta, z_T, (), ABAR, ts)
    assert_close(by_heun, plms(gaussian.eps_theta, z_T, (), ABAR, ts))
    assert not torch.allclose(by_heun, ddim(gaussian.eps_theta, z_T, (), ABAR, ts), atol=1e-3)


def test_karras_timesteps_have_the_sigmas_of_edm():
    """EDM Eq. (5), for eight steps, to the width of a timestep."""
    sigma = ((1 - ABAR) / ABAR).sqrt()
    highest = sigma[-1] ** (1 / 7)
    lowest = sigma[0] ** (1 / 7)
    ts = karras_timesteps(ABAR, 8)
    assert len(ts) == 9
    for k, t in enumerate(ts[:-1]):
        wanted = (highest + k / 7 * (lowest - highest)) ** 7
        gap = (sigma[min(t + 1, 999)] - sigma[max(t - 1, 0)]) / 2
        assert abs(sigma[t] - wanted) <= gap


@pytest.mark.parametrize("S", [1, 50, 999, 1000])
def test_karras_timesteps_are_as_many_as_asked_for(S):
    ts = karras_timesteps(ABAR, S)
    assert len(ts) == S + 1
    assert ts[0] == 999


# ---- zero terminal SNR

def test_zero_snr_keeps_the_first_step_and_ends_in_noise():
    """Lin et al., Alg. 1: sqrt(abar) - its last, times first / (first - last)."""
    a = cumulative(sqrt_linear_betas()).sqrt()
    published = (a - a[-1]) * a[0] / (a[0] - a[-1])
    ours = cumulative(zero_snr_betas()).sqrt()
    assert_close(ours, published, rtol=0, atol=3e-4)
    assert_close(ours[0], a[0])
    assert ours[-1] < 3e-4


def test_z_0_of_v_is_exact_at_the_end_of_it():
    """There v is -z_0, and float32 still finds it."""
    abar = cumulative(zero_snr_betas())
    z, eps = two_latents()
    z_t = q_sample(z.float(), torch.full((4,), 999), eps.float(), abar)
    abar_t = abar[999].float()
    v = abar_t.sqrt() * eps.float() - (1 - abar_t).sqrt() * z.float()
    eps_of_v = (1 - abar_t).sqrt() * z_t + abar_t.sqrt() * v
    assert_close(predict_z_0(z_t, eps_of_v, abar_t), z.float(), rtol=0, atol=5e-3)
