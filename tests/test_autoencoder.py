"""autoencoder.py: closed forms, and the official code's outputs and gradients."""
import math

import pytest
import torch
from goldens import close, golden, gradients_close, weights
from torch.testing import assert_close

from tinyldm.attention import SelfAttention2d
from tinyldm.autoencoder import (
    AEConfig,
    Autoencoder,
    Pixels,
    Posterior,
    build_autoencoder,
)
from tinyldm.engine.released import load_into
from tinyldm.quantize import rows_of_latents

# The shapes of the golden files ae_kl and ae_vq.
KL = AEConfig(ch=32, ch_mult=(1, 2, 4), n_res=1, c_z=3, side=32, attn_res=(16,), c_e=4)
VQ = AEConfig(
    ch=32, ch_mult=(1, 2), n_res=2, c_z=3, side=32, attn_res=(16,), n_codes=64, c_e=4
)

# A small KL model, f = 2.
TINY = AEConfig(ch=8, ch_mult=(1, 2), n_res=1, c_z=2, groups=4)


# ---- shapes

@pytest.mark.parametrize(
    "ch_mult,f",
    [
        ((1,), 1),
        ((1, 2), 2),
        ((1, 2, 2), 4),
        ((1, 1, 2, 2), 8),
        ((1, 1, 1, 2, 2), 16),
        ((1, 1, 1, 1, 2, 2), 32),
    ],
)
def test_shapes_for_every_f(ch_mult, f):
    config = AEConfig(ch=8, ch_mult=ch_mult, n_res=1, c_z=5, groups=4)
    ae = Autoencoder(config)
    x = torch.randn(2, 3, 64, 32)
    latent_shape = (2, 5, 64 // f, 32 // f)

    x_rec, q = ae(x, torch.zeros(latent_shape))

    assert config.f == f
    assert x_rec.shape == x.shape
    assert q.mean.shape == latent_shape
    assert q.logvar.shape == latent_shape


def n_attention(net):
    return sum(isinstance(module, SelfAttention2d) for module in net.modules())


@pytest.mark.parametrize(
    "attn_res,attn_mid,n_in_encoder,n_in_decoder",
    [
        ((), True, 1, 1),
        ((), False, 0, 0),
        ((16,), True, 3, 4),
        ((8, 32), False, 4, 6),
    ],
)
def test_attention_follows_each_res_block_of_its_levels(
    attn_res, attn_mid, n_in_encoder, n_in_decoder
):
    config = AEConfig(
        ch=8,
        ch_mult=(1, 1, 2),
        n_res=2,
        groups=4,
        side=32,
        attn_res=attn_res,
        attn_mid=attn_mid,
    )
    ae = Autoencoder(config)
    assert n_attention(ae.encoder) == n_in_encoder
    assert n_attention(ae.decoder) == n_in_decoder


def test_kl_f8_has_the_official_number_of_parameters():
    """Encoder, decoder and the two 1x1 convolutions of the released kl-f8."""
    with torch.device("meta"):
        ae = Autoencoder(AEConfig(ch=128, ch_mult=(1, 2, 4, 4), n_res=2, c_z=4))
    assert sum(p.numel() for p in ae.parameters()) == 83_653_863


def test_last_weight_is_that_of_the_convolution_that_makes_the_image():
    """Its gradient for an output channel is that of the channel's own weights only."""
    ae = Autoencoder(TINY)
    ae.decode(torch.randn(1, 2, 8, 8))[:, 0].sum().backward()
    gradient = ae.decoder.last_weight.grad
    assert gradient.shape == (3, 8, 3, 3)
    assert (gradient[0] != 0).any()
    assert (gradient[1:] == 0).all()


# ---- the posterior

def test_kl_equals_torchs():
    q = Posterior(torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4))
    normal = torch.distributions.Normal(q.mean, (q.logvar / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    wanted = torch.distributions.kl_divergence(normal, standard)
    assert_close(q.kl(), wanted.sum((1, 2, 3)))


def test_samples_have_the_std_that_std_predicts():
    torch.manual_seed(0)
    mean = torch.randn(8, 4, 32, 32) * 3
    q = Posterior(mean, torch.full_like(mean, math.log(4.0)))
    z = q.sample(torch.randn_like(mean))
    assert abs((z - mean).std() - 2) < 0.02
    assert_close(q.std(), z.std(), rtol=0.01, atol=0)


# ---- scaling by z_std

def test_z_std_scales_latents_to_variance_1_and_changes_no_reconstruction():
    torch.manual_seed(0)
    ae = Autoencoder(TINY)
    x = torch.randn(4, 3, 16, 16)
    unscaled = ae.encode(x)
    x_rec = ae.decode(unscaled.mean)

    ae.z_std.copy_(unscaled.std())
    q = ae.encode(x)

    assert_close(q.std().item(), 1.0, rtol=1e-5, atol=0)
    assert_close(q.mean * ae.z_std, unscaled.mean)
    assert_close((q.logvar / 2).exp() * ae.z_std, (unscaled.logvar / 2).exp())
    assert_close(ae.decode(q.mean), x_rec)


def tiny_vq():
    """Return a VQ model whose codes are latents of the images that come with it."""
    torch.manual_seed(0)
    ae = Autoencoder(AEConfig(ch=8, ch_mult=(1, 2), n_res=1, groups=4, n_codes=8))
    x = torch.randn(4, 3, 16, 16)
    all_codes = torch.ones(8, dtype=torch.bool)
    z_rows = rows_of_latents(ae.encode(x).mean)
    ae.codebook.restart(all_codes, z_rows, torch.Generator().manual_seed(0))
    return ae, x


def test_a_vq_models_posterior_is_a_point():
    ae, x = tiny_vq()
    q = ae.encode(x)
    assert_close(q.sample(torch.randn_like(q.mean)), q.mean, rtol=0, atol=0)
    assert_close(q.std(), q.mean.std())


def test_a_vq_model_is_scaled_outside_its_codebook():
    """Scaling changes neither the codes nor the reconstruction, in training neither."""
    ae, x = tiny_vq()
    unscaled = ae.encode(x)
    x_rec = ae.decode(unscaled.mean)
    k = ae.codebook(unscaled.mean).k

    ae.z_std.copy_(unscaled.std())
    q = ae.encode(x)
    x_rec_in_training, quantised = ae(x, torch.randn_like(q.mean))

    assert_close(q.mean, unscaled.mean / ae.z_std)
    assert_close(q.std().item(), 1.0)
    assert_close(ae.decode(q.mean), x_rec)
    assert_close(x_rec_in_training, x_rec)
    assert (quantised.k == k).all()
    assert len(k.unique()) > 2
    assert_close(quantised.z, unscaled.mean)


@pytest.mark.parametrize("c_x", [1, 3])
def test_pixels_stand_for_a_stage_one_that_only_scales(c_x):
    pixels = build_autoencoder(Pixels(c_x).cfg)
    pixels.z_std.fill_(0.5)
    x = torch.randn(2, c_x, 4, 4)
    q = pixels.encode(x)
    assert isinstance(pixels, Pixels)
    assert pixels.cfg.f == 1
    assert_close(q.sample(torch.randn_like(x)), x / 0.5)
    assert_close(pixels.decode(q.mean), x)


# ---- the official code's numbers

def test_official_kl_autoencoder():
    """Every step from x to x_rec, and the gradients."""
    ref = golden("ae_kl")
    ae = load_into(Autoencoder(KL), weights(ref["recipe"]))
    x = torch.from_numpy(ref["in/x"]).requires_grad_()
    noise = torch.from_numpy(ref["in/noise"])

    close(ae.encoder(x), ref["out/encoder"])
    q = ae.encode(x)
    close(q.mean, ref["out/mean"])
    close(q.logvar, ref["out/logvar"])
    close((q.logvar / 2).exp(), ref["out/std"])
    close(q.kl(), ref["out/kl"])
    close(q.sample(noise), ref["out/sample"])

    x_rec = ae.decode(q.mean)
    close(x_rec, ref["out/dec"])
    gradients_close(ae, x, x_rec, ref)


@torch.no_grad()
def test_official_kl_autoencoder_on_an_oblong_image():
    """24 x 40: the levels that attend are still those of cfg.side."""
    ref = golden("ae_kl")
    ae = load_into(Autoencoder(KL), weights(ref["recipe"]))
    q = ae.encode(torch.from_numpy(ref["in/x_rect"]))
    close(torch.cat([q.mean, q.logvar], 1), ref["out/moments_rect"])
    close(ae.decode(q.mean), ref["out/dec_rect"])


def test_official_vq_autoencoder():
    """Every step from x to x_rec, and the gradients: straight through to E."""
    ref = golden("ae_vq")
    ae = load_into(Autoencoder(VQ), weights(ref["recipe"]))
    x = torch.from_numpy(ref["in/x"]).requires_grad_()

    close(ae.encoder(x), ref["out/encoder"])
    z = ae.encode(x).mean
    close(z, ref["out/h"])
    q = ae.codebook(z)
    close(q.straight_through(), ref["out/quant"])
    assert (q.k.numpy() == ref["out/indices"]).all()
    close(q.loss(), ref["out/codebook_loss"])
    close(ae.decode(z, quantise=False), ref["out/dec_not_quantized"])

    x_rec = ae.decode(z)
    close(x_rec, ref["out/dec"])
    gradients_close(ae, x, x_rec, ref)


def test_official_vq_autoencoder_as_trained():
    """forward gives what encode and decode give."""
    ref = golden("ae_vq")
    ae = load_into(Autoencoder(VQ), weights(ref["recipe"]))
    x = torch.from_numpy(ref["in/x"]).requires_grad_()

    x_rec, q = ae(x, torch.zeros(ref["out/h"].shape))

    assert (q.k.numpy() == ref["out/indices"]).all()
    close(x_rec, ref["out/dec"])
    gradients_close(ae, x, x_rec, ref)


def posterior_of(moments):
    """Return the Posterior that an Autoencoder makes of mean and logvar, joined."""
    ae = Autoencoder(AEConfig(ch=8, ch_mult=(1,), n_res=1, groups=4))
    ae.encoder = torch.nn.Identity()
    ae.quant_conv = torch.nn.Identity()
    return ae.encode(torch.from_numpy(moments))


def test_official_posterior():
    """DiagonalGaussianDistribution."""
    ref = golden("losses")
    q = posterior_of(ref["in/moments"])
    close(q.mean, ref["out/dg/mean"])
    close(q.logvar, ref["out/dg/logvar"])
    close(q.logvar.exp(), ref["out/dg/var"])
    close((q.logvar / 2).exp(), ref["out/dg/std"])
    close(q.kl(), ref["out/dg/kl"])
    close(q.sample(torch.from_numpy(ref["in/noise"])), ref["out/dg/sample"])


def test_official_posterior_clamps_log_variances():
    ref = golden("losses")
    q = posterior_of(ref["in/moments_big"])
    close(q.logvar, ref["out/dg/big_logvar"])
    close(q.kl(), ref["out/dg/big_kl"])
