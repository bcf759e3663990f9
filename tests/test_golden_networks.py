"""U-Net and condition encoders give the official code's numbers, from the official weights."""
import json
import math

import pytest
import torch
from goldens import close, golden, weights
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm.attention import SpatialTransformer
from tinyldm.conditioning import ClassEmbedder, SpatialRescaler, TextConfig, TextTransformer
from tinyldm.official import load_into, table
from tinyldm.unet import UNet, UNetConfig

UNETS = ("unet_uncond", "unet_st_d1", "unet_ssn_updown", "unet_concat_inpaint")


def unet_config(u):
    """Our config of an official one. attention_resolutions are factors there, sides here."""
    width = u.get("num_head_channels", -1)
    return UNetConfig(
        u["in_channels"], u["out_channels"], u["image_size"], u["model_channels"],
        tuple(u["channel_mult"]), u["num_res_blocks"],
        tuple(u["image_size"] // f for f in u["attention_resolutions"]),
        width if width > 0 else None, None if width > 0 else u["num_heads"],
        u.get("context_dim"), u.get("transformer_depth", 1), 32,
        u.get("use_scale_shift_norm", False), u.get("resblock_updown", False))


def inputs(ref, kind=""):
    """x with the conditions that lie beside it, t and ctx."""
    parts = [ref[k + kind] for k in ("in/x", "in/concat0", "in/concat1") if k + kind in ref.files]
    ctx = torch.from_numpy(ref["in/context"]) if "in/context" in ref.files else None
    return torch.cat([torch.from_numpy(v) for v in parts], 1), torch.from_numpy(ref["in/t"]), ctx


def official_u_net(name, **change):
    ref = golden(name)
    cfg = unet_config(json.loads(str(ref["config"]))["unet"] | change)
    return ref, load_into(UNet(cfg), weights(ref["recipe"]))


@pytest.mark.parametrize("name", UNETS)
def test_official_u_net(name):
    """Outputs, also of another shape; the gradient of the input, and its norm for every weight."""
    ref, net = official_u_net(name)
    x, t, ctx = inputs(ref)
    c = x.shape[1] - ref["in/x"].shape[1]
    x.requires_grad_()
    y = net(x, t, ctx)
    close(y, ref["out/y"])
    (y * torch.from_numpy(ref["in/cotangent"])).mean().backward()
    close(x.grad[:, :x.shape[1] - c], ref["grad/x"], 2e-4)
    norms = dict(zip(ref["grad/names"], ref["grad/norms"]))
    sources, ours = table(net), dict(net.named_parameters())
    want = [math.hypot(*(norms[k] for k in sources[key].keys)) for key in ours]
    got = torch.stack([p.grad.norm() for p in ours.values()])
    assert_close(got, torch.tensor(want), rtol=2e-4, atol=1e-6)
    with torch.no_grad():
        close(net(*inputs(ref, "_rect")), ref["out/y_rect"])


def test_norms_have_the_official_eps():
    """1e-5, but 1e-6 before the transformers: too little to show in features of size 1."""
    for name in UNETS[:2]:
        _, net = official_u_net(name)
        small = {m.norm for m in net.modules() if isinstance(m, SpatialTransformer)}
        norms = [m for m in net.modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)]
        assert all(m.eps == (1e-6 if m in small else 1e-5) for m in norms) and len(norms) > 10


@pytest.mark.parametrize("variant,change", [
    ("num_heads1", dict(num_head_channels=-1, num_heads=1)),
    ("num_heads8", dict(num_head_channels=-1, num_heads=8)),
    ("num_heads8_legacyFalse", dict(num_head_channels=-1, num_heads=8)),
    ("num_head_channels32_legacyFalse", {})])
@torch.no_grad()
def test_official_u_net_with_other_heads(variant, change):
    """The same weights, split into other heads, are another function."""
    ref, net = official_u_net("unet_st_d1", **change)
    close(net(*inputs(ref)), ref[f"out/y@{variant}"])


