"""data/dataset.py, images.py, open.py: any list of dicts is a data set; what one must do."""
import json
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image

from tinyldm.autoencoder import AEConfig, Autoencoder
from tinyldm.data.dataset import ImageDataset, ListDataset, spread
from tinyldm.data.degrade import Degraded
from tinyldm.data.folder import Folder
from tinyldm.data.images import NEAREST, fit_image, to_image, to_tensor
from tinyldm.data.latents import Latents, fingerprint
from tinyldm.data.loader import batch_order, load_batches
from tinyldm.data.open import open_dataset
from tinyldm.data.shapes import Shapes
from tinyldm.errors import BadInput

SIDE = 16


def tiny_items(n=10):
    """n items with every field that a list of one's own may have."""
    rng = torch.Generator().manual_seed(0)
    items = []
    for k in range(n):
        items.append({
            "image": torch.rand(3, SIDE, SIDE, generator=rng) * 2 - 1,
            "caption": f"image {k}",
            "label": k % 3,
            "boxes": torch.tensor([[1.0, 0.1, 0.2, 0.4, 0.9]]),
            "segmentation": torch.randint(5, (SIDE, SIDE), generator=rng),
        })
    return items


def tiny_autoencoder():
    torch.manual_seed(0)
    config = AEConfig(ch=8, ch_mult=(1, 2), n_res=1, c_z=2, groups=4)
    return Autoencoder(config).eval().requires_grad_(False)


def docstring_example():
    """The class that ImageDataset's docstring shows."""
    _, _, example = ImageDataset.__doc__.partition("npz file:\n")
    names = {"ImageDataset": ImageDataset, "np": np, "torch": torch}
    exec(textwrap.dedent(example), names)
    return names["Digits"]


# ---- data sets of one's own

