"""ControlNet: a text model that is there already learns to follow edges, too.

Paper:   Zhang et al. 2023, Sec. 3.1 and 3.2, Fig. 3.
Symbols: z_t (B, c, h, w); tokens (B, M, d_ctx); beside (B, HINT, h, w), here the edges of
         an image; kept the outputs that a U-Net keeps for its way up.

What changed against the U-Net: a copy of its way down sees z_t with the edges added, and
what comes out is added to what the U-Net itself has kept. All of that passes through
convolutions that are zero at first, so the model begins as the one that it was. The U-Net
and tau are frozen: what they know stays whole, however few images there are.

The task beside it, TextEdges, is one like all others. Any model can be trained for it from
nothing, with the edges concatenated to z_t.
"""
import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinyldm.conditioning import Context
from tinyldm.data.images import LANCZOS, fit_image, to_tensor
from tinyldm.errors import require
from tinyldm.layers import timestep_embedding, zero_
from tinyldm.model import LatentDiffusion
from tinyldm.tasks import Task, Text
from tinyldm.unet import UNet, UNetConfig, check_tokens

STRONG = 0.3            # change per pixel, in [-1, 1], that is an edge: a step of 0.6
CELLS = 4               # each place of the latent grid has 4 x 4 cells of edges
HINT = CELLS ** 2       # so many channels lie beside z_t

# ---- edges


def edges(x: Tensor) -> Tensor:
    """Return where the colour of images x (B, C, H, W) changes: (B, 1, H, W), 0 or 1.

    An edge is where the gradient, by central differences, of any channel is STRONG.
    """
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    dx = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    dy = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    gradient = (dx ** 2 + dy ** 2).sqrt().amax(1, keepdim=True)
    return (gradient > STRONG).to(torch.uint8)


def on_latent_grid(edge_map: Tensor, h: int, w: int) -> Tensor:
    """Return edges (B, 1, H, W) as the share of each of 4 x 4 cells per place, (B, 16, h, w)."""
    cells = F.adaptive_avg_pool2d(edge_map.float(), (CELLS * h, CELLS * w))
    return F.pixel_unshuffle(cells, CELLS)


