"""Stage one: train the autoencoder (perceptual + adversarial + KL or VQ) on pictures alone.

    python train_ae.py                                      # toy: built-in world, CPU, a minute
    python train_ae.py --data photos/ --size 64 --steps 5000                # a folder or .zip
    python train_ae.py --data photos/ --preset vq-f4        # a model of Table 8, on one GPU
    torchrun --nproc-per-node 8 train_ae.py --data photos/  # the same run, each batch shared by 8

Writes OUT/ckpt.pt (all that resuming needs; ckpt.old.pt: the one before), log.jsonl, recon_*.png
(pictures above their reconstructions), with matplotlib curves.png. The same command goes on."""
import math
from argparse import BooleanOptionalAction
from dataclasses import asdict

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from tinyldm import patchgan, presets, require, training as tr
from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.checkpoint import resume, save_checkpoint, states
from tinyldm.data import batch_order, data_flags, loader, open_data
from tinyldm.features import feature_flags, open_features
from tinyldm.metrics import Statistics, compare, gradient, psnr, ssim
from tinyldm.perceptual import Perceptual
from tinyldm.pictures import save_curves, save_grid
from tinyldm.quantize import Codebook, count, perplexity
from tinyldm.score import score

def parse_args(argv=None):
    p = tr.training_flags(__doc__, "out/ae", 500, 256)
    data_flags(p)
    g = p.add_argument_group("model")
    g.add_argument("--ch", type=int, help="width at full resolution")
    g.add_argument("--ch-mult", type=int, nargs="+", help="width of each level; f = 2^(levels - 1)")
    g.add_argument("--n-res", type=int, help="ResBlocks a level")
    g.add_argument("--c-z", type=int, help="latent channels")
    g.add_argument("--groups", type=int, help="of GroupNorm")
    g.add_argument("--attn-res", type=int, nargs="*", default=(), help="sides of grids that attend")
    g.add_argument("--attn-mid", action=BooleanOptionalAction, default=True, help="in the middle")
    g.add_argument("--reg", choices=["kl", "vq"], default="kl", help="regulariser of the latents")
    g.add_argument("--n-codes", type=int, default=256, help="size of the codebook; vq only")
    g = p.add_argument_group("loss")
    g.add_argument("--pixel-loss", choices=["l1", "l2"], help="the paper's code has l1")
    g.add_argument("--perceptual", choices=["vgg16", "random", "none"])
    g.add_argument("--perceptual-weight", type=float)
    g.add_argument("--kl-weight", type=float, default=1e-6, help="of z's KL, a pixel value")
    g.add_argument("--codebook-weight", type=float, default=1.0, help="of VQ's two terms together")
    g.add_argument("--vq-beta", type=float, default=0.25, help="weight of one of VQ's terms")
    g.add_argument("--vq-beta-on", choices=["codebook", "commitment"], default="codebook",
                   help="that term; VQ-VAE: commitment, the paper's models: codebook")
    g.add_argument("--restart-codes", type=int, default=0, help="idle for so many steps; 0: never")
    g.add_argument("--disc-weight", type=float, help="of the adversarial term, times lam; 0: none")
    g.add_argument("--disc-start", type=int, help="step after which D_psi is trained and used")
    g.add_argument("--disc-loss", choices=["hinge", "vanilla"], default="hinge")
    g.add_argument("--disc-ch", type=int, help="width of D_psi")
    g.add_argument("--disc-layers", type=int, help="strided layers of D_psi; 3 see 70x70 pixels")
    feature_flags(p)
    return tr.parse(p, presets.AE, argv)

def configure(args) -> AEConfig:
    """The shape of E, D and the latent space. Raises BadInput."""
    require(args.reg != "vq" or args.n_codes > 0, f"--n-codes {args.n_codes}: must be at least 1")
    cfg = AEConfig(3, args.ch, tuple(args.ch_mult), args.n_res, args.c_z, args.groups, args.size,
                   tuple(args.attn_res), args.attn_mid, args.n_codes if args.reg == "vq" else None)
    require(args.size % cfg.f == 0,
            f"--size {args.size} is not divisible by f = {cfg.f}, which --ch-mult sets")
    require(args.size >= 3 * 2 ** args.disc_layers or args.disc_weight == 0,
            f"--size {args.size}: --disc-layers {args.disc_layers} are too many for it")
    return cfg

