"""data/prior.py: a few images, and a prior set of which an epoch has the given share."""
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import ONE_LEVEL, TINY_LDM
from PIL import Image

from tinyldm.data.dataset import ListDataset, content_bytes
from tinyldm.data.folder import Folder
from tinyldm.data.loader import endless_items
from tinyldm.data.prior import WithPrior, numbers_of_repeats
from tinyldm.data.renumber import Renumbered
from tinyldm.errors import BadInput


def images(n, seed, **fields):
    """n items of one pixel each, with captions that say the set and the place in it."""
    rng = np.random.default_rng(seed)
    items = []
    for k in range(n):
        image = torch.tensor(rng.uniform(-1, 1, (3, 1, 1)))
        items.append({"image": image, "caption": f"{seed} {k}"} | fields)
    return items


def lists(n_few, n_prior, **how):
    return ListDataset(images(n_few, 1), **how), ListDataset(images(n_prior, 2), **how)


def epoch_of(data, epoch):
    """The items of an epoch, as training sees them."""
    n = int(data.repeats.sum())
    items = endless_items(len(data), epoch * n, 0, data.shards, data.repeats)
    return [data[int(i)] for i in islice(items, n)]


# ---- the share

@pytest.mark.parametrize("n_few, n_prior, weight, from_few, from_prior", [
    (8, 256, 0.5, 256, 256),
    (8, 256, 0.25, 768, 256),
    (8, 4, 0.75, 8, 24),
    (100, 150, 0.5, 150, 150),
    (5, 256, 0.5, 256, 256),
    (1, 1, 0.99, 1, 99),
])
def test_an_epoch_has_every_image_and_the_given_share(
    n_few, n_prior, weight, from_few, from_prior
):
    """Images of one set come equally often, to one time."""
    repeats = numbers_of_repeats(n_few, n_prior, weight)
    few, prior = repeats[:n_few], repeats[n_few:]
    assert (few.sum(), prior.sum()) == (from_few, from_prior)
    assert len(prior) == n_prior
    for times in (few, prior):
        assert times.min() >= 1
        assert times.max() - times.min() <= 1


@pytest.mark.parametrize("n_few, n_prior", [(2, 6), (5, 3)])
def test_items_are_those_of_the_two_sets_and_no_image_is_distinct_twice(n_few, n_prior):
    data = WithPrior(*lists(n_few, n_prior), weight=0.5)
    assert len(data) == data.n_distinct == n_few + n_prior
    names = [f"1 {k}" for k in range(n_few)] + [f"2 {k}" for k in range(n_prior)]
    assert data.captions() == names
    assert [data[i]["caption"] for i in range(len(data))] == names

    for epoch in range(3):
        seen = Counter(item["caption"][0] for item in epoch_of(data, epoch))
        assert seen["1"] == seen["2"] == max(n_few, n_prior)


def test_mirrored_sets_have_their_second_epoch_mirrored():
    """Items repeat after as many as n_distinct says, as the latent cache needs."""
    few, prior = lists(2, 3, flip=True)
    for item in few.items + prior.items:
        item["image"] = item["image"] + torch.arange(2)
    data = WithPrior(few, prior)
    assert data.n_distinct == 10
    for i in range(5):
        mirrored = data[5 + i]["image"]
        assert torch.equal(mirrored, data[i]["image"].flip(-1))
        assert torch.equal(data[10 + i]["image"], data[i]["image"])


def test_an_order_without_repeats_is_the_same_as_before():
    once = list(islice(endless_items(7, 3, 0, None, None), 30))
    assert once == list(islice(endless_items(7, 3, 0, None, [1] * 7), 30))


# ---- what is known of the items

def test_captions_by_row_are_those_of_the_items():
    """Also where images have several of which each epoch takes one."""
    few, prior = lists(2, 3)
    prior.items[1]["caption"] = ["a", "b", "c"]
    prior.has_several_captions = True
    data = WithPrior(few, prior)
    assert data.has_several_captions
    for i in range(40):
        item = data[i]
        assert item["row"] == i % 5
        assert data.caption(i, item["row"]) == item["caption"]
    assert {data[i]["caption"] for i in range(3, 200, 5)} == {"a", "b", "c"}


