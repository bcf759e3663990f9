"""The range of every number that a user can give: one table for all programs.

A key is a flag's name, with underscores. A flag that takes several numbers has one range
for all of them, or a tuple of ranges, one for each.
"""
import math
from dataclasses import dataclass

from tinyldm.errors import require


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included unless they are open; nan is in no range."""

    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.low_open else x >= self.low
        below = x < self.high if self.high_open else x <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"above {self.low:,}" if self.low_open else f"at least {self.low:,}"
        if self.high == math.inf:
            return f"{low} and finite" if self.high_open else low
        high = f"below {self.high:,}" if self.high_open else f"at most {self.high:,}"
        return f"{low} and {high}"


COUNT = Range(1, 10 ** 9)
COUNT_OR_ZERO = Range(0, 10 ** 9)
WIDTH = Range(1, 10 ** 6)
LAYERS = Range(1, 99)               # a checkpoint of more is refused (engine/checkpoint.py)
SEED = Range(0, 10 ** 18)
SHARE = Range(0, 1)
DECAY = Range(0, 1, high_open=True)
WEIGHT = Range(0, high_open=True)
POSITIVE = Range(0, low_open=True, high_open=True)
VARIANCE = Range(0, 1, low_open=True, high_open=True)

RANGES: dict[str, Range | tuple[Range, ...]] = {
    # The images, and how they are loaded.
    "n_shapes": COUNT,
    "size": Range(16, 2 ** 16),
    "channels": Range(1, 1024),
    "workers": Range(0, 1024),
    "n_classes": COUNT,
    "prior_weight": Range(0.01, 0.99),

    # The length of a run, and what it writes.
    "steps": COUNT,
    "save_every": COUNT,
    "log_every": COUNT,
    "eval_every": COUNT,
    "eval_n": COUNT_OR_ZERO,
    "seed": SEED,

    # The optimiser.
    "batch": COUNT,
    "micro_batch": COUNT,
    "lr": POSITIVE,
    "muon": WEIGHT,
    "betas": DECAY,
    "clip": Range(0, low_open=True),
    "warmup": COUNT_OR_ZERO,
    "skip_nan": COUNT_OR_ZERO,
    "ema": DECAY,

    # The shapes of the networks.
    "ch": WIDTH,
    "ch_mult": WIDTH,
    "n_res": LAYERS,
    "attn_res": WIDTH,
    "groups": WIDTH,
    "c_z": WIDTH,
    "n_codes": COUNT,
    "disc_ch": WIDTH,
    "disc_layers": LAYERS,
    "d_head": WIDTH,
    "n_head": WIDTH,
    "d_ctx": WIDTH,
    "depth": LAYERS,
    "blocks": LAYERS,
    "patch": WIDTH,
    "vocab_size": Range(2, 10 ** 6),    # a token, and the one that stands for nothing
    "n_token": WIDTH,
    "text_depth": LAYERS,
    "text_heads": WIDTH,
    "text_d_head": WIDTH,
    "lora": WIDTH,
    "distill": COUNT,

    # The losses of stage one.
    "perceptual_weight": WEIGHT,
    "kl_weight": WEIGHT,
    "codebook_weight": WEIGHT,
    "vq_beta": WEIGHT,
    "disc_weight": WEIGHT,
    "disc_start": COUNT_OR_ZERO,
    "restart_codes": COUNT_OR_ZERO,

    # The diffusion, and its loss.
    "T": Range(1, 10 ** 5, high_open=True),     # as LAYERS
    "beta_range": VARIANCE,
    "snr_clamp": (WEIGHT, Range(0, low_open=True)),
    "p_drop": SHARE,
    "z_std": POSITIVE,

    # Sampling.
    "n": COUNT,
    "eta": SHARE,
    "scale": Range(-10 ** 6, 10 ** 6),
    "interval": WEIGHT,
    "rescale": SHARE,
    "guide_scale": WEIGHT,
    "classifier_scale": WEIGHT,
    "to_seed": SEED,
    "strength": Range(0, 1, low_open=True),
    "lora_scale": Range(-100, 100),
    "at": COUNT,

    # The benchmark.
    "runs": COUNT,
}

# Flags whose second number is not below the first.
ASCENDING = ("beta_range", "snr_clamp")


def flag_of(name: str) -> str:
    """Return the flag whose value argparse keeps under a name: --ch-mult for ch_mult."""
    return "--" + name.replace("_", "-")


def check_ranges(values: dict[str, object]) -> None:
    """Raise BadInput that names the flag and its range, if a number is out of its range.

    values: by flag; what is no number, or a tuple of numbers, is left alone.
    """
    for name, value in values.items():
        numbers = numbers_of(value)
        if not numbers:
            continue

        flag = flag_of(name)
        row = RANGES[name]
        ranges = row if isinstance(row, tuple) else [row] * len(numbers)
        for x, allowed in zip(numbers, ranges):
            require(x in allowed, f"{flag} {x}: must be {allowed}")

        is_sorted = sorted(numbers) == numbers
        given = " ".join(str(x) for x in numbers)
        require(
            name not in ASCENDING or is_sorted,
            f"{flag} {given}: the first must not be above the second",
        )


def numbers_of(value: object) -> list[float]:
    """Return the numbers of a flag's value: it alone, several, or none."""
    values = value if isinstance(value, list | tuple) else [value]
    return [x for x in values if type(x) in (int, float)]
