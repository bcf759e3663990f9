"""Stage two: train the latent diffusion model, eps_theta with tau, on the frozen encoder's latents.

    python train_ldm.py                                     # toy, after train_ae.py: CPU, minutes
    python train_ldm.py --ae out/photos-ae/ckpt.pt --data photos/ --size 64 --n-token 24
    python train_ldm.py --task class --out out/class        # uncond, layout, semantic, ...
    python train_ldm.py --preset sd-v1 --dry-run            # a row of the paper: only its sizes
    torchrun --nproc-per-node 8 train_ldm.py --data ...     # the same run, each batch shared by 8

Writes OUT/ckpt.pt (all to resume or sample; ckpt.old.pt: the one before), log.jsonl, samples_*.png,
with matplotlib curves.png, at the end model.pt (fp16, to sample). The same command goes on."""
import copy
from pathlib import Path

import torch

from tinyldm import guidance, layers, presets, require, score, shapes, training as tr, trying
from tinyldm.attention import SpatialTransformer
from tinyldm.autoencoder import Autoencoder, Pixels, Posterior, build_autoencoder
from tinyldm.checkpoint import half, load_checkpoint, resume, save_checkpoint, states
from tinyldm.conditioning import TextBlock
from tinyldm.data import Latents, batch_order, data_flags, encode, fingerprint, loader, open_data
from tinyldm.diffusion import SCHEDULES, as_eps_theta, cumulative, draw_t, ldm_loss, snr_weight
from tinyldm.features import feature_flags, open_features
from tinyldm.generate import Model, defaults, draw
from tinyldm.metrics import Statistics, compare, read
from tinyldm.pictures import save_curves, save_drawn
from tinyldm.tasks import TASKS
from tinyldm.unet import UNet

def parse_args(argv=None):
    p = tr.training_flags(__doc__, "out/ldm", 1000, 64)
    data_flags(p)
    tr.group(p, "stage one and task", ae=(Path, "stage one; none: pixels", "out/ae/ckpt.pt"),
             ae_preset=([*presets.AE, "none"], "the same, for a dry run"),
             task=(TASKS, "what the condition is", "text"), cache_latents=(bool, "on disk", True))
    tr.group(p, "model", ch=(int, "width of the U-Net"), n_res=(int, "ResBlocks a level"),
             ch_mult=(int, "width of each level", None, "+"), groups=(int, "of GroupNorm"),
             attn_res=(int, "sides of grids that attend", None, "*"), depth=(int, "blocks there"),
             d_head=(int, "width of the U-Net's heads"), n_head=(int, "or their number"),
             scale_shift=(bool, "the timestep scales and shifts norms", False),
             res_updown=(bool, "ResBlocks, not convs, down- and upsample", False),
             n_token=(int, "of a caption; or 3 a box"), text_depth=(int, "blocks of tau"),
             d_ctx=(int, "width of tau and its context"), text_heads=(int, "heads of tau"),
             text_d_head=(int, "and their width"), n_classes=(int, "of labels or label maps"),
             text_clip=(bool, "tau as CLIP's: causal, with biases", False),
             vocab_size=(int, "most pieces of words (8192), or places (1025)"))
    tr.group(p, "diffusion", predict=(["eps", "v"], "what the U-Net says; paper: eps"),
             snr_clamp=(float, "weights of z_0's errors; paper: 0 inf", None, 2),
             p_drop=(float, "share of conditions dropped", 0.1), schedule=(SCHEDULES, "of beta"),
             loss=(["l1", "l2"], "of eps", "l2"), ema=(float, "decay of averaged weights"),
             beta_range=(float, "the schedule's ends", (), 2), T=(int, "timesteps", 1000),
             z_std=(float, "of stage one's latents; default: measured"),
             ckpt_grad=(bool, "less memory: compute twice", False),
             fsdp=(bool, "each process holds a part of the weights", False))
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

