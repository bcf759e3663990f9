"""layers, attention, unet, conditioning: each layer against its formula written out."""
import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm.attention import (
    GEGLU,
    Attention,
    SelfAttention2d,
    SpatialTransformer,
    TransformerBlock,
)
from tinyldm.autoencoder import AEConfig, build_autoencoder
from tinyldm.beyond.dit import DiTBlock, DiTConfig, places
from tinyldm.conditioning import (
    ClassEmbedder,
    Context,
    SpatialRescaler,
    TextConfig,
    TextTransformer,
)
from tinyldm.layers import Downsample, ResBlock, Upsample, timestep_embedding
from tinyldm.unet import BACKBONES, UNet, UNetConfig

# A small U-Net that attends to 24-wide tokens.
CFG = UNetConfig(
    c_in=4,
    c_out=4,
    side=8,
    ch=32,
    ch_mult=(1, 2),
    n_res=1,
    attn_res=(8, 4),
    d_head=16,
    d_ctx=24,
    groups=8,
)


# The same of every backbone: each of BACKBONES has a row here.
SHAPES = {
    "unet": CFG,
    "control": CFG,
    "dit": DiTConfig(c_in=4, c_out=4, side=8, ch=32, d_head=16, d_ctx=24, n_block=2, patch=2),
}

# Of one level, for what takes long.
ONE_LEVEL = dataclasses.replace(CFG, ch_mult=(1,), attn_res=(8,))
SMALLEST = {"unet": ONE_LEVEL, "control": ONE_LEVEL}

every_backbone = pytest.mark.parametrize(
    "backbone", [name for name, backbone in BACKBONES.items() if backbone.is_eps_theta]
)


def build(backbone, **changes):
    """Build a small network of a backbone."""
    return BACKBONES[backbone].build(dataclasses.replace(SHAPES[backbone], **changes))


def wake(net):
    """Give zero-initialised weights a value, so that outputs depend on everything."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if (parameter == 0).all():
            torch.nn.init.normal_(parameter, 0, 0.1)
    return net.eval()


def inputs(batch=2):
    """Return z_t, t and tokens for CFG."""
    z_t = torch.randn(batch, 4, 8, 8)
    t = torch.linspace(3, 500, batch).long()
    tokens = torch.randn(batch, 5, 24)
    return z_t, t, tokens


def n_parameters(net):
    return sum(p.numel() for p in net.parameters())


# ---- layers

@pytest.mark.parametrize("t", [0, 7, 999])
def test_timestep_embedding_is_cosines_then_sines(t):
    frequencies = [1, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    cosines = [math.cos(t * frequency) for frequency in frequencies]
    sines = [math.sin(t * frequency) for frequency in frequencies]

    features = timestep_embedding(torch.tensor([t]), 6)

    assert_close(features, torch.tensor([cosines + sines]), rtol=0, atol=1e-4)


def test_timestep_embedding_of_odd_width_ends_in_a_zero():
    features = timestep_embedding(torch.tensor([3]), 7)
    assert features.shape == (1, 7)
    assert features[0, -1] == 0


def half_a_branch(x, norm, conv):
    """GroupNorm with 4 groups, SiLU, 3x3 convolution, all with eps_theta's eps."""
    h = F.group_norm(x, 4, norm.weight, norm.bias, 1e-5)
    return F.conv2d(F.silu(h), conv.weight, conv.bias, padding=1)


def test_resblock_adds_the_timestep_between_the_convolutions():
    net = wake(ResBlock(16, 24, 8, groups=4))
    x = torch.randn(2, 16, 5, 5)
    emb = torch.randn(2, 8)

    h = half_a_branch(x, net.norm1, net.conv1)
    offset = F.silu(emb) @ net.emb.weight.T + net.emb.bias
    h = half_a_branch(h + offset[..., None, None], net.norm2, net.conv2)

    assert_close(net(x, emb), net.skip(x) + h)


