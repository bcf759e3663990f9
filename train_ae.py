"""Stage one: train the autoencoder (perceptual + adversarial + KL or VQ) on images alone.

    python train_ae.py                                      # the toy: built-in world, CPU, a minute
    python train_ae.py --data photos/ --size 64 --steps 5000            # a folder, .zip or .tar
    python train_ae.py --data photos/ --preset vq-f4        # a model of Table 8, on one GPU
    torchrun --nproc-per-node 8 train_ae.py --data photos/  # the same run, each batch shared by 8

It writes to OUT: ckpt.pt (all that resuming needs; ckpt.old.pt is the one before), log.jsonl,
recon_*.png (images above their reconstructions) and, with matplotlib, curves.png. The same
command continues a run where it stopped.
"""
import math
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.beyond.muon import Muon
from tinyldm.data import scorer
from tinyldm.data.dataset import ImageDataset, spread
from tinyldm.data.images import size_text
from tinyldm.data.loader import batch_order, load_batches
from tinyldm.engine import flags, presets
from tinyldm.engine.checkpoint import resume, save_checkpoint
from tinyldm.engine.command import run
from tinyldm.engine.log import Log, StopOnSignal, add_weighted
from tinyldm.engine.optimiser import learning_rate
from tinyldm.engine.processes import (
    Machine,
    any_process,
    clip_gradients,
    compiled,
    gather_rows,
    gathered_states,
    micro_batches,
    setup,
    sum_over_processes,
    wrap_ddp,
)
from tinyldm.engine.weights import open_perceptual
from tinyldm.errors import NotFinite, naming, require
from tinyldm.losses import LossConfig, autoencoder_loss, discriminator_loss
from tinyldm.metrics.images import gradient_length, psnr, ssim
from tinyldm.metrics.sets import Statistics, compare
from tinyldm.patchgan import Discriminator, DiscriminatorConfig
from tinyldm.quantize import Quantised, count_codes, perplexity, rows_of_latents
from tinyldm.seeds import generator
from tinyldm.show.curves import save_curves
from tinyldm.show.grids import save_grid


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.new_parser(__doc__)
    flags.add_training_flags(parser, out="out/ae", every=500, eval_n=256)
    flags.add_data_flags(parser)
    flags.add_config_flags(parser, AEConfig, "autoencoder")
    group = parser.add_argument_group("regularisation of the latents")
    group.add_argument("--reg", type=str, choices=["kl", "vq"], default="kl",
                       help="kl keeps them near N(0, 1), vq rounds them to a codebook")
    group.add_argument("--restart-codes", type=int, default=0,
                       help="replace a code that was unused for this many steps; 0: never")
    flags.add_config_flags(parser, LossConfig, "loss")
    flags.add_config_flags(parser, DiscriminatorConfig, "discriminator D_psi")
    flags.add_feature_flags(parser)
    return flags.parse(parser, presets.AE, argv)


# ---- set-up

def autoencoder_config(args: Namespace) -> AEConfig:
    """The shape of E, D and the latent space. Raises BadInput."""
    values = flags.config_values(AEConfig, vars(args))
    if args.reg == "kl":
        values["n_codes"] = None
    elif args.n_codes is None:
        values["n_codes"] = 256
    with naming("--ch, --ch-mult, --groups"):
        cfg = AEConfig(c_x=args.channels or 3, side=min(args.size), **values)
    require(
        all(side % cfg.f == 0 for side in args.size),
        f"--size {size_text(args.size)} is not divisible by f = {cfg.f}, which --ch-mult sets",
    )
    with naming("--attn-res"):
        cfg.check_attention()
    return cfg


def build_networks(args: Namespace, cfg: AEConfig) -> tuple[Autoencoder, Discriminator]:
    """Build the autoencoder and D_psi with random weights; without memory in a dry run."""
    disc_cfg = DiscriminatorConfig(**flags.config_values(DiscriminatorConfig, vars(args)))
    require(
        min(args.size) >= 3 * 2 ** disc_cfg.n_layers or args.disc_weight == 0,
        f"--size {size_text(args.size)}: --disc-layers {disc_cfg.n_layers} are too many for it",
    )
    torch.manual_seed(args.seed)
    with torch.device("meta" if args.dry_run else "cpu"):
        ae = Autoencoder(cfg)
        disc = Discriminator(disc_cfg, cfg.c_x)
    return ae, disc


