"""Classifier-free guidance: make images follow their condition more closely.

Paper:   Sec. 4.3.1, Table 10; Ho and Salimans 2021, Eq. (6).
Symbols: s is the guidance scale; y the condition; ctx = tau(y), a Context. The null
         condition says nothing: it is the empty caption, or a class of its own.
Shapes:  z_t (B, c, h, w); t (B,); y {name: (B, ...)}; the tensors of ctx (B, ...).

In training, a share p_drop of the conditions is replaced by the null condition, so one
network learns eps_theta both with and without a condition. In sampling, the difference
of the two is the direction in which the condition pulls, and s > 1 goes further there.

NB: the paper reports guided results, but its released code never drops a condition.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from tinyldm.conditioning import Context


def drop_condition(
    y: dict[str, Tensor], y_null: dict[str, Tensor], drop: Tensor
) -> dict[str, Tensor]:
    """Return y with the null condition in the rows where drop (B,) is true.

    y_null has names of y; its tensors are (1, ...), or broadcast to one row of y. A row
    loses all that y_null names, or nothing. The dtypes are those of y.
    """
    dropped = dict(y)
    for name, null in y_null.items():
        values = y[name]
        # drop as (B, 1, ..., 1), which broadcasts over whole rows of values.
        rows = drop.view(-1, *[1] * (values.ndim - 1))
        dropped[name] = torch.where(rows, null.to(values), values)
    return dropped


def null_of(y: dict[str, Tensor], y_null: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the condition that says nothing, (1, ...), with the names and shapes of y.

    What y_null does not name stays as it is in y.
    """
    null = dict(y)
    for name, v in y_null.items():
        null[name] = v.to(y[name].device).expand(1, *y[name].shape[1:])
    return null


def guided(eps_theta: Callable, ctx_null: Context, s: float) -> Callable:
    """Return an eps_theta that is guided with scale s, Ho and Salimans Eq. (6):

        eps = eps_theta(ctx_null) + s (eps_theta(ctx) - eps_theta(ctx_null))

    s = 0 ignores the condition, s = 1 is no guidance, s > 1 exaggerates the condition.
    NB: Ho and Salimans write (1 + w) eps_theta(ctx) - w eps_theta(ctx_null). It is the
    same with w = s - 1: their w = 0 is s = 1 here.

    Both terms are computed in one call of twice the batch, the null condition first.
    The batch size of ctx_null is 1 or B, in each port. A negative condition, which says
    what an image should not show, can take its place.
    """
    if s == 1:
        return eps_theta

    def guided_eps_theta(z_t: Tensor, t: Tensor, ctx: Context) -> Tensor:
        eps_null, eps = null_and_condition(eps_theta, z_t, t, ctx, ctx_null)
        return eps_null + s * (eps - eps_null)

    return guided_eps_theta


def null_and_condition(
    eps_theta: Callable, z_t: Tensor, t: Tensor, ctx: Context, ctx_null: Context
) -> tuple[Tensor, Tensor]:
    """Return eps_theta of the null condition and of ctx, (B, c, h, w) each, in one call."""
    both = Context(
        tokens=null_first(ctx_null.tokens, ctx.tokens),
        beside=null_first(ctx_null.beside, ctx.beside),
    )
    output = eps_theta(torch.cat([z_t, z_t]), torch.cat([t, t]), both)
    eps_null, eps = output.chunk(2)
    return eps_null, eps


def null_first(null: Tensor | None, values: Tensor | None) -> Tensor | None:
    """Return the null condition B times, then the B conditions: (2B, ...).

    A port that is not in use is None, and stays None.
    """
    if values is None:
        return None
    return torch.cat([null.expand_as(values), values])
