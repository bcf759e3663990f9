"""Images as people have them: of other channels, not square, with small ones of their own."""
import json

import numpy as np
import pytest
import torch
from conftest import ONE_LEVEL, TINY_AE, TINY_LDM
from PIL import Image, ImageDraw, ImageOps
from runs import log_rows
from torch.testing import assert_close

from tinyldm.data.degrade import Degraded, random_mask, shrink
from tinyldm.data.folder import Folder
from tinyldm.data.images import LOADERS, as_rgb, load_rgb, to_image, to_tensor
from tinyldm.data.open import open_dataset
from tinyldm.engine.open import open_model
from tinyldm.errors import BadInput
from tinyldm.metrics.features import ShapesNet
from tinyldm.perceptual import Perceptual, random_vgg

# What Pillow calls images of so many channels.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
QUICK = ["--steps", 2, "--eval-every", 2]


@pytest.fixture
def rgba_folder(tmp_path):
    """A folder of RGBA images of 20x30 pixels, each with another colour and a hole."""
    path = tmp_path / "rgba"
    path.mkdir()
    for i in range(60):
        image = Image.new("RGBA", (20, 30), (4 * i, 200, 255 - 4 * i, 255))
        ImageDraw.Draw(image).rectangle((5, 5, 12, 15), (0, 0, 0, 0))
        image.save(path / f"{i}.png")
    return path


# ---- channels

