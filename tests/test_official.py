"""official.py: all keys of the released layouts are used, round trips are exact, lies refused."""
import gzip
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from goldens import close, golden, weights
from test_autoencoder import KL, VQ
from test_tokens import clip_vocab
from torch.testing import assert_close

import sample
from tinyldm import BadInput, generate, presets, samplers
from tinyldm.autoencoder import Autoencoder
from tinyldm.checkpoint import read_state, write_state
from tinyldm.diffusion import ldm_loss, q_sample
from tinyldm.guidance import guided
from tinyldm.official import (
    AE,
    EMA,
    TAU,
    UNET,
    averaged,
    detect,
    load_into,
    load_model,
    official_state,
    table,
)
from tinyldm.patchgan import Discriminator

KEYS = Path(__file__).parent / "golden" / "keys"
FILES = {       # preset: its key list
    "celebahq256": "models__ldm__celeba256", "churches256": "models__ldm__lsun_churches256",
    "imagenet256-f8": "models__ldm__cin256", "imagenet256": "configs__latent-diffusion__cin256-v2",
    "sd-v1": "sd-configs__stable-diffusion__v1-inference", "superres256": "models__ldm__bsr_sr",
    "layout256": "models__ldm__layout2img-openimages256",
    "semantic256": "models__ldm__semantic_synthesis256",
    "inpaint256": "models__ldm__inpainting_big"}


def listed(name, device="meta", dtype=None):
    """The state dict that a key list describes, empty."""
    state = {}
    for line in gzip.open(KEYS / f"{name}.txt.gz", "rt"):
        key, shape, kind = line.rstrip("\n").split("\t")
        kind = getattr(torch, kind)
        state[key] = torch.empty([int(n) for n in re.findall(r"\d+", shape)], device=device,
                                 dtype=dtype if dtype and kind.is_floating_point else kind)
    return state


def filled(net):
    return net is None or all(
        p.dtype == torch.float16 for k, p in net.state_dict().items() if k != "z_std")


@pytest.mark.parametrize("preset", FILES)
def test_every_key_of_a_released_layout_is_used_and_every_tensor_of_ours_is_filled(
        preset, monkeypatch):
    state = listed(FILES[preset], dtype=torch.float16)
    if "scale_factor" in state:
        state["scale_factor"] = torch.tensor(0.5)
    monkeypatch.setattr("tinyldm.official.read_state", lambda path: state)
    m = load_model("x.ckpt")
    assert m.flags["preset"] == preset and all(filled(net) for net in (m.ae, m.unet, m.tau))
    assert m.ae.z_std == {"churches256": 2.0, "sd-v1": 1 / 0.18215}.get(preset, 1.0)
    for odd in ("model.diffusion_model.extra", "other.weight"):
        state[odd] = torch.zeros(1)
        with pytest.raises(BadInput, match=f"{odd} is unexpected"):
            load_model("x.ckpt", preset)
        del state[odd]


@pytest.mark.parametrize("preset,name", [("kl-f8", "models__first_stage_models__kl-f8"),
                                         ("vq-f4", "models__first_stage_models__vq-f4")])
def test_every_key_of_a_released_autoencoder_is_used(preset, name):
    """loss.* too: the discriminator's are filled, the rest is a known passenger."""
    state = listed(name, dtype=torch.float16)
    with torch.device("meta"):
        ae, disc = Autoencoder(presets.ae_config(preset)), Discriminator()
    assert filled(load_into(ae, state))
    load_into(disc, state, "loss.discriminator.")
    state["encoder.extra"] = torch.zeros(1)
    with pytest.raises(BadInput, match="encoder.extra is unexpected"):
        load_into(ae, state)


def test_ema_names_are_found_and_used():
    state = listed(FILES["imagenet256-f8"], dtype=torch.float16)
    _, unet, _ = presets.networks(presets.LDM["imagenet256-f8"])
    mean = averaged(state, unet)
    key = "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    assert mean[UNET + key] is state[EMA + key.replace(".", "")]
    del state[EMA + key.replace(".", "")]
    with pytest.raises(BadInput, match="is missing among the EMA"):
        averaged(state, unet)


