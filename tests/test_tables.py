"""Every row of the tables of stage two and of the GAN losses, against an oracle.

A new row of SCHEDULES, PREDICTIONS, SAMPLERS, TIMESTEPS or GAN_LOSSES is tested by being
there. Nothing here knows what a row is called: these are properties that every correct
row has, so a wrong sign, weight or order fails.
"""
import itertools

import gaussian
import pytest
import torch
from gaussian import ABAR
from torch.testing import assert_close

from tinyldm.diffusion import (
    PREDICTIONS,
    SCHEDULES,
    DiffusionConfig,
    as_eps_theta,
    at,
    ldm_loss,
    posterior,
    predict_z_0,
    q_sample,
)
from tinyldm.errors import BadInput
from tinyldm.patchgan import GAN_LOSSES
from tinyldm.samplers import SAMPLERS, TIMESTEPS, timesteps

# ---- SCHEDULES


@pytest.mark.parametrize("T", [1, 10, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_betas_rise_from_0_to_1(name, T):
    """Noise is added slowly at first, and ever faster."""
    betas = SCHEDULES[name].betas(T)
    assert betas.shape == (T,)
    assert betas.dtype == torch.float64
    assert (betas > 0).all()
    assert (betas < 1).all()
    assert (betas.diff() >= 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_abar_falls_from_nearly_1_to_nearly_0(name):
    """z_t begins as almost the latent, and ends as almost pure noise."""
    abar = DiffusionConfig(name, predict="v").abar()
    assert abar.shape == (1000,)
    assert abar[0] > 0.95
    assert abar[-1] < 0.05
    assert abar[-1] > 0                         # z_0 must follow from z_t and eps
    assert (abar.diff() < 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_range_of_betas_is_their_two_ends_or_bad_input(name):
    schedule = SCHEDULES[name]
    if schedule.takes_range:
        betas = schedule.betas(100, 0.001, 0.03)
        ends = torch.tensor([0.001, 0.03], dtype=torch.float64)
        assert_close(betas[[0, -1]], ends)
        config = DiffusionConfig(name, T=100, beta_range=(0.001, 0.03))
        assert_close(config.abar(), (1 - betas).cumprod(0))
    else:
        with pytest.raises(BadInput, match="beta_range"):
            DiffusionConfig(name, beta_range=(0.001, 0.03))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_that_ends_in_noise_takes_no_prediction_of_eps(name):
    """The error of z_0 is that of eps, over a thousand times: float32 would lose it."""
    abar = DiffusionConfig(name, predict="v").abar()
    if SCHEDULES[name].ends_in_noise:
        assert abar[-1] < 1e-6
        with pytest.raises(BadInput, match="predict eps"):
            DiffusionConfig(name, predict="eps")


# ---- PREDICTIONS

T_OF_PREDICTIONS = torch.tensor([0, 10, 300, 700, 999])


def latents_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    """Return z and eps (5, 2, 4, 4), one sample per timestep above."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 2, 4, 4, generator=generator)
    eps = torch.randn(5, 2, 4, 4, generator=generator)
    return z, eps


@pytest.mark.parametrize("name", PREDICTIONS)
def test_eps_and_z_0_of_any_output_add_up_to_z_t(name):
    """Whatever the network says, its two claims explain the z_t that it was given."""
    z_t, output = latents_and_noise()
    z_t = z_t.double()
    output = output.double()
    abar_t = at(ABAR, T_OF_PREDICTIONS, z_t)
    z_0 = PREDICTIONS[name].z_0(output, z_t, abar_t)
    eps = PREDICTIONS[name].eps(output, z_t, abar_t)
    assert_close(abar_t.sqrt() * z_0 + (1 - abar_t).sqrt() * eps, z_t)


def true_output(name: str, z_t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The output from which the true eps follows: eps is linear in the output."""
    abar_t = at(ABAR, T_OF_PREDICTIONS, z_t)
    zeros = torch.zeros_like(z_t)
    eps_of_0 = PREDICTIONS[name].eps(zeros, z_t, abar_t)
    eps_of_1 = PREDICTIONS[name].eps(zeros + 1, z_t, abar_t)
    return (eps - eps_of_0) / (eps_of_1 - eps_of_0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_weight_is_what_the_loss_makes_of_an_error_of_the_output(name):
    """Errors of 0.3 at every value, at several t: the loss is 0.09 weight."""
    z, eps = latents_and_noise()
    z = z.double()
    eps = eps.double()
    z_t = q_sample(z, T_OF_PREDICTIONS, eps, ABAR)
    abar_t = at(ABAR, T_OF_PREDICTIONS, z_t)
    output = true_output(name, z_t, eps) + 0.3

    def eps_theta(z_t, t, ctx):
        return PREDICTIONS[name].eps(output, z_t, abar_t)

    loss = ldm_loss(eps_theta, z, T_OF_PREDICTIONS, eps, ABAR)
    weight = PREDICTIONS[name].weight(abar_t)
    assert weight.shape == abar_t.shape
    assert (weight > 0).all()
    assert_close(loss, 0.09 * weight.flatten(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_perfect_net_has_the_true_eps_and_z_0(name):
    """Through as_eps_theta, as training and sampling use it, in float32."""
    z, eps = latents_and_noise()
    z_t = q_sample(z, T_OF_PREDICTIONS, eps, ABAR)
    abar_t = at(ABAR, T_OF_PREDICTIONS, z_t)
    output = true_output(name, z_t, eps)

    eps_theta = as_eps_theta(lambda z_t, t: output, ABAR, name)
    assert_close(eps_theta(z_t, T_OF_PREDICTIONS, ()), eps, rtol=1e-3, atol=1e-3)
    z_0 = PREDICTIONS[name].z_0(output, z_t, abar_t)
    assert_close(z_0, z, rtol=1e-3, atol=1e-3)


# ---- TIMESTEPS

@pytest.mark.parametrize("T", [1000, 37])
@pytest.mark.parametrize("name", TIMESTEPS)
def test_timesteps_fall_and_cover_the_schedule(name, T):
    """For every number of steps that the rule can do: from nearly T to t = 0 or z_0."""
    abar = DiffusionConfig(T=T).abar()
    n_possible = 0
    for S in range(1, T + 1):
        try:
            ts = TIMESTEPS[name](abar, S)
        except BadInput:
            continue
        n_possible += 1
        assert all(isinstance(t, int) for t in ts)
        assert all(t > s for t, s in itertools.pairwise(ts))
        assert T - 1 >= ts[0] >= T - T / S - 1
        assert ts[-1] in (-1, 0)
    assert n_possible > T / 20


@pytest.mark.parametrize("S", [0, -3, 1001])
@pytest.mark.parametrize("name", TIMESTEPS)
def test_numbers_of_steps_outside_1_to_T_are_bad_input(name, S):
    with pytest.raises(BadInput, match=f"steps {S}: must be 1..1000"):
        TIMESTEPS[name](ABAR, S)


@pytest.mark.parametrize("name", TIMESTEPS)
def test_sampling_along_the_timesteps_gives_the_distribution_of_the_data(name):
    z_T, _ = gaussian.noise()
    ts = TIMESTEPS[name](ABAR, 50)
    z = SAMPLERS["ddim"](gaussian.eps_theta, z_T, (), ABAR, ts)
    assert abs(z.mean() - gaussian.M) < 0.02
    assert abs(z.std() - gaussian.S) < 0.06


# ---- SAMPLERS

TAKES_ETA = [name for name, sampler in SAMPLERS.items() if sampler.takes_eta]
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if sampler.order]
RUNS = [(name, 0.0) for name in SAMPLERS] + [(name, 1.0) for name in TAKES_ETA]


@pytest.mark.parametrize("name,eta", RUNS)
def test_many_steps_give_the_distribution_of_the_data(name, eta):
    """With the best eps_theta, samples are N(M, S^2). With noise, steps must be smaller."""
    has_noise = name not in DETERMINISTIC or eta > 0
    n_steps, tolerance = (1000, 0.01) if has_noise else (200, 0.03)
    z_T, randn = gaussian.noise()
    ts = timesteps(ABAR, n_steps)
    z = SAMPLERS[name](gaussian.eps_theta, z_T, (), ABAR, ts, randn, eta)
    assert abs(z.mean() - gaussian.M) < 0.01
    assert abs(z.std() - gaussian.S) < tolerance


def error_of_solver(name: str, n_steps: int) -> float:
    """The largest error of n_steps from t = 900 to 100, where the solution is known."""
    z_T = gaussian.noise()[0].double()
    ts = list(range(900, 99, -800 // n_steps))
    z = SAMPLERS[name](gaussian.eps_theta, z_T, (), ABAR, ts)
    return (z - gaussian.exact_solution(z_T, 900, 100)).abs().max().item()


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_falls_with_the_declared_order(name):
    """Steps doubled three times: the error falls to 1/8 (order 1), 1/64 (order 2), ...

    No randn is given, so this also fails if noise is added.
    """
    decrease = error_of_solver(name, 10) / error_of_solver(name, 80)
    assert decrease > 0.9 * 8 ** SAMPLERS[name].order


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("t", [0, 19, 700])
def test_a_step_onto_z_0_gives_the_predicted_z_0_without_noise(name, t):
    """With the true eps, one step from any t gives the latent; eta is at its largest."""
    z, eps = latents_and_noise()
    z_t = q_sample(z, torch.full((5,), t), eps, ABAR)

    def randn():
        raise AssertionError("noise in a step onto z_0")

    eta = 1.0 if SAMPLERS[name].takes_eta else 0.0
    sampler = SAMPLERS[name]
    got = sampler(lambda z_t, t, ctx: eps, z_t, (), ABAR, [t, -1], randn, eta)
    assert_close(got, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.25, 1.0])
@pytest.mark.parametrize("name", TAKES_ETA)
def test_eta_is_the_share_of_ddpms_noise(name, eta):
    """The noise in one step has eta times the std of q(z_s | z_t, z_0)."""
    z_t = gaussian.noise()[0].double()
    one = torch.ones_like(z_t)
    inputs = (gaussian.eps_theta, z_t, (), ABAR, [600, 400])
    above = SAMPLERS[name](*inputs, lambda: one, eta)
    below = SAMPLERS[name](*inputs, lambda: -one, eta)

    _, variance = posterior(z_t, z_t, ABAR[600], ABAR[400])
    sigma = eta * variance.sqrt()
    assert_close((above - below) / 2, sigma.expand_as(z_t))


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - set(DETERMINISTIC)))
def test_a_sampler_that_is_never_deterministic_has_ddpms_mean_and_variance(name):
    z_t = gaussian.noise()[0].double()
    one = torch.ones_like(z_t)
    inputs = (gaussian.eps_theta, z_t, (), ABAR, [600, 400])
    above = SAMPLERS[name](*inputs, lambda: one)
    below = SAMPLERS[name](*inputs, lambda: -one)

    eps = gaussian.eps_theta(z_t, torch.tensor([600]))
    z_0 = predict_z_0(z_t, eps, ABAR[600])
    mean, variance = posterior(z_0, z_t, ABAR[600], ABAR[400])
    assert_close((above + below) / 2, mean)
    assert_close((above - below) / 2, variance.sqrt().expand_as(z_t))


@pytest.mark.parametrize("name,eta", RUNS)
def test_a_run_can_be_split_into_its_steps_unless_the_sampler_has_a_past(name, eta):
    ts = timesteps(ABAR, 8)
    sampler = SAMPLERS[name]

    z_T, randn = gaussian.noise()
    in_one_run = sampler(gaussian.eps_theta, z_T, (), ABAR, ts, randn, eta)

    z, randn = gaussian.noise()
    for t, s in itertools.pairwise(ts):
        z = sampler(gaussian.eps_theta, z, (), ABAR, [t, s], randn, eta)

    is_the_same = torch.allclose(in_one_run, z, rtol=1e-4, atol=1e-4)
    assert is_the_same == (not sampler.has_past)


@pytest.mark.parametrize("n_steps", [1, 2, 4, 20])
@pytest.mark.parametrize("rule", TIMESTEPS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_calls_of_eps_theta_are_as_many_as_declared(name, rule, n_steps):
    """And the first call of each step is at the timestep where the step begins."""
    z_T, randn = gaussian.noise()
    ts = TIMESTEPS[rule](ABAR, n_steps)
    asked = []

    def eps_theta(z_t, t, ctx):
        assert t.shape == (64,)
        assert (t == t[0]).all()
        assert ctx == ("the condition",)
        asked.append(int(t[0]))
        return gaussian.eps_theta(z_t, t)

    sampler = SAMPLERS[name]
    sampler(eps_theta, z_T, ("the condition",), ABAR, ts, randn)
    assert len(asked) == sampler.n_calls(len(ts) - 1, to_z_0=ts[-1] == -1)
    first_calls = sampler.first_calls(len(ts) - 1)
    assert [asked[number] for number in first_calls] == ts[:-1]


# ---- GAN_LOSSES

@pytest.mark.parametrize("logit", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", GAN_LOSSES)
def test_a_wrong_discriminator_learns_to_call_real_real_and_fake_fake(name, logit):
    """D_psi's loss falls when real logits rise, and when fake logits fall."""
    real = torch.full((4,), -logit, requires_grad=True)
    fake = torch.full((4,), logit, requires_grad=True)
    GAN_LOSSES[name].discriminator(real, fake).backward()
    assert (real.grad < 0).all()
    assert (fake.grad > 0).all()


@pytest.mark.parametrize("logit", [-2.0, -1.0, -0.5, 0.0])
@pytest.mark.parametrize("name", GAN_LOSSES)
def test_the_generator_learns_to_raise_the_logits_of_its_images(name, logit):
    """Its loss falls when fake logits rise, above all where D_psi is right."""
    fake = torch.full((4,), logit, requires_grad=True)
    GAN_LOSSES[name].generator(fake).backward()
    assert (fake.grad < 0).all()


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_the_best_logit_is_higher_where_real_images_are_more_frequent(name):
    """For patches of which a share p is real, find the logit with the least loss."""
    logits = torch.linspace(-3, 3, 61)
    zero = torch.zeros(1)
    loss = GAN_LOSSES[name].discriminator
    loss_if_real = torch.stack([loss(logit.view(1), zero) for logit in logits])
    loss_if_fake = torch.stack([loss(zero, logit.view(1)) for logit in logits])

    best = []
    for p in (0.1, 0.9):
        expected = p * loss_if_real + (1 - p) * loss_if_fake
        best.append(logits[expected.argmin()].item())
    assert best[0] < best[1]


@pytest.mark.parametrize("name", GAN_LOSSES)
def test_gan_losses_are_means(name):
    """The loss of a batch that is repeated is the loss of the batch."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(3, 1, 4, 4, generator=generator)
    fake = torch.randn(3, 1, 4, 4, generator=generator)
    losses = GAN_LOSSES[name]
    once = losses.discriminator(real, fake)
    twice = losses.discriminator(torch.cat([real, real]), torch.cat([fake, fake]))
    assert once.shape == ()
    assert_close(twice, once)
    assert_close(losses.generator(torch.cat([fake, fake])), losses.generator(fake))
