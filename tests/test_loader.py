"""data/loader.py: every image once per epoch, in random order, and none that is held out."""
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tinyldm.data.dataset import ListDataset
from tinyldm.data.degrade import Degraded
from tinyldm.data.folder import Folder
from tinyldm.data.loader import batch_order, collate, epoch_order, load_batches
from tinyldm.data.open import open_dataset
from tinyldm.errors import BadInput

# Images in archives: 1000 images in tars of 100. Without: all of them in one folder.
IN_TARS = [f"{k // 100}.tar" for k in range(1000)]
PLACES = pytest.mark.parametrize("shards", [None, IN_TARS], ids=["folder", "tars"])


def items_of(n, batch, done, steps, seed, **how):
    """The items of all steps, one after another."""
    return [item for items in batch_order(n, batch, done, steps, seed, **how) for item in items]


# ---- every image once per epoch

@pytest.mark.parametrize("n,batch", [(10, 3), (10, 10), (3, 8), (1, 4), (7, 1)])
def test_each_epoch_has_each_image_once(n, batch):
    """No image is dropped or repeated, whether batches fit into epochs or not."""
    items = items_of(n, batch, 0, 60, seed=1)
    assert len(items) == 60 * batch
    for epoch in range(len(items) // n):
        part = items[epoch * n:(epoch + 1) * n]
        assert sorted(part) == list(range(epoch * n, (epoch + 1) * n))


@PLACES
def test_each_epoch_of_a_larger_set_has_each_image_once(shards):
    items = items_of(1000, 64, 0, 50, seed=2, shards=shards)
    for epoch in range(3):
        part = items[epoch * 1000:(epoch + 1) * 1000]
        assert sorted(part) == list(range(epoch * 1000, (epoch + 1) * 1000))


# ---- in random order

@PLACES
def test_every_epoch_has_an_order_of_its_own(shards):
    """Epochs and seeds agree on the place of an image as often as chance does: once or so."""
    orders = [np.array(items_of(1000, 100, 0, 30, seed, shards=shards)) % 1000 for seed in (0, 1)]
    epochs = [order.reshape(3, 1000)[epoch] for order in orders for epoch in range(3)]
    for a in range(6):
        for b in range(a):
            assert (epochs[a] == epochs[b]).sum() < 15


@PLACES
def test_an_epoch_is_shuffled(shards):
    """The order has nothing to do with that of the files, which are sorted, often by class."""
    order = np.array(items_of(1000, 100, 0, 10, seed=0, shards=shards))
    correlation = np.corrcoef(order, np.arange(1000))[0, 1]
    assert abs(correlation) < 0.15
    # In a random order every batch of 100 has images of each tenth of the files.
    for batch in order.reshape(10, 100):
        assert len(set(batch // 100)) == 10


def test_a_shuffled_order_is_uniform():
    """Every image is as often in the first batch as any other."""
    firsts = np.zeros(20)
    for seed in range(3000):
        batch = next(batch_order(20, 5, 0, 1, seed))
        firsts[batch] += 1
    expected = 3000 * 5 / 20
    std = np.sqrt(3000 * 0.25 * 0.75)
    assert (abs(firsts - expected) < 4.5 * std).all()


def test_the_order_of_tars_reads_them_one_after_another(monkeypatch):
    """Tars come in random order, and in it images move by the shuffle buffer at most."""
    n = 40_000
    tars = np.arange(n) // 4_000
    monkeypatch.setattr("tinyldm.data.loader.SHUFFLE_BUFFER", 100)
    orders = [epoch_order(n, np.random.default_rng(seed), tars) for seed in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(n))

        # The order in which tars come, and the order if no image moved.
        first_place = np.unique(tars[order], return_index=True)[1]
        tar_order = np.argsort(first_place)
        unmoved = np.concatenate([np.flatnonzero(tars == tar) for tar in tar_order])
        moved = np.abs(np.argsort(order) - np.argsort(unmoved))
        assert 10 < moved.mean() < moved.max() <= 200

    assert (orders[0] != orders[1]).mean() > 0.9
    assert list(tars[orders[0]]) != list(tars[orders[1]])


# ---- the same order, however it is asked for

@PLACES
def test_a_resumed_run_goes_on_with_the_order_of_an_unbroken_one(shards):
    whole = list(batch_order(1000, 48, 0, 70, 1, shards=shards))
    for done in (1, 20, 21, 41, 69):
        assert list(batch_order(1000, 48, done, 70, 1, shards=shards)) == whole[done:]
    assert not list(batch_order(1000, 48, 70, 70, 1, shards=shards))


@PLACES
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batch_that_one_would_see(shards, world):
    whole = list(batch_order(1000, 12, 2, 90, seed=1, shards=shards))
    parts = [list(batch_order(1000, 12, 2, 90, 1, rank, world, shards)) for rank in range(world)]
    assert len(whole) == 88
    for step, batch in enumerate(whole):
        joined = [item for part in parts for item in part[step]]
        assert joined == batch


# ---- batches

def numbered_items(n):
    """Items whose fields all say their number."""
    items = []
    for k in range(n):
        items.append({"image": torch.full((3, 4, 4), k / n), "caption": str(k), "label": k})
    return items


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_the_items_of_the_order_and_fields_that_belong_together(workers):
    data = ListDataset(numbered_items(23))
    order = list(batch_order(23, 4, 0, 12, seed=5))
    batches = list(load_batches(data, order, workers))
    assert len(batches) == 12
    for items, batch in zip(order, batches):
        wanted = [item % 23 for item in items]
        assert batch["label"] == wanted
        assert batch["caption"] == [str(k) for k in wanted]
        assert batch["image"][:, 0, 0, 0].tolist() == pytest.approx([k / 23 for k in wanted])


def test_a_batch_has_the_fields_that_all_of_its_items_have():
    items = numbered_items(3)
    del items[1]["label"]
    batch = collate(items)
    assert batch.keys() == {"image", "caption"}
    assert batch["image"].shape == (3, 3, 4, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_sets_error_is_one_line_also_from_a_worker(workers):
    class Broken(ListDataset):
        def load(self, k):
            raise BadInput("x.png: is broken")
    with pytest.raises(BadInput, match="^x.png: is broken$"):
        list(load_batches(Broken(numbered_items(3)), [[0, 1]], workers))


# ---- held-out images never reach training

def red_of(image):
    """The red level, 0..255, of an image of one colour."""
    return round((float(image[0].mean()) + 1) * 127.5)


@pytest.fixture
def numbered_folder(tmp_path):
    """120 images of one colour each: image k has the red level k."""
    path = tmp_path / "numbered"
    path.mkdir()
    for k in range(120):
        Image.new("RGB", (16, 16), (k, 0, 0)).save(path / f"{k:03}.png")
    return path


def stored(path, kind):
    """The folder as it is, as a .zip, or in tars of 64 images."""
    if kind == "zip":
        return shutil.make_archive(str(path), "zip", path)
    if kind == "tars":
        tars = path.with_name("tars")
        tars.mkdir()
        files = sorted(path.iterdir())
        for start in range(0, len(files), 64):
            with tarfile.open(tars / f"{start}.tar", "w") as tar:
                for file in files[start:start + 64]:
                    tar.add(file, file.name)
        return str(tars)
    return str(path)


@pytest.mark.parametrize("kind,fields", [
    ("folder", ()), ("folder", ("mask",)), ("zip", ("small",)), ("tars", ("mask",))])
def test_training_sees_every_training_image_in_each_epoch_and_no_held_out_one(
    numbered_folder, kind, fields
):
    """Counted by the colours that come out of the loader, over three epochs."""
    path = stored(numbered_folder, kind)
    train = open_dataset(path, size=16, flip=True, fields=fields)
    held_out = open_dataset(path, "held-out", size=16, fields=fields)
    held_out_reds = {red_of(held_out[i]["image"]) for i in range(len(held_out))}
    assert len(train) + len(held_out) == 120
    assert 3 <= len(held_out_reds) == len(held_out) <= 20

    # Batches of this size are epochs.
    n = len(train)
    order = batch_order(n, n, 0, 3, seed=4, shards=train.shards)
    for batch in load_batches(train, order, workers=0):
        reds = {red_of(image) for image in batch["image"]}
        assert len(reds) == n
        assert not reds & held_out_reds
        assert reds | held_out_reds == set(range(120))


def test_an_image_stays_held_out_when_others_are_added_or_removed(numbered_folder):
    """Otherwise a set that grows would train on the images that it was evaluated with."""
    def held_out_names():
        return {row["file_name"] for row in Folder(str(numbered_folder), 16, "held-out").rows}
    before = held_out_names()
    for k in range(0, 120, 3):
        (numbered_folder / f"{k:03}.png").unlink()
    Image.new("RGB", (16, 16)).save(numbered_folder / "0-first.png")
    names_left = {path.name for path in numbered_folder.iterdir()}
    assert held_out_names() - {"0-first.png"} == before & names_left


def test_degraded_items_keep_the_order_and_the_split(numbered_folder):
    """What degrade.py adds does not change which image an item is, nor how it is read."""
    train = Folder(str(numbered_folder), 16, flip=True)
    degraded = Degraded(train, "mask", seed=0)
    assert degraded.epochs_that_differ == train.epochs_that_differ == 2
    assert degraded.shards == train.shards
    for i in (0, 5, len(train) + 5):
        assert torch.equal(degraded[i]["image"], train[i]["image"])


def test_repeats_and_shards_go_together():
    """Each image comes as often as it should, and its archive with it."""
    [items] = batch_order(4, 10, 0, 1, seed=0, shards=["a", "a", "b", "b"], repeats=[1, 2, 3, 4])
    assert sorted(items) == [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
