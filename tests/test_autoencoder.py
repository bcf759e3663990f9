"""autoencoder.py against the official code, KL and VQ: every output and the gradients."""
import re

import numpy as np
import pytest
import torch
from goldens import close, golden, weights
from torch.testing import assert_close

from tinyldm.attention import SelfAttention2d
from tinyldm.autoencoder import AEConfig, Autoencoder, Posterior

KL = AEConfig(ch=32, ch_mult=(1, 2, 4), n_res=1, c_z=3, side=32, attn_res=(16,), c_e=4)
VQ = AEConfig(ch=32, ch_mult=(1, 2), n_res=2, c_z=3, side=32, attn_res=(16,), n_codes=64, c_e=4)


def place(key):
    """Where an official weight comes in our order, which is the running order."""
    net, name = key.split(".")[:2]
    a, b = ([int(v) for v in re.findall(r"\d+", key)] + [0, 0])[:2]
    if net not in ("encoder", "decoder"):
        return (["quant_conv", "post_quant_conv", "quantize"].index(net) + 2,)
    part = ["conv_in", *(("mid", "up") if net == "decoder" else ("down", "mid")), "norm_out",
            "conv_out"].index(name)
    kind = re.split(r"\d\.", key)[1].split(".")[0] if name in ("up", "down") else ""
    if name == "mid":
        where = ["block_1", "attn_1", "block_2"].index(key.split(".")[2])
    elif kind in ("block", "attn"):
        where = 2 * b + (kind == "attn")
    else:
        where = 99                                              # down- or upsample: last
    return net == "decoder", part, -a if name == "up" else a * (name == "down"), where


def in_our_order(official):
    """Values by official key -> lists of values, one for each of our weights; q, k, v together."""
    out = []
    for key in sorted(official, key=place):                     # stable: keeps a module's order
        if re.search(r"attn.*\.(q|k|v)\.", key):
            if ".q." in key:
                out += [[official[key.replace(".q.", f".{n}.")] for n in "qkv"]]
        else:
            out.append([official[key]])
    return out


def load(ae, state):
    """Copy official weights into ae."""
    groups, ours = in_our_order(state), [p for k, p in ae.state_dict().items() if k != "z_std"]
    assert len(groups) == len(ours)
    for values, p in zip(groups, ours):
        p.copy_(torch.cat(values).view(p.shape))
    return ae.eval()


def gradients_match(ae, x, out, ref):
    """The gradient of mean(out * cotangent) for x, and its norm for every weight."""
    (out * torch.from_numpy(ref["in/cotangent"])).mean().backward()
    close(x.grad, ref["grad/x"], 2e-4)
    norms = in_our_order(dict(zip(ref["grad/names"], ref["grad/norms"])))
    want = np.array([np.linalg.norm(v) for v in norms])
    ours = [torch.zeros(()) if p.grad is None else p.grad.norm() for p in ae.parameters()]
    assert_close(torch.stack(ours), torch.from_numpy(want).float(), rtol=2e-4, atol=1e-6)


def test_official_kl_autoencoder():
    ref = golden("ae_kl")
    ae = load(Autoencoder(KL), weights(ref["recipe"]))
    x, noise = torch.from_numpy(ref["in/x"]).requires_grad_(), torch.from_numpy(ref["in/noise"])
    close(ae.encoder(x), ref["out/encoder"])
    q = ae.encode(x)
    close(q.mean, ref["out/mean"])
    close(q.logvar, ref["out/logvar"])
    close((q.logvar / 2).exp(), ref["out/std"])
    close(q.kl(), ref["out/kl"])
    close(q.sample(noise), ref["out/sample"])
    x_rec = ae.decode(q.mean)
    close(x_rec, ref["out/dec"])
    gradients_match(ae, x, x_rec, ref)
    q = ae.encode(torch.from_numpy(ref["in/x_rect"]))           # 24 x 40: levels attend as ever
    close(torch.cat([q.mean, q.logvar], 1), ref["out/moments_rect"])
    close(ae.decode(q.mean), ref["out/dec_rect"])


