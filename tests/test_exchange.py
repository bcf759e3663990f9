"""Files as people have them, any first stage, and there and back: exports are read again."""
import json
import warnings

import pytest
import torch
from made_up import made_up_items, made_up_model
from test_released import FILES, TINY_AE, is_filled, listed_state, write_random_file
from torch.testing import assert_close

from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.diffusion import DiffusionConfig, as_eps_theta
from tinyldm.engine import presets, released
from tinyldm.engine.checkpoint import save_checkpoint
from tinyldm.engine.diffusers_names import diffusers_config, rules_from_official, to_diffusers
from tinyldm.engine.open import BUNDLED, open_model, open_stage_one, save_model
from tinyldm.engine.released import (
    detect,
    load_into,
    load_released,
    load_stage_one,
    official_state,
)
from tinyldm.engine.released_names import AE, TAU, UNET, renamed
from tinyldm.engine.weights import read_state, write_state
from tinyldm.errors import BadInput
from tinyldm.samplers import SAMPLERS, timesteps
from tinyldm.tasks import TASKS

KL_F8 = "models__first_stage_models__kl-f8"
VQ_F4 = "models__first_stage_models__vq-f4"


def opened(state, monkeypatch, texts=None, **how):
    """The model of a state dict, as if it had been read from a file."""
    monkeypatch.setattr(released, "read_file", lambda path: (state, texts or {}))
    return load_released("x.ckpt", **how)


def sd_state():
    """The tensors of Stable Diffusion v1, without values; no schedule."""
    state = listed_state(FILES["sd-v1"])
    return {key: x for key, x in state.items() if "alphas" not in key}


# ---- files as the community has them

EXTRA = ["logit_scale", TAU + "transformer.text_projection.weight", TAU + "logit_scale",
         TAU + "transformer.text_model.embeddings.position_ids", "text_projection"]


@pytest.mark.parametrize("key", EXTRA)
def test_tensors_of_clip_that_no_network_needs_are_passed_over(key, monkeypatch):
    state = sd_state() | {key: torch.zeros(1, device="meta")}
    assert opened(state, monkeypatch).run["preset"] == "sd-v1"


def test_a_text_encoder_without_text_model_in_its_names_is_read(monkeypatch):
    """As newer versions of transformers write it."""
    state = {key.replace("text_model.", ""): x for key, x in sd_state().items()}
    assert TAU + "transformer.embeddings.token_embedding.weight" in state
    model = opened(state, monkeypatch)
    assert is_filled(model.tau)


def test_a_file_of_averaged_weights_alone_is_found_and_read(monkeypatch):
    """Its own weights cannot be asked for."""
    state = listed_state(FILES["imagenet256-f8"])
    state = {key: x for key, x in state.items() if not key.startswith(UNET) and "alphas" not in key}
    assert detect(state) == "imagenet256-f8"
    model = opened(state, monkeypatch)
    assert is_filled(model.unet)
    with pytest.raises(BadInput, match="x.ckpt: it has averaged weights only"):
        opened(state, monkeypatch, ema=False)


