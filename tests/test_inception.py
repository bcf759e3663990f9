"""inception.py: torch-fidelity's numbers, the public file's layout, and each step by hand."""
import copy
import io
import json
import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from goldens import close, weights
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm import BadInput
from tinyldm.degrade import to_image
from tinyldm.features import open_features
from tinyldm.inception import URL, Inception, tf_resize

def pseudo_random(net):
    """Weights by goldens.py's recipe, under which activations neither vanish nor explode."""
    rows = []
    for key, v in net.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            gain = key.endswith("running_var") or key.endswith("bn.weight")
            std = .1 if v.ndim == 1 else (2 / v[0].numel()) ** .5 * (.2 if key[:2] == "fc" else 1)
            rows.append({"key": key, "seed": key, "shape": list(v.shape), "std": std, "grid": 4096,
                         "kind": "uniform" if gain else "normal"})
    return weights(json.dumps(rows))


def load_inception(path):
    return open_features(SimpleNamespace(features="inception", inception=path), "cpu")


@pytest.fixture(scope="module")
def net():
    net = Inception()
    net.load_state_dict(pseudo_random(net))
    return net


def test_torch_fidelity_finds_the_same_features_and_probabilities(net):
    """Every 300th and 150th of torch-fidelity 0.4.0's numbers with these weights, for two pictures
    of 40 x 56, a little out of range. torchvision's net has the same, patched as by pytorch-fid."""
    x = np.random.RandomState(0).uniform(-1.1, 1.1, (2, 3, 40, 56)).astype(np.float32)
    features, probabilities = net(torch.from_numpy(x))
    assert features.shape == (2, 2048) and probabilities.shape == (2, 1008)
    close(features[:, ::300], np.array([
        [.04888708, .5419155, .6303884, .0189098, 2.510786, 2.323142, 5.545248],
        [.02627089, .5577343, .4992623, 0, 2.362755, 2.354765, 5.506499]]))
    close(probabilities[:, ::150], 1e-4 * np.array([
        [.2939227, 3.100664, 18.25540, .3905980, 3.652102, 1.476245, 4.626222],
        [.3427577, 3.394919, 18.56146, .4377002, 3.903083, 1.632165, 4.727067]]))


def test_parameters_and_bytes_are_the_public_files(net):
    """torchvision's 27,161,264, less the auxiliary head's 3,326,696, with 1008 classes for 1000;
    and the bar of torch.hub says 91.2M for the file, which is of torch.save's old format."""
    n = sum(p.numel() for p in net.parameters())
    assert n == 27_161_264 - 3_326_696 + 8 * (2048 + 1) == 23_850_960
    file = io.BytesIO()
    torch.save(net.state_dict(), file, _use_new_zipfile_serialization=False)
    assert round(len(file.getvalue()) / 2 ** 20, 1) == 91.2


def test_keys_and_shapes_are_the_public_files(net):
    state = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert len(state) == 94 * 6 + 2
    assert state | {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Conv2d_1a_3x3.bn.running_mean": (32,),
        "Conv2d_2b_3x3.bn.num_batches_tracked": (), "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
        "Mixed_5b.branch1x1.conv.weight": (64, 192, 1, 1),
        "Mixed_5d.branch5x5_2.conv.weight": (64, 48, 5, 5),
        "Mixed_5c.branch_pool.conv.weight": (64, 256, 1, 1),
        "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
        "Mixed_6a.branch3x3dbl_3.bn.bias": (96,),
        "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.bn.running_var": (192,),
        "fc.weight": (1008, 2048), "fc.bias": (1008,)} == state


