"""The released models: open their files, and write ours as such a file.

    python -m tinyldm.engine.released --export out/ldm/ckpt.pt out/official.safetensors
    python -m tinyldm.engine.released --export out/ldm/ckpt.pt out/folder --layout diffusers

Paper:   the released model zoo; released_names.py says which tensor is which.
Symbols: state is an official state dict, {key: tensor}; prefix is what the keys of one
         network begin with in it.
"""
import dataclasses
import json
import re
import warnings
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tinyldm.autoencoder import AEConfig, Autoencoder, build_autoencoder
from tinyldm.data.tokenizer import check_tokenizer, open_vocab
from tinyldm.diffusion import DiffusionConfig
from tinyldm.engine import flags, presets
from tinyldm.engine.checkpoint import (
    atomic_write,
    autoencoder_state,
    is_buildable,
    load_checkpoint,
)
from tinyldm.engine.command import run
from tinyldm.engine.diffusers_names import diffusers_config, from_diffusers, to_diffusers
from tinyldm.engine.recognise import recognise_state
from tinyldm.engine.released_names import AE, EMA, IGNORED, TAU, UNET, Source, sources
from tinyldm.engine.weights import read_file, write_state
from tinyldm.errors import BadInput, naming, require, trying
from tinyldm.model import LatentDiffusion, ModelConfig, build_model
from tinyldm.unet import UNet, UNetConfig

# ---- one network


def load_into(net: nn.Module, state: dict[str, Tensor], prefix: str = "") -> nn.Module:
    """Fill a network, which may be on the meta device, from an official state dict.

    The network takes over the tensors themselves, with their dtype; only q, k and v may
    be copied, and fp8 is cast. Raises BadInput that names a key that is missing,
    unexpected or of another shape.
    """
    table = sources(net)
    check_keys(table.values(), state, prefix)

    own = net.state_dict()
    for key, source in table.items():
        parts = [without_fp8(state[prefix + name]) for name in source.keys]
        own[key] = from_official(parts, source).reshape(own[key].shape)
    net.load_state_dict(own, assign=True)
    return net


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def without_fp8(x: Tensor) -> Tensor:
    """Return fp8 as fp16, which has all of its values, and any other tensor as it is.

    Why: no network computes in fp8.
    """
    return x.half() if x.dtype in FP8 else x


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


# ---- files, as people have them

OURS = "tinyldm"                    # the text of a file that we wrote: its config, as JSON
# The texts by which other programs say what is predicted.
PREDICTION = "modelspec.prediction_type"
PREDICTION_TEXTS = (PREDICTION, "modelspec.predict_key")