def test_the_example_of_the_docstring_is_a_data_set(tmp_path):
    """It goes through the loader and the latent cache, with `__len__` and `load` alone."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 32, 32), np.uint8)
    labels = np.arange(20) % 10
    np.savez(tmp_path / "digits.npz", images=pixels, labels=labels)
    data = docstring_example()(tmp_path / "digits.npz")

    order = list(batch_order(len(data), 4, 0, 5, seed=1))
    for items, batch in zip(order, load_batches(data, order, workers=0)):
        assert batch["image"].shape == (4, 3, 32, 32)
        assert -1 <= batch["image"].min() and batch["image"].max() <= 1
        assert batch["label"] == [labels[k] for k in items]

    def to_y(batch):
        return {"label": torch.tensor(batch["label"])}
    ae = tiny_autoencoder()
    cache = Latents(tmp_path / "latents", ae, data, len(data), 0, "cpu", to_y)
    posterior, y = cache[[7, 3]]
    wanted = ae.encode(torch.stack([data[7]["image"], data[3]["image"]]))
    torch.testing.assert_close(posterior.mean, wanted.mean, rtol=2e-3, atol=1e-3)
    assert y["label"].tolist() == [7, 3]
    assert list(data.seen_labels()) == list(range(10))


def test_a_list_of_dicts_is_a_data_set(tmp_path):
    """With conditions of any kind, mirrored in every second epoch, and in a latent cache."""
    items = tiny_items()
    data = ListDataset(items, box_names=("eye", "ear"), flip=True)
    assert len(data) == 10
    assert data.captions() == [item["caption"] for item in items]
    assert data.label_names == ["0", "1", "2"]
    assert data.epochs_that_differ == 2
    assert data.prompts(3) is None and data.shards is None

    batch, = load_batches(data, [[2, 12]], workers=0)
    assert torch.equal(batch["image"][0], items[2]["image"])
    assert torch.equal(batch["image"][1], items[2]["image"].flip(2))
    assert batch["caption"] == ["image 2", "image 2"]

    def to_y(batch):
        return {"map": torch.stack(batch["segmentation"]), "label": torch.tensor(batch["label"])}
    cache = Latents(tmp_path, tiny_autoencoder(), data, 20, 0, "cpu", to_y)
    _, y = cache[[12, 4]]
    assert torch.equal(y["map"][0], items[2]["segmentation"].flip(1))
    assert y["label"].tolist() == [2, 1]


def test_mirrored_items_leave_the_list_as_it_was():
    items = tiny_items(2)
    before = [{name: torch.as_tensor(item[name]).clone() for name in ("image", "boxes")}
              for item in items]
    data = ListDataset(items, flip=True)
    for i in range(8):
        data[i]
    for item, old in zip(items, before):
        assert torch.equal(item["image"], old["image"])
        assert torch.equal(item["boxes"], old["boxes"])
    torch.testing.assert_close(data[3]["boxes"], torch.tensor([[1.0, 0.6, 0.2, 0.9, 0.9]]))


@pytest.mark.parametrize("field", ["image", "caption", "label", "boxes", "segmentation"])
def test_the_fingerprint_changes_with_every_field_of_every_item(field):
    data = ListDataset(tiny_items())
    first = data.fingerprint()
    assert json.loads(json.dumps(first)) == first
    assert ListDataset(tiny_items()).fingerprint() == first
    changed = {
        "image": torch.zeros(3, SIDE, SIDE),
        "caption": "another",
        "label": 1,
        "boxes": torch.zeros(0, 5),
        "segmentation": torch.zeros(SIDE, SIDE, dtype=torch.int64),
    }
    data.items[9][field] = changed[field]
    assert data.fingerprint() != first
    ae = tiny_autoencoder()
    assert fingerprint(ae, data, "text") != fingerprint(ae, ListDataset(tiny_items()), "text")


def test_the_fingerprint_changes_with_flip_and_names():
    first = ListDataset(tiny_items()).fingerprint()
    assert ListDataset(tiny_items(), flip=True).fingerprint() != first
    assert ListDataset(tiny_items(), label_names="abc").fingerprint() != first
    assert ListDataset(tiny_items(9)).fingerprint() != first


def test_a_missing_field_is_bad_input():
    items = tiny_items()
    del items[4]["label"]
    data = ListDataset(items)
    data.require_field("caption")
    with pytest.raises(BadInput, match="item 4 of the data set has no label"):
        data.require_field("label")
    with pytest.raises(BadInput, match="have no mask"):
        Shapes(3).require_field("mask")


@pytest.mark.parametrize("n, length, indices", [
    (3, 9, [0, 3, 6]),
    (4, 7, [0, 1, 3, 5]),
    (2, 2, [0, 1]),
    (5, 2, [0, 1, 0, 1, 0]),
    (0, 4, []),
])
def test_indices_are_spread_over_a_whole_set(n, length, indices):
    assert spread(n, length) == indices


# ---- opening the data set of a run

def test_open_dataset_opens_a_folder_as_asked(folder):
    path = folder(60, kind="cat")
    train = open_dataset(str(path), size=16, flip=True, label_column="kind", fields=("label",))
    held_out = open_dataset(str(path), "held-out", size=16, flip=True)
    assert train.flip and not held_out.flip
    assert train.label_names == ("cat",)
    assert train[0]["image"].shape == (3, 16, 16)
    with pytest.raises(BadInput, match="images: .*png has no boxes"):
        open_dataset(str(path), size=16, fields=("boxes",))


def test_open_dataset_degrades_what_a_task_restores(folder):
    data = open_dataset("shapes", size=32, seed=3, n_shapes=5, fields=("image", "mask"))
    assert isinstance(data, Degraded)
    assert len(data) == 5 and data[2]["mask"].shape == (1, 32, 32)
    small = [open_dataset("shapes", size=32, n_shapes=5, fields=("small",), degrade=how)[1]["small"]
             for how in ("bicubic", "chain")]
    assert small[0].shape == small[1].shape == (3, 8, 8)
    assert not torch.equal(*small)


def test_the_built_in_world_shows_new_images_in_each_epoch_and_holds_some_out():
    train = open_dataset("shapes", size=16, seed=1, n_shapes=300, flip=True)
    held_out = open_dataset("shapes", "held-out", size=16, seed=1, n_shapes=300)
    assert len(train) == 300 and len(held_out) == 256
    assert train.epochs_that_differ == 2
    mirrored = train[0]["image"].flip(2)
    assert not torch.equal(train[300]["image"], mirrored)

    # Captions that leave out sizes may be true of scenes of both splits.
    seen = {caption for caption in train.captions() if "small" in caption or "big" in caption}
    assert not seen & set(held_out.captions())


# ---- images

def test_8_bits_survive_the_way_to_an_image_and_back():
    levels = torch.arange(256).float() / 127.5 - 1
    x = torch.stack([levels, levels.flip(0), levels.roll(7)])[:, None].expand(3, 5, 256)
    image = to_image(x)
    assert image.size == (256, 5)
    assert np.array(image)[0, 10].tolist() == [10, 245, 3]
    torch.testing.assert_close(to_tensor(image), x)


def test_to_image_rounds_to_nearest_and_clamps():
    x = (torch.tensor([99.6, 100.4, -50, 300]) / 127.5 - 1).expand(3, 1, 4)
    assert np.array(to_image(x))[0, :, 0].tolist() == [100, 100, 0, 255]


def test_fit_image_crops_the_centre_and_says_so():
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, 4:12] = 7
    image = Image.fromarray(pixels)
    with pytest.warns(UserWarning, match=r"map: 16x8 is scaled and cropped to 4x4 \(nearest\)"):
        fitted = fit_image(image, (4, 4), NEAREST, "map")
    assert (np.array(fitted) == 7).all()
    assert np.array_equal(np.array(fit_image(image, (16, 8), NEAREST, "map")), pixels)


def test_a_data_set_without_load_says_that_it_must_have_one():
    class Empty(ImageDataset):
        def __len__(self):
            return 1
    with pytest.raises(NotImplementedError):
        Empty()[0]


def test_label_names_of_a_folder_are_those_of_all_splits(folder):
    """Training and held-out images number the classes alike."""
    path = folder(80)
    lines = (path / "metadata.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"label": f"class {i}"} for i, line in enumerate(lines)]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train = Folder(str(path), 16)
    held_out = Folder(str(path), 16, "held-out")
    assert train.label_names == held_out.label_names and len(train.label_names) == 80
