"""Does a sample show the image that its caption names, rather than another one of the set?

A set in which each image has a name of its own, such as the emoji, has a judge in itself: the
sample of a name is right if no other image of the set is nearer to it than the image of that
name. Near is meant in thumbnails of 16 x 16 pixels, or in the features of any network.

Shapes: images (n, C, H, W) in [-1, 1]; features (n, d).
"""
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tinyldm.data.images import as_rgb

SIDE = 16


def thumbnails(images: Tensor) -> Tensor:
    """Return images as vectors of 16 x 16 RGB pixels, (n, 768) in [-1, 1]."""
    return adaptive_avg_pool2d(as_rgb(images).float(), SIDE).flatten(1)


def ranks(samples: Tensor, wanted: Tensor, gallery: Tensor) -> Tensor:
    """Return how many images of the gallery are nearer to each sample than the wanted one, (n,).

    samples, wanted (n, d), one for one; gallery (m, d). The wanted image may be in the gallery:
    it is not nearer than itself. To a sample that is not a number, all are nearer.
    """
    to_wanted = (samples - wanted).norm(dim=1)                              # (n,)
    # Why exact distances: cdist's fast way would find an image a little nearer than itself.
    to_all = torch.cdist(samples, gallery, compute_mode="donot_use_mm_for_euclid_dist")
    is_farther = to_all >= to_wanted[:, None] * (1 - 1e-5)
    return (~is_farther).sum(1)


def share_within(rank: Tensor, k: int) -> float:
    """Return the share of samples whose wanted image is one of the k nearest."""
    return float((rank < k).double().mean())


def named_nearest(samples: Tensor, wanted: Tensor, gallery: Tensor) -> dict[str, float]:
    """Return the shares of samples (n, C, H, W) that show the wanted images best, for a log.

    gallery: thumbnails of the images of the set, (m, 768).
    """
    rank = ranks(thumbnails(samples), thumbnails(wanted), gallery)
    return {"named_is_nearest": share_within(rank, 1), "named_in_nearest_5": share_within(rank, 5)}