def print_sizes(
    ae: Autoencoder, disc: Discriminator, z_shape: tuple[int, ...], machine: Machine
) -> None:
    """Print the numbers of parameters, f, the shape of z, and the device."""
    parts = [f"{name} {flags.n_params(net):,}" for name, net in ae.named_children()]
    cfg = ae.cfg
    print(
        f"autoencoder {flags.n_params(ae):,} parameters ({', '.join(parts)}) | "
        f"D_psi {flags.n_params(disc):,} | f = {cfg.f}, z {z_shape} | "
        f"{machine.device}, {machine.world} process(es)"
    )


def healthy_values(reg: str, loss_cfg: LossConfig) -> str:
    """What a learner should look for in the log, whatever the images are."""
    falling = "rec falls" if loss_cfg.perceptual == "none" else "rec and perceptual fall"
    parts = [falling]
    if reg == "kl":
        parts.append("kl and z_std level off")
    else:
        parts.append(
            "codes_used and perplexity rise towards --n-codes (if they stay at a few, try "
            "--restart-codes 50)"
        )
    if loss_cfg.disc_weight > 0:
        parts.append(
            f"after step {loss_cfg.disc_start}, D_psi's start, lam stays below 10 and d_real "
            "above d_fake"
        )
    return "healthy: " + "; ".join(parts)


# ---- evaluation

