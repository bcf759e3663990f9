"""Rows of defaults, one for each model: `--preset NAME` sets them, and any flag wins over its row.

Paper:   Table 8 for the autoencoders; Tables 12-15 and 17 for the rest.
Reads:   nothing of ours.

lr is the effective learning rate, of the whole batch. The toy rows are tuned for two CPU cores.
"""
AE = {
    "toy": dict(
        data="shapes", size=32, ch=16, ch_mult=(1, 2), n_res=1, c_z=3, groups=8, pixel_loss="l2",
        perceptual="random", perceptual_weight=0.1, kl_weight=5e-4, disc_weight=0.5,
        disc_start=600, disc_ch=16, disc_layers=2, batch=16, lr=4e-3, betas=(0.9, 0.95), warmup=50,
        cosine=True, steps=700),
}
# Table 8, as in the released configs. Each says the batch of one GPU, not how many there were:
# batch is that of one, and lr = 4.5e-6 batch. Steps are those of the released checkpoints.
# NB: disc_start of vq-f4, vq-f4-noattn and vq-f8 is as released: left over, it seems, from runs
# that were resumed. For a run from nothing take the others' 250001.
TABLE_8 = dict(
    size=256, ch=128, n_res=2, groups=32, pixel_loss="l1", perceptual="vgg16",
    perceptual_weight=1.0, disc_ch=64, betas=(0.5, 0.9), warmup=0, cosine=False, clip=float("inf"))
KL = TABLE_8 | dict(reg="kl", kl_weight=1e-6, disc_weight=0.5, disc_start=50001, disc_layers=3)
VQ = TABLE_8 | dict(reg="vq", codebook_weight=1.0, vq_beta=0.25, vq_beta_on="codebook")
KL_COLUMNS = ("ch_mult", "attn_res", "c_z", "batch", "lr", "steps")
VQ_COLUMNS = (*KL_COLUMNS, "n_codes", "disc_weight", "disc_start", "disc_layers")
KL_ROWS = {
    #               ch_mult            attn_res c_z batch     lr  steps
    "kl-f4":      ((1, 2, 4),          (),       3, 10, 4.5e-5, 176991),
    "kl-f8":      ((1, 2, 4, 4),       (),       4,  4, 1.8e-5, 246803),
    "kl-f16":     ((1, 1, 2, 2, 4),    (16,),   16,  6, 2.7e-5, 442998),
    "kl-f32":     ((1, 1, 2, 2, 4, 4), (16, 8), 64,  6, 2.7e-5, 406763),
    # Not released: f, c_z and n_codes are Table 8's, the rest is that of the nearest row above.
    "kl-f2":      ((1, 2),             (),       2, 10, 4.5e-5, 176991),
    "kl-f16-c8":  ((1, 1, 2, 2, 4),    (16,),    8,  6, 2.7e-5, 442998),
    "kl-f32-c16": ((1, 1, 2, 2, 4, 4), (16, 8), 16,  6, 2.7e-5, 406763),
}
VQ_ROWS = {
    #                 ch_mult            attn_res c_z batch     lr    steps n_codes   disc_*
    "vq-f4":        ((1, 2, 4),          (),       3,  8, 3.6e-5,  533066,   8192, 0.75,      0, 3),
    "vq-f4-noattn": ((1, 2, 4),          (),       3,  8, 3.6e-5,  658131,   8192, 0.75,     11, 3),
    "vq-f8":        ((1, 2, 2, 4),       (32,),    4, 10, 4.5e-5,  971043,  16384, 0.60,      1, 2),
    "vq-f8-n256":   ((1, 2, 2, 4),       (32,),    4, 10, 4.5e-5, 1608649,    256, 0.75, 250001, 3),
    "vq-f16":       ((1, 1, 2, 2, 4),    (16,),    8, 14, 6.3e-5, 1101166,  16384, 0.75, 250001, 2),
    # Not released, as above.
    "vq-f2":        ((1, 2),             (),       2,  8, 3.6e-5,  533066,   2048, 0.75, 250001, 3),
    "vq-f2-n64":    ((1, 2),             (),       2,  8, 3.6e-5,  533066,     64, 0.75, 250001, 3),
    "vq-f4-n256":   ((1, 2, 4),          (),       3,  8, 3.6e-5,  533066,    256, 0.75, 250001, 3),
    "vq-f32":       ((1, 1, 2, 2, 4, 4), (16, 8), 16, 14, 6.3e-5, 1101166,  16384, 0.75, 250001, 2),
}
for base, columns, rows in ((KL, KL_COLUMNS, KL_ROWS), (VQ, VQ_COLUMNS, VQ_ROWS)):
    AE |= {name: base | dict(zip(columns, row)) for name, row in rows.items()}
AE["vq-f4-noattn"]["attn_mid"] = False

LDM = {
    "toy": dict(
        data="shapes", size=32, ch=24, ch_mult=(1, 2, 4), n_res=1, attn_res=(8, 4), d_head=16,
        depth=1, groups=8, d_text=128, text_depth=2, n_token=12, schedule="sqrt-linear",
        predict="v", snr_clamp=(0.02, 1.0), batch=64, lr=2e-3, betas=(0.9, 0.99), warmup=100,
        cosine=True, ema=0.99, steps=1800),
}
