"""Stage one: train the autoencoder (perceptual + adversarial + KL) on pictures alone.

    python train_ae.py                                      # toy: built-in world, CPU, a minute
    python train_ae.py --data photos/ --size 64 --steps 5000                # a folder or .zip
    torchrun --nproc-per-node 8 train_ae.py --data photos/  # the same run, each batch shared by 8

Writes OUT/ckpt.pt (all that resuming needs), OUT/log.jsonl and OUT/recon_*.png (pictures, each row
above its reconstructions). The same command again goes on where it stopped.
"""
import argparse
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel as DDP

from tinyldm import BadInput, presets, shapes
from tinyldm import training as tr
from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.checkpoint import load_checkpoint, same_config, save_checkpoint
from tinyldm.data import BatchOrder, data_flags, loader, open_data, save_grid
from tinyldm.metrics import psnr
from tinyldm.patchgan import (
    Discriminator,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    vanilla_loss,
)
from tinyldm.perceptual import Perceptual


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    g = p.add_argument_group("run")
    g.add_argument("--out", default="out/ae", type=Path, help="folder of what is written")
    g.add_argument("--steps", type=int)
    g.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    data_flags(p)
    g = p.add_argument_group("model")
    g.add_argument("--ch", type=int, help="width at full resolution")
    g.add_argument("--ch-mult", type=int, nargs="+", help="width of each level; f = 2^(levels - 1)")
    g.add_argument("--n-res", type=int, help="ResBlocks a level")
    g.add_argument("--c-z", type=int, help="latent channels")
    g.add_argument("--groups", type=int, help="of GroupNorm")
    g = p.add_argument_group("loss")
    g.add_argument("--pixel-loss", choices=["l1", "l2"], help="the paper's code has l1")
    g.add_argument("--perceptual", choices=["vgg16", "random", "none"])
    g.add_argument("--perceptual-weight", type=float)
    g.add_argument("--vgg-weights", help="torchvision's vgg16-397923af.pth; default: fetched once")
    g.add_argument("--kl-weight", type=float, help="of the KL summed over z, a pixel value")
    g.add_argument("--disc-weight", type=float, help="of the adversarial term, times lam; 0: none")
    g.add_argument("--disc-start", type=int, help="step after which D_psi is trained and used")
    g.add_argument("--disc-loss", choices=["hinge", "vanilla"], default="hinge")
    g.add_argument("--disc-ch", type=int, help="width of D_psi")
    g.add_argument("--disc-layers", type=int, help="strided layers of D_psi; 3 see 70x70 pixels")
    tr.optimisation_flags(p)
    tr.system_flags(p)
    return tr.parse(p, presets.AE, argv)