def test_scale_shift_acts_after_the_second_norm():
    net = wake(ResBlock(16, 24, 8, groups=4, scale_shift=True))
    x = torch.randn(2, 16, 5, 5)
    emb = torch.randn(2, 8)

    h = half_a_branch(x, net.norm1, net.conv1)
    features = (F.silu(emb) @ net.emb.weight.T + net.emb.bias)[..., None, None]
    h = net.norm2(h) * (1 + features[:, :24]) + features[:, 24:]
    h = net.conv2(F.silu(h))

    assert_close(net(x, emb), net.skip(x) + h)


def test_resblock_resamples_its_input_and_its_branch():
    halve = torch.nn.AvgPool2d(2)
    net = wake(ResBlock(16, 16, 8, groups=4, resample=halve))
    x = torch.randn(2, 16, 6, 6)
    emb = torch.randn(2, 8)

    h = net.conv1(halve(F.silu(net.norm1(x))))
    h = h + net.emb(F.silu(emb))[..., None, None]
    h = net.conv2(F.silu(net.norm2(h)))

    assert_close(net(x, emb), halve(x) + h)


def corner_tap(downsample):
    """Make a Downsample return the value under the top left corner of its kernel."""
    downsample.conv.weight.data.zero_()[0, 0, 0, 0] = 1
    downsample.conv.bias.data.zero_()
    return downsample


def test_asymmetric_downsampling_pads_right_and_bottom_only():
    """In E the kernel's first tap begins at pixel (0, 0)."""
    x = torch.randn(1, 1, 6, 6)
    net = corner_tap(Downsample(1, asymmetric=True))
    assert_close(net(x), x[:, :, ::2, ::2])


def test_symmetric_downsampling_pads_all_sides():
    """In the U-Net the kernel's first tap begins in the padding."""
    x = torch.randn(1, 1, 6, 6)
    padded = F.pad(x, (1, 1, 1, 1))
    net = corner_tap(Downsample(1))
    assert_close(net(x), padded[:, :, 0:6:2, 0:6:2])


def test_upsample_repeats_each_value_fourfold_before_its_convolution():
    net = Upsample(2)
    x = torch.randn(1, 2, 3, 4)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_close(net(x), net.conv(repeated))


# ---- attention

def naive_attention(q, k, v, n_head):
    """softmax(q k^T / sqrt(d_head)) v, head by head; (B, N | M, n_head * d_head)."""
    heads = []
    for q_head, k_head, v_head in zip(
        q.chunk(n_head, dim=2), k.chunk(n_head, dim=2), v.chunk(n_head, dim=2)
    ):
        logits = q_head @ k_head.transpose(1, 2) / math.sqrt(q_head.shape[2])
        heads.append(logits.softmax(-1) @ v_head)
    return torch.cat(heads, dim=2)


def test_attention_equals_the_naive_softmax():
    """Sec. 3.3: softmax(Q K^T / sqrt(d)) V, Q from x, K and V from ctx."""
    torch.manual_seed(0)
    net = Attention(12, 20, 3, 8)
    x = torch.randn(2, 5, 12)
    ctx = torch.randn(2, 7, 20)

    q = x @ net.to_q.weight.T
    k = ctx @ net.to_k.weight.T
    v = ctx @ net.to_v.weight.T
    wanted = naive_attention(q, k, v, 3) @ net.to_out.weight.T + net.to_out.bias

    assert_close(net(x, ctx), wanted)


def test_self_attention_2d_equals_the_naive_softmax_over_places():
    torch.manual_seed(0)
    net = SelfAttention2d(8, n_head=2, groups=4)
    x = torch.randn(2, 8, 3, 5)

    places = net.norm(x).flatten(2).transpose(1, 2)                 # (B, N, C)
    qkv = places @ net.qkv.weight.flatten(1).T + net.qkv.bias       # (B, N, 3 C)
    q, k, v = qkv.chunk(3, dim=2)
    h = naive_attention(q, k, v, 2).transpose(1, 2).view(2, 8, 3, 5)

    assert_close(net(x), x + net.proj_out(h))


def test_geglu_multiplies_the_first_half_by_the_gelu_of_the_second():
    net = GEGLU(4)
    x = torch.randn(2, 3, 4)

    value, gate = (x @ net.proj.weight.T + net.proj.bias).chunk(2, dim=2)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    wanted = (value * gelu) @ net.out.weight.T + net.out.bias

    assert_close(net(x), wanted)