def read_released(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file, named as in the official files, and its texts.

    Raises BadInput that names the file.
    """
    state, texts = read_file(path)
    official = {}
    for key, x in state.items():
        # Newer files of CLIP have no text_model in their names.
        name = re.sub(rf"^({TAU}transformer)\.(?=embed|encoder|final_)", r"\1.text_model.", key)
        official[name] = x

    # These are no weights: every digit of them counts.
    for name in ("alphas_cumprod", "scale_factor"):
        if name in official and official[name].dtype in FP8:
            warnings.warn(
                f"{path}: its {name} is in fp8, whose digits are too few; that of its preset "
                "is taken",
                stacklevel=2,
            )
            del official[name]
    return official, texts


def our_head(texts: dict[str, str]) -> dict | None:
    """Return the head of our checkpoint that was exported as a file; None: it is not ours.

    Raises BadInput if it cannot be read.
    """
    if OURS not in texts:
        return None
    with trying(f"its text {OURS!r} cannot be read"):
        head = with_tuples(json.loads(texts[OURS]))
        for shape in head["config"].values():
            require(is_buildable(shape), f"its text {OURS!r} has absurd sizes")
        return head


def with_tuples(value: object) -> object:
    """Return a value of JSON with tuples for its lists, as configs have them."""
    if isinstance(value, dict):
        return {key: with_tuples(v) for key, v in value.items()}
    return tuple(with_tuples(v) for v in value) if isinstance(value, list) else value


# ---- a whole model

def load_released(
    path: Path,
    preset: str | None = None,
    ema: bool = True,
    vocab: Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LatentDiffusion:
    """Open a released .ckpt or .safetensors, or one that we exported, for sampling.

    preset: the row of presets.LDM; default: the one that has the shapes of the file.
    ema: take the averaged weights, where the file has some.
    vocab: the path of a text model's vocabulary (see open_vocab in data/tokenizer.py).
    dtype: default: the file's.

    The model's `run` is the preset's row, with its name.
    Raises BadInput that names the file, and a tensor that is unknown or missing.
    """
    state, model = read_model(path, preset, vocab)
    with naming(str(path)), trying("its parts do not fit together"):
        check_networks(state, model)
        model.ae.z_std = z_std_of(state, model.run, path)

        has_own = has_prefix(state, UNET)
        require(ema or has_own, "it has averaged weights only, no others")
        weights = averaged(state, model.unet) if ema or not has_own else state
        for net, prefix in networks_of(model):
            load_into(net, weights, prefix)
    return model.for_sampling(device, dtype)


def read_config(
    path: Path, preset: str | None = None, vocab: Path | None = None
) -> tuple[ModelConfig, dict]:
    """Return what the model in a released file is made of, and its `run`, without its weights.

    The arguments, and the errors, are those of load_released.
    """
    _, model = read_model(path, preset, vocab)
    return model.config, model.run


def read_model(
    path: Path, preset: str | None, vocab: Path | None
) -> tuple[dict[str, Tensor], LatentDiffusion]:
    """Return the tensors of a released file, and its model on the meta device, unfilled."""
    state, texts = read_released(path)
    kind = recognise_state(state)
    require(kind is None, f"{path}: {kind}")
    with naming(str(path)), trying("its parts do not fit together"):
        head = our_head(texts)
        if head is None:
            name = preset or detect(state)
            config = presets.config_of(presets.LDM[name])
            run = presets.LDM[name] | {"preset": name}
        else:
            with trying("its config cannot be read"):
                config = ModelConfig.from_checkpoint(head)
                run = head["args"]
                name = run.get("preset")
            require(preset in (None, name), f"its preset is {name}, not {preset}")
        diffusion = diffusion_of(state, texts, config.diffusion, path)
        config = dataclasses.replace(config, diffusion=diffusion)
        with torch.device("meta"), trying("its config cannot be built"):
            model = build_model(config)
        if model.tokenizer is not None:
            check_tokenizer(model.tokenizer, config.tau["n_vocab"], "its tokenizer")

    if vocab is not None and "caption" in model.task.fields:
        set_tokenizer(model, vocab)
    model.run = run
    return state, model


def has_prefix(state: dict[str, Tensor], prefix: str) -> bool:
    """Return whether some key of a state dict begins with a prefix."""
    return any(key.startswith(prefix) for key in state)


def diffusion_of(
    state: dict[str, Tensor], texts: dict[str, str], config: DiffusionConfig, path: Path
) -> DiffusionConfig:
    """Return the process that a file's model was trained for, where it says so.

    config: that of the preset. Why tolerant: files in fp16 have their schedule in it, too.
    Raises BadInput for a schedule that is none.
    """
    says_v = "v_pred" in state
    for name in PREDICTION_TEXTS:
        says_v = says_v or texts.get(name, "").startswith("v")
    predict = "v" if says_v else config.predict

    abar = state.get("alphas_cumprod")
    if abar is None:
        return dataclasses.replace(config, predict=predict)
    require(
        abar.ndim == 1 and 0 < len(abar) < 10 ** 5,
        f"alphas_cumprod has the shape {tuple(abar.shape)}, which no schedule has",
    )
    abar = abar.double()
    own = config.abar()
    if abar.shape == own.shape and torch.allclose(abar, own, rtol=2e-3, atol=1e-6):
        return dataclasses.replace(config, predict=predict)

    if abar[-1] == 0 and predict == "eps":
        warnings.warn(
            f"{path}: its schedule ends in pure noise, of which only v says something: it is "
            "taken to predict v",
            stacklevel=2,
        )
        predict = "v"
    return dataclasses.replace(
        config, predict=predict, T=len(abar), alphas_cumprod=tuple(abar.tolist())
    )


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


def z_std_of(state: dict[str, Tensor], row: dict, path: Path) -> Tensor:
    """Return the std of the latents; the official code multiplies by 1 / z_std.

    Warns if neither the file nor the row knows it.
    """
    known = known_z_std(state, row)
    if known is None:
        warnings.warn(
            f"{path}: it has no scale_factor, which other files of this model have: 1 is taken, "
            "with which its images are probably wrong; take the original file",
            stacklevel=2,
        )
    return torch.ones(()) if known is None else known


def known_z_std(state: dict[str, Tensor], row: dict) -> Tensor | None:
    """Return the z_std that a file or its preset's row knows; None if neither does."""
    if "scale_factor" in state:
        scale_factor = state["scale_factor"]
        n = scale_factor.numel()
        require(n == 1, f"scale_factor has {n:,} numbers, not one")
        return 1 / scale_factor.float().reshape(())
    return torch.tensor(row["z_std"]) if row.get("z_std") else None


def networks_of(model: LatentDiffusion) -> list[tuple[nn.Module, str]]:
    """Return the networks of a model, each with the prefix of its keys."""
    networks = [(model.ae, AE), (model.unet, UNET), (model.tau, TAU)]
    return [(net, prefix) for net, prefix in networks if net is not None]


def detect(state: dict[str, Tensor]) -> str:
    """Return the first row of presets.LDM that has the shapes of a state dict.

    Raises BadInput if none has, or if several have that are not one and the same model.
    """
    key = "input_blocks.0.0.weight"
    first = state.get(UNET + key, state.get(averaged_name(key)))
    require(
        first is not None and first.ndim > 0,
        f"this is no latent diffusion model: it has no {UNET}* tensors",
    )
    found: list[str] = []
    for name, row in presets.LDM.items():
        is_released = "data" not in row and row["ae_preset"] != "none"
        if not is_released or row["ch"] != len(first) or is_known(row, found):
            continue
        if has_shapes_of(state, presets.build_networks(row)):
            found.append(name)

    require(found, "no preset has these tensors; give one, and the error will say what differs")
    require(
        len(found) == 1,
        f"its tensors are those of several presets, {' and '.join(found)}; say which one it is "
        "by --preset",
    )
    return found[0]


def is_known(row: dict, found: Sequence[str]) -> bool:
    """Return whether a row cannot add to those found: it has other networks, or is the same.

    Why: to build networks takes time, even without memory.
    """
    for name in found:
        other = presets.LDM[name]
        if any(row[key] != other[key] for key in ("ae_preset", "task", "ch_mult")):
            return True
        is_same = presets.config_of(row) == presets.config_of(other)
        if is_same and row["z_std"] == other["z_std"]:
            return True
    return False


def has_shapes_of(state: dict[str, Tensor], model: LatentDiffusion) -> bool:
    """Return whether a state dict has the tensors of a model, and no others of a U-Net."""
    if not has_prefix(state, UNET):
        try:
            state = averaged(state, model.unet)
        except BadInput:
            return False
    wanted = {}
    for net, prefix in networks_of(model):
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


# ---- stage one alone

def load_stage_one(path: Path) -> tuple[Autoencoder, bool]:
    """Open the autoencoder in a released file, in fp32 -> autoencoder, whether z_std is known.

    The file holds it alone, in the official layout or in that of diffusers, or in a whole model,
    which may know its z_std. Raises BadInput that names the file.
    """
    state, texts = read_released(path)
    prefix = AE if has_prefix(state, AE) else ""
    if prefix + "encoder.conv_in.weight" not in state:
        kind = recognise_state(state)
        raise BadInput(f"{path}: {kind or 'there is no autoencoder in it'}")

    with naming(str(path)), trying("its parts do not fit together"):
        head = our_head(texts)
        if head is None:
            ae = detect_stage_one(state, prefix)
        else:
            with torch.device("meta"), trying("its config cannot be built"):
                ae = build_autoencoder(AEConfig(**head["config"]["autoencoder"]))
        load_into(ae, from_diffusers(state, ae), prefix)
        z_std = z_std_of_whole(state) if prefix else None
    ae.z_std = torch.ones(()) if z_std is None else z_std
    return ae.float().requires_grad_(False), z_std is not None


def detect_stage_one(state: dict[str, Tensor], prefix: str) -> Autoencoder:
    """Return, on the meta device, the first autoencoder of presets.AE that has the shapes.

    Raises BadInput if none has.
    """
    for name in presets.AE:
        with torch.device("meta"):
            ae = build_autoencoder(presets.ae_config(name))
        try:
            check_keys(sources(ae).values(), from_diffusers(state, ae), prefix)
        except BadInput:
            continue
        return ae
    raise BadInput(f"no autoencoder of presets.py has these tensors: {', '.join(presets.AE)}")


def z_std_of_whole(state: dict[str, Tensor]) -> Tensor | None:
    """Return the z_std that a file of a whole model knows; None if it does not."""
    try:
        row = presets.LDM[detect(state)]
    except BadInput:
        row = {}                        # a model of other shapes; its scale_factor counts, too
    return known_z_std(state, row)


# ---- export

def export(path: Path, out: Path) -> None:
    """Write a checkpoint of ours in the official layout, as .safetensors or .ckpt.

    NB: the official layout has averaged weights of the U-Net only, and the official
    code does not average tau. Ours is averaged, and the averaged tau is what is
    written.
    NB: the official file of inpainting has stage one twice, as tau, too. In its code the
    two are one network, so once is enough.
    Raises BadInput that names the file.
    """
    checkpoint = load_checkpoint(path)
    with naming(str(path)), trying("its parts do not fit together"):
        if "unet" in checkpoint["config"]:
            state = official_model(checkpoint)
        else:
            state = official_stage_one(checkpoint)
        texts = texts_of(checkpoint)
    write_state(state, out, texts)


def export_diffusers(path: Path, folder: Path) -> None:
    """Write stage one and the U-Net of a checkpoint as diffusers has them: vae/ and unet/.

    NB: the averaged weights, and neither tau nor the schedule, nor whether the U-Net predicts
    v: these are for one's own program. Only a U-Net that attends to tokens, and resamples by
    convolutions, has a class in diffusers.
    Raises BadInput that names the file.
    """
    checkpoint = load_checkpoint(path)
    with naming(str(path)), trying("its parts do not fit together"):
        config = checkpoint["config"]
        ae = AEConfig(**config["autoencoder"])
        require(ae.ch > 0, "a model of pixels has no stage one")
        ae_state = autoencoder_state(checkpoint)
        nets = [("vae", build_autoencoder, ae, ae_state)]
        if "unet" in config:
            backbone = config.get("backbone", {"name": "unet"})["name"]
            require(backbone == "unet", f"its network, {backbone}, is no U-Net: not exported")
            unet = UNetConfig(**config["unet"])
            require(
                unet.d_ctx and not unet.res_updown,
                "diffusers has no class for its U-Net, which must attend to tokens and resample by "
                "convolutions; export the checkpoint of its stage one",
            )
            nets.append(("unet", UNet, unet, checkpoint["ema"]["unet"]))
            diffusion = config["schedule"]
            warnings.warn(
                f"these files do not say what the U-Net predicts, {diffusion['predict']}, nor its "
                f"schedule, {diffusion['name']}; whoever samples with them must know",
                stacklevel=2,
            )

        for name, build, cfg, state in nets:
            with torch.device("meta"):
                net = build(cfg)
            renamed = to_diffusers(official_state(net, "", state), net)
            write_state(renamed, folder / name / "diffusion_pytorch_model.safetensors")
            values = diffusers_config(cfg)
            if name == "vae" and "unet" in config:
                values["scaling_factor"] = 1 / float(ae_state["z_std"])
            with atomic_write(folder / name / "config.json") as file:
                file.write(json.dumps(values, indent=1).encode())


def texts_of(checkpoint: dict) -> dict[str, str]:
    """Return what the official layout has no place for: the config, and what is predicted.

    Other programs pass over it; read_released finds it again.
    """
    head = {}
    for name in ("config", "size", "classes", "tokenizer", "p_drop", "args"):
        if name in checkpoint:
            head[name] = checkpoint[name]
    texts = {OURS: json.dumps(head)}
    if "schedule" in head["config"]:
        predict = head["config"]["schedule"]["predict"]
        texts[PREDICTION] = "epsilon" if predict == "eps" else predict
    return texts


def official_stage_one(checkpoint: dict) -> dict[str, Tensor]:
    """Return the official state dict of a checkpoint of stage one."""
    cfg = AEConfig(**checkpoint["config"]["autoencoder"])
    with torch.device("meta"):
        ae = build_autoencoder(cfg)
    return official_state(ae, "", autoencoder_state(checkpoint))


def official_model(checkpoint: dict) -> dict[str, Tensor]:
    """Return the official state dict of a checkpoint of stage two."""
    config = ModelConfig.from_checkpoint(checkpoint)
    require(config.autoencoder.ch > 0, "models of pixels have no official layout")
    require(
        config.backbone == "unet",
        f"its network is a {config.backbone}, and the official layout has U-Nets only",
    )
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
    state["alphas_cumprod"] = model.abar.float()
    return state


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    parser = flags.new_parser(__doc__)
    parser.add_argument(
        "--export", nargs=2, type=Path, required=True, metavar=("CKPT", "OUT"),
        help="write a checkpoint of ours in the official layout, .safetensors or .ckpt",
    )
    parser.add_argument(
        "--layout", type=str, choices=["official", "diffusers"], default="official",
        help="diffusers: write a folder with vae/ and unet/, as diffusers has them",
    )
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    path, out = args.export
    with naming("--export"):
        if args.layout == "diffusers":
            export_diffusers(path, out)
        else:
            export(path, out)


if __name__ == "__main__":
    run(main, parse_args)
