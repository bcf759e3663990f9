"""Stage two: train the latent diffusion model, eps_theta with tau, on the frozen encoder's latents.

    python train_ldm.py                                     # toy, after train_ae.py: CPU, minutes
    python train_ldm.py --ae out/photos-ae/ckpt.pt --data photos/ --size 64 --n-token 24
    python train_ldm.py --task class --out out/class        # uncond, layout, semantic, ...
    python train_ldm.py --preset sd-v1 --dry-run            # a row of the paper: only its sizes
    torchrun --nproc-per-node 8 train_ldm.py --data ...     # the same run, each batch shared by 8

Writes OUT/ckpt.pt (all that resuming and sampling need; ckpt.old.pt: the one before), log.jsonl,
samples_*.png, with matplotlib curves.png and, at the end, model.pt (sampling's part, fp16). The
same command again goes on, wherever it was killed."""
import copy
from argparse import BooleanOptionalAction
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

from tinyldm import presets, require, shapes, training as tr, trying
from tinyldm.attention import SpatialTransformer
from tinyldm.autoencoder import AEConfig, Autoencoder, Pixels, Posterior, build_autoencoder
from tinyldm.checkpoint import half, load_checkpoint, resume, save_checkpoint, states
from tinyldm.conditioning import TextBlock
from tinyldm.data import Latents, batch_order, data_flags, encode, fingerprint, loader, open_data
from tinyldm.diffusion import SCHEDULES, as_eps_theta, cumulative, draw_t, ldm_loss, snr_weight
from tinyldm.features import feature_flags, open_features
from tinyldm.generate import Model, defaults, draw
from tinyldm.guidance import drop_condition
from tinyldm.layers import ResBlock
from tinyldm.metrics import Statistics, compare, read
from tinyldm.pictures import save_curves, save_drawn
from tinyldm.score import score
from tinyldm.tasks import TASKS
from tinyldm.unet import UNet, UNetConfig

def model_flags(parser) -> None:
    g = parser.add_argument_group("model")
    switch = dict(action=BooleanOptionalAction, default=False)
    g.add_argument("--ch", type=int, help="width of the U-Net")
    g.add_argument("--ch-mult", type=int, nargs="+", help="width of each level")
    g.add_argument("--n-res", type=int, help="ResBlocks a level")
    g.add_argument("--attn-res", type=int, nargs="*", help="sides of the latent grid that attend")
    g.add_argument("--d-head", type=int, help="width of the U-Net's heads; or, instead of it,")
    g.add_argument("--n-head", type=int, help="number of heads, at each place that attends")
    g.add_argument("--depth", type=int, help="transformer blocks at each place that attends")
    g.add_argument("--groups", type=int, help="of GroupNorm")
    g.add_argument("--scale-shift", **switch, help="the timestep scales and shifts norms")
    g.add_argument("--res-updown", **switch, help="ResBlocks, not convs, down- and upsample")
    g.add_argument("--n-token", type=int, help="of a caption; or 3 a box")
    g.add_argument("--d-ctx", type=int, help="width of tau and its context")
    g.add_argument("--text-depth", type=int, help="blocks of tau")
    g.add_argument("--text-heads", type=int, help="heads of tau")
    g.add_argument("--text-d-head", type=int, help="and their width")
    g.add_argument("--text-clip", **switch, help="tau as CLIP's: causal, with biases")
    g.add_argument("--n-classes", type=int, help="of labels or label maps")
    g.add_argument("--vocab-size", type=int, help="most pieces of words (8192), or places (1025)")

