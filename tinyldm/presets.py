"""Rows of defaults, one for each model: `--preset NAME` sets them, and any flag wins over its row.

Paper:   Tables 8, 12-15 and 17 for the rows of the paper's models.
Reads:   nothing of ours.

lr is the effective learning rate, of the whole batch. The toy rows are tuned for two CPU cores.
"""
AE = {
    "toy": dict(
        data="shapes", size=32, ch=16, ch_mult=(1, 2, 4), n_res=1, c_z=4, groups=8, pixel_loss="l2",
        perceptual="random", perceptual_weight=0.03, kl_weight=5e-4, disc_weight=0.5,
        disc_start=1000, disc_ch=16, disc_layers=2, batch=16, lr=4e-3, betas=(0.9, 0.95), warmup=50,
        cosine=True, steps=1100),
}
LDM = {
    "toy": dict(
        data="shapes", size=32, ch=48, ch_mult=(1, 2), n_res=1, attn_res=(8, 4), d_head=16,
        depth=1, groups=8, d_text=128, text_depth=2, n_token=12, schedule="sqrt-linear",
        predict="v", snr_clamp=(0.1, 1.0), batch=64, lr=2e-3, betas=(0.9, 0.99), warmup=100,
        cosine=True, ema=0.99, steps=2000),
}