@pytest.mark.parametrize("channels", MODES)
def test_images_of_each_number_of_channels_keep_their_bytes(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
    image = Image.fromarray(pixels).convert(MODES[channels])
    x = to_tensor(image)
    assert x.shape == (channels, 5, 7)
    assert to_image(x).mode == image.mode
    assert to_image(x).tobytes() == image.tobytes()


def test_a_file_is_read_with_as_many_channels_as_are_wanted(rgba_folder):
    """Grey is the luma of what load_rgb gives; alpha is kept, or laid on white."""
    data = (rgba_folder / "3.png").read_bytes()
    image = Image.open(rgba_folder / "3.png")
    assert LOADERS[4](data).tobytes() == image.tobytes()
    assert LOADERS[1](data).tobytes() == load_rgb(data).convert("L").tobytes()
    assert LOADERS[3](data).getpixel((8, 8)) == (255, 255, 255)

    opaque = load_rgb(data).tobytes()
    assert as_bytes(as_rgb(to_tensor(image))) == opaque


def as_bytes(x):
    return to_image(x).tobytes()


def test_as_rgb_repeats_grey_and_takes_three_of_many_channels():
    x = torch.rand(2, 5, 4, 4) * 2 - 1
    for channels in (1, 2):
        assert_close(as_rgb(x[:, :channels]), x[:, [0, 0, 0]])
    assert_close(as_rgb(x[:, :3]), x[:, :3])
    assert_close(as_rgb(x), x[:, :3])


@pytest.mark.parametrize("channels", [1, 4])
def test_networks_for_rgb_see_other_images_as_rgb(channels):
    x, x_rec = torch.rand(2, 2, channels, 32, 32) * 2 - 1
    distance = Perceptual(random_vgg())
    assert_close(distance(x, x_rec), distance(as_rgb(x), as_rgb(x_rec)))
    net = ShapesNet()
    assert_close(net(x)[0], net(as_rgb(x))[0])


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_channels_trains_and_samples(rgba_folder, tmp_path, cli, channels):
    """Its condition and its samples have them too; what a mask keeps is the file's own bytes."""
    data = ["--data", rgba_folder, "--size", 16]
    cli("train_ae.py", *TINY_AE, *data, *QUICK, "--channels", channels, "--perceptual", "random",
        "--out", tmp_path / "ae")
    ae = ["--ae", tmp_path / "ae/ckpt.pt"]
    for task in ("superres", "inpaint"):
        cli("train_ldm.py", *TINY_LDM, *ONE_LEVEL, *data, *QUICK, *ae, "--task", task,
            "--out", tmp_path / task)
        cli("sample.py", "--ckpt", tmp_path / task / "model.pt", "--steps", 2, "--n", 2,
            "--out", tmp_path / f"{task}.png")

    photo = Image.open(rgba_folder / "7.png").crop((0, 0, 16, 16))
    photo.save(tmp_path / "photo.png")
    hole = Image.new("L", (16, 16))
    hole.paste(255, (8, 0, 16, 16))
    hole.save(tmp_path / "hole.png")
    cli("sample.py", "--ckpt", tmp_path / "inpaint/model.pt", "--steps", 2, "--n", 1,
        "--image", tmp_path / "photo.png", "--mask", tmp_path / "hole.png",
        "--init", tmp_path / "photo.png", "--out", tmp_path / "x")
    sample = Image.open(tmp_path / "x/000000.png")
    kept = (0, 0, 8, 16)
    expected = LOADERS[channels]((tmp_path / "photo.png").read_bytes())
    assert sample.mode == MODES[channels]
    assert sample.crop(kept).tobytes() == expected.crop(kept).tobytes()

    # The channels are those of stage one.
    output = cli("train_ldm.py", *TINY_LDM, *data, *ae, "--channels", 3, "--task", "uncond",
                 "--out", tmp_path / "other", code=2)
    assert f"ckpt.pt: its images have {channels} channel(s), not 3" in output


def test_grey_pixels_are_diffused_without_a_stage_one(rgba_folder, tmp_path, cli):
    cli("train_ldm.py", *TINY_LDM, *ONE_LEVEL, *QUICK, "--data", rgba_folder, "--size", 16,
        "--ae", "none", "--attn-res", 16, "--channels", 1, "--task", "uncond",
        "--out", tmp_path / "x")
    model = open_model(tmp_path / "x/model.pt")
    assert model.config.autoencoder.c_x == model.unet.cfg.c_in == 1
    assert model.sample([{}], seeds=[(0, 0)], steps=2).shape == (1, 1, 16, 16)


@pytest.mark.parametrize("flags,message", [
    (["--channels", 1], "shapes: the built-in world has 3 channels, not 1"),
    (["--channels", 2, "--data", "{data}"], "--data: 2 channels: image files have 1"),
    (["--channels", 0], "--channels 0: must be at least 1"),
    (["--size", "16x32"], "shapes: the images of the built-in world are square, not 16x32"),
    (["--size", "16x31", "--data", "{data}"], "--size 16x31 is not divisible by f = 2"),
])
def test_shapes_that_a_set_does_not_have(rgba_folder, tmp_path, cli, flags, message):
    flags = [str(flag).format(data=rgba_folder) for flag in flags]
    output = cli("train_ae.py", *TINY_AE, *flags, "--out", tmp_path / "x", code=2)
    assert message in output.splitlines()[-1]


@pytest.mark.parametrize("text", ["", "x", "16x", "16x16x16", "-16", "16X32", "1e3"])
def test_what_is_no_size_is_refused(cli, text):
    output = cli("sample.py", f"--size={text}", "a cat", code=2)
    assert f"--size: {text} is no size; give 64, or 64x96 for HxW" in output


# ---- images that are not square

@pytest.mark.parametrize("width,height", [(100, 60), (60, 100), (90, 90), (30, 200)])
@pytest.mark.parametrize("h,w", [(16, 24), (24, 16), (32, 32), (8, 40)])
def test_a_crop_has_the_shape_of_the_size_and_boxes_and_maps_follow(tmp_path, width, height, h, w):
    """A rectangle in the middle is at one place in the image, in its map and in its box.

    The rectangle is as wide and as high as a third of the image. Nothing is distorted: pixels
    are as many times smaller in width as they are in height.
    """
    left, top, right, bottom = width // 3, height // 3, width - width // 3, height - height // 3
    label_map = Image.new("L", (width, height))
    label_map.paste(255, (left, top, right, bottom))
    label_map.save(tmp_path / "map.png")
    label_map.convert("RGB").save(tmp_path / "a.png")
    row = {"file_name": "a.png", "mask": "map.png", "boxes": [["x", left, top, right, bottom]]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))

    item = Folder(tmp_path, (h, w), "all")[0]
    assert item["image"].shape == (3, h, w)
    assert item["segmentation"].shape == (h, w)
    # What it measures in each, as shares of width and height; a third may be cropped at its ends.
    scale = max(h / height, w / width)
    wanted_w = min(1.0, (right - left) * scale / w)
    wanted_h = min(1.0, (bottom - top) * scale / h)
    pixel_w, pixel_h = 2 / w, 2 / h

    _, x0, y0, x1, y1 = item["boxes"][0].tolist()
    assert_close(x1 - x0, wanted_w, rtol=0, atol=pixel_w)
    assert_close(y1 - y0, wanted_h, rtol=0, atol=pixel_h)
    white = (item["image"][0] + 1) / 2
    inside = (item["segmentation"] == 255).float()
    for found in (white, inside):
        assert_close(found[h // 2].mean().item(), wanted_w, rtol=0, atol=pixel_w)
        assert_close(found[:, w // 2].mean().item(), wanted_h, rtol=0, atol=pixel_h)


def test_masks_of_images_that_are_not_square_reach_all_of_them():
    masks = [random_mask(16, 64, np.random.default_rng([0, i])) for i in range(300)]
    coverage = torch.stack(masks).mean(0)[0]                # (16, 64)
    assert coverage.min() > 0.01
    halves = [coverage[:, :32].mean(), coverage[:, 32:].mean()]
    assert_close(halves[0], halves[1], rtol=0.5, atol=0)


def test_a_model_of_images_that_are_not_square(folder, tmp_path, cli):
    """Boxes, maps, small images and masks train it; samples have its size unless told otherwise."""
    path = folder(60, boxes=[["dog", 10, 14, 30, 24]], mask="map.png")
    Image.new("L", (40, 48), 1).save(path / "map.png")
    data = ["--data", path, "--size", "16x24"]
    cli("train_ae.py", *TINY_AE, *data, *QUICK, "--out", tmp_path / "ae")
    for task in ("layout", "semantic", "superres", "inpaint"):
        cli("train_ldm.py", *TINY_LDM, *ONE_LEVEL, *data, *QUICK, "--task", task,
            "--ae", tmp_path / "ae/ckpt.pt", "--out", tmp_path / task)
        cli("sample.py", "--ckpt", tmp_path / task / "model.pt", "--steps", 2, "--n", 2,
            "--out", tmp_path / f"{task}-samples")
        sample = Image.open(tmp_path / f"{task}-samples/000000.png")
        assert sample.size == (24, 16)

    # The attention levels are those of the shorter side, which is 8 in latents.
    assert open_model(tmp_path / "layout/model.pt").unet.cfg.side == 8

    # Another shape of the same shorter side is another run.
    for script, name in (("train_ae.py", "ae"), ("train_ldm.py", "superres")):
        tiny = TINY_AE if name == "ae" else [*TINY_LDM, *ONE_LEVEL, "--task", "superres",
                                             "--ae", tmp_path / "ae/ckpt.pt"]
        output = cli(script, *tiny, *QUICK, "--data", path, "--size", "24x16",
                     "--out", tmp_path / name, code=2)
        assert "size = (16, 24), now it is (24, 16)" in output


def test_a_square_is_kept_as_one_number(trained):
    """So that files of before and after there were other shapes can be read as each other."""
    saved = torch.load(trained / "ldm/ckpt.pt", weights_only=True)
    assert saved["size"] == 16
    model = open_model(trained / "ldm/ckpt.pt")
    assert model.config.size == (16, 16)
    assert model.config.to_checkpoint()["size"] == 16


# ---- pairs for super-resolution

@pytest.fixture
def pairs(tmp_path):
    """pairs(n) -> a folder of n images of 48x80 px, and one of small negatives of them.

    So small images that were made from the images would have other colours.
    """
    def make(n=60):
        path, small = tmp_path / "large", tmp_path / "small"
        path.mkdir()
        small.mkdir()
        for i in range(n):
            pixels = np.random.default_rng(i).integers(0, 255, (5, 3, 3), np.uint8)
            image = Image.fromarray(pixels).resize((48, 80), Image.Resampling.BICUBIC)
            image.save(path / f"{i}.png")
            negative = ImageOps.invert(image).resize((24, 40), Image.Resampling.BICUBIC)
            negative.save(small / f"{i}.png")
        return path, small

    return make


def write_metadata(path, n, small="small-{}.png"):
    rows = [{"file_name": f"{i}.png", "small": small.format(i)} for i in range(n)]
    (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def superres(path, split="train", **how):
    """The data set of superres at a path, of 32x24 px."""
    return open_dataset(str(path), split, size=(32, 24), fields=("small",), **how)


def assert_negatives(data):
    """The small images are negatives of the images, at the same place."""
    assert len(data) > 0
    for i in range(len(data)):
        item = data[i]
        assert item["small"].shape == (3, 8, 6)
        made = shrink(item["image"], np.random.default_rng(0), chain=False)
        assert_close(-item["small"], made, rtol=0, atol=0.1)


def test_a_small_image_is_cropped_as_its_image_from_a_column_or_a_folder(pairs):
    path, small = pairs(30)
    assert_negatives(superres(path, small=str(small)))
    assert superres(path, small=str(small)).summary()[0].endswith(f"30 small images of {small}")

    for i in range(30):
        (small / f"{i}.png").rename(path / f"small-{i}.png")
    write_metadata(path, 30)
    data = superres(path)
    assert len(data) + len(superres(path, "held-out")) == 30
    assert_negatives(data)

    # Every second epoch is mirrored, small images too.
    data = superres(path, flip=True)
    k = len(data)
    assert_close(data[k]["small"], data[0]["small"].flip(-1))


def test_small_images_are_made_if_the_set_has_none_or_if_a_degradation_is_asked_for(pairs):
    path, small = pairs(4)
    data = superres(path)
    assert isinstance(data, Degraded)
    assert data.summary()[-1] == "small images are made from the images, by the bicubic filter"
    assert isinstance(superres(path, small=str(small), degrade="chain"), Degraded)


def test_a_quarter_of_the_image_stays_as_it_is(tmp_path, pairs):
    path, small = pairs(1)
    expected = Image.new("RGB", (12, 20), (1, 2, 3))
    expected.save(small / "0.png")
    data = open_dataset(str(path), "train", size=(80, 48), fields=("small",), small=str(small))
    assert as_bytes(data[0]["small"]) == expected.tobytes()


def test_a_changed_small_image_is_another_set(pairs):
    """Else the latent cache would keep the old one."""
    path, small = pairs(2)
    before = superres(path, small=str(small)).fingerprint()
    assert superres(path, small=str(small)).fingerprint() == before
    Image.new("RGB", (12, 20)).save(small / "1.png")
    assert superres(path, small=str(small)).fingerprint() != before


def test_pairs_that_do_not_belong_together_are_named(pairs):
    path, small = pairs(3)
    Image.new("RGB", (20, 20)).save(small / "1.png")
    message = r"small: 1.png is 20x20 .*, but its image 1.png is 48x80"
    with pytest.raises(BadInput, match=message):
        superres(path, small=str(small))[1]

    (small / "1.png").write_bytes(b"no image")
    with pytest.raises(BadInput, match="small: 1.png cannot be read"):
        superres(path, small=str(small))[1]

    (small / "1.png").unlink()
    with pytest.raises(BadInput, match="1.png has no small; give it"):
        superres(path, small=str(small))

    write_metadata(path, 3, small="{}.gif")
    with pytest.raises(BadInput, match="metadata.jsonl line 1: small '0.gif' is not in the"):
        superres(path)


def test_pairs_train_and_are_scored(pairs, tmp_path, cli):
    """The evaluation and sample.py take the small images of training, and compare with bicubic."""
    path, small = pairs()
    data = ["--data", path, "--size", "32x24"]
    cli("train_ae.py", *TINY_AE, *data, *QUICK, "--out", tmp_path / "ae")
    train = [*TINY_LDM, *ONE_LEVEL, *data, *QUICK, "--ae", tmp_path / "ae/ckpt.pt",
             "--small", small, "--attn-res", 12]
    output = cli("train_ldm.py", *train, "--task", "superres", "--out", tmp_path / "x")
    assert f"60 small images of {small}" in output
    assert {"psnr", "bicubic_psnr"} < log_rows(tmp_path / "x")[-1].keys()

    output = cli("sample.py", "--ckpt", tmp_path / "x/model.pt", "--steps", 2, "--n", 2, "--score",
                 "--out", tmp_path / "x.png")
    bicubic_psnr = float(output.split("bicubic_psnr ")[1].split(",")[0])
    assert bicubic_psnr < 12                # a negative is far from its image

    # Flags that do not belong together.
    for flags, message in (
        (["--task", "uncond"], "--task uncond takes no small images"),
        (["--task", "superres", "--degrade", "chain"], "--degrade chain makes small images"),
    ):
        assert message in cli("train_ldm.py", *train, *flags, "--out", tmp_path / "y", code=2)
