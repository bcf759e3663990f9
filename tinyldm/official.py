"""Checkpoints of the official models: which of their tensors is which of ours, and the files.

    python -m tinyldm.official --export out/ldm/ckpt.pt out/official.safetensors

Paper:   the released model zoo; the names are those of its code's modules.
Symbols: state is an official state dict {key: tensor}; prefix what its keys begin with in a file.
Reads:   generate.py, presets.py, checkpoint.py, tokens.py, and the networks' modules
Our modules take the file's own tensors, mapped into memory; q, k and v alone may be copied."""
import argparse
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tinyldm import BadInput, presets, require, training as tr
from tinyldm.attention import SelfAttention2d
from tinyldm.autoencoder import Autoencoder, Decoder, Pixels, build_autoencoder
from tinyldm.checkpoint import load_checkpoint, read_state, write_state
from tinyldm.conditioning import ClassEmbedder, SpatialRescaler, TextTransformer
from tinyldm.diffusion import SCHEDULES, cumulative
from tinyldm.generate import Model
from tinyldm.layers import ResBlock
from tinyldm.patchgan import Discriminator
from tinyldm.tasks import build_tau
from tinyldm.tokens import open_vocab
from tinyldm.unet import UNet, UNetConfig

UNET, EMA, AE, TAU = ("model.diffusion_model.", "model_ema.diffusion_model", "first_stage_model.",
                      "cond_stage_model.")

# ---- names: (pattern, replacement), applied to our key in this order
UNET_RULES = [
    (r"^time\.", "time_embed."), (r"^down\.", "input_blocks."), (r"^up\.", "output_blocks."),
    (r"^middle\.", "middle_block."), (r"^norm_out", "out.0"), (r"^conv_out", "out.2"),
    (r"^(input_blocks\.\d+\.0)\.conv\.", r"\1.op."),                            # Downsample
    (r"(_blocks?\.[\d.]+)norm1", r"\1in_layers.0"), (r"conv1", "in_layers.2"),  # ResBlock
    (r"(_blocks?\.[\d.]+)norm2", r"\1out_layers.0"), (r"conv2", "out_layers.3"),
    (r"\.emb\.", ".emb_layers.1."), (r"\.skip\.", ".skip_connection."),
    (r"\.blocks\.", ".transformer_blocks."), (r"self_attn", "attn1"), (r"cross_attn", "attn2"),
    (r"to_out", "to_out.0"), (r"mlp\.proj", "ff.net.0.proj"), (r"mlp\.out", "ff.net.2")]
AE_RULES = [(r"\.skip\.", ".nin_shortcut."), (r"^codebook\.codes", "quantize.embedding.weight")]
TEXT_RULES = [                                                                  # x-transformers
    (r"^token\.", "token_emb."), (r"^position\.", "pos_emb.emb."),
    (r"mlp\.0", "mlp.net.0.0"), (r"mlp\.2", "mlp.net.2"),
    (r"^blocks\.(\d+)\.(norm1|attn|norm2|mlp)", lambda m: "attn_layers.layers." + ".".join((
        str(2 * int(m[1]) + (m[2] in ("norm2", "mlp"))), str(int(m[2] in ("attn", "mlp")))))),
    (r"^", "transformer.")]