def main(args):
    # ---- setup
    device, autocast, rank, world = tr.setup(args.device, args.dtype)
    micro = tr.check_batch(args, world)
    cfg = AEConfig(3, args.ch, tuple(args.ch_mult), args.n_res, args.c_z, args.groups)
    if args.size % cfg.f:
        raise BadInput(f"--size {args.size} is not divisible by f = {cfg.f}, which --ch-mult sets")
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):
        ae, disc = Autoencoder(cfg), Discriminator(3, args.disc_ch, args.disc_layers)
    side = args.size // cfg.f
    if rank == 0:
        print(f"autoencoder {tr.n_params(ae):,} parameters | discriminator {tr.n_params(disc):,} | "
              f"f = {cfg.f}, z ({cfg.c_z}, {side}, {side}) | {device}, {world} process(es)")
    if args.dry_run:
        return tr.dry_run(args, ae, disc)

    # ---- data
    data, held_out = open_data(args), open_data(args, "held-out")
    val = [held_out[i]["image"] for i in range(min(len(held_out), 256))]

    # ---- model
    ae, disc = (net.to(device, memory_format=torch.channels_last) for net in (ae, disc))
    perceptual = None
    if args.perceptual != "none":
        perceptual = Perceptual(args.perceptual, args.vgg_weights).to(device)
    disc_loss = {"hinge": hinge_loss, "vanilla": vanilla_loss}[args.disc_loss]
    run_ae, run_disc = (torch.compile(net) if args.compile else net for net in (ae, disc))
    if world > 1:                           # D_psi's BatchNorm sees its own process only
        run_ae, run_disc = DDP(run_ae), DDP(run_disc, broadcast_buffers=False)

    # ---- optimiser
    opts = [torch.optim.Adam(net.parameters(), betas=args.betas, fused=True) for net in (ae, disc)]

    # ---- resume
    path, step = args.out / "ckpt.pt", 0
    config = {"autoencoder": asdict(cfg),
              "discriminator": {"ch": args.disc_ch, "n_layers": args.disc_layers}}
    if path.exists():
        ckpt = load_checkpoint(path, "autoencoder", "--out")
        same_config(ckpt["config"], config, path)
        step = ckpt["step"]
        for net, opt, name in zip((ae, disc), opts, ("ae", "disc")):
            net.load_state_dict(ckpt["nets"][name])
            opt.load_state_dict(ckpt["opts"][name])

    def save():
        save_checkpoint({"kind": "tinyldm autoencoder", "step": step, "config": config,
                         "args": tr.plain(args),
                         "nets": {"ae": ae.state_dict(), "disc": disc.state_dict()},
                         "opts": {"ae": opts[0].state_dict(), "disc": opts[1].state_dict()}}, path)
        if val:
            x = torch.stack(val)
            with torch.no_grad(), autocast():
                x_rec = torch.cat([ae.decode(ae.encode(v.to(device)).mean).float().cpu()
                                   for v in x.split(64)])
            scores = {"held_out_psnr": psnr(x, x_rec).mean().item()}
            if args.data == "shapes":
                scores["captions_still_true"] = shapes.score(x_rec, held_out.captions())
            log.write(step, **scores)
            rows = [v[i:i + 10] for i in range(0, min(len(x), 30), 10) for v in (x, x_rec)]
            save_grid(torch.cat(rows), args.out / f"recon_{step:06d}.png", min(10, len(x)))

    # ---- loop
    log = tr.Log(args, step, device, rank)
    log.note("healthy: rec and perceptual fall; kl 1..9 nats a latent value; z_std 0.5..4; with "
             "D_psi, lam stays below 10 and d_real a little above d_fake")
    stop = tr.Stop(device)
    order = BatchOrder(len(data), args.batch, step, args.steps, args.seed, rank, world)
    for batch in loader(data, order, args.workers, device.type == "cuda"):
        step += 1
        gan = args.disc_weight > 0 and step > args.disc_start
        lr = tr.lr_at(step, args)
        for opt in opts:
            opt.param_groups[0]["lr"] = lr
            opt.zero_grad()
        x = batch["image"].to(device, memory_format=torch.channels_last, non_blocking=True)
        noise = torch.randn(args.batch, cfg.c_z, side, side,
                            generator=tr.generator(args.seed, step))
        parts = list(zip(x.split(micro), tr.rows(noise, rank, world).to(device).split(micro)))
        values, recs = {}, []
        for i, (x, n) in enumerate(parts):                                      # E and D
            with tr.sync_last(run_ae, i == len(parts) - 1), autocast():
                x_rec, q = run_ae(x, n)
                d = x - x_rec.float()
                loss_pixel = d.abs().mean() if args.pixel_loss == "l1" else d.square().mean()
                loss_p = perceptual(x, x_rec).mean() if perceptual else 0 * loss_pixel
                loss_rec = loss_pixel + args.perceptual_weight * loss_p
                loss_reg = q.kl().mean()                                        # nats a picture
                loss = loss_rec + args.kl_weight * loss_reg / x[0].numel()
                v = dict(rec=loss_pixel, perceptual=loss_p, kl=loss_reg / q.mean[0].numel(),
                         z_std=q.std())
                if gan:
                    loss_adv = generator_loss(disc, x_rec)
                    lam = adaptive_weight(loss_rec, loss_adv, ae.last_layer)
                    loss = loss + args.disc_weight * lam * loss_adv
                    v |= dict(adv=loss_adv, lam=lam)
                (loss / len(parts)).backward()
            recs.append(x_rec.detach())
            tr.add(values, v, 1 / len(parts))
        gnorm = torch.nn.utils.clip_grad_norm_(ae.parameters(), args.clip)
        tr.check_finite(loss + gnorm, step, path)
        opts[0].step()
        for i, ((x, _), x_rec) in enumerate(zip(parts, recs) if gan else ()):   # D_psi
            with tr.sync_last(run_disc, i == len(parts) - 1), autocast():
                real, fake = run_disc(x), run_disc(x_rec)
                loss_disc = disc_loss(real.float(), fake.float())
                (loss_disc / len(parts)).backward()
            tr.check_finite(loss_disc, step, path)
            v = dict(disc=loss_disc, d_real=real.mean(), d_fake=fake.mean())
            tr.add(values, v, 1 / len(parts))
        if gan:
            opts[1].step()
        log.step(step, **values, lr=lr, gnorm=gnorm)
        stopping = stop.asked()
        if rank == 0 and (step % args.save_every == 0 or step == args.steps or stopping):
            with log.aside():
                save()
        if stopping:
            break
    log.close()


if __name__ == "__main__":
    tr.run(main, parse_args)
