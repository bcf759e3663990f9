"""Train tinyldm/shapesnet.pt, the weights of ShapesNet. It takes a minute on one core.

    python tests/shapesnet.py
"""
import torch
from torch import Tensor
from tqdm import tqdm

from tinyldm.data.shapes import Shapes
from tinyldm.metrics.features import KINDS, SHAPESNET, ShapesNet

BATCH = 64
STEPS = 1500
LEARNING_RATE = 3e-3
N_FOR_STD = 2048


def images(data: Shapes, first: int) -> Tensor:
    """The images of BATCH items, from item `first` on."""
    return torch.stack([data[i]["image"] for i in range(first, first + BATCH)])


def shares(data: Shapes, first: int) -> Tensor:
    """The share of each kind among the objects of these items, (BATCH, len(KINDS))."""
    rows = []
    for i in range(first, first + BATCH):
        things = data.scene(i)[0]
        kinds = [KINDS.index((t.colour, t.shape, t.size)) for t in things]
        rows.append(torch.eye(len(KINDS))[kinds].mean(0))
    return torch.stack(rows)


def train() -> ShapesNet:
    """Train with cross-entropy, each image once, then measure the std of features."""
    torch.manual_seed(0)
    net = ShapesNet()
    data = Shapes(STEPS * BATCH)
    optimiser = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, STEPS)

    bar = tqdm(range(STEPS), dynamic_ncols=True)
    for step in bar:
        x = images(data, step * BATCH)
        y = shares(data, step * BATCH)
        p = net(x)[1]
        loss = -(y * p.log()).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")

    with torch.no_grad():
        features = [net(images(data, first))[0] for first in range(0, N_FOR_STD, BATCH)]
        net.std = torch.cat(features).std(0)
    return net


if __name__ == "__main__":
    weights = {name: value.half() for name, value in train().state_dict().items()}
    torch.save(weights, SHAPESNET)
