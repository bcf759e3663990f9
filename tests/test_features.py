"""metrics/features.py: what ShapesNet and Texture see; other networks."""
import pytest
import torch
from texture import blurred as blurred_by_gaussian, measure, photographs
from torch.nn import functional as F
from torch.testing import assert_close

from tinyldm.data.shapes import Shapes
from tinyldm.errors import BadInput
from tinyldm.metrics.features import KINDS, SHAPESNET, VGGFeatures, open_features
from tinyldm.metrics.sets import Statistics, compare
from tinyldm.perceptual import VGG16

CPU = torch.device("cpu")


def images_and_kinds(data):
    """All images (n, 3, 32, 32) of a data set, and the kinds of objects in each."""
    images = torch.stack([data[i]["image"] for i in range(len(data))])
    kinds = []
    for i in range(len(data)):
        things = data.scene(i)[0]
        kinds.append({KINDS.index((t.colour, t.shape, t.size)) for t in things})
    return images, kinds


@pytest.fixture(scope="module")
def net():
    return open_features("shapes", CPU)


@pytest.fixture(scope="module")
def world():
    return images_and_kinds(Shapes(384, seed=1))


def test_shapesnet_is_small_and_frozen(net):
    assert SHAPESNET.stat().st_size < 200_000
    assert net.name == "shapes"
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("side", [16, 32, 50])
def test_shapesnet_returns_112_features_and_56_probabilities(net, side):
    features, p = net(torch.zeros(2, 3, side, side))
    assert features.shape == (2, 112)
    assert p.shape == (2, 56) == (2, len(KINDS))
    assert_close(p.sum(1), torch.ones(2))


def test_shapesnet_features_have_std_1_in_its_world(net, world):
    images, _ = world
    assert_close(net(images)[0].std(0), torch.ones(112), atol=0.2, rtol=0)


def test_shapesnet_recognises_the_kinds(net, world):
    """The most probable of the 56 kinds is in the image, also in held-out scenes."""
    held_out = images_and_kinds(Shapes(128, split="held-out"))
    for images, kinds in (world, held_out):
        p = net(images)[1]
        are_right = []
        p_of_present = []
        for row, present in zip(p, kinds):
            are_right.append(int(row.argmax()) in present)
            p_of_present.append(float(row[list(present)].sum()))
        assert sum(are_right) > 0.6 * len(images)
        assert sum(p_of_present) > 0.45 * len(images)


# ---- fd_shapes measures what is wrong with images

