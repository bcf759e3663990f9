"""The released models: open their files, and write ours as such a file.

    python -m tinyldm.engine.released --export out/ldm/ckpt.pt out/official.safetensors

Paper:   the released model zoo; released_names.py says which tensor is which.
Symbols: state is an official state dict, {key: tensor}; prefix is what the keys of one
         network begin with in it.
"""
import dataclasses
import warnings
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyldm.autoencoder import AEConfig, build_autoencoder
from tinyldm.data.tokenizer import open_vocab
from tinyldm.engine import flags, presets
from tinyldm.engine.checkpoint import load_checkpoint
from tinyldm.engine.command import run
from tinyldm.engine.recognise import recognise_state
from tinyldm.engine.released_names import AE, EMA, IGNORED, TAU, UNET, Source, sources
from tinyldm.engine.weights import read_state, write_state
from tinyldm.errors import BadInput, naming, require, trying
from tinyldm.model import LatentDiffusion, ModelConfig, build_model
from tinyldm.unet import UNet

# ---- one network


def load_into(net: nn.Module, state: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """Fill a network, which may be on the meta device, from an official state dict.

    The network takes over the tensors themselves, with their dtype; only q, k and v may
    be copied. Raises BadInput that names a key that is missing, unexpected or of
    another shape.
    """
    table = sources(net)
    check_keys(table.values(), state, prefix)

    own = net.state_dict()
    for key, source in table.items():
        parts = [state[prefix + name] for name in source.keys]
        own[key] = from_official(parts, source).reshape(own[key].shape)
    net.load_state_dict(own, assign=True)
    return net


def official_state(
    net: nn.Module, prefix: str = "", state: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the official state dict of a network; the inverse of load_into.

    state: a state dict of ours to convert in place of the network's own.
    """
    if state is None:
        state = net.state_dict()
    official = {}
    for key, source in sources(net).items():
        parts = to_official(state[key], source)
        for name, part in zip(source.keys, parts):
            official[prefix + name] = part
    return official


def from_official(parts: Sequence[Tensor], source: Source) -> Tensor:
    """Return our tensor from its official parts, maybe with fewer dimensions."""
    x = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    if source.n_head > 1:
        # rows (head, q|k|v, d_head) -> (q|k|v, head, d_head)
        x = x.unflatten(0, (source.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
    return x


def to_official(x: Tensor, source: Source) -> list[Tensor]:
    """Return the official parts of our tensor."""
    if source.n_head > 1:
        # rows (q|k|v, head, d_head) -> (head, q|k|v, d_head)
        x = x.unflatten(0, (3, source.n_head, -1)).transpose(0, 1).flatten(0, 2)
    return [part.reshape(source.shape) for part in x.chunk(len(source.keys))]


def check_keys(wanted: Iterable[Source], state: dict[str, Tensor], prefix: str) -> None:
    """Raise BadInput unless the keys of this prefix are those wanted."""
    shapes = {}
    for source in wanted:
        for name in source.keys:
            shapes[prefix + name] = source.shape

    for key, shape in shapes.items():
        require(key in state, f"{key} is missing: this is another model")
        found = tuple(state[key].shape)
        require(found == shape, f"{key} has shape {found}, not {shape}")

    with_prefix = [key for key in state if key.startswith(prefix)]
    check_ignored(key for key in with_prefix if key not in shapes)


def check_ignored(keys: Iterable[str]) -> None:
    """Raise BadInput for a key that is not known as one to ignore."""
    for key in keys:
        require(IGNORED.fullmatch(key), f"{key} is unexpected: this is another model")


# ---- a whole model

def load_released(
    path: Path,
    preset: str | None = None,
    ema: bool = True,
    vocab: Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LatentDiffusion:
    """Open a released .ckpt or .safetensors, for sampling.

    preset: the row of presets.LDM; default: the one that has the shapes of the file.
    ema: take the averaged weights, where the file has some.
    vocab: the path of a text model's vocabulary (see open_vocab in data/tokenizer.py).
    dtype: default: the file's.

    The model's `run` is the preset's row, with its name.
    Raises BadInput that names the file, and a tensor that is unknown or missing.
    """
    state = read_state(path)
    kind = recognise_state(state)
    require(kind is None, f"{path}: {kind}")
    with naming(str(path)):
        if preset is None:
            preset = detect(state)
        row = presets.LDM[preset]
        model = presets.build_networks(row)

        check_networks(state, model)
        model.ae.z_std = z_std_of(state, row)

        weights = averaged(state, model.unet) if ema else state
        for net, prefix in networks_of(model):
            load_into(net, weights, prefix)

    if vocab is not None and "caption" in model.task.fields:
        set_tokenizer(model, vocab)
    model.run = row | {"preset": preset}
    return model.for_sampling(device, dtype)


def check_networks(state: dict[str, Tensor], model: LatentDiffusion) -> None:
    """Raise BadInput for a tensor that belongs to no network of the model."""
    prefixes = [UNET, AE, "model_ema."]
    if model.tau is not None:
        prefixes.append(TAU)
    with_prefix = tuple(prefixes)
    others = [key for key in state if not key.startswith(with_prefix)]

    # Inpainting's tau is stage one, so its file has the same weights under both names.
    copies = set()
    if model.tau is None:
        for source in sources(model.ae).values():
            copies.update(TAU + name for name in source.keys)
    check_ignored(key for key in others if key not in copies)


def z_std_of(state: dict[str, Tensor], row: dict) -> Tensor:
    """Return the std of the latents; the official code multiplies by 1 / z_std."""
    scale_factor = state.get("scale_factor", 1 / (row["z_std"] or 1.0))
    scale_factor = torch.as_tensor(scale_factor).float().reshape(())
    return 1 / scale_factor


def networks_of(model: LatentDiffusion) -> list[tuple[nn.Module, str]]:
    """Return the networks of a model, each with the prefix of its keys."""
    networks = [(model.ae, AE), (model.unet, UNET), (model.tau, TAU)]
    return [(net, prefix) for net, prefix in networks if net is not None]


def detect(state: dict[str, Tensor]) -> str:
    """Return the first row of presets.LDM that has the shapes of a state dict.

    Raises BadInput if none has.
    """
    first = state.get(UNET + "input_blocks.0.0.weight")
    require(
        first is not None and first.ndim > 0,
        f"this is no latent diffusion model: it has no {UNET}* tensors",
    )
    for name, row in presets.LDM.items():
        is_released = name != "toy" and row["ae_preset"] != "none"
        if is_released and row["ch"] == len(first) and has_shapes_of(state, row):
            return name
    raise BadInput(
        "no preset has these tensors; give one, and the error will say what differs"
    )


def has_shapes_of(state: dict[str, Tensor], row: dict) -> bool:
    """Return whether a state dict has a row's tensors, and no others of a U-Net."""
    wanted = {}
    for net, prefix in networks_of(presets.build_networks(row)):
        for source in sources(net).values():
            for name in source.keys:
                wanted[prefix + name] = source.shape
    found = {}
    for key, x in state.items():
        if key in wanted or key.startswith(UNET):
            found[key] = tuple(x.shape)
    return wanted == found


def averaged(state: dict[str, Tensor], unet: UNet) -> dict[str, Tensor]:
    """Return state with the averaged weights of the U-Net, if any, for its own.

    NB: only the U-Net has averaged weights in the official layout, under its names
    without dots. Raises BadInput if some are missing or too many.
    """
    found = {key for key in state if key.startswith("model_ema.")}
    found = {key for key in found if not IGNORED.fullmatch(key)}
    if not found:
        return state

    names = {}
    for source in sources(unet).values():
        for name in source.keys:
            names[averaged_name(name)] = UNET + name
    for key in sorted(found ^ names.keys()):
        what = "unexpected" if key in found else "missing"
        raise BadInput(f"{key} is {what} among the averaged weights")
    return state | {names[key]: state[key] for key in found}


def averaged_name(name: str) -> str:
    """Return the name of the averaged weight of an official name of the U-Net."""
    return EMA + name.replace(".", "")


def set_tokenizer(model: LatentDiffusion, vocab: Path) -> None:
    """Give a text model the tokenizer of a vocabulary that fits it, or raise BadInput."""
    tau = model.config.tau
    tokenizer = open_vocab(vocab, tau["n_vocab"], tau["n_token"])
    model.task.tokenizer = tokenizer
    model.config = dataclasses.replace(model.config, tokenizer=tokenizer.to_str())


# ---- export

def export(path: Path, out: Path) -> None:
    """Write a checkpoint of ours in the official layout, as .safetensors or .ckpt.

    NB: the official layout has averaged weights of the U-Net only, and the official
    code does not average tau. Ours is averaged, and the averaged tau is what is
    written.
    Raises BadInput that names the file.
    """
    checkpoint = load_checkpoint(path)
    with naming(str(path)), trying("its parts do not fit together"):
        if "unet" in checkpoint["config"]:
            state = official_model(checkpoint)
        else:
            state = official_stage_one(checkpoint)
    write_state(state, out)


def official_stage_one(checkpoint: dict) -> dict[str, Tensor]:
    """Return the official state dict of a checkpoint of stage one."""
    cfg = AEConfig(**checkpoint["config"]["autoencoder"])
    with torch.device("meta"):
        ae = build_autoencoder(cfg)
    return official_state(ae, "", checkpoint["nets"]["ae"])


def official_model(checkpoint: dict) -> dict[str, Tensor]:
    """Return the official state dict of a checkpoint of stage two."""
    config = ModelConfig.from_checkpoint(checkpoint)
    require(config.autoencoder.ch > 0, "models of pixels have no official layout")
    predict = config.diffusion.predict
    groups = config.unet.groups
    if groups != 32 or predict != "eps":
        warnings.warn(
            "the official code has 32 groups and predicts eps; "
            f"this model has {groups} and predicts {predict}",
            stacklevel=2,
        )

    with torch.device("meta"):
        model = build_model(config)
    mean = checkpoint["ema"]
    own = checkpoint.get("nets", mean)          # a model.pt has the averaged weights only

    averaged_unet = official_state(model.unet, "", mean["unet"])
    state = {averaged_name(name): x for name, x in averaged_unet.items()}
    state |= official_state(model.unet, UNET, own["unet"])
    state |= official_state(model.ae, AE, checkpoint["ae"])
    if model.tau is not None:
        state |= official_state(model.tau, TAU, mean["tau"])
    state["scale_factor"] = 1 / checkpoint["ae"]["z_std"].float()
    return state


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--export", nargs=2, type=Path, required=True, metavar=("CKPT", "OUT"),
        help="write a checkpoint of ours in the official layout, .safetensors or .ckpt",
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    path, out = args.export
    with naming("--export"):
        export(path, out)


if __name__ == "__main__":
    run(main, parse_args)
