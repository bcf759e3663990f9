"""features.py: what ShapesNet sees of the built-in world, and what is not its business."""
import argparse

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm import BadInput
from tinyldm.features import KINDS, SHAPESNET, VGG16, feature_flags, open_features
from tinyldm.metrics import Statistics, compare
from tinyldm.shapes import Shapes

@pytest.fixture(scope="module")
def net():
    return opened()


@pytest.fixture(scope="module")
def world():
    """-> pictures (384, 3, 32, 32) and, of each, the kinds that are in it."""
    data = Shapes(384, seed=1)
    kinds = [{KINDS.index((t.colour, t.shape, t.size)) for t in data.scene(i)[0]}
             for i in range(len(data))]
    return torch.stack([data[i]["image"] for i in range(len(data))]), kinds


def opened(*flags):
    parser = argparse.ArgumentParser()
    feature_flags(parser)
    return open_features(parser.parse_args(flags), torch.device("cpu"))


def blur(x, k):
    return F.avg_pool2d(F.pad(x, (k // 2,) * 4, mode="replicate"), k, 1)


def noise(x, std):
    return x + std * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def test_shapesnet_is_the_default_small_and_frozen(net):
    assert SHAPESNET.stat().st_size < 200_000 and net.name == "shapes" and not net.training
    assert not any(p.requires_grad for p in net.parameters())
    for side in (16, 32, 50):
        f, p = net(torch.zeros(2, 3, side, side))
        assert f.shape == (2, 112) and p.shape == (2, len(KINDS)) == (2, 56)
        assert_close(p.sum(1), torch.ones(2))


def test_shapesnet_features_have_std_1_in_its_world(net, world):
    assert_close(net(world[0])[0].std(0), torch.ones(112), atol=.2, rtol=0)


def test_shapesnet_tells_the_kinds_apart(net, world):
    """By p, one of 56 kinds, which is most probable is in the picture; held-out scenes, too."""
    held = Shapes(128, split="held-out")
    told = [{KINDS.index((t.colour, t.shape, t.size)) for t in held.scene(i)[0]}
            for i in range(len(held))]
    held = torch.stack([held[i]["image"] for i in range(len(held))])
    for x, kinds in (world, (held, told)):
        p = net(x)[1]
        assert sum(int(v.argmax()) in k for v, k in zip(p, kinds)) > .6 * len(x)
        assert sum(float(v[list(k)].sum()) for v, k in zip(p, kinds)) > .45 * len(x)


def test_fd_shapes_rises_with_what_is_wrong(net, world):
    """0 of the same pictures, little of others of the world; more the worse the pictures are."""
    x, kinds = world
    seen = Statistics(net, x[:192].split(64))

    def fd(y):
        return compare(seen, Statistics(net, y.split(64)))["fd_shapes"]
    other = x[192:]

    def without(*names):
        return other[[all(names[0] not in KINDS[k] and names[-1] not in KINDS[k] for k in ks)
                      for ks in kinds[192:]]]
    assert abs(fd(x[:192].flip(0))) < 1e-6
    for bad in ([blur(other, k) for k in (3, 5, 9)], [noise(other, s) for s in (.3, .5, .8)],
                [without("red"), without("red", "circle")], [other.roll(1, 1)]):
        distances = [fd(other), *map(fd, bad)]
        assert distances == sorted(distances) and distances[-1] > 2 * distances[0], distances


def test_few_of_the_world_lack_recall(net, world):
    x = world[0]
    few = x[192:202].repeat(12, 1, 1, 1)
    told = compare(*(Statistics(net, v.split(64)) for v in (x[:192], few)))
    assert told["precision"] > .5 and told["recall"] < .2


def test_vgg16_features_are_the_means_of_relu5_3_of_standardised_pictures(monkeypatch):
    """By torchvision's mean and std, of pixels in [0, 1]; untrained weights will do."""
    monkeypatch.setattr("tinyldm.perceptual.load_public", lambda *_: None)
    net, x = VGG16("vgg16"), torch.rand(2, 3, 32, 40) * 2 - 1
    for p in net.parameters():
        torch.nn.init.kaiming_normal_(p.view(len(p), -1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([.485, .456, .406], [.229, .224, .225]))
    h = ((x + 1) / 2 - mean) / std
    for layer in net.features:
        h = layer(h)
    assert h.shape == (2, 512, 2, 2) and h.min() == 0 and h.std() > .1
    f, p = net(x)
    assert_close(f, h.mean((2, 3)))
    assert p is None


def test_features_without_their_weights_are_bad_input(tmp_path):
    for kind, flag in (("vgg16", "--vgg-weights"), ("inception", "--inception")):
        with pytest.raises(BadInput, match=flag):
            opened("--features", kind, flag, str(tmp_path / "gone.pth"))
