"""data/folder.py, images.py: what a folder of images and its metadata become; odd folders."""
import io
import json
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import TINY_AE
from PIL import Image, UnidentifiedImageError
from torch.testing import assert_close

from tinyldm.data.folder import Folder
from tinyldm.data.images import LANCZOS, load_map, load_rgb
from tinyldm.data.loader import batch_order, load_batches
from tinyldm.errors import BadInput


def all_items(path, size=32, **how):
    """The items of the training images, then those of the held-out ones."""
    items = []
    for split in ("train", "held-out"):
        data = Folder(str(path), size, split, **how)
        items += [data[i] for i in range(len(data))]
    return items


def change_rows(path, change):
    """Rewrite metadata.jsonl, with change(row) applied to each row."""
    file = path / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows:
        change(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- what is known of an image becomes its item

def test_metadata_fields_become_the_item(folder):
    path = folder(30, label="cat", boxes=[["dog", 10, 14, 30, 24]], mask="map.png")
    Image.fromarray(np.full((48, 40), 7, np.uint8)).save(path / "map.png")
    items = all_items(path)
    assert len(items) == 30
    for item in items:
        assert item["image"].shape == (3, 32, 32)
        assert item["image"].dtype == torch.float32
        assert -1 <= item["image"].min() and item["image"].max() <= 1
        assert item["caption"].startswith("picture")
        assert item["label"] == 0
        assert item["segmentation"].shape == (32, 32)
        assert (item["segmentation"] == 7).all()

        # 40 x 48 pixels become 32 x 38.4, of which rows 3.2 to 35.2 are kept. So x is 10..30
        # of 40, and y is 14 * 0.8 - 3.2 = 8 .. 24 * 0.8 - 3.2 = 16 of 32.
        wanted = torch.tensor([[0, 10 / 40, 8 / 32, 30 / 40, 16 / 32]])
        assert_close(item["boxes"], wanted, rtol=0, atol=1e-2)


def test_labels_from_sub_folders_and_captions_from_txt(tmp_path):
    for kind, grey in (("ants", 0), ("bees", 255)):
        (tmp_path / kind).mkdir()
        for i in range(12):
            Image.new("RGB", (32, 32), (grey,) * 3).save(tmp_path / kind / f"{i}.png")
            (tmp_path / kind / f"{i}.txt").write_text(f"one of the {kind}\n")
    for item in all_items(tmp_path):
        is_bright = item["image"].mean() > 0
        assert item["label"] == int(is_bright)
        assert item["caption"] == ("one of the bees" if is_bright else "one of the ants")


def test_a_zip_reads_like_its_folder(tmp_path, folder):
    path = folder(12)
    shutil.make_archive(str(tmp_path / "images"), "zip", path)
    from_folder = all_items(path)
    from_zip = all_items(tmp_path / "images.zip")
    assert len(from_zip) == 12
    for a, b in zip(from_folder, from_zip):
        assert torch.equal(a["image"], b["image"])
        assert a["caption"] == b["caption"]


def test_each_process_opens_a_zip_once(tmp_path, folder, monkeypatch):
    """Processes that inherit an open file share its position, and would disturb one another."""
    shutil.make_archive(str(tmp_path / "images"), "zip", folder(4))
    data = Folder(str(tmp_path / "images.zip"), 32, "all")
    opened = []

    def watched(path):
        opened.append(path)
        return open_zip_file(path)

    open_zip_file = zipfile.ZipFile
    monkeypatch.setattr(zipfile, "ZipFile", watched)
    for process in (-1, -2):
        monkeypatch.setattr("os.getpid", lambda number=process: number)
        data[0]
        data[1]
    assert len(opened) == 2


def test_workers_read_a_zip_as_one_process_does(tmp_path, folder):
    shutil.make_archive(str(tmp_path / "images"), "zip", folder(12))
    data = Folder(str(tmp_path / "images.zip"), 32)
    data[0]
    here, there = [
        list(load_batches(data, batch_order(len(data), 4, 0, 4, 0), workers))
        for workers in (0, 2)
    ]
    assert len(here) == len(there) == 4
    for a, b in zip(here, there):
        assert torch.equal(a["image"], b["image"])
        assert a["caption"] == b["caption"]


def test_a_rewritten_zip_is_read_anew(tmp_path, folder):
    for n in (3, 5):
        shutil.make_archive(str(tmp_path / "images"), "zip", folder(n, f"of {n}"))
        data = Folder(str(tmp_path / "images.zip"), 32, "all")
        assert len(data) == n
        assert data[n - 1]["caption"] == f"picture {(n - 1) % 3}"


def test_held_out_images_are_no_training_images(folder):
    """The two splits share no file, and have all of them."""
    path = folder(200)
    train = {row["file_name"] for row in Folder(str(path), 32).rows}
    held_out = {row["file_name"] for row in Folder(str(path), 32, "held-out").rows}
    assert not train & held_out
    assert len(train | held_out) == len(Folder(str(path), 32, "all")) == 200
    assert 3 <= len(held_out) <= 20


# ---- decoding, scaling, cropping, mirroring

def test_grey_transparent_palette_and_rotated_images():
    def decoded(image, **how):
        file = io.BytesIO()
        image.save(file, "PNG", **how)
        return np.array(load_rgb(file.getvalue()))

    assert (decoded(Image.new("L", (4, 4), 90)) == 90).all()
    assert (decoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0))) == 255).all()
    assert (decoded(Image.new("RGBA", (4, 4), (255, 0, 0, 255))) == (255, 0, 0)).all()
    assert (decoded(Image.new("P", (4, 4), 0), transparency=0) == 255).all()

    exif = Image.Exif()
    exif[0x0112] = 6                # rotated by a quarter
    assert decoded(Image.new("RGB", (4, 8)), exif=exif).shape == (4, 8, 3)


