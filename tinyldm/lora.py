"""LoRA: teach a trained network something new by a few weights beside its own.

Paper: Low-Rank Adaptation (Hu et al. 2022), Sec. 4.1: W + up down, of rank r.
"""
import torch
from torch import Tensor, nn

from tinyldm.attention import Attention

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


class LowRank(nn.Module):
    """The pair: x (..., d_in) -> up(down(x)) (..., d_out). It begins as zero."""

    def __init__(self, projection: nn.Linear, rank: int):
        super().__init__()
        self.down = nn.Linear(projection.in_features, rank, bias=False)
        self.up = nn.Linear(rank, projection.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class WithLowRank(nn.Module):
    """A frozen projection, and a pair beside it."""

    def __init__(self, projection: nn.Linear, rank: int):
        super().__init__()
        self.projection = projection
        self.pair = LowRank(projection, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x) + self.pair(x)


def add_pairs(net: nn.Module, rank: int) -> None:
    """Freeze a network, and put a pair beside each of its attention's projections."""
    net.requires_grad_(False)
    for module in list(net.modules()):
        if isinstance(module, Attention):
            for name in PROJECTIONS:
                setattr(module, name, WithLowRank(getattr(module, name), rank))


def pairs_of(nets: dict[str, nn.Module]) -> nn.ModuleDict:
    """Return the pairs of several networks, by the names of their projections."""
    pairs = nn.ModuleDict()
    for net_name, net in nets.items():
        for name, module in net.named_modules():
            if isinstance(module, WithLowRank):
                pairs[f"{net_name}.{name}".replace(".", "/")] = module.pair
    return pairs


def lora_state(pairs: nn.ModuleDict) -> dict[str, Tensor]:
    """Return the tensors of the file of a LoRA."""
    state = {}
    for name, pair in pairs.items():
        for part in ("down", "up"):
            key = f"{name.replace('/', '.')}.lora_{part}.weight"
            state[key] = getattr(pair, part).weight.detach().cpu().to(torch.float32)
    return state
