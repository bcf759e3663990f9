"""The released models: every key of their layouts is used, round trips are exact, lies refused."""
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from goldens import close, golden, weights
from test_autoencoder import KL, VQ
from test_tokenizer import clip_vocab
from torch.testing import assert_close

from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.diffusion import ldm_loss, q_sample
from tinyldm.engine import presets, released
from tinyldm.engine.checkpoint import save_checkpoint
from tinyldm.engine.open import BUNDLED, open_model
from tinyldm.engine.released import (
    averaged,
    detect,
    load_into,
    load_released,
    networks_of,
    official_state,
)
from tinyldm.engine.released_names import AE, EMA, TAU, UNET
from tinyldm.engine.weights import read_state, write_state
from tinyldm.errors import BadInput
from tinyldm.guidance import guided
from tinyldm.patchgan import Discriminator, DiscriminatorConfig
from tinyldm.samplers import ddim, official_timesteps
from tinyldm.unet import UNet, UNetConfig

# ---- the layouts of the full-size models

KEYS = Path(__file__).parent / "golden" / "keys"

# preset: the list of its keys
FILES = {
    "celebahq256": "models__ldm__celeba256",
    "churches256": "models__ldm__lsun_churches256",
    "imagenet256-f8": "models__ldm__cin256",
    "imagenet256": "configs__latent-diffusion__cin256-v2",
    "sd-v1": "sd-configs__stable-diffusion__v1-inference",
    "superres256": "models__ldm__bsr_sr",
    "layout256": "models__ldm__layout2img-openimages256",
    "semantic256": "models__ldm__semantic_synthesis256",
    "inpaint256": "models__ldm__inpainting_big",
}


def listed_state(name, device="meta"):
    """Return the fp16 state dict that a list of keys describes, without values."""
    state = {}
    with gzip.open(KEYS / f"{name}.txt.gz", "rt") as file:
        for line in file:
            key, shape, dtype_name = line.rstrip("\n").split("\t")
            sides = [int(side) for side in re.findall(r"\d+", shape)]
            dtype = getattr(torch, dtype_name)
            if dtype.is_floating_point:
                dtype = torch.float16
            state[key] = torch.empty(sides, device=device, dtype=dtype)
    return state


def is_filled(net):
    """Return whether all tensors of a network are those of the file, which are in fp16."""
    state = net.state_dict()
    state.pop("z_std", None)
    return all(x.dtype == torch.float16 for x in state.values())


@pytest.mark.parametrize("preset", FILES)
def test_every_key_of_a_released_layout_is_used(preset, monkeypatch):
    """The model is found by its shapes, every tensor of ours is filled, and no key is odd."""
    state = listed_state(FILES[preset])
    row = presets.LDM[preset]
    state["alphas_cumprod"] = presets.build_networks(row).abar.half()
    if "scale_factor" in state:
        state["scale_factor"] = torch.tensor(0.5)
    monkeypatch.setattr(released, "read_file", lambda path: (state, {}))

    is_ambiguous = preset == "semantic256"
    model = load_released("x.ckpt", preset if is_ambiguous else None)
    assert model.run["preset"] == preset
    assert model.config == presets.build_networks(row).config
    assert all(is_filled(net) for net, _ in networks_of(model))
    z_std = {"churches256": 2.0, "sd-v1": 1 / 0.18215}
    assert model.z_std == z_std.get(preset, 1.0)


def test_the_inpainting_model_of_stable_diffusion_is_told_by_its_nine_channels(monkeypatch):
    state = listed_state(FILES["sd-v1"])
    first = UNET + "input_blocks.0.0.weight"
    state[first] = torch.empty(320, 9, 3, 3, device="meta", dtype=torch.float16)
    state.pop("alphas_cumprod")
    monkeypatch.setattr(released, "read_file", lambda path: (state, {}))

    model = load_released("x.ckpt")
    assert model.run["preset"] == "sd-v1-inpaint"
    assert all(is_filled(net) for net, _ in networks_of(model))