@pytest.mark.parametrize("dtype", released.FP8)
def test_fp8_is_cast_to_fp16_exactly(dtype, tmp_path):
    """All 256 codes: fp16 has every one of their values."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
    for suffix in (".safetensors", ".ckpt"):
        write_state({"weight": codes}, tmp_path / f"x{suffix}")
        net = load_into(torch.nn.Linear(16, 16, bias=False), read_state(tmp_path / f"x{suffix}"))
        assert net.weight.dtype == torch.float16
        assert_close(net.weight.double(), codes.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name, value", [
    ("alphas_cumprod", torch.linspace(0.99, 0.01, 1000)), ("scale_factor", torch.tensor(0.5)),
])
def test_numbers_in_fp8_are_too_coarse_and_those_of_the_preset_are_taken(name, value, monkeypatch):
    """And it is said."""
    state = sd_state() | {name: value.to(torch.float8_e4m3fn)}
    with pytest.warns(UserWarning, match=f"x.ckpt: its {name} is in fp8"):
        model = opened(state, monkeypatch, preset="sd-v1")
    assert model.config == presets.build_networks(presets.LDM["sd-v1"]).config
    assert_close(model.z_std, torch.tensor(1 / 0.18215))


# Tensors that take no memory in the file, and more than there is when they are cast.
ENDLESS = torch.zeros(1).expand(10 ** 13)
ENDLESS_FP8 = torch.zeros(1).to(torch.float8_e4m3fn).expand(10 ** 13)


@pytest.mark.parametrize("key, value, message", [
    ("scale_factor", ENDLESS, "scale_factor has 10,000,000,000,000 numbers, not one"),
    ("scale_factor", torch.ones(3), "scale_factor has 3 numbers, not one"),
    ("alphas_cumprod", ENDLESS, "alphas_cumprod has the shape"),
    ("alphas_cumprod", torch.eye(9).to_sparse(), "alphas_cumprod has the shape"),
    ("other", ENDLESS_FP8, "other is unexpected"),
    (UNET + "out.2.bias", torch.zeros(3).to_sparse(), "its parts do not fit together"),
    (UNET + "out.2.bias", torch.zeros(3).int(), "its parts do not fit together"),
])
def test_odd_tensors_are_refused_and_fill_no_memory(key, value, message, monkeypatch):
    state = listed_state(FILES["superres256"])
    state = {name: x for name, x in state.items() if "alphas" not in name} | {key: value}
    with pytest.raises(BadInput, match=f"x.ckpt: {message}"):
        opened(state, monkeypatch, preset="superres256", ema=False)


def test_a_model_without_the_scale_factor_that_it_needs_says_so(monkeypatch):
    """Of the released models this is churches256's; others know it without."""
    state = listed_state(FILES["churches256"])
    state = {key: x for key, x in state.items() if "alphas" not in key}
    del state["scale_factor"]
    with pytest.warns(UserWarning, match="no scale_factor, .* 1 is taken"):
        assert opened(state, monkeypatch).z_std == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(opened(sd_state(), monkeypatch).z_std, torch.tensor(1 / 0.18215))


def test_a_file_that_fits_two_models_is_asked_for(monkeypatch):
    """semantic512 has the tensors of semantic256; three models of LSUN and faces are one."""
    state = listed_state(FILES["semantic256"])
    state = {key: x for key, x in state.items() if "alphas" not in key}
    with pytest.raises(BadInput, match="semantic256 and semantic512; say which one it is by --pre"):
        opened(state, monkeypatch)
    assert opened(state, monkeypatch, preset="semantic512").config.size == (512, 512)
    assert detect(listed_state(FILES["celebahq256"])) == "celebahq256"


# ---- the schedule of a file

ZERO_SNR = torch.cat([torch.linspace(0.999, 0.001, 999), torch.zeros(1)])


def test_the_schedule_of_a_file_is_used_if_it_is_another_one(monkeypatch):
    """Also with another T; the preset's own, in fp16, is the preset's."""
    own = DiffusionConfig(beta_range=(0.00085, 0.012)).abar()
    state = sd_state()
    assert opened(state | {"alphas_cumprod": own.half()}, monkeypatch).config.diffusion == (
        presets.build_networks(presets.LDM["sd-v1"]).config.diffusion
    )
    other = torch.linspace(0.99, 0.01, 500)
    model = opened(state | {"alphas_cumprod": other}, monkeypatch)
    assert_close(model.abar, other.double(), rtol=0, atol=0)
    assert model.config.diffusion.predict == "eps"

    # It travels with the model.
    again = type(model.config).from_checkpoint(model.config.to_checkpoint())
    assert again == model.config


@pytest.mark.parametrize("abar, message", [
    (torch.linspace(0.1, 0.9, 9), "must fall"),
    (torch.linspace(1.5, 0.1, 9), "must fall"),
    (torch.linspace(0.9, -0.1, 9), "must fall"),
    (torch.full((9,), torch.nan), "must fall"),
    (torch.tensor([2.0]), "must fall"),
    (torch.zeros(0), "has the shape"),
    (torch.tensor(0.5), "has the shape"),
])
def test_a_schedule_that_is_none_is_refused(abar, message, monkeypatch):
    state = listed_state(FILES["superres256"]) | {"alphas_cumprod": abar}
    with pytest.raises(BadInput, match=f"x.ckpt: alphas_cumprod.*{message}"):
        opened(state, monkeypatch, preset="superres256")