def losses(args, perceptual, x, x_rec, q) -> tuple[Tensor, Tensor, dict]:
    """-> loss_rec, the weighted loss_reg, and what to log; q is the Autoencoder's second output.
    NB: the released KL model's loss is summed over pixels and divided by B, its VQ model's is a
    mean. Ours are means: times 3HW they are the former. The sum is also divided by exp(logvar), a
    parameter that reaches no optimiser and stays 0; it is left out."""
    d = x - x_rec.float()
    loss_pixel = d.abs().mean() if args.pixel_loss == "l1" else d.square().mean()
    loss_p = perceptual(x, x_rec).mean() if perceptual else 0 * loss_pixel
    told = dict(rec=loss_pixel, perceptual=loss_p)
    if args.reg == "kl":
        loss_kl = q.kl().mean()                                                 # nats a picture
        loss_reg = args.kl_weight * loss_kl / x[0].numel()
        told |= dict(kl=loss_kl / q.mean[0].numel(), z_std=q.std())
    else:
        loss_vq = q.loss(args.vq_beta, args.vq_beta_on)
        loss_reg = args.codebook_weight * loss_vq
        told |= dict(codebook=loss_vq, z_std=q.z.std())
    return loss_pixel + args.perceptual_weight * loss_p, loss_reg, told

def track_codes(codebook: Codebook, idle: Tensor, k: Tensor, z: Tensor, args, g) -> dict:
    """After a VQ step of codes k, latents z: restart codes long idle; -> what to log.
    idle (n_codes,): steps since each code was last chosen; updated in place. g: the step's."""
    n = count(k, len(idle))
    idle += 1
    idle[n > 0] = 0
    stale = idle >= args.restart_codes
    if args.restart_codes > 0 and stale.any():
        codebook.restart(stale, z, g)
        idle[stale] = 0
    return dict(codes_used=(n > 0).sum(), perplexity=perplexity(n))

@torch.no_grad()
def evaluate(ae: Autoencoder, net, x: Tensor, device) -> tuple[Tensor, dict]:
    """x_rec of held-out pictures, at q's mean or the nearest codes, and how good they are.
    edges: mean length of the gradients, over that of x. bits of a picture's latents: KL's are
    KL(q, N(0, 1)), as coded with bits-back; VQ's the entropy of how often each code is chosen."""
    q = [ae.encode(v.to(device)) for v in x.split(16)]
    x_rec = torch.cat([ae.decode(part.mean).float().cpu() for part in q])
    if ae.codebook:
        k = torch.cat([ae.codebook(part.mean * ae.z_std).k for part in q])
        bits = k[0].numel() * perplexity(torch.bincount(k.flatten())).log2()
    else:
        bits = (torch.cat([part.kl() for part in q]) / math.log(2)).mean()
    real, fake = (Statistics(net, (v.to(device) for v in u.split(64))) for u in (x, x_rec))
    return x_rec, dict(
        held_out_psnr=psnr(x, x_rec).mean(), held_out_ssim=ssim(x, x_rec).mean(),
        edges=gradient(x_rec).mean() / gradient(x).mean(), bits=bits, **compare(real, fake))

HEALTHY = {"kl": "kl 1..9 nats a latent value; z_std 0.5..4",
           "vq": "codebook far below rec; z_std steady; codes_used and perplexity rise towards "
                 "--n-codes (where they stay at a few, try --restart-codes 50)"}

