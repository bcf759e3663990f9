"""metrics/: SSIM in plain loops; sets by closed forms, by hand, and one by one."""
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tinyldm.metrics import __main__ as program
from tinyldm.metrics.features import open_features
from tinyldm.metrics.images import gradient_length, psnr, ssim
from tinyldm.metrics.sets import Moments, Statistics, compare, frechet, precision_recall


def random_images(seed=0, n=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 16, 20, generator=generator) * 2 - 1


# ---- image by image

def naive_ssim(x, y):
    """Wang et al. 2004 Eq. (13)-(16) of one image, every window by itself, in float64.

    Variances are about the window's own mean; pixels are in 0..255, as in the paper.
    """
    offsets = torch.arange(-5.0, 6.0, dtype=torch.float64)
    gaussian = (-offsets ** 2 / (2 * 1.5 ** 2)).exp()
    window = gaussian[:, None] * gaussian
    window = window / window.sum()
    c_1 = (0.01 * 255) ** 2
    c_2 = (0.03 * 255) ** 2
    x = (x.double() + 1) * 127.5
    y = (y.double() + 1) * 127.5

    values = []
    for c in range(x.shape[0]):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                a = x[c, i:i + 11, j:j + 11]
                b = y[c, i:i + 11, j:j + 11]
                mean_a = (window * a).sum()
                mean_b = (window * b).sum()
                var_a = (window * (a - mean_a) ** 2).sum()
                var_b = (window * (b - mean_b) ** 2).sum()
                cov = (window * (a - mean_a) * (b - mean_b)).sum()
                luminance = 2 * mean_a * mean_b + c_1
                luminance = luminance / (mean_a ** 2 + mean_b ** 2 + c_1)
                structure = (2 * cov + c_2) / (var_a + var_b + c_2)
                values.append(luminance * structure)
    return torch.stack(values).mean().float()


@pytest.mark.parametrize("noise", [0.05, 0.5, 3])
def test_ssim_is_the_mean_over_windows_of_its_formula(noise):
    x = random_images()
    y = (x + noise * random_images(1)).clamp(-1, 1)
    expected = torch.stack([naive_ssim(a, b) for a, b in zip(x, y)])
    assert expected[0] != expected[1]
    assert_close(ssim(x, y), expected, atol=1e-5, rtol=0)


def test_ssim_of_an_image_with_itself_is_1_and_else_less():
    x = random_images()
    assert_close(ssim(x, x), torch.ones(2))
    assert (ssim(x, x + 0.1 * random_images(1)) < 0.999).all()
    inverted = ssim(0.5 + 0.3 * x, 0.5 - 0.3 * x)
    assert (inverted < 0).all()


def test_ssim_is_symmetric_in_range_and_clamps_only_the_reconstruction():
    x = random_images()
    y = random_images(1)
    assert_close(ssim(x, y), ssim(y, x))
    assert_close(ssim(x, 3 * y), ssim(x, (3 * y).clamp(-1, 1)))
    assert not torch.allclose(ssim(3 * y, x), ssim((3 * y).clamp(-1, 1), x))


@pytest.mark.parametrize("a,b", [(0.5, 0.7), (-0.3, -0.1), (-0.4, 0.4), (-1.0, -0.98)])
def test_ssim_of_even_greys_is_its_first_factor(a, b):
    """No variance: (2 p q + c_1) / (p^2 + q^2 + c_1), for greys p and q in 0..1."""
    x = torch.zeros(1, 3, 12, 14)
    p = (a + 1) / 2
    q = (b + 1) / 2
    expected = (2 * p * q + 0.0001) / (p * p + q * q + 0.0001)
    assert_close(ssim(x + a, x + b), torch.tensor([expected]), atol=2e-4, rtol=0)


def test_psnr_of_a_known_error():
    """10 log10(2^2 / mse): 0.2 is 20 dB, 0.02 is 40 dB, half the pixels 3 dB more."""
    x = 0.5 * random_images(n=3)
    y = x + torch.tensor([0.2, -0.02, 0]).view(3, 1, 1, 1)
    y[2, :, :8] += 0.2
    assert_close(psnr(x, y), torch.tensor([20, 40, 20 + 10 * math.log10(2)]))