def test_a_schedule_that_ends_in_pure_noise_is_of_v(monkeypatch):
    """It is said, unless the file says so itself; a prediction of eps has no such schedule."""
    state = sd_state() | {"alphas_cumprod": ZERO_SNR}
    with pytest.warns(UserWarning, match="taken to predict v"):
        model = opened(state, monkeypatch)
    assert model.config.diffusion.predict == "v"
    assert model.abar[-1] > 0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in released.PREDICTION_TEXTS:
            again = opened(state, monkeypatch, {text: "v"}, preset="sd-v1")
            assert again.config == model.config
        opened(state | {"v_pred": torch.zeros(0)}, monkeypatch)
    with pytest.raises(BadInput, match="a prediction of eps says nothing of z_0"):
        DiffusionConfig(alphas_cumprod=tuple(ZERO_SNR.tolist()))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_v_is_sampled_from_pure_noise_as_its_formula_says(sampler):
    """With abar_T = 0 exactly, z_0 is -v there. DDIM in float64 is the reference."""
    config = DiffusionConfig(predict="v", alphas_cumprod=tuple(ZERO_SNR.tolist()))

    def v_of(z, t, *_):
        return 0.5 * torch.sin(z + t.view(-1, 1, 1, 1) / 300)

    z_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ts = timesteps(config.abar(), 20)
    eps_theta = as_eps_theta(v_of, config.abar(), "v")
    z_0 = SAMPLERS[sampler](eps_theta, z_T, (), config.abar(), ts, lambda: torch.zeros_like(z_T))
    assert z_0.isfinite().all()
    if sampler != "ddim":
        return

    z = z_T.double()
    abar = torch.cat([ZERO_SNR.double(), torch.ones(1, dtype=torch.float64)])
    for t, s in zip(ts, ts[1:]):
        v = v_of(z, torch.full((2,), t))
        predicted = abar[t].sqrt() * z - (1 - abar[t]).sqrt() * v
        eps = (1 - abar[t]).sqrt() * z + abar[t].sqrt() * v
        z = abar[s].sqrt() * predicted + (1 - abar[s]).sqrt() * eps
    assert_close(z_0.double(), z, rtol=0, atol=5e-4)        # of values up to 3


# ---- a first stage in any file

@pytest.mark.parametrize("name, preset", [(KL_F8, "kl-f8"), (VQ_F4, "vq-f4")])
def test_a_released_stage_one_is_found_by_its_shapes(name, preset, monkeypatch):
    """Its losses are passed over; what it does not know is its z_std."""
    state = listed_state(name)
    monkeypatch.setattr(released, "read_file", lambda path: (state, {}))
    ae, knows_z_std = load_stage_one("x.ckpt")
    assert ae.cfg == presets.ae_config(preset)
    assert not knows_z_std
    assert not any(p.requires_grad for p in ae.parameters())

    state["encoder.extra"] = torch.zeros(1)
    with pytest.raises(BadInput, match="x.ckpt: no autoencoder of presets.py has these tensors"):
        load_stage_one("x.ckpt")


@pytest.mark.parametrize("preset, f, z_std", [
    ("sd-v1", 8, 1 / 0.18215), ("churches256", 8, 2.0), ("inpaint256", 4, 1.0),
])
def test_stage_one_is_taken_out_of_a_whole_model(preset, f, z_std, monkeypatch):
    """Its z_std is that of the file or, where the file has none, of the preset."""
    state = listed_state(FILES[preset])
    if "scale_factor" in state:
        state["scale_factor"] = torch.tensor(0.5)
    monkeypatch.setattr(released, "read_file", lambda path: (state, {}))
    ae, knows_z_std = load_stage_one("x.ckpt")
    assert (ae.cfg.f, knows_z_std) == (f, True)
    assert_close(ae.z_std, torch.tensor(z_std))


