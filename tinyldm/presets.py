"""Rows of defaults, one for each model: `--preset NAME` sets them, and any flag wins over its row.

Paper:   Table 8 (stage one), Tables 12-15 and 17. Reads: autoencoder.py, unet.py, tasks.py
lr is the effective learning rate, of the whole batch. The toy rows are tuned for two CPU cores."""
import torch

from tinyldm.autoencoder import AEConfig, Autoencoder, Pixels, build_autoencoder
from tinyldm.tasks import TASKS, build_tau
from tinyldm.unet import UNet, UNetConfig

AE = {"toy": dict(data="shapes", size=32, ch=16, ch_mult=(1, 2, 4), n_res=1, c_z=4, groups=8,
    pixel_loss="l2", perceptual="random", perceptual_weight=0.03, kl_weight=5e-4, disc_weight=0.5,
    disc_start=900, disc_ch=16, disc_layers=2, batch=16, lr=4e-3, betas=(0.9, 0.95), warmup=50,
    cosine=True, steps=1000)}
# Table 8: the released configs, the batch of one GPU, lr = 4.5e-6 batch; the checkpoints' steps.
# NB: disc_start of vq-f4(-noattn) and vq-f8 seems that of resumed runs; from nothing take 250001.
TABLE_8 = dict(size=256, ch=128, n_res=2, groups=32, pixel_loss="l1", perceptual="vgg16",
    perceptual_weight=1.0, disc_ch=64, betas=(0.5, 0.9), warmup=0, cosine=False, clip=float("inf"))
KL = TABLE_8 | dict(reg="kl", kl_weight=1e-6, disc_weight=0.5, disc_start=50001, disc_layers=3)
VQ = TABLE_8 | dict(reg="vq", codebook_weight=1.0, vq_beta=0.25, vq_beta_on="codebook")
AE_KEYS = "ch_mult attn_res c_z batch lr steps n_codes disc_weight disc_start disc_layers".split()
AE_ROWS = {           # ch_mult          attn_res c_z batch     lr    steps n_codes   disc_*
    "kl-f4":        ((1, 2, 4),          (),       3, 10, 4.5e-5,  176991),
    "kl-f8":        ((1, 2, 4, 4),       (),       4,  4, 1.8e-5,  246803),
    "kl-f16":       ((1, 1, 2, 2, 4),    (16,),   16,  6, 2.7e-5,  442998),
    "kl-f32":       ((1, 1, 2, 2, 4, 4), (16, 8), 64,  6, 2.7e-5,  406763),
    "vq-f4":        ((1, 2, 4),          (),       3,  8, 3.6e-5,  533066,   8192, 0.75,      0, 3),
    "vq-f4-noattn": ((1, 2, 4),          (),       3,  8, 3.6e-5,  658131,   8192, 0.75,     11, 3),
    "vq-f8":        ((1, 2, 2, 4),       (32,),    4, 10, 4.5e-5,  971043,  16384, 0.60,      1, 2),
    "vq-f8-n256":   ((1, 2, 2, 4),       (32,),    4, 10, 4.5e-5, 1608649,    256, 0.75, 250001, 3),
    "vq-f16":       ((1, 1, 2, 2, 4),    (16,),    8, 14, 6.3e-5, 1101166,  16384, 0.75, 250001, 2),
    # Not released: f, c_z and n_codes are Table 8's, the rest is the nearest released row's.
    "kl-f2":        ((1, 2),             (),       2, 10, 4.5e-5,  176991),
    "kl-f16-c8":    ((1, 1, 2, 2, 4),    (16,),    8,  6, 2.7e-5,  442998),
    "kl-f32-c16":   ((1, 1, 2, 2, 4, 4), (16, 8), 16,  6, 2.7e-5,  406763),
    "vq-f2":        ((1, 2),             (),       2,  8, 3.6e-5,  533066,   2048, 0.75, 250001, 3),
    "vq-f2-n64":    ((1, 2),             (),       2,  8, 3.6e-5,  533066,     64, 0.75, 250001, 3),
    "vq-f4-n256":   ((1, 2, 4),          (),       3,  8, 3.6e-5,  533066,    256, 0.75, 250001, 3),
    "vq-f32":       ((1, 1, 2, 2, 4, 4), (16, 8), 16, 14, 6.3e-5, 1101166,  16384, 0.75, 250001, 2)}
for name, row in AE_ROWS.items():
    AE[name] = (VQ if name.startswith("vq") else KL) | dict(zip(AE_KEYS, row))
