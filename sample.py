"""Draw pictures with a trained model; its checkpoint says which task it learned.

    python sample.py "a red circle above a blue square"             # the bundled toy model
    python sample.py --ckpt out/class/ckpt.pt --label "red circle"  # without: all its classes
    python sample.py --ckpt out/layout/ckpt.pt --boxes boxes.json   # without: held-out conditions
    python sample.py --image photo.png --mask hole.png "a red circle"           # white is painted
    python sample.py --official sd-v1-4.ckpt --vocab clip/ --scale 7.5 "a photo of a red house"
    torchrun --nproc-per-node 8 -- sample.py --n 50000 --out out/samples ...    # shared by 8
Writes one grid, a row a prompt, or a folder, batch by batch. Picture i has the noise of (seed, i):
its bits are the same in batches of one size, in any number of processes; in others it differs by
1e-5 or so. --timesteps even: T-1 to z_0 in --steps; official: the released rule, near --steps."""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from tinyldm import generate, official, presets, require, shapes, tokens, training as tr, trying
from tinyldm.checkpoint import written
from tinyldm.data import LANCZOS, NEAREST, load_map, load_rgb, open_data
from tinyldm.degrade import to_image, to_tensor
from tinyldm.inside import attention_maps, record, save_attention
from tinyldm.pictures import save_drawn, save_grid
from tinyldm.score import parse_prompt, score
from tinyldm.tasks import TASKS

BUNDLED = Path(generate.__file__).with_name("toy.pt")

def parse_args(argv=None):
    p = tr.flags(__doc__)
    g = p.add_argument_group("what to draw; spatial conditions: default the set's, held out")
    g.add_argument("prompt", nargs="*", help="one or more prompts, each in quotes")
    g.add_argument("--prompts", type=Path, help="a file with one prompt a line")
    g.add_argument("--label", nargs="+", default=[], help="names or numbers of classes")
    g.add_argument("--boxes", type=Path, help="json: [[class, x0, y0, x1, y1 in px], ...]")
    g.add_argument("--map", type=Path, help="label map: a grey or palette png of class numbers")
    g.add_argument("--image", type=Path, help="small picture (superres), or one to keep, but for")
    g.add_argument("--mask", type=Path, help="its white parts, which are painted; any model")
    g.add_argument("--init", type=Path, help="picture to begin with, noised; any model")
    g.add_argument("--strength", type=float, help="how much: in 0..1 of the steps (0.5)")
    g.add_argument("--data", help="take conditions from this set; default: that of the training")
    g.add_argument("--n", type=int, help="pictures a prompt (16; 1 where there are many prompts)")
    g.add_argument("--size", help="px, or HxW, as in 64x128; default: as trained")
    g = p.add_argument_group("model, and how it draws")
    g.add_argument("--ckpt", type=Path, default=BUNDLED, help="default: the bundled toy model")
    g.add_argument("--official", type=Path, help="a released model's file, .ckpt or .safetensors")
    g.add_argument("--preset", choices=[*presets.LDM][1:], help="which; default: found out")
    g.add_argument("--vocab", type=Path, help="its tokenizer: a folder, vocab.txt, tokenizer.json")
    g.add_argument("--ema", action=argparse.BooleanOptionalAction, default=True, help="EMA weights")
    g.add_argument("--sampler", choices=generate.SAMPLERS, default="ddim")
    g.add_argument("--steps", type=int, help="1..T; each calls the U-Net once; default: 50")
    g.add_argument("--timesteps", choices=generate.TIMESTEPS, default="even", help="rule of steps")
    g.add_argument("--eta", type=float, default=0.0, help="DDIM's noise: 0 none, 1 as DDPM")
    g.add_argument("--scale", type=float, help="guidance s; 1 is none; default: the task's")
    g.add_argument("--seed", type=int, default=0, help="same seed, same pictures")
    g.add_argument("--to-seed", type=int, help="a strip of --n pictures from seed to seed")
    g.add_argument("--batch", type=int, default=64, help="pictures at a time")
    tr.group(p, "system", **{k: tr.SYSTEM[k] for k in ("device", "dtype", "compile")})
    g = p.add_argument_group("what comes out")
    g.add_argument("--out", type=Path, default=Path("out/samples.png"), help="grid.png or a folder")
    g.add_argument("--resume", action="store_true", help="only the batches that the folder lacks")
    g.add_argument("--score", action="store_true", help="of the built-in world, or superres")
    g.add_argument("--attention", type=Path, help="FILE.png: where each word was looked at")
    g.add_argument("--trajectory", type=Path, help="FILE.png: z_0 as predicted along the way")
    g.add_argument("--at", type=int, nargs="+", help="steps, 1..., of these; default: all, and 8")
    return p.parse_args(argv)