def test_stage_one_of_a_model_of_other_shapes_is_taken_too(monkeypatch):
    """Without a scale_factor its z_std is not known."""
    state = {AE + key: x for key, x in listed_state(KL_F8).items() if "loss" not in key}
    state[UNET + "other.weight"] = torch.zeros(3)
    monkeypatch.setattr(released, "read_file", lambda path: (state, {}))
    assert load_stage_one("x.ckpt")[1] is False


# Names that AutoencoderKL has, for official names of kl-f8.
DIFFUSERS_NAMES = {
    "encoder.conv_in.weight": "encoder.conv_in.weight",
    "encoder.down.2.block.1.conv1.weight": "encoder.down_blocks.2.resnets.1.conv1.weight",
    "encoder.down.1.block.0.nin_shortcut.bias":
        "encoder.down_blocks.1.resnets.0.conv_shortcut.bias",
    "encoder.down.0.downsample.conv.bias": "encoder.down_blocks.0.downsamplers.0.conv.bias",
    "encoder.mid.block_2.norm1.bias": "encoder.mid_block.resnets.1.norm1.bias",
    "encoder.mid.attn_1.norm.bias": "encoder.mid_block.attentions.0.group_norm.bias",
    "decoder.mid.attn_1.q.weight": "decoder.mid_block.attentions.0.to_q.weight",
    "decoder.mid.attn_1.proj_out.bias": "decoder.mid_block.attentions.0.to_out.0.bias",
    "decoder.up.3.block.2.norm2.bias": "decoder.up_blocks.0.resnets.2.norm2.bias",
    "decoder.up.0.block.0.conv2.bias": "decoder.up_blocks.3.resnets.0.conv2.bias",
    "decoder.up.1.upsample.conv.bias": "decoder.up_blocks.2.upsamplers.0.conv.bias",
    "decoder.norm_out.weight": "decoder.conv_norm_out.weight",
    "quant_conv.bias": "quant_conv.bias",
}


@pytest.mark.parametrize("name", DIFFUSERS_NAMES)
def test_names_of_diffusers_for_stage_one(name):
    with torch.device("meta"):
        ae = Autoencoder(presets.ae_config("kl-f8"))
    assert renamed(name, rules_from_official(ae)) == DIFFUSERS_NAMES[name]


UNET_NAMES = {
    "input_blocks.0.0.weight": "conv_in.weight",
    "time_embed.2.bias": "time_embedding.linear_2.bias",
    "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
    "input_blocks.5.1.proj_in.bias": "down_blocks.1.attentions.1.proj_in.bias",
    "input_blocks.4.0.skip_connection.bias": "down_blocks.1.resnets.0.conv_shortcut.bias",
    "middle_block.2.out_layers.3.bias": "mid_block.resnets.1.conv2.bias",
    "output_blocks.2.1.conv.bias": "up_blocks.0.upsamplers.0.conv.bias",
    "output_blocks.5.2.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
    "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight":
        "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight",
    "output_blocks.11.0.emb_layers.1.weight": "up_blocks.3.resnets.2.time_emb_proj.weight",
    "out.0.bias": "conv_norm_out.bias",
    "out.2.bias": "conv_out.bias",
}


@pytest.mark.parametrize("name", UNET_NAMES)
def test_names_of_diffusers_for_the_u_net(name):
    """Those of Stable Diffusion v1."""
    unet = presets.build_networks(presets.LDM["sd-v1"]).unet
    assert renamed(name, rules_from_official(unet)) == UNET_NAMES[name]


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("n_codes", [None, 64])
def test_an_autoencoder_in_the_layout_of_diffusers_is_read(
    tmp_path, monkeypatch, n_codes, old_names
):
    """Its attention has Linear layers, which older files call query, key, value, proj_attn."""
    row = TINY_AE | {"n_codes": n_codes}
    monkeypatch.setitem(presets.AE, "tiny", row)
    ae = Autoencoder(presets.ae_config("tiny")).eval()
    state = to_diffusers(official_state(ae), ae)
    if old_names:
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value"}.items():
            state = {key.replace(f".{new}.", f".{old}."): x for key, x in state.items()}
        state = {key.replace("to_out.0", "proj_attn"): x for key, x in state.items()}
    write_state(state, tmp_path / "vae.safetensors")

    again, knows_z_std = open_stage_one(tmp_path / "vae.safetensors")
    assert not knows_z_std
    assert_close(again.state_dict(), ae.state_dict(), rtol=0, atol=0)


