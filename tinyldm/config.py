"""Hyperparameters, each declared once: in the dataclass that it shapes, with its help text.

engine/flags.py makes a command-line flag of every such field.
"""
import dataclasses
from collections.abc import Collection
from typing import Any


def option(
    default: Any, help: str, *, flag: str | None = None, choices: Collection[str] | None = None
) -> Any:
    """A dataclass field that is also a command-line flag.

    help is one plain sentence. The flag is named after the field (`ch_mult` -> `--ch-mult`)
    unless `flag` names it. choices are the values allowed, if they are few.
    """
    metadata = {"help": help, "flag": flag, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)