def parse_args(argv=None):
    p = tr.training_flags(__doc__, "out/ldm", 1000, 64)
    g = p.add_argument_group("stage one and task")
    g.add_argument("--ae", default="out/ae/ckpt.pt", type=Path, help="stage one; none: pixels")
    g.add_argument("--ae-preset", choices=[*presets.AE, "none"], help="the same, for a dry run")
    g.add_argument("--task", choices=TASKS, default="text", help="what the condition is")
    data_flags(p)
    p.add_argument("--cache-latents", action=BooleanOptionalAction, default=True, help="on disk")
    model_flags(p)
    g = p.add_argument_group("diffusion")
    g.add_argument("--predict", choices=["eps", "v"], help="what the U-Net says; paper: eps")
    g.add_argument("--snr-clamp", type=float, nargs=2, help="weights of z_0's errors; paper: 0 inf")
    g.add_argument("--loss", choices=["l1", "l2"], default="l2")
    g.add_argument("--schedule", choices=SCHEDULES)
    g.add_argument("--beta-range", type=float, nargs=2, default=(), help="the schedule's ends")
    g.add_argument("--z-std", type=float, help="of stage one's latents; default: measured")
    g.add_argument("--T", type=int, default=1000)
    g.add_argument("--p-drop", type=float, default=0.1, help="share of conditions dropped")
    p.add_argument("--ema", type=float, help="decay of the averaged weights")
    p.add_argument("--ckpt-grad", action="store_true", help="less memory: compute twice")
    p.add_argument("--fsdp", action="store_true", help="each process holds a part of the weights")
    feature_flags(p)
    return tr.parse(p, presets.LDM, argv)

def load_stage_one(path: Path) -> Autoencoder | Pixels:
    """The frozen autoencoder of a checkpoint of stage one. Raises BadInput."""
    if str(path) == "none":
        return Pixels()
    ckpt = load_checkpoint(path, "autoencoder", "--ae")
    with trying(f"--ae {path}: its parts do not fit together"), torch.device("meta"):
        ae = build_autoencoder(ckpt["config"]["autoencoder"])
        ae.load_state_dict(ckpt["nets"]["ae"], assign=True)
    return ae.eval().requires_grad_(False)

def configure(args, ae: AEConfig) -> UNetConfig:
    """The shape of eps_theta. Raises BadInput for flags that clash, or do not fit the latents."""
    require(args.n_head or args.d_head, "--d-head or --n-head: one of them is needed")
    require(args.schedule != "cosine" or not args.beta_range, "--beta-range: cosine has no ends")
    unet = presets.unet_config(vars(args), ae)
    k = ae.f * unet.factor
    require(args.size % k == 0, f"--size {args.size} is not a multiple of {k}, the autoencoder's "
            f"f = {ae.f} times the U-Net's factor {unet.factor}")
    superres = args.task == "superres" and args.size % 4
    require(not superres, f"--size {args.size}: superres needs a multiple of 4")
    return unet

def examples(args, held_out, labels: list[str]) -> list[dict]:
    """The --eval-n conditions of the pictures that show progress: held-out ones, or classes."""
    toy, n, pool = args.data == "shapes", args.eval_n, held_out
    if args.task == "text" and toy:
        return [{"caption": p} for p in shapes.prompts(n)]
    if args.task == "class":
        pool = [{"label": k} for k in (shapes.SEEN if toy else range(len(labels)))]
    return [pool[i % len(pool)] for i in range(n)]

@torch.no_grad()
def held_out_loss(m: Model, q: Posterior, y: torch.Tensor) -> dict[str, float]:
    """Eq. (2) on held-out pairs, the mean over a latent, by noise level: t of each quarter of T."""
    g, T, device = tr.generator(0, 0), len(m.abar), m.abar.device
    losses = []
    for mean, logvar, y_i in zip(*(v.to(device).split(64) for v in (q.mean, q.logvar, y))):
        noise, eps = (torch.randn(mean.shape, generator=g).to(device) for _ in range(2))
        z, ctx = Posterior(mean, logvar).sample(noise), TASKS[m.task].ctx(y_i, m.tau, m.ae)
        t = (torch.arange(len(z), device=device) + 0.5) / len(z) / 4
        losses.append(torch.stack([ldm_loss(
            as_eps_theta(m.unet, m.abar, m.predict), z, ((t + k / 4) * T).long(), eps, m.abar, ctx)
            for k in range(4)]))
    return {f"held_out_loss_at_{k * T // 4}": v
            for k, v in enumerate(torch.cat(losses, dim=1).mean(1).tolist())}

