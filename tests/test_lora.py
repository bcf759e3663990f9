"""lora.py: pairs begin as nothing, are trained alone, and merge into what they computed."""
import copy
import functools
import json

import pytest
import torch
from made_up import alive, made_up_items, made_up_model
from torch import nn
from torch.testing import assert_close

from tinyldm.attention import Attention, SelfAttention2d
from tinyldm.engine.open import BUNDLED, open_lora, open_model, save_model
from tinyldm.engine.weights import write_state
from tinyldm.errors import BadInput
from tinyldm.lora import add_pairs, lora_state, merge, pairs_of, projections
from tinyldm.tasks import TASKS

ONE_STEP = ["--steps", 1, "--n", 1]


@functools.cache
def first_model(task):
    return made_up_model(task)


def new_model(task):
    """A random model of a task, which a test may change."""
    return copy.deepcopy(first_model(task))


def nets_of(model):
    """The networks of a model that have projections."""
    nets = {"unet": model.unet}
    if model.tau is not None and projections(model.tau):
        nets["tau"] = model.tau
    return nets


def alive_pairs(nets, rank=2, seed=0):
    """Put random pairs beside all projections, and return them; they are not trained yet."""
    for net in nets.values():
        add_pairs(net, rank)
    pairs = pairs_of(nets)
    for i, pair in enumerate(pairs.values()):
        alive(pair, seed + i).requires_grad_(True)
    return pairs


def predict(model):
    """What the U-Net says of two noisy latents, with made-up conditions."""
    torch.manual_seed(0)
    items = made_up_items(2)
    batch = {name: [item[name] for item in items] for name in model.task.fields}
    ctx = model.task.context(model.task.encode(batch), model.tau, model.ae)
    h, w = (side // model.ae.cfg.f for side in model.config.size)
    z = torch.randn(2, model.ae.cfg.c_z, h, w)
    return model.unet(z, torch.tensor([3, 700]), *ctx)


def random_lora(model, rank=2, seed=0):
    """The tensors of a LoRA of a model, which stays as it is."""
    return lora_state(alive_pairs(copy.deepcopy(nets_of(model)), rank, seed))


# ---- the pairs

@pytest.mark.parametrize("task", TASKS)
def test_a_network_with_new_pairs_computes_the_same_bits(task):
    model = new_model(task)
    before = predict(model)
    for net in nets_of(model).values():
        add_pairs(net, 4)
    assert torch.equal(predict(model), before)


@pytest.mark.parametrize("task", TASKS)
def test_every_projection_has_a_pair_and_only_pairs_are_trained(task):
    model = new_model(task)
    nets = nets_of(model)
    frozen = {name: copy.deepcopy(net.state_dict()) for name, net in nets.items()}
    n_projections = 0
    for net in nets.values():
        net.requires_grad_(True)
        for module in net.modules():
            n_projections += 4 * isinstance(module, Attention)
            n_projections += 2 * isinstance(module, SelfAttention2d)

    pairs = alive_pairs(nets)
    assert len(pairs) == n_projections > 0
    before = copy.deepcopy(pairs.state_dict())
    optimiser = torch.optim.SGD(pairs.parameters(), lr=1.0)
    predict(model).square().mean().backward()
    optimiser.step()

    for name, x in pairs.state_dict().items():
        # To a single token, a place attends fully, whatever q and k are.
        is_idle = "cross_attn/to_q" in name or "cross_attn/to_k" in name
        if not (task == "class" and is_idle):
            assert not torch.equal(x, before[name]), name
    for name, net in nets.items():
        state = net.state_dict()
        for key, x in frozen[name].items():
            with_pair = key.replace(".weight", ".projection.weight")
            with_pair = with_pair.replace(".bias", ".projection.bias")
            now = state[with_pair] if with_pair in state else state[key]
            assert torch.equal(now, x), key
        trained = [p for p in net.parameters() if p.requires_grad]
        of_pairs = {id(p) for p in pairs.parameters()}
        assert trained and all(id(p) in of_pairs for p in trained)


def test_a_pair_is_up_down_beside_its_projection():
    """For a Linear layer and for a 1x1 convolution, against the sum written out."""
    x = torch.randn(2, 5, 8)
    attention = alive(Attention(8, 8, 2, 4))
    pair = alive_pairs({"x": attention}, rank=3)["x/to_v"]
    linear = attention.to_v.projection
    W = linear.weight + pair.up.weight @ pair.down.weight
    assert pair.down.weight.shape == (3, 8)
    assert_close(attention.to_v(x), x @ W.T)

    x = torch.randn(2, 8, 4, 4)
    attention = alive(SelfAttention2d(8, groups=2))
    pair = alive_pairs({"x": attention}, rank=3)["x/qkv"]
    conv = attention.qkv.projection
    W = conv.weight[:, :, 0, 0] + pair.up.weight[:, :, 0, 0] @ pair.down.weight[:, :, 0, 0]
    expected = torch.einsum("oi,bihw->bohw", W, x) + conv.bias[:, None, None]
    assert_close(attention.qkv(x), expected)


def test_new_pairs_are_random_but_the_same_for_a_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        attention = Attention(8, 8, 2, 4)
        add_pairs(attention, 2)
        states.append(lora_state(pairs_of({"x": attention})))
    first, again, other = states
    assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first["x.to_q.lora_down.weight"], other["x.to_q.lora_down.weight"])
    assert not first["x.to_q.lora_up.weight"].any()


