"""data/files.py, archives.py: kept lists of large folders, tar shards, and odd tars."""
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tinyldm.data import files
from tinyldm.data.files import Files
from tinyldm.data.folder import Folder
from tinyldm.data.loader import batch_order, load_batches
from tinyldm.errors import BadInput


def rows(path, label_column="label"):
    return Files(str(path), label_column).rows()


def file_names(path):
    return [row["file_name"] for row in rows(path)]


def jpeg(k: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(k).integers(0, 255, (6, 5, 3), np.uint8)
    Image.fromarray(noise).resize((40, 48), Image.Resampling.LANCZOS).save(file, "JPEG")
    return file.getvalue()


def add_member(tar, name, data=b"", **fields):
    """Add a member to a tar; fields are those of its header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write_tars(path, n=30, each=12):
    """n images in tars of `each`, with captions in .txt and classes in .cls."""
    path.mkdir()
    for start in range(0, n, each):
        with tarfile.open(path / f"shard-{start // each:03}.tar", "w") as tar:
            for k in range(start, min(start + each, n)):
                add_member(tar, f"./{k:04}.jpg", jpeg(k))
                add_member(tar, f"./{k:04}.txt", f"picture {k}\n".encode())
                add_member(tar, f"./{k:04}.cls", str(k % 3).encode())
    return path


@pytest.fixture
def tars(tmp_path):
    return write_tars(tmp_path / "tars")


@pytest.fixture
def list_folder(tmp_path, monkeypatch):
    """Lists of any length are kept, in a folder of the test's."""
    monkeypatch.setattr(files, "KEEP_FROM", 1)
    monkeypatch.setattr(files, "LIST_FOLDER", tmp_path / "lists/below")
    return tmp_path / "lists/below"


def rows_and_whether_looked(monkeypatch, path):
    """The rows, and whether Files looked through all files for them."""
    calls = []
    find_rows = Files._find_rows

    def watched(self):
        calls.append(self)
        return find_rows(self)

    with monkeypatch.context() as patch:
        patch.setattr(Files, "_find_rows", watched)
        return rows(path), bool(calls)


# ---- kept lists

def test_a_list_is_kept_until_a_folder_changes(tmp_path, list_folder, monkeypatch):
    path = tmp_path / "images"
    for name in ("a/b/1.png", "a/2.png", "c/3.png"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path / name)
    (path / "c/3.txt").write_text("three")

    def listed_anew():
        """The rows, which must be found anew now, and be kept then."""
        got, looked = rows_and_whether_looked(monkeypatch, path)
        assert looked
        assert rows_and_whether_looked(monkeypatch, path) == (got, False)
        return [(row["file_name"], row["label"], row.get("text")) for row in got]

    first = [("a/2.png", "a", None), ("a/b/1.png", "a/b", None), ("c/3.png", "c", "three")]
    assert listed_anew() == first
    assert [kept.suffix for kept in list_folder.iterdir()] == [".json"]

    shutil.copy(path / "c/3.png", path / "a/b/4.png")
    assert len(listed_anew()) == 4
    (path / "a/b/4.png").unlink()
    assert listed_anew() == first
    (path / "a/b/1.txt").write_text("one")
    assert listed_anew()[1][2] == "one"
    (path / "c").rename(path / "d")
    assert listed_anew()[2] == ("d/3.png", "d", "three")

    # A .txt rewritten in place is not noticed, as the docstring says, until its folder is
    # touched.
    (path / "d/3.txt").write_text("3")
    assert not rows_and_whether_looked(monkeypatch, path)[1]
    os.utime(path / "d")
    assert listed_anew()[2][2] == "3"


def test_a_kept_list_follows_metadata_zips_and_tars(
    tmp_path, list_folder, monkeypatch, folder, tars
):
    path = folder(3, kind="cat")
    shutil.copy(path / "0.png", path / "9.png")
    shutil.make_archive(str(tmp_path / "z"), "zip", path)
    for place in (path, tmp_path / "z.zip", tars, tars / "shard-001.tar"):
        assert rows_and_whether_looked(monkeypatch, place)[1]
        assert not rows_and_whether_looked(monkeypatch, place)[1]

    # A line more in metadata.jsonl; another label column.
    with open(path / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "9.png", "text": "again"}\n')
    assert rows(path)[3]["text"] == "again"
    assert rows(path, "kind")[0]["label"] == "cat"

    # A .zip that is rewritten.
    shutil.make_archive(str(tmp_path / "z"), "zip", path)
    assert len(rows(tmp_path / "z.zip")) == 4
    (path / "metadata.jsonl").unlink()
    (path / "9.png").unlink()
    for n in (3, 2):
        shutil.make_archive(str(tmp_path / "z"), "zip", path)
        assert len(rows(tmp_path / "z.zip")) == n
        (path / f"{n - 1}.png").unlink()

    # Images are read from the places that a kept list says; a .tar that has grown.
    found = Folder(str(tars), 32, "all")[29]
    kept = Folder(str(tars), 32, "all")[29]
    assert torch.equal(found["image"], kept["image"])
    with tarfile.open(tars / "shard-002.tar", "a") as tar:
        add_member(tar, "0030.jpg", jpeg(30))
    assert len(rows(tars)) == 31
    assert file_names(tars)[30] == "shard-002.tar/0030.jpg"


@pytest.mark.parametrize("junk", [b"", b"{}", b"[1, 2]", b"[[], [], []]", b"\x80\x04K\x01."])
def test_a_damaged_list_is_no_error(list_folder, folder, junk):
    path = folder(3)
    assert len(rows(path)) == 3
    kept, = list_folder.iterdir()
    kept.write_bytes(junk)
    assert len(rows(path)) == 3
    assert kept.read_bytes() != junk


def test_nowhere_to_keep_a_list_is_no_error(list_folder, folder):
    list_folder.parent.write_text("a file")
    assert len(rows(folder(3))) == 3
    assert list_folder.parent.read_text() == "a file"


def test_short_lists_are_not_kept(list_folder, folder, monkeypatch):
    monkeypatch.setattr(files, "KEEP_FROM", 4)
    assert len(rows(folder(3))) == 3
    assert not list_folder.exists()


def test_a_name_that_is_no_utf8_is_a_name(tmp_path, list_folder):
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        Image.new("RGB", (8, 8)).save(file, "png")
    for _ in range(2):
        everything = Folder(str(tmp_path), 8, "all")
        assert everything[0]["image"].max() == -1
        assert len(Folder(str(tmp_path), 8, "held-out")) < 2


# ---- tars

def test_tars_are_read_item_by_item_as_the_same_files_in_folders(tmp_path, tars):
    for tar in sorted(tars.iterdir()):
        with tarfile.open(tar) as archive:
            archive.extractall(tmp_path / "loose" / tar.name, filter="data")

    for split in ("train", "held-out"):
        packed = Folder(str(tars), 32, split)
        loose = Folder(str(tmp_path / "loose"), 32, split)
        assert len(packed) > 0
        names = [row["file_name"] for row in packed.rows]
        assert names == [row["file_name"] for row in loose.rows]
        for i in range(len(packed)):
            a = packed[i]
            b = loose[i]
            assert torch.equal(a["image"], b["image"])
            assert (a["caption"], a["label"]) == (b["caption"], b["label"])

    assert packed.label_names == ("0", "1", "2")
    assert packed.captions()[0].startswith("picture ")


def test_one_tar_is_read_like_a_folder_of_tars(tars):
    data = Folder(str(tars / "shard-002.tar"), 32, "all")
    assert data.captions() == [f"picture {k}" for k in range(24, 30)]
    assert data.shards == ["shard-002.tar"] * 6


def test_json_in_tars_and_names_up_to_the_last_dot(tmp_path):
    path = tmp_path / "x.tar"
    about = {
        "caption": "a dog", "kind": "dog", "boxes": [["ear", 0, 0, 20, 24]], "text": None,
        "mask": "a.seg.png", "exif": {"Model": "x"}, "file_name": "y",
    }
    with tarfile.open(path, "w") as tar:
        add_member(tar, "deep/a.json", json.dumps(about).encode())
        add_member(tar, "deep/a.seg.png", b"no image of its own")
        add_member(tar, "deep/a.jpg", jpeg(0))
        add_member(tar, "b.c.jpg", jpeg(1))
        add_member(tar, "b.c.txt", b"a cat")
        add_member(tar, "b.txt", b"nothing of b.c.jpg")
        add_member(tar, "B.JPG", jpeg(2))
    assert rows(path, "kind") == [
        {"file_name": "x.tar/deep/a.jpg", "text": "a dog", "label": "dog",
         "boxes": [["ear", 0, 0, 20, 24]], "mask": "x.tar/deep/a.seg.png",
         "where": f"{path}: x.tar/deep/a.json"},
        {"file_name": "x.tar/b.c.jpg", "text": "a cat"},
        {"file_name": "x.tar/B.JPG"},
    ]


def test_text_and_cls_win_over_json_and_json_wins_over_the_folder(tmp_path):
    path = tmp_path / "x.tar"
    about = json.dumps({"text": "from json", "label": "from json"}).encode()
    with tarfile.open(path, "w") as tar:
        for name in ("a", "b"):
            add_member(tar, f"{name}.jpg", jpeg(0))
            add_member(tar, f"{name}.json", about)
        add_member(tar, "a.txt", b"from txt")
        add_member(tar, "a.cls", b"from cls")
    assert rows(path) == [
        {"file_name": "x.tar/a.jpg", "text": "from txt", "label": "from cls"},
        {"file_name": "x.tar/b.jpg", "text": "from json", "label": "from json"},
    ]


@pytest.mark.parametrize("text,message", [
    (b"{", "a.json: not JSON"), (b"[1]", "a.json: needs an object"),
    (b'{"boxes": 3}', "a.json: 3 is no list; boxes are")])
def test_bad_json_in_a_tar_is_named(tmp_path, text, message):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add_member(tar, "a.jpg", jpeg(0))
        add_member(tar, "a.json", text)
    with pytest.raises(BadInput, match=message):
        rows(tmp_path / "x.tar")


def test_images_are_those_in_tars_or_those_beside_them_whichever_are_more(tars):
    """The others are counted as left out."""
    Image.new("RGB", (8, 8)).save(tars / "preview.png")
    found = Files(tars)
    assert len(found.rows()) == 30
    assert found.left_out["images beside .tar files"] == 1

    for k in range(30):
        Image.new("RGB", (8, 8)).save(tars / f"{k}.png")
    found = Files(tars)
    assert len(found.rows()) == 31
    assert found.left_out["images in .tar files, as there are more beside them"] == 30


def test_batches_of_tars_do_not_depend_on_the_number_of_workers(tars):
    data = Folder(str(tars), 32)
    order = list(batch_order(len(data), 4, 0, 9, 1, shards=data.shards))
    here = load_batches(data, order, workers=0)
    there = load_batches(data, order, workers=2)
    for a, b in zip(here, there):
        assert torch.equal(a["image"], b["image"])
        assert a["caption"] == b["caption"]


# ---- what strangers' tars may hold

def test_only_plain_files_with_names_within_the_tar_are_used(tmp_path):
    path = tmp_path / "x.tar"
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE,
             tarfile.DIRTYPE)
    sparse = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}
    with tarfile.open(path, "w") as tar:
        add_member(tar, "a.jpg", jpeg(0))
        for name in ("/etc/b.jpg", "../c.jpg", "d/../../e.jpg"):
            add_member(tar, name, jpeg(1))
        for number, kind in enumerate(kinds):
            add_member(tar, f"f{number}.jpg", type=kind, linkname="/etc/passwd")
        add_member(tar, "g.jpg", jpeg(2), pax_headers=sparse)
        add_member(tar, "h/./i.jpg", jpeg(3))
    assert file_names(path) == ["x.tar/a.jpg", "x.tar/h/i.jpg"]
    assert os.listdir(tmp_path) == ["x.tar"]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_a_tar_that_is_cut_off_is_one_line(tars, share):
    path = tars / "shard-001.tar"
    os.truncate(path, int(path.stat().st_size * share))
    for place in (path, tars):
        with pytest.raises(BadInput, match="shard-001.tar is damaged, cut off or") as error:
            rows(place)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [
    b"77777777777\0",                               # 8 GiB
    b"\x80" + b"\xff" * 11,                         # 2^88 bytes
    (-1536).to_bytes(12, "big", signed=True),       # leads back to the member before
], ids=["8 GiB", "2^88", "negative"])
def test_a_header_that_lies_or_is_none_is_one_line(tars, size):
    path = tars / "shard-000.tar"
    with tarfile.open(path) as tar:
        start = tar.getmembers()[6].offset
    data = bytearray(path.read_bytes())

    # Another size, with the checksum that fits it.
    data[start + 124:start + 136] = size
    data[start + 148:start + 156] = b" " * 8
    checksum = sum(data[start:start + 512])
    data[start + 148:start + 156] = b"%06o\0 " % checksum

    lying_header = bytes(data[start:start + 512])
    for header in (lying_header, b"x" * 512):
        data[start:start + 512] = header
        path.write_bytes(data)
        with pytest.raises(BadInput, match="shard-000.tar is damaged"):
            rows(path)


def test_compressed_broken_and_empty_tars_are_one_line(tmp_path):
    with tarfile.open(tmp_path / "f.tar.gz", "w:gz") as tar:
        add_member(tar, "a.jpg", jpeg(0))
    shutil.copy(tmp_path / "f.tar.gz", tmp_path / "b.tar")
    (tmp_path / "c.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        add_member(tar, "a.txt", b"no image")
    (tmp_path / "e").mkdir()
    shutil.copy(tmp_path / "f.tar.gz", tmp_path / "e/a.tar.gz")

    for name, message in (
        ("b.tar", "compressed"),
        ("c.tar", "whole, plain .tar"),
        ("d.tar", "no images"),
        ("e", "no images in it.*plain .tar"),
        ("f.tar.gz", "compressed"),
        ("gone.tar", "No such file"),
    ):
        with pytest.raises(BadInput, match=message) as error:
            Folder(str(tmp_path / name), 32)
        assert "\n" not in str(error.value)