def judging(m: Model, args, data, held_out, to_y, run, autocast):
    """-> judge(step): Eq. (2) on held-out pairs, or else training; --eval-n drawn pictures' scores
    and their distance to 2,048 of the set. To the log; pictures and curves to --out."""
    device, other = m.abar.device, held_out if len(held_out) else data
    features, items = open_features(args, device), examples(args, other, data.labels)
    spread = range(0, len(data), -(-len(data) // 2048))     # files are sorted, perhaps by class
    real = Statistics(features, read(data, spread, args.workers, device))
    with autocast():
        pairs, = encode(m.ae, other, [range(min(256, len(other)))], args.workers, device, to_y)
    how = defaults(steps=min(25, args.T), size=(args.size, args.size))
    if args.task == "text":
        run.note("each grid shows\n  " + "\n  ".join(i["caption"] for i in items[:16]))
    def judge(step):
        with autocast():
            loss = held_out_loss(m, *pairs)
            images = torch.cat([draw(m, items[i:i + 16], how, i) for i in range(0, len(items), 16)])
        save_drawn(images[:16], items[:16], args.task, m.classes,
                   args.out / f"samples_{step:06d}.png", 8)
        figures = score(args.task, images, items) if args.data == "shapes" else {}
        drawn = Statistics(features, (v.to(device) for v in images.split(64)))
        run.write(step, **loss, **figures, **compare(real, drawn))
        save_curves(run.path, args.out / "curves.png")
    return judge

def plan(args) -> None:
    """The dry run of a row that has no data: its networks' sizes, stage one's too."""
    ae, unet, tau = presets.networks(vars(args))
    n_ae, n_unet, n_tau = (tr.n_params(net) if net else 0 for net in (ae, unet, tau))
    print(f"U-Net {n_unet:,} | tau {n_tau:,} | autoencoder {args.ae_preset} {n_ae:,} parameters | "
          f"task {args.task}, U-Net's input ({unet.cfg.c_in}, {unet.cfg.side}, {unet.cfg.side})")
    tr.dry_run(args, *filter(None, (unet, tau)))

def main(args):
    # ---- setup
    if args.dry_run and not args.data:
        return plan(args)
    device, autocast, rank, world = tr.setup(args.device, args.dtype)
    n_micro = tr.check(args, world)
    ae = load_stage_one(args.ae).to(device, memory_format=torch.channels_last)

    # ---- data
    task = TASKS[args.task]
    data, held_out = (open_data(args, split, task.fields) for split in ("train", "held-out"))
    names = data.labels if args.task == "class" else data.classes
    names = () if args.task == "semantic" and args.data != "shapes" else names  # numbers only
    tokenizer = task.fit(args, data, held_out) if task.fit else None

    # ---- model
    cfg = configure(args, ae.cfg)
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):
        unet, tau = UNet(cfg), presets.condition_encoder(vars(args), ae.cfg.f)
    if rank == 0:
        print(f"U-Net {tr.n_params(unet):,} parameters | tau {tr.n_params(tau) if tau else 0:,}, "
              f"task {args.task}, z ({cfg.c_in}, {cfg.side}, {cfg.side}), {len(data):,} pictures")
    if args.dry_run:
        return tr.dry_run(args, *filter(None, (unet, tau)))
    unet, tau = unet.to(device, memory_format=torch.channels_last), tau and tau.to(device)
    nets = {"unet": unet} | ({"tau": tau} if tau else {})
    unet.ckpt_grad = args.ckpt_grad
    schedule = {"name": args.schedule, "T": args.T, "beta_range": tuple(args.beta_range),
                "predict": args.predict}
    abar = cumulative(SCHEDULES[args.schedule](args.T, *args.beta_range)).to(device)
    ema = tr.EMA(nets, args.ema)
    shown = copy.deepcopy(ema.nets) if args.fsdp and rank == 0 else ema.nets
    for net in (*nets.values(), *ema.nets.values()) if args.fsdp else ():
        for block in net.to(memory_format=torch.contiguous_format).modules():
            if isinstance(block, ResBlock | SpatialTransformer | TextBlock):
                fully_shard(block)
        fully_shard(net)
    run_unet, run_tau = (torch.compile(net) if net and args.compile else net for net in (unet, tau))
    if world > 1 and not args.fsdp:
        run_unet, run_tau = DDP(run_unet), tau and DDP(run_tau)
    run_nets = [net for net in (run_unet, run_tau) if net]
    eps_theta = as_eps_theta(run_unet, abar, args.predict)

    # ---- optimiser, resume
    opt = torch.optim.AdamW(nn.ModuleDict(nets).parameters(), betas=args.betas, fused=True)
    config = {"task": {"name": args.task}, "autoencoder": asdict(ae.cfg), "unet": asdict(cfg),
              "tau": task.shape(vars(args), ae.cfg.f) if task.shape else {}, "schedule": schedule}
    parts, path = {"nets": nets, "ema": ema.nets, "ae": ae, "opt": opt}, args.out / "ckpt.pt"
    ckpt = resume(path, "ldm", config, parts)
    done, ema.n = ckpt["step"], ckpt.get("ema_n", 0)

    # ---- latents
    m = Model(ae, shown["unet"], shown.get("tau"), tokenizer, abar, args.predict, args.task,
              tuple(names), tr.plain(args))

    def to_y(batch):
        return task.y(batch, tau, tokenizer)
    y_null = to_y(task.null)
    n = len(data) * (2 if args.flip else 1)
    with autocast():
        if args.cache_latents:
            what = [data, config["task"], config["tau"], tokenizer and tokenizer.to_str()]
            cache = Latents(args.out.parent / "latents" / fingerprint(ae, *what), ae, data, n,
                            args.workers, device, to_y, rank, world)
        elif done == 0:
            (cache, _), = encode(ae, data, [range(min(n, 4096))], args.workers, device,
                                 TASKS["uncond"].y, rank == 0)
    if done == 0:
        ae.z_std.copy_(cache.std() if args.z_std is None else torch.tensor(args.z_std))
    order = batch_order(len(data), args.batch, done, args.steps, args.seed, rank, world, data.tars)

    def batches():
        """q(z | x) and y of this process's pictures, step by step."""
        if args.cache_latents:
            for items in order:
                q, y = cache[[i % n for i in items]]
                yield q.scaled(ae.z_std.cpu()), y
        else:
            for b in loader(data, order, args.workers, device.type == "cuda"):
                with torch.no_grad(), autocast():
                    q = ae.encode(b["image"].to(device))
                yield q, to_y(b)

    def save(step):
        out = {"kind": "tinyldm ldm", "step": step, "config": config, "size": args.size,
               "args": tr.plain(args), "classes": list(names),
               "tokenizer": tokenizer.to_str() if tokenizer else None}
        now = states(parts)
        if step == args.steps and rank == 0:    # first: killed in between, the run makes it again
            save_checkpoint(out | half({k: now[k] for k in ("ae", "ema")}), args.out / "model.pt")
        if rank == 0:
            save_checkpoint(out | now | {"ema_n": ema.n}, path, keep=True)

    def judge(step):
        now = states(ema.nets) if args.fsdp else {}
        if rank == 0:
            for k, state in now.items():
                shown[k].load_state_dict(state)
            judged(step)

    # ---- loop
    run = tr.Run(args, done, device, rank)
    run.note("healthy: loss falls fast from 1 to 0.1, then slowly; gnorm below 1; z_std 1")
    judged = rank == 0 and args.eval_n > 0 and run.judged < args.steps and judging(
        m, args, data, held_out, to_y, run, autocast)
    def loss_of(z, t, eps, y):
        loss = ldm_loss(eps_theta, z, t, eps, abar, task.ctx(y, run_tau, ae), args.loss)
        return (loss * snr_weight(t, abar, *args.snr_clamp)).mean(), {}, ()
    for step, (q, y) in zip(run.steps(save, judge), batches()):
        g = tr.generator(args.seed, step)
        noise, eps = (torch.randn(args.batch, *q.mean.shape[1:], generator=g) for _ in range(2))
        t = draw_t(args.batch, args.T, g)
        drop = torch.rand(args.batch, generator=g) < args.p_drop
        noise, eps, t, drop = (v.chunk(world)[rank].to(device) for v in (noise, eps, t, drop))
        z = Posterior(q.mean.to(device), q.logvar.to(device)).sample(noise)
        y = drop_condition(y.to(device), y_null[0].to(device, y.dtype), drop)
        loss, *_ = tr.accumulate(loss_of, (z, t, eps, y), n_micro, autocast, run_nets)
        if run.update(step, loss, {opt: args.clip}, dict(loss=loss, z_std=z.std())):
            ema.update()

if __name__ == "__main__":
    tr.run(main, parse_args)
