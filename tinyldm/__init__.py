"""tinyldm: High-Resolution Image Synthesis with Latent Diffusion Models, to read beside the paper.

Reading order
    layers, attention           the bricks
    quantize, autoencoder       stage one: codes; E, D, q(z | x)                Sec. 3.1, App. G
    perceptual, patchgan        stage one's losses                              Sec. 3.1, App. G
    diffusion, samplers         the process, its loss, and how to run it back   Eq. (1)-(3)
    guidance                    classifier-free guidance                        Table 10
    unet                        eps_theta                                       Sec. 3.2, E.2.1
    tokens, conditioning        from words to ctx = tau(y)                      Sec. 3.3
    tasks                       what each condition is, and its port            Sec. 4.3-4.5
    shapes, degrade, data       the built-in world; lost parts; folders, latent cache
    inception, features, metrics, score, pictures   how good it is, and what it looks like
    presets, training, checkpoint, official         what the scripts share; released models
    inside, generate            attention maps; a whole model, and how it draws
    ../train_ae.py, ../train_ldm.py, ../sample.py   where it all comes together

Symbols (ASCII for the paper's)
    x, x_rec          image, reconstruction, in [-1, 1]   f, c_z      downsampling, latent channels
    z, z_t, z_0, z_T  latent, noised, its end and start   z_std       sigma-hat, the latents' std
    t, T              timestep 0..T-1, their number       beta, alpha, abar  abar_t = prod alpha
    eps, eps_theta    noise, the U-Net's estimate of it   sigma, eta  DDIM's noise and its share
    y, tau, ctx       condition, its encoder, tau(y)      s, p_drop   guidance, share of y dropped
    disc, lam         D_psi, the adaptive weight          q           queries, or q(z | x)
Dims: B batch; C, H, W image or features; c, h, w latent; N places; M tokens; D width."""
import contextlib

class BadInput(Exception):
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