@torch.no_grad()
def held_out_loss(m: Model, q: Posterior, y: torch.Tensor) -> dict[str, float]:
    """Eq. (2) on held-out pairs, the mean over a latent, by noise level: t of each quarter of T."""
    g, T, device = tr.generator(0, 0), len(m.abar), m.abar.device
    losses, eps_theta = [], as_eps_theta(m.unet, m.abar, m.predict)
    for mean, logvar, y_i in zip(*(v.to(device).split(64) for v in (q.mean, q.logvar, y))):
        noise, eps = (torch.randn(mean.shape, generator=g).to(device) for _ in range(2))
        z, ctx = Posterior(mean, logvar).sample(noise), TASKS[m.task].ctx(y_i, m.tau, m.ae)
        t = (torch.arange(len(z), device=device) + 0.5) / len(z) / 4
        losses.append(torch.stack([ldm_loss(
            eps_theta, z, ((t + k / 4) * T).long(), eps, m.abar, ctx) for k in range(4)]))
    means = torch.cat(losses, dim=1).mean(1).tolist()
    return {f"held_out_loss_at_{k * T // 4}": v for k, v in enumerate(means)}

def judging(m: Model, args, data, held_out, to_y, run, autocast):
    """-> judge(step): Eq. (2) on held-out pairs, or else training; --eval-n drawn pictures' scores
    and their distance to 2,048 of the set. To the log; pictures and curves to --out."""
    device, toy, n = m.abar.device, args.data == "shapes", args.eval_n
    features, other = open_features(args, device), held_out if len(held_out) else data
    labels = shapes.SEEN if toy else range(len(data.labels))
    pool = [{"label": k} for k in labels] if args.task == "class" else other
    items = ([{"caption": p} for p in shapes.prompts(n)] if toy and args.task == "text" else
             [pool[i % len(pool)] for i in range(n)])
    spread = range(0, len(data), -(-len(data) // 2048))     # files are sorted, perhaps by class
    real = Statistics(features, read(data, spread, args.workers, device))
    with autocast():
        pairs, = encode(m.ae, other, [range(len(other))[:256]], args.workers, device, to_y)
    how = defaults(steps=min(25, args.T), size=(args.size, args.size))
    if args.task == "text":
        run.note("each grid shows\n  " + "\n  ".join(i["caption"] for i in items[:16]))
    def judge(step):
        with autocast():
            loss = held_out_loss(m, *pairs)
            images = torch.cat([draw(m, items[i:i + 16], how, i) for i in range(0, len(items), 16)])
        save_drawn(images[:16], items[:16], args.task, m.classes,
                   args.out / f"samples_{step:06d}.png", 8)
        figures = score.score(args.task, images, items) if toy else {}
        drawn = Statistics(features, (v.to(device) for v in images.split(64)))
        run.write(step, **loss, **figures, **compare(real, drawn))
        save_curves(run.path, args.out / "curves.png")
    return judge

def main(args):
    # ---- setup
    if args.dry_run and not args.data:          # a row's networks, its stage one's too
        ae, unet, tau = nets = presets.networks(vars(args))
        cfg, (n_ae, n_unet, n_tau) = unet.cfg, map(tr.n_params, nets)
        print(f"U-Net {n_unet:,} | tau {n_tau:,} | autoencoder {args.ae_preset} {n_ae:,} parameters"
              f" | task {args.task}, U-Net's input ({cfg.c_in}, {cfg.side}, {cfg.side})")
        return tr.dry_run(args, unet, tau)
    device, autocast, rank, world = tr.setup(args.device, args.dtype)
    n_micro = tr.check(args, world)
    require(world > 1 or not args.fsdp, "--fsdp: shares the weights of several processes; torchrun")
    ae = load_stage_one(args.ae).to(device, memory_format=torch.channels_last)

    # ---- data
    task = TASKS[args.task]
    data, held_out = (open_data(args, split, task.fields) for split in ("train", "held-out"))
    names = data.labels if args.task == "class" else data.classes
    names = () if args.task == "semantic" and args.data != "shapes" else names  # numbers only
    tokenizer = task.fit(args, data, held_out) if task.fit else None
    words = tokenizer and tokenizer.to_str()

    # ---- model
    require(args.n_head or args.d_head, "--d-head or --n-head: one of them is needed")
    require(args.schedule != "cosine" or not args.beta_range, "--beta-range: cosine has no ends")
    cfg = presets.unet_config(vars(args), ae.cfg)
    k = ae.cfg.f * cfg.factor
    require(args.size % k == 0, f"--size {args.size} is not a multiple of {k}, the autoencoder's "
            f"f = {ae.cfg.f} times the U-Net's factor {cfg.factor}")
    require(args.task != "superres" or args.size % 4 == 0,
            f"--size {args.size}: superres needs a multiple of 4")
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):
        unet, tau = UNet(cfg), presets.condition_encoder(vars(args), ae.cfg.f)
    if rank == 0:
        print(f"U-Net {tr.n_params(unet):,} parameters | tau {tr.n_params(tau):,}, "
              f"task {args.task}, z ({cfg.c_in}, {cfg.side}, {cfg.side}), {len(data):,} pictures")
    if args.dry_run:
        return tr.dry_run(args, unet, tau)
    unet, tau = unet.to(device, memory_format=torch.channels_last), tau and tau.to(device)
    nets = {"unet": unet} | ({"tau": tau} if tau else {})
    unet.ckpt_grad = args.ckpt_grad
    schedule = {"name": args.schedule, "T": args.T, "beta_range": tuple(args.beta_range),
                "predict": args.predict}
    abar = cumulative(SCHEDULES[args.schedule](args.T, *args.beta_range)).to(device)
    ema = tr.EMA(nets, args.ema)
    shown = copy.deepcopy(ema.nets) if args.fsdp and rank == 0 else ema.nets
    if args.fsdp:
        from torch.distributed.fsdp import fully_shard  # to import it takes a second
        for net in (*nets.values(), *ema.nets.values()):
            for block in net.to(memory_format=torch.contiguous_format).modules():
                if isinstance(block, layers.ResBlock | SpatialTransformer | TextBlock):
                    fully_shard(block)
            fully_shard(net)
    run_nets = {k: torch.compile(net) if args.compile else net for k, net in nets.items()}
    if world > 1 and not args.fsdp:
        run_nets = {k: torch.nn.parallel.DistributedDataParallel(v) for k, v in run_nets.items()}
    eps_theta = as_eps_theta(run_nets["unet"], abar, args.predict)

    # ---- optimiser, resume
    opt = torch.optim.AdamW(torch.nn.ModuleDict(nets).parameters(), betas=args.betas, fused=True)
    config = {"task": {"name": args.task}, "autoencoder": vars(ae.cfg), "unet": vars(cfg),
              "tau": task.shape(vars(args), ae.cfg.f), "schedule": schedule}
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
            what = [data, config["task"], config["tau"], words]
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
               "args": tr.plain(args), "classes": list(names), "tokenizer": words}
        now = states(parts)
        if rank == 0 and step == args.steps:    # first: killed in between, the run makes it again
            save_checkpoint(out | half({k: now[k] for k in ("ae", "ema")}), args.out / "model.pt")
        if rank == 0:
            save_checkpoint(out | now | {"ema_n": ema.n}, path, keep=True)
    def judge(step):
        for k, state in (states(ema.nets) if args.fsdp else {}).items():
            if rank == 0:
                shown[k].load_state_dict(state)
        if rank == 0:
            judged(step)

    # ---- loop
    run = tr.Run(args, done, device, rank)
    run.note("healthy: loss falls fast from 1 to 0.1, then slowly; gnorm below 1; z_std 1")
    judged = rank == 0 and args.eval_n > 0 and run.judged < args.steps and judging(
        m, args, data, held_out, to_y, run, autocast)
    def loss_of(z, t, eps, y):
        loss = ldm_loss(eps_theta, z, t, eps, abar, task.ctx(y, run_nets.get("tau"), ae), args.loss)
        return (loss * snr_weight(t, abar, *args.snr_clamp)).mean(), {}, ()
    for step, (q, y) in zip(run.steps(save, judge), batches()):
        g = tr.generator(args.seed, step)
        noise, eps = (torch.randn(args.batch, *q.mean.shape[1:], generator=g) for _ in range(2))
        t = draw_t(args.batch, args.T, g)
        drop = torch.rand(args.batch, generator=g) < args.p_drop
        noise, eps, t, drop = (v.chunk(world)[rank].to(device) for v in (noise, eps, t, drop))
        z = Posterior(q.mean.to(device), q.logvar.to(device)).sample(noise)
        y = guidance.drop_condition(y.to(device), y_null[0].to(device, y.dtype), drop)
        loss, *_ = tr.accumulate(loss_of, (z, t, eps, y), n_micro, autocast, run_nets.values())
        if run.update(step, loss, {opt: args.clip}, dict(loss=loss, z_std=z.std())):
            ema.update()

if __name__ == "__main__":
    tr.run(main, parse_args)
