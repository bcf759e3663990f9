"""data/latents.py: a cache holds what E says, is resumed, shared, and made anew when it must."""
import json
import os

import pytest
import torch
from conftest import TINY_AE, TINY_LDM
from PIL import Image
from torch.testing import assert_close

from tinyldm.autoencoder import AEConfig, Autoencoder, Pixels, Posterior
from tinyldm.data.degrade import Degraded
from tinyldm.data.folder import Folder
from tinyldm.data.latents import Latents, encode_dataset, fingerprint
from tinyldm.data.shapes import Shapes
from tinyldm.errors import BadInput


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("tinyldm.data.latents.SHARD", 16)


def stage_one(seed=0, n_codes=None):
    torch.manual_seed(seed)
    config = AEConfig(ch=8, ch_mult=(1, 2), n_res=1, c_z=2, groups=4, n_codes=n_codes)
    return Autoencoder(config).eval().requires_grad_(False)


def caption_lengths(batch):
    """A condition of one number per image."""
    return {"length": torch.tensor([len(caption) for caption in batch["caption"]])}


def cache(path, data, n=None, ae=None, **how):
    ae = ae or stage_one()
    return Latents(path, ae, data, n or len(data), 0, "cpu", caption_lengths, **how)


class Watched:
    """A data set that notes the items it is asked for, and dies at one of them."""

    def __init__(self, data, dies_at=None):
        self.data = data
        self.dies_at = dies_at
        self.asked = []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        assert i != self.dies_at
        self.asked.append(i)
        return self.data[i]


# ---- what a cache holds

def test_rows_are_what_the_encoder_says_of_images_and_of_mirrored_ones(tmp_path, folder):
    """Latents are not divided by z_std, whatever it is when the cache is made."""
    data = Folder(str(folder(30)), 32, flip=True)
    n = len(data)
    ae = stage_one()
    ae.z_std.fill_(3.0)
    items = [n + 3, 0, 17, 3, 2 * n - 1]
    q, y = cache(tmp_path / "latents", data, 2 * n, ae)[items]

    ae.z_std.fill_(1.0)
    wanted = ae.encode(torch.stack([data[i]["image"] for i in items]))
    assert_close(q.mean, wanted.mean, rtol=2e-3, atol=1e-4)
    assert_close(q.logvar, wanted.logvar, rtol=0, atol=4e-3)
    assert q.mean.dtype == torch.float32
    assert (q.mean[0] - q.mean[3]).abs().max() > 0.01
    captions = data.captions()
    assert y["length"].tolist() == [len(captions[i % n]) for i in items]


@pytest.mark.parametrize("kind", ["kl", "vq", "pixels"])
def test_std_over_all_shards_is_the_posteriors(tmp_path, kind):
    if kind == "pixels":
        ae = Pixels()
    else:
        ae = stage_one(n_codes=8 if kind == "vq" else None)
    data = Shapes(50, 16)
    made = cache(tmp_path, data, ae=ae)
    assert len(made.shards) == 4
    assert len(made.shards[3]["mean"]) == 2

    (q, _), = encode_dataset(ae, data, [range(50)], 0, "cpu", caption_lengths)
    wanted = Posterior(q.mean.double(), q.logvar.double()).std()
    assert_close(made.std(), wanted, rtol=1e-9, atol=0)

    # Without a variance, a sample is the mean, whatever the noise.
    if kind != "kl":
        noise = torch.full((1, *q.mean.shape[1:]), 1e9)
        z = made[[5]][0].sample(noise)
        assert_close(z[0], q.mean[5], rtol=1e-3, atol=1e-4)


def test_conditions_keep_their_names_their_types_and_their_values(tmp_path):
    data = Degraded(Shapes(20, 16), "small", 0)

    def maps_and_labels(batch):
        segmentation = torch.stack(batch["segmentation"]).to(torch.int32)
        return {"segmentation": segmentation, "label": torch.tensor(batch["label"])}

    made = Latents(tmp_path, stage_one(), data, 20, 0, "cpu", maps_and_labels)
    _, y = made[[3, 19]]
    assert y.keys() == {"segmentation", "label"}
    assert y["segmentation"].dtype == torch.int32
    assert torch.equal(y["segmentation"][1].long(), data[19]["segmentation"])
    assert y["label"].tolist() == [data[3]["label"], data[19]["label"]]


def test_a_cache_without_conditions(tmp_path):
    made = Latents(tmp_path, stage_one(), Shapes(20, 16), 20, 0, "cpu", lambda batch: {})
    q, y = made[[0, 19]]
    assert q.mean.shape[0] == 2
    assert y == {}


def test_parts_of_a_data_set_are_encoded_in_their_order():
    """Also parts longer than a batch of E, and parts that are no whole number of batches."""
    data = Shapes(200, 16)
    parts = [range(150, 220), range(0, 130)]
    ae = stage_one()
    encoded = list(encode_dataset(ae, data, parts, 0, "cpu", caption_lengths))
    assert len(encoded) == 2
    for part, (q, y) in zip(parts, encoded):
        assert len(q.mean) == len(y["length"]) == len(part)
        last = ae.encode(data[part[-1]]["image"][None])
        assert_close(q.mean[-1:], last.mean, rtol=1e-4, atol=1e-5)
        assert y["length"].tolist() == [len(data[i]["caption"]) for i in part]


