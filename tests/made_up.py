"""Made-up items with every field that a task may need, and tiny models that learn from them.

Tests that run over the table of tasks use these: what a task needs of them, its class says.
"""
import functools

import torch
from conftest import TINY_LDM
from torch import Tensor, nn

import train_ldm
from tinyldm.autoencoder import AEConfig, Autoencoder, Pixels
from tinyldm.data.dataset import ListDataset
from tinyldm.model import LatentDiffusion

LABEL_NAMES = ("ant", "bee", "cat", "dog")
BOX_NAMES = ("eye", "nose", "tail")
MAP_NAMES = ("ground", "fur", "grass", "sky", "sea")


def made_up_items(n: int, h: int = 32, w: int = 32) -> list[dict]:
    """Return n random items of (h, w) pixels.

    Two neighbours differ in every field, not only in its values, but also in their range and mean:
    so whatever is computed from a whole batch differs from what is computed from its items.
    """
    rng = torch.Generator().manual_seed(0)
    items = []
    for i in range(n):
        kind = 1 + i % 3
        items.append({
            "image": made_up_image(kind / 3, h, w, rng),
            "caption": f"{LABEL_NAMES[i % 4]} number {i}",
            "label": i % len(LABEL_NAMES),
            "boxes": made_up_boxes(kind, rng),
            "segmentation": torch.randint(2 + kind, (h, w), generator=rng),
            "small": made_up_image(kind / 3, h // 4, w // 4, rng),
            "mask": (torch.rand(1, h, w, generator=rng) < kind / 4).float(),
        })
    return items


def made_up_image(contrast: float, h: int, w: int, rng: torch.Generator) -> Tensor:
    """Return noise (3, h, w), uniform in +- contrast, and brighter for a lower contrast."""
    noise = torch.rand(3, h, w, generator=rng) * 2 - 1
    return contrast * noise + (1 - contrast) / 2


def made_up_boxes(n: int, rng: torch.Generator) -> Tensor:
    """Return n random boxes (n, 5) [class, x0, y0, x1, y1 in 0..1]."""
    label = torch.randint(len(BOX_NAMES), (n, 1), generator=rng)
    start = torch.rand(n, 2, generator=rng) * 0.5
    end = start + 0.1 + torch.rand(n, 2, generator=rng) * 0.4
    return torch.cat([label, start, end], dim=1)


def made_up_data(n: int = 8) -> ListDataset:
    """Return made-up items as a data set."""
    return ListDataset(
        made_up_items(n), label_names=LABEL_NAMES, box_names=BOX_NAMES, map_names=MAP_NAMES
    )


def alive(net: nn.Module, seed: int = 0) -> nn.Module:
    """Make every parameter random, none of them zero, so that each has an effect."""
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=rng)
    return net.eval().requires_grad_(False)


@functools.cache
def stage_one(f: int) -> Autoencoder | Pixels:
    """Return a stage one with random weights and the factor f, which is 4, or 1: pixels."""
    if f == 1:
        return Pixels()
    cfg = AEConfig(
        ch=8, ch_mult=(1, 1, 1), n_res=1, c_z=4, groups=4, side=32, attn_mid=False
    )
    return alive(Autoencoder(cfg))


def made_up_model(task: str, f: int = 4) -> LatentDiffusion:
    """Return a random model of a task, built as train_ldm.py builds it, for made-up items."""
    args = train_ldm.parse_args([*TINY_LDM, "--task", task, "--size", "32"])
    data = made_up_data()
    model = train_ldm.build(args, stage_one(f), data, data)
    alive(model.unet)
    if model.tau is not None:
        alive(model.tau, seed=1)
    return model