def test_psnr_clamps_only_the_reconstruction():
    ones = torch.ones(3, 3, 16, 20)
    assert_close(psnr(ones, ones + 9), torch.full((3,), torch.inf))
    assert_close(psnr(3 * ones, 9 * ones), torch.full((3,), 0.0))


def test_the_gradient_of_a_slope():
    """3 per pixel to the right and 4 downwards: 5."""
    i = torch.arange(4.0)[:, None]
    j = torch.arange(6.0)
    slope = (4 * i + 3 * j).expand(2, 3, 4, 6)
    assert_close(gradient_length(slope), torch.full((2, 3, 3, 5), 5.0))


# ---- moments and the Frechet distance

def gaussian_moments(mean, cov):
    """The moments of a Gaussian."""
    moments = Moments()
    moments.n = 2
    moments.mean = torch.as_tensor(mean, dtype=torch.float64)
    moments.scatter = torch.as_tensor(cov, dtype=torch.float64)
    return moments


def moments_of(f, part=10_000):
    moments = Moments()
    for rows in f.split(part):
        moments.add(rows)
    return moments


def random_rows(n, d, seed=0, dtype=torch.float64):
    """Rows whose columns are correlated and of unequal variances."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return (rows @ mix + seed).to(dtype)


@pytest.mark.parametrize("part", [1, 7, 100, 300])
def test_moments_do_not_depend_on_the_parts(part):
    f = random_rows(300, 6)
    moments = moments_of(f, part)
    assert_close(moments.cov, torch.cov(f.T), rtol=1e-12, atol=1e-12)
    assert_close(moments.mean, f.mean(0), rtol=1e-12, atol=1e-12)
    assert moments.n == 300


def test_moments_of_float32_far_from_0_lose_nothing():
    f = random_rows(300, 6, dtype=torch.float32) + 1e4
    assert_close(moments_of(f, 7).cov, torch.cov(f.double().T), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("m_a,s_a,m_b,s_b", [
    (0, 1, 3, 1), (1, 2, 1, 5), (-2, 0.5, 1.5, 3),
])
def test_frechet_in_one_dimension(m_a, s_a, m_b, s_b):
    """(m_a - m_b)^2 + (s_a - s_b)^2 for N(m, s^2)."""
    a = gaussian_moments([m_a], [[s_a * s_a]])
    b = gaussian_moments([m_b], [[s_b * s_b]])
    expected = float((m_a - m_b) ** 2 + (s_a - s_b) ** 2)
    assert_close(frechet(a, b), expected)


def test_frechet_of_covariances_with_common_axes_is_the_sum_over_them():
    """Diagonal ones, and the same rotated: the sum of (m_a - m_b)^2 + (s_a - s_b)^2."""
    mean = torch.tensor([1.0, 2, 3, 0], dtype=torch.float64)
    s = torch.tensor([1.0, 0.1, 2, 0], dtype=torch.float64)
    u = torch.tensor([0.5, 3, 2, 1], dtype=torch.float64)
    expected = float((mean.square() + (s - u).square()).sum())

    a = gaussian_moments(mean, (s * s).diag())
    b = gaussian_moments(0 * mean, (u * u).diag())
    assert_close(frechet(a, b), expected)

    q = torch.linalg.qr(random_rows(4, 4)).Q
    a = gaussian_moments(q @ mean, q * s ** 2 @ q.T)
    b = gaussian_moments(0 * mean, q * u ** 2 @ q.T)
    assert_close(frechet(a, b), expected)


def test_frechet_of_2_x_2_covariances_that_do_not_commute():
    """tr (A B)^(1/2) = (tr A B + 2 det(A B)^(1/2))^(1/2), by Cayley-Hamilton."""
    a = torch.tensor([[4, 1], [1, 1]], dtype=torch.float64)
    b = torch.tensor([[1, -0.8], [-0.8, 2]], dtype=torch.float64)
    trace_of_root = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    expected = float(a.trace() + b.trace() - 2 * trace_of_root)
    distance = frechet(gaussian_moments([0, 0], a), gaussian_moments([0, 0], b))
    assert_close(distance, expected)


def test_frechet_by_eigenvalues_of_the_product():
    """tr (C_a C_b)^(1/2) is the sum of the roots of the eigenvalues of C_a C_b."""
    f = random_rows(400, 20)
    g = random_rows(300, 20, 1)
    eigenvalues = torch.linalg.eigvals(torch.cov(f.T) @ torch.cov(g.T)).real
    between_means = (f.mean(0) - g.mean(0)).square().sum()
    expected = between_means + f.var(0).sum() + g.var(0).sum()
    expected = expected - 2 * eigenvalues.sqrt().sum()
    distance = frechet(moments_of(f), moments_of(g))
    assert_close(distance, expected.item(), rtol=1e-6, atol=0)


def test_frechet_of_fewer_images_than_features():
    """tr (C_a C_b)^(1/2) is the sum of the singular values of X_a X_b^T.

    X are the centred rows, divided such that C = X^T X.
    """
    f = random_rows(12, 50)
    g = random_rows(9, 50, 1)
    x_a = (f - f.mean(0)) / (len(f) - 1) ** 0.5
    x_b = (g - g.mean(0)) / (len(g) - 1) ** 0.5
    trace_of_root = torch.linalg.svdvals(x_a @ x_b.T).sum()
    between_means = (f.mean(0) - g.mean(0)).square().sum()
    expected = between_means + x_a.square().sum() + x_b.square().sum()
    expected = expected - 2 * trace_of_root
    distance = frechet(moments_of(f), moments_of(g))
    assert_close(distance, expected.item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [9, 400])
def test_frechet_is_symmetric_0_for_equal_sets_and_a_shift_squared(n):
    f = random_rows(n, 20)
    a = moments_of(f)
    b = moments_of(random_rows(n, 20, 1))
    assert abs(frechet(a, moments_of(f, 7))) < 1e-9 * a.cov.trace()
    assert_close(frechet(a, b), frechet(b, a))
    assert_close(frechet(a, moments_of(f + 3)), 20 * 9.0)


# ---- precision and recall

def line(*at):
    return torch.tensor(at, dtype=torch.float64)[:, None]


def test_precision_and_recall_by_hand():
    """Balls reach to the first, then to the second neighbour.

    Reals at 0, 1, 2, 4 have radii 1, 1, 1, 2, then 2, 1, 2, 3.
    Fakes at -.5, 0, 6.5, 9.5 have radii .5, .5, 3, 3, then 7, 6.5, 6.5, 9.5.
    """
    real = line(0, 1, 2, 4)
    fake = line(-0.5, 0, 6.5, 9.5)
    assert precision_recall(real, fake, 1) == (2 / 4, 2 / 4)
    assert precision_recall(real, fake, 2) == (3 / 4, 1)


def test_precision_and_recall_of_equal_and_of_disjoint_sets():
    f = random_rows(50, 5)
    assert precision_recall(f, f) == (1, 1)
    assert precision_recall(f, f + 100) == (0, 0)


def test_a_missing_mode_lowers_only_recall():
    a, b, fake = random_rows(600, 3).split(200)
    precision, recall = precision_recall(torch.cat([a, b]), fake)
    assert precision > 0.8
    assert recall > 0.8
    precision, recall = precision_recall(torch.cat([a, b + 100]), fake)
    assert precision > 0.8
    assert 0.4 < recall <= 0.5


def naive_share(f, centres, k):
    """The share of rows of f in a ball around a centre, one by one."""
    radii = []
    for row in centres:
        distances = (centres - row).norm(dim=1).sort().values
        radii.append(distances[k])                          # distances[0] is to itself
    radii = torch.stack(radii)
    return sum(bool(((centres - row).norm(dim=1) <= radii).any()) for row in f) / len(f)


def test_precision_and_recall_one_by_one():
    """With more rows than are compared at once; k is 3 by default."""
    real = random_rows(1100, 3)
    fake = 1.3 * random_rows(200, 3)
    by_k = {}
    for k in (3, 1):
        expected = naive_share(fake, real, k), naive_share(real, fake, k)
        by_k[k] = precision_recall(real, fake, k)
        assert by_k[k] == pytest.approx(expected, abs=1e-9)
    assert precision_recall(real, fake) == by_k[3] != by_k[1]


# ---- statistics of a set

class RowNet:
    """Stands for a network: an "image" is d features, then log-probabilities."""

    def __init__(self, d, name="rows"):
        self.d = d
        self.name = name

    def __call__(self, x):
        has_classes = x.shape[1] > self.d
        p = x[:, self.d:].exp() if has_classes else None
        return x[:, :self.d], p


def inception_score(p, part=64):
    """The score of images of which nothing but p(y | x) is known."""
    return Statistics(RowNet(0), p.log().split(part)).inception_score.value()


@pytest.mark.parametrize("K", [2, 7, 10])
def test_inception_score_of_certain_classes(K):
    """K classes, each certain and as frequent, in turn or one after the other: K."""
    certain = torch.eye(K)
    for p in (certain.repeat(300, 1), certain.repeat_interleave(300, 0)):
        assert_close(inception_score(p), float(K), rtol=0.005, atol=0)


def test_inception_score_of_images_that_are_all_alike_is_1():
    for p in (torch.eye(10)[:1], torch.rand(1, 7).softmax(1)):
        assert_close(inception_score(p.repeat(50, 1)), 1.0)


def test_inception_score_is_the_mean_of_ten_tenths():
    p = random_rows(200, 5).softmax(1)
    tenth = torch.tensor([int(k * (5 ** 0.5 - 1) / 2 % 1 * 10) for k in range(200)])
    scores = []
    for i in range(10):
        part = p[tenth == i]
        kl = (part * (part / part.mean(0)).log()).sum(1)
        scores.append(kl.mean().exp())
    assert_close(inception_score(p), torch.stack(scores).mean().item())
    assert_close(inception_score(p, 7), inception_score(p))


def test_inception_score_of_fewer_than_ten_images():
    """Each of the three is in a tenth of its own, and the empty ones do not count."""
    p = random_rows(3, 5).softmax(1)
    assert_close(inception_score(p), 1.0)


def test_what_is_kept_of_50_000_images():
    """Features of every fifth one, and sums that are no larger than those of 500."""
    f = torch.randn(50_000, 6, generator=torch.Generator().manual_seed(0))
    n_sums = []
    for n, stride in ((500, 1), (50_000, 5)):
        statistics = Statistics(RowNet(3), f[:n].split(64), stride)
        kept = torch.cat(statistics.features)
        assert_close(kept, f[:n:stride, :3], rtol=0, atol=0)
        n_bytes = sum(part.untyped_storage().nbytes() for part in statistics.features)
        assert n_bytes == kept.nbytes

        assert_close(statistics.moments.cov, torch.cov(f[:n, :3].double().T))
        values = vars(statistics.moments) | vars(statistics.inception_score)
        sums = [value for value in values.values() if isinstance(value, torch.Tensor)]
        n_sums.append(sum(value.numel() for value in sums))
    assert len(kept) == 10_000
    assert n_sums[0] == n_sums[1]


@pytest.mark.parametrize("name,d,expected", [
    ("inception", 5, {"fid", "is"}),
    ("inception", 8, {"fid"}),
    ("vgg16", 8, {"fd_vgg16"}),
    ("x", 5, {"fd_x", "is_x"}),
])
def test_figures_are_named_after_their_network(name, d, expected):
    """Only Inception's are FID and IS; a network without classes has no score."""
    statistics = Statistics(RowNet(d, name), random_rows(20, 8).split(6))
    assert compare(statistics, statistics).keys() == expected | {"precision", "recall"}


