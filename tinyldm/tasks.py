"""The tasks of the paper: one class per task, with everything that is particular to it.

Paper:   Sec. 3.3 and 4.3-4.5, Table 15.
Symbols: y the condition of a batch, a dict of tensors (B, ...); ctx = tau(y), a Context.

A condition reaches the U-Net by one of two ports, or by both:
- tokens (B, M, D), which the U-Net attends to: class, text, layout. Why: they have no place
  in the image, or not a fixed one, so each place must look for what concerns it.
- maps beside z_t (B, c, h, w): semantic, superres, inpaint. Why: they are aligned with the
  image, place by place, so a convolution sees at once what belongs together.
By both comes text-inpaint.

A new task is one class and one row of TASKS; the tests run over that table.
"""
import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from tinyldm.conditioning import (
    ClassEmbedder,
    Context,
    SpatialRescaler,
    TextConfig,
    TextTransformer,
)
from tinyldm.data import scorer, shapes
from tinyldm.data.dataset import ImageDataset, spread
from tinyldm.data.images import NEAREST, fit_image, map_to_tensor, to_tensor
from tinyldm.data.rows import LARGEST_SHARE
from tinyldm.data.tokenizer import encode, train_tokenizer
from tinyldm.errors import require, trying
from tinyldm.show.grids import show_boxes, show_label_map, show_masked, show_small


