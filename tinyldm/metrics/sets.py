"""Metrics of sets of images: do samples look like the data, and are they as varied?

A feature network (features.py) turns each image into a vector, and the two sets of
vectors are compared.

Paper:  Sec. 4, App. E.3, Tables 1-11.
        Frechet distance, FID: Heusel et al. 2017.
        Inception score, IS: Salimans et al. 2016.
        Improved precision and recall: Kynkaanniemi et al. 2019.
Shapes: features (n, d); probabilities p(y | x) of the network's classes (n, K).

Sets may be large. So of all images only sums are kept, and for precision and recall the
features of 10,000 or a few less.

NB: the literature's FID compares 50,000 samples with the whole training set. With fewer
samples it is larger, so such values cannot be compared.
"""
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from tinyldm.data.loader import load_batches
from tinyldm.errors import NotFinite

# ---- Frechet distance


class Moments:
    """Mean and covariance, in float64, of feature vectors that are added in parts."""

    def __init__(self):
        self.n = 0
        self.mean: Tensor | float = 0.0         # (d,)
        self.scatter: Tensor | float = 0.0      # (d, d), sum of (f - mean) (f - mean)^T

    def add(self, f: Tensor) -> None:
        """Add the rows of f (n, d).

        Two parts are joined as in Chan et al. 1983. Why not sums of f and of f f^T:
        their difference would lose digits where the mean is large.
        """
        f = f.double()
        n = self.n + len(f)
        part_mean = f.mean(0)
        centred = f - part_mean
        shift = part_mean - self.mean
        between = torch.outer(shift, shift) * (self.n * len(f) / n)
        self.scatter = self.scatter + centred.T @ centred + between
        self.mean = self.mean + shift * (len(f) / n)
        self.n = n

    @property
    def cov(self) -> Tensor:
        """The unbiased covariance (d, d)."""
        return self.scatter / max(1, self.n - 1)


def frechet(a: Moments, b: Moments) -> float:
    """Return the Frechet distance between two Gaussians: Heusel et al. 2017, Eq. (6).

        |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    tr (C_a C_b)^(1/2) is computed as the sum of the singular values of
    C_a^(1/2) C_b^(1/2). Why: this is accurate for singular covariances too, which sets
    of fewer images than features have.
    """
    root_product = matrix_root(a.cov) @ matrix_root(b.cov)
    trace_of_root = torch.linalg.svdvals(root_product).sum()
    between_means = (a.mean - b.mean).square().sum()
    return float(between_means + a.cov.trace() + b.cov.trace() - 2 * trace_of_root)