def read(args, flag: str, opened) -> Image.Image | dict | list | str:
    """opened(bytes of the flag's file). Raises BadInput."""
    with trying(f"--{flag} {getattr(args, flag)}: cannot be read"):
        return opened(getattr(args, flag).read_bytes())

def fitted(flag: str, image: Image.Image, size: tuple[int, int], how) -> Image.Image:
    """Scaled, and cropped in the middle, to the size (W, H), with a notice."""
    if image.size != size:
        to = f"{size[0]}x{size[1]}{' (nearest)' if how == NEAREST else ''}"
        print(f"--{flag}: {image.width}x{image.height} is scaled and cropped to {to}")
    return ImageOps.fit(image, size, how)

def class_number(name: str, m: generate.Model, say: str = "") -> int:
    """Of a class that is given by its name or number. Raises BadInput."""
    n = (m.tau.embedding.num_embeddings if m.task == "class"
         else len(m.classes) or m.tau.cfg.n_vocab - 1)
    more = f", or a name, like {', '.join(m.classes[:3])}" if m.classes else ""
    numbers = {str(i): i for i in range(n)} | {k: i for i, k in enumerate(m.classes)}
    require(name in numbers, f"{say}{name!r:.99} is no class of this model; they are numbers, "
            f"0..{n - 1}{more}")
    return numbers[name]