AE["vq-f4-noattn"]["attn_mid"] = False

LDM = {"toy": dict(data="shapes", ae_preset="toy", size=32, ch=48, ch_mult=(1, 2), n_res=1,
    attn_res=(8, 4), d_head=16, depth=1, groups=8, d_ctx=128, text_depth=2, text_heads=8,
    text_d_head=16, n_token=12, schedule="sqrt-linear", predict="v", snr_clamp=(0.1, 1.0), batch=64,
    lr=2e-3, betas=(0.9, 0.99), warmup=100, cosine=True, ema=0.99, steps=2000)}
# Tables 12-15 and 17, and the released configs. heads is their number, 0: as many as are 32 wide.
# text2img256's and semantic512's steps are nowhere stated: here the nearest row's. NB: Table 15 has
# inpainting's lr for one picture, 1.0e-6; the loss and the betas' ends are the released configs'.
PAPER = dict(task="uncond", size=256, n_res=2, groups=32, scale_shift=False, res_updown=False,
    depth=1, d_ctx=None, n_classes=None, schedule="sqrt-linear", predict="eps", loss="l2",
    p_drop=0.0, snr_clamp=(0.0, float("inf")), betas=(0.9, 0.999), warmup=0, cosine=False,
    clip=float("inf"), ema=0.9999, z_std=1.0)
BERT = dict(task="text", vocab_size=30522, n_token=77, text_depth=32, text_heads=8, text_d_head=64,
            text_clip=False, p_drop=0.1)
LDM_KEYS = ("ae_preset", "ch", "ch_mult", "attn_res", "beta_range", "batch", "lr", "steps")
A, B, C, D = (0.0015, 0.0195), (0.0015, 0.0205), (0.0015, 0.0155), (0.00085, 0.012)    # betas
LDM_ROWS = {        # ae_preset ch   ch_mult          attn_res     betas batch     lr   steps heads
    "celebahq256":    ("vq-f4", 224, (1, 2, 3, 4),    (32, 16, 8),    A,   48, 9.6e-5,  410000, 0),
    "ffhq256":        ("vq-f4", 224, (1, 2, 3, 4),    (32, 16, 8),    A,   42, 8.4e-5,  635000, 0),
    "bedrooms256":    ("vq-f4", 224, (1, 2, 3, 4),    (32, 16, 8),    A,   48, 9.6e-5, 1900000, 0),
    "churches256":    ("kl-f8", 192, (1, 2, 2, 4, 4), (32, 16, 8, 4), C,   96, 5.0e-5,  500000, 8),
    "imagenet256-f8": ("vq-f8", 256, (1, 2, 4),       (32, 16, 8),    A,   64, 6.4e-5, 4800000, 0),
    "imagenet256":    ("vq-f4", 192, (1, 2, 3, 5),    (32, 16, 8),    A, 1200, 1.0e-4,  178000, 1),
    "text2img256":    ("vq-f4", 192, (1, 2, 3, 5),    (32, 16, 8),    A,   28, 5.6e-5,  390000, 0),
    "text2img":       ("kl-f8", 320, (1, 2, 4, 4),    (32, 16, 8),    D,  680, 1.0e-4,  390000, 8),
    "sd-v1":          ("kl-f8", 320, (1, 2, 4, 4),    (64, 32, 16),   D, 2048, 1.0e-4,  225000, 8),
    "layout256":      ("vq-f4", 128, (1, 2, 3, 4),    (32, 16, 8),    B,   24, 4.8e-5, 4400000, 0),
    "semantic256":    ("vq-f4", 128, (1, 4, 8),       (),             B,   48, 4.8e-5,  360000, 8),
    "semantic512":    ("vq-f4", 128, (1, 4, 8),       (),             B,    8, 8.0e-6,  360000, 8),
    "superres256":    ("vq-f4", 160, (1, 2, 2, 4),    (8,),           C,   64, 6.4e-5,  860000, 0),
    "inpaint256":     ("vq-f4-noattn", 256, (1, 2, 3, 4), (32, 16, 8), B,  128, 1.28e-4, 360000, 8)}