@torch.no_grad()
def reconstruct(ae: Autoencoder, x: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Held-out images x -> x_rec, at q's mean or the nearest codes, and bits per image.

    Bits: KL(q, N(0, 1)), which bits-back coding would need; for VQ, the number of places times
    the entropy of how often each code is chosen.
    """
    posteriors = [ae.encode(part.to(device)) for part in x.split(16)]
    x_rec = torch.cat([ae.decode(q.mean).float().cpu() for q in posteriors])
    if ae.codebook is None:
        nats = torch.cat([q.kl() for q in posteriors])
        return x_rec, (nats / math.log(2)).mean()

    k = torch.cat([ae.codebook(q.mean * ae.z_std).k for q in posteriors])
    entropy = perplexity(torch.bincount(k.flatten())).log2()
    return x_rec, k[0].numel() * entropy


def evaluate_reconstructions(
    ae: Autoencoder, features: nn.Module, x: Tensor, device: torch.device
) -> tuple[Tensor, dict[str, Tensor | float]]:
    """Return the reconstructions of held-out images, and how good they are.

    edges: the mean length of the gradients of x_rec over that of x; below 1 is blurred.
    """
    x_rec, bits = reconstruct(ae, x, device)
    real = Statistics(features, (part.to(device) for part in x.split(64)))
    fake = Statistics(features, (part.to(device) for part in x_rec.split(64)))
    figures = {
        "held_out_psnr": psnr(x, x_rec).mean(),
        "held_out_ssim": ssim(x, x_rec).mean(),
        "edges": gradient_length(x_rec).mean() / gradient_length(x).mean(),
        "bits": bits,
    }
    return x_rec, figures | compare(real, fake)


def save_reconstructions(x: Tensor, x_rec: Tensor, path: Path) -> None:
    """Save up to three rows of ten images, each above the row of their reconstructions.

    They are spread evenly. Only full rows are saved; with fewer than ten images, there is one
    row.
    """
    columns = min(10, len(x))
    n_rows = min(3, len(x) // columns)
    shown = spread(n_rows * columns, len(x))
    x = x[shown]
    x_rec = x_rec[shown]
    rows = []
    for i in range(0, n_rows * columns, columns):
        rows += [x[i:i + columns], x_rec[i:i + columns]]
    save_grid(torch.cat(rows), path, columns)


def some_images(data: ImageDataset, n: int) -> Tensor | None:
    """Return up to n images of a data set, spread evenly; None if there are none."""
    indices = spread(min(len(data), n), len(data))
    return torch.stack([data[k]["image"] for k in indices]) if indices else None


def update_codebook(
    ae: Autoencoder,
    quantised: list[Quantised],
    idle: Tensor,
    restart_after: int,
    rng: torch.Generator,
) -> dict[str, Tensor]:
    """Count the codes that a step chose; restart those that were idle too long.

    idle (n_codes,), the steps since each code was last chosen, is updated in place. Returns the
    number of codes in use, and their perplexity.
    """
    k = torch.cat([q.k for q in quantised])
    counts = sum_over_processes(count_codes(k, len(idle)))
    idle.add_(1).masked_fill_(counts > 0, 0)

    stale = idle >= restart_after
    if restart_after > 0 and stale.any():
        z_rows = rows_of_latents(torch.cat([q.z for q in quantised]))
        ae.codebook.restart(stale, gather_rows(z_rows), rng)
        idle[stale] = 0
    return {"codes_used": (counts > 0).sum(), "perplexity": perplexity(counts)}


def prepare_evaluation(
    args: Namespace, ae: Autoencoder, held_out: ImageDataset, log: Log, machine: Machine
) -> Callable[[int], None]:
    """Return evaluate(step): the figures of held-out images to the log, images and curves to OUT.

    Only the main process evaluates.
    """
    device = machine.device
    x = some_images(held_out, args.eval_n) if machine.main else None
    if x is not None:
        features = flags.open_feature_net(args, device, held_out.has_exact_scorer)

    def evaluate(step: int) -> None:
        if x is None:
            log.note("no image is held out, so evaluation is skipped")
            return
        try:
            with machine.autocast():
                x_rec, figures = evaluate_reconstructions(ae, features, x, device)
        except NotFinite as error:
            log.note(f"step {step} is not evaluated: {error}")
            return
        if held_out.has_exact_scorer:
            items = [{"caption": caption} for caption in held_out.captions()[:len(x_rec)]]
            score = scorer.text_score(x_rec, items)
            figures["captions_still_true"] = score["prompts_followed"]
        save_reconstructions(x, x_rec, args.out / f"recon_{step:06d}.png")
        log.write(step, **figures)
        save_curves(log.path, args.out / "curves.png")

    return evaluate


def main(args: Namespace) -> None:
    # Set-up: the processes, the networks' shapes, the data.
    machine = setup(args.device, args.dtype)
    device = machine.device
    n_micro = flags.check_training_flags(args, machine.world)
    cfg = autoencoder_config(args)
    loss_cfg = LossConfig(**flags.config_values(LossConfig, vars(args)))
    ae, disc = build_networks(args, cfg)
    h, w = (side // cfg.f for side in args.size)
    z_shape = (cfg.c_z, h, w)
    if machine.main:
        print_sizes(ae, disc, z_shape, machine)
    if args.dry_run:
        flags.print_dry_run(args, ae, disc)
        return
    data = flags.open_data(args, "train", cfg.c_x)
    held_out = flags.open_data(args, "held-out", cfg.c_x)
    if machine.main:
        flags.print_found(data)

    # The networks on their device, and the forms of them that run: compiled, wrapped in DDP.
    # On a CPU, D_psi's BatchNorm sees the images of its own process only.
    ae = ae.to(device, memory_format=torch.channels_last)
    disc = disc.to(device, memory_format=torch.channels_last)
    if machine.world > 1 and device.type == "cuda":
        disc = nn.SyncBatchNorm.convert_sync_batchnorm(disc)
    run_ae = wrap_ddp(compiled(ae, args.compile), machine)
    run_disc = wrap_ddp(compiled(disc, args.compile), machine, broadcast_buffers=False)
    with naming("--vgg-weights" if args.vgg_weights else f"--perceptual {loss_cfg.perceptual}"):
        perceptual = open_perceptual(loss_cfg.perceptual, args.vgg_weights, device)

    # The optimisers; then everything as an earlier run left it, if there was one.
    if args.muon:
        opt_ae = Muon(ae.parameters(), [ae], args.lr, args.muon, args.betas)
    else:
        opt_ae = torch.optim.Adam(ae.parameters(), betas=args.betas, fused=True)
    opt_disc = torch.optim.Adam(disc.parameters(), betas=args.betas, fused=True)
    nets = {"ae": ae, "disc": disc}
    parts = {"nets": nets, "opts": {"ae": opt_ae, "disc": opt_disc}}
    config = {"autoencoder": vars(cfg), "discriminator": vars(disc.cfg)}
    head = {"config": config, "size": args.size}
    with naming("--out"):
        ckpt = resume(args.out / "ckpt.pt", "autoencoder", head, parts, len(data))
    done = ckpt["step"]
    never_idle = torch.zeros(cfg.n_codes or 0, dtype=torch.long)
    idle = ckpt.get("idle", never_idle).to(device)      # steps since each code was last chosen

    def save(step: int) -> None:
        states = gathered_states(parts)
        if machine.main:
            ckpt = {"kind": "tinyldm autoencoder", "step": step, "idle": idle} | head
            ckpt |= {"args": flags.plain_values(args), "n_images": len(data)} | states
            save_checkpoint(ckpt, args.out / "ckpt.pt", keep=True)

    # The log, the evaluation (again, if the run was stopped before it), and the batches.
    log = Log(args.out, done=done, steps=args.steps, batch=args.batch, machine=machine)
    log.note(healthy_values(args.reg, loss_cfg))
    evaluate = None
    if args.eval_n > 0:
        evaluate = prepare_evaluation(args, ae, held_out, log, machine)
        if log.evaluation_is_missing(args.eval_every):
            evaluate(done)
    stop = StopOnSignal()
    order = batch_order(
        len(data), args.batch, done, args.steps, args.seed, machine.rank, machine.world, data.shards
    )
    batches = load_batches(data, order, args.workers, pin=device.type == "cuda")
    n_skipped = 0

    # The loop.
    for step, batch in enumerate(batches, done + 1):
        # One batch, and the noise of z ~ q(z | x). The noise is drawn for the whole batch, then
        # each process takes its part, so that it does not depend on the number of processes.
        x = batch["image"].to(device, memory_format=torch.channels_last, non_blocking=True)
        rng = generator(args.seed, step)
        noise, = machine.shard(torch.randn(args.batch, *z_shape, generator=rng))
        adversarial = loss_cfg.disc_weight > 0 and step > loss_cfg.disc_start
        disc_buffers = {name: v.clone() for name, v in disc.named_buffers()}    # to undo a bad step

        # The autoencoder's gradient, Eq. (25), accumulated over micro-batches.
        figures = {}
        outputs = []
        for x_i, noise_i in micro_batches(n_micro, (x, noise), [run_ae]):
            with machine.autocast():
                x_rec_i, q_i = run_ae(x_i, noise_i)
                loss, figures_i = autoencoder_loss(
                    loss_cfg, perceptual, disc, ae.decoder.last_weight, x_i, x_rec_i, q_i,
                    adversarial,
                )
                (loss / n_micro).backward()
            add_weighted(figures, figures_i | {"loss": loss}, 1 / n_micro)
            outputs.append((x_rec_i.detach(), q_i))
        total_loss = figures.pop("loss")

        # D_psi's gradient: the same images against their reconstructions.
        if adversarial:
            x_rec = torch.cat([x_rec_i for x_rec_i, _ in outputs])
            for x_i, x_rec_i in micro_batches(n_micro, (x, x_rec), [run_disc]):
                with machine.autocast():
                    loss, figures_i = discriminator_loss(loss_cfg, run_disc, x_i, x_rec_i)
                    (loss / n_micro).backward()
                add_weighted(figures, figures_i | {"loss": loss}, 1 / n_micro)
            total_loss = total_loss + figures.pop("loss")

        # The update of both. A step that is not finite in some process changes nothing, D_psi's
        # BatchNorm statistics included.
        lr = learning_rate(step, args.lr, args.warmup, args.steps, args.cosine)
        grad_norm = clip_gradients(ae.parameters(), args.clip)
        disc_grad_norm = clip_gradients(disc.parameters(), math.inf)    # measured, not clipped
        is_bad = ~torch.isfinite(total_loss + grad_norm + disc_grad_norm)
        is_bad, stopping = any_process(is_bad, stop.as_tensor(device))
        if is_bad:
            disc.load_state_dict(disc_buffers, strict=False)
            n_skipped += 1
            log.note(f"step {step} is not finite: no update, {n_skipped} of --skip-nan")
            if n_skipped > args.skip_nan:
                # Nothing has changed since the step before, so this saves its state.
                if step - 1 > done and (step - 1) % args.save_every != 0:
                    save(step - 1)
                raise flags.not_finite(step, args.out)
        else:
            for opt in (opt_ae, opt_disc):
                opt.param_groups[0]["lr"] = lr
                opt.step()
            if cfg.n_codes:
                quantised = [q_i for _, q_i in outputs]
                figures |= update_codebook(ae, quantised, idle, args.restart_codes, rng)
            log.add(**figures, lr=lr, gnorm=grad_norm)
        opt_ae.zero_grad()
        opt_disc.zero_grad()

        # Now and then: log, save, evaluate.
        log.step_done()
        if log.is_due(step, args.log_every):
            log.write_means(step)
        with log.paused():
            if stopping or log.is_due(step, args.save_every):
                save(step)
            if evaluate and log.is_due(step, args.eval_every):
                evaluate(step)
        if stopping:
            break
    log.close()


if __name__ == "__main__":
    run(main, parse_args)