def test_transformer_block_is_self_attention_then_cross_attention_then_mlp():
    """The released code's order, each after its own norm and added to its input."""
    torch.manual_seed(0)
    net = TransformerBlock(16, 24, 2, 8)
    for number, norm in enumerate([net.norm1, net.norm2, net.norm3]):
        torch.nn.init.constant_(norm.weight, 1 + number)
    x = torch.randn(2, 5, 16)
    ctx = torch.randn(2, 7, 24)

    normal = F.layer_norm(x, (16,))
    h = x + net.self_attn(normal, normal)
    h = h + net.cross_attn(2 * F.layer_norm(h, (16,)), ctx)
    h = h + net.mlp(3 * F.layer_norm(h, (16,)))

    assert_close(net(x, ctx), h)


def test_a_missing_context_raises_and_never_becomes_self_attention():
    net = SpatialTransformer(32, 24, 2, 16, groups=8)
    with pytest.raises(ValueError, match="ctx"):
        net(torch.randn(1, 32, 4, 4), None)


# ---- eps_theta and its two ports

@every_backbone
def test_a_backbone_needs_tokens_if_it_attends(backbone):
    z_t, t, _ = inputs()
    with pytest.raises(ValueError, match="attends to a condition"):
        build(backbone)(z_t, t, *Context())


@every_backbone
def test_a_backbone_refuses_tokens_if_it_does_not_attend(backbone):
    z_t, t, tokens = inputs()
    with pytest.raises(ValueError, match="cannot attend"):
        build(backbone, d_ctx=None)(z_t, t, *Context(tokens=tokens))


@every_backbone
def test_a_backbone_compiles_to_one_graph(backbone):
    """`--compile` meets nothing that it must leave to Python."""
    net = BACKBONES[backbone].build(SMALLEST.get(backbone, SHAPES[backbone]))
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert compiled(*inputs()).shape == inputs()[0].shape


@pytest.mark.parametrize("codes", [{}, {"n_codes": 16}], ids=["kl", "vq"])
def test_stage_one_compiles_to_one_graph(codes):
    cfg = AEConfig(ch=8, ch_mult=(1, 2), groups=4, c_z=4, side=16, attn_res=(8,), **codes)
    compiled = torch.compile(build_autoencoder(cfg), fullgraph=True, backend="eager")
    x_rec, _ = compiled(torch.randn(1, 3, 16, 16), torch.randn(1, 4, 8, 8))
    assert x_rec.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("tau, y", [
    (TextTransformer(TextConfig(50, 12, 64, 2, 4, 16)), torch.ones(2, 12).long()),
    (ClassEmbedder(5, 8), torch.tensor([1, 2])),
    (SpatialRescaler(3, 2, 1), torch.zeros(2, 8, 8).long()),
], ids=["text", "class", "semantic"])
def test_tau_compiles_to_one_graph(tau, y):
    compiled = torch.compile(tau, fullgraph=True, backend="eager")
    assert_close(compiled(y), tau(y))


@pytest.mark.parametrize(
    "backbone", [k for k, v in BACKBONES.items() if v.is_eps_theta and v.concatenates]
)
def test_beside_is_concatenated_behind_z_t(backbone):
    """The same channels give the same output, whether they come by z_t or beside it."""
    net = wake(build(backbone, c_in=7, d_ctx=None))
    z_t, t, _ = inputs()
    beside = torch.randn(2, 3, 8, 8)
    joined = torch.cat([z_t, beside], dim=1)
    assert_close(net(z_t, t, *Context(beside=beside)), net(joined, t), rtol=0, atol=0)


@every_backbone
def test_both_ports_can_be_used_at_once(backbone):
    net = wake(build(backbone, c_in=7))
    z_t, t, tokens = inputs()
    beside = torch.randn(2, 3, 8, 8)

    out = net(z_t, t, *Context(tokens, beside))

    assert out.shape == z_t.shape
    assert (net(z_t, t, tokens + 1, beside) - out).abs().max() > 1e-3
    assert (net(z_t, t, tokens, beside + 1) - out).abs().max() > 1e-3


