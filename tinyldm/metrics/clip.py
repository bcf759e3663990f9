"""CLIP: does an image show what its caption says, and how far apart are two sets?

Papers:  Radford et al. 2021 (CLIP); Hessel et al. 2021 (CLIP score); Jayasumana et al.
         2024 (CMMD).
Symbols: x (B, C, H, W) in [-1, 1]; S the side of the images that CLIP takes; N places of
         its patches, and one more for the class token; D width.

CLIP's weights are not bundled: `--clip` takes a folder as they are published, with
model.safetensors, and vocab.json and merges.txt or tokenizer.json.
"""
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from tinyldm.conditioning import TextBlock, TextConfig, TextTransformer
from tinyldm.data.images import as_rgb
from tinyldm.data.tokenizer import encode, open_vocab
from tinyldm.engine.released_names import CLIP_RULES, renamed
from tinyldm.engine.weights import read_state
from tinyldm.errors import require, trying

D_HEAD = 64                 # of all of OpenAI's CLIP models with patches
MEAN = (0.48145466, 0.4578275, 0.40821073)      # of CLIP's training images, in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)

# ---- the networks


class VisionTransformer(nn.Module):
    """CLIP's image encoder: x (B, 3, S, S), normalised -> (B, D).

    A class token goes with the patches through blocks like those of the text encoder, but
    without the causal mask, and at the end it stands for the whole image.
    """

    def __init__(self, d: int, depth: int, side: int, patch: int):
        super().__init__()
        self.side = side
        self.patch = nn.Conv2d(3, d, patch, stride=patch, bias=False)
        self.cls = nn.Parameter(torch.zeros(d))
        self.position = nn.Embedding((side // patch) ** 2 + 1, d)
        self.norm_in = nn.LayerNorm(d)

        cfg = TextConfig(d=d, n_head=d // D_HEAD, d_head=D_HEAD, clip=True)
        self.blocks = nn.Sequential()
        for _ in range(depth):
            block = TextBlock(cfg)
            block.attn.causal = False
            self.blocks.append(block)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)            # (B, N, D)
        cls = self.cls.expand(len(h), 1, -1)
        h = torch.cat([cls, h], dim=1) + self.position.weight   # (B, 1 + N, D)
        h = self.blocks(self.norm_in(h))
        return self.norm(h[:, 0])                               # (B, D)


class CLIP(nn.Module):
    """Both encoders: what belongs together has vectors that point in the same direction."""

    def __init__(self, vision: VisionTransformer, text: TextTransformer, d: int):
        super().__init__()
        self.vision = vision
        self.text = text
        self.project_image = nn.Linear(vision.cls.shape[0], d, bias=False)
        self.project_text = nn.Linear(text.cfg.d, d, bias=False)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def images(self, x: Tensor) -> Tensor:
        """Return unit vectors (B, d) of images (B, C, H, W) in [-1, 1] of any size.

        As CLIP does, the shorter side is scaled to S, and the centre is cropped.
        """
        S = self.vision.side
        h, w = x.shape[2:]
        size = (round(S * h / min(h, w)), round(S * w / min(h, w)))
        x = F.interpolate(as_rgb(x), size, mode="bicubic", antialias=True)
        top = (size[0] - S) // 2
        left = (size[1] - S) // 2
        x = x[:, :, top:top + S, left:left + S].clamp(-1, 1)

        x = ((x + 1) / 2 - self.mean) / self.std
        return F.normalize(self.project_image(self.vision(x)), dim=1)

    @torch.no_grad()
    def texts(self, ids: Tensor) -> Tensor:
        """Return unit vectors (B, d) of token ids (B, M).

        The caption's vector is that of its end token, which has the highest id. The tokens
        behind it cannot change it, as attention is causal.
        """
        h = self.text(ids)                                      # (B, M, D)
        h = h[torch.arange(len(h), device=h.device), ids.argmax(1)]
        return F.normalize(self.project_text(h), dim=1)


# ---- from a file

# The names of tensors, as in engine/released_names.py. The blocks of both are the same.
RULES = {
    "vision": [
        (r"^patch\.", "embeddings.patch_embedding."),
        (r"^cls", "embeddings.class_embedding"),
        (r"^position\.", "embeddings.position_embedding."),
        (r"^norm_in\.", "pre_layrnorm."),           # spelled so in the files
        (r"^norm\.", "post_layernorm."),
        *CLIP_RULES[2:-1],
        (r"^", "vision_model."),
    ],
    "text": [*CLIP_RULES[:-1], (r"^", "text_model.")],
}


def open_clip(folder: Path, device: torch.device | str = "cpu") -> tuple[CLIP, Tokenizer]:
    """Open CLIP and its tokenizer from a folder.

    Raises BadInput that names the file which is missing, or is no CLIP.
    """
    files = [folder / name for name in ("model.safetensors", "pytorch_model.bin")]
    file = next((file for file in files if file.exists()), files[0])
    require(file.exists(), f"{file}: no such file; CLIP's folder has it")
    check_config(folder / "config.json")
    state = read_state(file)
    with trying(f"{file}: not a CLIP of images and texts"):
        net = built_for(state)
        net.load_state_dict({key: state[name].float() for key, name in names(net).items()})
    tokenizer = open_vocab(folder, net.text.cfg.n_vocab, net.text.cfg.n_token)
    return net.to(device).eval().requires_grad_(False), tokenizer


def check_config(path: Path) -> None:
    """Raise BadInput for a CLIP of another kind than OpenAI's, if the folder says so.

    Others have heads of another width, or GELU in place of its approximation.
    """
    if not path.exists():
        return
    with trying(f"{path}: cannot be read"):
        config = json.loads(path.read_bytes())
        towers = [config.get("vision_config", {}), config.get("text_config", {})]
        for tower in towers:
            d_head = tower.get("hidden_size", 64) / tower.get("num_attention_heads", 1)
            n_head = tower.get("num_attention_heads")
            activation = tower.get("hidden_act", "quick_gelu")
            require(
                activation == "quick_gelu" and (n_head is None or d_head == D_HEAD),
                f"{path}: heads of {d_head:g} and {activation}; only CLIP models like OpenAI's are "
                f"read, which have heads of {D_HEAD} and quick_gelu",
            )


def built_for(state: dict[str, Tensor]) -> CLIP:
    """Return a CLIP of the shapes of a file's tensors."""
    patch = state["vision_model.embeddings.patch_embedding.weight"]     # (D, 3, p, p)
    n_places = len(state["vision_model.embeddings.position_embedding.weight"]) - 1
    side = int(n_places ** 0.5) * patch.shape[2]
    vision = VisionTransformer(
        patch.shape[0], n_layers(state, "vision_model"), side, patch.shape[2]
    )

    n_vocab, d = state["text_model.embeddings.token_embedding.weight"].shape
    text = TextTransformer(TextConfig(
        n_vocab=n_vocab,
        n_token=len(state["text_model.embeddings.position_embedding.weight"]),
        d=d,
        depth=n_layers(state, "text_model"),
        n_head=d // D_HEAD,
        d_head=D_HEAD,
        clip=True,
    ))
    return CLIP(vision, text, len(state["visual_projection.weight"]))


def n_layers(state: dict[str, Tensor], tower: str) -> int:
    """Return how many blocks an encoder has. Raises BadInput for more than there can be."""
    start = f"{tower}.encoder.layers."
    numbers = {key.removeprefix(start).split(".")[0] for key in state if key.startswith(start)}
    require(0 < len(numbers) < 100, f"{tower} has {len(numbers)} layers")
    return len(numbers)


def names(net: CLIP) -> dict[str, str]:
    """Return the name in the files of each of our tensors."""
    found = {}
    for key in net.state_dict():
        tower, _, rest = key.partition(".")
        if tower in RULES:
            found[key] = renamed(rest, RULES[tower])
    found["project_image.weight"] = "visual_projection.weight"
    found["project_text.weight"] = "text_projection.weight"
    return found


# ---- the figures

def clip_vectors(net: CLIP, images: Iterable[Tensor]) -> Tensor:
    """Return the unit vectors (n, d) of batches of images, on the CPU."""
    device = net.mean.device
    return torch.cat([net.images(x.to(device)).cpu() for x in images])


def clip_score(
    net: CLIP, tokenizer: Tokenizer, vectors: Tensor, captions: Sequence[str]
) -> float:
    """Return the mean of 100 max(cos(image, caption), 0), Hessel et al., as it is reported.

    vectors: of the images (n, d), one per caption. NB: the factor is 2.5 in Hessel et al.
    """
    device = net.mean.device
    cosines = []
    for i in range(0, len(captions), 64):
        ids = encode(tokenizer, list(captions[i:i + 64]), net.text.cfg.n_token)
        texts = net.texts(ids.to(device)).cpu()
        cosines.append((vectors[i:i + 64] * texts).sum(1))
    return float(100 * torch.cat(cosines).clamp(min=0).mean())


def cmmd(a: Tensor, b: Tensor, sigma: float = 10.0) -> float:
    """Return 1000 times the squared distance of two sets of vectors (n, d), (m, d).

    It is the maximum mean discrepancy with a Gaussian kernel of width sigma, by the biased
    estimate, which is above 0 for two sets of one kind: for 64 images each, by about 0.1.
    NB: published figures are of CLIP ViT-L/14 at 336 pixels, of 30,000 images, and of real
    images that were scaled once; `--size` scales them to that of the samples first.
    """
    def mean_kernel(u: Tensor, v: Tensor) -> Tensor:
        total = 0
        for part in u.split(1024):                              # not all pairs at once
            squares = torch.cdist(part, v) ** 2
            total = total + (-squares / (2 * sigma ** 2)).exp().sum()
        return total / (len(u) * len(v))

    a = a.double()
    b = b.double()
    return float(1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)))
