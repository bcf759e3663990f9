"""Distillation: a model learns to do in one step of sampling what it did in two.

Papers:  Salimans and Ho 2022 (progressive distillation), Sec. 3, Alg. 2; Meng et al. 2023
         (distillation of guided models), Sec. 3.1.
Symbols: S steps of the student, from t to s; the teacher goes there in two, by way of m.
         a = sqrt(abar), b = sqrt(1 - abar).

The student begins as a copy of its teacher. Its target at z_t is not the noise that was
added, but the (z_0, eps) from which one DDIM step leads where two steps of the teacher do.
The two always add up to z_t, so Eq. (2) is as before, with other z and eps.

Each run halves the number of steps. The next one begins with its result: 16, 8, 4, 2, 1.
A teacher that can be guided is, at its task's scale, in the first run. The student says
by itself what guidance makes of two answers, so its step is half the work; and it cannot be
guided any more.
NB: Meng et al. distill guidance first, for any scale that the student is told, and halve
afterwards. Here the scale is the task's, and the first run does both.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyldm.diffusion import at, draw_timesteps, q_sample
from tinyldm.guidance import guided, null_of
from tinyldm.model import LatentDiffusion
from tinyldm.samplers import ddim_step, timesteps


@dataclass
class Teacher:
    """A frozen model, as the teacher of a student that samples in S steps."""

    model: LatentDiffusion
    S: int

    def __post_init__(self) -> None:
        """Raises BadInput unless 2 S timesteps are to be had."""
        visited = timesteps(self.model.abar, 2 * self.S)
        # Two rows per step of the student: where it begins, and its middle.
        self.starts = torch.tensor(visited[:-1:2])          # (S,)
        self.middles = torch.tensor(visited[1:-1:2])        # (S,)
        self.ends = torch.tensor(visited[2::2])             # (S,), -1 at last

    def draw(self, B: int, generator: torch.Generator) -> Tensor:
        """Draw t (B,) from those that the student visits, evenly."""
        return self.starts[draw_timesteps(B, self.S, generator)]

    @torch.no_grad()
    def targets(
        self, z: Tensor, t: Tensor, eps: Tensor, y: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the z_0 and the eps that the student is to find in z_t, (B, c, h, w) each.

        z, t and eps are as in ldm_loss, t one of draw's; y is the condition.
        """
        model = self.model
        row = (t[:, None] == self.starts).int().argmax(1)       # which of the student's steps
        m = self.middles[row]
        s = self.ends[row]

        abar = torch.cat([model.abar, model.abar.new_ones(1)])  # so that abar[-1] is 1
        abar_t, abar_m, abar_s = (at(abar, step, z) for step in (t, m, s))

        # Two DDIM steps of the teacher.
        z_t = q_sample(z, t, eps, model.abar)
        eps_theta, ctx = self._eps_theta(y)
        z_m = ddim_step(z_t, eps_theta(z_t, t, ctx), abar_t, abar_m)
        z_s = ddim_step(z_m, eps_theta(z_m, m, ctx), abar_m, abar_s)

        # Solve a_t z_0 + b_t eps = z_t and a_s z_0 + b_s eps = z_s.
        ratio = (1 - abar_s).sqrt() / (1 - abar_t).sqrt()       # b_s / b_t
        z_0 = (z_s - ratio * z_t) / (abar_s.sqrt() - ratio * abar_t.sqrt())
        return z_0, (z_t - abar_t.sqrt() * z_0) / (1 - abar_t).sqrt()

    def _eps_theta(self, y: dict[str, Tensor]) -> tuple:
        """Return the teacher's eps_theta, guided if it can be, and its ctx of y."""
        model = self.model
        y_null = null_of(y, model.task.null())
        ctx = model.task.context(y, model.tau, model.ae)
        ctx_null = model.task.context(y_null, model.tau, model.ae)
        has_condition = ctx.tokens is not None or ctx.beside is not None
        s = model.default_scale() if has_condition else 1.0
        return guided(model.eps_theta(), ctx_null, s), ctx