# ---- making one

def test_a_killed_run_goes_on_at_its_last_whole_shard(tmp_path):
    data = Shapes(50, 16)
    with pytest.raises(AssertionError):
        cache(tmp_path / "latents", Watched(data, dies_at=40))
    files = sorted(path.name for path in (tmp_path / "latents").iterdir())
    assert files == ["000000.pt", "000001.pt"]

    rest = Watched(data)
    resumed = cache(tmp_path / "latents", rest)
    assert rest.asked == list(range(32, 50))
    unbroken = cache(tmp_path / "unbroken", data)
    (q, y), (wanted_q, wanted_y) = resumed[range(50)], unbroken[range(50)]
    assert torch.equal(q.mean, wanted_q.mean)
    assert torch.equal(q.logvar, wanted_q.logvar)
    assert torch.equal(y["length"], wanted_y["length"])

    again = Watched(data)
    cache(tmp_path / "latents", again)
    assert not again.asked
    assert len(list((tmp_path / "latents").iterdir())) == 4


def test_processes_share_the_shards_and_map_the_same_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    data = Shapes(70, 16)
    parts = [Watched(data), Watched(data)]

    # Here they run one after another, so the second process misses the first one's shards.
    with pytest.raises(BadInput, match="No such file"):
        cache(tmp_path / "two", parts[1], rank=1, world=2)
    two = cache(tmp_path / "two", parts[0], rank=0, world=2)
    one = cache(tmp_path / "one", data)
    assert parts[1].asked == [*range(16, 32), *range(48, 64)]
    assert sorted(parts[0].asked + parts[1].asked) == list(range(70))
    assert torch.equal(two[range(70)][0].mean, one[range(70)][0].mean)
    assert two.std() == one.std()


def test_a_full_disk_and_a_damaged_shard_are_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    folder = tmp_path / "latents"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(BadInput, match="No space left") as error:
            cache(folder, Shapes(20, 16))
    assert "\n" not in str(error.value)
    assert not list(folder.glob("*.pt"))

    cache(folder, Shapes(20, 16))
    os.truncate(folder / "000001.pt", 500)
    with pytest.raises(BadInput, match="000001.pt"):
        cache(folder, Shapes(20, 16))


# ---- which cache a run has

def test_the_fingerprint_is_that_of_weights_items_and_flags(folder):
    path = folder(30)

    def of(seed=0, task="text", small=False, size=32, **how):
        data = Folder(str(path), size, **how)
        if small:
            data = Degraded(data, "small", seed)
        return fingerprint(stage_one(seed), data, task)

    first = of()
    others = [
        of(seed=1), of(task="class"), of(size=16), of(flip=True), of(resize=False),
        of(small=True),
    ]
    assert len({first, *others}) == 7
    assert of() == first

    # z_std does not matter, nor where the folder is.
    scaled = stage_one()
    scaled.z_std.fill_(2.0)
    assert fingerprint(scaled, Folder(str(path), 32), "text") == first
    path = path.rename(path.with_name("moved"))
    assert of() == first

    # An image that is replaced, a caption that is changed.
    name = Folder(str(path), 32).rows[0]["file_name"]
    Image.new("RGB", (48, 40)).save(path / name)
    second = of()
    assert second != first
    lines = (path / "metadata.jsonl").read_text()
    last_line = lines.splitlines()[-1]
    changed = json.dumps(json.loads(last_line) | {"text": "another"})
    (path / "metadata.jsonl").write_text(lines.replace(last_line, changed))
    assert of() not in (first, second)


def test_the_fingerprint_of_the_built_in_world(folder):
    worlds = [Shapes(9, 16), Shapes(9, 32), Shapes(9, 16, 1), Shapes(8, 16)]
    fingerprints = {fingerprint(stage_one(), world) for world in worlds}
    assert len(fingerprints) == 4


def test_runs_share_a_cache_and_train_as_without_one(tmp_path, folder, cli):
    run = ["--data", folder(40), "--size", 16, "--steps", 2, "--flip", "--eval-n", 0]
    cli("train_ae.py", *TINY_AE, *run, "--out", tmp_path / "ae")

    def train(name, *flags):
        """Train stage two -> what it prints, and its log."""
        out = tmp_path / name
        ae = tmp_path / "ae/ckpt.pt"
        output = cli("train_ldm.py", *TINY_LDM, *run, "--ae", ae, *flags, "--out", out)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return output, log

    first, first_log = train("first")
    other_seed, other_seed_log = train("other seed", "--seed", 1)
    uncached, uncached_log = train("uncached", "--no-cache-latents")
    other_task, _ = train("other task", "--task", "uncond")
    made = ["encoding" in output for output in (first, other_seed, uncached, other_task)]
    assert made == [True, False, True, True]
    assert len(list((tmp_path / "latents").iterdir())) == 2

    def gradient(log):
        return sum(line.get("gnorm", 0) for line in log)
    assert gradient(first_log) == pytest.approx(gradient(uncached_log), rel=2e-3)
    assert gradient(first_log) != pytest.approx(gradient(other_seed_log), rel=2e-3)
    assert first_log[0]["z_std"] == pytest.approx(uncached_log[0]["z_std"], rel=2e-3)