def test_a_model_is_trained_on_a_released_stage_one(tmp_path, cli, monkeypatch):
    """From the file to model.pt; z_std is measured, and the file is kept once."""
    monkeypatch.setitem(presets.AE, "tiny", TINY_AE | {"n_codes": None})
    ae = Autoencoder(presets.ae_config("tiny"))
    write_state(official_state(ae) | {"loss.logvar": torch.zeros(())}, tmp_path / "kl.ckpt")
    flags = ["--ch", 16, "--ch-mult", 1, "--attn-res", 8, "--d-head", 16, "--groups", 4,
             "--task", "uncond", "--size", 16, "--n-shapes", 40, "--batch", 4, "--eval-n", 0]
    cli("train_ldm.py", *flags, "--steps", 1, "--ae", tmp_path / "kl.ckpt", "--out", tmp_path / "x")
    model = open_model(tmp_path / "x/model.pt")
    assert model.z_std not in (0, 1)
    assert len(list((tmp_path / "x").glob("stage_one_*.pt"))) == 1


# ---- there and back

@pytest.fixture
def made_up_file(tmp_path):
    """Return a function that writes a random model of a task, and returns it with its file."""
    def write(task):
        model = made_up_model(task)
        model.run = {"preset": "toy", "data": "shapes", "clip": float("inf")}
        save_model(model, tmp_path / "model.pt")
        return model, tmp_path / "model.pt"

    return write


def sampled(model):
    """Two images of made-up conditions."""
    items = made_up_items(2)
    return model.sample(items, seeds=[(0, 0), (0, 1)], steps=3, guidance_scale=2.0)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("task", TASKS)
def test_what_is_exported_is_read_again_as_the_same_model(task, suffix, made_up_file, tmp_path):
    """Own shapes, v, words, class names: the config is the same, and so are the images."""
    model, path = made_up_file(task)
    out = tmp_path / f"out{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        released.export(path, out)
    again = open_model(out)
    assert again.config == model.config
    assert again.run == model.run
    difference = (sampled(again) - sampled(open_model(path))).abs().max()
    print(f"{task} {suffix}: {difference:.1e}")
    assert difference < 1e-5


def test_an_exported_stage_one_of_ones_own_shape_is_read_again(tmp_path):
    cfg = AEConfig(ch=8, ch_mult=(1, 2), n_res=1, groups=4, attn_mid=False)
    ae = Autoencoder(cfg)
    checkpoint = {"kind": "tinyldm autoencoder", "config": {"autoencoder": vars(cfg)}}
    save_checkpoint(checkpoint | {"nets": {"ae": ae.state_dict()}}, tmp_path / "ckpt.pt")
    for name in ("x.ckpt", "x.safetensors"):
        released.export(tmp_path / "ckpt.pt", tmp_path / name)
        again, _ = open_stage_one(tmp_path / name)
        assert again.cfg == cfg
        assert_close(again.state_dict(), ae.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {"unet": {"n_res": 1000000000}}}',
                                  '{"config": {}}', '{"config": 3}', "[" * 100_000])
