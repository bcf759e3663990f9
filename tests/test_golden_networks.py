"""U-Net and condition encoders give the official code's numbers with its weights."""
import json

import pytest
import torch
from goldens import close, golden, gradients_close, weights
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm.attention import SpatialTransformer
from tinyldm.conditioning import (
    ClassEmbedder,
    Context,
    SpatialRescaler,
    TextConfig,
    TextTransformer,
)
from tinyldm.engine.released import load_into
from tinyldm.engine.released_names import sources
from tinyldm.unet import UNet, UNetConfig

UNETS = ["unet_uncond", "unet_st_d1", "unet_ssn_updown", "unet_concat_inpaint"]


# ---- the U-Net

def unet_config(official):
    """Return our config of an official one, whose attention_resolutions are factors."""
    side = official["image_size"]
    d_head = official.get("num_head_channels", -1)
    return UNetConfig(
        c_in=official["in_channels"],
        c_out=official["out_channels"],
        side=side,
        ch=official["model_channels"],
        ch_mult=tuple(official["channel_mult"]),
        n_res=official["num_res_blocks"],
        attn_res=tuple(side // f for f in official["attention_resolutions"]),
        d_head=d_head if d_head > 0 else None,
        n_head=official["num_heads"] if d_head <= 0 else None,
        d_ctx=official.get("context_dim"),
        depth=official.get("transformer_depth", 1),
        scale_shift=official.get("use_scale_shift_norm", False),
        res_updown=official.get("resblock_updown", False),
    )


def official_u_net(name, **change):
    """Return a golden file, and our U-Net with its weights; change: of its config."""
    ref = golden(name)
    config = json.loads(str(ref["config"]))["unet"] | change
    net = UNet(unet_config(config))
    return ref, load_into(net, weights(ref["recipe"]))


def inputs(ref, suffix=""):
    """Return z_t, t and ctx of a golden file; suffix "_rect": of its oblong input."""
    z_t = torch.from_numpy(ref[f"in/x{suffix}"])
    t = torch.from_numpy(ref["in/t"])

    tokens = None
    if "in/context" in ref.files:
        tokens = torch.from_numpy(ref["in/context"])

    beside = None
    keys = [f"in/concat{i}{suffix}" for i in range(2)]
    maps = [torch.from_numpy(ref[key]) for key in keys if key in ref.files]
    if maps:
        beside = torch.cat(maps, dim=1)

    return z_t, t, Context(tokens, beside)


@pytest.mark.parametrize("name", UNETS)
def test_official_u_net(name):
    """Outputs and gradients."""
    ref, net = official_u_net(name)
    z_t, t, ctx = inputs(ref)
    z_t.requires_grad_()
    y = net(z_t, t, *ctx)
    close(y, ref["out/y"])
    gradients_close(net, z_t, y, ref)


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_official_u_net_on_an_oblong_input(name):
    ref, net = official_u_net(name)
    z_t, t, ctx = inputs(ref, "_rect")
    close(net(z_t, t, *ctx), ref["out/y_rect"])


@pytest.mark.parametrize("name", ["unet_uncond", "unet_st_d1"])
def test_norms_have_the_official_eps(name):
    """1e-5, but 1e-6 before the transformers: too little to show in the outputs."""
    _, net = official_u_net(name)
    before_transformers = []
    for module in net.modules():
        if isinstance(module, SpatialTransformer):
            before_transformers.append(module.norm)

    norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
    assert len(norms) > 10
    for norm in norms:
        assert norm.eps == (1e-6 if norm in before_transformers else 1e-5)


OTHER_HEADS = {
    "num_heads1": {"num_head_channels": -1, "num_heads": 1},
    "num_heads8": {"num_head_channels": -1, "num_heads": 8},
    "num_heads8_legacyFalse": {"num_head_channels": -1, "num_heads": 8},
    "num_head_channels32_legacyFalse": {},
}


@pytest.mark.parametrize("variant", OTHER_HEADS)
@torch.no_grad()
def test_official_u_net_with_other_heads(variant):
    """The same weights, split into other heads, are another function."""
    ref, net = official_u_net("unet_st_d1", **OTHER_HEADS[variant])
    z_t, t, ctx = inputs(ref)
    close(net(z_t, t, *ctx), ref[f"out/y@{variant}"])


@torch.no_grad()
def test_our_order_of_q_k_v_rows_is_the_official_new_order():
    """With use_new_attention_order, rows are ordered (q|k|v, head), as ours are."""
    ref, net = official_u_net("unet_uncond")
    state = weights(ref["recipe"])
    for key, source in sources(net).items():
        if ".qkv." in key:
            parameter = net.get_parameter(key)
            parameter.copy_(state[source.keys[0]].view(parameter.shape))

    z_t, t, ctx = inputs(ref)
    close(net(z_t, t, *ctx), ref["out/y@new_attention_order"])


# ---- condition encoders

@torch.no_grad()
def test_official_class_embedder():
    ref = golden("cond_stages")
    net = load_into(ClassEmbedder(11, 16), weights(ref["recipe"], "ClassEmbedder/"))
    labels = torch.from_numpy(ref["in/ClassEmbedder/class_label"])
    close(net(labels), ref["out/ClassEmbedder/y"])


@torch.no_grad()
def test_official_spatial_rescaler():
    """On labels and on their one-hot form."""
    ref = golden("cond_stages")
    state = weights(ref["recipe"], "SpatialRescaler/")
    net = load_into(SpatialRescaler(11, 3, 2), state)
    labels = torch.from_numpy(ref["in/SpatialRescaler/labels"])
    one_hot = F.one_hot(labels, 11).movedim(3, 1).float()
    close(net(labels), ref["out/SpatialRescaler/y"])
    close(net(one_hot), ref["out/SpatialRescaler/y"])


@torch.no_grad()
def test_official_spatial_rescaler_of_odd_sides():
    """Only the interpolation, so the convolution is the identity."""
    ref = golden("cond_stages")
    net = SpatialRescaler(3, 3, 1)
    net.conv.weight.copy_(torch.eye(3)[..., None, None])
    y = torch.from_numpy(ref["in/SpatialRescaler.odd/x"])
    close(net(y), ref["out/SpatialRescaler.odd/y"])


def official_text_transformer(ref, case):
    """Return our TextTransformer with the weights of a case of the golden file."""
    state = weights(ref["recipe"], f"{case}/")
    stored = f"w/{case}/"
    for key in ref.files:
        if key.startswith(stored):
            state[key.removeprefix(stored)] = torch.from_numpy(ref[key])
    config = TextConfig(n_vocab=50, n_token=12, d=32, depth=2)
    return load_into(TextTransformer(config), state)


@pytest.mark.parametrize(
    "case", ["BERTEmbedder", "BERTEmbedder.small", "TransformerEmbedder"]
)
@torch.no_grad()
def test_official_text_transformer(case):
    """The small case has embeddings so small that the eps of LayerNorm shows."""
    ref = golden("cond_stages")
    net = official_text_transformer(ref, case)
    ids = torch.from_numpy(ref[f"in/{case}/ids"])
    close(net(ids), ref[f"out/{case}/y"])


@torch.no_grad()
def test_official_text_transformer_on_fewer_tokens():
    ref = golden("cond_stages")
    net = official_text_transformer(ref, "BERTEmbedder")
    ids = torch.from_numpy(ref["in/BERTEmbedder/ids"])
    close(net(ids[:, :7]), ref["out/BERTEmbedder/y_first7"])


def layer_norm(h, norm):
    return F.layer_norm(h, h.shape[-1:], norm.weight, norm.bias)


def affine(x, linear):
    return x @ linear.weight.T + linear.bias


def causal_attention(attn, x, n_head):
    """softmax(q k^T / sqrt(d_head)) v, head by head; token i sees tokens 0..i."""
    M = x.shape[1]
    later = torch.ones(M, M).triu(1).bool()
    q = affine(x, attn.to_q).chunk(n_head, dim=2)
    k = affine(x, attn.to_k).chunk(n_head, dim=2)
    v = affine(x, attn.to_v).chunk(n_head, dim=2)

    heads = []
    for head in range(n_head):
        d_head = q[head].shape[2]
        logits = q[head] @ k[head].transpose(1, 2) / d_head ** 0.5
        logits = logits.masked_fill(later, -torch.inf)
        heads.append(logits.softmax(-1) @ v[head])
    return affine(torch.cat(heads, dim=2), attn.to_out)


@torch.no_grad()
def test_clip_text_encoder_equals_its_formulas_written_out():
    """Causal attention with biases, x sigmoid(1.702 x), pre-norm, a LayerNorm at last.

    There are no official numbers for it; all the rest is the paper's encoder above.
    """
    torch.manual_seed(0)
    tau = TextTransformer(TextConfig(20, 6, 8, 2, 2, 4, clip=True))
    for parameter in tau.parameters():
        nn.init.normal_(parameter, 0.1, 0.5)
    y = torch.randint(0, 20, (3, 6))

    h = tau.token.weight[y] + tau.position.weight
    for block in tau.blocks:
        h = h + causal_attention(block.attn, layer_norm(h, block.norm1), n_head=2)
        inner = affine(layer_norm(h, block.norm2), block.mlp[0])
        inner = inner / (1 + torch.exp(-1.702 * inner))
        h = h + affine(inner, block.mlp[2])

    assert_close(tau(y), layer_norm(h, tau.norm))