def blurred(x, k):
    padded = F.pad(x, (k // 2,) * 4, mode="replicate")
    return F.avg_pool2d(padded, k, 1)


def noisy(x, std):
    return x + std * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def without(images, kinds, *words):
    """The images in which no object has any of these words in its kind."""
    keep = []
    for present in kinds:
        named = {word for kind in present for word in KINDS[kind]}
        keep.append(not named & set(words))
    return images[keep]


@pytest.fixture(scope="module")
def fd(net, world):
    """fd(images): the distance to the first half of the world."""
    real = Statistics(net, world[0][:192].split(64))

    def distance(images):
        return compare(real, Statistics(net, images.split(64)))["fd_shapes"]

    return distance


def test_fd_shapes_of_the_same_images_is_0(fd, world):
    assert abs(fd(world[0][:192].flip(0))) < 1e-6


@pytest.mark.parametrize("wrong", ["blur", "noise", "missing kinds", "channels"])
def test_fd_shapes_rises_with_what_is_wrong(fd, world, wrong):
    """It is small for other images of the world, and larger for worse ones."""
    other = world[0][192:]
    kinds = world[1][192:]
    worse_and_worse = {
        "blur": [blurred(other, k) for k in (3, 5, 9)],
        "noise": [noisy(other, std) for std in (0.3, 0.5, 0.8)],
        "missing kinds": [
            without(other, kinds, "red"),
            without(other, kinds, "red", "circle"),
        ],
        "channels": [other.roll(1, 1)],
    }
    distances = [fd(other)] + [fd(images) for images in worse_and_worse[wrong]]
    assert distances == sorted(distances)
    assert distances[-1] > 2 * distances[0]


def test_a_few_images_of_the_world_lack_recall(net, world):
    images = world[0]
    real = Statistics(net, images[:192].split(64))
    few = images[192:202].repeat(12, 1, 1, 1)
    figures = compare(real, Statistics(net, few.split(64)))
    assert figures["precision"] > 0.5
    assert figures["recall"] < 0.2


# ---- texture, for all other images

@pytest.fixture(scope="module", params=[32, 64])
def orders(request):
    """What tests/texture.py measures on made-up photographs, of two sizes."""
    return measure(*photographs(240, request.param))


@pytest.mark.parametrize("wrong", ["blur", "noise", "tint", "missing kinds"])
def test_fd_texture_rises_with_what_is_wrong_with_photographs(orders, wrong):
    distances = [row[0] for row in orders[wrong]]
    assert distances == sorted(distances)
    assert distances[-1] > 5 * distances[0]


def test_precision_and_recall_of_texture(orders):
    """Noise and blur look like no photograph; a missing kind is missed, the others look well."""
    _, precision, recall = orders["noise"][0]
    assert min(precision, recall) > 0.7
    for wrong in ("noise", "blur"):
        assert orders[wrong][-1][1] < precision / 3
    _, precision_of_one, recall_of_one = orders["missing kinds"][-1]
    assert precision_of_one > 0.7
    assert recall_of_one < 0.6 * recall


def test_texture_of_few_fakes_is_still_in_order():
    """With 64 samples, as many as training evaluates by default."""
    net = open_features("auto", CPU)
    images = photographs(564, 32)[0]
    real = Statistics(net, images[:500].split(64))
    fakes = images[500:]
    distances = []
    for fake in (fakes, blurred_by_gaussian(fakes, 1), blurred_by_gaussian(fakes, 2)):
        distances.append(compare(real, Statistics(net, [fake]))["fd_texture"])
    assert distances == sorted(distances)


@pytest.mark.parametrize("side,n_features", [(16, 102), (32, 126), (256, 198)])
def test_texture_has_24_features_for_each_scale(side, n_features):
    """Grey images and RGBA have them, too; an even image has no detail at all."""
    net = open_features("texture", CPU)
    for channels in (1, 3, 4):
        features, p = net(torch.ones(2, channels, side, side + 4))
        assert features.shape == (2, n_features)
        assert p is None
    no_detail = torch.tensor(net.NO_DETAIL).log() / net.DETAIL_STD
    assert_close(features[:, 54:], no_detail.expand(2, n_features - 54))


def test_texture_of_a_slope_and_of_a_curve_by_hand():
    """Brightness rises by 0.01 to the right, and curves by 0.002 downwards.

    At scale s, differences are 2^s times as large, and second ones 4^s times.
    """
    net = open_features("texture", CPU)
    places = torch.arange(32.0)
    slope = 0.01 * places
    curve = 0.001 * places[:, None] ** 2
    image = (slope + curve - 0.6).expand(1, 3, 32, 32)
    features = net(image)[0][0, 54:].view(3, 2, 2, 2, 3)    # scale, axis, order, mean or rms
    size = (features * net.DETAIL_STD).exp() - net.NO_DETAIL

    of_brightness = size[..., 0]
    assert_close(size[..., 1:], torch.zeros(3, 2, 2, 2, 2), atol=1e-6, rtol=0)
    for scale in range(3):
        down, right = of_brightness[scale]
        assert_close(right[0], torch.full((2,), 0.01 * 2 ** scale / 2), atol=1e-6, rtol=1e-4)
        assert_close(right[1], torch.zeros(2), atol=1e-6, rtol=0)
        assert_close(down[1], torch.full((2,), 0.002 * 4 ** scale / 4), atol=1e-6, rtol=1e-3)
        assert down[0, 1] > down[0, 0]          # the rms of what varies is above its mean


def test_auto_is_shapes_in_the_built_in_world_alone():
    assert open_features("auto", CPU, built_in=True).name == "shapes"
    assert open_features("auto", CPU).name == "texture"


# ---- the networks with public weights

def test_vgg16_features_are_the_means_of_relu5_3_of_standardised_images():
    """By torchvision's mean and std of pixels in [0, 1]; any weights will do."""
    torch.manual_seed(0)
    vgg = VGG16()
    for p in vgg.parameters():
        torch.nn.init.kaiming_normal_(p.data.view(len(p), -1))
    net = VGGFeatures(vgg)
    x = torch.rand(2, 3, 32, 40) * 2 - 1

    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    h = ((x + 1) / 2 - mean) / std
    for layer in vgg.features:
        h = layer(h)
    assert h.shape == (2, 512, 2, 2)
    assert h.min() == 0
    assert h.std() > 0.1

    features, p = net(x)
    assert_close(features, h.mean((2, 3)))
    assert p is None


@pytest.mark.parametrize("kind,file_name", [
    ("vgg16", "vgg16-397923af.pth"),
    ("inception", "pt_inception-2015-12-05-6726825d.pth"),
])
def test_missing_weights_are_bad_input_that_names_the_file(tmp_path, kind, file_name):
    gone = str(tmp_path / "gone.pth")
    with pytest.raises(BadInput, match=f"gone.pth.*{file_name}"):
        open_features(kind, CPU, inception=gone, vgg_weights=gone)