def test_texts_of_strangers_are_data_and_end_in_one_line(text, tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_state({UNET + "out.2.bias": torch.zeros(1)}, path, {"tinyldm": text})
    with pytest.raises(BadInput, match="x.safetensors: ") as error:
        open_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:the official code")
@pytest.mark.parametrize("task", ["text", "text-inpaint"])
def test_words_that_do_not_fit_the_embedding_are_refused(task, made_up_file, tmp_path):
    """Else their ids would be beyond its rows when a caption is encoded."""
    _, path = made_up_file(task)
    released.export(path, tmp_path / "x.ckpt")
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    head = json.loads(content["tinyldm"])
    words = json.loads(head["tokenizer"])
    words["model"]["vocab"]["more"] = 1_000_000
    head["tokenizer"] = json.dumps(words)
    torch.save(content | {"tinyldm": json.dumps(head)}, tmp_path / "x.ckpt")

    with pytest.raises(BadInput, match="x.ckpt: its tokenizer: 1000001 tokens, where the model's"):
        open_model(tmp_path / "x.ckpt")


@pytest.mark.parametrize("export", [released.export, released.export_diffusers])
def test_a_lora_is_no_model_to_export(export, tmp_path):
    """It has low-rank pairs alone."""
    save_checkpoint({"kind": "tinyldm lora", "config": {"unet": {}}}, tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match="ckpt.pt: a checkpoint of a LoRA in training"):
        export(tmp_path / "ckpt.pt", tmp_path / "x")


def test_attention_at_some_levels_of_stage_one_has_blocks_of_its_own_in_diffusers():
    """As in kl-f16: the level of 16 pixels, the last of E and the first of D."""
    config = diffusers_config(presets.ae_config("kl-f16"))
    assert config["down_block_types"] == ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"]
    assert config["up_block_types"] == ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4


def test_the_layout_of_diffusers_is_written_with_its_configs(tmp_path, cli):
    """vae/ is a stage one for --ae again: the toy's shapes are a row of presets.AE."""
    out = tmp_path / "out"
    cli("tinyldm.engine.released", "--export", BUNDLED["toy"], out, "--layout", "diffusers")
    model = open_model(BUNDLED["toy"])
    ae, _ = open_stage_one(out / "vae/diffusion_pytorch_model.safetensors")
    ae.z_std = model.z_std
    assert_close(ae.state_dict(), model.ae.state_dict(), rtol=0, atol=0)

    config = json.loads((out / "unet/config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel"
    assert config["block_out_channels"] == [48, 96]
    assert config["attention_head_dim"] == [3, 6]
    vae = json.loads((out / "vae/config.json").read_text())
    assert vae["scaling_factor"] == pytest.approx(1 / float(model.z_std))
    state = read_state(out / "unet/diffusion_pytorch_model.safetensors")
    n = sum(x.numel() for x in state.values())
    assert n == sum(p.numel() for p in model.unet.parameters())


@torch.no_grad()
def test_diffusers_computes_the_same_with_what_is_written(tmp_path):
    """Where it is installed: no key is missing, and outputs agree to 1e-5."""
    diffusers = pytest.importorskip("diffusers")
    released.export_diffusers(BUNDLED["toy"], tmp_path)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet").float()
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae").float()
    model = open_model(BUNDLED["toy"])

    z = torch.randn(2, 4, 8, 8)
    t = torch.tensor([10, 900])
    tokens = torch.randn(2, 12, 128)
    assert_close(unet(z, t, tokens).sample, model.unet(z, t, tokens), rtol=0, atol=1e-5)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    assert_close(
        vae.encode(x).latent_dist.mean / model.z_std, model.ae.encode(x).mean, rtol=0, atol=1e-5
    )


def test_a_tiny_file_in_fp8_samples(tmp_path, monkeypatch, cli):
    """From a file of another precision to an image."""
    row = presets.PAPER | {
        "ae_preset": "tiny", "size": 16, "ch": 64, "ch_mult": (1,), "n_res": 1, "attn_res": (8,),
        "d_head": None, "n_head": 2, "beta_range": (0.0015, 0.0195),
    }
    monkeypatch.setitem(presets.AE, "tiny", TINY_AE)
    monkeypatch.setitem(presets.LDM, "tiny", row)
    write_random_file(row, tmp_path / "m.safetensors")
    state = read_state(tmp_path / "m.safetensors")
    fp8 = {key: x.to(torch.float8_e4m3fn) for key, x in state.items()}
    write_state(fp8, tmp_path / "fp8.safetensors")
    cli("sample.py", "--ckpt", tmp_path / "fp8.safetensors", "--steps", 2, "--n", 1,
        "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()