def test_classes_of_one_name_are_one_class():
    """Of labels and of boxes; each class that one of the sets shows is a seen one."""
    box = torch.tensor([[1.0, 0, 0, 1, 1]])
    few = ListDataset(images(2, 1, label=1, boxes=box), label_names=["b", "d"],
                      box_names=["x", "y"])
    prior = ListDataset(images(3, 2, label=0, boxes=box), label_names=["d", "a", "b"],
                        box_names=["y", "z"])
    data = WithPrior(few, prior)
    assert data.label_names == ("b", "d", "a")
    assert data.box_names == ("x", "y", "z")
    assert [data.label_names[data[k]["label"]] for k in range(5)] == ["d"] * 5
    boxes = [data.box_names[int(data[k]["boxes"][0, 0])] for k in range(5)]
    assert boxes == ["y", "y", "z", "z", "z"]
    assert data.seen_labels() == [0, 1, 2]


def test_a_changed_image_of_either_set_changes_the_fingerprint():
    """The share does not: the latents are the same."""
    prints = []
    for few_seed, prior_seed in [(1, 2), (3, 2), (1, 3)]:
        few = ListDataset(images(2, few_seed))
        prior = ListDataset(images(3, prior_seed))
        prints.append(content_bytes(WithPrior(few, prior).fingerprint()))
        assert prints[-1] == content_bytes(WithPrior(few, prior, 0.1).fingerprint())
    assert len(set(prints)) == 3


def test_a_data_set_around_it_keeps_the_share():
    data = WithPrior(*lists(2, 6))
    around = Renumbered(data, label_names=[], box_names=[])
    assert list(around.repeats) == [3, 3, 1, 1, 1, 1, 1, 1]


# ---- bad input, and the programs

def test_an_image_of_both_sets_is_named(folder):
    """The same pixels in a file of other bytes are the same image."""
    few = folder(3, "few")
    prior = folder(5, "prior")
    for path in prior.glob("*.png"):
        Image.open(path).rotate(180).save(path)
    sets = Folder(str(few), 16, "all"), Folder(str(prior), 16, "all")
    assert len(WithPrior(*sets)) == 8

    Image.open(few / "2.png").save(prior / "4.png", compress_level=0)
    with pytest.raises(BadInput, match=r"prior: 4.png is the same image as .*few: 2.png"):
        WithPrior(*sets)


@pytest.fixture
def sets(tmp_path, folder, trained, cli):
    """sets(*flags, code=0) -> what train_ldm.py says of a few images and a folder of samples."""
    few = folder(8, "few")
    cli("sample.py", "--ckpt", trained / "ldm/model.pt", "--n", 12, "--steps", 2,
        "--out", tmp_path / "prior", "a red circle")

    def run(*flags, code=0):
        return cli("train_ldm.py", *TINY_LDM, *ONE_LEVEL, "--size", 16, "--steps", 3,
                   "--ae", trained / "ae/ckpt.pt", "--data", few, "--eval-n", 0,
                   "--out", tmp_path / "run", *flags, code=code)

    return run


def test_training_mixes_a_folder_of_samples_in_and_encodes_each_image_once(sets, tmp_path):
    """The summary says how many images there are of each, and the share."""
    output = sets("--prior", tmp_path / "prior", "--prior-weight", 0.25)
    n_few = len(Folder(str(tmp_path / "few"), 16))
    n_prior = len(Folder(str(tmp_path / "prior"), 16))
    said = f"{n_few} images, and {n_prior} of the prior set mixed in: 25 % of each epoch"
    assert said in output
    [cached] = (tmp_path / "latents").rglob("*.pt")
    assert len(torch.load(cached)["mean"]) == n_few + n_prior


def test_a_run_goes_on_with_the_same_share_only(sets, tmp_path):
    """It decides the order of the images."""
    prior = ["--prior", tmp_path / "prior"]
    sets(*prior)
    sets(*prior, "--prior-weight", 0.5)
    output = sets(*prior, "--prior-weight", 0.25, code=2)
    assert "prior weight = 0.5, now it is 0.25" in output
    assert "prior weight = 0.5, now it is None" in sets(code=2)


@pytest.mark.parametrize("flags, message", [
    (["--prior-weight", 0.5], "--prior-weight: only with --prior"),
    (["--prior", "gone"], "--prior: gone: "),
    (["--prior", "{few}"], "is the same image as"),
    (["--prior", "{few}", "--prior-weight", 1], "--prior-weight 1.0: must be at least"),
])
def test_wrong_flags_are_one_line(sets, tmp_path, flags, message):
    flags = [str(flag).format(few=tmp_path / "few") for flag in flags]
    assert message in sets(*flags, code=2).strip().splitlines()[-1]
