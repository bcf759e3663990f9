"""The curves of a training run: every value of its log.jsonl over the steps.

matplotlib is optional; without it no curves are drawn.
"""
import json
from pathlib import Path

COLUMNS = 4

# Values of the log that say how fast a run is, not how good its model.
NOT_SHOWN = ("step", "ms", "gb", "eta_min")

# Values that may fall by several orders of magnitude.
ON_LOG_SCALE = ("loss", "gnorm", "rec", "held_out_loss")

Curve = list[tuple[int, float]]         # (step, value)


def save_curves(log: Path, path: Path) -> None:
    """Plot the values of a log.jsonl into one image, if matplotlib is installed.

    Values whose names differ only after "_at_", such as held_out_loss_at_0 and
    held_out_loss_at_250, share a plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return

    plots = read_curves(log)
    rows = -(-len(plots) // COLUMNS)
    figure = Figure((14, 2.4 * rows), layout="constrained")
    for i, (name, curves) in enumerate(plots.items(), 1):
        axes = figure.add_subplot(rows, COLUMNS, i)
        axes.set(title=name, xlabel="step")
        axes.set_yscale("log" if name in ON_LOG_SCALE else "linear")
        for timestep, curve in curves.items():
            steps, values = zip(*curve)
            style = "." if len(curve) == 1 else "-"
            label = f"t from {timestep}" if timestep else ""
            axes.plot(steps, values, style, label=label)
        if len(curves) > 1:
            axes.legend()
    figure.savefig(path)


def read_curves(log: Path) -> dict[str, dict[str, Curve]]:
    """Return the curves of a log.jsonl: by plot, then by what follows "_at_"."""
    plots: dict[str, dict[str, Curve]] = {}
    for line in log.read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            name, _, timestep = key.partition("_at_")
            if name not in NOT_SHOWN:
                curves = plots.setdefault(name, {})
                curves.setdefault(timestep, []).append((row["step"], value))
    return plots