class Task:
    """A kind of condition. This base class is the unconditional case: there is none.

    A task object belongs to one model, whose tokenizer and class names it has. Its `tau` is the
    shape of the condition encoder (keyword arguments of build_tau); the network itself is given
    to `context`.
    """

    # Fields of a data set's items that y is made of.
    fields: tuple[str, ...] = ()
    # The guidance scale s to sample with, unless the user gives one.
    guidance_scale = 1.0
    # True if the U-Net attends to tokens of width d_ctx.
    attends = False
    # The share of training masks that hide all of their image.
    share_hidden = 0.0
    # The sides of training images must be multiples of it.
    size_multiple = 1
    # Flags of sample.py that give the condition.
    flags: tuple[str, ...] = ()
    # True if score() works for any images, False if for those of the built-in world only.
    scores_any_world = False
    # A higher one says that `encode` now means something else: latent caches and checkpoints of
    # an earlier one do not fit.
    version = 1

    def __init__(
        self, tau: dict, tokenizer: Tokenizer | None = None, class_names: Sequence[str] = ()
    ):
        self.tau = tau
        self.tokenizer = tokenizer
        self.class_names = tuple(class_names)

    # ---- what shapes the model

    @staticmethod
    def beside_channels(c_z: int, c_x: int) -> int:
        """Return how many channels lie beside the c_z of z_t; images have c_x channels."""
        return 0

    @staticmethod
    def decide(values: dict, train: ImageDataset, held_out: ImageDataset) -> dict:
        """Return the hyperparameters that the data set decides, unless `values` has them.

        Raises BadInput for values that the data set does not fit.
        """
        return {}

    @staticmethod
    def tau_shape(values: dict, f: int) -> dict:
        """Return what shapes tau, from flags or a preset's row, and stage one's factor f."""
        return {}

    @staticmethod
    def build_tau(shape: dict) -> nn.Module | None:
        """Return tau, untrained; None where there is nothing to learn."""
        return None

    @staticmethod
    def names_in(data: ImageDataset) -> Sequence[str]:
        """Return the names of the classes that the condition speaks of."""
        return data.box_names

    # ---- from items to y and ctx

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Return y of a batch, which has a list (or a tensor) of each of the fields."""
        return {}

    def null(self) -> dict[str, Tensor]:
        """Return the y (1, ...) that says nothing: for guidance, and for dropped conditions.

        What it does not name stays as it is in y. Such a part is never left out in training, and
        guidance does not exaggerate it.
        """
        return {}

    def context(self, y: dict[str, Tensor], tau: nn.Module | None, ae: nn.Module) -> Context:
        """Return ctx = tau(y), by the ports that this task uses."""
        return Context()

    # ---- for people

    def read_prompt(self, prompt: str) -> dict:
        """Return what a prompt says, by field, for a task with the flag `prompt`.

        Raises BadInput for what says nothing to this model.
        """
        raise NotImplementedError

    def read(
        self, given: dict[str, Any], size: tuple[int, int], multiple: int
    ) -> tuple[list[dict] | None, tuple[int, int]]:
        """Return the conditions in what a user gives to sample.py, and the size (H, W).

        given: by flag, what the files hold: prompts, label (lists of str), boxes (JSON), map,
        image, mask (images). multiple: the sides of a sampled image must be multiples of it.
        No conditions (None) means: take those of a data set's held-out items. This base class
        returns None, or one empty condition if the task has no fields.
        Raises BadInput for what is no condition of this model.
        """
        conditions = None if self.fields else [{}]
        return conditions, size

    def examples(self, n: int, train: ImageDataset, held_out: ImageDataset) -> list[dict]:
        """Return n items whose conditions show how training goes on; held out, if any are."""
        data = held_out if len(held_out) else train
        return [data[k] for k in spread(n, len(data))]

    def show(self, item: dict, h: int, w: int) -> Tensor | None:
        """Return the condition as an image (3, h, w) to show above its sample, if it is one."""
        return None

    def score(self, images: Tensor, items: list[dict], unit: float | None = None) -> dict:
        """Return how well images (n, 3, H, W) of the built-in world follow their conditions.

        unit: pixels per unit of that world; default: the shorter side is 32 units.
        """
        return scorer.well_formed_score(images, items, unit)

    def check_data(self, data: ImageDataset, path: str) -> None:
        """Raise BadInput if a data set's conditions mean something else than the model's."""

    def check_scorable(self, items: Sequence[dict]) -> None:
        """Raise BadInput for a condition that the scorer does not understand."""

    def known_names(self, found: Sequence[str], has_null: bool) -> Sequence[str]:
        """Return the names of the classes that the model has, in the order of their numbers.

        found: the names of the classes of a data set. has_null: whether the model has learned
        the null condition. Where a model has no names, its classes are called by their numbers.
        """
        return self.class_names

    def add_classes(self, names: Sequence[str], tau: nn.Module | None, has_null: bool) -> None:
        """Give the model classes of these names, beside those of known_names.

        Raises BadInput if there is no room for them.
        """

    def class_number(self, name: str, n: int) -> int:
        """Return the number, in 0..n-1, of a class given by name or number, or raise BadInput."""
        numbers = {str(i): i for i in range(n)}
        numbers |= {known: i for i, known in enumerate(self.class_names)}
        examples = ", ".join(self.class_names[:3])
        or_names = f", or a name, like {examples}" if examples else ""
        require(
            name in numbers,
            f"{name!r:.99} is no class of this model; classes are numbers, 0..{n - 1}{or_names}",
        )
        return numbers[name]


class Unconditional(Task):
    """No condition: the model samples from the whole distribution of the images (Sec. 4.2)."""


class Class(Task):
    """A class label as a single token (Sec. 4.3.1).

    The last class is the null condition, which no item has.
    """

    fields = ("label",)
    guidance_scale = 2.0
    attends = True
    flags = ("prompt", "prompts", "label", "negative", "to_prompt")

    @staticmethod
    def decide(values: dict, train: ImageDataset, held_out: ImageDataset) -> dict:
        """The number of classes is the data set's, and one for the null condition."""
        found = len(train.label_names)
        n_classes = values["n_classes"] or found + 1
        require(
            n_classes > found,
            f"n_classes = {n_classes}: the data set has {found}, and the null class comes on top",
        )
        return {"n_classes": n_classes}

    @staticmethod
    def tau_shape(values: dict, f: int) -> dict:
        return {"n_classes": values["n_classes"], "d": values["d_ctx"]}

    @staticmethod
    def build_tau(shape: dict) -> ClassEmbedder:
        return ClassEmbedder(**shape)

    @staticmethod
    def names_in(data: ImageDataset) -> Sequence[str]:
        return data.label_names

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"label": torch.tensor(list(batch["label"]))}            # (B,)

    def null(self) -> dict[str, Tensor]:
        return self.encode({"label": [self.tau["n_classes"] - 1]})

    def context(self, y: dict[str, Tensor], tau: nn.Module, ae: nn.Module) -> Context:
        return Context(tokens=tau(y["label"]))                          # (B, 1, D)

    def read(
        self, given: dict[str, Any], size: tuple[int, int], multiple: int
    ) -> tuple[list[dict] | None, tuple[int, int]]:
        """Classes by name or number; by default, every class that training has seen."""
        names = given.get("prompts", []) + given.get("label", [])
        if names:
            return [self.read_prompt(name) for name in names], size
        is_built_in = self.class_names == tuple(shapes.CLASSES)
        numbers = shapes.SEEN if is_built_in else range(len(self.class_names))
        return [{"label": number} for number in numbers], size

    def read_prompt(self, prompt: str) -> dict:
        return {"label": self.class_number(prompt, self.tau["n_classes"])}

    def examples(self, n: int, train: ImageDataset, held_out: ImageDataset) -> list[dict]:
        labels = train.seen_labels()
        return [{"label": labels[i % len(labels)]} for i in range(n)]

    def known_names(self, found: Sequence[str], has_null: bool) -> Sequence[str]:
        n = self.tau["n_classes"] - 1 if has_null else self.tau["n_classes"]
        return self.class_names or tuple(str(i) for i in range(n))

    def add_classes(
        self, names: Sequence[str], tau: ClassEmbedder, has_null: bool
    ) -> None:
        """Each new class is a new row of the embedding, before the null class's.

        Why it begins as the mean of the old rows: the U-Net has learned to read these.
        """
        known = self.known_names((), has_null)
        rows = tau.embedding.weight.detach()
        mean = rows.mean(0, keepdim=True)
        null = rows[-1:] if len(rows) > len(known) else mean
        rows = torch.cat([rows[:len(known)], mean.expand(len(names), -1), null])

        tau.embedding = nn.Embedding.from_pretrained(rows, freeze=False)
        self.class_names = (*known, *names)
        self.tau = self.tau | {"n_classes": len(rows)}

    def score(self, images: Tensor, items: list[dict], unit: float | None = None) -> dict:
        return scorer.class_score(images, items, unit)