MORE = {
    "churches256": dict(loss="l1", scale_shift=True, res_updown=True, warmup=10_000, z_std=None),
    "imagenet256-f8": dict(task="class", n_classes=1000, d_ctx=512),
    "imagenet256": dict(task="class", n_classes=1001, d_ctx=512, p_drop=0.1),
    "text2img256": BERT | dict(d_ctx=640), "text2img": BERT | dict(d_ctx=1280, z_std=1 / 0.18215),
    "sd-v1": BERT | dict(size=512, vocab_size=49408, d_ctx=768, text_depth=12, text_heads=12,
                         text_clip=True, z_std=1 / 0.18215, warmup=10_000),
    "layout256": BERT | dict(task="layout", loss="l1", vocab_size=8192, n_token=92, d_ctx=512,
                             text_depth=16, depth=3, p_drop=0.0),
    "semantic256": dict(task="semantic", loss="l1", n_classes=182),
    "semantic512": dict(task="semantic", loss="l1", n_classes=182, size=512),
    "superres256": dict(task="superres"),
    "inpaint256": dict(task="inpaint", loss="l1", res_updown=True)}
# The f sweep: Table 13 (ImageNet, 2M steps) and 14 (CelebA-HQ, 500k). f = 1 diffuses pixels.
# NB: at f = 32 these tables have 32 latent channels where Table 8's VQ model has 16; we have 16.
SWEEP = {  # ae_preset ch   ch_mult              attn_res     Table 13's batch, lr, then 14's
    1:  ("none",   192, (1, 1, 2, 2, 4, 4),  (32, 16, 8),   7, 4.9e-5,   9, 9.0e-5),
    2:  ("vq-f2",  192, (1, 2, 2, 4, 4),     (32, 16, 8),   9, 6.3e-5,  11, 1.1e-4),
    4:  ("vq-f4",  192, (1, 2, 3, 5),        (32, 16, 8),  40, 8.0e-5,  48, 9.6e-5),
    8:  ("vq-f8",  256, (1, 2, 4),           (32, 16, 8),  64, 6.4e-5,  96, 9.6e-5),
    16: ("vq-f16", 256, (1, 2, 4),           (16, 8, 4),  112, 4.5e-5, 128, 1.3e-4),
    32: ("vq-f32", 256, (1, 2, 4),           (8, 4, 2),   112, 4.5e-5, 128, 1.3e-4)}
for f, (*shape, batch13, lr13, batch14, lr14) in SWEEP.items():
    LDM_ROWS[f"imagenet-f{f}"] = *shape, A, batch13, lr13, 2_000_000, 0
    LDM_ROWS[f"celeba-f{f}"] = *shape, A, batch14, lr14, 500_000, 0
    MORE[f"imagenet-f{f}"] = MORE["imagenet256-f8"]
MORE["celeba-f4"] = dict(ch=224, ch_mult=(1, 2, 3, 4))
for name, (*row, n_head) in LDM_ROWS.items():
    heads = dict(d_head=None if n_head else 32, n_head=n_head or None)
    LDM[name] = PAPER | dict(zip(LDM_KEYS, row)) | heads | MORE.get(name, {})

def ae_config(name: str) -> AEConfig:
    """The shape of a row of AE; that of Pixels for "none", where pixels are diffused."""
    row = {k: v for k, v in AE.get(name, {}).items() if k in AEConfig.__dataclass_fields__}
    return AEConfig(**row, side=AE[name]["size"]) if row else Pixels.cfg

def unet_config(row: dict, ae: AEConfig) -> UNetConfig:
    """The shape of eps_theta for a row of LDM, or a training script's flags, and its stage one."""
    task, c_z = TASKS[row["task"]], ae.c_z
    d_ctx = row["d_ctx"] if task.net and not task.beside else None
    return UNetConfig(
        c_z + (task.beside(c_z) if task.beside else 0), c_z, row["size"] // ae.f, row["ch"],
        tuple(row["ch_mult"]), row["n_res"], tuple(row["attn_res"]), row["d_head"], row["n_head"],
        d_ctx, row["depth"], row["groups"], row["scale_shift"], row["res_updown"])

def condition_encoder(row: dict, f: int) -> torch.nn.Module | None:
    """tau of a row of LDM or a training script's flags; None where nothing is to be learned."""
    return build_tau(row["task"], TASKS[row["task"]].shape(row, f))

def networks(row: dict) -> tuple[Autoencoder | Pixels, UNet, torch.nn.Module | None]:
    """Stage one, eps_theta and tau of a row, on the meta device: shapes without memory."""
    with torch.device("meta"):
        ae = build_autoencoder(vars(ae_config(row["ae_preset"])))
        return ae, UNet(unet_config(row, ae.cfg)), condition_encoder(row, ae.cfg.f)
