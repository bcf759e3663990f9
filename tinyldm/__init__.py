"""tinyldm: High-Resolution Image Synthesis with Latent Diffusion Models, to read beside the paper.

Reading order (README has a line on each)
    layers, attention; quantize, autoencoder, perceptual, patchgan      stage one: Sec. 3.1, App. G
    diffusion, samplers, guidance; unet             the process, eps_theta: Eq. (1)-(3), Sec. 3.2
    tokens, conditioning, tasks; shapes, degrade, files, data   conditions, data: Sec. 3.3, 4.3-4.5
    inception, features, metrics, score, pictures           how good it is: Sec. 4, App. E.3
    presets, training, checkpoint, official, inside, generate, bench; ../train_*.py, ../sample.py
Symbols (ASCII for the paper's)
    x, x_rec          image, reconstruction, in [-1, 1]   f, c_z      downsampling, latent channels
    z, z_t, z_0, z_T  latent, noised, its end and start   z_std       sigma-hat, the latents' std
    t, T              timestep 0..T-1, their number       beta, alpha, abar  abar_t = prod alpha
    eps, eps_theta    noise, the U-Net's estimate of it   sigma, eta  DDIM's noise and its share
    y, tau, ctx       condition, its encoder, tau(y)      s, p_drop   guidance, share of y dropped
    disc, lam         D_psi, the adaptive weight          q           queries, or q(z | x)
Dims: B batch; C, H, W image or features; c, h, w latent; N places; M tokens; D width."""
import contextlib

class BadInput(ValueError):
    """Something that the user gave is wrong. The message is one line that names the file or flag
    and what to do; the scripts print it and leave with exit code 2."""

def require(ok, say: str) -> None:
    """Raises BadInput(say) unless ok."""
    if not ok:
        raise BadInput(say)

@contextlib.contextmanager
def trying(what: str):
    """Turns all that can go wrong with a stranger's file into BadInput: `what`, and why: a line."""
    try:
        yield
    except BadInput:
        raise
    except Exception as e:
        why = " ".join(str(getattr(e, "strerror", None) or e).split())[:300]
        raise BadInput(f"{what}: {why or type(e).__name__}") from e
