"""Classifier guidance: a model, led to a class by a network that sees noise.

Papers:  Dhariwal and Nichol 2021, Sec. 4, Alg. 2; LDM Table 10 (LDM-8-G).
Symbols: p(y | z_t) the classifier; z_t (B, c_z, h, w) at any timestep t (B,); y labels
         (B,); w the scale of the guidance.

The classifier is trained beside the model, on latents with noise of every level:

    python train_ldm.py --task class --classifier --out out/classifier

Its gradient then leads an unconditional model to a class (gradient_guidance.py), or a model
of classes further to the one that it is asked for, as LDM-8-G. What changed against
classifier-free guidance: the model may know no labels, and none are dropped, but a second
network is trained, and its gradient costs as much as a step of it.
"""
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyldm.beyond.control import time_features, way_down, without_way_up
from tinyldm.diffusion import q_sample
from tinyldm.layers import zero_
from tinyldm.model import ModelConfig
from tinyldm.unet import UNetConfig


class Classifier(nn.Module):
    """The U-Net's way down, a mean over the places, and a linear layer.

    cfg: the shape of the U-Net; c_in channels of z_t, and c_out is the number of classes.
    It begins as all classes being equally likely.
    """

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        self.ckpt_grad = False
        self.unet = without_way_up(cfg)
        c = cfg.ch * cfg.ch_mult[-1]
        self.norm = nn.GroupNorm(cfg.groups, c, 1e-5)
        self.out = zero_(nn.Linear(c, cfg.c_out))

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Return the logits of p(y | z_t), (B, number of classes)."""
        self.unet.ckpt_grad = self.ckpt_grad
        emb = time_features(self.unet, z_t, t)
        _, h = way_down(self.unet, z_t, emb, None)
        h = F.silu(self.norm(h)).mean((2, 3))               # (B, c)
        return self.out(h)


def classifier_config(config: ModelConfig) -> ModelConfig:
    """Return the config of a classifier, from that of a class model of the same shape."""
    shape = dataclasses.replace(
        config.unet,
        c_out=config.tau["n_classes"] - 1,      # the last one is the null class
        d_ctx=None,
    )
    return dataclasses.replace(config, unet=shape, backbone="classifier")


def classifier_loss(
    net: Callable, z: Tensor, t: Tensor, eps: Tensor, abar: Tensor, label: Tensor
) -> Tensor:
    """Return -log p(label | z_t) of each sample, (B,)."""
    logits = net(q_sample(z, t, eps, abar), t.to(z.device)).float()
    return F.cross_entropy(logits, label.long(), reduction="none")


@torch.no_grad()
def accuracy_by_noise(
    net: nn.Module, z: Tensor, eps: Tensor, abar: Tensor, label: Tensor
) -> dict[str, float]:
    """Return the share of right classes in the middle of each quarter of the timesteps."""
    T = len(abar)
    figures = {}
    for quarter in range(4):
        t = torch.full((len(z),), (2 * quarter + 1) * T // 8)
        logits = net(q_sample(z, t, eps, abar), t.to(z.device))
        right = logits.argmax(1) == label
        figures[f"accuracy_at_{int(t[0])}"] = float(right.float().mean())
    return figures


def fits_class(net: nn.Module, label: Tensor) -> Callable:
    """Return log p(y | z_t) of labels (B,), for gradient_guided."""

    def log_p(z_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        logits = net(z_t, t.to(z_t.device)).float()
        return F.log_softmax(logits, dim=1).gather(1, label[:, None])[:, 0]

    return log_p
