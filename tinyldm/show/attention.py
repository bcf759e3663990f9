"""Look inside while a model samples: attention to each word, and predicted z_0.

Paper:  Sec. 3.3: the softmax of cross-attention, with queries from places and keys from
        tokens. DDIM (Song et al. 2021), Eq. (9): the predicted z_0.
Shapes: maps (B, M, h, w): how much each place of the latent grid attends to each token;
        over the tokens they sum to 1.

The networks do not know that they are observed, and compute the same bits.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from PIL import Image, ImageDraw
from tokenizers import Encoding
from torch import Tensor, nn
from torch.nn import functional as F

from tinyldm.attention import Attention, TransformerBlock
from tinyldm.beyond.dit import DiTBlock
from tinyldm.conditioning import Context
from tinyldm.data.images import NEAREST, as_rgb, to_image
from tinyldm.diffusion import predict_z_0
from tinyldm.show.grids import save_sheet

TILE = 128                  # side of a tile of save_attention, in pixels
HEADING = 16                # height of the word above a tile
DARKEST = 0.15              # brightness where a word is attended to least


# ---- cross-attention

@contextmanager
def attention_maps(
    unet: nn.Module, n: int, h: int, w: int, calls: set[int] | None = None
) -> Iterator[list[Tensor]]:
    """Collect the maps of unet's cross-attention while the context is open.

    It yields a list, to which each cross-attention layer appends one tensor
    (n, M, h, w) per call of unet: the mean over heads, resized to the latent grid.

    n: only the last n samples of a batch; under guidance, these have the condition.
    calls: only these calls of unet, by their numbers from 0; None: all.
    """
    maps: list[Tensor] = []
    if calls == set():
        yield maps                  # no map is computed
        return
    of_this_call: list[Tensor] = []
    call = 0

    # This hook runs inside unet.forward, which may be compiled. So it depends on nothing that
    # changes from call to call: else each call would be compiled anew.
    def add_map(attention: Attention, inputs: tuple, output: Tensor) -> None:
        x, ctx = inputs
        weights = mean_weights(attention, x.detach(), ctx.detach(), n).detach()
        of_this_call.append(on_grid(weights, h, w))

    # This one runs after unet.forward.
    def keep_maps(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        nonlocal call
        if calls is None or call in calls:
            maps.extend(of_this_call)
        of_this_call.clear()
        call += 1

    with ExitStack() as hooks:
        hooks.enter_context(unet.register_forward_hook(keep_maps))
        for module in unet.modules():
            if isinstance(module, TransformerBlock | DiTBlock):
                hook = module.cross_attn.register_forward_hook(add_map)
                hooks.enter_context(hook)
        yield maps


def mean_weights(attention: Attention, x: Tensor, ctx: Tensor, n: int) -> Tensor:
    """Return softmax(q k^T / sqrt(d)), the mean over heads, of the last n samples.

    x (B, N, D) and ctx (B, M, d_ctx) are what the layer was called with.
    """
    q = attention.to_q(x)[-n:]                      # (n, N, n_head * d_head)
    k = attention.to_k(ctx)[-n:]                    # (n, M, n_head * d_head)

    # Split the heads: (n, n_head, N or M, d_head).
    q = q.unflatten(2, (attention.n_head, -1)).transpose(1, 2)
    k = k.unflatten(2, (attention.n_head, -1)).transpose(1, 2)

    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)       # (n, n_head, N, M)
    return weights.mean(1).mT                       # (n, M, N)


def on_grid(weights: Tensor, h: int, w: int) -> Tensor:
    """Resize maps (n, M, N), whose N places are a grid like h x w, to (n, M, h, w)."""
    n_places = weights.shape[2]
    rows = round((n_places * h / w) ** 0.5)
    grid = weights.unflatten(2, (rows, -1)).float()
    return F.interpolate(grid, (h, w), mode="bilinear")


# ---- predicted z_0

def record_z_0(eps_theta: Callable, abar: Tensor, kept: list[Tensor]) -> Callable:
    """Return an eps_theta that also appends the z_0 that it predicts to `kept`."""

    def recording(z_t: Tensor, t: Tensor, ctx: Context) -> Tensor:
        eps = eps_theta(z_t, t, ctx)
        kept.append(predict_z_0(z_t, eps, abar[t[0]]))
        return eps

    return recording


# ---- maps as an image

def save_attention(
    images: Tensor, maps: Tensor, encodings: Sequence[Encoding], path: Path
) -> None:
    """Write an image with one row per sample: the sample, then one tile per word.

    A tile is the sample, bright where the word is attended to. The maps of a word's
    tokens are averaged. Tokens beyond the M-th have no tile.

    images (n, C, H, W) in [-1, 1]; maps (n, M, h, w); encodings: the tokenizer's, one
    per prompt.
    """
    n_tokens = maps.shape[1]
    words = [words_of(encoding, n_tokens) for encoding in encodings]
    columns = 1 + max(len(words_of_prompt) for words_of_prompt in words)
    sheet = Image.new("RGB", (columns * TILE, len(images) * (TILE + HEADING)), "white")
    pen = ImageDraw.Draw(sheet)

    for row, x in enumerate(images):
        y = row * (TILE + HEADING)
        sample = to_image(as_rgb(x)).resize((TILE, TILE), NEAREST)
        sheet.paste(sample, (0, y + HEADING))
        for column, tokens in enumerate(words[row], 1):
            word_map = maps[row][tokens].mean(0)    # (h, w)
            sheet.paste(lit(sample, word_map), (column * TILE, y + HEADING))
            text = word_text(encodings[row], tokens)
            pen.text((column * TILE + 4, y + 2), text, "black")
    save_sheet(sheet, path)


def words_of(encoding: Encoding, n_tokens: int) -> list[list[int]]:
    """Return, for each word, the numbers of its tokens among the first n_tokens.

    Special tokens, such as padding, belong to no word.
    """
    words: dict[int, list[int]] = {}
    for i, word in enumerate(encoding.word_ids[:n_tokens]):
        if word is not None:
            words.setdefault(word, []).append(i)
    return [words[word] for word in sorted(words)]


def word_text(encoding: Encoding, tokens: list[int]) -> str:
    """Return the word that these tokens make, without the marks of tokenizers."""
    pieces = [encoding.tokens[i] for i in tokens]
    return "".join(piece.removeprefix("##").removesuffix("</w>") for piece in pieces)


def lit(image: Image.Image, word_map: Tensor) -> Image.Image:
    """Return the image, bright where a word's map (h, w) is large, else dark."""
    low = word_map.min()
    high = word_map.max()
    stretched = (word_map - low) / (high - low + 1e-8)          # in 0..1
    brightness = 255 * (DARKEST + (1 - DARKEST) * stretched)
    mask = Image.fromarray(brightness.byte().cpu().numpy())
    mask = mask.resize(image.size, Image.Resampling.BICUBIC)
    black = Image.new("RGB", image.size, "black")
    return Image.composite(image, black, mask)
