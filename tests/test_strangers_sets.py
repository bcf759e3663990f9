"""Folders, archives, captions, boxes and label maps as people have them (data/rows.py)."""
import io
import json
import os
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from tinyldm.data import files as files_module
from tinyldm.data.dataset import ListDataset
from tinyldm.data.files import Files
from tinyldm.data.folder import Folder
from tinyldm.data.images import load_rgb, upright_size
from tinyldm.data.loader import load_batches
from tinyldm.data.text import decode_text, text_lines
from tinyldm.data.tokenizer import encode, train_tokenizer
from tinyldm.errors import BadInput


def jpeg(size=(48, 40), exif=None, kind="JPEG") -> bytes:
    """An image file of noise."""
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (6, 5, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR)
    how = {} if exif is None else {"exif": exif}
    image.save(file, kind, **how)
    return file.getvalue()


IMAGE = jpeg()


def make_folder(path, files):
    """Write {name: bytes, text, or rows of a metadata.jsonl} into a folder."""
    for name, data in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(as_bytes(data))
    return path


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, as_bytes(data))
    return path


def make_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            data = as_bytes(data)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def as_bytes(data):
    if isinstance(data, list):
        data = "".join(json.dumps(row) + "\n" for row in data)
    return data if isinstance(data, bytes) else data.encode()


def images(*names):
    return dict.fromkeys(names, IMAGE)


