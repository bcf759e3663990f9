"""Rows of defaults, one for each model: `--preset NAME` sets them, and any flag wins over its row.

The toy row is tuned for two CPU cores and minutes; the paper's rows (Tables 8, 12-15, 17) follow below it.
lr is the effective learning rate, of the whole batch.
"""
AE = {
    "toy": dict(data="shapes", size=32, ch=16, ch_mult=(1, 2, 4), n_res=1, c_z=4, groups=8,
                batch=16, steps=1400, lr=5e-3, warmup=50, perceptual="random", disc_start=900, disc_ch=16,
                disc_layers=2),
}
LDM = {
    "toy": dict(data="shapes", size=32, ch=64, ch_mult=(1, 2), n_res=1, attn_res=(8, 4), d_head=32, depth=1, groups=16,
                d_text=128, text_depth=2, n_token=12, batch=64, steps=2000, lr=2e-3, warmup=100, ema=0.99),
}
