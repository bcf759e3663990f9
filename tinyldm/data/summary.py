"""Say in a line or two what a data set has, and what was left out of it."""
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tinyldm.data.rows import IMAGE_SUFFIXES, box_names, label_names

MOST_NAMED = 20         # names that a line lists


def summarise(
    path: str, rows: Sequence[dict], n_held_out: int, left_out: Counter[str], small: Path
) -> list[str]:
    """Return the lines: the numbers of images, classes, captions, ..., and what is left out.

    path: of the set; small: where its small images are, if it has some.
    """
    held_out = f"{n_held_out:,}" if n_held_out else "none"
    parts = [f"{counted(len(rows), 'image')}, {held_out} of them held out"]
    n_labels = number_with(rows, "label")
    if n_labels:
        parts.append(f"{n_labels:,} with a class, {listed(label_names(rows))}")

    several = any(isinstance(row.get("text"), list) for row in rows)
    with_several = " (some images have several)" if several else ""
    parts.append(f"{counted(number_with(rows, 'text'), 'caption')}{with_several}")

    n_maps = number_with(rows, "mask")
    if n_maps:
        parts.append(counted(n_maps, "label map"))
    n_small = number_with(rows, "small")
    if n_small:
        parts.append(f"{counted(n_small, 'small image')} of {small}")
    n_boxed = number_with(rows, "boxes")
    if n_boxed:
        parts.append(f"{n_boxed:,} with boxes, {listed(box_names(rows))}")

    lines = [f"{path}: " + " | ".join(parts)]
    if left_out:
        lines.append(f"{path}: left out: {counts_text(left_out)}")
    return lines


def found_nothing(path: str, left_out: Counter[str]) -> str:
    """Return the message for a set without images."""
    there_is = f" (but {counts_text(left_out)})" if left_out else ""
    kinds = ", ".join(IMAGE_SUFFIXES)
    return f"{path}: no images in it{there_is}; images are {kinds}, or in plain .tar files"


def number_with(rows: Sequence[dict], column: str) -> int:
    """Return how many rows have a column."""
    return sum(column in row for row in rows)


def counts_text(counts: Counter[str]) -> str:
    """Return counts as text, such as "31 .heic, 12 .json", the largest first."""
    return ", ".join(f"{n:,} {what}" for what, n in counts.most_common(MOST_NAMED))


def listed(names: Sequence[str]) -> str:
    """Return the number of classes and the first names."""
    first = ", ".join(names[:MOST_NAMED])
    more = ", ..." if len(names) > MOST_NAMED else ""
    return f"{counted(len(names), 'class', 'es')}: {first}{more}"


def counted(n: int, noun: str, plural: str = "s") -> str:
    """Return a number and a noun, such as "1 image", "2,000 images" or "no images"."""
    if n == 0:
        return f"no {noun}{plural}"
    return f"1 {noun}" if n == 1 else f"{n:,} {noun}{plural}"