def test_the_first_set_of_compare_is_the_real_one():
    """The score is the fakes'. Fakes of one of two modes lack recall, not precision."""
    p = torch.eye(2).repeat(100, 1).log()
    features = 100 * p[:, :1].exp() + random_rows(200, 1).float()
    rows = torch.cat([features, p], dim=1)
    both_modes = Statistics(RowNet(1), rows.split(50))
    one_mode = Statistics(RowNet(1), rows[::2].split(50))

    figures = compare(both_modes, one_mode)
    assert figures["precision"] == 1
    assert figures["recall"] == 0.5
    assert_close(figures["is_rows"], 1.0)
    assert_close(compare(one_mode, both_modes)["is_rows"], 2.0, rtol=0.01, atol=0)


def test_autocast_changes_no_feature():
    """The scripts evaluate within it; bfloat16 would shift the figures."""
    net = open_features("shapes", torch.device("cpu"))
    x = random_images(n=8)[..., :16]
    expected = net(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        statistics = Statistics(net, [x])
    assert torch.equal(statistics.features[0], expected)


# ---- the program python -m tinyldm.metrics

PROGRAM = "tinyldm.metrics.__main__"
BRIGHTER = 51                           # levels of 255, by which the fakes are brighter


@pytest.fixture
def two_folders(tmp_path):
    """real/ and fake/ with eight images each, six of which have the same names.

    The names are such that a training set would hold out 38.png and 39.png.
    """
    rng = np.random.default_rng(0)
    real = tmp_path / "real"
    fake = tmp_path / "fake"
    real.mkdir()
    fake.mkdir()
    for i in range(36, 46):
        pixels = rng.integers(0, 204, (20, 24, 3), np.uint8)
        if i >= 38:
            Image.fromarray(pixels).save(real / f"{i}.png")
        if i < 44:
            Image.fromarray(pixels + np.uint8(BRIGHTER)).save(fake / f"{i}.png")
    return real, fake


def figures_in(output, counts="8 real, 8 fake"):
    """The figures that the program prints, by name."""
    text = re.search(counts + r": (.*)", output)[1]
    pairs = [part.split() for part in text.split(" | ")]
    return {name: float(value) for name, value in pairs}


def test_the_program_compares_two_folders(two_folders, cli):
    real, fake = two_folders
    figures = figures_in(cli(PROGRAM, "--real", real, "--fake", fake))
    assert figures.keys() == {"fd_texture", "precision", "recall"}
    assert figures["fd_texture"] > 1

    figures = figures_in(cli(PROGRAM, "--real", real, "--fake", real, "--pairs"))
    assert abs(figures["fd_texture"]) < 1e-6
    assert figures["precision"] == figures["recall"] == 1
    assert figures["psnr"] == math.inf
    assert figures["ssim"] == 1
    assert figures["perceptual_random"] == 0


def test_the_program_pairs_images_by_name(two_folders, cli):
    """Each pair differs by 51 of 255 levels: 20 log10(255 / 51) dB."""
    real, fake = two_folders
    figures = figures_in(cli(PROGRAM, "--real", real, "--fake", fake, "--pairs"))
    assert_close(figures["psnr"], 20 * math.log10(255 / BRIGHTER), atol=0.01, rtol=0)
    assert figures["ssim"] < 0.99
    assert figures["perceptual_random"] > 0


def test_unreadable_images_are_left_out_of_counts_sets_and_pairs(two_folders, cli):
    """No neighbour takes their place: the figures are those of a folder without them."""
    real, fake = two_folders
    for name in ("40.png", "41.png"):
        (fake / name).write_bytes(b"not an image")
    output = cli(PROGRAM, "--real", real, "--fake", fake, "--pairs")
    figures = figures_in(output, "8 real, 6 fake")
    assert f"--fake {fake}: 6 images are compared | 2 left out, unreadable: 40.png (it" in output
    assert output.count("40.png") == output.count("41.png") == 1
    assert "--pairs: 4 images have the same name in both | 2 left out" in output
    assert_close(figures["psnr"], 20 * math.log10(255 / BRIGHTER), atol=0.01, rtol=0)

    for name in ("40.png", "41.png"):
        (fake / name).unlink()
    output = cli(PROGRAM, "--real", real, "--fake", fake, "--pairs")
    assert figures_in(output, "8 real, 6 fake") == figures


@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_unreadable_images_are_named_once_and_the_others_counted(
    two_folders, cli, workers
):
    real, fake = two_folders
    for i in range(10, 20):
        (real / f"{i}.png").write_bytes(b"not an image")
    output = cli(PROGRAM, "--real", real, "--fake", fake, "--workers", workers)
    assert "8 images are compared | 10 left out, unreadable: 10.png (" in output
    assert " and 7 more" in output
    assert "13.png" not in output


def test_images_of_other_shapes_and_sizes_are_counted(two_folders, cli):
    """All are 24 wide and 20 high, but one is as large as the others are made."""
    real, fake = two_folders
    Image.new("RGB", (16, 16)).save(fake / "42.png")
    output = cli(PROGRAM, "--real", real, "--fake", fake, "--size", 16)
    assert f"--real {real}: 8 images are compared | 8 cropped to the centre, as not sq" in output
    assert f"--fake {fake}: 8 images are compared | 7 cropped to the centre, as not sq" in output

    output = cli(PROGRAM, "--real", real, "--fake", fake, "--size", "40x48")
    assert f"--real {real}: 8 images are compared | 8 scaled from 20x24 to 40x48" in output
    assert "1 cropped to the centre, as not in the shape of 40x48" in output
    assert "7 scaled from 20x24 to 40x48" in output


@pytest.mark.parametrize("flags,name", [
    (["--fake", "held-out"], "fd_shapes"),
    (["--fake", "held-out", "--features", "texture"], "fd_texture"),
])
def test_the_built_in_world_is_compared_by_its_own_features(
    two_folders, cli, monkeypatch, flags, name
):
    """A folder that is called like a split is not taken, and the program says so."""
    real, _ = two_folders
    monkeypatch.chdir(real.parent)
    real.rename(real.parent / "held-out")
    flags = ["--real", "./held-out", *flags, "--size", 16, "--n", 8]
    output = cli(PROGRAM, *flags)
    assert name in figures_in(output)
    assert "for the folder here, write ./held-out" in output


def test_the_program_keeps_features_evenly_of_more_than_10_000_images(cli, monkeypatch):
    """Of 10,001 images it keeps those of every second one, in both sets."""
    strides = []

    def statistics(net, images, stride):
        strides.append(stride)
        return Statistics(RowNet(1), [torch.zeros(4, 1)])

    monkeypatch.setattr(program, "Shapes", lambda *args, **kwargs: range(60_000))
    monkeypatch.setattr(program, "Statistics", statistics)
    monkeypatch.setattr(program, "compare", lambda real, fake: {})
    for n in (10_000, 10_001, 50_000):
        cli(PROGRAM, "--real", "train", "--fake", "held-out", "--size", 16, "--n", n)
    assert strides == [1, 1, 2, 2, 5, 5]


def test_bad_input_to_the_program_is_one_line(two_folders, folder, cli):
    real, fake = two_folders
    built_in = ["--fake", "held-out", "--size", 16, "--n", 8, "--pairs"]
    small = folder(3)
    for path in small.glob("*.png"):
        Image.new("RGB", (8, 8)).save(path)
    cases = [
        (["--fake", real / "gone"], "--fake: "),
        (["--fake", fake, "--size", 8], "--size 8"),
        (["--fake", small], f"--fake: {small}: the first image is 8x8, too small"),
        (["--fake", small, "--size", 16], f"--fake {small}: 3 images can be read"),
        (["--fake", small, "--size", 16], "four images"),
        (["--fake", fake, "--n", 3], "--n 3: "),
        (["--fake", "held-out"], "--fake: held-out has images of any size; choose --size"),
        (["--fake", real.parent, "--size", 16, "--pairs"], "--pairs: no image"),
        (built_in, "--pairs: needs"),
    ]
    for flags, message in cases:
        output = cli(PROGRAM, "--real", real, *flags, code=2)
        last_line = output.strip().splitlines()[-1]
        assert last_line.startswith("error: ")
        assert message in last_line


def test_missing_weights_are_one_line(two_folders, tmp_path, cli):
    real, fake = two_folders
    flags = ["--features", "vgg16", "--vgg-weights", tmp_path / "gone.pth"]
    output = cli(PROGRAM, "--real", real, "--fake", fake, *flags, code=2)
    assert output.startswith("error: --vgg-weights: ")
    assert "gone.pth" in output
