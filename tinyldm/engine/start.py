"""Start training from a model that is there: `train_ldm.py --init FILE`.

The file, ours or a released one, says what the model is. The data, the optimiser and the step
are new. What may differ from the file, and how, is decided here.
"""
import dataclasses
from pathlib import Path

from tinyldm.conditioning import TextConfig
from tinyldm.data.dataset import ImageDataset
from tinyldm.data.images import size_text
from tinyldm.data.renumber import Renumbered
from tinyldm.data.summary import listed
from tinyldm.diffusion import DiffusionConfig
from tinyldm.engine import presets
from tinyldm.engine.flags import destination, option_fields
from tinyldm.engine.open import read_config
from tinyldm.engine.ranges import flag_of
from tinyldm.errors import require
from tinyldm.model import LatentDiffusion, ModelConfig

# ---- flags


def row_of_file(path: Path, preset: str | None, vocab: Path | None) -> dict:
    """Return the defaults of all flags for a training that starts from the model in a file.

    The optimiser's are those that the model was trained with: of its own run or, for a released
    model, of its preset; but without a warmup and without Muon. Why: the first is for random
    weights, and as long as many a fine-tuning; and the toy's rate of Muon would undo what a trained
    model knows. preset and vocab are as in open_model. Raises BadInput.
    """
    config, run = read_config(path, preset, vocab)
    name = run.get("preset")
    require(name in presets.LDM, f"{path}: its preset {name!r:.99} is not known")
    require(preset in (None, name), f"{path}: its preset is {name}, not {preset}")
    columns = presets.LDM[name]
    row = {column: run.get(column, value) for column, value in columns.items()}
    for column in ("loss", "loss_of", "draw_t"):    # no column of most rows
        if column in run:
            row[column] = run[column]
    for column in ("ae", "out", "hold_out"):        # they are about the other run's files
        row.pop(column, None)
    row |= fixed_values(config) | {"size": config.size, "p_drop": config.p_drop}
    return row | {"preset": name, "z_std": None, "warmup": 0, "muon": 0.0}


def fixed_values(config: ModelConfig) -> dict:
    """Return, by flag, what a model is made of and no training can change."""
    values = {"task": config.task, "backbone": config.backbone}
    n_classes = config.tau.get("n_classes", config.tau.get("c_in"))
    if n_classes is not None:
        values["n_classes"] = n_classes

    shapes = [
        (type(config.unet), dataclasses.asdict(config.unet)),
        (DiffusionConfig, dataclasses.asdict(config.diffusion)),
        (TextConfig, config.tau),
    ]
    for kind, shape in shapes:
        for field in option_fields(kind):
            if field.name in shape:
                values[destination(field)] = shape[field.name]
    return values


def check_flags(values: dict, config: ModelConfig, path: Path) -> None:
    """Raise BadInput, with both values, for a flag that contradicts the model in a file.

    values: all flags, by name.
    """
    for name, fixed in fixed_values(config).items():
        given = values[name]
        given = tuple(given) if isinstance(given, list) else given
        flag = flag_of(name)
        require(
            given == fixed,
            f"{flag} {given}: the model in {path} has {fixed}, which cannot change; leave it out",
        )


# ---- the model and the data set

def adapt(
    model: LatentDiffusion, size: tuple[int, int], p_drop: float, data: ImageDataset
) -> list[str]:
    """Make a model ready to train on a data set -> lines that say what it has learned otherwise.

    size: (H, W) of the images. NB: the same levels attend as before, whatever the size is, as
    no layer can come or go.
    p_drop: share of conditions to drop.
    Classes of the data set that the model does not have are added to it, and the null class if
    it is to be learned now.
    """
    lines = []
    config = model.config
    if size != config.size:
        lines.append(
            f"images of {size_text(size)}, after {size_text(config.size)}; the same levels of the "
            "U-Net attend"
        )

    new = new_names(model, data)
    if class_field(model) is not None:
        found = model.task.names_in(data)
        known = [name for name in found if name not in new]
        lines.append(f"known to the model: {listed(known)}")
    if new:
        lines.append(f"new to the model: {listed(new)}")
    learns_null = p_drop > 0 and not model.can_be_guided
    if new or learns_null:
        model.task.add_classes(new, model.tau, model.can_be_guided)

    model.config = dataclasses.replace(
        config,
        size=size,
        p_drop=p_drop,
        tau=model.task.tau,
        class_names=model.task.class_names,
    )
    return lines


def class_field(model: LatentDiffusion) -> str | None:
    """Return the field of the condition that speaks of classes by number, if there is one."""
    return next((field for field in ("label", "boxes") if field in model.task.fields), None)


def new_names(model: LatentDiffusion, data: ImageDataset) -> list[str]:
    """Return the names of the data set's classes that the model does not have."""
    if class_field(model) is None:
        return []
    found = model.task.names_in(data)
    known = set(model.task.known_names(found, model.can_be_guided))
    return [name for name in found if name not in known]


def with_numbers_of(model: LatentDiffusion, data: ImageDataset) -> ImageDataset:
    """Return a data set with the classes numbered as the adapted model numbers them."""
    field = class_field(model)
    found = model.task.names_in(data)
    names = model.task.known_names(found, model.can_be_guided)
    if field is None or tuple(found) == tuple(names):
        return data
    if field == "label":
        return Renumbered(data, label_names=names, box_names=data.box_names)
    return Renumbered(data, label_names=data.label_names, box_names=names)