def test_frozen_in_eval_mode_and_in_float32(net):
    x = torch.full((1, 3, 8, 8), .3, dtype=torch.bfloat16, requires_grad=True)
    got = net(x)
    assert_close(got, net(x.float()), rtol=0, atol=0)
    assert not any(y.requires_grad for y in got)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def by_hand(x, h, w, offset=0.):
    """Output i, j from the four pixels about its place, in float64; offset .5: by torch's rule."""
    rows, columns = x.shape
    out = torch.zeros(h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            y = max((i + offset) * rows / h - offset, 0)
            z = max((j + offset) * columns / w - offset, 0)
            for r, a in ((int(y), 1 - y % 1), (int(y) + 1, y % 1)):
                for c, b in ((int(z), 1 - z % 1), (int(z) + 1, z % 1)):
                    out[i, j] += a * b * x[min(r, rows - 1), min(c, columns - 1)]
    return out


@pytest.mark.parametrize("h,w", [(11, 23), (3, 5), (4, 30), (7, 9), (1, 1)])
def test_tensorflows_resize_by_hand(h, w):
    """Up, down, each way and as it is, from 7 x 9; torch's rule adds half pixels and is another."""
    x = torch.rand(2, 3, 7, 9, generator=torch.Generator().manual_seed(0)) * 255
    got = tf_resize(tf_resize(x, w).mT, h).mT
    assert_close(got[1, 2].double(), by_hand(x[1, 2], h, w), rtol=0, atol=1e-3)
    torchs = F.interpolate(x, (h, w), mode="bilinear")
    assert_close(torchs[1, 2].double(), by_hand(x[1, 2], h, w, .5), rtol=0, atol=1e-3)
    assert torch.allclose(got, torchs, atol=1) == ((h, w) == (7, 9))


def test_the_net_sees_a_pngs_8_bits_less_128_over_128(net):
    """299 x 299 is not resized: what comes to the first layer is the png's pixels."""
    seen, x = [], torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2.6 - 1.3
    hook = net.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    net(x)
    hook.remove()
    pixels = torch.from_numpy(np.array(to_image(x[0]))).permute(2, 0, 1)
    assert pixels.unique().numel() == 256
    assert_close(seen[0][0], (pixels.float() - 128) / 128, rtol=0, atol=0)


def pooled(block, h):
    """The last branch of a block, whose pool comes before a convolution."""
    return block(h)[:, -block.branch_pool.conv.out_channels:]


@pytest.mark.parametrize("name", ["5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"])
def test_average_pools_do_not_count_their_padding(net, name):
    """What is the same everywhere stays so; with the padding's zeros the border would differ."""
    block = copy.deepcopy(getattr(net, f"Mixed_{name}"))
    h = torch.full((1, block.branch_pool.conv.in_channels, 4, 5), 3.)
    got = pooled(block, h)
    assert_close(got, got[:, :, 1:2, 1:2].expand_as(got))
    block.branchpool = nn.AvgPool2d(3, 1, 1)
    got = pooled(block, h)
    assert not torch.allclose(got, got[:, :, 1:2, 1:2].expand_as(got), rtol=.01)


def test_the_last_blocks_pool_is_a_maximum(net):
    """In 7c the largest of each place and its neighbours within the map; in 7b still their mean."""
    for block, largest in ((net.Mixed_7b, False), (net.Mixed_7c, True)):
        c = block.branch_pool.conv.in_channels
        h = torch.rand(1, c, 4, 5, generator=torch.Generator().manual_seed(0))
        near = F.pad(h, (1, 1, 1, 1), value=torch.nan).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
        most = near.nan_to_num(-torch.inf).amax(4)
        assert_close(pooled(block, h), block.branch_pool(most if largest else near.nanmean(4)))


def test_probabilities_sum_to_1_and_ignore_the_bias(net):
    """IS takes softmax(W f): neither the first code of IS nor torch-fidelity adds fc's bias."""
    net, x = copy.deepcopy(net), torch.rand(2, 3, 16, 16) * 2 - 1
    features, p = net(x)
    assert_close(p.sum(1), torch.ones(2))
    assert_close(p.log(), (features @ net.fc.weight.T).log_softmax(1), atol=1e-4, rtol=1e-4)
    net.fc.bias += 10 * torch.randn(1008)
    assert_close(net(x)[1], p, rtol=0, atol=0)


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_comes_back(net, tmp_path, counters, zipped):
    """With and without BatchNorm's counters, in both of torch.save's formats."""
    state = net.state_dict()
    for key in [k for k in state if k.endswith("num_batches_tracked")]:
        state[key].fill_(7)
        if not counters:
            del state[key]
    torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    got = load_inception(str(tmp_path / "net.pth"))
    assert not got.training and not any(p.requires_grad for p in got.parameters())
    assert_close({k: got.state_dict()[k] for k in state}, dict(state), rtol=0, atol=0)


def test_without_a_path_the_public_file_is_fetched_and_its_hash_checked(net, monkeypatch):
    def fetch(url, **flags):
        assert url == URL and url.startswith("https://") and url.endswith("-6726825d.pth")
        assert flags["check_hash"] is True and flags["weights_only"] is True
        return net.state_dict()
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    assert_close(load_inception(None).fc.weight, net.fc.weight)

    def offline(url, **flags):
        raise OSError("no internet")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(BadInput, match="https://.*--inception PATH"):
        load_inception(None)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("what", ["gone", "empty", "text", "evil", "list", "less", "more", "1000"])
def test_what_is_no_state_dict_of_it_is_bad_input(net, tmp_path, monkeypatch, what):
    """One line that names the flag and the file that is wanted; code in a pickle does not run."""
    monkeypatch.chdir(tmp_path)
    state = net.state_dict()
    if what in ("empty", "text"):
        (tmp_path / "net.pth").write_bytes(b"" if what == "empty" else b"not a checkpoint")
    elif what != "gone":
        less = {k: v for k, v in state.items() if k != "Mixed_7c.branch_pool.bn.weight"}
        torch.save({"evil": Evil(), "list": [1, 2], "less": less,
                    "more": state | {"AuxLogits.fc.bias": torch.zeros(1)},
                    "1000": state | {"fc.bias": torch.zeros(1000)}}[what], "net.pth")
    with pytest.raises(BadInput, match=r"net\.pth.*pt_inception-2015-12-05.*--inception PATH") as e:
        load_inception("net.pth")
    assert "\n" not in str(e.value) and not os.path.exists("pwned")


@pytest.mark.filterwarnings("ignore:.*jit")
def test_torchscript_is_refused_as_what_it_is(tmp_path):
    """NVIDIA's inception-2015-12-05.pt is such a file. torch's own warning about it is not seen."""
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "net.pt"))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(BadInput, match=r"net\.pt .*TorchScript.*--inception PATH"):
            load_inception(str(tmp_path / "net.pt"))
    assert not seen
