"""Stage one: train the autoencoder (perceptual + adversarial + KL or VQ) on pictures alone.

    python train_ae.py                                      # toy: built-in world, CPU, a minute
    python train_ae.py --data photos/ --size 64 --steps 5000                # a folder or .zip
    python train_ae.py --data photos/ --preset vq-f4        # a model of Table 8, on one GPU
    torchrun --nproc-per-node 8 train_ae.py --data photos/  # the same run, each batch shared by 8

Writes OUT/ckpt.pt (all that resuming needs; ckpt.old.pt: the one before), log.jsonl, recon_*.png
(pictures above their reconstructions), with matplotlib curves.png. The same command goes on."""
import math

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from tinyldm import features, patchgan, pictures, presets, quantize, require, score, training as tr
from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.checkpoint import resume, save_checkpoint, states
from tinyldm.data import batch_order, data_flags, loader, open_data
from tinyldm.metrics import Statistics, compare, gradient, psnr, ssim
from tinyldm.perceptual import Perceptual

def parse_args(argv=None):
    p = tr.training_flags(__doc__, "out/ae", 500, 256)
    data_flags(p)
    tr.group(p, "model", ch=(int, "width at full resolution"), n_res=(int, "ResBlocks a level"),
             ch_mult=(int, "width of each level; f = 2^(levels - 1)", None, "+"),
             attn_res=(int, "sides of grids that attend", (), "*"), groups=(int, "of GroupNorm"),
             attn_mid=(bool, "attention in the middle", True), c_z=(int, "latent channels"),
             reg=(["kl", "vq"], "of latents", "kl"), n_codes=(int, "size of VQ's codebook", 256))
    tr.group(p, "loss", pixel_loss=(["l1", "l2"], "the paper's code has l1"),
             perceptual=(["vgg16", "random", "none"], "net"), perceptual_weight=(float, "of it"),
             kl_weight=(float, "of z's KL, a pixel value", 1e-6), disc_ch=(int, "width of D_psi"),
             codebook_weight=(float, "of VQ's terms", 1.0), vq_beta=(float, "of one of them", 0.25),
             vq_beta_on=(["codebook", "commitment"], "which; VQ-VAE: commitment", "codebook"),
             restart_codes=(int, "idle for so many steps; 0: never", 0),
             disc_weight=(float, "of the adversarial term, times lam; 0: none"),
             disc_start=(int, "step after which D_psi is trained and used"),
             disc_layers=(int, "strided layers of D_psi; 3 see 70x70 pixels"),
             disc_loss=(["hinge", "vanilla"], "of D_psi", "hinge"))
    features.feature_flags(p)
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
    NB: ours are means, as the released VQ model's; times 3HW they are the KL model's, a sum over
    pixels, divided by B (and by exp(logvar), which reaches no optimiser and stays 1: left out)."""
    d = x - x_rec.float()
    loss_pixel = d.abs().mean() if args.pixel_loss == "l1" else d.square().mean()
    loss_p = perceptual(x, x_rec).mean() if perceptual else 0 * loss_pixel
    loss_rec = loss_pixel + args.perceptual_weight * loss_p
    told = dict(rec=loss_pixel, perceptual=loss_p)
    if args.reg == "kl":
        loss_kl = q.kl().mean()                                                 # nats a picture
        told |= dict(kl=loss_kl / q.mean[0].numel(), z_std=q.std())
        return loss_rec, args.kl_weight * loss_kl / x[0].numel(), told
    loss_vq = q.loss(args.vq_beta, args.vq_beta_on)
    told |= dict(codebook=loss_vq, z_std=q.z.std())
    return loss_rec, args.codebook_weight * loss_vq, told

@torch.no_grad()
def evaluate(ae: Autoencoder, net, x: Tensor, device) -> tuple[Tensor, dict]:
    """x_rec of held-out pictures, at q's mean or the nearest codes, and how good they are. edges:
    mean length of the gradients, over x's. bits of a picture's latents: KL(q, N(0, 1)), as coded
    with bits-back; VQ's are the entropy of how often each code is chosen."""
    q = [ae.encode(v.to(device)) for v in x.split(16)]
    x_rec = torch.cat([ae.decode(part.mean).float().cpu() for part in q])
    if ae.codebook:
        k = torch.cat([ae.codebook(part.mean * ae.z_std).k for part in q])
        bits = k[0].numel() * quantize.perplexity(torch.bincount(k.flatten())).log2()
    else:
        bits = (torch.cat([part.kl() for part in q]) / math.log(2)).mean()
    real, fake = (Statistics(net, (v.to(device) for v in u.split(64))) for u in (x, x_rec))
    return x_rec, dict(
        held_out_psnr=psnr(x, x_rec).mean(), held_out_ssim=ssim(x, x_rec).mean(),
        edges=gradient(x_rec).mean() / gradient(x).mean(), bits=bits, **compare(real, fake))

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
    net = features.open_features(args, device) if val else None
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
    config = {"autoencoder": vars(cfg),
              "discriminator": {"ch": args.disc_ch, "n_layers": args.disc_layers}}
    parts, path = {"nets": nets, "opts": opts}, args.out / "ckpt.pt"
    ckpt = resume(path, "autoencoder", config, parts)
    done = ckpt["step"]
    idle = ckpt.get("idle", torch.zeros(cfg.n_codes or 0).long()).to(device)
    def save(step):
        out = {"kind": "tinyldm autoencoder", "step": step, "config": config, "idle": idle}
        if rank == 0:
            save_checkpoint(out | {"args": tr.plain(args)} | states(parts), path, keep=True)
    def judge(step):
        if not val:
            return run.note("no picture is held out, so nothing is judged; of 20 or more one is")
        x = torch.stack(val)
        with autocast():
            x_rec, figures = evaluate(ae, net, x, device)
        if args.data == "shapes":
            told = [{"caption": c} for c in held_out.captions()]
            figures["captions_still_true"] = score.score("text", x_rec, told)["prompts_followed"]
        rows = [v[i:i + 10] for i in range(0, min(len(x), 30), 10) for v in (x, x_rec)]
        pictures.save_grid(torch.cat(rows), args.out / f"recon_{step:06d}.png", min(10, len(x)))
        run.write(step, **figures)
        pictures.save_curves(run.path, args.out / "curves.png")

    # ---- loop
    run = tr.Run(args, done, device, rank)
    run.note("healthy: rec and perceptual fall; with D_psi, lam stays below 10 and d_real a little "
             "above d_fake; " + (
                 "kl 1..9 nats a latent value; z_std 0.5..4" if args.reg == "kl" else
                 "codebook far below rec; z_std steady; codes_used and perplexity rise towards "
                 "--n-codes (where they stay at a few, try --restart-codes 50)"))
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
            n = quantize.count(used[0], len(idle))
            idle.add_(1).masked_fill_(n > 0, 0)         # steps since each code was last chosen
            stale = idle >= args.restart_codes
            if args.restart_codes > 0 and stale.any():
                ae.codebook.restart(stale, used[1], g)
                idle[stale] = 0
            run.sums.update(codes_used=(n > 0).sum(), perplexity=quantize.perplexity(n))

if __name__ == "__main__":
    tr.run(main, parse_args)
