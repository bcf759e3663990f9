"""personalise.py: the 8 images, the prompts, and the score of what a model has learned."""
import numpy as np
from personalise import (
    COLOURS_AND_NEW,
    N_ASKED,
    NEW,
    SIDE,
    asked_scenes,
    few_scenes,
    new_score,
    old_score,
    write_few,
)

from tinyldm.data import world
from tinyldm.data.open import open_dataset
from tinyldm.data.shapes import Shapes, place, render


def rendered(scenes, colours=COLOURS_AND_NEW):
    """An image of each scene, with its objects at random places."""
    images = []
    for k, scene in enumerate(scenes):
        rng = np.random.default_rng(k)
        images.append(render(place(scene, rng), SIDE, rng, colours))
    return images


def test_the_score_is_right_on_true_images_and_wrong_on_others():
    scenes = asked_scenes()
    assert new_score(rendered(scenes), scenes) == {"shown": 1, "followed": 1}

    others = scenes[1:] + scenes[:1]
    wrong = new_score(rendered(others), scenes)
    assert wrong["shown"] < 0.4 and wrong["followed"] < 0.05


def test_the_nearest_colours_of_the_world_are_not_the_new_one():
    scenes = asked_scenes()
    for old in ("red", "purple"):
        colours = COLOURS_AND_NEW | {NEW: world.COLOURS[old]}
        assert new_score(rendered(scenes, colours), scenes) == {"shown": 0, "followed": 0}


def test_what_is_asked_for_is_not_in_the_8_images():
    asked = [scene.caption() for scene in asked_scenes()]
    few = [scene.caption() for scene in few_scenes()]
    assert len(set(asked)) == N_ASKED and len(set(few)) == 8
    assert not set(asked) & set(few)
    assert all(caption.count(NEW) == 1 for caption in asked + few)


def test_the_8_images_are_a_data_set_of_which_none_is_held_out(tmp_path):
    write_few(tmp_path / "few")
    data = open_dataset(str(tmp_path / "few"), "train", size=SIDE, fields=["caption"])
    scenes = few_scenes()
    assert data.captions() == [scene.caption() for scene in scenes]
    images = [data[k]["image"] for k in range(len(data))]
    assert new_score(images, scenes) == {"shown": 1, "followed": 1}


def test_the_old_score_is_that_of_the_world():
    data = Shapes(20, SIDE, split="held-out")
    items = [data[i] for i in range(20)]
    images = [item["image"] for item in items]
    captions = [item["caption"] for item in items]
    assert old_score(images, captions) == 1
    assert old_score(images, captions[1:] + captions[:1]) < 0.2
