"""Compute explore.html: pictures of latent diffusion that answer to a slider.

    python notebooks/explore.py                                 # minutes, from the bundled models
    python notebooks/explore.py --ae out/f2/ckpt.pt out/f4/ckpt.pt out/f8/ckpt.pt

Everything on the page was computed by the code of this repository; nothing is drawn by hand.
The page itself is explore.template.html; this program fills in its data, as JSON whose images
are WebP at quality 92. --ae takes autoencoders of emoji of 64 px, for the first figure.
"""
import base64
import io
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from tinyldm.autoencoder import Autoencoder, Pixels
from tinyldm.data.dataset import ImageDataset
from tinyldm.data.images import to_image
from tinyldm.data.open import open_dataset
from tinyldm.diffusion import predict_z_0, q_sample
from tinyldm.engine.command import run
from tinyldm.engine.open import BUNDLED, model_file, open_model, open_stage_one
from tinyldm.errors import BadInput
from tinyldm.metrics.images import psnr
from tinyldm.model import LatentDiffusion
from tinyldm.quantize import perplexity
from tinyldm.seeds import generator
from tinyldm.show.attention import attention_maps, word_text, words_of

HERE = Path(__file__).parent

# Held-out emoji: a birthday cake, a racing car, a goat, a penguin, a cupcake, a beetle.
SHOWN_TO_STAGE_ONE = [34, 42, 48, 54, 152, 162]
ROUNDING = [0.05, 0.2, 0.4, 0.8, 1.2, 1.6, 2.4, 4.0]        # in standard deviations of z

# A name, and another one that the network is told instead.
NAMES = [("mushroom", "rocket"), ("dragon", "guitar"), ("hot beverage", "rainbow")]
TIMESTEPS_SHOWN = list(range(19, 1000, 70)) + [999]

PROMPTS = [
    "a red circle above a blue square",
    "a big yellow circle right of a small purple cross",
    "a small cyan triangle below a big orange square",
    "a small green triangle",
]
SCALES = [0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0]
STEPS = [1, 2, 4, 8, 12, 25]
SAMPLERS_SHOWN = ["ddim", "dpm++", "ddpm"]
N_SAMPLES = 8               # of a prompt

ATTENDED = [
    ("toy", "a red circle above a blue square"),
    ("toy", "a big yellow circle right of a small purple cross"),
    ("emoji", "grinning cat face with smiling eyes"),
    ("emoji", "rocket"),
]


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ae", type=model_file, nargs="+", metavar="FILE", default=[],
                        help="autoencoders of emoji, one for each f; default: the bundled one")
    parser.add_argument("--n", type=int, default=64, help="prompts that are scored")
    parser.add_argument("--out", type=Path, default=HERE / "explore.html")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    toy = open_model(BUNDLED["toy"])
    emoji = open_model(BUNDLED["emoji"])
    autoencoders = [open_stage_one(path, None)[0] for path in args.ae] or [emoji.ae]
    followed = tqdm(total=len(SCALES) + len(SAMPLERS_SHOWN) * len(STEPS), unit="setting")
    with followed:
        data = {
            "compress": compress([Pixels(), *autoencoders]),
            "denoise": denoise(emoji),
            "guide": guide(toy, args.n, followed),
            "steps": steps(toy, args.n, followed),
            "look": [attention(model, prompt) for model, prompt in ATTENDED],
        }
    page = (HERE / "explore.template.html").read_text()
    text = json.dumps(data, separators=(",", ":"))
    args.out.write_text(page.replace("{ DATA }", text))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


# ---- images as text