@torch.no_grad()
def test_small_official_autoencoders_and_discriminators_load_by_the_same_rules():
    """Attention at some levels, E ending in other channels than z's, 2 to 4 layers."""
    for name, cfg in (("ae_kl", KL), ("ae_vq", VQ)):
        z = golden(name)
        ae, x = load_into(Autoencoder(cfg), weights(z["recipe"])), torch.from_numpy(z["in/x"])
        close(ae.encoder(x), z["out/encoder"])
        q = ae.encode(x).mean
        close(q, z["out/mean" if name == "ae_kl" else "out/h"])
        close(ae.decode(q), z["out/dec"])
    z = golden("disc")
    for case, ch, n in (("n2", 16, 2), ("n3", 16, 3), ("n4", 4, 4)):
        state, start = weights(z["recipe"], case + "/"), f"w/{case}/"
        state |= {k[len(start):]: torch.tensor(z[k]) for k in z.files if k.startswith(start)}
        disc = load_into(Discriminator(3, ch, n), state).eval()
        close(disc(torch.from_numpy(z["in/x"])), z[f"out/{case}/y_eval"])


# ---- the small complete model

TINY_AE = dict(size=16, ch=32, ch_mult=(1, 1), n_res=1, c_z=3, groups=32, n_codes=64)
TINY = presets.PAPER | dict(
    task="class", ae_preset="tiny", size=16, ch=64, ch_mult=(1,), n_res=1, attn_res=(8,),
    d_head=None, n_head=1, d_ctx=16, n_classes=11, beta_range=(0.0015, 0.0195))
REF = golden("ldm_cin")
STATE = {k[2:]: torch.from_numpy(REF[k]) for k in REF.files if k.startswith("w/")}


@pytest.fixture(params=[".ckpt", ".safetensors"])
def tiny(tmp_path, monkeypatch, request):
    """The file of the small official model, which is a preset here."""
    monkeypatch.setitem(presets.AE, "tiny", TINY_AE)
    monkeypatch.setitem(presets.LDM, "tiny", dict(TINY))
    path = tmp_path / f"model{request.param}"
    write_state(STATE | weights(REF["recipe"]), path)
    return path


def ref(name):
    return torch.from_numpy(REF[name])


@torch.no_grad()
def test_official_small_model_end_to_end(tiny):
    """z, ctx, loss, EMA, 5 DDIM steps with guidance, the picture: from a file to numbers."""
    m = load_model(tiny)
    raw = load_model(tiny, "tiny", ema=False)
    assert m.flags["preset"] == "tiny" and tiny.exists()
    z = m.ae.encode(ref("in/image_bhwc").movedim(3, 1)).mean
    close(z, REF["out/z"])
    close(m.ae.decode(z), REF["out/reconstruction"])
    ctx, null = m.tau(ref("in/class_label")), m.tau(ref("in/null_label"))
    close(ctx, REF["out/cond"])
    close(null, REF["out/uncond"])
    t, noise = ref("in/t"), ref("in/noise")
    z_t = q_sample(ref("out/z"), t, noise, m.abar)
    close(z_t, REF["out/x_noisy"])
    for net, kind in ((raw.unet, ""), (m.unet, "_ema")):
        close(net(z_t, t, ctx), REF[f"out/eps{kind}"])
        close(ldm_loss(net, ref("out/z"), t, noise, m.abar, ctx).mean(), REF[f"out/loss{kind}"])
    ts = samplers.official_timesteps(1000, 5)
    for name, s in (("ddim5_eta0", 1), ("ddim5_cfg3_eta0", 3)):
        z = samplers.ddim(guided(m.unet, null, s), ref("in/x_T"), ctx, m.abar, ts)
        close(z, REF[f"out/{name}"])
        close(m.ae.decode(ref(f"out/{name}")), REF[f"out/{name}_image"])


def test_sample_py_draws_classes_from_a_released_file(tiny, cli, tmp_path):
    """By their numbers, with the null class for guidance; anything else is one clear line."""
    out = tmp_path / "x.png"
    common = ("--official", tiny, "--steps", 2, "--n", 2, "--out", out, "--device", "cpu")
    assert "tiny" in cli("sample.py", *common, "--scale", 1, 4, 7) and out.exists()
    assert "0..10" in cli("sample.py", *common, "--scale", 1, "cat", code=2)
    assert "null condition" in cli("sample.py", *common, "--scale", 2, 4, code=2)
    presets.LDM["tiny"]["p_drop"] = 0.1
    cli("sample.py", *common, 4)


@pytest.mark.parametrize("task,flags,prompt", [("uncond", {}, ()), ("text", presets.BERT | dict(
    vocab_size=13, n_token=6, d_ctx=16, text_depth=1, text_clip=True), ("ab cd",))])