def asked(args, m: generate.Model) -> list[dict] | torch.utils.data.Subset:
    """The conditions, each with what m's task asks for: those given, else --n held-out items of
    --data, or of m's own set, read when asked for; sets args.size and n. Raises BadInput."""
    if m.task in ("text", "class"):
        more = read(args, "prompts", bytes.decode).splitlines() if args.prompts else []
        lines = [tokens.plain(p).strip() for p in args.prompt + args.label + more if p.strip()]
        if m.task == "text":
            return [{"caption": p} for p in lines]
        some = shapes.SEEN if m.flags.get("data") == "shapes" else range(len(m.classes))
        return [{"label": i} for i in [class_number(p, m) for p in lines] or some]
    if m.task == "uncond" or args.mask and m.task == "inpaint":
        return [{}]
    if args.boxes:
        rows, (h, w), out = read(args, "boxes", json.loads), args.size, []
        for row in rows if isinstance(rows, list) else [rows]:
            say = f"--boxes {args.boxes}: {json.dumps(row)[:80]}: "
            with trying(say + "a box is [class, x0, y0, x1, y1]"):
                kind, x0, y0, x1, y1 = row[:5]
                fits = 0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h
            require(fits, f"{say}must have 0 <= x0 < x1 <= {w} and 0 <= y0 < y1 <= {h}, in pixels")
            out.append([class_number(str(kind), m, say), x0 / w, y0 / h, x1 / w, y1 / h])
        return [{"boxes": torch.tensor(out, dtype=torch.float32).reshape(-1, 5)}]
    if args.map:
        y = np.int64(fitted("map", read(args, "map", load_map), args.size[::-1], NEAREST))
        return [{"segmentation": torch.from_numpy(y)}]
    if args.image and m.task == "superres":
        image, k = read(args, "image", load_rgb), -(-m.ae.cfg.f * m.unet.cfg.factor // 4)
        w, h = (v - v % k for v in image.size)
        if (w, h) != image.size:
            print(f"--image: {image.width}x{image.height} is cropped to {w}x{h}, multiples of {k}")
        require(0 < w * h <= 4e6, f"--image: must have sides of {k} or more, 4,000,000 px at most")
        args.size = 4 * h, 4 * w
        return [{"small": to_tensor(image.crop((0, 0, w, h)))}]
    path = m.flags["data"] = args.data or m.flags.get("data")
    require(path, "--data: a released model has none of its own; give a condition or a folder")
    h, w = args.size
    require(h == w, f"--size {h}x{w}: a set's pictures are square; give one number, or a condition")
    flags = {"label_column": "label", "degrade": "bicubic", "resize": True, "seed": 0} | m.flags
    data = open_data(argparse.Namespace(**flags | {"size": h}), "held-out", TASKS[m.task].fields)
    require(len(data), f"--data {path}: has no held-out pictures; give a condition")
    require(m.task != "layout" or not m.classes or tuple(data.classes) == m.classes,
            f"--data {path}: its classes are not those of the model")
    require(args.to_seed is None, "--to-seed: needs one condition; give it as a file")
    n, args.n = args.n or 16, 1
    return torch.utils.data.Subset(data, [i % len(data) for i in range(n)])

def check(args, m: generate.Model) -> None:
    """Do the flags fit the model, and one another? Fills in args.scale and size; or BadInput."""
    takes = TASKS[m.task].takes + (("image", "mask") if m.task != "superres" else ())
    for flag in ("prompt", "prompts", "label", "boxes", "map", "image", "mask"):
        require(flag in takes or not getattr(args, flag), f"--{flag}: this model's task is "
                f"{m.task}, which takes {', '.join('--' + f for f in takes)}")
    require(m.task == "superres" or (args.image is None) == (args.mask is None),
            "--image and --mask belong together: what is kept, and where it is painted")
    for flag, low, high in (("n", 1, 1e9), ("batch", 1, 1e9), ("seed", 0, 1e18), ("eta", 0, 1),
                            ("to_seed", 0, 1e18), ("strength", 1e-6, 1), ("scale", -1e6, 1e6)):
        v, name = getattr(args, flag), flag.replace("_", "-")
        require(v is None or low <= v <= high, f"--{name} {v}: must be in {low:g}..{high:g}")
    require(args.sampler == "ddim" or not args.eta, f"--eta {args.eta:g}: needs --sampler ddim")
    for flag, to in (("strength", "init"), ("preset", "official"), ("vocab", "official")):
        require(getattr(args, to) or getattr(args, flag) is None, f"--{flag}: only with --{to}")
    require(args.attention or args.trajectory or not args.at, "--at: for --attention, --trajectory")
    require(args.sampler != "plms" or not args.mask and m.task != "inpaint",
            "--sampler plms: forgets its past at each step of a masked run; use ddim")
    guidable = m.flags.get("p_drop", 1) > 0
    args.scale = (TASKS[m.task].s if guidable else 1.0) if args.scale is None else args.scale
    require(guidable or args.scale == 1, f"--scale {args.scale:g}: the model has learned no null "
            "condition to guide away from; use --scale 1")
    size, k = str(args.size or m.flags["size"]).split("x"), m.ae.cfg.f * m.unet.cfg.factor
    require(len(size) < 3 and {*size} <= {*map(str, range(k, 10 ** 5, k))}, f"--size {args.size}: "
            f"must be a multiple of {k}, the autoencoder's f times the U-Net's factor, or two: HxW")
    args.size = int(size[0]), int(size[-1])
    require(m.task == "text" or not args.attention, "--attention: is of words; use a text model")
    require(m.task != "text" or m.tokenizer, "--vocab: the model needs its tokenizer's vocabulary")

def main(args):
    device, autocast, rank, world = tr.setup(args.device, args.dtype)
    sys.stdout = None if rank else sys.stdout                   # of None, print() says nothing
    dtype = torch.float32 if device.type == "cpu" or args.dtype == "fp32" else None
    m = (official.load_model(args.official, args.preset, args.ema, args.vocab, device, dtype)
         if args.official else generate.load_model(args.ckpt, args.ema, device))
    print(f"{args.official or args.ckpt}: {m.flags.get('preset')}, {m.task}")
    grid = args.out.suffix == ".png"
    keep = grid or args.score or args.attention or args.trajectory
    require(not keep or world == 1 and not args.resume, "torchrun and --resume: for a folder as "
            "--out only, without --score, --attention and --trajectory")

    # ---- the conditions, and what they share
    check(args, m)
    items, size, more = asked(args, m), args.size[::-1], {}
    require(len(items), 'no prompt: give one, like "a red circle above a blue square"')
    if args.score:
        require("image" in items[0] if m.task == "superres" else m.flags.get("data") == "shapes",
                "--score: needs the built-in world, or superres with the truth")
        require(size[0] == size[1], "--score: needs square pictures")
        for item in items if m.task == "text" else ():
            parse_prompt(item["caption"])
    if args.mask:
        image, mask = (read(args, k, load_rgb) for k in ("image", "mask"))
        if mask.size != image.size:
            print(f"--mask: {mask.width}x{mask.height} is resized (nearest) to --image's "
                  f"{image.width}x{image.height}")
        mask = fitted("mask", mask.convert("L").resize(image.size, NEAREST), size, NEAREST)
        mask = torch.from_numpy(np.array(mask) > 127).float()[None]
        require(0 < mask.mean() < 1, f"--mask {args.mask}: covers "
                f"{'all' if mask.any() else 'nothing'}; white is painted, black is kept")
        more = {"image": to_tensor(fitted("image", image, size, LANCZOS)), "mask": mask}
    if args.init:
        more["init"] = to_tensor(fitted("init", read(args, "init", load_rgb), size, LANCZOS))
    for out in filter(None, (args.out, args.attention, args.trajectory)):
        require(out is args.out or out.suffix == ".png", f"{out}: it must end in .png")
        (out.parent if out.suffix == ".png" else out).mkdir(parents=True, exist_ok=True)

    # ---- this process's batches; what is watched
    args.n = args.n or (16 // min(len(items), 16) if args.to_seed is None else 8)
    n, n_steps = len(items) * args.n, len(generate.timesteps(args, len(m.abar))) - 1
    require(all(1 <= k <= n_steps for k in args.at or ()), f"--at: steps must be 1..{n_steps}")
    def part(i, k):
        return [items[j // args.n] | more for j in range(i, min(i + k, n))]
    files = [args.out / f"{j:06d}.png" for j in range(n)]
    starts = [i for i in range(0, n, args.batch)[rank::world] if not args.resume
              or not all(f.exists() for f in files[i:i + args.batch])]
    calls = [k + (args.sampler == "plms" and k > 0) for k in range(n_steps)]        # by step
    at = {calls[k - 1] for k in args.at or range(1, n_steps + 1)} if args.attention else set()
    (h, w), images, z_0s = (v // m.ae.cfg.f for v in args.size), [], []
    watch = {"wrap": lambda eps: record(eps, m.abar, z_0s)} if args.trajectory else {}
    bar = tqdm(total=len(starts) * (calls[-1] + 1), unit="step", dynamic_ncols=True, disable=rank)
    if args.compile and not args.attention:             # whose hooks it would compile at each step
        m.unet.forward = torch.compile(m.unet.forward, dynamic=False)
    m.unet.register_forward_hook(lambda *_: bar.update() and None)

    # ---- draw
    with bar, autocast(), attention_maps(m.unet, min(args.batch, n), h, w, at) as maps:
        for i in starts:
            drawn = generate.draw(m, part(i, args.batch), args, i, **(watch if i == 0 else {}))
            images += [drawn] if keep else []
            for x, path in zip(drawn, () if grid else files[i:]):
                with written(path) as f:
                    to_image(x).save(f, "PNG")
    print(f"{n} picture(s) in {bar.format_dict['elapsed']:.1f} s -> {args.out}")

    # ---- what else is shown
    images, whole = (torch.cat(images), part(0, n)) if keep else ((), ())
    if grid:
        row = args.n if 1 < args.n < n or args.to_seed is not None else 8
        save_drawn(images, whole, m.task, m.classes, args.out, min(row, n))
    if args.attention:
        words = m.tokenizer.encode_batch([i["caption"] for i in whole[:args.batch]])
        save_attention(images[:args.batch], torch.stack(maps).mean(0), words, args.attention)
    if args.trajectory:
        at = args.at or [1 + round(k * (n_steps - 1) / 7) for k in range(8)]
        with torch.no_grad(), autocast():
            x = torch.stack([m.ae.decode(z_0s[calls[k - 1]][:4]).float().cpu() for k in at], dim=1)
        save_grid(x.flatten(0, 1), args.trajectory, len(at))
    if args.score:
        figures = score(m.task, images, whole, m.flags["size"] / 32)
        told = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
        print(f"{n} pictures, s = {args.scale:g}, {n_steps} {args.sampler.upper()} steps: {told}")

if __name__ == "__main__":
    tr.run(main, parse_args)
