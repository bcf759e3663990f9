"""What many processes and a million pictures cost: the figures of "Scale" in engine/README.md.

    python tests/scale.py processes
    python tests/scale.py tars /tmp/tars            # writes 2 GB there

`processes` trains the toy's U-Net in 1, 2, 4 and 8 processes of one thread each, by gloo, and
prints the time of a step. `tars` writes a million JPEGs of 32 px into 100 tars, lists them twice,
and loads some batches in random order.
"""
import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
STEPS = 24
N_TARS = 100
PER_TAR = 10_000


def step_time(n_processes: int, folder: Path) -> float:
    """Return the median ms of a step of the toy's U-Net in so many processes."""
    flags = [
        "train_ldm.py", "--ae", "toy", "--data", "shapes", "--n-shapes", "512",
        "--steps", str(STEPS), "--log-every", "4", "--eval-n", "0", "--out", str(folder),
    ]
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n_processes),
        "--master-port", str(random.randint(20_000, 60_000)),
    ]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*torchrun, *flags], cwd=ROOT, env=one_thread, check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    times = sorted(row["ms"] for row in rows[2:])       # the first steps count the start
    return times[len(times) // 2]


def processes() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for n in (1, 2, 4, 8):
            ms = step_time(n, Path(folder) / "runs" / str(n))
            print(f"{n} process(es): {ms:.0f} ms a step of 64 images", flush=True)


def write_tars(folder: Path) -> None:
    """Write the tars that are not there yet; all pictures have the same few hundred bytes."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    Image.effect_noise((32, 32), 40).convert("RGB").save(file, "JPEG")
    picture = file.getvalue()
    for k in tqdm(range(N_TARS), desc="writing"):
        path = folder / f"{k:03}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".new"), "w") as tar:
            for i in range(PER_TAR):
                info = tarfile.TarInfo(f"{k:03}{i:05}.jpg")
                info.size = len(picture)
                tar.addfile(info, io.BytesIO(picture))
        path.with_suffix(".new").rename(path)


def tars(folder: Path) -> None:
    write_tars(folder)
    from tinyldm.data.loader import batch_order, load_batches
    from tinyldm.data.open import open_dataset

    for name in ("first", "then"):
        start = time.perf_counter()
        data = open_dataset(str(folder), "train", size=32)
        print(f"listing {len(data):,} pictures, {name}: {time.perf_counter() - start:.1f} s")

    order = batch_order(len(data), 64, 0, 60, 0, 0, 1, data.shards, data.repeats)
    batches = iter(load_batches(data, order, workers=0))
    start = time.perf_counter()
    next(batches)
    print(f"the first batch of 64: {time.perf_counter() - start:.2f} s")
    start = time.perf_counter()
    n = sum(len(batch["image"]) for batch in batches)
    print(f"then {n / (time.perf_counter() - start):.0f} pictures a second")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["processes", "tars"])
    parser.add_argument("folder", type=Path, nargs="?")
    args = parser.parse_args()
    if args.what == "processes":
        processes()
    elif args.folder is None:
        parser.error("tars: give a folder for them")
    else:
        tars(args.folder)
