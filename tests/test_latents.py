"""data.py: the latent cache holds what E says, is resumed, shared, made anew if need be."""
import json
import os

import pytest
import torch
from conftest import TINY_AE, TINY_LDM
from PIL import Image
from torch.testing import assert_close

from tinyldm import BadInput
from tinyldm.autoencoder import AEConfig, Autoencoder, Pixels, Posterior
from tinyldm.data import Folder, Latents, encode, fingerprint
from tinyldm.degrade import Degraded
from tinyldm.shapes import Shapes

@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr("tinyldm.data.SHARD", 16)


def stage_one(seed=0, **kw):
    torch.manual_seed(seed)
    return Autoencoder(AEConfig(3, 8, (1, 2), 1, 2, 4, **kw)).eval().requires_grad_(False)


def length(batch):
    return torch.tensor([len(c) for c in batch["caption"]])


class Watched:
    """A set that notes what it is asked for, and dies at item `dies`."""

    def __init__(self, data, dies=None):
        self.data, self.dies, self.asked = data, dies, []

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        assert i != self.dies
        self.asked.append(i)
        return self.data[i]


def cache(path, data, n=None, ae=None, **kw):
    return Latents(path, ae or stage_one(), data, n or len(data), 0, "cpu", length, **kw)


def test_rows_are_what_the_encoder_says_of_pictures_and_of_mirrored_ones(tmp_path, folder):
    data, ae = Folder(str(folder(30)), 32, flip=True), stage_one()
    n = len(data)
    ae.z_std.fill_(3.0)
    items = [n + 3, 0, 17, 3, 2 * n - 1]
    q, y = cache(tmp_path / "c", data, 2 * n, ae)[items]
    ae.z_std.fill_(1.0)
    want = ae.encode(torch.stack([data[i]["image"] for i in items]))
    assert_close(q.mean, want.mean, rtol=2e-3, atol=1e-4)
    assert_close(q.logvar, want.logvar, rtol=0, atol=4e-3)
    assert q.mean.dtype == torch.float32 and (q.mean[0] - q.mean[3]).abs().max() > 0.01
    assert y.tolist() == [len(data.captions()[i % n]) for i in items]


@pytest.mark.parametrize("kind", ["kl", "vq", "pixels"])
def test_std_over_all_shards_is_the_posteriors(tmp_path, kind):
    ae = Pixels() if kind == "pixels" else stage_one(n_codes=8 if kind == "vq" else None)
    made = cache(tmp_path, Shapes(50, 16), ae=ae)
    assert len(made.shards) == 4 and len(made.shards[3]["mean"]) == 2
    (q, _), = encode(ae, Shapes(50, 16), [range(50)], 0, "cpu", length)
    want = Posterior(q.mean.double(), q.logvar.double()).std()
    assert_close(made.std(), want, rtol=1e-9, atol=0)
    if kind != "kl":
        z = made[[5]][0].sample(torch.full((1, *q.mean.shape[1:]), 1e9))
        assert_close(z[0], q.mean[5], rtol=1e-3, atol=1e-4)


def test_a_killed_run_goes_on_at_its_last_whole_shard(tmp_path):
    data = Shapes(50, 16)
    with pytest.raises(AssertionError):
        cache(tmp_path / "c", Watched(data, dies=40))
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["000000.pt", "000001.pt"]
    rest = Watched(data)
    made, whole = cache(tmp_path / "c", rest), cache(tmp_path / "whole", data)
    assert rest.asked == list(range(32, 50))
    (a, y_a), (b, y_b) = made[range(50)], whole[range(50)]
    assert (a.mean == b.mean).all() and (a.logvar == b.logvar).all() and (y_a == y_b).all()
    again = Watched(data)
    cache(tmp_path / "c", again)
    assert not again.asked and len(list((tmp_path / "c").iterdir())) == 4


