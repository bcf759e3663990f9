"""The command line's frame: what went wrong becomes one line and an exit code.

0: done. 2: bad input, one line on stderr. 130: interrupted.
"""
import argparse
import gc
import sys
import warnings
from collections.abc import Callable

import torch
from torch import distributed as dist
from tqdm import tqdm

from tinyldm.errors import BadInput


def run(
    main: Callable[[argparse.Namespace], None], parse_args: Callable[[], argparse.Namespace]
) -> None:
    """Run main(parse_args()) as a program: an expected error is one line and exit code 2."""
    warnings.showwarning = shown_once()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Names of strangers' files may have letters that a terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
    try:
        main(parse_args())
        return
    except BadInput as error:
        message = str(error)
    except OSError as error:
        name = error.filename or "output"
        message = f"{name}: cannot be written: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["out of memory."])[0][:200]
        message = f"{reason} Try a smaller --batch or --micro-batch, or --ckpt-grad"
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        leave_process_group()

    # Here main's frame is gone, and with it its progress bar.
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of a GPU or of the machine is full.

    NB: torch has a class of errors for the first only.
    """
    is_named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_named or "can't allocate memory" in str(error)


def shown_once() -> Callable[..., None]:
    """Return what prints each warning as one line, above any progress bar, but none twice.

    Why: in training, each batch of captions may warn of the same unknown words.
    """
    shown = set()

    def show(message: Warning | str, *_: object) -> None:
        text = str(message)
        if text not in shown:
            shown.add(text)
            tqdm.write(f"warning: {text}", file=sys.stderr)

    return show


def leave_process_group() -> None:
    """End what torchrun's processes share.

    Why collect first: DDP objects hold threads, which must end before Python does.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
