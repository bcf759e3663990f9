"""Classes by the numbers of a model that has learned some of them before."""
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tinyldm.data.dataset import ImageDataset, Wrapped


class Renumbered(Wrapped):
    """A data set whose labels and boxes have the numbers of other lists of names.

    Why: a data set numbers its classes by its own names alone. A model that goes on
    training on it has numbers for some of these names already, and other names besides.

    label_names, box_names: they have every name of the data set, and maybe more.
    """

    def __init__(
        self, data: ImageDataset, *, label_names: Sequence[str], box_names: Sequence[str]
    ):
        super().__init__(data)
        self.label_names = tuple(label_names)
        self.box_names = tuple(box_names)
        self.label_numbers = numbers_in(data.label_names, label_names)
        self.box_numbers = numbers_in(data.box_names, box_names)

    def change(self, item: dict[str, Any], i: int) -> dict[str, Any]:
        if "label" in item:
            item["label"] = self.label_numbers[item["label"]]
        if "boxes" in item:
            item["boxes"] = self.renumbered_boxes(item["boxes"])
        return item

    def renumbered_boxes(self, boxes: Tensor) -> Tensor:
        """boxes (K, 5) [class, x0, y0, x1, y1] -> the same, with the other numbers."""
        boxes = boxes.clone()
        for row in boxes:
            row[0] = self.box_numbers[int(row[0])]
        return boxes

    def seen_labels(self) -> Sequence[int]:
        return [self.label_numbers[label] for label in self.data.seen_labels()]

    def fingerprint(self) -> list:
        return [self.data.fingerprint(), self.label_numbers, self.box_numbers]


def numbers_in(names: Sequence[str], others: Sequence[str]) -> list[int]:
    """Return the place of each name in another list that has all of them."""
    places = {name: i for i, name in enumerate(others)}
    return [places[name] for name in names]