def test_processes_share_the_shards_and_map_the_same_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    data, parts = Shapes(70, 16), [Watched(Shapes(70, 16)) for _ in range(2)]
    with pytest.raises(BadInput, match="No such file"):             # of the other's first shard
        cache(tmp_path / "two", parts[1], rank=1, world=2)
    two, one = cache(tmp_path / "two", parts[0], rank=0, world=2), cache(tmp_path / "one", data)
    assert parts[1].asked == [*range(16, 32), *range(48, 64)]
    assert sorted(parts[0].asked + parts[1].asked) == list(range(70))
    assert (two[range(70)][0].mean == one[range(70)][0].mean).all() and two.std() == one.std()


def test_large_conditions_are_mapped_and_keep_their_type(tmp_path):
    data = Degraded(Shapes(20, 16), "small", 0)

    def both(batch):
        return torch.stack(batch["segmentation"]).to(torch.int32)
    made = Latents(tmp_path, stage_one(), data, 20, 0, "cpu", both)
    y = made[[3, 19]][1]
    assert y.dtype == torch.int32 and (y[1] == data[19]["segmentation"]).all()


def test_the_fingerprint_is_of_weights_pictures_and_flags(folder):
    path = folder(30)

    def of(seed=0, task="text", small=False, size=32, **kw):
        data = Folder(str(path), size, **kw)
        return fingerprint(stage_one(seed), Degraded(data, "small", seed) if small else data, task)
    first = of()
    others = [of(1), of(task="class"), of(size=16), of(flip=True), of(resize=False), of(small=True)]
    assert len({first, *others}) == 7 and of() == first
    scaled = stage_one()
    scaled.z_std.fill_(2.0)
    assert fingerprint(scaled, Folder(str(path), 32), "text") == first
    path = path.rename(path.with_name("moved"))
    assert of() == first
    name = next(r["file_name"] for r in Folder(str(path), 32).rows)
    Image.new("RGB", (48, 40)).save(path / name)
    assert (second := of()) != first
    rows = [json.loads(x) for x in (path / "metadata.jsonl").read_text().splitlines()]
    rows[-1]["text"] = "another"
    (path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert of() not in (first, second)
    assert len({fingerprint(stage_one(), Shapes(*s)) for s in ((9, 16), (9, 32), (9, 16, 1))}) == 3


def test_a_full_disk_and_a_damaged_shard_are_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(BadInput, match="No space left") as e:
        patch.setattr(torch, "save", full)
        cache(tmp_path / "c", Shapes(20, 16))
    assert "\n" not in str(e.value) and not list((tmp_path / "c").glob("*.pt"))
    cache(tmp_path / "c", Shapes(20, 16))
    os.truncate(tmp_path / "c/000001.pt", 500)
    with pytest.raises(BadInput, match="000001.pt"):
        cache(tmp_path / "c", Shapes(20, 16))


def test_runs_share_a_cache_and_train_as_without_one(tmp_path, folder, cli):
    run = ["--data", folder(40), "--size", 16, "--steps", 2, "--flip"]
    cli("train_ae.py", *TINY_AE, *run, "--out", tmp_path / "ae")
    flags = ["train_ldm.py", *TINY_LDM, *run, "--ae", tmp_path / "ae/ckpt.pt"]
    says = [cli(*flags, *more, "--out", tmp_path / out) for out, *more in (
        "a", ("b", "--seed", 1), ("c", "--no-cache-latents"), ("d", "--task", "uncond"))]
    assert ["encoding" in said for said in says] == [True, False, True, True]
    assert len(list((tmp_path / "latents").iterdir())) == 2
    logs = [[json.loads(x) for x in (tmp_path / k / "log.jsonl").read_text().splitlines()]
            for k in "abc"]
    a, b, c = (sum(x.get("gnorm", 0) for x in log) for log in logs)
    assert abs(a / c - 1) < 2e-3 < abs(a / b - 1)
    assert abs(logs[0][0]["z_std"] / logs[2][0]["z_std"] - 1) < 2e-3
