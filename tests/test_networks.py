"""layers, attention, autoencoder, unet, conditioning: shapes, oracles, what must matter."""
import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm.attention import GEGLU, Attention, SelfAttention2d, SpatialTransformer
from tinyldm.autoencoder import AEConfig, Autoencoder, Posterior
from tinyldm.conditioning import TextConfig, TextTransformer
from tinyldm.layers import Downsample, ResBlock, Upsample, timestep_embedding
from tinyldm.unet import UNet, UNetConfig

CFG = UNetConfig(c_in=4, c_out=4, side=8, ch=32, ch_mult=(1, 2), n_res=1, attn_res=(8, 4),
                 d_head=16, d_ctx=24, groups=8)


def wake(net):
    """Give zero-initialised weights a value, so that outputs depend on everything."""
    torch.manual_seed(1)
    for p in net.parameters():
        if (p == 0).all():
            torch.nn.init.normal_(p, 0, 0.1)
    return net.eval()


def test_timestep_embedding_is_cos_then_sin():
    e = timestep_embedding(torch.tensor([0, 7, 999]), 6)
    freq = [1, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    for row, t in zip(e.tolist(), (0, 7, 999)):
        want = [math.cos(t * f) for f in freq] + [math.sin(t * f) for f in freq]
        assert_close(row, want, rtol=0, atol=1e-4)
    assert timestep_embedding(torch.tensor([3]), 7)[0, -1] == 0


def test_attention_equals_the_naive_softmax():
    """Sec. 3.3: softmax(Q K^T / sqrt(d)) V, head by head."""
    torch.manual_seed(0)
    a, x, ctx = Attention(12, 20, 3, 8), torch.randn(2, 5, 12), torch.randn(2, 7, 20)
    q, k, v = x @ a.to_q.weight.T, ctx @ a.to_k.weight.T, ctx @ a.to_v.weight.T
    heads = [((q[..., s] @ k[..., s].transpose(1, 2)) / math.sqrt(8)).softmax(-1) @ v[..., s]
             for s in (slice(0, 8), slice(8, 16), slice(16, 24))]
    assert_close(a(x, ctx), torch.cat(heads, -1) @ a.to_out.weight.T + a.to_out.bias)


def test_self_attention_2d_equals_the_naive_softmax_over_places():
    torch.manual_seed(0)
    a, x = SelfAttention2d(8, n_head=2, groups=4), torch.randn(2, 8, 3, 5)
    w = a.qkv.weight.flatten(1)
    h = a.norm(x).flatten(2)
    q, k, v = (w @ h + a.qkv.bias[:, None]).chunk(3, dim=1)                     # (B, C, N)
    out = torch.cat([v[:, s] @ (q[:, s].transpose(1, 2) @ k[:, s] / 2).softmax(-1).transpose(1, 2)
                     for s in (slice(0, 4), slice(4, 8))], 1)
    assert_close(a(x), x + a.proj_out(out.view(2, 8, 3, 5)))


def test_geglu_gates_the_first_half_by_the_second():
    g, x = GEGLU(4), torch.randn(2, 3, 4)
    h = x @ g.proj.weight.T + g.proj.bias
    gate = h[..., 16:]
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    assert_close(g(x), (h[..., :16] * gelu) @ g.out.weight.T + g.out.bias)


def test_missing_context_raises_and_never_becomes_self_attention():
    net = SpatialTransformer(32, 24, 2, 16, groups=8)
    with pytest.raises(ValueError, match="ctx"):
        net(torch.randn(1, 32, 4, 4), None)
    with pytest.raises(ValueError, match="ctx"):
        UNet(CFG)(torch.randn(1, 4, 8, 8), torch.tensor([3]))


def test_autoencoder_downsampling_pads_right_and_bottom_only():
    """A kernel that reads its first tap sees pixel (0, 0) at the corner; the U-Net's, padding."""
    x = torch.randn(1, 1, 6, 6)
    padded = F.pad(x, (1, 1, 1, 1))
    for asymmetric, want in ((True, x[:, :, ::2, ::2]), (False, padded[:, :, 0:6:2, 0:6:2])):
        d = Downsample(1, asymmetric)
        d.conv.weight.data.zero_()[0, 0, 0, 0] = 1
        d.conv.bias.data.zero_()
        assert_close(d(x), want)


def test_upsample_repeats_each_pixel_fourfold_before_its_conv():
    u, x = Upsample(2), torch.randn(1, 2, 3, 4)
    assert_close(u(x), u.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)))


def test_resblock_adds_the_timestep_between_the_convs():
    net, x, emb = wake(ResBlock(16, 24, 8, groups=4)), torch.randn(2, 16, 5, 5), torch.randn(2, 8)
    h = F.conv2d(F.silu(F.group_norm(x, 4, net.norm1.weight, net.norm1.bias, 1e-5)),
                 net.conv1.weight, net.conv1.bias, padding=1)
    h = h + (F.silu(emb) @ net.emb.weight.T + net.emb.bias)[..., None, None]
    h = F.conv2d(F.silu(F.group_norm(h, 4, net.norm2.weight, net.norm2.bias, 1e-5)),
                 net.conv2.weight, net.conv2.bias, padding=1)
    assert_close(net(x, emb), net.skip(x) + h)


@pytest.mark.parametrize("mult", [(1,), (1, 2), (1, 2, 2), (1, 1, 2, 2), (1, 1, 1, 2, 2),
                                  (1, 1, 1, 1, 2, 2)])
