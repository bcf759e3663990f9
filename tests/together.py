"""Run programs one after another in the processes of one torchrun, as each start takes long.

    torchrun --nproc-per-node 2 tests/together.py jobs.json

A job is {"script": "train_ldm", "flags": [...]}, and perhaps {"nan_at": 3}: then the loss of step
3 is NaN in the last process. Process r writes jobs.json.r: for each job, what it printed, and the
message of its error or null.
"""
import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

from runs import spoiled_at, times_nan

from tinyldm.engine.command import leave_process_group
from tinyldm.engine.processes import setup
from tinyldm.errors import BadInput


def run_job(job):
    """Run one program in this process; return what it printed, and its error's message."""
    module = importlib.import_module(job["script"])
    output = io.StringIO()
    error = None
    with contextlib.redirect_stdout(output):
        try:
            module.main(module.parse_args(job["flags"]))
        except BadInput as bad_input:
            error = str(bad_input)
    return {"output": output.getvalue(), "error": error}


def main():
    path = Path(sys.argv[1])
    sys.modules["matplotlib.figure"] = None     # as if it were not installed: curves take long
    machine = setup("cpu", "fp32")
    is_last = machine.rank == machine.world - 1

    results = []
    for job in json.loads(path.read_text()):
        module = importlib.import_module(job["script"])
        if "nan_at" in job and is_last:
            original = module.ldm_loss
            module.ldm_loss = spoiled_at(job["nan_at"], original, times_nan)
            results.append(run_job(job))
            module.ldm_loss = original
        else:
            results.append(run_job(job))
    Path(f"{path}.{machine.rank}").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    leave_process_group()
