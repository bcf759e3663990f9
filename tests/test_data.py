"""data.py: the folder contract, the order of batches, strangers' folders."""
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

from tinyldm import BadInput
from tinyldm.data import Folder, batch_order, load_map, load_rgb, loader

def all_items(path, size=32, **kw):
    """Training and held-out items together, by file order."""
    data = Folder(str(path), size, **kw), Folder(str(path), size, "held-out", **kw)
    return [d[i] for d in data for i in range(len(d))]


def test_metadata_fields_become_the_item(tmp_path, folder):
    path = folder(30, label="cat", boxes=[["dog", 10, 14, 30, 24]], mask="map.png")
    Image.fromarray(np.full((48, 40), 7, np.uint8)).save(path / "map.png")
    items = all_items(path)
    assert len(items) == 30
    for item in items:
        assert item["image"].shape == (3, 32, 32) and item["image"].dtype == torch.float32
        assert item["image"].min() >= -1 and item["image"].max() <= 1
        assert item["caption"].startswith("picture") and item["label"] == 0
        assert (item["segmentation"] == 7).all() and item["segmentation"].shape == (32, 32)
        # 40x48 -> 32x38.4 -> rows 3..35: x 10..30 of 40, y (14..24 * .8 - 3.2) of 32
        want = torch.tensor([[0, 10 / 40, 8 / 32, 30 / 40, 16 / 32]])
        assert_close(item["boxes"], want, rtol=0, atol=1e-2)


def test_labels_from_sub_folders_and_captions_from_txt(tmp_path):
    for kind, grey in (("ants", 0), ("bees", 255)):
        (tmp_path / kind).mkdir()
        for i in range(12):
            Image.new("RGB", (32, 32), (grey,) * 3).save(tmp_path / kind / f"{i}.png")
            (tmp_path / kind / f"{i}.txt").write_text(f"one of the {kind}\n")
    for item in all_items(tmp_path):
        assert item["label"] == (0 if item["image"].mean() < 0 else 1)
        assert item["caption"] == f"one of the {['ants', 'bees'][item['label']]}"


def test_a_zip_reads_like_its_folder(tmp_path, folder):
    path = folder(12)
    shutil.make_archive(str(tmp_path / "pics"), "zip", path)
    a, b = all_items(path), all_items(tmp_path / "pics.zip")
    assert len(b) == 12 and all((x["image"] == y["image"]).all() and x["caption"] == y["caption"]
                                for x, y in zip(a, b))
    data = Folder(str(tmp_path / "pics.zip"), 32)
    here, there = (list(loader(data, batch_order(len(data), 4, 0, 4, 0), workers))
                   for workers in (0, 2))
    assert [b["image"].shape for b in there] == [(4, 3, 32, 32)] * 4
    for a, b in zip(here, there):
        assert (a["image"] == b["image"]).all() and a["caption"] == b["caption"]


def test_a_rewritten_zip_is_read_anew(tmp_path, folder):
    for n in (3, 5):
        shutil.make_archive(str(tmp_path / "pics"), "zip", folder(n, f"of {n}"))
        data = Folder(str(tmp_path / "pics.zip"), 32, "all")
        assert len(data) == n and data[n - 1]["caption"] == f"picture {(n - 1) % 3}"