def test_the_centre_of_the_scaled_image_is_kept(tmp_path):
    ramp = np.zeros((40, 80, 3), np.uint8)
    ramp[:, 20:60] = 255
    for i in range(3):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    scaled = Folder(str(tmp_path), 20)[0]["image"]
    assert (scaled > 0.85).all()
    cropped = Folder(str(tmp_path), 40, resize=False)[0]["image"]
    assert (cropped == 1).all()


def test_every_second_epoch_mirrors_images_boxes_and_maps(folder):
    path = folder(8, boxes=[["a", 0, 4, 10, 44]], mask="map.png")
    columns = np.tile(np.arange(40, dtype=np.uint8), (48, 1))
    Image.fromarray(columns).save(path / "map.png")
    data = Folder(str(path), 40, flip=True)
    first, second, third = [data[2 + epoch * len(data)] for epoch in range(3)]
    assert torch.equal(second["image"], first["image"].flip(2))
    assert torch.equal(second["segmentation"], first["segmentation"].flip(1))
    assert_close(second["boxes"][0, [1, 3]], 1 - first["boxes"][0, [3, 1]])
    assert torch.equal(third["image"], first["image"])
    assert torch.equal(third["boxes"], first["boxes"])


def photo(path, side, orientation=1):
    """A JPEG of (2 side) x side pixels: blue where x < side, then red, with fine stripes."""
    pixels = np.full((side, 2 * side, 3), 90, np.uint8)
    pixels[:, :side, 2] = 200
    pixels[:, side:, 0] = 200
    pixels[::3, :, 1] = 130
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path, orientation):
    photo(tmp_path / "a.jpg", 1000, orientation)
    data = Folder(str(tmp_path), 100, "all")
    _, decoded, _ = data.readable(0)
    is_upright = decoded.width < decoded.height
    assert sorted(decoded.size) == [250, 500]
    assert is_upright == (orientation == 6)

    # The same crop of the image, decoded in full.
    full = load_rgb((tmp_path / "a.jpg").read_bytes())
    assert sorted(full.size) == [1000, 2000]
    box = (0, 500, 1000, 1500) if is_upright else (500, 0, 1500, 1000)
    wanted = np.asarray(full.resize((100, 100), LANCZOS, box), float)
    got = (data[0]["image"].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(got - wanted).mean() < 1.5
    assert wanted.std() > 40

    # Not where the image would become smaller than twice the crop.
    assert Folder(str(tmp_path), 600, "all").readable(0)[1].size == full.size
    assert Folder(str(tmp_path), 100, "all", resize=False).readable(0)[1].size == full.size


def test_boxes_and_maps_of_large_jpegs_stay_where_they_are(tmp_path):
    photo(tmp_path / "a.jpg", 800)
    labels = np.arange(1600).repeat(800).reshape(1600, 800).T.astype(np.uint8) // 200
    Image.fromarray(labels).save(tmp_path / "m.png")
    row = {"file_name": "a.jpg", "boxes": [["red", 800, 200, 1200, 800]], "mask": "m.png"}

    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    with_boxes = Folder(str(tmp_path), 40, "all")[0]
    assert_close(with_boxes["boxes"], torch.tensor([[0, 0.5, 0.25, 1, 1]]))

    # Without boxes, the JPEG is decoded at a smaller size.
    del row["boxes"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    item = Folder(str(tmp_path), 40, "all")[0]
    red = item["image"][0]
    assert (red[:, 21:] > 0).all() and (red[:, :19] < 0).all()
    assert (item["segmentation"][:, 25] == 900 % 256 // 200).all()


def test_a_map_lies_on_the_image_whatever_its_size(tmp_path):
    """An image of 64 x 32, white on the left 3/8; a map of 32 x 16, 1 on the left 3/8."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :24] = 255
    labels = np.zeros((16, 32), np.uint8)
    labels[:, :12] = 1
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(labels).save(tmp_path / "m.png")
    row = {"file_name": "a.png", "mask": "m.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    item = Folder(str(tmp_path), 32, "all")[0]
    assert torch.equal(item["segmentation"], (item["image"][0] > 0).long())


def test_16_bit_images_are_scaled_to_8_bits(tmp_path):
    levels = (np.arange(4) * 16000).astype(np.uint16)
    Image.fromarray(levels.repeat(1024).reshape(64, 64)).save(tmp_path / "a.png")
    image = Folder(str(tmp_path), 32, "all")[0]["image"]
    assert image.min() < -0.9
    assert 0.3 < image.max() < 0.6          # 48,000 of 65,535


# ---- what strangers' folders may hold

def test_unreadable_images_are_skipped_with_a_warning_and_a_count(folder):
    path = folder(40)
    first, second = [row["file_name"] for row in Folder(str(path), 32).rows[:2]]
    (path / first).write_bytes(b"no picture")
    (path / second).write_bytes((path / second).read_bytes()[:500])
    data = Folder(str(path), 32)
    with pytest.warns(UserWarning, match="skipped") as warned:
        items = [data[i] for i in range(3)]
    assert len(warned) == 2
    assert "(2 so far)" in str(warned[1].message)
    assert torch.equal(items[0]["image"], items[2]["image"])
    assert items[0]["caption"] == items[2]["caption"]


def test_a_folder_of_unreadable_images_is_bad_input(folder):
    path = folder(6)
    for file in path.glob("*.png"):
        file.write_bytes(b"no")
    with pytest.warns(UserWarning), pytest.raises(BadInput, match="none of its"):
        Folder(str(path), 32)[0]


def bomb() -> bytes:
    """A PNG of a few bytes that claims to have 60,000 x 60,000 pixels."""
    def chunk(kind, body):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = zlib.compress(b"0")
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("load", [load_rgb, load_map])
def test_a_decompression_bomb_is_refused(load):
    with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)):
        load(bomb())


@pytest.mark.parametrize("load", [load_rgb, load_map])
@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PPM"])
def test_other_formats_are_not_opened_whatever_their_names_say(load, kind, monkeypatch):
    """Pillow gives an EPS to GhostScript, which executes programs."""
    monkeypatch.setattr("subprocess.Popen", None)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    with pytest.raises(UnidentifiedImageError):
        load(file.getvalue())


def test_a_file_in_a_zip_that_would_fill_the_memory_is_not_unpacked(tmp_path):
    """It claims 256 MiB. Of one that has more than it claims, no more is read."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.jsonl", "{}")
    data = path.read_bytes()
    size_at = data.index(b"PK\1\2") + 24
    claimed = struct.pack("<I", 2 ** 28)
    path.write_bytes(data[:size_at] + claimed + data[size_at + 4:])
    message = "x.zip: 'metadata.jsonl' has 268,435,456 bytes; unpack it"
    with pytest.raises(BadInput, match=message):
        Folder(str(path), 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_label_map_is_one_line_and_exit_code_2(tmp_path, folder, cli, workers):
    path = folder(8, mask="map.png")
    (path / "map.png").write_bytes(b"no map")
    run = ["--data", path, "--size", 16, "--steps", 1, "--workers", workers]
    output = cli("train_ae.py", *TINY_AE, *run, "--out", tmp_path / "out", code=2)
    assert "Traceback" not in output
    last_line = output.splitlines()[-1]
    assert last_line.startswith("error: ")
    assert f"{path}: map.png cannot be read: " in last_line


@pytest.mark.parametrize("line,message", [
    ("{oops", "line 3: not JSON"),
    ('{"file_name": "gone.png"}', "line 3: file_name 'gone.png' is not in the folder"),
    ('{"text": "a"}', 'line 3: needs an object with "file_name"'),
    ("[1]", 'line 3: needs an object with "file_name"'),
    ('{"file_name": "0.png", "mask": "m.png"}', "line 3: mask 'm.png' is not in the folder"),
    ('{"file_name": "../../etc/passwd"}', "line 3: .*not in the folder"),
    ('{"file_name": "0.png", "boxes": 7}', "line 3: 7 is no list; boxes are"),
    ('{"file_name": "0.png", "boxes": [["a", 1, 2, 3]]}', "line 3: .* is no box; boxes are"),
    ('{"file_name": "0.png", "boxes": [["a", 1, 2, NaN, 4]]}', "line 3: .* that are no numbers"),
])
def test_bad_metadata_names_the_file_and_the_line(folder, line, message):
    path = folder(2)
    with open(path / "metadata.jsonl", "a") as file:
        file.write(line + "\n")
    with pytest.raises(BadInput, match=f"images: metadata.jsonl {message}") as error:
        Folder(str(path), 32)
    assert "\n" not in str(error.value)


def test_empty_missing_and_broken_folders_are_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK not a zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("readme.md", "no pictures")
    for name, message in (
        ("empty", "no images"),
        ("gone", "gone: cannot be read: No such file"),
        ("a.zip", "cannot be read"),
        ("b.zip", "no images"),
    ):
        with pytest.raises(BadInput, match=f"{name}: .*|{message}") as error:
            Folder(str(tmp_path / name), 32)
        assert message in str(error.value)


def test_an_image_smaller_than_the_crop_is_bad_input(folder):
    with pytest.raises(BadInput, match="40x48 .width x height., smaller than the crop of 44x44"):
        Folder(str(folder(3)), 44, resize=False)[0]


@pytest.mark.parametrize("field,advice", [
    ("caption", ".txt"), ("label", "sub-folder"), ("boxes", "metadata.jsonl"),
    ("segmentation", "label map")])
def test_a_missing_field_is_named_with_what_to_do(folder, field, advice):
    path = folder(30)
    change_rows(path, lambda row: row.pop("text"))
    with pytest.raises(BadInput, match=rf"\.png has no {field}; .*{advice}"):
        Folder(str(path), 32).require_field(field)