class Text(Task):
    """A caption as tokens, through a transformer (Sec. 4.3.1, App. E.2.1)."""

    fields = ("caption",)
    guidance_scale = 2.0
    attends = True
    flags = ("prompt", "prompts", "negative", "to_prompt")

    @staticmethod
    def decide(values: dict, train: ImageDataset, held_out: ImageDataset) -> dict:
        """The vocabulary is learned from the captions of the training set."""
        tokenizer = train_tokenizer(train.captions(), values["vocab_size"] or 8192)
        return {"vocab_size": tokenizer.get_vocab_size(), "tokenizer": tokenizer.to_str()}

    @staticmethod
    def tau_shape(values: dict, f: int) -> dict:
        config = TextConfig(
            n_vocab=values["vocab_size"],
            n_token=values["n_token"],
            d=values["d_ctx"],
            depth=values["text_depth"],
            n_head=values["text_heads"],
            d_head=values["text_d_head"],
            clip=values["text_clip"],
        )
        return dataclasses.asdict(config)

    @staticmethod
    def build_tau(shape: dict) -> TextTransformer:
        return TextTransformer(TextConfig(**shape))

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        ids = encode(self.tokenizer, batch["caption"], self.tau["n_token"])
        return {"caption": ids}                                         # (B, M)

    def null(self) -> dict[str, Tensor]:
        """The empty caption."""
        return self.encode({"caption": [""]})

    def context(self, y: dict[str, Tensor], tau: nn.Module, ae: nn.Module) -> Context:
        return Context(tokens=tau(y["caption"]))                        # (B, M, D)

    def read(
        self, given: dict[str, Any], size: tuple[int, int], multiple: int
    ) -> tuple[list[dict] | None, tuple[int, int]]:
        return [self.read_prompt(prompt) for prompt in given.get("prompts", [])], size

    def read_prompt(self, prompt: str) -> dict:
        return {"caption": prompt}

    def examples(self, n: int, train: ImageDataset, held_out: ImageDataset) -> list[dict]:
        prompts = held_out.prompts(n)
        if prompts is None:
            return super().examples(n, train, held_out)
        return [{"caption": prompt} for prompt in prompts]

    def check_scorable(self, items: Sequence[dict]) -> None:
        for item in items:
            scorer.parse_prompt(item["caption"])

    def score(self, images: Tensor, items: list[dict], unit: float | None = None) -> dict:
        return scorer.text_score(images, items, unit)


