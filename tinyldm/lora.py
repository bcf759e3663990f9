"""LoRA: teach a trained network something new by a few weights beside its own.

Paper: Low-Rank Adaptation (Hu et al. 2022), Sec. 4.1. A projection W of attention becomes
       W + up down. up and down are thin, of rank r, and only they are trained.

NB: others multiply up down by alpha / r, too. Here scale 1 is what was trained.
"""
import torch
from torch import Tensor, nn

from tinyldm.attention import Attention, SelfAttention2d
from tinyldm.errors import require

# The projections of each kind of attention: Linear layers, and 1x1 convolutions.
PROJECTIONS = {
    Attention: ("to_q", "to_k", "to_v", "to_out"),
    SelfAttention2d: ("qkv", "proj_out"),
}

# How the names of a file's tensors end, after the name of their projection.
DOWN = ".lora_down.weight"
UP = ".lora_up.weight"


class LowRank(nn.Module):
    """The pair beside a projection: x -> up(down(x)), of the shape of the projection of x.

    up begins at zero, so the network begins as it was; down as torch begins any layer.
    NB: a Gaussian in the paper, but not in its released code.
    """

    def __init__(self, projection: nn.Linear | nn.Conv2d, rank: int):
        super().__init__()
        d_out, d_in = projection.weight.shape[:2]
        how = {"bias": False, "device": projection.weight.device}
        if isinstance(projection, nn.Conv2d):
            self.down = nn.Conv2d(d_in, rank, 1, **how)
            self.up = nn.Conv2d(rank, d_out, 1, **how)
        else:
            self.down = nn.Linear(d_in, rank, **how)
            self.up = nn.Linear(rank, d_out, **how)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))


class WithLowRank(nn.Module):
    """Takes the place of a projection: x -> projection(x) + pair(x)."""

    def __init__(self, projection: nn.Linear | nn.Conv2d, rank: int):
        super().__init__()
        self.projection = projection
        self.pair = LowRank(projection, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x) + self.pair(x)


def projections(net: nn.Module) -> dict[str, nn.Module]:
    """Return the projections of all attention in a network, by their names in it."""
    found = {}
    for name, module in net.named_modules():
        for part in PROJECTIONS.get(type(module), ()):
            found[f"{name}.{part}"] = getattr(module, part)
    return found


def add_pairs(net: nn.Module, rank: int) -> None:
    """Freeze a network, and put a trainable pair beside each of its projections.

    Raises BadInput if it has none.
    """
    found = projections(net)
    require(found, "a LoRA needs attention, and this network has none")
    net.requires_grad_(False)
    for name, projection in found.items():
        parent, _, part = name.rpartition(".")
        setattr(net.get_submodule(parent), part, WithLowRank(projection, rank))


def pairs_of(nets: dict[str, nn.Module]) -> nn.ModuleDict:
    """Return the pairs in several networks: what is trained, averaged and saved.

    A key is a projection's name, with / for the dots that torch does not allow in it:
    unet/middle/1/blocks/0/self_attn/to_q.
    """
    pairs = nn.ModuleDict()
    for net_name, net in nets.items():
        for name, module in net.named_modules():
            if isinstance(module, WithLowRank):
                pairs[f"{net_name}.{name}".replace(".", "/")] = module.pair
    return pairs


def lora_state(pairs: nn.ModuleDict) -> dict[str, Tensor]:
    """Return the tensors of a LoRA's file, in fp32, by the names of their projections."""
    state = {}
    for key, pair in pairs.items():
        name = key.replace("/", ".")
        state[name + DOWN] = pair.down.weight.detach().float().cpu().contiguous()
        state[name + UP] = pair.up.weight.detach().float().cpu().contiguous()
    return state


def merge(nets: dict[str, nn.Module], state: dict[str, Tensor], scale: float) -> None:
    """Add scale * up down to the weights of projections; several LoRAs add up.

    nets: networks without pairs, by name. state: the tensors of a LoRA's file.
    Raises BadInput that names a tensor of another model, or one without its partner;
    then no weight is changed.
    """
    places = {}
    for net_name, net in nets.items():
        for name, projection in projections(net).items():
            places[f"{net_name}.{name}"] = projection
    check_fits(places, state)

    for name in [key.removesuffix(DOWN) for key in state if key.endswith(DOWN)]:
        W = places[name].weight
        down = state[name + DOWN].to(W.device, torch.float32).flatten(1)    # (r, d_in)
        up = state[name + UP].to(W.device, torch.float32).flatten(1)        # (d_out, r)
        merged = W.float() + scale * (up @ down).reshape(W.shape)

        # A new tensor. Why: W may be mapped from a file that must not change.
        places[name].weight = nn.Parameter(merged.to(W.dtype), requires_grad=False)


def check_fits(places: dict[str, nn.Module], state: dict[str, Tensor]) -> None:
    """Raise BadInput unless the tensors are pairs for projections, given by name."""
    require(state, "a LoRA without tensors")
    for key, x in state.items():
        name = key.removesuffix(DOWN if key.endswith(DOWN) else UP)
        require(
            name != key and name in places,
            f"{key} has no place in this model: it is a LoRA of another one",
        )
        for partner in (name + DOWN, name + UP):
            require(partner in state, f"{partner} is missing, without which {key} is no pair")

        # (r, d_in) and (d_out, r); the weights of a convolution have two more sides of 1.
        d_out, d_in, *ones = places[name].weight.shape
        rank = state[name + DOWN].shape[:1]
        needed = (*rank, d_in, *ones) if key.endswith(DOWN) else (d_out, *rank, *ones)
        found = tuple(x.shape)
        require(
            found == needed,
            f"{key} has shape {found}, not {needed}: it is a LoRA of another model",
        )