@pytest.mark.parametrize("key", ["model.diffusion_model.extra", "other.weight"])
def test_an_unexpected_key_of_a_model_is_refused(key, monkeypatch):
    """Inside a network, and beside all of them."""
    state = listed_state(FILES["semantic256"])
    state[key] = torch.zeros(1)
    state.pop("alphas_cumprod")
    monkeypatch.setattr(released, "read_file", lambda path: (state, {}))

    with pytest.raises(BadInput, match=f"x.ckpt: {key} is unexpected"):
        load_released("x.ckpt", "semantic256")


@pytest.mark.parametrize("preset, name", [
    ("kl-f8", "models__first_stage_models__kl-f8"),
    ("vq-f4", "models__first_stage_models__vq-f4"),
])
def test_every_key_of_a_released_autoencoder_is_used(preset, name):
    """Also loss.*: D_psi's keys are used, the others are known as ones to ignore."""
    state = listed_state(name)
    with torch.device("meta"):
        ae = Autoencoder(presets.ae_config(preset))
        disc = Discriminator(DiscriminatorConfig())

    assert is_filled(load_into(ae, state))
    load_into(disc, state, "loss.discriminator.")

    state["encoder.extra"] = torch.zeros(1)
    with pytest.raises(BadInput, match="encoder.extra is unexpected"):
        load_into(ae, state)


def test_averaged_weights_are_found_by_their_names_without_dots():
    """They take the place of the U-Net's; none may be missing."""
    state = listed_state(FILES["imagenet256-f8"])
    unet = presets.build_networks(presets.LDM["imagenet256-f8"]).unet
    key = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    key_without_dots = EMA + key.replace(".", "")

    assert averaged(state, unet)[UNET + key] is state[key_without_dots]
    del state[key_without_dots]
    with pytest.raises(BadInput, match="is missing among the averaged weights"):
        averaged(state, unet)


def test_a_file_of_another_model_is_refused_by_key_and_shape():
    """The error names the first tensor that does not fit, or says that no preset does."""
    model = presets.build_networks(presets.LDM["semantic256"])
    state = listed_state(FILES["celebahq256"])

    with pytest.raises(BadInput, match=r"time_embed.0.weight has shape \(896, 224\)"):
        load_into(model.unet, state, UNET)
    with pytest.raises(BadInput, match="channel_mapper.weight is missing"):
        load_into(model.tau, state, TAU)
    with pytest.raises(BadInput, match="no latent diffusion model"):
        detect({"a": torch.zeros(1)})

    state[UNET + "input_blocks.0.0.weight"] = torch.zeros(224, 5, 3, 3)
    with pytest.raises(BadInput, match="no preset"):
        detect(state)


# ---- networks of other shapes

