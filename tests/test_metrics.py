"""metrics.py: SSIM window by window in plain loops; sets by closed forms, by hand, one by one."""
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from tinyldm import metrics
from tinyldm.features import open_features
from tinyldm.metrics import Moments, Statistics, compare, frechet, precision_recall, psnr, ssim

def pictures(seed=0, n=2):
    return torch.rand(n, 3, 16, 20, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def naive_ssim(x, y):
    """Wang et al. 2004 Eq. (13)-(16) of one picture, in float64: every window by itself, with

    variances about the window's own mean; on pixels of 0..255, as the paper has them.
    """
    w = torch.tensor([[math.exp(-(i * i + j * j) / (2 * 1.5 ** 2)) for j in range(-5, 6)]
                      for i in range(-5, 6)], dtype=torch.float64)
    w, c1, c2, out = w / w.sum(), (.01 * 255) ** 2, (.03 * 255) ** 2, []
    for c in range(x.shape[0]):
        for i in range(x.shape[1] - 10):
            for j in range(x.shape[2] - 10):
                a, b = ((v[c, i:i + 11, j:j + 11].double() + 1) * 127.5 for v in (x, y))
                ma, mb = (w * a).sum(), (w * b).sum()
                va, vb = (w * (a - ma) ** 2).sum(), (w * (b - mb) ** 2).sum()
                cov = (w * (a - ma) * (b - mb)).sum()
                out.append((2 * ma * mb + c1) * (2 * cov + c2)
                           / ((ma ** 2 + mb ** 2 + c1) * (va + vb + c2)))
    return torch.stack(out).mean().float()


@pytest.mark.parametrize("noise", [.05, .5, 3])
def test_ssim_is_the_mean_over_windows_of_its_formula(noise):
    x = pictures()
    y = (x + noise * pictures(1)).clamp(-1, 1)
    want = torch.stack([naive_ssim(a, b) for a, b in zip(x, y)])
    assert want[0] != want[1]
    assert_close(ssim(x, y), want, atol=1e-5, rtol=0)


def test_ssim_of_a_picture_with_itself_is_1_and_else_less():
    x = pictures()
    assert_close(ssim(x, x), torch.ones(2))
    assert (ssim(x, x + .1 * pictures(1)) < .999).all()
    assert (ssim(.5 + .3 * x, .5 - .3 * x) < 0).all()           # the other way round


def test_ssim_is_symmetric_in_range_and_clamps_a_reconstruction_only():
    x, y = pictures(), pictures(1)
    assert_close(ssim(x, y), ssim(y, x))
    assert_close(ssim(x, 3 * y), ssim(x, (3 * y).clamp(-1, 1)))
    assert not torch.allclose(ssim(3 * y, x), ssim((3 * y).clamp(-1, 1), x))


@pytest.mark.parametrize("a,b", [(.5, .7), (-.3, -.1), (0., .2), (-.4, .4)])
def test_ssim_of_even_greys_is_its_first_factor(a, b):
    """No variance is left: (2 a b + c1) / (a^2 + b^2 + c1), of greys in 0..1."""
    x = torch.zeros(1, 3, 12, 14)
    p, q = (a + 1) / 2, (b + 1) / 2
    want = (2 * p * q + .0001) / (p * p + q * q + .0001)
    assert_close(ssim(x + a, x + b), torch.tensor([want]), atol=2e-4, rtol=0)


def test_psnr_of_a_known_error_picture_by_picture():
    """10 log10(2^2 / mse): an error of 0.2 is 20 dB, of 0.02 is 40 dB, half of the pixels 3 dB."""
    x = .5 * pictures(n=3)
    y = x + torch.tensor([.2, -.02, 0]).view(3, 1, 1, 1)
    y[2, :, :8] += .2
    assert_close(psnr(x, y), torch.tensor([20, 40, 20 + 10 * math.log10(2)]))
    assert_close(psnr(torch.ones_like(x), x + 9), torch.full((3,), torch.inf))
    assert_close(psnr(0 * x + 3, 0 * x + 9), torch.full((3,), 0.))


def test_gradient_of_a_slope():
    """3 a pixel to the right and 4 downwards: 5."""
    i, j = torch.arange(4.)[:, None], torch.arange(6.)
    assert_close(metrics.gradient((4 * i + 3 * j).expand(2, 3, 4, 6)), torch.full((2, 3, 3, 5), 5.))


# ---- of two sets

def gaussian(mean, cov):
    """Moments as of infinitely many pictures."""
    m = Moments()
    m.n, m.mean, m.scatter = 2, *(torch.as_tensor(v, dtype=torch.float64) for v in (mean, cov))
    return m


def moments(f, part=10_000):
    m = Moments()
    for v in f.split(part):
        m.add(v)
    return m


def rows(n, d, seed=0, dtype=torch.float64):
    """Correlated, of unequal variances."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, generator=g, dtype=torch.float64)
            @ torch.randn(d, d, generator=g, dtype=torch.float64) + seed).to(dtype)


@pytest.mark.parametrize("part", [1, 7, 100, 300])
def test_moments_in_parts_are_those_of_the_whole(part):
    f = rows(300, 6)
    m = moments(f, part)
    assert_close(m.cov, torch.cov(f.T), rtol=1e-12, atol=1e-12)
    assert_close(m.mean, f.mean(0), rtol=1e-12, atol=1e-12)
    assert m.n == 300


def test_moments_of_float32_far_from_0_lose_nothing():
    f = rows(300, 6, dtype=torch.float32) + 1e4
    assert_close(moments(f, 7).cov, torch.cov(f.double().T), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("a,b", [((0, 1), (3, 1)), ((1, 2), (1, 5)), ((-2, .5), (1.5, 3))])
def test_frechet_in_one_dimension(a, b):
    """(m_a - m_b)^2 + (s_a - s_b)^2 of N(m, s^2)."""
    got = frechet(*(gaussian([m], [[s * s]]) for m, s in (a, b)))
    assert_close(got, float((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2))


def test_frechet_of_covariances_with_common_axes_is_the_sum_over_them():
    """Diagonal ones, and the same rotated: sum (m_a - m_b)^2 + (s_a - s_b)^2."""
    m, s, u = torch.tensor([[1., 2, 3, 0], [1., .1, 2, 0], [.5, 3, 2, 1]], dtype=torch.float64)
    q = torch.linalg.qr(rows(4, 4)).Q
    want = float((m.square() + (s - u).square()).sum())
    assert_close(frechet(gaussian(m, (s * s).diag()), gaussian(0 * m, (u * u).diag())), want)
    assert_close(frechet(gaussian(q @ m, q * s ** 2 @ q.T), gaussian(0 * m, q * u ** 2 @ q.T)),
                 want)


def test_frechet_of_2_x_2_covariances_that_do_not_commute():
    """tr (A B)^(1/2) = (tr A B + 2 det(A B)^(1/2))^(1/2), by Cayley-Hamilton."""
    a, b = torch.tensor([[[4, 1], [1, 1]], [[1, -.8], [-.8, 2]]], dtype=torch.float64)
    cross = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    want = float(a.trace() + b.trace() - 2 * cross)
    assert_close(frechet(gaussian([0, 0], a), gaussian([0, 0], b)), want)


def test_frechet_by_eigenvalues_of_the_product():
    """tr (C_a C_b)^(1/2) = sum of the roots of the eigenvalues of C_a C_b, which is asymmetric."""
    f, g = rows(400, 20), rows(300, 20, 1)
    roots = torch.linalg.eigvals(torch.cov(f.T) @ torch.cov(g.T)).real.sqrt()
    want = ((f.mean(0) - g.mean(0)).square().sum() + f.var(0).sum() + g.var(0).sum()
            - 2 * roots.sum())
    assert_close(frechet(moments(f), moments(g)), want.item(), rtol=1e-6, atol=0)


def test_frechet_of_fewer_pictures_than_features():
    """C = X^T X of centred rows X: tr (C_a C_b)^(1/2) = sum of singular values of X_a X_b^T."""
    f, g = rows(12, 50), rows(9, 50, 1)
    xa, xb = ((v - v.mean(0)) / (len(v) - 1) ** .5 for v in (f, g))
    want = ((f.mean(0) - g.mean(0)).square().sum() + xa.square().sum() + xb.square().sum()
            - 2 * torch.linalg.svdvals(xa @ xb.T).sum())
    assert_close(frechet(moments(f), moments(g)), want.item(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", [9, 400])
def test_frechet_is_symmetric_0_of_equal_sets_and_a_shift_squared(n):
    f, g = rows(n, 20), rows(n, 20, 1)
    a, b = moments(f), moments(g)
    assert abs(frechet(a, moments(f, 7))) < 1e-9 * a.cov.trace()
    assert_close(frechet(a, b), frechet(b, a))
    assert_close(frechet(a, moments(f + 3)), 20 * 9.)


def line(*at):
    return torch.tensor(at, dtype=torch.float64)[:, None]


def test_precision_and_recall_by_hand():
    """Reals at 0, 1, 2, 4 reach 1, 1, 1, 2 far; fakes at -.5, 0, 6.5, 9.5 reach .5, .5, 3, 3;
    and to the second neighbour 2, 1, 2, 3 and 7, 6.5, 6.5, 9.5."""
    real, fake = line(0, 1, 2, 4), line(-.5, 0, 6.5, 9.5)
    assert precision_recall(real, fake, 1) == (2 / 4, 2 / 4)
    assert precision_recall(real, fake, 2) == (3 / 4, 1)


def test_precision_and_recall_of_equal_and_of_disjoint_sets():
    f = rows(50, 5)
    assert precision_recall(f, f) == (1, 1) and precision_recall(f, f + 100) == (0, 0)


def test_a_dropped_mode_lowers_recall_only():
    a, b, fake = rows(600, 3).split(200)
    precision, recall = precision_recall(torch.cat([a, b]), fake)
    assert precision > .8 and recall > .8
    less, half = precision_recall(torch.cat([a, b + 100]), fake)
    assert less > .8 and .4 < half <= .5


def test_precision_and_recall_one_by_one():
    """Of more rows than are compared at once; the third neighbour unless told otherwise."""
    real, fake = rows(1100, 3), 1.3 * rows(200, 3)

    def share(f, of, k):
        reach = torch.stack([(of - v).norm(dim=1).sort().values[k] for v in of])    # [0] is v
        return sum(bool(((of - v).norm(dim=1) <= reach).any()) for v in f) / len(f)
    for k in (3, 1):
        want = share(fake, real, k), share(real, fake, k)
        assert precision_recall(real, fake, k) == pytest.approx(want, abs=1e-9)
    assert precision_recall(real, fake) == precision_recall(real, fake, 3) != want


class Rows:
    """In a network's place: a picture is a row of features, then of log-probabilities."""
    def __init__(self, d, name="rows"):
        self.d, self.name = d, name

    def __call__(self, x):
        return x[:, :self.d], (x[:, self.d:].exp() if x.shape[1] > self.d else None)


def judged(p, part=64):
    """Statistics of pictures of which nothing is known but p(y | x)."""
    return Statistics(Rows(0), p.log().split(part))


def test_inception_score_of_certain_and_of_undecided_classes():
    """K classes, each sure and as frequent, in turn or one after the other: K. All alike: 1."""
    for K in (2, 7, 10):
        sure = torch.eye(K)
        for p in (sure.repeat(300, 1), sure.repeat_interleave(300, 0)):
            assert_close(judged(p).inception_score(), float(K), rtol=.005, atol=0)
    assert_close(judged(sure[:1].repeat(50, 1)).inception_score(), 1.)
    assert_close(judged(torch.rand(1, 7).softmax(1).repeat(50, 1)).inception_score(), 1.)


def test_inception_score_is_the_mean_of_ten_tenths():
    p, scores = rows(200, 5).softmax(1), []
    tenth = torch.tensor([int(k * (5 ** .5 - 1) / 2 % 1 * 10) for k in range(200)])
    for part in (p[tenth == i] for i in range(10)):
        scores.append((part * (part / part.mean(0)).log()).sum(1).mean().exp())
    assert_close(judged(p).inception_score(), torch.stack(scores).mean().item())
    assert_close(judged(p, 7).inception_score(), judged(p).inception_score())
    assert_close(judged(p[:3]).inception_score(), 1.)           # each in a tenth of its own


def test_what_is_kept_of_50_000_pictures():
    """Every fifth one's features, and sums, no larger than those of 500."""
    f = torch.randn(50_000, 6, generator=torch.Generator().manual_seed(0))
    sizes = []
    for n, stride in ((500, 1), (50_000, 5)):
        s = Statistics(Rows(3), f[:n].split(64), stride)
        kept = torch.cat(s.kept)
        assert_close(kept, f[:n:stride, :3], rtol=0, atol=0)
        assert sum(v.untyped_storage().nbytes() for v in s.kept) == kept.nbytes
        sums = (*vars(s).values(), *vars(s.moments).values())
        sizes.append(sum(v.numel() for v in sums if isinstance(v, torch.Tensor)))
        assert_close(s.moments.cov, torch.cov(f[:n, :3].double().T))
    assert len(kept) == 10_000 and sizes[0] == sizes[1]


def test_the_figures_are_named_after_their_network():
    """Only Inception's are FID and IS; a network without classes has no score."""
    f = rows(20, 8).split(6)
    for name, d, want in (("inception", 5, {"fid", "is"}), ("inception", 8, {"fid"}),
                          ("vgg16", 8, {"fd_vgg16"}), ("x", 5, {"fd_x", "is_x"})):
        s = Statistics(Rows(d, name), f)
        assert compare(s, s).keys() == want | {"precision", "recall"}


def test_compare_takes_its_first_set_as_real():
    """The fakes' inception score; fakes of one of two modes lack recall, not precision."""
    p = torch.eye(2).repeat(100, 1).log()
    real = torch.cat([100 * p[:, :1].exp() + rows(200, 1).float(), p], 1)
    a, b = (Statistics(Rows(1), v.split(50)) for v in (real, real[::2]))
    got = compare(a, b)
    assert got["precision"] == 1 and got["recall"] == .5
    assert_close(got["is_rows"], 1.)
    assert_close(compare(b, a)["is_rows"], 2., rtol=.01, atol=0)


def test_autocast_changes_no_feature():
    """The scripts judge within theirs; bf16 would shift the figures."""
    net = open_features(SimpleNamespace(features="shapes"), torch.device("cpu"))
    x = pictures(n=8)[..., :16]
    want = net(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = Statistics(net, [x])
    assert torch.equal(got.kept[0], want)


# ---- the program

@pytest.fixture
def two_folders(tmp_path):
    """real/ and fake/ of eight pictures, six of them named alike; fake is .4 brighter.

    A training set would hold out 38.png and 39.png."""
    rng = np.random.default_rng(0)
    for i in range(36, 46):
        x = rng.integers(0, 204, (20, 24, 3), np.uint8)
        for name, y in (("real", x), ("fake", x + 51)):
            (tmp_path / name).mkdir(exist_ok=True)
            if i not in {"real": (36, 37), "fake": (44, 45)}[name]:
                Image.fromarray(y.astype(np.uint8)).save(tmp_path / name / f"{i}.png")
    return tmp_path / "real", tmp_path / "fake"


def figures(said):
    told = re.search(r"8 real, 8 fake: (.*)", said)[1]
    return {k: float(v) for k, v in (part.split() for part in told.split(" | "))}


def test_the_program_compares_two_folders(two_folders, cli):
    real, fake = two_folders
    got = figures(cli("tinyldm.metrics.py", "--real", real, "--fake", fake))
    assert got.keys() == {"fd_shapes", "precision", "recall", "is_shapes"}
    assert got["fd_shapes"] > 1
    got = figures(cli("tinyldm.metrics.py", "--real", real, "--fake", real, "--pairs"))
    assert abs(got["fd_shapes"]) < 1e-6 and got["precision"] == got["recall"] == 1
    assert (got["psnr"], got["ssim"], got["perceptual_random"]) == (math.inf, 1, 0)


def test_the_program_pairs_pictures_by_name(two_folders, cli):
    """51 of 255 greys more: 20 log10(255 / 51) dB of each pair."""
    real, fake = two_folders
    got = figures(cli("tinyldm.metrics.py", "--real", real, "--fake", fake, "--pairs"))
    assert_close(got["psnr"], 20 * math.log10(5), atol=.01, rtol=0)
    assert got["ssim"] < .99 and got["perceptual_random"] > 0


def test_the_program_keeps_an_even_share_of_more_than_10_000(cli, monkeypatch):
    """Every second one's features of 10,001 pictures, of both sets."""
    strides = []
    monkeypatch.setattr(metrics, "Shapes", lambda *_, **__: range(60_000))
    monkeypatch.setattr(metrics, "Statistics", lambda net, batches, stride: strides.append(stride)
                        or SimpleNamespace(moments=Moments()))
    monkeypatch.setattr(metrics, "compare", lambda real, fake: {})
    for n in (10_000, 10_001, 50_000):
        cli("tinyldm.metrics.py", "--real", "train", "--fake", "held-out", "--size", 16, "--n", n)
    assert strides == [1, 1, 2, 2, 5, 5]


def test_an_unreadable_picture_is_in_no_pair(two_folders, cli):
    """The next readable one stands in for it, which is another picture."""
    real, fake = two_folders
    (fake / "40.png").write_bytes(b"no picture")
    got = figures(cli("tinyldm.metrics.py", "--real", real, "--fake", fake, "--pairs"))
    assert_close(got["psnr"], 20 * math.log10(5), atol=.01, rtol=0)


def test_bad_input_to_the_program_is_one_line(two_folders, folder, cli):
    real, fake = two_folders
    ours = ["--fake", "held-out", "--size", 16, "--n", 8, "--pairs"]
    for flags, say in ((["--fake", real / "gone"], "gone"),
                       (["--fake", fake, "--size", 8], "--size 8"),
                       (["--fake", folder(3)], "four pictures"),
                       (["--fake", fake, "--n", 3], "four pictures"),
                       (["--fake", real.parent, "--pairs"], "--pairs: no picture"),
                       (ours, "--pairs: needs")):
        said = cli("tinyldm.metrics.py", "--real", real, *flags, code=2).strip().splitlines()[-1]
        assert said.startswith("error: ") and say in said, said