def test_sample_py_draws_from_other_released_files(task, flags, prompt, cli, tmp_path, monkeypatch):
    """Without a condition, and from text with a vocabulary in CLIP's files; random fp16 weights."""
    row = TINY | dict(task=task, d_ctx=None, n_head=2) | flags
    monkeypatch.setitem(presets.AE, "tiny", TINY_AE)
    monkeypatch.setitem(presets.LDM, "tiny", row)
    path, state, torch_seed = tmp_path / "m.safetensors", {}, torch.manual_seed(0)
    for net, prefix in zip(presets.networks(row), (AE, UNET, TAU)):
        if net:
            net.to_empty(device="cpu").half()
            for p in net.parameters():
                torch.nn.init.normal_(p, 0, 0.05, torch_seed)
            state |= official_state(net, prefix)
    write_state(state, path)
    common = ("sample.py", "--official", path, "--steps", 2, "--n", 2, "--device", "cpu",
              "--out", tmp_path / "x.png", *prompt)
    if task == "text":
        assert "--vocab" in cli(*common, code=2)
        clip_vocab(tmp_path)
        common += ("--vocab", tmp_path)
    assert "2 picture(s)" in cli(*common)


def test_official_state_is_the_inverse_of_load_into(tiny):
    m = load_model(tiny)
    state = read_state(tiny)
    for net, prefix in ((m.unet, UNET), (m.ae, AE), (m.tau, TAU)):
        back = official_state(net, prefix)
        want = averaged(state, m.unet) if prefix == UNET else state
        assert_close(back, {k: want[k] for k in back}, rtol=0, atol=0)
        assert len(back) == sum(k.startswith(prefix) for k in state)


def test_uncond_qkv_rows_come_back_as_they_were():
    """The reordering of q, k and v by head, there and back."""
    _, unet, _ = presets.networks(presets.LDM["churches256"])
    keys = {k: s for k, s in table(unet).items() if "middle.1.qkv" in k}
    state = {k: torch.empty(s.shape, dtype=torch.float16)
             for source in table(unet).values() for k, s in ((source.keys[0], source),)}
    for source in keys.values():
        state[source.keys[0]] = torch.randn(source.shape)
    back = official_state(load_into(unet, state))
    for source in keys.values():
        k, = source.keys
        assert not torch.equal(unet.middle[1].qkv.bias, state[k]) and torch.equal(back[k], state[k])


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_tensors_come_back_from_both_kinds_of_file(tmp_path, suffix):
    state = {"a": torch.randn(3, 5), "b": torch.randn(7).half(), "c": torch.arange(4),
             "d": torch.tensor(2.5), "e": torch.zeros(0, 3), "f": torch.randn(4, 6).T.bfloat16()}
    write_state(state, tmp_path / f"x{suffix}")
    assert_close(read_state(tmp_path / f"x{suffix}"), state, rtol=0, atol=0)


def test_what_we_train_is_exported_and_read_back(tmp_path):
    """The bundled model: written in the official layout, read, and every weight is the same."""
    out = tmp_path / "toy.safetensors"
    said = subprocess.run(
        [sys.executable, "-m", "tinyldm.official", "--export", str(sample.BUNDLED), str(out)],
        capture_output=True, text=True, check=True)
    assert "32 groups" in said.stderr
    m = generate.load_model(sample.BUNDLED, True, torch.device("cpu"))
    state = read_state(out)
    for net, prefix in ((m.unet, UNET), (m.ae, AE), (m.tau, TAU)):
        again = load_into(type(net)(net.cfg), state, prefix).state_dict()
        if net is m.ae:
            assert_close(1 / state["scale_factor"].float(), again.pop("z_std") * net.z_std)
        for k, v in again.items():
            assert torch.equal(v.float(), net.state_dict()[k].float()), k
    assert torch.equal(averaged(state, m.unet)[UNET + "out.2.bias"], state[UNET + "out.2.bias"])


# ---- what is refused

def refused(path, match):
    with pytest.raises(BadInput, match=match) as e:
        read_state(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/never",)


class ModelCheckpoint:
    """As Lightning pickles it, by this name."""


def test_a_pickle_that_asks_for_code_is_refused_by_name_and_lightnings_leftovers_are_not(
        tmp_path, monkeypatch):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "x": Evil()}, path)
    refused(path, r"asks for \w+\.system")
    path.write_bytes(pickle.dumps({"a": Evil()}))
    refused(path, r"evil.ckpt: ")
    module = "pytorch_lightning.callbacks.model_checkpoint"
    monkeypatch.setattr(ModelCheckpoint, "__module__", module)
    fake = type(sys)(module)
    fake.ModelCheckpoint = ModelCheckpoint
    for i in range(1, 4):
        monkeypatch.setitem(sys.modules, ".".join(module.split(".")[:i]), fake)
    best = torch.ones(()).numpy()[()]                                           # a numpy scalar
    leftover = ModelCheckpoint()
    leftover.best_k_models = {"a": 1}
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": {ModelCheckpoint: {"best": best}},
                "hooks": [leftover], "epoch": 3}, path)
    assert_close(read_state(path), {"a": torch.ones(2)})