def test_autoencoder_shapes_for_every_f(mult):
    cfg = AEConfig(3, 8, mult, 1, c_z=5, groups=4)
    ae, x = Autoencoder(cfg), torch.randn(2, 3, 64, 32)
    x_rec, q = ae(x, torch.zeros(2, 5, 64 // cfg.f, 32 // cfg.f))
    assert cfg.f == 2 ** (len(mult) - 1) and x_rec.shape == x.shape
    assert q.mean.shape == q.logvar.shape == (2, 5, 64 // cfg.f, 32 // cfg.f)


def test_posterior_kl_equals_torchs():
    q = Posterior(torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4))
    normal = torch.distributions.Normal(q.mean, (q.logvar / 2).exp())
    want = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0., 1.))
    assert_close(q.kl(), want.sum((1, 2, 3)))


def test_posterior_samples_and_their_std():
    torch.manual_seed(0)
    q = Posterior(torch.randn(8, 4, 32, 32) * 3, torch.full((8, 4, 32, 32), math.log(4.0)))
    z = q.sample(torch.randn_like(q.mean))
    assert abs((z - q.mean).std() - 2) < 0.02
    assert_close(q.std(), z.std(), rtol=0.01, atol=0)


def test_z_std_scales_latents_to_variance_1_and_back_and_changes_no_picture():
    torch.manual_seed(0)
    ae, x = Autoencoder(AEConfig(3, 8, (1, 2), 1, 2, 4)), torch.randn(4, 3, 16, 16)
    raw = ae.encode(x)
    x_rec = ae.decode(raw.mean)
    ae.z_std.copy_(raw.std())
    q = ae.encode(x)
    assert_close(q.std().item(), 1.0, rtol=1e-5, atol=0)
    assert_close(q.mean * ae.z_std, raw.mean)
    assert_close((q.logvar / 2).exp() * ae.z_std, (raw.logvar / 2).exp())
    assert_close(ae.decode(q.mean), x_rec)


def test_kl_f8_has_the_official_number_of_parameters():
    """83,653,863: encoder, decoder and the two 1x1 convs of the released kl-f8."""
    with torch.device("meta"):
        ae = Autoencoder(AEConfig(ch=128, ch_mult=(1, 2, 4, 4), n_res=2, c_z=4))
    assert sum(p.numel() for p in ae.parameters()) == 83_653_863


def test_stable_diffusions_u_net_has_the_official_number_of_parameters_but_for_its_head_rule():
    """The released cin256 (f = 8): 394,984,196 with d_head 32, ctx 512, attention at 32, 16, 8."""
    with torch.device("meta"):
        net = UNet(UNetConfig(c_in=4, c_out=4, side=32, ch=256, ch_mult=(1, 2, 4),
                              attn_res=(32, 16, 8), d_head=32, d_ctx=512))
    assert sum(p.numel() for p in net.parameters()) == 394_984_196


def test_uncond_u_net_has_the_official_number_of_parameters():
    """celeba256, ffhq256 and lsun_beds256: 274,056,163."""
    with torch.device("meta"):
        net = UNet(UNetConfig())
    assert sum(p.numel() for p in net.parameters()) == 274_056_163


def test_u_net_begins_as_zero_and_keeps_shapes():
    net = UNet(CFG)
    for h, w in ((8, 8), (6, 10)):
        out = net(torch.randn(2, 4, h, w), torch.tensor([0, 999]), torch.randn(2, 5, 24))
        assert out.shape == (2, 4, h, w) and (out == 0).all()


def test_u_net_depends_on_time_and_on_every_token_and_on_all_places():
    net = wake(UNet(CFG))
    z, t, ctx = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 24)
    z.requires_grad_()
    ctx.requires_grad_()
    out = net(z, t, ctx)
    out[0, 0, 0, 0].backward()
    assert (z.grad.abs().sum(1) > 0).all() and (ctx.grad.abs().sum(2) > 0).all()
    assert (net(z, t + 1, ctx) - out).abs().max() > 1e-3


def test_checkpointing_gradients_changes_nothing():
    net = wake(UNet(CFG))
    z, t, ctx = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), torch.randn(2, 5, 24)
    grads = []
    for lean in (False, True):
        net.ckpt_grad = lean
        net.zero_grad()
        net(z, t, ctx).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert_close(grads[0], grads[1])


def test_text_transformer_tells_orders_apart():
    """Positions must reach the output as words do: a swap moves ctx as much as a new word."""
    torch.manual_seed(0)
    tau = TextTransformer(TextConfig(50, 12, 64, 2, 4, 16))
    y = torch.randint(2, 50, (1, 12))
    ctx = tau(y)
    assert ctx.shape == (1, 12, 64)
    swapped, other = y.clone(), y.clone()
    swapped[0, [3, 7]] = y[0, [7, 3]]
    other[0, 3] = (y[0, 3] + 1) % 50
    pooled = [tau(v).mean(1) for v in (y, swapped, other)]
    assert (pooled[1] - pooled[0]).norm() > 0.1 * (pooled[2] - pooled[0]).norm()


def test_one_batch_overfits():
    torch.manual_seed(0)
    net = UNet(CFG)
    z, t, ctx = torch.randn(4, 4, 8, 8), torch.tensor([1, 300, 600, 999]), torch.randn(4, 5, 24)
    eps = torch.randn(4, 4, 8, 8)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        loss = (net(z, t, ctx) - eps).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < 0.2
