"""Muon: an optimiser whose updates of a matrix have no direction that is stronger than others.

Source:  K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
Symbols: G a weight's gradient, its momentum M, both as matrices (rows, columns): each output of
         a layer is a row. U S V^T is the singular value decomposition of a matrix.

Beside:  Adam divides each number of the momentum by its own typical size. But a gradient is a sum
         of few strong directions and many weak ones, and so is Adam's update: a network learns
         what is frequent first, and what is rare for a long time not at all. Muon takes U V^T in
         place of M = U S V^T, so that all directions are learned at once.

What is no matrix between two layers (biases, norms, embeddings) is left to AdamW.
"""
from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95

# 5 steps of this polynomial take every singular value of 0.02 .. 1 to 0.7 .. 1.2, which is enough.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
N_STEPS = 5


class Muon(torch.optim.AdamW):
    """AdamW, except for the weights of linear layers and convolutions of `nets`.

    lr: AdamW's learning rate; muon_lr: that of the matrices. Whoever changes the first during
        training changes both, as their ratio stays.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        nets: Iterable[nn.Module],
        lr: float,
        muon_lr: float,
        betas: tuple[float, float],
    ):
        super().__init__(params, lr=lr, betas=betas, fused=True)
        self.ratio = muon_lr / lr
        self.matrices = [p for net in nets for p in matrices(net) if p.requires_grad]

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights by their gradients. Those of the matrices are used up."""
        group = self.param_groups[0]
        lr = self.ratio * group["lr"]
        for p in self.matrices:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)               # AdamW's name for it
                state["momentum"] = torch.zeros_like(p)
            state["step"] += 1
            momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
            ahead = p.grad.lerp(momentum, MOMENTUM)             # Nesterov's momentum

            matrix = ahead.flatten(1)                           # (rows, columns)
            rows, columns = matrix.shape
            size = max(1, rows / columns) ** 0.5                # the output changes as much
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(orthogonal(matrix).view_as(p), alpha=-lr * size)
            p.grad = None                                       # so that AdamW passes over it
        super().step()


def matrices(net: nn.Module) -> list[nn.Parameter]:
    """Return the weights of all linear layers and convolutions of a network."""
    return [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def orthogonal(m: Tensor) -> Tensor:
    """Return about U V^T of a matrix U S V^T, by matrix products alone (Newton-Schulz).

    A product like m m^T m has the same U and V, and the cubes of the singular values. So a
    polynomial of m changes its singular values and nothing else; this one takes them near to 1.
    """
    a, b, c = COEFFICIENTS
    is_tall = m.shape[0] > m.shape[1]
    x = m.mT if is_tall else m                                  # m m^T is then the smaller one
    x = x / (x.norm() + 1e-7)                                   # singular values of at most 1
    for _ in range(N_STEPS):
        square = x @ x.mT
        factor = torch.addmm(square, square, square, beta=b, alpha=c)   # b square + c square^2
        x = torch.addmm(x, factor, x, beta=a)                           # a x + factor x
    return x.mT if is_tall else x