def safetensors(path, header, data=b"", n=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if n is None else n) + text + data)
    return path


@pytest.mark.parametrize("header,data,n", [
    ({}, b"", 10), ({}, b"", 2 ** 63), ({}, b"", 99_999_999), (b"{not json", b"", None),
    (b"[1]", b"", None), (b"[" * 100_000, b"", None),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", None),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"12345678", None),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, b"12345678", None),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"12345678", None),
    ({"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}, b"12345678", None),
    ({"a": {"dtype": "F32", "shape": [10 ** 30], "data_offsets": [0, 4 * 10 ** 30]}}, b"", None),
    ({"a": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}, b"12345678", None),
    ({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}, b"12345678", None),
    ({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}, b"12345678", None),
    ({"a": 7}, b"", None), ({"a": {"shape": [0]}}, b"", None)])
def test_a_safetensors_header_that_lies_is_refused(tmp_path, header, data, n):
    refused(safetensors(tmp_path / "x.safetensors", header, data, n), "header")


def test_unaligned_tensors_are_read(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
              "b": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]}}
    path = safetensors(tmp_path / "x.safetensors", header, b"\7" + struct.pack("<f", 1.5))
    assert_close(read_state(path), {"a": torch.tensor([7]).byte(), "b": torch.tensor([1.5])})


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_truncated_and_missing_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    refused(path, "No such file")
    write_state({"a": torch.randn(1000), "b": torch.randn(1000)}, path)
    whole = path.read_bytes()
    for n in (0, 4, 9, 100, 5000, len(whole) - 1):
        path.write_bytes(whole[:n])
        refused(path, "truncated|header|could run code")
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    path.write_bytes(buffer.getvalue())
    refused(path, "not a checkpoint|header")


def test_a_file_of_another_model_is_refused_by_key_and_shape(tmp_path):
    ae, unet, tau = presets.networks(presets.LDM["semantic256"])
    state = listed(FILES["celebahq256"])
    with pytest.raises(BadInput, match=r"time_embed.0.weight has shape \(896, 224\)"):
        load_into(unet, state, UNET)
    with pytest.raises(BadInput, match="channel_mapper.weight is missing"):
        load_into(tau, state, TAU)
    with pytest.raises(BadInput, match="no latent diffusion model"):
        detect({"a": torch.zeros(1)})
    state[UNET + "input_blocks.0.0.weight"] = torch.zeros(224, 5, 3, 3)
    with pytest.raises(BadInput, match="no preset"):
        detect(state)


# ---- full size

CHILD = """
import json, re, sys, time
import torch
from tinyldm.official import load_model
def peak():         # of this program; getrusage's maximum begins with what its parent had
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before, start = peak(), time.perf_counter()
m = load_model(sys.argv[1])
seconds = time.perf_counter() - start
for net in filter(None, (m.ae, m.unet, m.tau)):     # touch every weight, so that it is in memory
    assert all(p.dtype == torch.float16 and p.isfinite().all() for p in net.parameters())
print(json.dumps([m.flags["preset"], seconds, before, peak()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("preset", ["imagenet256", "churches256", "sd-v1"])
def test_full_size_fp16_files_load_in_little_more_memory_than_their_size(tmp_path, preset, suffix):
    """VQ, KL and Stable Diffusion v1, random weights: peak memory at most 1.3 times the file."""
    path = tmp_path / f"model{suffix}"
    state = listed(FILES[preset], "cpu", torch.float16)
    for v in state.values():
        if v.is_floating_point():
            v.view(torch.int16).random_(10_000, 14_000)
    write_state(state, path)
    del state
    size = path.stat().st_size
    said = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parent.parent)
    found, seconds, before, peak = json.loads(said.stdout.splitlines()[-1])
    print(f"{preset} {suffix}: {size / 2 ** 30:.2f} GiB, loaded in {seconds:.1f} s, peak "
          f"{peak / 2 ** 30:.2f} GiB = {peak / size:.2f} x the file; {before / 2 ** 30:.2f} GiB "
          "are Python and torch")
    path.unlink()
    assert found == preset and peak - before <= 1.3 * size
