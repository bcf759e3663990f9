"""The exercises' checks: an answer is right if it does what the package's own function does.

Each exercise also knows a few mistakes, so that a wrong answer is told what it did, if it is one
of them, and else where it is wrong.
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import getsource
from types import SimpleNamespace

import torch
from torch import Tensor

from tinyldm.autoencoder import Posterior
from tinyldm.beyond.flow import eps_from_velocity
from tinyldm.beyond.heun import heun
from tinyldm.conditioning import Context
from tinyldm.diffusion import (
    at,
    cumulative,
    eps_from_v,
    ldm_loss,
    posterior,
    q_sample,
    sqrt_linear_betas,
)
from tinyldm.guidance import drop_condition, guided
from tinyldm.layers import timestep_embedding
from tinyldm.patchgan import adaptive_weight
from tinyldm.quantize import Quantised
from tinyldm.samplers import ddim_step, each, steps, timesteps
from tinyldm.tasks import Inpainting

ABAR = cumulative(sqrt_linear_betas())      # (1000,) float64, the paper's


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Return the same normal numbers each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Exercise:
    """What an answer is checked by.

    solution: the package's own function.
    outcome(answer): all that the answer makes of some inputs, as tensors to compare.
    mistakes: wrong answers, by what to say of them.
    """

    solution: Callable
    outcome: Callable[[Callable], tuple[Tensor, ...]]
    mistakes: dict[str, Callable] = field(default_factory=dict)


def check(name: str, answer: Callable) -> bool:
    """Print whether an answer is right and, if it is not, what is wrong -> whether it is."""
    problem = problem_of(EXERCISES[name], answer)
    if problem is None:
        print(f"\033[32mright:\033[0m {name}")
        return True
    print(f"\033[31mnot yet:\033[0m {name}: {problem}")
    return False


def solution(name: str) -> None:
    """Print the package's own function."""
    print(getsource(EXERCISES[name].solution))


def problem_of(exercise: Exercise, answer: Callable) -> str | None:
    """Return what is wrong with an answer; None if it is right."""
    wanted = exercise.outcome(exercise.solution)
    try:
        found = exercise.outcome(answer)
    except NotImplementedError:
        return "it is still empty"
    except Exception as error:      # an answer may fail in any way, and is told how
        return f"it stops with {type(error).__name__}: {error}"

    problem = difference(found, wanted)
    if problem is None:
        return None
    for message, mistake in exercise.mistakes.items():
        if difference(found, exercise.outcome(mistake)) is None:
            return message
    return problem


def difference(found: tuple, wanted: tuple) -> str | None:
    """Return how an outcome differs from the wanted one; None if it does not, but for rounding."""
    if len(found) != len(wanted):
        return f"it returns {len(found)} results, where {len(wanted)} are wanted"
    for number, (a, b) in enumerate(zip(found, wanted), 1):
        which = f"result {number} of {len(wanted)}: " if len(wanted) > 1 else ""
        if not isinstance(a, Tensor):
            return f"{which}it returns {type(a).__name__}, where a tensor is wanted"
        if a.shape != b.shape:
            return f"{which}it has the shape {tuple(a.shape)}, where {tuple(b.shape)} is wanted"
        if not torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5):
            error = (a.double() - b.double()).abs().flatten()
            i = int(error.nan_to_num(torch.inf).argmax())
            return (
                f"{which}the shape {tuple(a.shape)} is right, the values are not: one is "
                f"{a.flatten()[i]:.4f}, where {b.flatten()[i]:.4f} is wanted"
            )
    return None


# ---- the exercises: what an answer is tried on, and mistakes that are often made

def outcome_of_q_sample(answer: Callable) -> tuple[Tensor, ...]:
    z, eps = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)
    return (answer(z, torch.tensor([0, 500, 999]), eps, ABAR),)


Q_SAMPLE = Exercise(q_sample, outcome_of_q_sample, {
    "you weigh with abar and 1 - abar, which are variances; take their square roots":
        lambda z, t, eps, abar: at(abar, t, z) * z + (1 - at(abar, t, z)) * eps,
    "the two weights are exchanged: at t = 0, z must be left almost as it is":
        lambda z, t, eps, abar: (1 - at(abar, t, z)).sqrt() * z + at(abar, t, z).sqrt() * eps,
    "you take abar of the step before; abar_t already has the noise of step t":
        lambda z, t, eps, abar: q_sample(z, (t - 1).clamp(min=0), eps, abar),
})