def test_a_network_without_attention_is_refused():
    with pytest.raises(BadInput, match="needs attention, and this network has none"):
        add_pairs(nn.Conv2d(3, 3, 1), 4)


def test_a_copy_may_share_the_frozen_weights():
    """A deep copy that is given the frozen weights copies the pairs alone."""
    model = new_model("text")
    pairs = alive_pairs({"unet": model.unet})
    shared = {id(p): p for p in model.unet.parameters() if not p.requires_grad}
    copied = copy.deepcopy(model.unet, shared)
    others = pairs_of({"unet": copied})
    assert list(others) == list(pairs)
    for p, other in zip(pairs.parameters(), others.parameters()):
        assert p is not other and torch.equal(p, other)
    assert copied.conv_out.weight is model.unet.conv_out.weight

    before = predict(model)
    for p in others.parameters():
        p.data.zero_()
    assert torch.equal(predict(model), before)


# ---- merging

@pytest.mark.parametrize("task", TASKS)
def test_a_merged_model_computes_what_the_pairs_did(task):
    model = new_model(task)
    before = predict(model)
    merged = copy.deepcopy(model)
    pairs = alive_pairs(nets_of(model))
    expected = predict(model)
    merge(nets_of(merged), lora_state(pairs), 1.0)
    error = (predict(merged) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5
    assert (expected - before).abs().max() > 0.01 * before.abs().max()
    assert list(merged.unet.state_dict()) == list(new_model(task).unet.state_dict())


def test_several_add_up_each_with_its_scale():
    """A scale of 0 changes nothing, and -1 undoes what 1 did."""
    model = new_model("text")
    before = copy.deepcopy(model.unet.state_dict())
    one, two = random_lora(model), random_lora(model, rank=3, seed=99)
    nets = nets_of(model)
    merge(nets, one, 0.0)
    assert_close(model.unet.state_dict(), before, rtol=0, atol=0)

    merge(nets, one, 0.5)
    merge(nets, two, -2.0)
    name = "middle.1.blocks.0.cross_attn.to_k"
    expected = before[f"{name}.weight"]
    for state, scale in ((one, 0.5), (two, -2.0)):
        up = state[f"unet.{name}.lora_up.weight"]
        expected = expected + scale * up @ state[f"unet.{name}.lora_down.weight"]
    assert_close(model.unet.state_dict()[f"{name}.weight"], expected)

    merge(nets, two, 2.0)
    merge(nets, one, -0.5)
    assert_close(model.unet.state_dict(), before, rtol=0, atol=1e-5)


def test_weights_in_half_precision_stay_so_and_are_not_written_into():
    """They may be mapped from a file; the sum is rounded once, from fp32."""
    attention = alive(Attention(8, 8, 2, 4)).half()
    W = attention.to_q.weight
    before = W.clone()
    down = torch.randn(2, 8).half()
    up = torch.randn(8, 2).half()
    state = {"x.0.to_q.lora_down.weight": down, "x.0.to_q.lora_up.weight": up}
    merge({"x": nn.Sequential(attention)}, state, 0.1)
    assert torch.equal(W, before)
    expected = before.float() + 0.1 * (up.float() @ down.float())
    assert torch.equal(attention.to_q.weight, expected.half())


DOWN = "unet.middle.1.blocks.0.cross_attn.to_k.lora_down.weight"
UP = DOWN.replace("down.weight", "up.weight")

ZEROS = torch.zeros

OTHER_MODELS = [
    ({}, "a LoRA without tensors"),
    ({"unet.x.to_k.lora_up.weight": ZEROS(2, 2)}, "unet.x.to_k.lora_up.weight has no place"),
    ({"unet.middle.1.blocks.0.cross_attn.to_k": ZEROS(2)}, "to_k has no place"),
    ({UP + DOWN: ZEROS(2)}, "has no place"),
    ({DOWN: ZEROS(2, 32)}, "lora_up.weight is missing, without which"),
    ({UP: ZEROS(32, 2)}, "lora_down.weight is missing, without which"),
    ({DOWN: ZEROS(2, 33), UP: ZEROS(32, 2)}, r"down.weight has shape \(2, 33\), not \(2, 32\)"),
    ({DOWN: ZEROS(2, 32), UP: ZEROS(32, 3)}, r"up.weight has shape \(32, 3\), not \(32, 2\)"),
    ({DOWN: ZEROS(2, 32), UP: ZEROS(17, 2)}, r"\(17, 2\), not \(32, 2\): it is a LoRA of another"),
    ({DOWN: ZEROS(2, 32, 1, 1), UP: ZEROS(32, 2)}, r"has shape \(2, 32, 1, 1\)"),
    ({DOWN: ZEROS(()), UP: ZEROS(32, 2)}, r"has shape \(\), not \(32,\)"),
]


@pytest.mark.parametrize("state,message", OTHER_MODELS)
def test_a_lora_of_another_model_is_refused_and_nothing_is_changed(state, message):
    """A tensor is named, with both shapes; also where others before it would fit."""
    model = new_model("text")
    before = copy.deepcopy(model.unet.state_dict())
    if state:
        good = {key: x for key, x in random_lora(model).items() if key not in (DOWN, UP)}
        state = good | state
    with pytest.raises(BadInput, match=message):
        merge(nets_of(model), state, 1.0)
    assert_close(model.unet.state_dict(), before, rtol=0, atol=0)


def test_a_lora_with_tau_needs_a_model_with_tau():
    model = new_model("text")
    with pytest.raises(BadInput, match="tau.blocks.0.attn.to_q.lora_down.weight has no place"):
        merge({"unet": model.unet}, random_lora(model), 1.0)


# ---- files

@pytest.fixture(scope="module")
def lora_file(tmp_path_factory):
    """A LoRA of the bundled model."""
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    state = random_lora(open_model(BUNDLED["toy"]), rank=4)
    write_state({key: 0.3 * x for key, x in state.items()}, path)
    return path


@pytest.mark.parametrize("task", TASKS)
def test_a_model_that_is_saved_opens_with_the_same_weights_and_words(task, tmp_path):
    model = new_model(task)
    save_model(model, tmp_path / "x.pt")
    again = open_model(tmp_path / "x.pt")
    assert again.config == model.config
    assert torch.equal(again.z_std, model.z_std)
    assert torch.equal(predict(again), predict(model))


def test_sampling_with_loras_is_sampling_from_the_merged_model(lora_file, tmp_path, cli):
    """Also two at once; without them, other images come out."""
    command = ["sample.py", "--ckpt", "toy"]
    flags = [*ONE_STEP, "a red circle"]
    merged = tmp_path / "merged.pt"
    loras = ["--lora", lora_file, "--lora", lora_file, "--lora-scale", 1, "--lora-scale", -0.5]
    cli(*command, *loras, "--merge", merged, "--out", tmp_path / "a", *flags)
    cli("sample.py", "--ckpt", merged, "--out", tmp_path / "b", *flags)
    cli(*command, "--lora", lora_file, "--lora-scale", 0.5, "--out", tmp_path / "c", *flags)
    cli(*command, "--out", tmp_path / "d", *flags)
    a, b, c, d = ((tmp_path / name / "000000.png").read_bytes() for name in "abcd")
    assert a == b == c != d

    settings = json.loads((tmp_path / "a/settings.json").read_bytes())
    plain = json.loads((tmp_path / "d/settings.json").read_bytes())
    assert settings["lora"] == [["lora.safetensors", 1.0], ["lora.safetensors", -0.5]]
    assert plain["lora"] is None
    assert settings["model"] != plain["model"]
    output = cli(*command, "--merge", merged, "--lora", lora_file, *flags, code=2)
    assert "exists; give the name of a new file" in output


WRONG_FLAGS = [
    (["--lora-scale", 1], "--lora-scale: only with --lora"),
    (["--merge", "x.pt"], "--merge: only with --lora"),
    (
        ["--lora", "x", "--lora-scale", 1, "--lora-scale", 2],
        "--lora-scale: 2 numbers for 1 files; give one, or",
    ),
    (["--lora", "x", "--lora-scale", "nan"], "--lora-scale nan: must be"),
    (["--lora", "missing.safetensors"], "--lora: missing.safetensors: "),
    (["--lora", str(BUNDLED["toy"])], "toy.pt: a checkpoint, not a LoRA; a LoRA is a lora.safe"),
]


@pytest.mark.parametrize("flags,message", WRONG_FLAGS)
def test_flags_of_loras_that_do_not_fit_are_refused(flags, message, cli):
    assert message in cli("sample.py", "--ckpt", "toy", "a", *flags, code=2)


WRONG_FILES = [
    ("lora_unet_q.alpha", "a LoRA of another program, whose names of tensors are not read: it has"),
    ("lora_unet_mid_to_q.lora_down.weight", "a LoRA of another program"),
    ("unet.mid.to_q.lora_A.weight", "a LoRA of another program"),
    ("model.diffusion_model.out.0.weight", "not a LoRA: it has model.diffusion_model.out.0.weight"),
    ("encoder.conv_in.weight", "an autoencoder alone: it has encoder.conv_in.weight; a LoRA is"),
]


@pytest.mark.parametrize("name,message", WRONG_FILES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_another_kind_is_named_for_what_it_is(name, message, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    write_state({name: torch.zeros(2, 2)}, path)
    with pytest.raises(BadInput, match=f"x{suffix}: {message}"):
        open_lora(path)


def test_a_lora_that_does_not_fit_ends_in_one_line(lora_file, trained, tmp_path, cli):
    """It is of another model, or its values are not numbers."""
    output = cli("sample.py", "--ckpt", trained / "ldm/model.pt", "--lora", lora_file, "a", code=2)
    assert "--lora: " in output and "lora.safetensors: unet." in output
    assert "a LoRA of another" in output

    state = {key: x.clone() for key, x in open_lora(lora_file).items()}
    state[next(iter(state))][0] = torch.nan
    write_state(state, tmp_path / "nan.safetensors")
    flags = ["--ckpt", "toy", "--lora", tmp_path / "nan.safetensors"]
    output = cli("sample.py", *flags, "a", code=2)
    assert "nan.safetensors: unet." in output and "values that are not numbers" in output
