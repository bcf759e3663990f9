"""Say what a file is that was given for a checkpoint but is none: a table.

People give git-lfs pointers, web pages, LoRAs, autoencoders alone and many other things. Each
row of KINDS says how such a file is recognised, by its content and never by its name, what it
is, and what to do. A new kind is a new row; tests/test_recognise.py makes a file for each.

Only files that could not be opened are looked at, so a good checkpoint pays nothing.
"""
import pickletools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    place: where `pattern` is searched:
        "start"   the first 600 bytes of the file, as Latin-1
        "zip"     the names in a .zip, one per line
        "folder"  the names in a folder, one per line
        "keys"    the tensors of a state dict, one line "name dtype" each
    """

    place: str
    pattern: str
    what: str
    advice: str

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


AGAIN = "download or copy it again"
CHECKPOINT = "give a .safetensors or a checkpoint of torch"
WHOLE_MODEL = "give the checkpoint of a whole model, in the layout of the official code"
STAGE_ONE = "it is for train_ldm.py --ae; elsewhere give the checkpoint of a whole model"

# The first row that fits is taken, so what is special stands before what is general.
KINDS = [
    # ---- folders
    Kind("folder", r"^model_index\.json$|^unet$", "a folder of diffusers", WHOLE_MODEL),
    Kind("folder", r"", "a folder", "give the checkpoint in it"),

    # ---- files by their first bytes
    Kind("start", r"\A\Z", "an empty file", AGAIN),
    Kind("start", r"\Aversion https://git-lfs", "a pointer of git-lfs, not the file itself",
         "fetch the file with `git lfs pull`"),
    Kind("start", r"(?i)\A\s*<(!doctype|html|head|\?xml)",
         "a web page, which a failed download leaves",
         "download the file itself; that may need a login"),
    Kind("start", r"\AGGUF", "a GGUF, whose weights are in another format",
         "give the .safetensors that it was made from"),
    Kind("start", r"\A\x89HDF", "an HDF5 file of Keras", CHECKPOINT),
    Kind("start", r"\A\x08[\x01-\x20]\x12[\x01-\x40][ -~]", "an ONNX program, not weights",
         "give the checkpoint that it was exported from"),
    Kind("start", r"\A\x93NUMPY", "an array of numpy", CHECKPOINT),
    Kind("start", r"(?s)\A.{257}ustar|\A\x1f\x8b|\A\xfd7zXZ|\A7z\xbc\xaf|\ARar!",
         "an archive", "unpack it, and give the checkpoint in it"),
    Kind("start", r"\A(\x89PNG|\xff\xd8\xff)", "an image", CHECKPOINT),
    Kind("start", r"(?s)\A.{1,15}\Z", "truncated: only a few bytes", AGAIN),
    Kind("start", r"\APK\x03\x04", "truncated: it begins like a checkpoint, its end is missing",
         AGAIN),
    Kind("start", r"\A\x80\x02\x8a\nl\xfc\x9cF\xf9", "truncated or damaged", AGAIN),
    Kind("start", r"(?s)\A.{8}\{", "a .safetensors, which holds weights alone",
         "give a checkpoint of train_ae.py or train_ldm.py"),
    Kind("start", r"\A[\t\n\r -~\x80-\xff]*\Z", "a text file, not a checkpoint", WHOLE_MODEL),

    # ---- .zip files, which torch's checkpoints are, too
    Kind("zip", r"constants\.pkl$", "TorchScript, which is a program, not weights",
         "give a state dict"),
    Kind("zip", r"(?i)\.(ckpt|safetensors|pth?|bin)$", "a .zip with a checkpoint in it",
         "unpack it"),
    Kind("zip", r"/data\.pkl$", "damaged: a checkpoint that cannot be read", AGAIN),
    Kind("zip", r"", "a .zip that holds no checkpoint", CHECKPOINT),

    # ---- state dicts
    Kind("keys", r"lora_|\.lora\.|\.hada_w|\.lokr_w|\.alpha ",
         "a LoRA, which only changes the weights of a model",
         "one of train_ldm.py is for --lora; merge another one into its model first"),
    Kind("keys", r"^(control_model|controlnet)", "a ControlNet, which needs a model beside it",
         WHOLE_MODEL),
    Kind("keys", r"^(emb_params|<[^>]+>|clip_[lg]) ", "a textual inversion: new words for a model",
         WHOLE_MODEL),
    Kind("keys", r"^(encoder|decoder)\.(down|up|mid)_blocks?\.",
         "an autoencoder alone, in the layout of diffusers", STAGE_ONE),
    Kind("keys", r"^(encoder|decoder)\.conv_in\.", "an autoencoder alone", STAGE_ONE),
    Kind("keys", r"^(down_blocks|mid_block|up_blocks)\.",
         "a U-Net alone, in the layout of diffusers", WHOLE_MODEL),
    Kind("keys", r"^input_blocks\.0\.", "a U-Net alone", WHOLE_MODEL),
    Kind("keys", r"^text_model\.|^transformer\.text_model\.", "a text encoder alone", WHOLE_MODEL),
    Kind("keys", r"^conditioner\.embedders\.", "Stable Diffusion XL, another model",
         "give Stable Diffusion 1"),
    Kind("keys", r"^cond_stage_model\.model\.", "Stable Diffusion 2, another model",
         "give Stable Diffusion 1"),
    Kind("keys", r"joint_blocks\.|double_blocks\.|^transformer_blocks\.",
         "a diffusion transformer, another model", "give a model with a U-Net"),
]


def recognise(place: str, text: str) -> Kind | None:
    """Return the first kind whose pattern is found in the text of a place."""
    for kind in KINDS:
        if kind.place == place and re.search(kind.pattern, text, re.MULTILINE):
            return kind
    return None


def recognise_file(path: Path) -> Kind | None:
    """Return what a file or folder is that cannot be read as a checkpoint; None: unknown."""
    if path.is_dir():
        return recognise("folder", "\n".join(entry.name for entry in path.iterdir()))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return recognise("zip", "\n".join(archive.namelist()))
    with open(path, "rb") as file:
        return recognise("start", file.read(600).decode("latin-1"))


def recognise_state(state: dict[str, Tensor]) -> Kind | None:
    """Return what a state dict is, if it is none of a whole model."""
    lines = [f"{key} {getattr(x, 'dtype', '')}" for key, x in state.items()]
    return recognise("keys", "\n".join(lines))


# ---- code in pickles

LONGEST_PICKLE = 1_000_000
# Names that are not worth reporting; torch itself decides what is loaded.
HARMLESS = ("__torch__.", "_codecs.", "collections.", "numpy.", "torch.")


def names_in_pickle(path: Path) -> list[str]:
    """Return what a pickle asks for that no checkpoint needs; nothing in the file is run.

    The list is empty for a file that is no pickle, and for a truncated one.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return names_in_bytes(file.read(LONGEST_PICKLE))
    with zipfile.ZipFile(path) as archive:
        pickled = [name for name in archive.namelist() if name.endswith("data.pkl")]
        if not pickled:
            return []
        with archive.open(pickled[0]) as file:
            return names_in_bytes(file.read(LONGEST_PICKLE))


def names_in_bytes(pickled: bytes) -> list[str]:
    """Return what a pickle asks for, as names_in_pickle does."""
    names = []
    strings = []
    try:
        for operation, argument, _ in pickletools.genops(pickled):
            if operation.name == "GLOBAL":
                names.append(argument.replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except Exception:                       # it can be anything, as any file is tried
        return []
    return [name for name in names if not name.startswith(HARMLESS)]