@every_backbone
@pytest.mark.parametrize("h,w", [(8, 8), (6, 10)])
def test_a_backbone_begins_as_zero_and_keeps_shapes(backbone, h, w):
    z_t = torch.randn(2, 4, h, w)
    out = build(backbone)(z_t, torch.tensor([0, 999]), torch.randn(2, 5, 24))
    assert out.shape == z_t.shape
    assert (out == 0).all()


@pytest.mark.parametrize("d_ctx", [None, 24])
def test_every_block_of_the_u_net_begins_as_the_identity(d_ctx):
    """All but the skip of a ResBlock, which may change the number of channels."""
    net = UNet(dataclasses.replace(CFG, d_ctx=d_ctx))
    emb = torch.randn(2, 128)
    tokens = torch.randn(2, 5, 24)
    n_blocks = 0

    for block in net.modules():
        if isinstance(block, ResBlock):
            x = torch.randn(2, block.norm1.num_channels, 4, 4)
            assert_close(block(x, emb), block.skip(x), rtol=0, atol=0)
        elif isinstance(block, SpatialTransformer):
            x = torch.randn(2, block.norm.num_channels, 4, 4)
            assert_close(block(x, tokens), x, rtol=0, atol=0)
        elif isinstance(block, SelfAttention2d):
            x = torch.randn(2, block.norm.num_channels, 4, 4)
            assert_close(block(x), x, rtol=0, atol=0)
        else:
            continue
        n_blocks += 1

    assert n_blocks == 15


@every_backbone
def test_a_backbone_depends_on_the_timestep_on_every_token_and_on_every_place(backbone):
    net = wake(build(backbone))
    z_t, t, tokens = inputs(1)
    z_t.requires_grad_()
    tokens.requires_grad_()

    out = net(z_t, t, tokens)
    out[0, 0, 0, 0].backward()

    assert (z_t.grad.abs().sum(1) > 0).all()
    assert (tokens.grad.abs().sum(2) > 0).all()
    assert (net(z_t, t + 1, tokens) - out).abs().max() > 1e-3


@every_backbone
def test_computing_activations_twice_changes_no_gradient(backbone):
    net = wake(build(backbone))
    z_t, t, tokens = inputs()
    gradients = []
    for ckpt_grad in (False, True):
        net.ckpt_grad = ckpt_grad
        net.zero_grad()
        net(z_t, t, tokens).square().mean().backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    assert_close(gradients[0], gradients[1])


@every_backbone
def test_a_backbone_overfits_one_batch(backbone):
    torch.manual_seed(0)
    net = build(backbone, side=4, ch=16)
    z_t = torch.randn(2, 4, 4, 4)
    t = torch.tensor([1, 200])
    tokens = torch.randn(2, 5, 24)
    eps = torch.randn(2, 4, 4, 4)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2, fused=True)
    for _ in range(20):
        loss = (net(z_t, t, tokens) - eps).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.2


def test_every_block_of_the_dit_begins_as_the_identity():
    net = build("dit")
    x = torch.randn(2, 16, 32)
    for block in net.blocks:
        assert isinstance(block, DiTBlock)
        assert_close(block(x, torch.randn(2, 32), torch.randn(2, 5, 24)), x, rtol=0, atol=0)


def test_a_dit_block_is_ada_ln_zeros_formula():
    """x + g1 Attn((1 + s1) LN(x) + b1), cross-attention, x + g3 MLP((1 + s3) LN(x) + b3)."""
    block = wake(DiTBlock(SHAPES["dit"]))
    x = torch.randn(2, 6, 32)
    emb = torch.randn(2, 32)
    tokens = torch.randn(2, 5, 24)

    b1, s1, g1, b3, s3, g3 = block.ada(F.silu(emb)).unsqueeze(1).split(32, dim=2)
    h = F.layer_norm(x, (32,), eps=1e-6) * (1 + s1) + b1
    wanted = x + g1 * block.self_attn(h, h)
    wanted = wanted + block.cross_attn(block.norm2(wanted), tokens)
    h = F.layer_norm(wanted, (32,), eps=1e-6) * (1 + s3) + b3
    wanted = wanted + g3 * block.mlp(h)
    assert_close(block(x, emb, tokens), wanted)