def opened(path, split="all", **how):
    """The data set, which must not warn of anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Folder(str(path), 32, split, **how)


def names(data):
    return [row["file_name"] for row in data.rows]


CLASSES = images("cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg")


# ---- what is an image, a label, a set

def test_hidden_files_are_never_looked_at(tmp_path):
    """Nor those of Finder: they are no images, no classes, and not even left out."""
    hidden = images("cat/._0.jpg", "cat/.checkpoints/a.jpg", ".thumbnails/a.jpg")
    finder = images("__MACOSX/cat/._0.jpg", "__MACOSX/dog/0.jpg")
    files = CLASSES | hidden | finder
    for path in (
        make_folder(tmp_path / "folder", files),
        make_zip(tmp_path / "set.zip", files),
        make_tar(tmp_path / "set.tar", files),
    ):
        data = opened(path)
        assert len(data) == 4
        assert data.label_names == ("cat", "dog")
        assert len(data.summary()) == 1


def test_links_are_followed_once(tmp_path):
    """A link to a folder is a folder; one that leads back, or nowhere, is no end."""
    elsewhere = make_folder(tmp_path / "elsewhere", images("a.jpg", "b.jpg"))
    path = make_folder(tmp_path / "set", images("cat/0.jpg"))
    os.symlink(elsewhere, path / "dog")
    os.symlink(path, path / "cat/again")
    os.symlink(tmp_path / "gone.jpg", path / "cat/gone.jpg")
    data = opened(path)
    assert sorted(names(data)) == ["cat/0.jpg", "dog/a.jpg", "dog/b.jpg"]
    assert data.files.left_out == {"broken links": 1}


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    path = make_folder(tmp_path / "set", CLASSES)
    scandir = os.scandir

    def refusing(folder):
        if str(folder).endswith("dog/") or str(folder).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(BadInput, match="set/dog: cannot be read: Permission denied"):
        opened(path)


@pytest.mark.parametrize("suffix", [".zip", ".ZIP", ".tar", ".TAR"])
def test_archives_are_recognised_in_any_case(tmp_path, suffix):
    make = make_zip if suffix.lower() == ".zip" else make_tar
    assert opened(make(tmp_path / f"set{suffix}", CLASSES)).label_names == ("cat", "dog")
    if make is make_tar:
        assert len(opened(tmp_path)) == 4


def test_a_lone_folder_around_everything_is_the_set_itself(tmp_path):
    """Its name is no class, and its metadata counts."""
    inner = {f"pics/{name}": data for name, data in CLASSES.items()}
    rows = [{"file_name": f"{k}.jpg", "text": f"t{k}", "label": "ab"[k]} for k in range(2)]
    described = images("pics/0.jpg", "pics/1.jpg") | {"pics/metadata.jsonl": rows}
    for name, make in (("f", make_folder), ("s.zip", make_zip), ("s.tar", make_tar)):
        data = opened(make(tmp_path / f"classes-{name}", inner))
        assert data.label_names == ("cat", "dog")

        data = opened(make(tmp_path / f"described-{name}", described))
        assert data.captions() == ["t0", "t1"]
        assert data.label_names == ("a", "b")


def test_a_zip_with_backslashes_has_folders(tmp_path):
    files = {name.replace("/", "\\"): data for name, data in CLASSES.items()}
    data = opened(make_zip(tmp_path / "set.zip", files))
    assert data.label_names == ("cat", "dog")
    assert data[0]["image"].shape == (3, 32, 32)


@pytest.mark.parametrize("folders", [("train", "val"), ("Train", "test", "validation")])
def test_splits_are_no_classes(tmp_path, folders):
    files = {}
    for split in folders:
        files |= {f"{split}/{name}": data for name, data in CLASSES.items()}
    path = make_folder(tmp_path / "set", files)
    train = opened(path, "train")
    held_out = opened(path, "held-out")
    assert train.label_names == held_out.label_names == ("cat", "dog")
    assert all(name.startswith(folders[0]) for name in names(train))
    assert len(train) == 4
    assert len(held_out) == 4 * (len(folders) - 1)


def test_only_held_out_folders_are_an_error(tmp_path):
    path = make_folder(tmp_path / "set", images("test/cat/0.jpg", "val/dog/0.jpg"))
    with pytest.raises(BadInput, match="folders say that all of its 2 images are held out"):
        opened(path, "train")


def test_the_name_of_a_shard_is_no_class(tmp_path):
    """Neither as a file, nor as the folder of the same name in it."""
    shards = tmp_path / "shards"
    for k in range(2):
        make_tar(shards / f"{k:05}.tar", images(f"{k:05}/a.jpg", f"{k:05}/b.jpg"))
        make_tar(tmp_path / f"classes/{k}.tar", {f"{k}-{n}": d for n, d in CLASSES.items()})
    assert opened(shards).label_names == ()
    with pytest.raises(BadInput, match="00000.tar/00000/a.jpg has no label"):
        opened(shards).require_field("label")

    by_class = tmp_path / "by-class"
    make_tar(by_class / "0.tar", CLASSES)
    make_tar(by_class / "1.tar", CLASSES)
    assert opened(by_class).label_names == ("cat", "dog")


def test_metadata_in_a_tar_is_read(tmp_path):
    rows = [{"file_name": "a.jpg", "text": "one"}]
    path = make_tar(tmp_path / "set.tar", images("a.jpg", "b.jpg") | {"metadata.jsonl": rows})
    data = opened(path)
    assert data.captions() == ["one"]
    assert data.files.left_out == {"images that metadata.jsonl does not name": 1}


def test_captions_of_metadata_and_classes_of_folders_come_together(tmp_path):
    """But where metadata names some classes, folders name none."""
    rows = [{"file_name": name, "text": name} for name in CLASSES]
    path = make_folder(tmp_path / "both", CLASSES | {"metadata.jsonl": rows})
    assert opened(path).label_names == ("cat", "dog")
    assert opened(path).captions() == list(CLASSES)

    rows[0]["label"] = "tiger"
    path = make_folder(tmp_path / "own", CLASSES | {"metadata.jsonl": rows})
    assert opened(path).label_names == ("tiger",)


def test_a_folder_of_images_beside_metadata_is_no_class(tmp_path):
    rows = [{"file_name": f"images/{k}.jpg", "text": "a"} for k in range(2)]
    files = images("images/0.jpg", "images/1.jpg") | {"metadata.jsonl": rows}
    assert opened(make_folder(tmp_path / "set", files)).label_names == ()


def test_what_is_not_read_is_counted(tmp_path):
    """By suffix, whatever it is; what belongs to an image is not left out."""
    used = images("a.jpg", "b.jfif", "c.jpe") | {"a.txt": "a caption", "b.cls": "b"}
    unused = {"d.heic": b"", "e.HEIC": b"", "f.avif": b"", "b.txt.bak": "", "README": ""}
    data = opened(make_folder(tmp_path / "set", used | unused | {"notes.txt": "?"}))
    assert names(data) == ["a.jpg", "b.jfif", "c.jpe"]
    expected = {".heic": 2, ".avif": 1, ".bak": 1, "without a suffix": 1, ".txt": 1}
    assert data.files.left_out == expected
    assert "left out: 2 .heic, " in data.summary()[1]

    only_unread = make_folder(tmp_path / "none", {"d.heic": b"", "e.tar.gz": b""})
    with pytest.raises(BadInput, match=r"no images in it \(but 1 \.heic, 1 \.gz\); images are"):
        opened(only_unread)


def test_the_summary_names_what_was_found(tmp_path):
    rows = [
        {"file_name": f"{k}.jpg", "text": "a", "label": f"kind {k % 25}", "mask": "m.png",
         "boxes": [["thing", 0, 0, 9, 9]]}
        for k in range(50)
    ]
    files = {f"{k}.jpg": IMAGE for k in range(50)} | {"m.png": IMAGE, "metadata.jsonl": rows}
    line, = opened(make_folder(tmp_path / "set", files)).summary()
    n_held_out = len(opened(tmp_path / "set", "held-out"))
    assert line == (
        f"{tmp_path}/set: 50 images, {n_held_out} of them held out | "
        "50 with a class, 25 classes: kind 0, kind 1, kind 10, kind 11, kind 12, kind 13, "
        "kind 14, kind 15, kind 16, kind 17, kind 18, kind 19, kind 2, kind 20, kind 21, "
        "kind 22, kind 23, kind 24, kind 3, kind 4, ... | "
        "50 captions | 50 label maps | 50 with boxes, 1 class: thing"
    )


def test_the_only_image_is_trained_on(tmp_path):
    """Also if the hash of its name says that it is held out."""
    for k in range(40):
        path = make_folder(tmp_path / str(k), images(f"{k}.jpg"))
        assert len(opened(path, "train")) == 1
        assert len(opened(path, "held-out")) == 0


# ---- types and encodings

BAD_VALUES = [float("nan"), {"en": "a dog"}, True, 1.5, [], ["a", 1]]


@pytest.mark.parametrize("value", [*BAD_VALUES, 7])
def test_captions_are_strings_or_lists_of_strings(tmp_path, value):
    rows = [{"file_name": "a.jpg", "text": "fine"}, {"file_name": "b.jpg", "text": value}]
    path = make_folder(tmp_path / "set", images("a.jpg", "b.jpg") | {"metadata.jsonl": rows})
    with pytest.raises(BadInput, match="set: metadata.jsonl line 2: the caption .* neither"):
        opened(path)


@pytest.mark.parametrize("value", BAD_VALUES)
def test_labels_are_strings_or_whole_numbers(tmp_path, value):
    rows = [{"file_name": "a.jpg", "label": 3}, {"file_name": "b.jpg", "label": value}]
    path = make_folder(tmp_path / "set", images("a.jpg", "b.jpg") | {"metadata.jsonl": rows})
    with pytest.raises(BadInput, match="set: metadata.jsonl line 2: the label .* neither"):
        opened(path)
    (path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "label": 3.0}')
    assert opened(path).label_names == ("3",)


def test_each_epoch_takes_one_of_several_captions(tmp_path):
    """It follows from seed, epoch and index; all captions are learned from."""
    said = ["a bird", "a red bird", "a bird on a branch"]
    rows = [{"file_name": f"{k}.jpg", "text": said if k else "one"} for k in range(3)]
    files = images("0.jpg", "1.jpg", "2.jpg") | {"metadata.jsonl": rows}
    path = make_folder(tmp_path / "set", files)
    data = opened(path, seed=5)
    assert data.captions() == ["one", *said, *said]
    taken = [data.caption(i, i % 3) for i in range(60)]
    assert taken == [data[i]["caption"] for i in range(60)]
    assert taken == [opened(path, seed=5).caption(i, i % 3) for i in range(60)]
    assert taken != [opened(path, seed=6).caption(i, i % 3) for i in range(60)]
    assert set(taken[::3]) == {"one"}
    assert set(taken[1::3]) == set(taken[2::3]) == set(said)
    assert taken[1::3] != taken[2::3]

    listed = ListDataset([{"image": torch.zeros(3, 8, 8), "caption": said}])
    assert {listed[i]["caption"] for i in range(30)} == set(said)


def test_training_from_the_cache_sees_all_captions(tmp_path, cli):
    """The cache has the latents; the captions are those of each epoch."""
    said = ["bird", "wing"]
    rows = [{"file_name": "0.jpg", "text": said}, {"file_name": "1.jpg", "text": said}]
    files = images("0.jpg", "1.jpg") | {"metadata.jsonl": rows}
    path = make_folder(tmp_path / "set", files)
    states = []
    for out, how in (("cached", "--cache-latents"), ("fresh", "--no-cache-latents")):
        cli("train_ldm.py", "--ae", "none", "--data", path, "--size", "16", "--batch", "2",
            "--steps", "4", "--eval-n", "0", how, "--out", tmp_path / out / "run",
            "--z-std", "0.5", "--ch", "16", "--n-token", "4", "--d-ctx", "16")
        checkpoint = torch.load(tmp_path / out / "run/ckpt.pt", weights_only=True)
        states.append(checkpoint["nets"]["tau"])
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-3, rtol=0)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1251", "latin-1"])
@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_text_in_another_encoding_is_refused_by_name(tmp_path, encoding, name):
    text = "a cat" if encoding == "utf-16-le" else "рыжая кошка"
    if encoding == "latin-1":
        text = "Bär"
    row = json.dumps({"file_name": "a.jpg", "text": text}, ensure_ascii=False)
    data = (row if name.endswith("jsonl") else text).encode(encoding)
    path = make_folder(tmp_path / "set", images("a.jpg") | {name: data})
    with pytest.raises(BadInput, match=f"set: {name} is not UTF-8 text; save it as UTF-8"):
        opened(path)


def test_a_byte_order_mark_is_no_text():
    assert decode_text("\ufeffa cat".encode()) == "a cat"
    assert decode_text("кошка".encode()) == "кошка"


def test_lines_end_at_line_feeds_only():
    assert text_lines("one\u2028two\x85three\x0bfour\r\nfive\rsix\n") == [
        "one\u2028two\x85three\x0bfour", "five\rsix", ""]


def test_metadata_with_other_separators_in_captions(tmp_path):
    row = json.dumps({"file_name": "a.jpg", "text": "one\u2028two"}, ensure_ascii=False)
    path = make_folder(tmp_path / "set", images("a.jpg") | {"metadata.jsonl": row})
    assert opened(path).captions() == ["one\u2028two"]


def test_a_label_column_that_no_image_has_is_refused(tmp_path):
    rows = [{"file_name": "a.jpg", "kind": "cat"}]
    path = make_folder(tmp_path / "set", images("a.jpg") | {"metadata.jsonl": rows})
    assert opened(path, label_column="kind").label_names == ("cat",)
    message = "no image has the label column 'sort'; there are: file_name, kind"
    with pytest.raises(BadInput, match=message):
        opened(path, label_column="sort")
    (path / "metadata.jsonl").unlink()
    with pytest.raises(BadInput, match="there are: none, as there is no metadata"):
        opened(path, label_column="kind")


# ---- boxes and maps

def with_boxes(tmp_path, boxes):
    """An image of 80 x 64 with boxes."""
    rows = [{"file_name": "a.jpg", "boxes": boxes}]
    files = {"a.jpg": jpeg((80, 64)), "metadata.jsonl": rows}
    return opened(make_folder(tmp_path / "set", files))


@pytest.mark.parametrize("box,message", [
    ([0.25, 0.25, 0.75, 0.75], "in 0..1 .are these shares"),
    ([0, 0, 1, 1], "in 0..1 .are these shares"),
    ([40, 30, 20, 20], "ends before it begins .are these x, y, width, height"),
    ([10, 10, 10, 20], "ends before it begins"),
    ([100, 100, 200, 200], "lies outside its image of 80x64"),
    ([-20, 0, -10, 10], "lies outside its image of 80x64"),
    ([0, 0, True, 10], "corners that are no numbers"),
    (["0", "0", "5", "5"], "corners that are no numbers"),
])
def test_boxes_of_another_format_are_refused_by_line(tmp_path, box, message):
    with pytest.raises(BadInput, match=f"metadata.jsonl line 1: .*{message}") as error:
        with_boxes(tmp_path, [["thing", *box]]).require_field("boxes")
    assert "boxes are [[class, x0, y0, x1, y1], ...] in pixels" in str(error.value)


def test_boxes_that_reach_beyond_the_image_are_clipped_and_counted(tmp_path):
    data = with_boxes(tmp_path, [["thing", -8, 0, 40, 32], ["thing", 8, 0, 40, 99]])
    with pytest.warns(UserWarning, match="2 boxes reach beyond their images and are clipped"):
        data.require_field("boxes")
    first = data[0]["boxes"][0]
    torch.testing.assert_close(first, torch.tensor([0, 0, 0, 0.5, 0.5]))


def test_boxes_are_compared_with_the_upright_image(tmp_path):
    """EXIF data turn an image of 80 x 64 into one of 64 x 80."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = [{"file_name": "a.jpg", "boxes": [["thing", 0, 70, 10, 79]]}]
    files = {"a.jpg": jpeg((80, 64), exif), "metadata.jsonl": rows}
    opened(make_folder(tmp_path / "set", files)).require_field("boxes")


