"""Open a model from any file: a checkpoint of ours, or a released model.

Ours hold all that is needed (ckpt.pt also what resuming needs, model.pt the averaged weights
alone). Released files hold weights only; their shapes say which preset they are.
"""
import contextlib
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from tinyldm.autoencoder import AEConfig, Autoencoder, Pixels, build_autoencoder
from tinyldm.data.tokenizer import check_tokenizer
from tinyldm.engine import released
from tinyldm.engine.checkpoint import (
    autoencoder_state,
    check_finite,
    load_checkpoint,
    previous_path,
    save_checkpoint,
    short,
)
from tinyldm.engine.recognise import recognise_state
from tinyldm.engine.weights import read_state
from tinyldm.errors import BadInput, naming, require, trying
from tinyldm.lora import DOWN, UP
from tinyldm.model import LatentDiffusion, ModelConfig, build_model

PACKAGE = Path(__file__).parent.parent

# The models that come with the package, by the names that flags have for them.
BUNDLED = {"emoji": PACKAGE / "emoji.pt", "toy": PACKAGE / "toy.pt"}


def model_file(text: str) -> Path:
    """Return the path that a flag means: that of a bundled model by name, or of any file."""
    return BUNDLED.get(text, Path(text))


def open_model(
    path: Path,
    *,
    ema: bool = True,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    preset: str | None = None,
    vocab: Path | None = None,
) -> LatentDiffusion:
    """Open the model in a file, frozen, for sampling.

    ema: take the averaged weights, where the file has both. dtype: None keeps the file's, in a
    released file. preset and vocab are for released models: the row of presets.LDM, if its
    shapes leave that open, and the path of its tokenizer's vocabulary.
    Raises BadInput that names the file and what is wrong with it.
    """
    if is_ours(path):
        model = open_ours(path, ema, device)
    else:
        model = released.load_released(path, preset, ema, vocab, device, dtype)
    for name, net in {"ae": model.ae, **model.networks}.items():
        with naming(f"{path}: {name}"):
            check_finite(net.state_dict())
    return model


def open_ours(path: Path, ema: bool, device: torch.device | str) -> LatentDiffusion:
    """Open the model in a checkpoint of ours, as open_model does."""
    checkpoint = load_checkpoint(path, "ldm")
    require(ema or "nets" in checkpoint, f"{path} has averaged weights only; take ckpt.pt")
    weights = checkpoint["ema" if ema else "nets"]

    with naming(str(path)), trying("its parts do not fit together"):
        config = ModelConfig.from_checkpoint(checkpoint)
    with trying(f"{path}: its parts do not fit together"):
        # On the meta device, so that a file with absurd sizes takes no memory.
        with torch.device("meta"):
            model = build_model(config)
        model.ae.load_state_dict(checkpoint["ae"], assign=True)
        model.unet.load_state_dict(weights["unet"], assign=True)
        if model.tau is not None:
            model.tau.load_state_dict(weights["tau"], assign=True)
        has_words = model.tokenizer is not None
        require(
            has_words or "caption" not in model.task.fields,
            f"{path}: damaged: it has no tokenizer for its captions",
        )
        if has_words:
            check_tokenizer(model.tokenizer, config.tau["n_vocab"], str(path))
        model.run = checkpoint["args"]
        return model.for_sampling(device, torch.float32)


def save_model(model: LatentDiffusion, path: Path) -> None:
    """Write a model as a file of its own, which open_model opens.

    Raises BadInput if the file cannot be written.
    """
    checkpoint = {"kind": "tinyldm ldm", "step": 0, "args": model.run}
    averaged = {name: net.state_dict() for name, net in model.networks.items()}
    checkpoint |= model.config.to_checkpoint() | {"ae": model.ae.state_dict(), "ema": averaged}
    save_checkpoint(checkpoint, path)


def open_lora(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a LoRA of train_ldm.py, for lora.merge.

    Raises BadInput that names the file, and says what it is if it is something else.
    """
    advice = "a LoRA is a lora.safetensors of train_ldm.py; a whole model is for --ckpt"
    require(not is_ours(path), f"{path}: a checkpoint, not a LoRA; {advice}")
    state = read_state(path)

    others = [key for key in state if not key.endswith((DOWN, UP)) or key.startswith("lora_")]
    if others:
        name = short(others[0])
        kind = recognise_state(state)
        what = kind.what if kind else "not a LoRA"
        if "lora" in name:
            what = "a LoRA of another program, whose names of tensors are not read"
        raise BadInput(f"{path}: {what}: it has {name}; {advice}")

    state = {key: released.without_fp8(x) for key, x in state.items()}
    with naming(str(path)):
        check_finite(state)
    return state


def read_config(
    path: Path, preset: str | None = None, vocab: Path | None = None
) -> tuple[ModelConfig, dict]:
    """Return what the model in a file is made of, and its `run`, without its weights.

    The arguments, and the errors, are those of open_model.
    """
    if not is_ours(path):
        return released.read_config(path, preset, vocab)
    checkpoint = load_checkpoint(path, "ldm", mmap=True)
    with naming(str(path)), trying("its parts do not fit together"):
        return ModelConfig.from_checkpoint(checkpoint), checkpoint["args"]


def open_stage_one(
    path: Path | str, channels: int | None = None
) -> tuple[Autoencoder | Pixels, bool]:
    """Open the frozen autoencoder in any file -> autoencoder, whether its z_std is known.

    path: a checkpoint of either stage, or a released file; "none" is diffusion in pixels. Only
    the file of a whole model knows the z_std of its latents; else it is 1, to be measured.
    channels: those that the images must have; default: the file's, or 3 in pixels.
    Raises BadInput that names the file and what is wrong with it.
    """
    if str(path) == "none":
        return Pixels(channels or 3), False
    path = Path(path)
    exists = path.exists() or previous_path(path).exists()
    require(exists, f"{path}: no such file; train stage one first (train_ae.py)")

    ae, knows_z_std = open_our_stage_one(path) if is_ours(path) else released.load_stage_one(path)
    with naming(str(path)):
        check_finite(ae.state_dict())
    require(
        channels in (None, ae.cfg.c_x),
        f"{path}: its images have {ae.cfg.c_x} channel(s), not {channels}",
    )
    return ae.eval().requires_grad_(False), knows_z_std


def open_our_stage_one(path: Path) -> tuple[Autoencoder | Pixels, bool]:
    """Open the autoencoder in a checkpoint of ours, as open_stage_one does."""
    checkpoint = load_checkpoint(path)
    with trying(f"{path}: its parts do not fit together"):
        with torch.device("meta"):
            ae = build_autoencoder(AEConfig(**checkpoint["config"]["autoencoder"]))
        ae.load_state_dict(autoencoder_state(checkpoint), assign=True)
    return ae.float(), "ae" in checkpoint


def is_ours(path: Path) -> bool:
    """Return whether a file is a checkpoint of ours; no code in it runs.

    torch.save writes a .zip whose pickle holds the names and plain values, "kind" first. A file
    that cannot be read is ours if the checkpoint before it lies beside it.
    """
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        with archive.open(pickled) as file:
            if b"tinyldm " in file.read(1000):
                return True
    return previous_path(path).exists()