CLIP_RULES = [
    (r"^(token|position)\.", r"embeddings.\1_embedding."), (r"^norm\.", "final_layer_norm."),
    (r"^blocks\.", "encoder.layers."), (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.to_(\w+)\.", r".self_attn.\1_proj."), (r"mlp\.0", "mlp.fc1"), (r"mlp\.2", "mlp.fc2"),
    (r"^", "transformer.text_model.")]
# What a file may hold that no model of ours needs: the schedule, losses, the text encoder's output.
PASSENGERS = re.compile(r"betas|(\w+_)?alphas_cumprod(_prev)?|posterior_\w+|lvlb_weights|logvar|"
                        r"scale_factor|model_ema\.(decay|num_updates)|(first_stage_model\.)?loss\..+|"
                        r"(.*\.)?to_logits\.\w+|(.*\.)?position_ids")

class Source(NamedTuple):
    """Where a tensor of ours comes from."""
    keys: tuple[str, ...]               # official tensors, to be joined in dimension 0
    shape: tuple[int, ...]              # of each
    n_head: int = 1                     # rows are ordered (head, q|k|v), ours (q|k|v, head)

def places(ae: Autoencoder, net: nn.Module) -> list[str]:
    """The official names of E's or D's layers; up.0 is D's finest level, though it runs last."""
    up, names, block = isinstance(net, Decoder), [], -1
    way, level = ("up", len(ae.cfg.ch_mult) - 1) if up else ("down", 0)
    mid = ["mid.block_1", *["mid.attn_1"] * ae.cfg.attn_mid, "mid.block_2"]
    for layer in net.layers[1 + len(mid):-3] if up else net.layers[1:-3 - len(mid)]:
        kind = {ResBlock: "block", SelfAttention2d: "attn"}.get(type(layer))
        block += kind == "block"
        names.append(f"{way}.{level}." + (f"{kind}.{block}" if kind else f"{way}sample"))
        if not kind:
            level, block = level + (-1 if up else 1), -1
    return ["conv_in", *(mid + names if up else names + mid), "norm_out", "", "conv_out"]

def rules_of(net: nn.Module) -> list[tuple[str, str | Callable]]:
    """The renaming rules of a network."""
    if isinstance(net, Autoencoder):
        where = {"encoder": places(net, net.encoder), "decoder": places(net, net.decoder)}
        return [(r"^(\w+)\.layers\.(\d+)", lambda m: f"{m[1]}.{where[m[1]][int(m[2])]}"), *AE_RULES]
    if isinstance(net, TextTransformer):
        return CLIP_RULES if net.cfg.clip else TEXT_RULES
    return {UNet: UNET_RULES, Discriminator: [("^layers", "main")], ClassEmbedder: [], Pixels: [],
            SpatialRescaler: [("^conv", "channel_mapper")]}[type(net)]

def table(net: nn.Module) -> dict[str, Source]:
    """Our key -> its official source, for a network of any size."""
    rules, out = rules_of(net), {}
    attn = {name: m for name, m in net.named_modules() if isinstance(m, SelfAttention2d)}
    for key, p in net.state_dict().items():
        name, shape = key, tuple(p.shape)
        for pattern, to in rules:
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

# ---- from their tensors to ours, and back
def refuse(keys: Iterable[str]) -> None:
    """Raises BadInput, unless they are passengers."""
    for k in keys:
        require(PASSENGERS.fullmatch(k), f"{k} is unexpected: this is another model")

def load_into(net: nn.Module, state: dict, prefix: str = "") -> nn.Module:
    """Fill net, which may be on the meta device, with an official state dict's own tensors.
    Raises BadInput naming the key that is missing, unexpected or of the wrong shape."""
    sources = table(net)
    known = {prefix + k: s.shape for s in sources.values() for k in s.keys}
    for k, shape in known.items():
        require(k in state, f"{k} is missing: this is another model")
        found = tuple(state[k].shape)
        require(found == shape, f"{k} has shape {found} where {shape} belongs")
    refuse(k for k in state if k.startswith(prefix) and k not in known)
    own = net.state_dict()
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

# ---- whole models
def detect(state: dict) -> str:
    """The first row of presets.LDM whose networks have the shapes of state. Raises BadInput."""
    ch = len(state.get(UNET + "input_blocks.0.0.weight", ()))
    for name, row in presets.LDM.items():
        if name == "toy" or row["ae_preset"] == "none" or ch != row["ch"]:
            continue
        nets = zip(presets.networks(row), (AE, UNET, TAU))
        want = {prefix + k: s.shape for net, prefix in nets if net
                for s in table(net).values() for k in s.keys}
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

def load_model(path: Path, preset: str | None = None, ema: bool = True, vocab: Path | None = None,
               device=None, dtype: torch.dtype | None = None) -> Model:
    """The model in a released .ckpt or .safetensors, its row of presets.LDM as flags; preset: the
    row's name, else it is found out; vocab: as open_vocab's path; dtype: default as in the file.
    Raises BadInput naming a tensor of the file that is unknown, or one of ours that it lacks."""
    state = read_state(path)
    try:
        preset = preset or detect(state)
        row = presets.LDM[preset] | {"preset": preset}
        ae, unet, tau = nets = presets.networks(row)
        # inpaint256's condition encoder is stage one, whose weights its file has twice
        known = (UNET, AE, "model_ema.", *[TAU] * bool(tau or row["task"] == "inpaint"))
        refuse(k for k in state if not k.startswith(known))
        weights = averaged(state, unet) if ema else state
        z_std = 1 / state.get("scale_factor", torch.tensor(1 / (row["z_std"] or 1.0))).float()
        ae.z_std = z_std.reshape(())
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
    groups, predict = unet.cfg.groups, config["schedule"]["predict"]
    if groups != 32 or predict != "eps":
        warnings.warn("the official code has 32 groups and predicts eps; this model has "
                      f"{groups} and predicts {predict}", stacklevel=2)
    averages = official_state(unet, "", mean["unet"])
    write_state(official_state(unet, UNET, ckpt.get("nets", mean)["unet"])
                | official_state(ae, AE, ckpt["ae"])
                | (official_state(tau, TAU, mean["tau"]) if tau else {})
                | {EMA + k.replace(".", ""): v for k, v in averages.items()}
                | {"scale_factor": 1 / ckpt["ae"]["z_std"].float()}, out)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--export", nargs=2, type=Path, required=True, metavar=("CKPT", "OUT"),
                        help="write a checkpoint of ours in the official layout")
    tr.run(lambda args: export(*args.export), parser.parse_args)
