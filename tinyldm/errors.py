"""Bad input: what a user gave is wrong. It ends in one clear line, never in a traceback."""
import contextlib
from collections.abc import Iterator


class BadInput(ValueError):
    """Something that the user gave is wrong.

    The message is one line that names the file or value and says what to do. The programs
    print it and end with exit code 2 (engine/command.py).
    """


class NotFinite(BadInput):
    """A network gave values that are not numbers: NaN or infinite ones."""


def require(ok: object, message: str) -> None:
    """Raise BadInput(message) unless ok."""
    if not ok:
        raise BadInput(message)


@contextlib.contextmanager
def trying(what: str) -> Iterator[None]:
    """Turn any error inside the block into BadInput("what: why"), one line.

    Files of strangers can make a library raise anything. BadInput itself passes through.
    """
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        reason = str(getattr(error, "strerror", None) or error)
        reason = " ".join(reason.split())[:300]
        raise BadInput(f"{what}: {reason or type(error).__name__}") from error


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Put the name of a flag before the message of any BadInput raised inside the block.

    The library knows files and values, only the scripts know their flags:
    `with naming("--ae"): open_stage_one(path)`.
    """
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{source}: {error}") from error