def test_official_vq_autoencoder():
    ref = golden("ae_vq")
    ae = load(Autoencoder(VQ), weights(ref["recipe"]))
    x = torch.from_numpy(ref["in/x"]).requires_grad_()
    close(ae.encoder(x), ref["out/encoder"])
    h = ae.encode(x).mean
    close(h, ref["out/h"])
    q = ae.codebook(h)
    close(q.straight_through(), ref["out/quant"])
    assert (q.k.numpy() == ref["out/indices"]).all()
    close(q.loss(), ref["out/codebook_loss"])
    close(ae.decode(h, quantise=False), ref["out/dec_not_quantized"])
    x_rec, q = ae(x, torch.zeros_like(h))
    close(x_rec, ref["out/dec"])
    close(ae.decode(h), ref["out/dec"])
    assert (q.k.numpy() == ref["out/indices"]).all()
    gradients_match(ae, x, x_rec, ref)


def test_official_posterior():
    """DiagonalGaussianDistribution: log-variances clamped to -30..20, KL, sample."""
    ref = golden("losses")
    ae = Autoencoder(AEConfig(3, 8, (1,), 1, 3, groups=4))
    ae.encoder = ae.quant_conv = torch.nn.Identity()            # so that moments go straight in
    q = ae.encode(torch.from_numpy(ref["in/moments"]))
    for name, ours in (("mean", q.mean), ("logvar", q.logvar), ("kl", q.kl()),
                       ("std", (q.logvar / 2).exp()), ("var", q.logvar.exp()),
                       ("sample", q.sample(torch.from_numpy(ref["in/noise"])))):
        close(ours, ref[f"out/dg/{name}"])
    q = ae.encode(torch.from_numpy(ref["in/moments_big"]))
    close(q.logvar, ref["out/dg/big_logvar"])
    close(q.kl(), ref["out/dg/big_kl"])


def attending(net):
    return sum(isinstance(m, SelfAttention2d) for m in net.modules())


@pytest.mark.parametrize("attn_res,attn_mid,n", [((), True, (1, 1)), ((), False, (0, 0)),
                                                 ((16,), True, (3, 4)), ((8, 32), False, (4, 6))])
def test_attention_follows_each_res_block_of_its_levels(attn_res, attn_mid, n):
    cfg = AEConfig(3, 8, (1, 1, 2), 2, 3, groups=4, side=32, attn_res=attn_res, attn_mid=attn_mid)
    ae = Autoencoder(cfg)
    assert (attending(ae.encoder), attending(ae.decoder)) == n


def test_a_vq_models_posterior_is_a_point_scaled_as_any_other():
    torch.manual_seed(0)
    ae, x = Autoencoder(AEConfig(3, 8, (1, 2), 1, 3, 4, n_codes=8)), torch.randn(4, 3, 16, 16)
    q = ae.encode(x)
    ae.codebook.restart(torch.ones(8, dtype=torch.bool), q.mean, torch.Generator().manual_seed(0))
    x_rec, k = ae.decode(q.mean), ae.codebook(q.mean).k
    assert_close(q.sample(torch.randn_like(q.mean)), q.mean, rtol=0, atol=0)
    assert_close(q.std(), q.mean.std())
    ae.z_std.copy_(q.std())
    z = Posterior(q.mean, q.logvar).scaled(ae.z_std)
    assert_close(ae.encode(x).mean, z.mean)
    assert_close(z.std().item(), 1.0)
    assert_close(ae.decode(z.mean), x_rec)
    x_rec_2, again = ae(x, torch.randn_like(q.mean))
    assert_close(x_rec_2, x_rec)
    assert (again.k == k).all() and len(k.unique()) > 2
    assert_close(again.z, q.mean)
