"""Trains tinyldm/shapesnet.pt, the weights of ShapesNet: a minute on one core.

    python tests/shapesnet.py
"""
import torch
from tqdm import tqdm

from tinyldm.features import KINDS, SHAPESNET, ShapesNet
from tinyldm.shapes import Shapes

def train(steps: int = 1500, batch: int = 64) -> ShapesNet:
    """A minute on one core: pictures in, the share of each kind of object out."""
    torch.manual_seed(0)
    net, data = ShapesNet(), Shapes(steps * batch)
    opt = torch.optim.Adam(net.parameters())
    fall = torch.optim.lr_scheduler.OneCycleLR(opt, 3e-3, steps)
    for step in (bar := tqdm(range(steps), dynamic_ncols=True)):
        k = range(step * batch, step * batch + batch)
        x = torch.stack([data[i]["image"] for i in k])
        kinds = [[KINDS.index((t.colour, t.shape, t.size)) for t in data.scene(i)[0]] for i in k]
        y = torch.stack([torch.eye(len(KINDS))[of_one].mean(0) for of_one in kinds])
        loss = -(y * net(x)[1].log()).sum(1).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        fall.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        net.std = torch.cat([net(torch.stack([data[i]["image"] for i in range(k, k + batch)]))[0]
                             for k in range(0, 2048, batch)]).std(0)
    return net


if __name__ == "__main__":
    torch.save({k: v.half() for k, v in train().state_dict().items()}, SHAPESNET)
