"""The learning rate of a step, and the moving average of the weights.

Paper: App. E.2 and the released code's ema.py.
"""
import copy
import math

import torch
from torch import nn


def learning_rate(step: int, lr: float, warmup: int, steps: int, cosine: bool) -> float:
    """Return the learning rate of step 1, 2, ..., `steps`.

    It rises linearly over `warmup` steps to lr, then stays there (the paper's models) or, with
    `cosine`, falls to 0 at the end.
    """
    decay = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / steps) if cosine else 1.0
    return lr * min(1.0, step / max(1, warmup)) * decay


class EMA:
    """The exponential moving average of the weights of some networks, in `nets`.

    At update n the decay is min(decay, (1 + n) / (10 + n)), the released code's warm-up: a
    short run is not dominated by its random initial weights.

    NB: the released code averages the U-Net only. Here tau is averaged with it, as the two
    are trained together.
    """

    def __init__(self, nets: dict[str, nn.Module], decay: float):
        self.source = nets
        self.decay = decay
        self.n_updates = 0
        self.nets = {}
        for name, net in nets.items():
            self.nets[name] = copy.deepcopy(net).requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        self.n_updates += 1
        decay = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        average = nn.ModuleDict(self.nets).state_dict()
        current = nn.ModuleDict(self.source).state_dict()
        torch._foreach_lerp_(list(average.values()), list(current.values()), 1 - decay)