def uri(x: Tensor) -> str:
    """Return an image (3, H, W) in [-1, 1] as a data URI, which a browser shows."""
    file = io.BytesIO()
    to_image(x).save(file, "WEBP", quality=92, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def side_by_side(images: Tensor, columns: int = 4) -> Tensor:
    """Join images (n, 3, H, W) into one, in rows of `columns`, with a white line between them."""
    framed = torch.nn.functional.pad(images, (1, 1, 1, 1), value=1.0)
    rows = [torch.cat(list(row), dim=2) for row in framed.split(columns)]
    return torch.cat(rows, dim=1)


class Colours:
    """Latents as colours: their three principal components are red, green and blue.

    z (n, c, h, w): the latents whose components are taken; the same three serve them all.
    """

    def __init__(self, z: Tensor):
        values = z.movedim(1, 3).flatten(0, 2)                      # (n h w, c)
        self.mean = values.mean(0)
        directions = torch.linalg.svd(values - self.mean, full_matrices=False)[2]
        self.directions = directions[:3]                            # (3, c)
        self.std = ((values - self.mean) @ self.directions.T).std(0)

    def __call__(self, z: Tensor) -> Tensor:
        """Latents (n, c, h, w) -> images (n, 3, h, w) in [-1, 1]; the ends are 2.5 stds away."""
        components = (z.movedim(1, 3) - self.mean) @ self.directions.T / self.std
        return (components / 2.5).clamp(-1, 1).movedim(3, 1)


# ---- the figures

@torch.no_grad()
def compress(autoencoders: list[Autoencoder | Pixels]) -> dict:
    """f against bits and PSNR: latents that are rounded more and more coarsely.

    Bits are the entropy of the rounded values of each channel, counted over 44 images.
    """
    emoji = open_dataset("emoji", "held-out", size=64)
    indices = [*SHOWN_TO_STAGE_ONE, *range(0, 173, 5)]
    x = torch.stack([emoji[i]["image"] for i in indices])           # (n, 3, 64, 64)
    n_shown = len(SHOWN_TO_STAGE_ONE)
    figures = []
    for ae in autoencoders:
        z = ae.encode(x).mean
        colours = Colours(z) if isinstance(ae, Autoencoder) else lambda z: z
        points = []
        for share in ROUNDING:
            step = share * z.std()
            rounded = (z / step).round() * step
            x_rec = ae.decode(rounded).clamp(-1, 1)
            counts = [rounded[:, c].unique(return_counts=True)[1] for c in range(z.shape[1])]
            n_places = z[0, 0].numel()
            points.append({
                "bits": sum(n_places * perplexity(n).log2().item() for n in counts),
                "psnr": psnr(x, x_rec).mean().item(),
                "latents": [uri(image) for image in colours(rounded[:n_shown])],
                "images": [uri(image) for image in x_rec[:n_shown]],
            })
        figures.append({"f": ae.cfg.f, "shape": list(z.shape[1:]), "points": points})
    return {
        "n": len(x),
        "names": [emoji.load(i)["caption"][0] for i in SHOWN_TO_STAGE_ONE],
        "images": [uri(image) for image in x[:n_shown]],
        "rounding": ROUNDING,
        "autoencoders": figures,
    }


@torch.no_grad()
def denoise(model: LatentDiffusion) -> dict:
    """z_t and the z_0 that the network predicts, told the right name, a wrong one, or none."""
    data = open_dataset("emoji", "train", size=64)
    x = torch.stack([picture_of(name, data) for name, _ in NAMES])
    z = model.ae.encode(x).mean                                     # divided by its std
    colours = Colours(z)
    eps = torch.randn(z.shape, generator=generator(0, 0))
    eps_theta = model.eps_theta()

    def decoded(z: Tensor) -> Tensor:
        return model.ae.decode(z).clamp(-1, 1)

    pictures = [{"name": name, "other": other, "told": {}} for name, other in NAMES]
    told = {
        "name": [name for name, _ in NAMES],
        "other": [other for _, other in NAMES],
        "nothing": [""] * len(NAMES),                               # the null condition
    }
    ts = torch.tensor(TIMESTEPS_SHOWN)
    z_ts = [q_sample(z, t.expand(len(z)), eps, model.abar) for t in ts]
    for i, picture in enumerate(pictures):
        picture["image"] = uri(x[i])
        picture["z_t"] = [uri(colours(z_t[i:i + 1])[0]) for z_t in z_ts]
        picture["x_t"] = [uri(decoded(z_t[i:i + 1])[0]) for z_t in z_ts]

    for kind, names in told.items():
        y = model.task.encode({"caption": names})
        ctx = model.task.context(y, model.tau, model.ae)
        for t, z_t in zip(ts, z_ts):
            said = eps_theta(z_t, t.expand(len(z)), ctx)
            z_0 = predict_z_0(z_t, said, model.abar[t])
            error = (z_0 - z).square().mean((1, 2, 3))
            x_0 = decoded(z_0)
            for i, picture in enumerate(pictures):
                seen = picture["told"].setdefault(kind, {"z_0": [], "x_0": [], "error": []})
                seen["z_0"].append(uri(colours(z_0[i:i + 1])[0]))
                seen["x_0"].append(uri(x_0[i]))
                seen["error"].append(error[i].item())
    signal = model.abar[ts].sqrt().tolist()
    return {"t": TIMESTEPS_SHOWN, "signal": signal, "pictures": pictures}


def picture_of(name: str, data: ImageDataset) -> Tensor:
    """Return the first image of a data set that has this caption."""
    for k in range(len(data)):
        if name in data.load(k)["caption"]:
            return data[k]["image"]
    raise BadInput(f"no picture is called {name}")


def guide(model: LatentDiffusion, n: int, bar: tqdm) -> dict:
    """Samples by guidance scale s, how many of n prompts are followed, and how much they vary."""
    points = []
    for s in SCALES:
        sheets = []
        stds = []
        for prompt in PROMPTS:
            images = samples(model, [prompt] * N_SAMPLES, guidance_scale=s, steps=10)
            sheets.append(uri(side_by_side(images)))
            stds.append(images.std(0).mean())
        followed = score(model, n, guidance_scale=s, steps=10)
        points.append({
            "s": s, "images": sheets, "followed": followed,
            "varied": torch.stack(stds).mean().item(),
        })
        bar.update()
    return {"prompts": PROMPTS, "n": n, "points": points}


def steps(model: LatentDiffusion, n: int, bar: tqdm) -> dict:
    """Samples from the same noise by sampler and number of steps."""
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    figures = []
    for sampler in SAMPLERS_SHOWN:
        points = []
        for S in STEPS:
            images = samples(model, prompts, sampler=sampler, steps=S)
            followed = score(model, n, sampler=sampler, steps=S)
            points.append({"images": uri(side_by_side(images)), "followed": followed})
            bar.update()
        figures.append({"sampler": sampler, "points": points})
    return {"prompts": PROMPTS, "n": n, "steps": STEPS, "samplers": figures}


def attention(name: str, prompt: str) -> dict:
    """A sample, and how much each place of its latent has attended to each word."""
    model = open_model(BUNDLED[name])
    h, w = (side // model.ae.cfg.f for side in model.config.size)
    with attention_maps(model.unet, 1, h, w) as maps:
        image = samples(model, [prompt], steps=12)[0]
    by_token = torch.stack(maps).mean(0)[0]                         # (M, h, w)

    encoding = model.tokenizer.encode_batch([prompt])[0]
    tokens_of_words = words_of(encoding, len(by_token))
    by_word = torch.stack([by_token[tokens].sum(0) for tokens in tokens_of_words])
    return {
        "prompt": prompt,
        "words": [word_text(encoding, tokens) for tokens in tokens_of_words],
        "image": uri(image),
        "maps": (1000 * by_word).round().int().tolist(),            # in thousandths
    }


# ---- sampling

def samples(model: LatentDiffusion, prompts: list[str], **how) -> Tensor:
    """Sample an image for each prompt, from noise that depends on its place alone."""
    items = [{"caption": prompt} for prompt in prompts]
    seeds = [(0, i) for i in range(len(prompts))]
    return model.sample(items, seeds=seeds, **how)


def score(model: LatentDiffusion, n: int, **how) -> float:
    """Return the share of n held-out prompts of the built-in world that are followed in full."""
    prompts = open_dataset("shapes", "held-out", size=32).prompts(n)
    images = torch.cat([samples(model, part, **how) for part in chunks(prompts, 32)])
    items = [{"caption": prompt} for prompt in prompts]
    return model.task.score(images, items)["prompts_followed"]


def chunks(values: list[str], n: int) -> Iterator[list[str]]:
    for i in range(0, len(values), n):
        yield values[i:i + n]


if __name__ == "__main__":
    run(main, parse_args)
