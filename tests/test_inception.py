"""metrics/inception.py: torch-fidelity's numbers, the public file, steps by hand."""
import copy
import io
import json
import os
import warnings

import numpy as np
import pytest
import torch
from goldens import close, weights
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm.data.images import to_image
from tinyldm.errors import BadInput
from tinyldm.metrics.features import open_features
from tinyldm.metrics.inception import URL, Inception, resize_last_axis


def pseudo_random(net):
    """Weights by the recipe of goldens.py; activations neither vanish nor explode."""
    rows = []
    for key, value in net.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        is_gain = key.endswith("running_var") or key.endswith("bn.weight")
        if value.ndim == 1:
            std = 0.1
        else:
            std = (2 / value[0].numel()) ** 0.5
        if key == "fc.weight":
            std = std * 0.2
        rows.append({
            "key": key,
            "seed": key,
            "shape": list(value.shape),
            "std": std,
            "grid": 4096,
            "kind": "uniform" if is_gain else "normal",
        })
    return weights(json.dumps(rows))


def open_inception(path):
    return open_features("inception", torch.device("cpu"), inception=path)


def random_like(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def net():
    net = Inception()
    net.load_state_dict(pseudo_random(net))
    return net


def test_torch_fidelity_has_the_same_features_and_probabilities(net):
    """Every 300th feature and 150th probability of torch-fidelity 0.4.0, same weights.

    There are two images of 40 x 56 pixels, a little out of range. torchvision's network
    has the same numbers if it is patched as pytorch-fid does.
    """
    x = np.random.RandomState(0).uniform(-1.1, 1.1, (2, 3, 40, 56)).astype(np.float32)
    features, probabilities = net(torch.from_numpy(x))
    assert features.shape == (2, 2048)
    assert probabilities.shape == (2, 1008)
    close(features[:, ::300], np.array([
        [.04888708, .5419155, .6303884, .0189098, 2.510786, 2.323142, 5.545248],
        [.02627089, .5577343, .4992623, 0, 2.362755, 2.354765, 5.506499]]))
    close(probabilities[:, ::150], 1e-4 * np.array([
        [.2939227, 3.100664, 18.25540, .3905980, 3.652102, 1.476245, 4.626222],
        [.3427577, 3.394919, 18.56146, .4377002, 3.903083, 1.632165, 4.727067]]))


# ---- the layout of the public file

def test_the_number_of_parameters_is_the_public_files(net):
    """torchvision's 27,161,264, less an auxiliary head of 3,326,696; 8 classes more."""
    n = sum(p.numel() for p in net.parameters())
    assert n == 27_161_264 - 3_326_696 + 8 * (2048 + 1) == 23_850_960


def test_the_number_of_bytes_is_the_public_files(net):
    """torch.hub's bar says 91.2M for the file, which is in torch.save's old format."""
    file = io.BytesIO()
    torch.save(net.state_dict(), file, _use_new_zipfile_serialization=False)
    assert round(file.tell() / 2 ** 20, 1) == 91.2


def test_keys_and_shapes_are_the_public_files(net):
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    known = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Conv2d_1a_3x3.bn.running_mean": (32,),
        "Conv2d_2b_3x3.bn.num_batches_tracked": (),
        "Conv2d_4a_3x3.conv.weight": (192, 80, 3, 3),
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
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert len(shapes) == 94 * 6 + 2
    assert shapes | known == shapes


# ---- each step

def test_it_is_frozen_in_eval_mode_and_in_float32(net):
    x = torch.full((1, 3, 8, 8), 0.3, dtype=torch.bfloat16, requires_grad=True)
    outputs = net(x)
    assert_close(outputs, net(x.float()), rtol=0, atol=0)
    assert not any(output.requires_grad for output in outputs)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def bilinear_by_hand(x, h, w, offset=0.0):
    """Output (i, j) from the four pixels around its place, in float64.

    offset: 0 is TensorFlow 1's rule, 0.5 is torch's.
    """
    rows, columns = x.shape
    out = torch.zeros(h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            y = max((i + offset) * rows / h - offset, 0)
            z = max((j + offset) * columns / w - offset, 0)
            for row, weight_y in ((int(y), 1 - y % 1), (int(y) + 1, y % 1)):
                for column, weight_z in ((int(z), 1 - z % 1), (int(z) + 1, z % 1)):
                    pixel = x[min(row, rows - 1), min(column, columns - 1)]
                    out[i, j] += weight_y * weight_z * pixel
    return out


@pytest.mark.parametrize("h,w", [(11, 23), (3, 5), (4, 30), (7, 9), (1, 1)])
def test_tensorflows_resize_by_hand(h, w):
    """From 7 x 9 up, down, one of each, and to the same size. torch's rule differs."""
    x = random_like((2, 3, 7, 9)) * 255
    resized = resize_last_axis(resize_last_axis(x, w).mT, h).mT
    expected = bilinear_by_hand(x[1, 2], h, w)
    assert_close(resized[1, 2].double(), expected, rtol=0, atol=1e-3)

    by_torch = F.interpolate(x, (h, w), mode="bilinear")
    expected = bilinear_by_hand(x[1, 2], h, w, offset=0.5)
    assert_close(by_torch[1, 2].double(), expected, rtol=0, atol=1e-3)
    is_same_size = (h, w) == (7, 9)
    assert torch.allclose(resized, by_torch, atol=1) == is_same_size


def test_the_network_sees_the_8_bits_of_a_png_less_128_over_128(net):
    """299 x 299 is not resized: what reaches the first layer is the PNG's pixels."""
    x = random_like((1, 3, 299, 299)) * 2.6 - 1.3
    seen = []

    def keep_input(layer, args):
        seen.append(args[0])

    hook = net.Conv2d_1a_3x3.register_forward_pre_hook(keep_input)
    net(x)
    hook.remove()
    pixels = torch.from_numpy(np.array(to_image(x[0]))).permute(2, 0, 1)
    assert pixels.unique().numel() == 256
    assert_close(seen[0][0], (pixels.float() - 128) / 128, rtol=0, atol=0)


def pooled_branch(block, h):
    """The output of a block's last branch: a pool, then a convolution."""
    width = block.branch_pool.conv.out_channels
    return block(h)[:, -width:]


@pytest.mark.parametrize("name", ["5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"])
def test_average_pools_do_not_count_their_padding(net, name):
    """A constant stays constant; with the padding's zeros the border would differ."""
    block = copy.deepcopy(getattr(net, f"Mixed_{name}"))
    h = torch.full((1, block.branch_pool.conv.in_channels, 4, 5), 3.0)
    output = pooled_branch(block, h)
    assert_close(output, output[:, :, 1:2, 1:2].expand_as(output))

    block.pool = nn.AvgPool2d(3, 1, 1)
    output = pooled_branch(block, h)
    inner = output[:, :, 1:2, 1:2].expand_as(output)
    assert not torch.allclose(output, inner, rtol=0.01)


@pytest.mark.parametrize("name,is_maximum", [("Mixed_7b", False), ("Mixed_7c", True)])
def test_only_the_last_blocks_pool_is_a_maximum(net, name, is_maximum):
    """7c takes the largest of a place and its neighbours in the map, 7b their mean."""
    block = getattr(net, name)
    h = random_like((1, block.branch_pool.conv.in_channels, 4, 5))
    padded = F.pad(h, (1, 1, 1, 1), value=torch.nan)
    near = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)    # (1, C, 4, 5, 9)
    expected = near.nan_to_num(-torch.inf).amax(4) if is_maximum else near.nanmean(4)
    assert_close(pooled_branch(block, h), block.branch_pool(expected))


def test_probabilities_sum_to_1_and_ignore_the_bias(net):
    """Neither the first code of IS nor torch-fidelity adds the bias of fc."""
    x = random_like((1, 3, 16, 16)) * 2 - 1
    features, p = net(x)
    assert_close(p.sum(1), torch.ones(1))
    logits = features @ net.fc.weight.T
    assert_close(p.log(), logits.log_softmax(1), atol=1e-4, rtol=1e-4)

    bias = net.fc.bias.clone()
    net.fc.bias += 10 * torch.randn(1008)
    assert_close(net(x)[1], p, rtol=0, atol=0)
    net.fc.bias.copy_(bias)


# ---- loading the public file

@pytest.mark.parametrize("zipped,has_counters", [(True, True), (False, False)])
def test_a_state_dict_comes_back(net, tmp_path, zipped, has_counters):
    """In both of torch.save's formats, with and without BatchNorm's counters."""
    state = dict(net.state_dict())
    for key in list(state):
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
            if not has_counters:
                del state[key]
    torch.save(state, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)

    opened = open_inception(str(tmp_path / "net.pth"))
    assert not opened.training
    assert not any(p.requires_grad for p in opened.parameters())
    found = opened.state_dict()
    assert_close({key: found[key] for key in state}, state, rtol=0, atol=0)


def test_without_a_path_the_public_file_is_fetched_and_checked(net, monkeypatch):
    """Its hash is part of its name."""
    def fetch(url, **options):
        assert url == URL
        assert url.startswith("https://")
        assert url.endswith("-6726825d.pth")
        assert options["check_hash"] is True
        assert options["weights_only"] is True
        return net.state_dict()

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    assert_close(open_inception(None).fc.weight, net.fc.weight)


def test_offline_the_message_names_the_address_and_the_file(monkeypatch):
    def fetch(url, **options):
        raise OSError("no internet")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    with pytest.raises(BadInput, match="https://.*path of pt_inception-2015-12-05"):
        open_inception(None)


class Evil:
    """A pickle that runs a command when it is loaded."""

    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.fixture(scope="module")
def blank_net():
    return Inception()


@pytest.fixture
def public_shapes(blank_net, monkeypatch):
    """A state dict with the public keys and shapes that takes no space: all is 0.

    Files are read into one and the same network: to build one for each takes long.
    """
    monkeypatch.setattr("tinyldm.metrics.features.Inception", lambda: blank_net)
    state = blank_net.state_dict()
    return {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("wrong", [
    "gone", "empty", "text", "evil", "list",
    "a key is missing", "a key too many", "1000 classes",
])
def test_a_file_that_is_not_its_state_dict_is_bad_input(
    public_shapes, tmp_path, monkeypatch, wrong
):
    """One line names the file, and the one that is wanted; no code in a pickle runs."""
    monkeypatch.chdir(tmp_path)
    state = dict(public_shapes)
    if wrong == "a key is missing":
        del state["Mixed_7c.branch_pool.bn.weight"]
    elif wrong == "a key too many":
        state["AuxLogits.fc.bias"] = torch.zeros(1)
    elif wrong == "1000 classes":
        state["fc.bias"] = torch.zeros(1000)

    content = {"evil": Evil(), "list": [1, 2]}.get(wrong, state)
    path = tmp_path / "net.pth"
    if wrong == "empty":
        path.write_bytes(b"")
    elif wrong == "text":
        path.write_bytes(b"not a checkpoint")
    elif wrong != "gone":
        torch.save(content, path)

    message = r"net\.pth.*path of pt_inception-2015-12-05"
    with pytest.raises(BadInput, match=message) as caught:
        open_inception("net.pth")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()


def test_the_right_keys_and_shapes_are_not_bad_input(public_shapes, tmp_path):
    """So each of the wrong files above is refused for what is wrong with it."""
    torch.save(public_shapes, tmp_path / "net.pth")
    assert open_inception(str(tmp_path / "net.pth")).name == "inception"


@pytest.mark.filterwarnings("ignore:.*jit")
def test_torchscript_is_refused_by_its_name(tmp_path):
    """NVIDIA's inception-2015-12-05.pt is such a file. torch's warning is not shown."""
    path = tmp_path / "net.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pytest.raises(BadInput, match=r"net\.pt.*TorchScript"):
            open_inception(str(path))
    assert not shown
