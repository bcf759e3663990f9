"""files.py: kept lists of large folders, tar shards, and what strangers' tars may hold."""
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from tinyldm import BadInput, files
from tinyldm.data import BUFFER, Folder, batch_order, loader, shuffled
from tinyldm.files import Files

def rows(path, label="label"):
    return Files(str(path), label).rows()


def jpeg(k: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(k).integers(0, 255, (6, 5, 3), np.uint8)
    Image.fromarray(noise).resize((40, 48), 1).save(file, "JPEG")
    return file.getvalue()


def member(tar, name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for k, v in fields.items():
        setattr(info, k, v)
    tar.addfile(info, io.BytesIO(data))


def write_tars(path, n=30, each=12, **more):
    """n pictures in tars of `each`, with captions in .txt and classes in .cls; more: of .json."""
    path.mkdir()
    for start in range(0, n, each):
        with tarfile.open(path / f"shard-{start // each:03}.tar", "w") as tar:
            for k in range(start, min(start + each, n)):
                member(tar, f"./{k:04}.jpg", jpeg(k))
                member(tar, f"./{k:04}.txt", f"picture {k}\n".encode())
                member(tar, f"./{k:04}.cls", str(k % 3).encode())
                if more:
                    member(tar, f"./{k:04}.json", json.dumps(more).encode())
    return path


@pytest.fixture
def tars(tmp_path):
    return write_tars(tmp_path / "tars")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Lists of any length are kept, in a folder of the test's."""
    monkeypatch.setattr(files, "MANY", 1)
    monkeypatch.setattr(files, "LISTS", tmp_path / "lists/below")
    return tmp_path / "lists/below"


def listed(monkeypatch, path):
    """The rows, and whether the files were looked through for them."""
    calls, whole = [], Files._list
    with monkeypatch.context() as patch:
        patch.setattr(Files, "_list", lambda self: calls.append(1) or whole(self))
        return rows(path), bool(calls)


# ---- kept lists

def test_a_list_is_kept_until_a_folder_changes(tmp_path, kept, monkeypatch):
    path = tmp_path / "pics"
    for name in ("a/b/1.png", "a/2.png", "c/3.png"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path / name)
    (path / "c/3.txt").write_text("three")

    def now():
        got, looked = listed(monkeypatch, path)
        assert looked and listed(monkeypatch, path) == (got, False)
        return [(r["file_name"], r["label"], r.get("text")) for r in got]
    first = [("a/2.png", "a", None), ("a/b/1.png", "a/b", None), ("c/3.png", "c", "three")]
    assert now() == first and [p.suffix for p in kept.iterdir()] == [".json"]
    shutil.copy(path / "c/3.png", path / "a/b/4.png")
    assert len(now()) == 4
    (path / "a/b/4.png").unlink()
    assert now() == first
    (path / "a/b/1.txt").write_text("one")
    assert now()[1][2] == "one"
    (path / "c").rename(path / "d")
    assert now()[2] == ("d/3.png", "d", "three")
    (path / "d/3.txt").write_text("3")          # in place: as the docstring says, not noticed,
    assert not listed(monkeypatch, path)[1]
    os.utime(path / "d")                        # until its folder is touched
    assert now()[2][2] == "3"


def test_a_kept_list_follows_metadata_zips_and_tars(tmp_path, kept, monkeypatch, folder, tars):
    path = folder(3, kind="cat")
    shutil.make_archive(str(tmp_path / "z"), "zip", path)
    for at in (path, tmp_path / "z.zip", tars, tars / "shard-001.tar"):
        assert listed(monkeypatch, at)[1] and not listed(monkeypatch, at)[1]
    with open(path / "metadata.jsonl", "a") as f:
        f.write('{"file_name": "0.png", "text": "again"}\n')
    assert rows(path)[3]["text"] == "again" and rows(path, "kind")[0]["label"] == "cat"
    shutil.make_archive(str(tmp_path / "z"), "zip", path)
    assert len(rows(tmp_path / "z.zip")) == 4
    want = Folder(str(tars), 32, "all")[29]
    assert (Folder(str(tars), 32, "all")[29]["image"] == want["image"]).all()   # from a kept place
    with tarfile.open(tars / "shard-002.tar", "a") as tar:
        member(tar, "0030.jpg", jpeg(30))
    assert len(rows(tars)) == 31 and rows(tars)[30]["file_name"] == "shard-002.tar/0030.jpg"


@pytest.mark.parametrize("junk", [b"", b"{}", b"[1, 2]", b"[[], [], []]", b"\x80\x04K\x01."])
def test_a_damaged_list_or_nowhere_to_keep_it_is_no_error(tmp_path, kept, folder, junk):
    path = folder(3)
    assert len(rows(path)) == 3
    file, = kept.iterdir()
    file.write_bytes(junk)
    assert len(rows(path)) == 3 and file.read_bytes() != junk
    shutil.rmtree(kept.parent)
    kept.parent.write_text("a file")
    assert len(rows(path)) == 3 and kept.parent.read_text() == "a file"


def test_short_lists_are_not_kept(tmp_path, kept, folder, monkeypatch):
    monkeypatch.setattr(files, "MANY", 4)
    assert len(rows(folder(3))) == 3 and not kept.exists()


def test_a_name_that_is_no_utf8_is_a_name(tmp_path, kept):
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as f:
        Image.new("RGB", (8, 8)).save(f, "png")
    for _ in range(2):
        assert Folder(str(tmp_path), 8, "all")[0]["image"].max() == -1


# ---- tars

def test_tars_are_read_item_by_item_as_the_same_files_in_folders(tmp_path, tars):
    for tar in sorted(tars.iterdir()):
        with tarfile.open(tar) as f:
            f.extractall(tmp_path / "loose" / tar.name, filter="data")
    for split in ("train", "held-out"):
        a, b = (Folder(str(p), 32, split) for p in (tars, tmp_path / "loose"))
        assert [r["file_name"] for r in a.rows] == [r["file_name"] for r in b.rows]
        for x, y in ((a[i], b[i]) for i in range(len(a))):
            assert (x["image"] == y["image"]).all()
            assert (x["caption"], x["label"]) == (y["caption"], y["label"])
    assert a.labels == ["0", "1", "2"] and a.captions()[0].startswith("picture ")
    one = Folder(str(tars / "shard-002.tar"), 32, "all")
    assert one.captions() == [f"picture {k}" for k in range(24, 30)]
    names = [{r["file_name"] for r in Folder(str(tars), 32, s).rows} for s in ("train", "held-out")]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 30 and names[1]


def test_json_in_tars_and_names_up_to_the_first_dot(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        more = {"caption": "a dog", "kind": "dog", "boxes": [["ear", 0, 0, 20, 24]], "text": None,
                "mask": "x.tar/deep/a.seg.png", "exif": {"Model": "x"}, "file_name": "y"}
        member(tar, "deep/a.json", json.dumps(more).encode())
        member(tar, "deep/a.seg.png", b"no picture of its own")
        member(tar, "deep/a.jpg", jpeg(0))
        member(tar, "b.c.jpg", jpeg(1))
        member(tar, "B.JPG", jpeg(2))
    assert rows(tmp_path / "x.tar", "kind") == [
        {"file_name": "x.tar/deep/a.jpg", "text": "a dog", "label": "dog",
         "boxes": [["ear", 0, 0, 20, 24]], "mask": "x.tar/deep/a.seg.png"},
        {"file_name": "x.tar/B.JPG", "label": "x.tar"}]
    for text, say in ((b"{", "a.json: not JSON"), (b"[1]", "a.json: needs an object"),
                      (b'{"boxes": 3}', 'a.json: "boxes" must be')):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            member(tar, "a.jpg", jpeg(0))
            member(tar, "a.json", text)
        with pytest.raises(BadInput, match=say):
            rows(tmp_path / "x.tar")


def test_tars_beside_pictures_are_left_alone(tars):
    Image.new("RGB", (8, 8)).save(tars / "a.png")
    assert [r["file_name"] for r in rows(tars)] == ["a.png"]


def test_batches_of_tars_depend_on_no_number_of_workers_or_processes(tars):
    data = Folder(str(tars), 32)
    whole = list(batch_order(len(data), 4, 0, 9, 1, tars=data.tars))
    here, there = (list(loader(data, whole, workers)) for workers in (0, 2))
    for a, b in zip(here, there):
        assert (a["image"] == b["image"]).all() and a["caption"] == b["caption"]
    parts = [list(batch_order(len(data), 4, 3, 9, 1, rank, 2, data.tars)) for rank in (0, 1)]
    assert whole[3:] == [a + b for a, b in zip(*parts)]


def test_the_order_of_tars_reads_them_one_after_another(monkeypatch):
    n, tars = 40_000, np.arange(40_000) // 4_000
    monkeypatch.setattr("tinyldm.data.BUFFER", 100)
    orders = [shuffled(n, np.random.default_rng(seed), tars) for seed in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(n))
        starts = order[::4_000] // 4_000
        place = np.argsort(np.unique(tars[order], return_index=True)[1])    # which tar comes when
        want = np.concatenate([np.flatnonzero(tars == t) for t in place])
        moved = np.abs(np.argsort(order) - np.argsort(want))
        assert 10 < moved.mean() < moved.max() <= 200 and len(starts) == 10
    assert (orders[0] != orders[1]).mean() > 0.9 and BUFFER > 1000
    assert tars[orders[0][0]] != tars[orders[1][0]] or tars[orders[0][-1]] != tars[orders[1][-1]]


# ---- what strangers' tars may hold

def test_only_plain_files_with_names_within_the_tar_are_used(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        member(tar, "a.jpg", jpeg(0))
        for name in ("/etc/b.jpg", "../c.jpg", "d/../../e.jpg"):
            member(tar, name, jpeg(1))
        for k, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
                                  tarfile.FIFOTYPE, tarfile.DIRTYPE)):
            member(tar, f"f{k}.jpg", type=kind, linkname="/etc/passwd")
        member(tar, "g.jpg", jpeg(2), pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"})
        member(tar, "h/./i.jpg", jpeg(3))
    assert [r["file_name"] for r in rows(tmp_path / "x.tar")] == ["x.tar/a.jpg", "x.tar/h/i.jpg"]
    assert os.listdir(tmp_path) == ["x.tar"]


@pytest.mark.parametrize("keep", [0.02, 0.1, 0.5, 0.9])
def test_a_tar_that_is_cut_off_is_one_line(tars, keep):
    path = tars / "shard-001.tar"
    os.truncate(path, int(path.stat().st_size * keep))
    for at in (path, tars):
        with pytest.raises(BadInput, match="shard-001.tar is damaged, cut off or") as e:
            rows(at)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 11 + b"\x00"])
def test_a_header_that_lies_or_is_none_is_one_line(tars, size):
    """Of 8 GiB, of 2^88 bytes, and of less than none: an endless loop for some tarfile.py."""
    path = tars / "shard-000.tar"
    with tarfile.open(path) as tar:
        at = tar.getmembers()[6].offset
    data = bytearray(path.read_bytes())
    data[at + 124:at + 136] = size
    data[at + 148:at + 156] = b" " * 8
    data[at + 148:at + 156] = b"%06o\0 " % sum(data[at:at + 512])
    for head in (data[at:at + 512], b"x" * 512):
        data[at:at + 512] = head
        path.write_bytes(data)
        with pytest.raises(BadInput, match="shard-000.tar is damaged"):
            rows(path)


def test_compressed_broken_and_empty_tars_are_one_line(tmp_path, tars):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        member(tar, "a.jpg", jpeg(0))
    shutil.copy(tmp_path / "a.tar.gz", tmp_path / "b.tar")
    (tmp_path / "c.tar").write_bytes(b"")
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        member(tar, "a.txt", b"no picture")
    (tmp_path / "e").mkdir()
    (tmp_path / "a.tar.gz").rename(tmp_path / "e/a.tar.gz")
    shutil.copy(tmp_path / "b.tar", tmp_path / "f.tar.gz")
    for name, say in (("b.tar", "compressed"), ("c.tar", "whole, plain .tar"),
                      ("d.tar", "no pictures"), ("e", "no pictures in it.*plain .tar"),
                      ("f.tar.gz", "compressed"), ("gone.tar", "No such file")):
        with pytest.raises(BadInput, match=say) as e:
            Folder(str(tmp_path / name), 32)
        assert "\n" not in str(e.value)
