"""The tasks of the paper: which fields of an item are the condition y, and how y becomes ctx.

Paper:   Sec. 3.3 and 4.3-4.5, Table 15. Two ports: tokens (B, M, D) that the U-Net attends to
         (class, text, layout), and maps (B, c, h, w) beside z_t (semantic, superres, inpaint).
Symbols: y (B, ...), one condition a picture; null the condition that says nothing, for guidance.
Reads:   conditioning.py, tokens.py. A new task is a row of TASKS and what it names."""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tinyldm import require
from tinyldm.conditioning import ClassEmbedder, SpatialRescaler, TextConfig, TextTransformer
from tinyldm.tokens import encode, train_tokenizer

# ---- what the flags leave open and the data set decides
def fit_text(args, data, *_):
    """-> the tokenizer of the set's captions."""
    tokenizer = train_tokenizer(data.captions(), args.vocab_size or 8192)
    args.vocab_size = tokenizer.get_vocab_size()
    return tokenizer

def fit_class(args, data, *_) -> None:
    """One class more than the set has: the null one. Raises BadInput."""
    args.n_classes = args.n_classes or len(data.labels) + 1
    k, n = args.n_classes, len(data.labels)
    require(k > n, f"--n-classes {k}: there are {n}, and the null class")

def fit_layout(args, data, *_) -> None:
    """A grid of 32 x 32 places unless --vocab-size says otherwise. Raises BadInput."""
    args.vocab_size = args.vocab_size or 32 * 32 + 1
    require((args.n_token or 0) >= 3, f"--n-token {args.n_token}: a box takes three")
    k, n = args.vocab_size, len(data.classes)
    require(k > n, f"--vocab-size {k}: there are {n} classes, and a token for none")

def fit_semantic(args, *sets) -> None:
    """As many classes as the largest label of the sets asks for; looks at all their maps."""
    args.n_classes = args.n_classes or 1 + max(
        int(data[i]["segmentation"].max()) for data in sets for i in range(len(data)))

# ---- from a batch of items to y
def class_y(batch: dict, tau: ClassEmbedder, tokenizer) -> Tensor:
    """labels, or None for the last class, the null one -> (B,)."""
    null = tau.embedding.num_embeddings - 1
    return torch.tensor([null if v is None else v for v in batch["label"]])

def text_y(batch: dict, tau: TextTransformer, tokenizer) -> Tensor:
    """captions -> token ids (B, M); the empty one is M times [PAD]."""
    return encode(tokenizer, batch["caption"], tau.cfg.n_token)

