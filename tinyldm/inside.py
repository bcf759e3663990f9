"""Seeing inside while a model draws: where each word is looked at, and z_0 as predicted on the way.

Paper:   Sec. 3.3 (the softmax of cross-attention, Q from places, K from tokens); DDIM Eq. (9).
Shapes:  maps (B, M, h, w), each place's attention over tokens sums to 1.
Reads:   attention.py, diffusion.py, degrade.py. Networks do not know that they are watched."""
import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F

from tinyldm.attention import TransformerBlock
from tinyldm.degrade import to_image
from tinyldm.diffusion import predict_z_0

@contextlib.contextmanager
def attention_maps(unet: torch.nn.Module, n: int, h: int, w: int, calls: set[int] | None = None):
    """Yields a list that fills with one tensor (n, M, h, w) a layer and call of unet in `calls`
    (numbered from 0; None: all): cross-attention, the mean over heads, resized to the latent grid.
    n: the last n of the batch, which under guidance are those with the condition."""
    maps, seen = [], []
    def look(attn, args, output):
        if calls is None or len(seen) - 1 in calls:
            q, k = (v[-n:].unflatten(2, (attn.n_head, -1)).transpose(1, 2)
                    for v in (attn.to_q(args[0]), attn.to_k(args[1])))
            a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1).mT          # (n, M, N)
            rows = round((a.shape[2] * h / w) ** 0.5)
            maps.append(F.interpolate(a.unflatten(2, (rows, -1)).float(), (h, w), mode="bilinear"))
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(unet.register_forward_pre_hook(lambda *_: seen.append(1)))
        for attn in (m.cross_attn for m in unet.modules() if isinstance(m, TransformerBlock)):
            hooks.enter_context(attn.register_forward_hook(look))
        yield maps

def record(eps_theta: Callable, abar: torch.Tensor, kept: list) -> Callable:
    """eps_theta, which also appends the predicted z_0 of each call to `kept`."""
    def eps(z_t, t, ctx):
        e = eps_theta(z_t, t, ctx)
        kept.append(predict_z_0(z_t, e, abar[t[0]]))
        return e
    return eps

def save_attention(images: torch.Tensor, maps: torch.Tensor, encodings: list, path: Path) -> None:
    """A row a picture: the picture, then one tile a word, bright where it was looked at most.
    maps (n, M, h, w); encodings: the tokenizer's, of each prompt; pieces of a word are averaged."""
    side, head = 128, 16
    words = [sorted({*e.word_ids[:maps.shape[1]]} - {None}) for e in encodings]
    width, height = (1 + max(map(len, words))) * side, len(images) * (side + head)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for row, (x, a, e, of_row) in enumerate(zip(images, maps, encodings, words)):
        picture, y = to_image(x).resize((side, side), Image.Resampling.NEAREST), row * (side + head)
        sheet.paste(picture, (0, y + head))
        for column, i in enumerate(of_row, 1):
            pieces = [j for j, k in enumerate(e.word_ids[:len(a)]) if k == i]
            m = a[pieces].mean(0)
            m = (m - m.min()) / (m.max() - m.min() + 1e-8)
            light = Image.fromarray((255 * (.15 + .85 * m)).byte().cpu().numpy())
            tile = Image.composite(picture, Image.new("RGB", picture.size, "black"),
                                   light.resize((side, side), Image.Resampling.BICUBIC))
            sheet.paste(tile, (column * side, y + head))
            word = "".join(e.tokens[j].removeprefix("##").removesuffix("</w>") for j in pieces)
            pen.text((column * side + 4, y + 2), word, "black")
    sheet.save(path)