class TextEdges(Text):
    """A caption, and the edges of an image: what the caption says, in these outlines.

    It uses both ports: the caption has no place in the image, the edges do. The null condition
    is the empty caption with the edges as they are, so guidance exaggerates the caption alone.
    """

    fields = ("caption", "image")
    flags = ("prompt", "prompts", "negative", "to_prompt", "image")
    examples = Task.examples

    @staticmethod
    def beside_channels(c_z: int, c_x: int) -> int:
        return HINT

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """A batch may have captions alone."""
        y = super().encode(batch)                               # caption (B, M)
        if "image" in batch:
            y["edges"] = edges(torch.stack(list(batch["image"])))       # (B, 1, H, W)
        return y

    def context(self, y: dict[str, Tensor], tau: nn.Module, ae: nn.Module) -> Context:
        tokens = tau(y["caption"])                              # (B, M, D)
        h, w = (side // ae.cfg.f for side in y["edges"].shape[2:])
        hint = on_latent_grid(y["edges"], h, w)
        return Context(tokens, hint.to(tokens.dtype))           # (B, HINT, h, w)

    def read(
        self, given: dict[str, Any], size: tuple[int, int], multiple: int
    ) -> tuple[list[dict] | None, tuple[int, int]]:
        """Prompts, all with the edges of one image; by default, held-out items."""
        if "image" not in given:
            require(
                not given.get("prompts"),
                "this model follows the edges of an image; give an image, too",
            )
            return None, size
        h, w = size
        image = to_tensor(fit_image(given["image"], (w, h), LANCZOS, "image"))
        conditions, _ = super().read(given, size, multiple)
        return [condition | {"image": image} for condition in conditions], size

    def show(self, item: dict, h: int, w: int) -> Tensor:
        return (2.0 * edges(item["image"][None])[0] - 1).expand(3, -1, -1)

    def score(self, images: Tensor, items: list[dict], unit: float | None = None) -> dict:
        """How many captions are followed, and how far the edges of all images are those given."""
        wanted = edges(torch.stack([item["image"] for item in items]))
        return super().score(images, items, unit) | {
            "edges_followed": agreement(edges(images), wanted)
        }


def agreement(found: Tensor, wanted: Tensor) -> float:
    """Return the F1 of the pixels of edges (B, 1, H, W): 1 if they are the same.

    NB: a caption alone says roughly where things are, so it is above 0 without a branch.
    """
    n_both = (found * wanted).sum()
    n_each = found.sum() + wanted.sum()
    return float(2 * n_both / n_each) if n_each > 0 else 1.0


# ---- the network

class ControlNet(nn.Module):
    """A U-Net with a branch for a hint, called as a U-Net is. Without `beside` it is the U-Net.

    `base` is the U-Net. The branch is a copy of its way down, `hint` before it and `zero`,
    a convolution for each output that is kept, behind it.
    """

    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        self.ckpt_grad = False
        self.base = UNet(dataclasses.replace(cfg, c_in=cfg.c_out))
        self.copy = without_way_up(self.base.cfg)

        n_hint = cfg.c_in - cfg.c_out
        self.hint = None
        if n_hint:
            self.hint = nn.Sequential(
                nn.Conv2d(n_hint, cfg.ch, 3, padding=1),
                nn.SiLU(),
                zero_(nn.Conv2d(cfg.ch, cfg.ch, 3, padding=1)),
            )
        self.zero = nn.ModuleList()
        for c in kept_channels(cfg):
            self.zero.append(zero_(nn.Conv2d(c, c, 1)))

    def forward(
        self,
        z_t: Tensor,
        t: Tensor,
        tokens: Tensor | None = None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction, (B, c_out, h, w). Raises ValueError as the U-Net does."""
        check_tokens(self.cfg.d_ctx, tokens)
        self.base.ckpt_grad = self.ckpt_grad
        self.copy.ckpt_grad = self.ckpt_grad

        emb = time_features(self.base, z_t, t)
        kept, h = way_down(self.base, z_t, emb, tokens)
        if beside is not None:
            emb_of_copy = time_features(self.copy, z_t, t)
            hint = self.hint(beside)
            added, h_added = way_down(self.copy, z_t, emb_of_copy, tokens, hint)
            outputs = [*added, h_added]
            corrections = [conv(x) for conv, x in zip(self.zero, outputs)]
            h = h + corrections.pop()
            kept = [x + correction for x, correction in zip(kept, corrections)]

        # The way up, as in the U-Net.
        for stage in self.base.up:
            h = torch.cat([h, kept.pop()], dim=1)
            h = self.base.run(stage, h, emb, tokens)
        return self.base.conv_out(F.silu(self.base.norm_out(h)))


def without_way_up(cfg: UNetConfig) -> UNet:
    """Return a U-Net that has only what way_down needs."""
    net = UNet(cfg)
    for part in ("up", "norm_out", "conv_out"):
        delattr(net, part)
    return net


def way_down(
    net: UNet, z_t: Tensor, emb: Tensor, tokens: Tensor | None, hint: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Return all outputs that a U-Net keeps on its way down, and the one of its middle.

    emb (B, 4 ch) is time_features'. hint (B, ch, h, w) is added to what its first
    convolution makes of z_t.
    """
    kept = []
    h = z_t
    for stage in net.down:
        h = net.run(stage, h, emb, tokens)
        if hint is not None and not kept:
            h = h + hint
        kept.append(h)
    return kept, net.run(net.middle, h, emb, tokens)


def time_features(net: UNet, z_t: Tensor, t: Tensor) -> Tensor:
    """Return what a U-Net makes of the timestep, (B, 4 ch)."""
    return net.time(timestep_embedding(t, net.cfg.ch).to(z_t.dtype))


def kept_channels(cfg: UNetConfig) -> list[int]:
    """Return the channels of each output of way_down, the middle's last."""
    channels = [cfg.ch]
    for level, mult in enumerate(cfg.ch_mult):
        if level > 0:
            channels.append(channels[-1])               # of the downsampling
        channels += [cfg.ch * mult] * cfg.n_res
    return [*channels, channels[-1]]


# ---- from a text model

def with_control(model: LatentDiffusion) -> LatentDiffusion:
    """Return a text model with an untrained branch for edges. It samples as it did before.

    Raises BadInput for a model of another task, or one that is no U-Net.
    """
    config = model.config
    require(config.backbone != "control", "it has a branch already; no other is added")
    require(
        type(model.task) is Text and config.backbone == "unet",
        f"a branch for edges needs a U-Net that learned captions; this is a {config.backbone} of "
        f"the task {config.task}",
    )
    shape = dataclasses.replace(config.unet, c_in=config.unet.c_out + HINT)
    net = ControlNet(shape)
    net.base.load_state_dict(model.unet.state_dict())
    of_copy = {k: v for k, v in model.unet.state_dict().items() if k in net.copy.state_dict()}
    net.copy.load_state_dict(of_copy)

    controlled = copy.copy(model)
    controlled.config = dataclasses.replace(
        config, task="text-edges", unet=shape, backbone="control"
    )
    controlled.unet = net
    controlled.task = TextEdges(model.task.tau, model.task.tokenizer, model.task.class_names)
    return controlled


def frozen_parts(model: LatentDiffusion) -> list[nn.Module]:
    """Return what of a model is never trained: of one with a branch, the text model it was."""
    is_controlled = model.config.backbone == "control"
    return [model.unet.base, model.tau] if is_controlled else []
