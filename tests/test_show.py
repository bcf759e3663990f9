"""show/grids.py and show/curves.py: pixel by pixel, and point by point."""
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tinyldm.data.degrade import Degraded
from tinyldm.data.images import to_image
from tinyldm.data.shapes import Shapes
from tinyldm.data.world import CLASSES, COLOURS
from tinyldm.show.curves import save_curves
from tinyldm.show.grids import (
    class_colour,
    save_grid,
    save_samples,
    show_boxes,
    show_label_map,
    show_masked,
    show_small,
)

GROUND = (220, 220, 220)
RED = (255, 0, 0)
BLUE = (0, 0, 255)


def even_images(*greys, h=48, w=32):
    """Images of one grey in [-1, 1] each."""
    return torch.tensor(greys).view(-1, 1, 1, 1).expand(-1, 3, h, w)


def pixels_of(path):
    return np.array(Image.open(path)).astype(int)


def rgb(x):
    """The pixels (h, w, 3) in 0..255 of an image (3, h, w)."""
    return np.array(to_image(x))


# ---- grids

def test_a_grid_is_filled_row_by_row_with_enlarged_images(tmp_path):
    """48 x 32 pixels are enlarged by 3, with 4 white pixels around each image."""
    path = tmp_path / "grid.png"
    save_grid(even_images(-1.0, -0.6, -0.2, 0.2, 0.6), path, 3)
    sheet = pixels_of(path)
    assert sheet.shape == (2 * (144 + 4) + 4, 3 * (96 + 4) + 4, 3)
    levels = [0, 51, 102, 153, 204, 255]        # the sixth place is empty
    for i, level in enumerate(levels):
        y = 4 + i // 3 * 148
        x = 4 + i % 3 * 100
        assert (sheet[y:y + 144, x:x + 96] == level).all()
        assert (sheet[y - 4:y, x:x + 96] == 255).all()
        assert (sheet[y:y + 144, x - 4:x] == 255).all()


@pytest.mark.parametrize("side,shown", [(32, 96), (40, 120), (96, 96), (256, 256)])
def test_images_are_enlarged_to_96_pixels_or_more(side, shown, tmp_path):
    save_grid(even_images(0.0, h=side, w=side), tmp_path / "a.png", 1)
    assert Image.open(tmp_path / "a.png").size == (shown + 8, shown + 8)