def layout_y(batch: dict, tau: TextTransformer, tokenizer) -> Tensor:
    """boxes (K, 5) [class, x0, y0, x1, y1 in 0..1] -> token ids (B, M), the largest boxes first.
    Three tokens a box: class, two corners as places of a grid, row by row; the last id is none.
    NB: as in taming's objects_bbox.py classes and places share numbers; order tells which."""
    none, M = tau.cfg.n_vocab - 1, tau.cfg.n_token
    side = math.isqrt(none)
    y = torch.full((len(batch["boxes"]), M), none)
    for row, b in zip(y, batch["boxes"]):
        area = (b[:, 3:] - b[:, 1:3]).prod(1)
        b = b[area.argsort(descending=True, stable=True)][:M // 3]
        x0, y0, x1, y1 = (b[:, 1:] * (side - 1)).round().long().unbind(1)
        ids = torch.stack([b[:, 0].long(), y0 * side + x0, y1 * side + x1], dim=1)
        row[:ids.numel()] = ids.flatten()
    return y

def semantic_y(batch: dict, tau: SpatialRescaler, tokenizer) -> Tensor:
    """Label maps -> (B, H, W) int32. Raises BadInput for a label that the model has not."""
    y, n = torch.stack(batch["segmentation"]), tau.conv.in_channels
    low, high = y.aminmax()
    require(-1 <= low and high < n,
            f"label maps: there are labels {low}..{high}, but the model's are 0..{n - 1}")
    return y.int()

def inpaint_y(batch: dict, tau, tokenizer) -> Tensor:
    """Pictures, grey (0) where their mask is 1, and that mask -> (B, 4, H, W)."""
    image, hole = torch.stack(list(batch["image"])), torch.stack(batch["mask"])
    return torch.cat([image * (1 - hole), hole], dim=1)

# ---- from y to ctx
def superres_ctx(y: Tensor, tau, ae) -> Tensor:
    """The picture of a quarter of the side, on the latents' grid: as it is where f = 4."""
    f = ae.cfg.f
    return y if f == 4 else interpolate(y, scale_factor=4 / f, mode="bicubic", antialias=f > 4)

@torch.no_grad()
def inpaint_ctx(y: Tensor, tau, ae) -> Tensor:
    """Latents of the masked picture, and the mask: 1 in holes, -1 elsewhere; (B, c_z + 1, h, w)."""
    z = ae.encode(y[:, :3]).mean
    return torch.cat([z, 2 * interpolate(y[:, 3:], z.shape[2:]) - 1], dim=1)

class Task(NamedTuple):
    """A kind of condition. A batch has a list, or a tensor, of each field of its items."""
    fields: tuple[str, ...]         # of an item of the data set, which y is made of
    y: Callable                     # (batch, tau, tokenizer) -> y (B, ...)
    null: dict                      # the batch whose y, stretched, is the null condition
    ctx: Callable = lambda y, tau, ae: tau(y)
    net: Callable | None = None     # tau(**shape); None: nothing to learn
    shape: Callable = lambda row, f: {}     # (row of flags, f) -> what shapes tau
    fit: Callable | None = None     # (flags, *sets) -> tokenizer or None; fills in flags
    beside: Callable | None = None  # c_z -> channels that lie beside z_t
    s: float = 1.0                  # guidance scale to sample with, unless a flag says otherwise
    takes: tuple[str, ...] = ()     # flags of sample.py that say the condition

FLAGS = dict(n_vocab="vocab_size", n_token="n_token", d="d_ctx", depth="text_depth",
             n_head="text_heads", d_head="text_d_head", clip="text_clip")      # of TextConfig
TEXT = dict(net=lambda **shape: TextTransformer(TextConfig(**shape)), s=2.0,
            shape=lambda row, f: {k: row[flag] for k, flag in FLAGS.items()})
BLANK, ALL, PROMPTS = torch.zeros(3, 1, 1), torch.ones(1, 1, 1), ("prompt", "prompts")
TASKS = {
    "uncond": Task((), lambda batch, *_: torch.zeros(len(batch["image"])), {"image": [None]},
                 lambda *_: None),
    "class": Task(("label",), class_y, {"label": [None]}, net=ClassEmbedder, fit=fit_class, s=2.0,
                  shape=lambda row, f: dict(n_classes=row["n_classes"], d=row["d_ctx"]),
                  takes=(*PROMPTS, "label")),
    "text": Task(("caption",), text_y, {"caption": [""]}, fit=fit_text, **TEXT, takes=PROMPTS),
    "layout": Task(("boxes",), layout_y, {"boxes": [torch.zeros(0, 5)]}, fit=fit_layout, **TEXT,
                   takes=("boxes",)),
    "semantic": Task(
        ("segmentation",), semantic_y, {"segmentation": [-torch.ones(1, 1)]}, net=SpatialRescaler,
        fit=fit_semantic, beside=lambda c_z: 3, s=1.5, takes=("map",),
        shape=lambda row, f: dict(c_in=row["n_classes"], c_out=3, n=int(math.log2(f)))),
    "superres": Task(("small",), lambda batch, *_: torch.stack(batch["small"]), {"small": [BLANK]},
                     superres_ctx, beside=lambda c_z: 3, takes=("image",)),
    "inpaint": Task(("image", "mask"), inpaint_y, {"image": [BLANK], "mask": [ALL]}, inpaint_ctx,
                    beside=lambda c_z: c_z + 1)}

def build_tau(task: str, shape: dict) -> nn.Module | None:
    """tau of a shape, as Task.shape or a checkpoint says it; None where nothing is learned."""
    return TASKS[task].net(**shape) if TASKS[task].net else None
