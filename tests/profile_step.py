"""Where the time of a training step goes, by operator.

    python tests/profile_step.py                    # the toy's row
    python tests/profile_step.py --muon 0           # the same with AdamW

All flags of train_ldm.py can be given. It trains a few steps in a folder that is removed, and
prints the share of each operator in the processor's time; on CUDA, in the device's.
"""
import contextlib
import io
import sys
import tempfile
from pathlib import Path

from torch import profiler

ROOT = Path(__file__).parent.parent
N_SHOWN = 12
SHORT = ["--ae", "toy", "--steps", "6", "--n-shapes", "200", "--eval-n", "0"]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import train_ldm

    with tempfile.TemporaryDirectory() as folder:
        flags = [*SHORT, *sys.argv[1:], "--out", str(Path(folder) / "run")]
        train_ldm.main(train_ldm.parse_args(flags))     # the latents are cached, kernels are chosen
        again = [*flags, "--out", str(Path(folder) / "again")]
        args = train_ldm.parse_args(again)
        with profiler.profile() as profile, contextlib.redirect_stdout(io.StringIO()):
            train_ldm.main(args)

    def own_time(row) -> float:
        return row.self_cpu_time_total + row.self_device_time_total

    rows = profile.key_averages()
    total = sum(own_time(row) for row in rows)
    for row in sorted(rows, key=own_time, reverse=True)[:N_SHOWN]:
        calls = row.count / args.steps
        print(f"{own_time(row) / total:6.1%}  {calls:7.1f} calls a step  {row.key}")
    print(f"{total / args.steps / 1000:.0f} ms a step in all")


if __name__ == "__main__":
    main()