def test_qkv_rows_are_ordered_by_head_there_and_by_kind_here():
    """The official rows are (head, q|k|v, d_head), ours (q|k|v, head, d_head)."""
    cfg = UNetConfig(
        c_in=2, c_out=2, side=8, ch=16, ch_mult=(1,), n_res=1, attn_res=(), n_head=4, groups=4
    )
    unet = UNet(cfg)
    state = {key: torch.randn(x.shape) for key, x in official_state(unet).items()}
    load_into(unet, state)

    ours = unet.middle[1].qkv.bias
    official = state["middle_block.1.qkv.bias"]
    d_head = 4
    for kind in range(3):
        for head in range(4):
            our_row = (kind * 4 + head) * d_head
            official_row = (head * 3 + kind) * d_head
            assert torch.equal(
                ours[our_row:our_row + d_head], official[official_row:official_row + d_head]
            )
    assert_close(official_state(unet), state, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name, cfg", [("ae_kl", KL), ("ae_vq", VQ)])
def test_small_official_autoencoders_load_by_the_same_rules(name, cfg):
    """Attention at some levels, and E that ends in other channels than z's."""
    reference = golden(name)
    ae = load_into(Autoencoder(cfg), weights(reference["recipe"]))
    x = torch.from_numpy(reference["in/x"])

    close(ae.encoder(x), reference["out/encoder"])
    z = ae.encode(x).mean
    close(z, reference["out/mean" if name == "ae_kl" else "out/h"])
    close(ae.decode(z), reference["out/dec"])


@torch.no_grad()
@pytest.mark.parametrize("case, ch, n_layers", [("n2", 16, 2), ("n3", 16, 3), ("n4", 4, 4)])
def test_small_official_discriminators_load_by_the_same_rules(case, ch, n_layers):
    """Two to four layers, with the statistics of BatchNorm."""
    reference = golden("disc")
    state = weights(reference["recipe"], case + "/")
    stored = f"w/{case}/"
    for key in reference.files:
        if key.startswith(stored):
            state[key.removeprefix(stored)] = torch.tensor(reference[key])

    disc = load_into(Discriminator(DiscriminatorConfig(ch, n_layers)), state).eval()
    close(disc(torch.from_numpy(reference["in/x"])), reference[f"out/{case}/y_eval"])


# ---- a small complete model

TINY_AE = {
    "size": 16, "ch": 32, "ch_mult": (1, 1), "n_res": 1, "c_z": 3, "groups": 32, "n_codes": 64,
}
TINY = presets.PAPER | {
    "task": "class", "ae_preset": "tiny", "size": 16,
    "ch": 64, "ch_mult": (1,), "n_res": 1, "attn_res": (8,), "d_head": None, "n_head": 1,
    "d_ctx": 16, "n_classes": 11, "beta_range": (0.0015, 0.0195),
}
REFERENCE = golden("ldm_cin")


def reference(name):
    """Return an array of the official small model's inputs and outputs as a tensor."""
    return torch.from_numpy(REFERENCE[name])


@pytest.fixture
def tiny_preset(monkeypatch):
    """Make the official small model a preset, called tiny; return its row."""
    row = dict(TINY)
    monkeypatch.setitem(presets.AE, "tiny", TINY_AE)
    monkeypatch.setitem(presets.LDM, "tiny", row)
    return row


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    """Write the official small model in both formats; {suffix: path}."""
    state = weights(REFERENCE["recipe"])
    for key in REFERENCE.files:
        if key.startswith("w/"):
            state[key.removeprefix("w/")] = reference(key)

    folder = tmp_path_factory.mktemp("tiny")
    paths = {suffix: folder / f"model{suffix}" for suffix in (".ckpt", ".safetensors")}
    for path in paths.values():
        write_state(state, path)
    return paths


@torch.no_grad()
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_official_small_model_end_to_end(suffix, tiny_files, tiny_preset):
    """z, ctx, loss, averaged weights, 5 guided DDIM steps, the image: from a file to numbers."""
    path = tiny_files[suffix]
    model = load_released(path)
    raw = load_released(path, "tiny", ema=False)
    assert model.run["preset"] == "tiny"

    # Stage one.
    x = reference("in/image_bhwc").movedim(3, 1)
    z = model.ae.encode(x).mean
    close(z, REFERENCE["out/z"])
    close(model.ae.decode(z), REFERENCE["out/reconstruction"])

    # tau.
    ctx = model.task.context({"label": reference("in/class_label")}, model.tau, model.ae)
    ctx_null = model.task.context({"label": reference("in/null_label")}, model.tau, model.ae)
    close(ctx.tokens, REFERENCE["out/cond"])
    close(ctx_null.tokens, REFERENCE["out/uncond"])

    # The U-Net and the loss, with both kinds of weights.
    t = reference("in/t")
    noise = reference("in/noise")
    z = reference("out/z")
    z_t = q_sample(z, t, noise, model.abar)
    close(z_t, REFERENCE["out/x_noisy"])
    for one, kind in ((raw, ""), (model, "_ema")):
        eps_theta = one.eps_theta()
        close(eps_theta(z_t, t, ctx), REFERENCE[f"out/eps{kind}"])
        loss = ldm_loss(eps_theta, z, t, noise, one.abar, ctx).mean()
        close(loss, REFERENCE[f"out/loss{kind}"])

    # Sampling, without guidance and with it.
    ts = official_timesteps(model.abar, 5)
    for name, s in (("ddim5_eta0", 1), ("ddim5_cfg3_eta0", 3)):
        eps_theta = guided(model.eps_theta(), ctx_null, s)
        z_0 = ddim(eps_theta, reference("in/x_T"), ctx, model.abar, ts)
        close(z_0, REFERENCE[f"out/{name}"])
        close(model.ae.decode(reference(f"out/{name}")), REFERENCE[f"out/{name}_image"])


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_official_state_is_the_inverse_of_load_into(suffix, tiny_files, tiny_preset):
    """Every tensor of the file comes back, bit for bit."""
    model = load_released(tiny_files[suffix])
    state = read_state(tiny_files[suffix])
    for net, prefix in networks_of(model):
        back = official_state(net, prefix)
        wanted = averaged(state, model.unet) if prefix == UNET else state
        assert_close(back, {key: wanted[key] for key in back}, rtol=0, atol=0)
        assert len(back) == sum(key.startswith(prefix) for key in state)


# ---- sample.py with released files

def test_sample_py_takes_classes_of_a_released_model_by_number(
    tiny_files, tiny_preset, cli, tmp_path
):
    """Guidance needs a null class that the model has learned; all else is one clear line."""
    out = tmp_path / "x.png"
    common = ("sample.py", "--ckpt", tiny_files[".ckpt"], "--steps", 2, "--n", 2, "--out", out)

    assert "tiny" in cli(*common, "--scale", 1, 4, 7)
    assert out.exists()
    assert "0..10" in cli(*common, "--scale", 1, "cat", code=2)
    assert "null condition" in cli(*common, "--scale", 2, 4, code=2)
    tiny_preset["p_drop"] = 0.1
    cli(*common, "--scale", 2, 4)


def write_random_file(row, path):
    """Write a released model of a preset's shape, with random fp16 weights."""
    rng = torch.Generator().manual_seed(0)
    state = {}
    for net, prefix in networks_of(presets.build_networks(row)):
        net.to_empty(device="cpu").half()
        for p in net.parameters():
            torch.nn.init.normal_(p, 0, 0.05, rng)
        state |= official_state(net, prefix)
    write_state(state, path)


def test_sample_py_samples_from_a_released_unconditional_model(tiny_preset, cli, tmp_path):
    """There is nothing to give."""
    tiny_preset |= {"task": "uncond", "d_ctx": None, "n_head": 2}
    path = tmp_path / "m.safetensors"
    write_random_file(tiny_preset, path)

    out = tmp_path / "x.png"
    cli("sample.py", "--ckpt", path, "--steps", 2, "--n", 2, "--out", out)
    assert out.exists()


def test_sample_py_samples_from_a_released_text_model(tiny_preset, cli, tmp_path):
    """Its file has no vocabulary; it must be given, here as CLIP's."""
    tiny_preset |= presets.CLIP | {"vocab_size": 13, "n_token": 6, "d_ctx": 16, "text_depth": 1}
    path = tmp_path / "m.safetensors"
    write_random_file(tiny_preset, path)

    out = tmp_path / "x.png"
    common = ("sample.py", "--ckpt", path, "--steps", 2, "--n", 2, "--out", out, "ab cd")
    assert "--vocab" in cli(*common, code=2)
    clip_vocab(tmp_path)
    cli(*common, "--vocab", tmp_path)
    assert out.exists()

    model = open_model(path, vocab=tmp_path)
    assert model.config.tokenizer == model.tokenizer.to_str()
    assert model.tau.token.weight.dtype == torch.float32


# ---- export

def test_what_we_train_is_exported_and_read_back(cli, tmp_path):
    """The bundled model, written in the official layout: every weight is the same."""
    out = tmp_path / "toy.safetensors"
    output = cli("tinyldm.engine.released", "--export", BUNDLED["toy"], out)
    assert "warning: the official code has 32 groups and predicts eps" in output

    model = open_model(BUNDLED["toy"])
    state = read_state(out)
    scale_factor = state["scale_factor"].float()
    for net, prefix in networks_of(model):
        again = load_into(type(net)(net.cfg), state, prefix).state_dict()
        own = net.state_dict()
        if prefix == AE:
            assert_close(1 / scale_factor, own.pop("z_std"))
            again.pop("z_std")
        assert_close(again, own, rtol=0, atol=0, check_dtype=False)

    # The averaged weights of the U-Net are there under their own names.
    bias = averaged(state, model.unet)[UNET + "out.2.bias"]
    assert torch.equal(bias, state[UNET + "out.2.bias"])


def test_stage_one_alone_is_exported(tmp_path):
    """Its keys have no prefix, as in the released files of autoencoders."""
    cfg = AEConfig(ch=8, ch_mult=(1, 2), n_res=1, groups=4, attn_mid=False)
    ae = Autoencoder(cfg)
    checkpoint = {"kind": "tinyldm autoencoder", "config": {"autoencoder": vars(cfg)}}
    save_checkpoint(checkpoint | {"nets": {"ae": ae.state_dict()}}, tmp_path / "ckpt.pt")

    released.export(tmp_path / "ckpt.pt", tmp_path / "x.ckpt")
    again = load_into(Autoencoder(cfg), read_state(tmp_path / "x.ckpt"))
    assert_close(again.state_dict(), ae.state_dict(), rtol=0, atol=0)


def test_a_model_of_pixels_has_no_official_layout(tmp_path):
    """The error names the file."""
    checkpoint = torch.load(BUNDLED["toy"], weights_only=True)
    checkpoint["config"]["autoencoder"] |= {"ch": 0, "ch_mult": (1,)}
    save_checkpoint(checkpoint, tmp_path / "ckpt.pt")

    with pytest.raises(BadInput, match="ckpt.pt: .*pixels have no official layout"):
        released.export(tmp_path / "ckpt.pt", tmp_path / "x.ckpt")


# ---- full size

CHILD = """
import json, re, sys, time
import torch
from tinyldm.engine.released import load_released, networks_of

def peak():
    # Of this program; getrusage's maximum begins with what its parent had.
    status = open("/proc/self/status").read()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])

before = peak()
start = time.perf_counter()
model = load_released(sys.argv[1])
seconds = time.perf_counter() - start

# Look at every weight, so that it is in memory.
for net, _ in networks_of(model):
    for p in net.parameters():
        assert p.dtype == torch.float16 and p.isfinite().all()
print(json.dumps([model.run["preset"], seconds, before, peak()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("preset", ["imagenet256", "churches256", "sd-v1"])
def test_full_size_fp16_files_load_in_little_more_memory_than_their_size(
    tmp_path, preset, suffix
):
    """VQ, KL and Stable Diffusion v1, random weights: at its peak, 1.3 times the file at most."""
    path = tmp_path / f"model{suffix}"
    state = listed_state(FILES[preset], "cpu")
    state = {key: x for key, x in state.items() if "alphas_cumprod" not in key}
    for x in state.values():
        if x.is_floating_point():
            x.view(torch.int16).random_(10_000, 14_000)
    write_state(state, path)
    del state

    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    )
    found, seconds, before, peak = json.loads(child.stdout.splitlines()[-1])
    size = path.stat().st_size
    path.unlink()

    gib = 2 ** 30
    print(
        f"{preset} {suffix}: {size / gib:.2f} GiB, loaded in {seconds:.1f} s, peak "
        f"{peak / gib:.2f} GiB = {peak / size:.2f} x the file; {before / gib:.2f} GiB are "
        "Python and torch"
    )
    assert found == preset
    assert peak - before <= 1.3 * size
