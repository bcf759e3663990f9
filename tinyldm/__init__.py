"""tinyldm: High-Resolution Image Synthesis with Latent Diffusion Models, to read beside the paper.

Symbols (ASCII for the paper's)
    x, x_rec          image and reconstruction, in [-1, 1]
    z, z_t, z_0, z_T  latent; noised to timestep t; the clean end and the noisy start
    f, c_z            downsampling factor, latent channels
    z_std             sigma-hat, the std of stage one's latents
    t, T              timestep 0..T-1, and their number
    beta, alpha, abar schedule: alpha = 1 - beta, abar_t = product of alpha up to t (DDPM's)
    eps, eps_theta    noise, and the U-Net's estimate of it
    sigma, eta        the noise of a DDIM step, and its share of DDPM's
    y, tau, ctx       condition, its encoder, tau(y)
    s, p_drop         guidance scale (1: none), share of conditions dropped in training
    disc, lam         D_psi, the adaptive weight of the adversarial loss
    q, k, v           queries, keys, values; q is also the posterior q(z | x)
Dimensions
    B batch; C, H, W channels and sides; h, w sides of a latent; N places; M tokens; D width

tinyldm/README.md has the reading order and says where each equation is.
"""
from tinyldm import beyond  # noqa: F401  (it adds its rows to the tables)
