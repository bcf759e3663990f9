"""What the programs show: png grids, a condition as a picture, the curves of a log.

Shapes:  images (n, 3, H, W) in [-1, 1]. Reads: degrade.py"""
import colorsys
import json
from pathlib import Path

import torch
from PIL import Image, ImageColor, ImageDraw
from torch import Tensor

from tinyldm.degrade import to_image, to_tensor

def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """One png, `columns` a row; each picture enlarged to at least 96 px."""
    k, gap = -(-96 // images.shape[-1]), 4
    h, w = (v * k + gap for v in images.shape[2:])
    sheet = Image.new("RGB", (columns * w + gap, -(-len(images) // columns) * h + gap), "white")
    for i, x in enumerate(images):
        tile = to_image(x).resize((w - gap, h - gap), Image.Resampling.NEAREST)
        sheet.paste(tile, (gap + i % columns * w, gap + i // columns * h))
    sheet.save(path)

def colour(k: int, names: tuple[str, ...]) -> tuple[int, ...]:
    """Of class k: that which its name begins with, as in "red circle", or one of many hues."""
    try:
        return ImageColor.getrgb(names[k].split()[0])[:3]
    except (ValueError, IndexError):
        return tuple(int(255 * v) for v in colorsys.hsv_to_rgb(k * .618 % 1, .7, .5 + k % 3 / 4))

def condition(task: str, item: dict, names: tuple[str, ...], h: int, w: int) -> Tensor | None:
    """What a spatial task was given, (3, h, w): map, boxes, small or masked picture; or None."""
    sheet = Image.new("RGB", (w, h), "gainsboro")
    if task == "semantic":
        y, out = item["segmentation"], to_tensor(sheet)
        for k in y.unique().tolist():
            if k > 0 or not names:                      # the built-in world's 0 is the ground
                out[:, y == k] = torch.tensor(colour(k - 1, names))[:, None] / 127.5 - 1
        return out
    if task == "layout":
        for k, *b in item["boxes"].tolist():
            corners = [v * s for v, s in zip(b, (w - 1, h - 1) * 2)]
            ImageDraw.Draw(sheet).rectangle(corners, outline=colour(int(k), names))
        return to_tensor(sheet)
    if task == "superres":
        return to_tensor(to_image(item["small"]).resize((w, h), Image.Resampling.NEAREST))
    return item["image"] * (1 - item["mask"]) - item["mask"] if task == "inpaint" else None

def save_drawn(images: Tensor, items: list[dict], task: str, names, path: Path, columns: int):
    """A grid of pictures, each row below the row of their conditions, where those can be seen."""
    seen = [condition(task, item, names, *images.shape[2:]) for item in items]
    if seen and seen[0] is not None:
        blank = torch.ones(-len(images) % columns, *images.shape[1:])
        rows = [torch.cat([v, blank]).unflatten(0, (-1, columns))
                for v in (torch.stack(seen), images)]
        images = torch.stack(rows, dim=1).flatten(0, 2)
    save_grid(images, path, columns)

def save_curves(log: Path, path: Path) -> None:
    """A log.jsonl's values by step, all loss_at_* in one plot, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    plots = {}
    for line in map(json.loads, log.read_text().splitlines()):
        for k, v in line.items():
            name, _, at = k.partition("_at_")
            plots.setdefault(name, {}).setdefault(at, []).append((line["step"], v))
    plots = [(k, v) for k, v in plots.items() if k not in ("step", "ms", "gb", "eta_min")]
    rows = -(-len(plots) // 4)
    figure = Figure((14, 2.4 * rows), layout="constrained")
    for i, (name, curves) in enumerate(plots, 1):
        scale = "log" if name in ("loss", "gnorm", "rec", "held_out_loss") else "linear"
        axes = figure.add_subplot(rows, 4, i, title=name, xlabel="step", yscale=scale)
        for at, curve in curves.items():
            axes.plot(*zip(*curve), "." if len(curve) == 1 else "-", label=at and f"t from {at}")
        if len(curves) > 1:
            axes.legend()
    figure.savefig(path)
