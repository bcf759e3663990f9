"""Let readers read odd inputs within limits: of time, of memory, of what may be run or written.

    python tests/fuzz_child.py zips 1 60 --folder /tmp/x      # reader, seed, seconds
    python tests/fuzz_child.py zips 1 60 --folder /tmp/x --only 7     # one input, with traceback

It is a process of its own, because limits and an audit hook cannot be taken back. An input is a
function of (reader, seed, number). The last line that it prints is JSON: by reader, how many
inputs were read, how many refused, and what should not have happened.
"""
import argparse
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

from fuzz_files import image_files
from fuzz_models import own_checkpoint, released_model
from fuzz_readers import READERS, bundled_tokenizer
from PIL import Image

from tinyldm.errors import BadInput

MEMORY = 2 ** 30            # bytes that a reader may take on top of what it has
SECONDS = 10                # of processor time that one input may take


# ---- limits

class TooSlow(BaseException):
    """Not an Exception, so that no reader can take it for a fault of the file."""


def interrupt(*_: object) -> None:
    raise TooSlow(f"more than {SECONDS} s")


def peak_memory() -> int:
    """The most memory since the last call, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status["VmHWM"].split()[0])


def limit_memory() -> None:
    """Let this process have 4 GiB of addresses more than now; then allocation fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 4 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


FILE_EVENTS = (
    "os.mkdir", "os.remove", "os.rename", "os.symlink", "os.link", "os.chmod", "os.rmdir",
    "os.truncate",
)
RUN_EVENTS = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.", "socket.",
    "ctypes.dlopen", "pty.", "shutil.",
)


def watch(folder: Path) -> list[str]:
    """Return a list that fills with what is run, or written anywhere but in the folder."""
    seen = []
    ours = (str(folder), "/proc/self/clear_refs")

    def writes(event, args):
        if event == "open":
            path, _, flags = args
            return isinstance(path, str) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return event in FILE_EVENTS

    def hook(event, args):
        if event.startswith(RUN_EVENTS):
            seen.append(f"{event} {args}"[:200])
        elif writes(event, args) and not os.path.abspath(str(args[0])).startswith(ours):
            seen.append(f"{event} {args}"[:200])

    sys.addaudithook(hook)
    return seen


# ---- one input after another

def read_one(name: str, seed: int, number: int, path: Path, show_traceback: bool) -> str:
    """Make and read one input; return "read", "refused", or what should not have happened."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        READERS[name](random.Random(f"{name} {seed} {number}"), path)
        return "read"
    except BadInput as error:
        message = str(error)
        cause = repr(error.__cause__)[:200]
        is_clear = "\n" not in message and len(message) <= 2000 and "allocate" not in cause
        return "refused" if is_clear else f"{message[:200]!r} from {cause}"
    except BaseException as error:
        if show_traceback:
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} {str(error)[:150]!r} at {where.filename}:{where.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(
    name: str, seed: int, seconds: float, numbers: range, folder: Path, seen: list[str]
) -> dict:
    """Read inputs until the time is over; return how many were read, and all faults."""
    counts = {"read": 0, "refused": 0}
    faults = {}
    end = time.time() + seconds
    before = peak_memory()
    path = folder / "in"
    for number in numbers:
        if time.time() > end:
            break
        path.mkdir()
        (folder / "now").write_text(f"{name} {seed} {number}")      # if it ends this process
        outcome = read_one(name, seed, number, path, show_traceback=len(numbers) == 1)
        if outcome in counts:
            counts[outcome] += 1
        else:
            faults.setdefault(outcome, []).append(number)
        if seen:
            faults.setdefault("; ".join(seen), []).append(number)
            seen.clear()
        for file in path.iterdir():
            file.unlink()
        path.rmdir()

    more = peak_memory() - before
    if more > MEMORY:
        faults[f"{more / 2 ** 20:.0f} MiB"] = []
    first_three = {fault: [*found[:3], len(found)] for fault, found in faults.items()}
    return counts | {"MiB": more >> 20, "faults": first_three}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", help="readers, with commas between")
    parser.add_argument("seed", type=int)
    parser.add_argument("seconds", type=float, help="at most so many for each reader")
    parser.add_argument("most", type=int, nargs="?", default=10 ** 9, help="inputs of each reader")
    parser.add_argument("--only", type=int, help="this input alone, with its traceback")
    parser.add_argument("--folder", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    numbers = range(args.most) if args.only is None else range(args.only, args.only + 1)
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True

    # All that is made only once, before anything is watched.
    Image.init()
    for make in (image_files, own_checkpoint, released_model, bundled_tokenizer):
        make()
    seen = watch(args.folder)
    signal.signal(signal.SIGPROF, interrupt)
    limit_memory()

    results = {}
    for name in args.names.split(","):
        results[name] = fuzz(name, args.seed, args.seconds, numbers, args.folder, seen)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
