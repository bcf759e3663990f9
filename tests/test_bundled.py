"""What the bundled toy model can do without training: measured, printed with -s (slow marker)."""
import pytest
import torch

import sample
from tinyldm.generate import defaults, draw, load_model
from tinyldm.score import find, name, score
from tinyldm.shapes import Shapes

pytestmark = pytest.mark.slow
N = 64


@pytest.fixture(scope="module")
def model():
    return load_model(sample.BUNDLED, True, torch.device("cpu"))


def moved(x, item, side):
    """How far the farthest object of the item's picture is from its nearest one in x, in pixels;
    infinity where their numbers differ."""
    there, here = find(item["image"]), find(x)
    if len(there) != len(here):
        return float("inf")
    return max(min(((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** .5 for b in here) for a in there)


def test_img2img_keeps_the_layout_at_03_and_follows_another_prompt_at_09(model):
    """Pictures of held-out scenes, each redrawn under the caption of another one."""
    items = [i for i in map(Shapes(400, split="held-out").__getitem__, range(400))
             if len(i["caption"].split()) > 8][:2 * N]
    asked = [{"caption": b["caption"], "init": a["image"]} for a, b in zip(items[:N], items[N:])]
    kept, followed = {}, {}
    for strength in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        x = draw(model, asked, defaults(steps=50, size=(32, 32), init=True, strength=strength))
        kept[strength] = sum(moved(v, i, 32) < 3 for v, i in zip(x, items)) / N
        followed[strength] = score("text", x, asked)["prompts_followed"]
        print(f"strength {strength}: objects within 3 px {kept[strength]:.0%}, "
              f"new prompt followed {followed[strength]:.0%}")
    assert kept[0.3] > 0.9 and followed[0.9] > 0.9


def test_a_text_model_paints_the_hidden_object_that_the_prompt_asks_for(model):
    """Masked DDIM: a box over one of two objects, and the whole caption as prompt."""
    items = []
    for i in map(Shapes(400, split="held-out").__getitem__, range(200)):
        if len(i["boxes"]) == 2 and len(items) < N:
            x0, y0, x1, y1 = (i["boxes"][1, 1:] * 32).tolist()
            i["mask"] = torch.zeros(1, 32, 32)
            rows, columns = (slice(max(0, round(a) - 2), round(b) + 2)
                             for a, b in ((y0, y1), (x0, x1)))
            i["mask"][:, rows, columns] = 1
            items.append(i)
    x = draw(model, items, defaults(steps=50, size=(32, 32)))
    told = score("text", x, items)["prompts_followed"]
    held = sum(any(name(t) == name(find(i["image"] * i["mask"] + i["image"].amax() * (1 - i["mask"])
                                        )[0]) for t in find(v)) for v, i in zip(x, items)) / N
    print(f"prompts followed {told:.0%}, the hidden object's class is there {held:.0%}")
    assert held > 0.8
