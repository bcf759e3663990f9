"""What the bundled toy model can do without training: measured, and printed with -s (slow)."""
import pytest
import torch

from tinyldm.data.scorer import find
from tinyldm.data.shapes import Shapes
from tinyldm.engine.open import BUNDLED, open_model

pytestmark = pytest.mark.slow

N = 64
STEPS = 50


@pytest.fixture(scope="module")
def model():
    return open_model(BUNDLED["toy"])


@pytest.fixture(scope="module")
def scenes():
    """Held-out scenes of the built-in world."""
    data = Shapes(400, split="held-out")
    return [data[i] for i in range(400)]


def seeds(n):
    return [(0, i) for i in range(n)]


# ---- from an image

def largest_move(x, item):
    """How far an object of the item's image is from the nearest one in x, at most, in pixels.

    Infinite where their numbers differ.
    """
    wanted = find(item["image"])
    found = find(x)
    if len(wanted) != len(found):
        return float("inf")

    moves = []
    for thing in wanted:
        distances = [((thing.x - o.x) ** 2 + (thing.y - o.y) ** 2) ** 0.5 for o in found]
        moves.append(min(distances))
    return max(moves)


def test_sampling_from_an_image_keeps_the_layout_at_03_and_follows_the_prompt_at_09(model, scenes):
    """Images of held-out scenes, each sampled anew with the caption of another one."""
    # Nine words or more: two objects, and the size of each.
    in_full = [item for item in scenes if len(item["caption"].split()) > 8]
    begin = in_full[:N]
    conditions = []
    for item, other in zip(begin, in_full[N:2 * N]):
        conditions.append({"caption": other["caption"], "init": item["image"]})

    kept = {}
    followed = {}
    for strength in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        images = model.sample(conditions, seeds=seeds(N), steps=STEPS, strength=strength)
        stayed = [largest_move(x, item) < 3 for x, item in zip(images, begin)]
        kept[strength] = sum(stayed) / N
        followed[strength] = model.task.score(images, conditions)["prompts_followed"]
        print(
            f"strength {strength}: objects within 3 px {kept[strength]:.0%}, "
            f"new prompt followed {followed[strength]:.0%}"
        )
    assert kept[0.3] > 0.9
    assert followed[0.9] > 0.9


# ---- a part of an image

def mask_over_second_object(item):
    """A mask (1, 32, 32) of the second object's box, and two pixels around it."""
    x0, y0, x1, y1 = (item["boxes"][1, 1:] * 32).tolist()
    mask = torch.zeros(1, 32, 32)
    rows = slice(max(0, round(y0) - 2), round(y1) + 2)
    columns = slice(max(0, round(x0) - 2), round(x1) + 2)
    mask[:, rows, columns] = 1
    return mask


def hidden_class(item):
    """The class of the object under the mask, which is found if all else is light."""
    mask = item["mask"]
    light = item["image"].amax()
    return find(item["image"] * mask + light * (1 - mask))[0].class_name


def test_a_text_model_paints_the_hidden_object_that_the_prompt_asks_for(model, scenes):
    """Masked DDIM: a box over one of two objects, and the whole caption as prompt."""
    items = [item for item in scenes[:200] if len(item["boxes"]) == 2][:N]
    for item in items:
        item["mask"] = mask_over_second_object(item)

    images = model.sample(items, seeds=seeds(len(items)), steps=STEPS)
    followed = model.task.score(images, items)["prompts_followed"]
    painted = []
    for x, item in zip(images, items):
        painted.append(hidden_class(item) in [thing.class_name for thing in find(x)])
    share = sum(painted) / N
    print(f"prompts followed {followed:.0%}, the hidden object's class is there {share:.0%}")
    assert share > 0.8