class Layout(Task):
    """Bounding boxes as tokens, three per box: class, top left, bottom right (Sec. 4.3.2).

    A corner is a cell of a grid over the image, numbered row by row. The largest boxes come
    first; the last token of the vocabulary means "no box" and fills the rest. Where two tokens
    are left over, as in the 92 of the released model, they are the corners of the crop that the
    image is of a larger one. Why tokens: boxes overlap and vary in number, which no map of fixed
    depth can hold.

    NB: as in taming-transformers' objects_bbox.py, classes and cells share their numbers; the
    position in the sequence tells them apart. Its training crops images at random and shuffles
    the boxes; here an image is always whole, so its corners are the first and the last cell.
    """

    fields = ("boxes",)
    guidance_scale = 2.0
    attends = True
    flags = ("boxes",)

    @staticmethod
    def decide(values: dict, train: ImageDataset, held_out: ImageDataset) -> dict:
        """The grid has 32 x 32 cells unless vocab_size says otherwise."""
        n_vocab = values["vocab_size"] or 32 * 32 + 1
        n_token = values["n_token"] or 0
        found = len(train.box_names)
        require(n_token >= 3, f"n_token = {n_token}: a box takes three tokens")
        require(
            n_vocab > found,
            f"vocab_size = {n_vocab}: there are {found} classes, and a token for no box",
        )
        return {"vocab_size": n_vocab}

    tau_shape = Text.tau_shape
    build_tau = Text.build_tau

    @property
    def has_crop(self) -> bool:
        """True if the last two tokens are the corners of the crop."""
        return self.tau["n_token"] % 3 == 2

    @property
    def version(self) -> int:
        """In version 1, no crop had corners: these tokens were "no box"."""
        return 2 if self.has_crop else 1

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """boxes (K, 5) [class, x0, y0, x1, y1 in 0..1] of each item -> ids (B, M)."""
        return {"boxes": torch.stack([self._tokens(boxes) for boxes in batch["boxes"]])}

    def _tokens(self, boxes: Tensor) -> Tensor:
        """One item's boxes (K, 5) -> ids (M,)."""
        n_token = self.tau["n_token"]
        no_box = self.tau["n_vocab"] - 1
        side = math.isqrt(no_box)                       # cells along a side of the grid

        area = (boxes[:, 3:] - boxes[:, 1:3]).prod(1)
        largest_first = area.argsort(descending=True, stable=True)
        boxes = boxes[largest_first][:n_token // 3]

        label = boxes[:, 0].long()
        x0, y0, x1, y1 = (boxes[:, 1:] * (side - 1)).round().long().unbind(1)
        ids = torch.stack([label, y0 * side + x0, y1 * side + x1], dim=1).flatten()
        ids = pad(ids, (0, n_token - len(ids)), value=no_box)
        if self.has_crop:
            ids[-2:] = torch.tensor([0, side * side - 1])
        return ids

    def null(self) -> dict[str, Tensor]:
        """No boxes at all."""
        return self.encode({"boxes": [torch.zeros(0, 5)]})

    def context(self, y: dict[str, Tensor], tau: nn.Module, ae: nn.Module) -> Context:
        return Context(tokens=tau(y["boxes"]))                          # (B, M, D)

    def read(
        self, given: dict[str, Any], size: tuple[int, int], multiple: int
    ) -> tuple[list[dict] | None, tuple[int, int]]:
        """Boxes [[class, x0, y0, x1, y1 in pixels], ...]; the class is a name or a number."""
        if "boxes" not in given:
            return None, size
        rows = given["boxes"] if isinstance(given["boxes"], list) else [given["boxes"]]
        boxes = [self._read_box(row, size) for row in rows]
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 5)
        return [{"boxes": boxes}], size

    def _read_box(self, row: Any, size: tuple[int, int]) -> list[float]:
        """One box in pixels -> [class, x0, y0, x1, y1 in 0..1]."""
        h, w = size
        n_classes = len(self.class_names) or self.tau["n_vocab"] - 1
        text = str(row)[:80]
        with trying(f"{text}: a box is [class, x0, y0, x1, y1]"):
            name, x0, y0, x1, y1 = row[:5]
            inside = 0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h
        is_shares = max(x0, y0, x1, y1) <= LARGEST_SHARE
        has_bools = any(isinstance(corner, bool) for corner in (x0, y0, x1, y1))
        inside = inside and not is_shares and not has_bools
        require(inside, f"{text}: must have 0 <= x0 < x1 <= {w} and 0 <= y0 < y1 <= {h}, in pixels")
        number = self.class_number(str(name), n_classes)
        return [number, x0 / w, y0 / h, x1 / w, y1 / h]

    def known_names(self, found: Sequence[str], has_null: bool) -> Sequence[str]:
        """A released model has numbers for names. Unless all names are such, all are new."""
        numbers = tuple(str(i) for i in range(self.tau["n_vocab"] - 1))
        is_by_number = not self.class_names and set(found) <= set(numbers)
        return numbers if is_by_number else self.class_names

    def add_classes(self, names: Sequence[str], tau: nn.Module, has_null: bool) -> None:
        """A new class is the next number, whose token only cells of the grid had so far.

        A released model has no names, so its numbers begin again at 0, with new meanings.
        """
        room = self.tau["n_vocab"] - 1
        class_names = (*self.class_names, *names)
        require(
            len(class_names) <= room,
            f"its tokens are enough for {room} classes, and there are {len(class_names)} now",
        )
        self.class_names = class_names

    def check_data(self, data: ImageDataset, path: str) -> None:
        is_same = not self.class_names or tuple(data.box_names) == self.class_names
        require(is_same, f"{path}: its classes are not those of the model")

    def show(self, item: dict, h: int, w: int) -> Tensor:
        return show_boxes(item["boxes"], self.class_names, h, w)

    def score(self, images: Tensor, items: list[dict], unit: float | None = None) -> dict:
        return scorer.layout_score(images, items, unit)