def test_a_dit_puts_each_patch_back_where_it_was():
    """With no blocks' doing, what changes in one patch changes that patch alone."""
    net = wake(build("dit", d_ctx=None, n_block=1))
    net.blocks[0].ada.weight.data.zero_()
    net.blocks[0].ada.bias.data.zero_()
    z_t, t, _ = inputs(1)
    changed = z_t.clone()
    changed[..., 2:4, 6:8] += 1
    differs = (net(changed, t) - net(z_t, t)).abs().sum((0, 1)) > 1e-6
    wanted = torch.zeros(8, 8, dtype=torch.bool)
    wanted[2:4, 6:8] = True
    assert torch.equal(differs, wanted)


def test_places_tell_rows_and_columns_apart():
    features = places(3, 5, 16, torch.zeros(()))
    assert features.shape == (15, 16)
    assert len(features.unique(dim=0)) == 15
    assert_close(features[8, :8], timestep_embedding(torch.tensor([1]), 8)[0])      # row 1
    assert_close(features[8, 8:], timestep_embedding(torch.tensor([3]), 8)[0])      # column 3


@pytest.mark.parametrize("name,params", [("S", 33e6), ("B", 130e6), ("L", 458e6), ("XL", 675e6)])
def test_dits_have_the_sizes_of_the_papers_table(name, params):
    """Table 1 and 4: with a class embedding, which is not counted here, and without attention
    to tokens; at patches of 2."""
    n_block, ch, n_head = {
        "S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16),
    }[name]
    config = DiTConfig(c_in=4, c_out=8, ch=ch, n_head=n_head, n_block=n_block, patch=2)
    with torch.device("meta"):
        net = BACKBONES["dit"].build(config)
    assert abs(n_parameters(net) / params - 1) < 0.02


def test_the_unconditional_u_net_has_the_official_number_of_parameters():
    """celeba256, ffhq256 and lsun_beds256: the defaults of UNetConfig."""
    with torch.device("meta"):
        net = UNet(UNetConfig())
    assert n_parameters(net) == 274_056_163


def test_the_class_conditional_u_net_has_the_official_number_of_parameters():
    """cin256 with f = 8."""
    config = UNetConfig(
        c_in=4,
        c_out=4,
        side=32,
        ch=256,
        ch_mult=(1, 2, 4),
        attn_res=(32, 16, 8),
        d_head=32,
        d_ctx=512,
    )
    with torch.device("meta"):
        net = UNet(config)
    assert n_parameters(net) == 394_984_196


# ---- condition encoders

def test_text_transformer_tells_orders_apart():
    """Positions reach the output: a swap of two words moves ctx, as a new word does."""
    torch.manual_seed(0)
    tau = TextTransformer(TextConfig(50, 12, 64, 2, 4, 16))
    y = torch.randint(2, 50, (1, 12))
    swapped = y.clone()
    swapped[0, [3, 7]] = y[0, [7, 3]]
    new_word = y.clone()
    new_word[0, 3] = (y[0, 3] + 1) % 50

    ctx = tau(y)
    moved_by_swap = (tau(swapped) - ctx).mean(1).norm()
    moved_by_word = (tau(new_word) - ctx).mean(1).norm()

    assert ctx.shape == (1, 12, 64)
    assert moved_by_swap > 0.1 * moved_by_word


def test_an_unknown_label_is_a_map_of_zeros():
    tau = SpatialRescaler(c_in=5, c_out=3, n=1)
    unknown = torch.full((1, 4, 4), -1)
    assert_close(tau(unknown), torch.zeros(1, 3, 2, 2), rtol=0, atol=0)


def test_label_maps_become_shares_of_classes():
    tau = SpatialRescaler(c_in=2, c_out=2, n=1)
    tau.conv.weight.data = torch.eye(2)[..., None, None]
    labels = torch.tensor([[[0, 0], [0, 1]]])
    assert_close(tau(labels).flatten(), torch.tensor([0.75, 0.25]))