def main(args):
    # ---- setup
    device, autocast, rank, world = tr.setup(args.device, args.dtype)
    n_micro = tr.check(args, world)
    cfg = configure(args)
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):
        ae, disc = Autoencoder(cfg), patchgan.Discriminator(3, args.disc_ch, args.disc_layers)
    side = args.size // cfg.f
    if rank == 0:
        parts = ", ".join(f"{name} {tr.n_params(m):,}" for name, m in ae.named_children())
        print(f"autoencoder {tr.n_params(ae):,} parameters ({parts}) | D_psi {tr.n_params(disc):,} "
              f"| f = {cfg.f}, z ({cfg.c_z}, {side}, {side}) | {device}, {world} process(es)")
    if args.dry_run:
        return tr.dry_run(args, ae, disc)

    # ---- data
    data, held_out = open_data(args), open_data(args, "held-out")
    val = [held_out[i]["image"] for i in range(min(len(held_out), args.eval_n) if rank == 0 else 0)]

    # ---- model
    ae, disc = (net.to(device, memory_format=torch.channels_last) for net in (ae, disc))
    perceptual = (None if args.perceptual == "none" else
                  Perceptual(args.perceptual, args.vgg_weights).to(device))
    features = open_features(args, device) if val else None
    gan_loss = {"hinge": patchgan.hinge_loss, "vanilla": patchgan.vanilla_loss}[args.disc_loss]
    if world > 1 and device.type == "cuda":     # on a CPU BatchNorm sees its own process only
        disc = nn.SyncBatchNorm.convert_sync_batchnorm(disc)
    run_ae, run_disc = (torch.compile(net) if args.compile else net for net in (ae, disc))
    if world > 1:
        run_ae, run_disc = DDP(run_ae), DDP(run_disc, broadcast_buffers=False)

    # ---- optimisers, resume
    nets = {"ae": ae, "disc": disc}
    opts = {k: torch.optim.Adam(net.parameters(), betas=args.betas, fused=True)
            for k, net in nets.items()}
    clips = {opts["ae"]: args.clip, opts["disc"]: math.inf}
    idle = torch.zeros(cfg.n_codes or 0, dtype=torch.int64, device=device)
    config = {"autoencoder": asdict(cfg),
              "discriminator": {"ch": args.disc_ch, "n_layers": args.disc_layers}}
    parts, path = {"nets": nets, "opts": opts}, args.out / "ckpt.pt"
    ckpt = resume(path, "autoencoder", config, parts)
    done = ckpt["step"]
    idle.copy_(ckpt.get("idle", idle))
    def save(step):
        out = {"kind": "tinyldm autoencoder", "step": step, "config": config, "idle": idle}
        if rank == 0:
            save_checkpoint(out | {"args": tr.plain(args)} | states(parts), path, keep=True)
    def judge(step):
        if not val:
            return run.note("no picture is held out, so nothing is judged; of 20 or more one is")
        x = torch.stack(val)
        with autocast():
            x_rec, figures = evaluate(ae, features, x, device)
        if args.data == "shapes":
            told = [{"caption": c} for c in held_out.captions()]
            figures["captions_still_true"] = score("text", x_rec, told)["prompts_followed"]
        rows = [v[i:i + 10] for i in range(0, min(len(x), 30), 10) for v in (x, x_rec)]
        save_grid(torch.cat(rows), args.out / f"recon_{step:06d}.png", min(10, len(x)))
        run.write(step, **figures)
        save_curves(run.path, args.out / "curves.png")

    # ---- loop
    run = tr.Run(args, done, device, rank)
    run.note(f"healthy: rec and perceptual fall; {HEALTHY[args.reg]}; with D_psi, lam "
             "stays below 10 and d_real a little above d_fake")
    def loss_ae(x, noise, gan):
        x_rec, q = run_ae(x, noise)
        loss_rec, loss_reg, told = losses(args, perceptual, x, x_rec, q)
        loss = loss_rec + loss_reg
        if gan:
            loss_adv = patchgan.generator_loss(disc, x_rec)
            lam = patchgan.adaptive_weight(loss_rec, loss_adv, ae.decoder.layers[-1].weight)
            loss = loss + args.disc_weight * lam * loss_adv
            told |= dict(adv=loss_adv, lam=lam)
        return loss, told, (x_rec, q.k, q.z) if cfg.n_codes else (x_rec,)
    def loss_disc(x, x_rec):
        real, fake = run_disc(x), run_disc(x_rec)
        loss = gan_loss(real.float(), fake.float())
        return loss, dict(disc=loss, d_real=real.mean(), d_fake=fake.mean()), ()
    order = batch_order(len(data), args.batch, done, args.steps, args.seed, rank, world, data.tars)
    batches = loader(data, order, args.workers, device.type == "cuda")
    for step, batch in zip(run.steps(save, judge), batches):
        gan = args.disc_weight > 0 and step > args.disc_start
        x = batch["image"].to(device, memory_format=torch.channels_last, non_blocking=True)
        g = tr.generator(args.seed, step)
        noise = torch.randn(args.batch, cfg.c_z, side, side, generator=g).chunk(world)[rank]
        norms = {k: v.clone() for k, v in disc.named_buffers()}     # BatchNorm's
        loss, told, (x_rec, *used) = tr.accumulate(
            loss_ae, (x, noise.to(device)), n_micro, autocast, [run_ae], gan=gan)
        if gan:
            more, said, _ = tr.accumulate(loss_disc, (x, x_rec), n_micro, autocast, [run_disc])
            loss, told = loss + more, told | said
        if not run.update(step, loss, clips, told):
            disc.load_state_dict(norms, strict=False)
        elif used:
            run.sums.update(track_codes(ae.codebook, idle, *used, args, g))

if __name__ == "__main__":
    tr.run(main, parse_args)