class Semantic(Task):
    """A label map beside z_t: one class number per pixel (Sec. 4.3.2, Table 15)."""

    fields = ("segmentation",)
    guidance_scale = 1.5
    flags = ("map",)

    @staticmethod
    def beside_channels(c_z: int, c_x: int) -> int:
        return 3

    @staticmethod
    def decide(values: dict, train: ImageDataset, held_out: ImageDataset) -> dict:
        """As many classes as the largest label asks for; this looks at every map of the set."""
        if values["n_classes"]:
            return {}
        largest = 0
        for data in (train, held_out):
            for i in range(len(data)):
                largest = max(largest, int(data[i]["segmentation"].max()))
        return {"n_classes": largest + 1}

    @staticmethod
    def tau_shape(values: dict, f: int) -> dict:
        n_halvings = int(math.log2(f))
        return {"c_in": values["n_classes"], "c_out": 3, "n": n_halvings}

    @staticmethod
    def build_tau(shape: dict) -> SpatialRescaler:
        return SpatialRescaler(**shape)

    @staticmethod
    def names_in(data: ImageDataset) -> Sequence[str]:
        return data.map_names

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Raises BadInput for a label that the model does not have."""
        maps = torch.stack(list(batch["segmentation"]))
        n_classes = self.tau["c_in"]
        low, high = maps.aminmax()
        require(
            -1 <= low and high < n_classes,
            f"label maps: there are labels {low}..{high}, but the model's are 0..{n_classes - 1}",
        )
        return {"segmentation": maps.int()}                             # (B, H, W)

    def null(self) -> dict[str, Tensor]:
        """-1, "nothing is known", everywhere."""
        return self.encode({"segmentation": [-torch.ones(1, 1)]})

    def context(self, y: dict[str, Tensor], tau: nn.Module, ae: nn.Module) -> Context:
        return Context(beside=tau(y["segmentation"]))                   # (B, 3, h, w)

    def read(
        self, given: dict[str, Any], size: tuple[int, int], multiple: int
    ) -> tuple[list[dict] | None, tuple[int, int]]:
        """An image of one channel whose pixels are class numbers, fitted to the size."""
        if "map" not in given:
            return None, size
        h, w = size
        label_map = fit_image(given["map"], (w, h), NEAREST, "map")
        return [{"segmentation": map_to_tensor(label_map)}], size

    def show(self, item: dict, h: int, w: int) -> Tensor:
        # In the built-in world, whose classes have names, label 0 is the background.
        has_background = bool(self.class_names)
        return show_label_map(item["segmentation"], self.class_names, has_background)

    def score(self, images: Tensor, items: list[dict], unit: float | None = None) -> dict:
        return scorer.semantic_score(images, items, unit)


class SuperResolution(Task):
    """A small image, a quarter of each side, beside z_t (Sec. 4.4).

    It is resized to the latents' grid; with f = 4 it fits as it is. There is no tau.
    """

    fields = ("small",)
    size_multiple = 4
    flags = ("image",)
    scores_any_world = True

    @staticmethod
    def beside_channels(c_z: int, c_x: int) -> int:
        return c_x

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"small": torch.stack(list(batch["small"]))}             # (B, c_x, H/4, W/4)

    def null(self) -> dict[str, Tensor]:
        """A grey image."""
        return {"small": torch.zeros(1, 1, 1, 1)}

    def context(self, y: dict[str, Tensor], tau: nn.Module | None, ae: nn.Module) -> Context:
        f = ae.cfg.f
        small = y["small"]
        if f != 4:
            small = interpolate(small, scale_factor=4 / f, mode="bicubic", antialias=f > 4)
        return Context(beside=small)                                    # (B, c_x, h, w)

    def read(
        self, given: dict[str, Any], size: tuple[int, int], multiple: int
    ) -> tuple[list[dict] | None, tuple[int, int]]:
        """A small image; the sample has four times its sides."""
        if "image" not in given:
            return None, size
        image: Image.Image = given["image"]
        step = -(-multiple // 4)                        # in pixels of the small image
        w = image.width - image.width % step
        h = image.height - image.height % step
        if (w, h) != image.size:
            warnings.warn(
                f"image: {image.width}x{image.height} is cropped to {w}x{h}, multiples of {step}",
                stacklevel=2,
            )
        require(
            0 < w * h <= 4e6,
            f"image: its sides must be {step} or more, and it may have 4,000,000 px at most",
        )
        return [{"small": to_tensor(image.crop((0, 0, w, h)))}], (4 * h, 4 * w)

    def show(self, item: dict, h: int, w: int) -> Tensor:
        return show_small(item["small"], h, w)

    def score(self, images: Tensor, items: list[dict], unit: float | None = None) -> dict:
        return scorer.superres_score(images, items, unit)


class Inpainting(Task):
    """An image with holes, beside z_t: the latents of what is left, and the mask (Sec. 4.5).

    A mask is 1 in the holes. There is no tau: stage one encodes the masked image, whose holes
    are black, as in the released code's scripts/inpaint.py.
    """

    fields = ("image", "mask")
    version = 2                         # in version 1, the holes were grey (0)

    @staticmethod
    def beside_channels(c_z: int, c_x: int) -> int:
        return c_z + 1

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The holes of the image are filled with black (-1)."""
        image = torch.stack(list(batch["image"]))               # (B, c_x, H, W)
        mask = torch.stack(list(batch["mask"]))                 # (B, 1, H, W)
        return {"image": image * (1 - mask) - mask, "mask": mask}

    def null(self) -> dict[str, Tensor]:
        """One hole everywhere."""
        return {"image": -torch.ones(1, 1, 1, 1), "mask": torch.ones(1, 1, 1, 1)}

    @torch.no_grad()
    def context(self, y: dict[str, Tensor], tau: nn.Module | None, ae: nn.Module) -> Context:
        """Latents of the masked image, and the mask: 1 in the holes, -1 elsewhere."""
        z = ae.encode(y["image"]).mean
        mask = 2 * interpolate(y["mask"], z.shape[2:]) - 1
        return Context(beside=torch.cat([z, mask], dim=1))              # (B, c_z + 1, h, w)

    def read(
        self, given: dict[str, Any], size: tuple[int, int], multiple: int
    ) -> tuple[list[dict] | None, tuple[int, int]]:
        """Image and mask are added to every condition by sample.py, as for any model."""
        return ([{}] if "mask" in given else None), size

    def show(self, item: dict, h: int, w: int) -> Tensor:
        return show_masked(item["image"], item["mask"])

    def score(self, images: Tensor, items: list[dict], unit: float | None = None) -> dict:
        return scorer.inpaint_score(images, items, unit)


