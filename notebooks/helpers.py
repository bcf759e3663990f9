"""What the notebooks share: showing images and weights, training, and the measured runs."""
import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from tinyldm.data.images import load_rgb, to_image, to_tensor


def show_images(
    images: Sequence[Tensor], titles: Sequence[str] = (), columns: int = 8, heading: str = ""
) -> None:
    """Show images (3, H, W) in [-1, 1] in rows, each below its title if it has one."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = 1.7 if titles else 1.45
    figure, axes = plt.subplots(
        rows, columns, squeeze=False, figsize=(1.45 * columns, height * rows), layout="constrained"
    )
    for ax in axes.flat:
        ax.axis("off")
    for ax, x in zip(axes.flat, images):
        ax.imshow(to_image(x))
    for ax, title in zip(axes.flat, titles):
        ax.set_title(title, fontsize=8)
    figure.suptitle(heading, fontsize=10)
    plt.show()


def jpeg(images: Tensor, quality: int) -> tuple[Tensor, float]:
    """Return images (n, 3, H, W) after JPEG, and their mean number of bytes.

    The tables at the head of a file, which a blank image has too, are not counted.
    """
    def encode(x: Tensor) -> bytes:
        file = io.BytesIO()
        to_image(x).save(file, "JPEG", quality=quality, optimize=True)
        return file.getvalue()

    files = [encode(x) for x in images]
    blank = len(encode(torch.ones_like(images[0])))
    decoded = [to_tensor(load_rgb(file)) for file in files]
    return torch.stack(decoded), sum(len(file) - blank for file in files) / len(files)


def tile(images: Tensor, columns: int) -> Tensor:
    """Join images (n, 3, H, W) into one (3, rows H, columns W); columns must divide n."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    return torch.cat(rows, dim=1)


def plot_by_token(weights: Tensor, tokens: Sequence[str], title: str) -> None:
    """Plot rows of weights (n_head, M) as bars, one group per token."""
    n_head = len(weights)
    plt.figure(figsize=(9, 2.6))
    for head, heights in enumerate(weights):
        places = torch.arange(len(tokens)) + head / (n_head + 1)
        width = 1 / (n_head + 1)
        plt.bar(places.tolist(), heights.tolist(), width, label=f"head {head}")
    plt.xticks(range(len(tokens)), tokens, rotation=45)
    plt.title(title)
    plt.legend()
    plt.show()


def recording(eps_theta: Callable, path: list[Tensor]) -> Callable:
    """Return eps_theta, which also appends the z_t of each call to `path`."""
    def recording_eps_theta(z_t: Tensor, t: Tensor, ctx: tuple) -> Tensor:
        path.append(z_t)
        return eps_theta(z_t, t, ctx)

    return recording_eps_theta


def train(program: str, flags: str) -> list[dict]:
    """Run "train_ae" or "train_ldm" as the command line does, silently; return its log's rows."""
    root = str(Path(__file__).parent.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    module = importlib.import_module(program)
    args = module.parse_args(flags.split())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module.main(args)
    return read_rows(args.out / "log.jsonl")


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def measured(run: str) -> list[dict]:
    """Return the rows of measured.jsonl whose run has a name that begins like this."""
    rows = read_rows(Path(__file__).with_name("measured.jsonl"))
    return [row for row in rows if row["run"].startswith(run)]
