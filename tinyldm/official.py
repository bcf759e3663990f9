"""Checkpoints of the official models: which of their tensors is which of ours, and the files.

    python -m tinyldm.official --export out/ldm/ckpt.pt out/official.safetensors
Paper: the released model zoo, and its code's names. Reads: generate, presets, checkpoint, tokens
Symbols: state is an official state dict {key: tensor}; prefix what its keys begin with."""
import argparse
import re
import warnings
from collections import namedtuple
from pathlib import Path

import torch
from torch import nn

from tinyldm import BadInput, presets, require, training as tr
from tinyldm.attention import SelfAttention2d
from tinyldm.autoencoder import Autoencoder, build_autoencoder
from tinyldm.checkpoint import load_checkpoint, read_state, write_state
from tinyldm.conditioning import SpatialRescaler, TextTransformer
from tinyldm.diffusion import SCHEDULES, cumulative
from tinyldm.generate import Model
from tinyldm.patchgan import Discriminator
from tinyldm.tasks import build_tau
from tinyldm.tokens import open_vocab
from tinyldm.unet import UNet, UNetConfig

UNET, EMA, AE, TAU = ("model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model.",
                      "cond_stage_model.")

# ---- names: (pattern, replacement), applied to our key in this order
UNET_RULES = {r"^time\.": "time_embed.", r"^down\.": "input_blocks.", r"^up\.": "output_blocks.",
    r"^middle\.": "middle_block.", "^norm_out": "out.0", "^conv_out": "out.2",
    r"^(input_blocks\.\d+\.0)\.conv\.": r"\1.op.",                              # Downsample
    r"(_blocks?\.[\d.]+)norm1": r"\1in_layers.0", "conv1": "in_layers.2",       # ResBlock
    r"(_blocks?\.[\d.]+)norm2": r"\1out_layers.0", "conv2": "out_layers.3",
    r"\.emb\.": ".emb_layers.1.", r"\.skip\.": ".skip_connection.",
    r"\.blocks\.": ".transformer_blocks.", "self_attn": "attn1", "cross_attn": "attn2",
    "to_out": "to_out.0", r"mlp\.proj": "ff.net.0.proj", r"mlp\.out": "ff.net.2"}
AE_RULES = {r"\.skip\.": ".nin_shortcut.", r"^codebook\.codes": "quantize.embedding.weight"}
TEXT_RULES = {r"^token\.": "token_emb.", r"^position\.": "pos_emb.emb.", r"mlp\.0": "mlp.net.0.0",
    r"mlp\.2": "mlp.net.2", r"^blocks\.(\d+)\.(norm1|attn|norm2|mlp)":          # x-transformers
    lambda m: f"attn_layers.layers.{2 * int(m[1]) + (m[2] in ('norm2', 'mlp'))}."
              f"{int(m[2] in ('attn', 'mlp'))}", "^": "transformer."}
CLIP_RULES = {r"^(token|position)\.": r"embeddings.\1_embedding.", r"^norm\.": "final_layer_norm.",
    r"^blocks\.": "encoder.layers.", r"\.norm(\d)\.": r".layer_norm\1.", r"mlp\.0": "mlp.fc1",
    r"mlp\.2": "mlp.fc2", r"\.attn\.to_(\w+)\.": r".self_attn.\1_proj.",
    "^": "transformer.text_model."}
# What a file may hold that no model of ours needs: the schedule, losses, the text encoder's output.
PASSENGERS = re.compile(r"betas|(\w+_)?alphas_cumprod(_prev)?|posterior_\w+|lvlb_weights|logvar|"
    r"scale_factor|model_ema\.(decay|num_updates)|(first_stage_model\.)?loss\..+|"
    r"(.*\.)?(to_logits\.\w+|position_ids)")

# Where a tensor of ours comes from: keys of official tensors, to be joined in dimension 0; the
# shape of each; n_head: if not 1, their rows are ordered (head, q|k|v), ours (q|k|v, head).
Source = namedtuple("Source", "keys shape n_head", defaults=[1])