class TextInpainting(Text):
    """A caption, and an image with holes: what the caption names is painted into the holes.

    It uses both ports. The U-Net attends to the caption; beside z_t lie the mask and the latents
    of what is left of the image. The null condition is the empty caption, with mask and image as
    they are: guidance exaggerates what the caption says of a hole, not what surrounds it.

    NB: as in the released Stable Diffusion inpainting model (LatentInpaintDiffusion). Its
    condition beside z_t differs from that of Inpainting in three ways: the mask comes first; it
    is 0, not -1, where nothing is hidden; the holes of the image are grey (0), not black (-1).
    The released code samples the latents of the masked image from q(z | x); here they are the
    mean.
    """

    fields = ("caption", "image", "mask")
    # Why: where all is hidden, only the caption says what the image shows. So the U-Net learns
    # to read it. It is the share in the training of the released model, too.
    share_hidden = 0.25
    examples = Task.examples
    show = Inpainting.show

    @staticmethod
    def beside_channels(c_z: int, c_x: int) -> int:
        return 1 + c_z

    def encode(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The holes of the image are filled with grey (0). A batch may have captions alone."""
        y = super().encode(batch)                               # caption (B, M)
        if "image" in batch:
            image = torch.stack(list(batch["image"]))           # (B, c_x, H, W)
            mask = torch.stack(list(batch["mask"]))             # (B, 1, H, W)
            y |= {"image": image * (1 - mask), "mask": mask}
        return y

    def context(self, y: dict[str, Tensor], tau: nn.Module, ae: nn.Module) -> Context:
        """Tokens of the caption; the mask, 1 in the holes, and latents of the masked image."""
        tokens = tau(y["caption"])                              # (B, M, D)
        with torch.no_grad():
            z = ae.encode(y["image"]).mean
        mask = interpolate(y["mask"], z.shape[2:])
        return Context(tokens, torch.cat([mask, z], dim=1))     # (B, 1 + c_z, h, w)

    def read(
        self, given: dict[str, Any], size: tuple[int, int], multiple: int
    ) -> tuple[list[dict] | None, tuple[int, int]]:
        """Prompts; sample.py adds the image and the mask to every condition."""
        if "mask" in given:
            return super().read(given, size, multiple)
        require(
            not given.get("prompts"),
            "this model repaints a part of an image; give an image and a mask, too",
        )
        return None, size

    def score(self, images: Tensor, items: list[dict], unit: float | None = None) -> dict:
        return scorer.text_inpaint_score(images, items, unit)


TASKS: dict[str, type[Task]] = {
    "uncond": Unconditional,
    "class": Class,
    "text": Text,
    "layout": Layout,
    "semantic": Semantic,
    "superres": SuperResolution,
    "inpaint": Inpainting,
    "text-inpaint": TextInpainting,
}