@torch.no_grad()
def test_the_new_order_of_q_k_v_rows_is_ours():
    """use_new_attention_order: rows are (q, k, v) x heads. So are ours, without reordering."""
    ref, net = official_u_net("unet_uncond")
    state = weights(ref["recipe"])
    for key, source in table(net).items():
        if ".qkv." in key:
            p = net.get_parameter(key)
            p.copy_(state[source.keys[0]].view(p.shape))
    close(net(*inputs(ref)), ref["out/y@new_attention_order"])


@torch.no_grad()
def test_official_class_embedder():
    ref = golden("cond_stages")
    net = load_into(ClassEmbedder(11, 16), weights(ref["recipe"], "ClassEmbedder/"))
    close(net(torch.from_numpy(ref["in/ClassEmbedder/class_label"])), ref["out/ClassEmbedder/y"])


@torch.no_grad()
def test_official_spatial_rescaler():
    ref = golden("cond_stages")
    net = load_into(SpatialRescaler(11, 3, 2), weights(ref["recipe"], "SpatialRescaler/"))
    one_hot = F.one_hot(torch.from_numpy(ref["in/SpatialRescaler/labels"]), 11)
    close(net(one_hot.movedim(3, 1).float()), ref["out/SpatialRescaler/y"])
    one = {"channel_mapper.weight": torch.eye(3)[..., None, None]}
    net = load_into(SpatialRescaler(3, 3, 1), one)
    close(net(torch.from_numpy(ref["in/SpatialRescaler.odd/x"])), ref["out/SpatialRescaler.odd/y"])


@pytest.mark.parametrize("case", ["BERTEmbedder", "BERTEmbedder.small", "TransformerEmbedder"])
@torch.no_grad()
def test_official_text_transformer(case):
    """Also on the first 7 tokens only, and with embeddings so small that LayerNorm's eps shows."""
    ref = golden("cond_stages")
    state = weights(ref["recipe"], case + "/")
    start = f"w/{case}/"
    state |= {k[len(start):]: torch.from_numpy(ref[k]) for k in ref.files if k.startswith(start)}
    net = load_into(TextTransformer(TextConfig(50, 12, 32, 2)), state)
    ids = torch.from_numpy(ref[f"in/{case}/ids"])
    close(net(ids), ref[f"out/{case}/y"])
    if case == "BERTEmbedder":
        close(net(ids[:, :7]), ref["out/BERTEmbedder/y_first7"])


@torch.no_grad()
def test_clip_text_encoder_equals_its_formulas_written_out():
    """Causal softmax attention with biases, x sigmoid(1.702 x), pre-norm, a LayerNorm at the end.

    No reference numbers are at hand; the paper's own encoder above shares all the rest.
    """
    torch.manual_seed(0)
    tau = TextTransformer(TextConfig(20, 6, 8, 2, 2, 4, clip=True))
    for p in tau.parameters():
        torch.nn.init.normal_(p, 0.1, 0.5)
    y = torch.randint(0, 20, (3, 6))
    h = tau.token.weight[y] + tau.position.weight
    for b in tau.blocks:
        x = F.layer_norm(h, (8,), b.norm1.weight, b.norm1.bias)
        q, k, v = (x @ m.weight.T + m.bias for m in (b.attn.to_q, b.attn.to_k, b.attn.to_v))
        heads = []
        for s in (slice(0, 4), slice(4, 8)):
            logits = (q[..., s] @ k[..., s].transpose(1, 2) / 2).masked_fill(
                torch.ones(6, 6).triu(1).bool(), -torch.inf)
            heads.append(logits.softmax(-1) @ v[..., s])
        h = h + torch.cat(heads, -1) @ b.attn.to_out.weight.T + b.attn.to_out.bias
        x = F.layer_norm(h, (8,), b.norm2.weight, b.norm2.bias)
        x = x @ b.mlp[0].weight.T + b.mlp[0].bias
        h = h + (x / (1 + torch.exp(-1.702 * x))) @ b.mlp[2].weight.T + b.mlp[2].bias
    assert_close(tau(y), F.layer_norm(h, (8,), tau.norm.weight, tau.norm.bias))