def outcome_of_posterior(answer: Callable) -> tuple[Tensor, ...]:
    abar_t, abar_s = ABAR[500].float(), ABAR[300].float()
    return tuple(answer(noise(2, 4, 2, 2), noise(2, 4, 2, 2, seed=1), abar_t, abar_s))


POSTERIOR = Exercise(posterior, outcome_of_posterior, {
    "the variance is beta, which is DDPM's other choice, sigma^2 = beta_t; wanted is that of "
    "Bayes' rule, Eq. (7)":
        lambda z_0, z_t, a, b: (posterior(z_0, z_t, a, b)[0], 1 - a / b),
    "z_0 and z_t are exchanged":
        lambda z_0, z_t, a, b: posterior(z_t, z_0, a, b),
    "the alpha of the step is abar_t / abar_s, not abar_t":
        lambda z_0, z_t, a, b: (
            (b.sqrt() * (1 - a) * z_0 + a.sqrt() * (1 - b) * z_t) / (1 - a),
            (1 - a) * (1 - b) / (1 - a),
        ),
})


def outcome_of_ddim_step(answer: Callable) -> tuple[Tensor, ...]:
    z, eps = noise(2, 4, 2, 2), noise(2, 4, 2, 2, seed=1)
    abar_t, abar_s = ABAR[600].float(), ABAR[400].float()
    return answer(z, eps, abar_t, abar_s), answer(z, eps, abar_t, torch.tensor(1.0))


DDIM_STEP = Exercise(ddim_step, outcome_of_ddim_step, {
    "you return z_0 itself; a step goes on to s, where there is still noise":
        lambda z, eps, a, b: ddim_step(z, eps, a, torch.tensor(1.0)),
    "the noise is added with the weight of t, sqrt(1 - abar_t); at s there is less":
        lambda z, eps, a, b: b.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt()
        + (1 - a).sqrt() * eps,
    "you forget to divide by sqrt(abar_t) when you solve for z_0":
        lambda z, eps, a, b: b.sqrt() * (z - (1 - a).sqrt() * eps) + (1 - b).sqrt() * eps,
})


def outcome_of_ldm_loss(answer: Callable) -> tuple[Tensor, ...]:
    z, eps = noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)

    def eps_theta(z_t: Tensor, t: Tensor, ctx: tuple) -> Tensor:
        return 0.5 * z_t + t.view(-1, 1, 1, 1) / 1000

    return (answer(eps_theta, z, torch.tensor([0, 500, 999]), eps, ABAR, ()),)


LDM_LOSS = Exercise(ldm_loss, outcome_of_ldm_loss, {
    "the network must see z_t, not z: add the noise first":
        lambda f, z, t, eps, abar, ctx: (eps - f(z, t, ctx)).square().flatten(1).mean(1),
    "you compare with z; wanted is the noise, eps":
        lambda f, z, t, eps, abar, ctx:
            (z - f(q_sample(z, t, eps, abar), t, ctx)).square().flatten(1).mean(1),
    "you sum over the latent; wanted is a mean, so that the size does not matter":
        lambda f, z, t, eps, abar, ctx:
            (eps - f(q_sample(z, t, eps, abar), t, ctx)).square().flatten(1).sum(1),
    "you return one number; wanted is one for each sample, (B,)":
        lambda *args: ldm_loss(*args).mean(),
})


def outcome_of_embedding(answer: Callable) -> tuple[Tensor, ...]:
    return (answer(torch.tensor([0, 1, 500]), 8),)