def matrix_root(cov: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance (d, d)."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


# ---- precision and recall

def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Return precision and recall: Kynkaanniemi et al. 2019, Eq. (1) and (2).

    Around each image of a set lies a ball in feature space that reaches to its k-th
    nearest neighbour in that set; all balls together stand for the set's distribution.
    Precision is the share of fakes in a ball of the real images: are samples realistic?
    Recall is the share of real images in a ball of the fakes: are samples as varied?
    """
    return share_in_balls(fake, real, k), share_in_balls(real, fake, k)


def share_in_balls(f: Tensor, centres: Tensor, k: int) -> float:
    """Return the share of rows of f (n, d) that lie in the ball of a row of `centres`.

    Distances are computed for 1,024 rows at a time, which bounds the memory.
    """
    # Each centre is its own nearest neighbour, so the k-th other one is number k + 1.
    neighbour = min(k + 1, len(centres))
    radii = []
    for part in centres.split(1024):
        distances = torch.cdist(part, centres)
        radii.append(distances.kthvalue(neighbour).values)
    radius = torch.cat(radii)                       # (number of centres,)

    are_inside = []
    for part in f.split(1024):
        distances = torch.cdist(part, centres)
        are_inside.append((distances <= radius).any(1))
    return float(torch.cat(are_inside).cpu().double().mean())


# ---- inception score

class InceptionScore:
    """exp E_x KL(p(y | x) || p(y)), of samples that are added in parts.

    It lies in 1..K. It is high if the network is sure of the class of each sample, and
    finds many classes. As in the literature it is the mean over ten parts of the set.
    """

    N_PARTS = 10

    def __init__(self):
        self.n = torch.zeros(self.N_PARTS, 1, dtype=torch.float64)
        self.sum_p: Tensor | float = 0.0            # (10, K), of p(y | x)
        self.sum_p_log_p: Tensor | float = 0.0      # (10, 1), of p(y | x) log p(y | x)

    def add(self, p: Tensor, index: Tensor) -> None:
        """Add p(y | x) (n, K) of samples; index (n,) has their numbers in the set.

        The fractional part of (sample's number / golden ratio) says to which tenth it
        belongs. Why not the number's last digit: samples may show the classes in turn,
        and then each tenth would miss most classes.
        """
        p = p.cpu().double()
        tenth = (index.double() * (math.sqrt(5) - 1) / 2 % 1 * self.N_PARTS).long()
        belongs = torch.eye(self.N_PARTS, dtype=p.dtype)[:, tenth]  # (10, n), 0 or 1
        p_log_p = torch.xlogy(p, p).sum(1, keepdim=True)            # (n, 1)
        self.sum_p = self.sum_p + belongs @ p
        self.sum_p_log_p = self.sum_p_log_p + belongs @ p_log_p
        self.n += belongs.sum(1, keepdim=True)

    def value(self) -> float:
        """Return the mean score of the tenths that have samples."""
        used = self.n[:, 0] > 0
        p_y = (self.sum_p / self.n)[used]                           # (tenths, K)
        mean_p_log_p = (self.sum_p_log_p / self.n)[used]            # (tenths, 1)
        kl = mean_p_log_p[:, 0] - torch.xlogy(p_y, p_y).sum(1)
        return float(kl.exp().mean())


# ---- all of them

class Statistics:
    """What comparing two sets needs of one: moments, some features, inception score.

    net is a feature network, whose name is in net.name; batches are images (B, C, H, W)
    in [-1, 1]. The features of every stride-th image are kept. Raises NotFinite for features
    that are not numbers.
    """

    def __init__(self, net: nn.Module, batches: Iterable[Tensor], stride: int = 1):
        self.name = net.name
        self.moments = Moments()
        self.inception_score: InceptionScore | None = None
        self.features: list[Tensor] = []
        for x in batches:
            # Why without autocast: features in bfloat16 would shift every figure.
            with torch.autocast(x.device.type, enabled=False):
                features, p = net(x)
            features = features.cpu()
            index = torch.arange(self.moments.n, self.moments.n + len(x))
            if not features.isfinite().all():
                raise NotFinite(
                    f"the {net.name} features of images {index[0]}..{index[-1]} are not all "
                    "numbers (NaN or infinite): the images or the network's weights are damaged"
                )

            self.moments.add(features)
            self.features.append(features[index % stride == 0])
            if p is not None:
                self.inception_score = self.inception_score or InceptionScore()
                self.inception_score.add(p, index)


def compare(real: Statistics, fake: Statistics) -> dict[str, float]:
    """Return by name: Frechet distance, precision, recall, the fakes' inception score.

    Only those of the Inception network are named `fid` and `is`. Those of ShapesNet are
    fd_shapes and is_shapes, which no literature has, and so for other networks. There is
    no score if the network has no classes.
    """
    is_inception = real.name == "inception"
    frechet_name = "fid" if is_inception else f"fd_{real.name}"
    score_name = "is" if is_inception else f"is_{real.name}"

    real_features = torch.cat(real.features)
    fake_features = torch.cat(fake.features)
    precision, recall = precision_recall(real_features, fake_features)
    figures = {
        frechet_name: frechet(real.moments, fake.moments),
        "precision": precision,
        "recall": recall,
    }
    if fake.inception_score is not None:
        figures[score_name] = fake.inception_score.value()
    return figures


def load_images(
    data: Dataset, items: Sequence[int], workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield the images of some items in batches (64, C, H, W), with a progress bar."""
    for batch in load_batches_of(data, items, workers):
        yield batch["image"].to(device)


def load_batches_of(
    data: Dataset, items: Sequence[int], workers: int
) -> Iterator[dict[str, Any]]:
    """Yield batches of 64 items, with a progress bar."""
    parts = [items[i:i + 64] for i in range(0, len(items), 64)]
    bar = tqdm(parts, "images", dynamic_ncols=True)
    yield from load_batches(data, bar, workers)