def test_held_out_pictures_are_never_trained_on(folder):
    path = folder(200)
    train, held = Folder(str(path), 32), Folder(str(path), 32, "held-out")
    names = [{r["file_name"] for r in d.rows} for d in (train, held)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 200 and 3 <= len(held) <= 20


def test_grey_transparent_palette_and_rotated_pictures(tmp_path):
    def read(image, **kw):
        image.save(tmp_path / "x.png", **kw)
        return np.array(load_rgb((tmp_path / "x.png").read_bytes()))
    assert (read(Image.new("L", (4, 4), 90)) == 90).all()
    assert (read(Image.new("RGBA", (4, 4), (255, 0, 0, 0))) == 255).all()
    assert (read(Image.new("RGBA", (4, 4), (255, 0, 0, 255))) == (255, 0, 0)).all()
    assert (read(Image.new("P", (4, 4), 0), transparency=0) == 255).all()
    tall, exif = Image.new("RGB", (4, 8)), Image.Exif()
    exif[0x0112] = 6
    assert read(tall, exif=exif).shape == (4, 8, 3)


def test_resize_crops_the_middle_of_the_scaled_picture(tmp_path):
    ramp = np.zeros((40, 80, 3), np.uint8)
    ramp[:, 20:60] = 255
    for i in range(3):
        Image.fromarray(ramp).save(tmp_path / f"{i}.png")
    image = Folder(str(tmp_path), 20)[0]["image"]
    assert (image > 0.85).all()
    assert (Folder(str(tmp_path), 40, resize=False)[0]["image"] == 1).all()


def test_flipped_epochs_mirror_pictures_boxes_and_maps(folder):
    path = folder(8, boxes=[["a", 0, 4, 10, 44]], mask="map.png")
    Image.fromarray(np.tile(np.arange(40, dtype=np.uint8), (48, 1))).save(path / "map.png")
    data = Folder(str(path), 40, flip=True)
    a, b, c = data[2], data[2 + len(data)], data[2 + 2 * len(data)]
    assert (b["image"] == a["image"].flip(2)).all() and (c["image"] == a["image"]).all()
    assert (b["segmentation"] == a["segmentation"].flip(1)).all()
    assert_close(b["boxes"][0, [1, 3]], 1 - a["boxes"][0, [3, 1]])


@pytest.mark.parametrize("n,batch", [(10, 3), (10, 10), (3, 8)])
def test_each_epoch_shows_each_picture_once_in_a_new_order(n, batch):
    flat = [i for items in batch_order(n, batch, 0, 60, seed=1) for i in items]
    epochs = [flat[e * n:(e + 1) * n] for e in range(len(flat) // n)]
    assert all(sorted(e) == list(range(k * n, (k + 1) * n)) for k, e in enumerate(epochs))
    assert len({tuple(i % n for i in e) for e in epochs}) > 1


def test_processes_share_the_batch_that_one_would_see():
    whole = list(batch_order(10, 4, 2, 6, seed=1))
    parts = [list(batch_order(10, 4, 2, 6, 1, rank, 2)) for rank in (0, 1)]
    assert whole == [a + b for a, b in zip(*parts)] and len(whole) == 4


def photo(path, side, orientation=1):
    """A JPEG of (2 side) x side pixels: blue where x < side, then red, with fine stripes."""
    a = np.full((side, 2 * side, 3), 90, np.uint8)
    a[:, :side, 2], a[:, side:, 0] = 200, 200
    a[::3, :, 1] = 130
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(a).save(path, "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path, orientation):
    photo(tmp_path / "a.jpg", 1000, orientation)
    data = Folder(str(tmp_path), 100, "all")
    decoded = data.readable(0)[1]
    assert sorted(decoded.size) == [250, 500] and (decoded.width < decoded.height) == (
        orientation == 6)
    whole = load_rgb((tmp_path / "a.jpg").read_bytes())
    assert sorted(whole.size) == [1000, 2000]
    box = (500, 0, 1500, 1000) if orientation == 1 else (0, 500, 1000, 1500)
    want = np.asarray(whole.resize((100, 100), Image.Resampling.LANCZOS, box), float)
    got = (data[0]["image"].permute(1, 2, 0).numpy() + 1) * 127.5
    assert np.abs(got - want).mean() < 1.5 and want.std() > 40
    assert Folder(str(tmp_path), 600, "all").readable(0)[1].size == whole.size
    assert Folder(str(tmp_path), 100, "all", resize=False).readable(0)[1].size == whole.size


def test_boxes_and_maps_of_large_jpegs_stay_where_they_are(tmp_path):
    photo(tmp_path / "a.jpg", 800)
    Image.fromarray(np.arange(1600).repeat(800).reshape(1600, 800).T.astype(np.uint8) // 200).save(
        tmp_path / "m.png")
    row = {"file_name": "a.jpg", "boxes": [["red", 800, 200, 1200, 800]], "mask": "m.png"}
    item = {}
    for boxes in ("boxes", "none"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps(row).replace("boxes", boxes))
        item |= Folder(str(tmp_path), 40, "all")[0]
    assert_close(item["boxes"], torch.tensor([[0, .5, .25, 1, 1]]))
    assert (item["image"][0, :, 21:] > 0).all() and (item["image"][0, :, :19] < 0).all()
    assert (item["segmentation"][:, 25] == 900 % 256 // 200).all()


# ---- what strangers' folders may hold

def test_unreadable_pictures_are_skipped_with_a_warning_and_a_count(folder):
    path = folder(40)
    names = [r["file_name"] for r in Folder(str(path), 32).rows]
    (path / names[0]).write_bytes(b"no picture")
    (path / names[1]).write_bytes((path / names[1]).read_bytes()[:500])
    data = Folder(str(path), 32)
    with pytest.warns(UserWarning, match="skipped") as w:
        a, _, b = [data[i] for i in range(3)]
    assert len(w) == 2 and "(2 so far)" in str(w[1].message)
    assert (a["image"] == b["image"]).all() and a["caption"] == b["caption"]


def test_a_folder_of_bad_pictures_is_bad_input(folder):
    path = folder(6)
    for p in path.glob("*.png"):
        p.write_bytes(b"no")
    with pytest.warns(UserWarning), pytest.raises(BadInput, match="none of its"):
        Folder(str(path), 32)[0]


def bomb() -> bytes:
    """A png of a few bytes that claims 60,000 x 60,000 pixels."""
    def chunk(kind, body):
        crc = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + crc
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0"))
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("load", [load_rgb, load_map])
def test_a_decompression_bomb_is_refused(load):
    with pytest.raises((Image.DecompressionBombError, Image.DecompressionBombWarning)):
        load(bomb())


@pytest.mark.parametrize("load", [load_rgb, load_map])
@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "PPM"])
def test_other_formats_are_not_opened_whatever_their_names_say(load, kind, monkeypatch):
    """Pillow gives an EPS to GhostScript, a program for programs."""
    monkeypatch.setattr("subprocess.Popen", None)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, kind)
    with pytest.raises(UnidentifiedImageError):
        load(file.getvalue())


def test_a_zip_whose_member_unpacks_to_more_than_memory_is_not_unpacked(tmp_path):
    """It says 256 MiB; of what is longer than it says, no more would be read."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("metadata.jsonl", "{}")
    data = path.read_bytes()
    i = data.index(b"PK\1\2") + 24
    path.write_bytes(data[:i] + struct.pack("<I", 2 ** 28) + data[i + 4:])
    with pytest.raises(BadInput, match="metadata.jsonl' has 268,435,456 bytes; unpack it"):
        Folder(str(path), 32)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_label_map_is_one_line_and_exit_code_2(tmp_path, folder, cli, workers):
    path = folder(8, mask="map.png")
    (path / "map.png").write_bytes(b"no map")
    said = cli("train_ae.py", *TINY_AE, "--data", path, "--size", 16, "--steps", 1, "--out",
               tmp_path / "out", "--workers", workers, code=2)
    assert "Traceback" not in said
    assert f"error: --data {path}: map.png cannot be read: " in said.splitlines()[-1]


@pytest.mark.parametrize("line,say", [
    ("{oops", "line 3.*not JSON"), ('{"file_name": "gone.png"}', "line 3.*gone.png"),
    ('{"text": "a"}', "line 3.*file_name"), ("[1]", "line 3.*file_name"),
    ('{"file_name": "0.png", "mask": "m.png"}', "line 3.*m.png"),
    ('{"file_name": "../../etc/passwd"}', "line 3.*not in the folder")])
def test_bad_metadata_names_the_line(folder, line, say):
    path = folder(2)
    with open(path / "metadata.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(BadInput, match=say):
        Folder(str(path), 32)


def test_empty_missing_and_broken_folders_are_bad_input(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.zip").write_bytes(b"PK not a zip")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as z:
        z.writestr("readme.md", "no pictures")
    for name, say in (("empty", "no pictures"), ("gone", "gone: cannot be read: No such file"),
                      ("a.zip", "cannot be read"), ("b.zip", "no pictures")):
        with pytest.raises(BadInput, match=say):
            Folder(str(tmp_path / name), 32)


def test_a_picture_smaller_than_the_crop_is_bad_input(folder):
    with pytest.raises(BadInput, match="40x48, smaller than the crop of 44"):
        Folder(str(folder(3)), 44, resize=False)[0]


def test_missing_captions_are_named(folder):
    path = folder(30)
    rows = [json.loads(x) for x in (path / "metadata.jsonl").read_text().splitlines()]
    for r in rows:
        del r["text"]
    (path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(BadInput, match="no caption"):
        Folder(str(path), 32).need("caption")