def png_map(labels):
    file = io.BytesIO()
    Image.fromarray(labels).save(file, "PNG")
    return file.getvalue()


def test_a_map_of_another_shape_is_refused(tmp_path):
    rows = [{"file_name": "a.jpg", "mask": "m.png"}]
    files = {"a.jpg": jpeg((80, 60)), "metadata.jsonl": rows}
    path = make_folder(tmp_path / "set", files | {"m.png": png_map(np.zeros((50, 200), "u1"))})
    with pytest.raises(BadInput, match="m.png is 200x50 .* image a.jpg is 80x60"):
        opened(path)[0]
    (path / "m.png").write_bytes(png_map(np.zeros((30, 40), "u1")))
    assert opened(path)[0]["segmentation"].shape == (32, 32)


@pytest.mark.filterwarnings("ignore:.*taken as upright")
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_map_as_stored_is_turned_with_its_image(tmp_path, orientation):
    """The stored image is white where its map is 1; both are turned alike."""
    white = np.zeros((48, 96), np.uint8)
    white[:24, :48] = 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(white * 255).convert("RGB").save(file, "PNG", exif=exif)
    labels = white
    if orientation < 5:
        # The shape does not tell a stored map from an upright one, so it must be upright.
        upright = Image.fromarray(white)
        if orientation > 1:
            upright = upright.transpose(TURNED[orientation])
        labels = np.array(upright)
    files = {"a.png": file.getvalue(), "m.png": png_map(labels)}
    rows = [{"file_name": "a.png", "mask": "m.png"}]
    item = opened(make_folder(tmp_path / "set", files | {"metadata.jsonl": rows}))[0]
    assert torch.equal(item["segmentation"], (item["image"][0] > 0).long())
    assert 0 < item["segmentation"].sum() < 32 * 32


TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
}


# ---- images

def saved(image, kind="TIFF"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_greys_of_floats_are_scaled_by_what_they_are(tmp_path):
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(64, 0)
    path = make_folder(tmp_path / "set", {"a.tif": saved(Image.fromarray(ramp))})
    image = opened(path)[0]["image"]
    assert image.min() < -0.95
    assert image.max() > 0.95


@pytest.mark.parametrize("pixels", [
    np.full((64, 64), 300, np.float32),
    np.full((64, 64), -0.5, np.float32),
    np.full((64, 64), np.nan, np.float32),
    np.full((64, 64), 70_000, np.int32),
])
def test_greys_without_a_known_range_are_skipped_by_name(tmp_path, pixels):
    files = {"a.tif": saved(Image.fromarray(pixels)), "b.jpg": IMAGE}
    data = opened(make_folder(tmp_path / "set", files))
    with pytest.warns(UserWarning, match="a.tif is skipped: its pixels are numbers in"):
        assert torch.equal(data[0]["image"], data[1]["image"])


def test_an_image_of_a_line_is_skipped_by_name(tmp_path):
    line = saved(Image.new("RGB", (500, 1)), "PNG")
    data = opened(make_folder(tmp_path / "set", {"a.png": line, "b.jpg": IMAGE}))
    with pytest.warns(UserWarning, match="a.png is skipped: it is 500x1"):
        data[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_is_named_once(tmp_path, capfd, workers):
    """Over several epochs, and whichever process loads it."""
    files = images(*(f"{k}.jpg" for k in range(6))) | {"3.jpg": b"no image"}
    data = opened(make_folder(tmp_path / "set", files))
    order = [[k, (k + 1) % 6] for k in range(6)] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: print("warned:", message, flush=True)
        for _ in range(2):
            for _ in load_batches(data, order, workers):
                pass
    assert capfd.readouterr().out.count("warned: 3.jpg is skipped") == 1


def test_kept_lists_know_what_was_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(files_module, "KEEP_FROM", 1)
    monkeypatch.setattr(files_module, "LIST_FOLDER", tmp_path / "lists")
    path = make_folder(tmp_path / "set", images("a.jpg") | {"b.heic": b""})
    first = Files(path)
    second = Files(path)
    assert first.rows() == second.rows()
    assert first.left_out == second.left_out == {".heic": 1}
    assert list((tmp_path / "lists").iterdir())


# ---- what other programs write

def test_captions_belong_to_the_image_that_is_shown(tmp_path):
    """Where another image takes the place of an unreadable one, its captions come with it."""
    rows = [{"file_name": f"{k}.jpg", "text": [f"{k} a", f"{k} b"]} for k in range(3)]
    files = images("1.jpg", "2.jpg") | {"0.jpg": b"no image", "metadata.jsonl": rows}
    data = Folder(str(make_folder(tmp_path / "set", files)), 32, "all")
    with pytest.warns(UserWarning, match="0.jpg is skipped"):
        items = [data[i] for i in range(9)]
    for i, item in enumerate(items):
        assert item["row"] == (i % 3 or 1)
        assert item["caption"].startswith(f"{item['row']} ")
        assert data.caption(i, item["row"]) == item["caption"]


def test_a_turned_square_says_that_its_map_is_taken_as_upright(tmp_path):
    """Its shape does not show whether the map is turned as the file is."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rows = [{"file_name": "a.jpg", "mask": "m.png"}]
    files = {"a.jpg": jpeg((64, 64), exif), "m.png": png_map(np.zeros((64, 64), "u1"))}
    data = opened(make_folder(tmp_path / "set", files | {"metadata.jsonl": rows}))
    with pytest.warns(UserWarning, match="EXIF data turn a.jpg, .* taken as upright") as found:
        data[0]
        data[0]
    assert len(found) == 1


@pytest.mark.parametrize("written", ["./cat/0.jpg", "cat\\0.jpg", "cat/../cat/0.jpg"])
def test_names_in_metadata_as_other_programs_write_them(tmp_path, written):
    rows = [{"file_name": written, "text": "a cat"}]
    path = make_folder(tmp_path / "set", CLASSES | {"metadata.jsonl": rows})
    assert names(opened(path)) == ["cat/0.jpg"]


def test_suffixes_in_upper_case_belong_to_their_image(tmp_path):
    files = {"A.JPG": IMAGE, "A.TXT": "a cat", "A.CLS": "cat"}
    data = opened(make_folder(tmp_path / "set", files))
    assert data.captions() == ["a cat"]
    assert data.label_names == ("cat",)
    assert not data.files.left_out


def test_a_file_that_ends_like_metadata_is_left_out(tmp_path):
    data = opened(make_folder(tmp_path / "set", CLASSES | {"old-metadata.jsonl": "{}"}))
    assert data.files.left_out == {".jsonl": 1}


def test_small_images_are_found_by_their_whole_name_too(tmp_path):
    """A set with train/ alone, and small images of train/ and val/."""
    path = make_folder(tmp_path / "set", images("train/0.jpg", "train/1.jpg"))
    small = make_folder(
        tmp_path / "small", images("train/0.jpg", "train/1.jpg", "val/0.jpg"))
    opened(path, small=str(small)).require_field("small")


def test_tars_within_folders_have_the_classes_and_splits_of_these(tmp_path):
    make_tar(tmp_path / "split/train/000.tar", CLASSES)
    make_tar(tmp_path / "split/val/000.tar", images("cat/5.jpg"))
    train = opened(tmp_path / "split", "train")
    assert train.label_names == ("cat", "dog")
    assert len(train) == 4
    assert len(opened(tmp_path / "split", "held-out")) == 1

    make_tar(tmp_path / "classes/cat/000.tar", images("0.jpg"))
    make_tar(tmp_path / "classes/dog/000.tar", images("0.jpg"))
    assert opened(tmp_path / "classes").label_names == ("cat", "dog")


def test_splits_beside_other_images_are_refused(tmp_path):
    files = images("train2017/cat/0.jpg", "val2017/cat/0.jpg")
    path = make_folder(tmp_path / "set", files)
    assert opened(path, "train").label_names == ()
    make_folder(path, images("docs/figure.jpg"))
    with pytest.raises(BadInput, match="splits like train and val, but .* in docs, too"):
        opened(path)


def test_a_folder_around_the_images_of_each_split_is_no_class(tmp_path):
    path = make_folder(tmp_path / "set", images("train/images/0.jpg", "valid/images/0.jpg"))
    assert opened(path).label_names == ()


def test_a_class_that_is_only_held_out_is_not_shown_as_learned(tmp_path):
    path = make_folder(tmp_path / "set", images("train/cat/0.jpg", "train/dog/0.jpg",
                                                "val/owl/0.jpg"))
    train = opened(path, "train")
    assert train.label_names == ("cat", "dog", "owl")
    assert train.seen_labels() == [0, 1]


def test_one_class_in_two_encodings_is_one_class(tmp_path):
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    rows = [{"file_name": "a.jpg", "label": nfc}, {"file_name": "b.jpg", "label": f" {nfd}"}]
    path = make_folder(tmp_path / "set", images("a.jpg", "b.jpg") | {"metadata.jsonl": rows})
    assert opened(path).label_names == (nfc,)
    path = make_folder(tmp_path / "folders", images(f"{nfc}/a.jpg", f"{nfd}/b.jpg", "x/c.jpg"))
    assert opened(path).label_names == (nfc, "x")

    rows = [{"file_name": f"{nfc}.jpg"}]
    path = make_folder(tmp_path / "names", images(f"{nfd}.jpg") | {"metadata.jsonl": rows})
    assert len(opened(path)) == 1


def test_a_zip_without_the_flag_of_utf8_is_read_as_utf8(tmp_path):
    path = make_zip(tmp_path / "set.zip", images("café/0.jpg", "thé/0.jpg"))
    data = bytearray(path.read_bytes())
    for place, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = data.find(place)
        while start >= 0:
            data[start + offset + 1] &= ~0x08
            start = data.find(place, start + 4)
    path.write_bytes(data)
    found = opened(path)
    assert found.label_names == ("café", "thé")
    assert found[0]["image"].shape == (3, 32, 32)


@pytest.mark.parametrize("row,message", [
    ({"file_name": "a.jpg"}, "line 2: a.jpg has a line already; several captions are a list"),
    ({"file_name": "b.heic"}, "line 2: file_name b.heic is no image that can be read"),
    ({"file_name": "a.jpg", "label": " "}, "line 2: the label is empty"),
])
def test_lines_that_cannot_be_meant_are_refused(tmp_path, row, message):
    rows = [{"file_name": "a.jpg"}, row]
    files = images("a.jpg", "b.heic") | {"metadata.jsonl": rows}
    with pytest.raises(BadInput, match=message):
        opened(make_folder(tmp_path / "set", files))


def test_only_one_column_has_the_classes(tmp_path):
    rows = [{"file_name": "a.jpg", "breed": "poodle", "label": "dog"},
            {"file_name": "b.jpg", "breed": None, "label": "cat"}]
    path = make_folder(tmp_path / "set", images("a.jpg", "b.jpg") | {"metadata.jsonl": rows})
    assert opened(path, label_column="breed").label_names == ("poodle",)


def test_boxes_of_yolo_are_no_captions(tmp_path):
    path = make_folder(tmp_path / "set", images("a.jpg") | {"a.txt": "0 0.5 0.5 0.2 0.3\n"})
    with pytest.raises(BadInput, match="a.txt has boxes in YOLO's format"):
        opened(path)
    (path / "a.txt").write_text("7")
    assert opened(path).captions() == ["7"]


@pytest.mark.parametrize("name", ["0.txt", "deep/metadata.jsonl", "train_metadata.jsonl"])
def test_text_files_that_are_not_read_are_left_out(tmp_path, name):
    rows = [{"file_name": "0.jpg", "label": "a"}]
    files = images("0.jpg") | {"metadata.jsonl": rows, name: "{}"}
    data = opened(make_folder(tmp_path / "set", files))
    assert data.files.left_out == {"." + name.rpartition(".")[2]: 1}


def test_a_link_to_itself_is_a_broken_link(tmp_path):
    path = make_folder(tmp_path / "set", images("0.jpg"))
    os.symlink(path / "x", path / "x")
    assert opened(path).files.left_out == {"broken links": 1}


def test_shares_that_are_rounded_up_are_shares(tmp_path):
    with pytest.raises(BadInput, match="in 0..1 .are these shares"):
        with_boxes(tmp_path, [["thing", 0.25, 0.25, 1.0000002, 0.75]])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_upright_size_is_that_of_the_loaded_image(kind):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = jpeg((80, 40), exif, kind)
        assert upright_size(data) == load_rgb(data).size


def test_big_endian_greys_of_16_bits_are_read(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(">u2")[None].repeat(64, 0)
    image = Image.frombytes("I;16B", (64, 64), ramp.tobytes())
    data = opened(make_folder(tmp_path / "set", {"a.tif": saved(image)}))[0]["image"]
    assert data.min() < -0.95
    assert data.max() > 0.95


def test_joiners_change_words(tmp_path):
    """Those of zero width, in Persian and Hindi."""
    for pair in (("نامه\u200cای", "نامهای"), ("क्\u200dष", "क्ष")):
        tokenizer = train_tokenizer(list(pair))
        ids = encode(tokenizer, list(pair), 6)
        assert not torch.equal(ids[0], ids[1])