TIMESTEP_EMBEDDING = Exercise(timestep_embedding, outcome_of_embedding, {
    "sines and cosines are exchanged: the first half are cosines":
        lambda t, dim: timestep_embedding(t, dim).roll(dim // 2, dims=1),
    "the exponent runs over dim; it is divided by dim / 2":
        lambda t, dim: embedding(t, dim, -1, dim),
    "the frequencies rise; they fall from 1 to almost 1 / 10000":
        lambda t, dim: embedding(t, dim, 1, dim // 2),
})


def embedding(t: Tensor, dim: int, sign: float, divisor: int) -> Tensor:
    """A timestep embedding with frequencies of another kind."""
    frequency = 10000.0 ** (sign * torch.arange(dim // 2) / divisor)
    angle = t[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, by torch: q (B, N, d), k (B, M, d), v (B, M, d_v)."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def outcome_of_attention(answer: Callable) -> tuple[Tensor, ...]:
    return (answer(noise(2, 5, 4), noise(2, 3, 4, seed=1), noise(2, 3, 6, seed=2)),)


ATTENTION = Exercise(attention, outcome_of_attention, {
    "the products are not divided by sqrt(d)":
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
    "you divide by d, not by its square root":
        lambda q, k, v: (q @ k.mT / q.shape[-1]).softmax(-1) @ v,
    "the softmax runs over the places; each place must share out a weight of 1 among the tokens":
        lambda q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(1) @ v,
})


def outcome_of_guidance(answer: Callable) -> tuple[Tensor, ...]:
    """Of an eps_theta that is 1 per unit of z_t, and 2 per unit of its token."""
    def eps_theta(z_t: Tensor, t: Tensor, ctx: Context) -> Tensor:
        return z_t + 2 * ctx.tokens.mean((1, 2)).view(-1, 1, 1, 1)

    z_t, t = noise(2, 4, 2, 2), torch.tensor([500, 500])
    ctx = Context(tokens=noise(2, 1, 3, seed=1))
    ctx_null = Context(tokens=noise(1, 1, 3, seed=2))
    return tuple(answer(eps_theta, ctx_null, s)(z_t, t, ctx) for s in (0.0, 1.0, 3.0))


GUIDANCE = Exercise(guided, outcome_of_guidance, {
    "your s is Ho and Salimans' w: no guidance is s = 1 here, and w = 0 there":
        lambda f, ctx_null, s: guided(f, ctx_null, s + 1),
    "you scale eps itself; s scales its difference from that of the null condition":
        lambda f, ctx_null, s: lambda z_t, t, ctx: s * f(z_t, t, ctx),
    "the difference points away from the condition":
        lambda f, ctx_null, s: lambda z_t, t, ctx: f(z_t, t, ctx_null)
        + s * (f(z_t, t, ctx_null) - f(z_t, t, ctx)),
})


def outcome_of_drop(answer: Callable) -> tuple[Tensor, ...]:
    y = {"caption": torch.arange(12).view(3, 4), "label": torch.tensor([5, 6, 7])}
    y_null = {"caption": torch.zeros(1, 4).long()}
    dropped = answer(dict(y), y_null, torch.tensor([True, False, True]))
    if "label" not in dropped:
        raise ValueError("'label' is missing: what y_null does not name stays as it is in y")
    return dropped["caption"], dropped["label"], y["caption"]


def written_into(y: dict, y_null: dict, drop: Tensor) -> dict:
    """Drop conditions in place, which is a mistake."""
    for name, null in y_null.items():
        y[name][drop] = null
    return y


DROP_CONDITION = Exercise(drop_condition, outcome_of_drop, {
    "the rows that should stay are dropped, and the others stay":
        lambda y, y_null, drop: drop_condition(y, y_null, ~drop),
    "all rows are dropped; drop has one entry for each row":
        lambda y, y_null, drop: drop_condition(y, y_null, torch.ones_like(drop)),
    "nothing is dropped: return the new tensors, and leave those of y alone":
        lambda y, y_null, drop: y,
    "you write into the tensors of y, which others still need; make new ones":
        lambda y, y_null, drop: written_into(y, y_null, drop),
})


def outcome_of_kl(answer: Callable) -> tuple[Tensor, ...]:
    return (answer(noise(3, 4, 2, 2), noise(3, 4, 2, 2, seed=1)),)


def kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, (B,), by the package."""
    return Posterior(mean, logvar).kl()


KL = Exercise(kl, outcome_of_kl, {
    "the factor 1/2 is missing":
        lambda mean, logvar: 2 * kl(mean, logvar),
    "exp(logvar) is the variance already; do not square it":
        lambda mean, logvar: kl(mean, 2 * logvar) + 0.5 * logvar.flatten(1).sum(1),
    "you take the mean over the latent; the divergence of independent values is their sum":
        lambda mean, logvar: kl(mean, logvar) / mean[0].numel(),
})


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """The nearest of the codes (K, c) to each row of z (n, c); its gradient is z's."""
    k = torch.cdist(z, codes).argmin(1)
    return Quantised(z, codes[k], k).straight_through()


def outcome_of_straight_through(answer: Callable) -> tuple[Tensor, ...]:
    """The codes, and the gradient that reaches z."""
    z = noise(6, 3).requires_grad_()
    codes = noise(5, 3, seed=1)
    zq = answer(z, codes)
    if not zq.requires_grad:
        return zq.detach(), torch.zeros_like(z)
    gradient, = torch.autograd.grad((zq * noise(6, 3, seed=2)).sum(), z)
    return zq.detach(), gradient


def quantised_wrong_way(z: Tensor, codes: Tensor) -> Tensor:
    """The value of z, and no gradient for it, which is a mistake."""
    zq = codes[torch.cdist(z, codes).argmin(1)]
    return zq + (z - zq).detach()


STRAIGHT_THROUGH = Exercise(straight_through, outcome_of_straight_through, {
    "the codes are right, but no gradient reaches z, so E would never learn":
        lambda z, codes: codes[torch.cdist(z, codes).argmin(1)],
    "z itself is returned: the gradient is right, but nothing is quantised":
        lambda z, codes: z + 0 * z,
    "z and the code are exchanged: this has the value of z, and the gradient goes to the code":
        lambda z, codes: quantised_wrong_way(z, codes),
    "these are the farthest codes":
        lambda z, codes: z + (codes[torch.cdist(z, codes).argmax(1)] - z).detach(),
})


def outcome_of_adaptive_weight(answer: Callable) -> tuple[Tensor, ...]:
    """For losses whose gradients at a last layer are known: of norms 3 and 0.5, then 3 and 0."""
    last = torch.ones(4, requires_grad=True)
    return (
        answer(1.5 * last.sum(), 0.25 * last.sum(), last),
        answer(1.5 * last.sum(), 0 * last.sum(), last),
    )


ADAPTIVE_WEIGHT = Exercise(adaptive_weight, outcome_of_adaptive_weight, {
    "the ratio is upside down: the reconstruction's gradient is above":
        lambda rec, adv, last: adaptive_weight(adv, rec, last),
    "without a small number below, it is infinite where the adversarial gradient is 0":
        lambda rec, adv, last: gradient_norm(rec, last) / gradient_norm(adv, last),
    "it is not limited; where the adversarial gradient is 0, it would be 30,000":
        lambda rec, adv, last: gradient_norm(rec, last) / (gradient_norm(adv, last) + 1e-4),
})


def gradient_norm(loss: Tensor, last: Tensor) -> Tensor:
    """The norm of a loss's gradient at the last layer."""
    gradient, = torch.autograd.grad(loss, last, retain_graph=True)
    return gradient.norm()


def outcome_of_sampler(answer: Callable) -> tuple[Tensor, ...]:
    """Of Gaussian data N(1, 1/4), whose best eps_theta is a formula."""
    def eps_theta(z_t: Tensor, t: Tensor, ctx: tuple) -> Tensor:
        abar_t = at(ABAR, t, z_t)
        variance = abar_t / 4 + 1 - abar_t
        return (1 - abar_t).sqrt() / variance * (z_t - abar_t.sqrt())

    z_T = noise(3, 1, 2, 2)
    return tuple(
        answer(eps_theta, z_T, (), ABAR, timesteps(ABAR, n)) for n in (1, 4, 20)
    )


def other_heun(first: float, last_too: bool) -> Callable:
    """Heun's method with another weight of the first eps."""
    def run(eps_theta, z, ctx, abar, ts, randn=None):
        for t, s, abar_t, abar_s in steps(ts, abar):
            eps = eps_theta(z, each(t, z), ctx)
            if s >= 0 or last_too:
                z_s = ddim_step(z, eps, abar_t, abar_s)
                eps_s = eps_theta(z_s, each(max(s, 0), z), ctx)
                eps = first * eps + (1 - first) * eps_s
            z = ddim_step(z, eps, abar_t, abar_s)
        return z

    return run


HEUN = Exercise(heun, outcome_of_sampler, {
    "this is DDIM: the eps at the end of the step is not used":
        other_heun(1.0, last_too=False),
    "only the eps at the end of the step is used; take the mean of both":
        other_heun(0.0, last_too=False),
    "in the last step, to z_0 itself, there is no timestep to ask the network for":
        other_heun(0.5, last_too=True),
})


def outcome_of_prediction(answer: Callable) -> tuple[Tensor, ...]:
    return (answer(noise(2, 4, 2, 2), noise(2, 4, 2, 2, seed=1), torch.tensor(0.3)),)


V_PREDICTION = Exercise(eps_from_v, outcome_of_prediction, {
    "this is z_0; eps has the two weights exchanged, and a plus":
        lambda v, z_t, a: a.sqrt() * z_t - (1 - a).sqrt() * v,
    "the sign of v is wrong":
        lambda v, z_t, a: (1 - a).sqrt() * z_t - a.sqrt() * v,
    "the weights are square roots: z_t and v are rotated, which keeps lengths":
        lambda v, z_t, a: (1 - a) * z_t + a * v,
})

FLOW = Exercise(eps_from_velocity, outcome_of_prediction, {
    "the sum is not divided by sqrt(abar) + sqrt(1 - abar)":
        lambda u, z_t, a: z_t + a.sqrt() * u,
    "this is z_0; eps = z_0 + u":
        lambda u, z_t, a: (z_t - (1 - a).sqrt() * u) / (a.sqrt() + (1 - a).sqrt()),
    "z_t is taken for x_r: it is larger by sqrt(abar) + sqrt(1 - abar)":
        lambda u, z_t, a: z_t + a.sqrt() / (a.sqrt() + (1 - a).sqrt()) * u,
})


def inpainting(image: Tensor, mask: Tensor, encode: Callable) -> Tensor:
    """What lies beside z_t for the task inpaint, by the package; encode returns latents."""
    ae = SimpleNamespace(encode=lambda x: Posterior(encode(x), None))
    task = Inpainting({})
    y = task.encode({"image": image, "mask": mask})
    return task.context(y, None, ae).beside


def eighths(x: Tensor) -> Tensor:
    """A stage one without weights: a latent is the mean of 8 x 8 pixels."""
    return torch.nn.functional.avg_pool2d(x, 8)


def outcome_of_inpainting(answer: Callable) -> tuple[Tensor, ...]:
    mask = torch.zeros(2, 1, 32, 32)
    mask[:, :, 6:21, 9:18] = 1
    return (answer(noise(2, 3, 32, 32), mask, eighths),)


INPAINTING = Exercise(inpainting, outcome_of_inpainting, {
    "the hole is left and the rest is masked; the mask is 1 in the holes":
        lambda image, mask, encode: inpainting(image, 1 - mask, encode),
    "the holes are grey (0); they are black (-1)":
        lambda image, mask, encode: torch.cat(
            [encode(image * (1 - mask)), 2 * mask[:, :, ::8, ::8] - 1], dim=1),
    "the mask is 0 and 1; as all that a network is given, it goes from -1 to 1":
        lambda image, mask, encode: torch.cat(
            [encode(image * (1 - mask) - mask), mask[:, :, ::8, ::8]], dim=1),
})


EXERCISES = {
    "q_sample": Q_SAMPLE,
    "posterior": POSTERIOR,
    "ddim_step": DDIM_STEP,
    "ldm_loss": LDM_LOSS,
    "timestep_embedding": TIMESTEP_EMBEDDING,
    "attention": ATTENTION,
    "guided": GUIDANCE,
    "drop_condition": DROP_CONDITION,
    "kl": KL,
    "straight_through": STRAIGHT_THROUGH,
    "adaptive_weight": ADAPTIVE_WEIGHT,
    "eps_from_v": V_PREDICTION,
    "heun": HEUN,
    "eps_from_velocity": FLOW,
    "inpainting": INPAINTING,
}