def place(ae: Autoencoder, part: str, i: int) -> str:
    """The official name of layer i of E or D; up.0 is D's finest level, though it runs last."""
    up, cfg, names = part == "decoder", ae.cfg, []
    way, levels = "up" if up else "down", range(len(cfg.ch_mult))
    for level in levels[::-1] if up else levels:
        kinds = ("block", "attn") if cfg.side >> level in cfg.attn_res else ("block",)
        names += [f"{way}.{level}.{kind}.{k}" for k in range(cfg.n_res + up) for kind in kinds]
        names += [f"{way}.{level}.{way}sample"] * (level != (0 if up else levels[-1]))
    mid = ["mid.block_1", *["mid.attn_1"] * cfg.attn_mid, "mid.block_2"]
    names = ["conv_in", *(mid + names if up else names + mid), "norm_out", "", "conv_out"]
    return f"{part}.{names[i]}"

def table(net: nn.Module) -> dict[str, Source]:
    """Our key -> its official source, for a network of any size."""
    out, rules = {}, {UNet: UNET_RULES, Discriminator: {"^layers": "main"},
                      SpatialRescaler: {"^conv": "channel_mapper"}}.get(type(net), {})
    if isinstance(net, Autoencoder):
        rules = {r"^(\w+)\.layers\.(\d+)": lambda m: place(net, m[1], int(m[2]))} | AE_RULES
    elif isinstance(net, TextTransformer):
        rules = CLIP_RULES if net.cfg.clip else TEXT_RULES
    attn = {name: m for name, m in net.named_modules() if isinstance(m, SelfAttention2d)}
    for key, p in net.state_dict().items():
        name, shape = key, tuple(p.shape)
        for pattern, to in rules.items():
            name = re.sub(pattern, to, name)
        block, qkv = attn.get(key.rsplit(".", 2)[0]), ".qkv." in key
        if block and isinstance(net, UNet):                                     # 1d convs
            out[key] = Source((name,), shape[:3], block.n_head if qkv else 1)
        elif block and qkv:
            names = tuple(name.replace("qkv", c) for c in "qkv")
            out[key] = Source(names, (shape[0] // 3, *shape[1:]))
        elif key != "z_std":
            out[key] = Source((name,), shape)
    return out

def refuse(keys) -> None:
    """Raises BadInput, unless they are passengers."""
    for k in keys:
        require(PASSENGERS.fullmatch(k), f"{k} is unexpected: this is another model")

def load_into(net: nn.Module, state: dict, prefix: str = "") -> nn.Module:
    """Fill net, maybe on the meta device, with an official state dict's own tensors; only q, k and
    v may be copied. Raises BadInput naming the key that is missing, unexpected or misshapen."""
    sources, own = table(net), net.state_dict()
    known = {prefix + k: s.shape for s in sources.values() for k in s.keys}
    for k, shape in known.items():
        require(k in state, f"{k} is missing: this is another model")
        require((has := tuple(state[k].shape)) == shape, f"{k} has shape {has}, not {shape}")
    refuse(k for k in state if k.startswith(prefix) and k not in known)
    for key, (keys, _, n_head) in sources.items():
        t = torch.cat([state[prefix + k] for k in keys]) if keys[1:] else state[prefix + keys[0]]
        if n_head > 1:
            t = t.unflatten(0, (n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
        own[key] = t.reshape(own[key].shape)
    net.load_state_dict(own, assign=True)
    return net

def official_state(net: nn.Module, prefix: str = "", state: dict | None = None) -> dict:
    """The inverse of load_into: net's tensors, or those of a state dict of ours that fits it."""
    out, state = {}, state or net.state_dict()
    for key, (keys, shape, n_head) in table(net).items():
        t = state[key]
        if n_head > 1:
            t = t.unflatten(0, (3, n_head, -1)).transpose(0, 1).flatten(0, 2)
        out |= {prefix + k: part.reshape(shape) for k, part in zip(keys, t.chunk(len(keys)))}
    return out

def detect(state: dict) -> str:
    """The first row of presets.LDM whose networks have the shapes of state. Raises BadInput."""
    ch = len(state.get(UNET + "input_blocks.0.0.weight", ()))
    for name, row in presets.LDM.items():
        if name == "toy" or row["ae_preset"] == "none" or ch != row["ch"]:
            continue
        want = {prefix + k: s.shape for net, prefix in zip(presets.networks(row), (AE, UNET, TAU))
                if net for s in table(net).values() for k in s.keys}
        if want == {k: tuple(v.shape) for k, v in state.items() if k in want or k.startswith(UNET)}:
            return name
    raise BadInput("no preset has these tensors; --preset NAME says what differs from a row" if ch
                   else f"this is no latent diffusion model: it has no {UNET}* tensors")

def averaged(state: dict, unet: UNet) -> dict:
    """state with the EMA's weights in place of the U-Net's raw ones, where it has any.
    NB: the names of the released EMA are those of the U-Net without dots. No other net has one."""
    names = {EMA + k.replace(".", ""): UNET + k for s in table(unet).values() for k in s.keys}
    found = {k for k in state if k.startswith("model_ema.") and not PASSENGERS.fullmatch(k)}
    for odd in sorted(found ^ names.keys() if found else ()):
        raise BadInput(f"{odd} is {'unexpected' if odd in found else 'missing'} among the EMA's")
    return state | {names[k]: state[k] for k in found}

def load_model(path: Path, preset=None, ema=True, vocab=None, device=None, dtype=None) -> Model:
    """The model in a released .ckpt or .safetensors; preset: its row of LDM, else found out; vocab:
    open_vocab's path; dtype: else the file's. BadInput names an unknown or missing tensor."""
    state = read_state(path)
    try:
        preset = preset or detect(state)
        row = presets.LDM[preset] | {"preset": preset}
        ae, unet, tau = nets = presets.networks(row)
        # inpaint256's condition encoder is stage one, whose weights its file has twice
        known = (UNET, AE, "model_ema.", *[TAU] * bool(tau or row["task"] == "inpaint"))
        refuse(k for k in state if not k.startswith(known))
        weights = averaged(state, unet) if ema else state
        scale = torch.as_tensor(state.get("scale_factor", 1 / (row["z_std"] or 1.0)))
        ae.z_std = 1 / scale.float().reshape(())
        for net, prefix in zip(nets, (AE, UNET, TAU)):
            if net:
                load_into(net, weights, prefix).to(device, dtype).eval().requires_grad_(False)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from e
    text = vocab and row["task"] == "text"
    tokenizer = open_vocab(vocab, tau.cfg.n_vocab, tau.cfg.n_token) if text else None
    abar = cumulative(SCHEDULES[row["schedule"]](1000, *row["beta_range"])).to(device)
    return Model(*nets, tokenizer, abar, "eps", row["task"], (), row)

def export(path: Path, out: Path) -> None:
    """Write one of our checkpoints in the official layout, .safetensors or .ckpt. Raises BadInput.
    NB: the official layout has an EMA of the U-Net alone: tau is written as averaged."""
    ckpt = load_checkpoint(path, None, "--export")
    config = ckpt["config"]
    require(config["autoencoder"]["ch"], f"--export {path}: pixel models have no official layout")
    ae = build_autoencoder(config["autoencoder"])
    if "unet" not in config:                            # stage one alone
        return write_state(official_state(ae, "", ckpt["nets"]["ae"]), out)
    unet, mean = UNet(UNetConfig(**config["unet"])), ckpt["ema"]
    tau = build_tau(config.get("task", {"name": "text"})["name"], config["tau"])
    if unet.cfg.groups != 32 or config["schedule"]["predict"] != "eps":
        warnings.warn("the official code has 32 groups and predicts eps; this model has "
                      f"{unet.cfg.groups}, predicts {config['schedule']['predict']}", stacklevel=2)
    state = official_state(unet, "", mean["unet"])
    state = {EMA + k.replace(".", ""): v for k, v in state.items()} | official_state(
        unet, UNET, ckpt.get("nets", mean)["unet"]) | official_state(ae, AE, ckpt["ae"])
    state |= official_state(tau, TAU, mean["tau"]) if tau else {}
    write_state(state | {"scale_factor": 1 / ckpt["ae"]["z_std"].float()}, out)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--export", nargs=2, type=Path, required=True, metavar=("CKPT", "OUT"),
                        help="write a checkpoint of ours in the official layout")
    tr.run(lambda args: export(*args.export), parser.parse_args)