@pytest.mark.parametrize("n,columns", [(5, 2), (4, 2), (2, 3)])
def test_each_row_of_samples_lies_below_the_row_of_its_conditions(n, columns, tmp_path):
    """Conditions are darker than samples here. Empty places are white."""
    samples = even_images(*(0.1 * i for i in range(n)))
    conditions = list(even_images(*(-0.1 - 0.1 * i for i in range(n))))
    save_samples(samples, conditions, tmp_path / "a.png", columns)
    sheet = pixels_of(tmp_path / "a.png")
    rows = -(-n // columns)
    assert sheet.shape == (2 * rows * 148 + 4, columns * 100 + 4, 3)

    for i in range(rows * columns):
        for below, images in enumerate((conditions, samples)):
            y = 4 + (2 * (i // columns) + below) * 148
            x = 4 + i % columns * 100
            grey = float(images[i][0, 0, 0]) if i < n else 1.0
            assert abs(sheet[y:y + 144, x:x + 96] - (grey + 1) * 127.5).max() <= 1


@pytest.mark.parametrize("conditions", [[], [None, None]])
def test_a_condition_that_is_no_image_is_not_shown(conditions, tmp_path):
    samples = even_images(-1.0, 0.0)
    save_samples(samples, conditions, tmp_path / "a.png", 2)
    save_grid(samples, tmp_path / "b.png", 2)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# ---- conditions as images

def test_colours_are_those_that_names_begin_with():
    assert class_colour(CLASSES.index("red cross"), CLASSES) == RED
    assert class_colour(CLASSES.index("blue circle"), CLASSES) == BLUE
    for k, name in enumerate(CLASSES):
        first_of_colour = k - k % 4
        assert class_colour(k, CLASSES) == class_colour(first_of_colour, CLASSES), name
    assert len({class_colour(k, CLASSES) for k in range(28)}) == len(COLOURS)


def test_classes_without_a_colour_in_their_name_have_different_hues():
    hues = [class_colour(k, ()) for k in range(20)]
    assert len(set(hues)) == 20
    assert all(0 <= value <= 255 for hue in hues for value in hue)
    assert class_colour(1, ("person", "", "zebra")) == class_colour(1, ())


@pytest.fixture
def label_map():
    """4 x 6 pixels of label 0, but one red and one blue pixel."""
    labels = torch.zeros(4, 6, dtype=torch.int64)
    labels[1, 2] = 1 + CLASSES.index("red circle")
    labels[3, 5] = 1 + CLASSES.index("blue cross")
    return labels


def test_label_maps_have_the_colours_of_their_classes(label_map):
    expected = np.full((4, 6, 3), GROUND)
    expected[1, 2] = RED
    expected[3, 5] = BLUE
    shown = show_label_map(label_map, CLASSES, ground_is_zero=True)
    assert (rgb(shown) == expected).all()


def test_label_0_is_a_class_like_others_where_it_is_not_the_ground(label_map):
    shown = rgb(show_label_map(label_map, (), ground_is_zero=False))
    colours = {tuple(pixel) for pixel in shown.reshape(-1, 3).tolist()}
    assert len(colours) == 3
    assert GROUND not in colours


def test_boxes_are_frames_in_the_colours_of_their_classes():
    boxes = torch.tensor([[CLASSES.index("blue square"), 0.25, 0.5, 0.75, 1.0]])
    expected = np.full((9, 17, 3), GROUND)
    expected[4:9, 4:13] = BLUE
    expected[5:8, 5:12] = GROUND
    assert (rgb(show_boxes(boxes, CLASSES, 9, 17)) == expected).all()


def test_a_small_image_is_enlarged_without_smoothing():
    small = Degraded(Shapes(1, 32), "small", 0)[0]["small"]
    expected = small.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert_close(show_small(small, 32, 32), expected, atol=1e-5, rtol=0)
    assert show_small(small[:, :4], 16, 32).shape == (3, 16, 32)


def test_holes_are_black():
    item = Degraded(Shapes(1, 32), "mask", 0)[0]
    shown = show_masked(item["image"], item["mask"])
    hole = item["mask"][0] > 0
    assert (shown[:, hole] == -1).all()
    assert torch.equal(shown[:, ~hole], item["image"][:, ~hole])


# ---- curves

@pytest.fixture
def log(tmp_path):
    """A log of two steps and one evaluation."""
    lines = [
        {"step": 1, "loss": 3.0, "ms": 9.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "held_out_loss_at_0": 0.5, "held_out_loss_at_250": 0.25},
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def points(axes):
    """The points of all curves of a plot."""
    return [curve.get_xydata().tolist() for curve in axes.lines]


def test_curves_show_each_value_by_step(log, tmp_path, monkeypatch):
    """Values that differ after "_at_" share a plot; times are not shown."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    saved = []
    save = Figure.savefig

    def savefig(figure, path):
        save(figure, path)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", savefig)
    save_curves(log, tmp_path / "curves.png")

    loss, held_out = saved[0].axes
    assert loss.get_title() == "loss"
    assert held_out.get_title() == "held_out_loss"
    assert points(loss) == [[[1, 3], [2, 2]]]
    assert points(held_out) == [[[2, 0.5]], [[2, 0.25]]]
    labels = [text.get_text() for text in held_out.get_legend().texts]
    assert labels == ["t from 0", "t from 250"]
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_without_matplotlib_no_curves_are_drawn(log, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    save_curves(log, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
