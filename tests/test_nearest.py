"""Is the named image the nearest? Ranks by hand, ties, and wrong versions that would be noticed."""
import pytest
import torch

from tinyldm.metrics.nearest import named_nearest, ranks, share_within, thumbnails


def test_thumbnails_are_means_of_blocks_in_rgb():
    """64 pixels become 16 means of 4; grey is repeated."""
    x = torch.randn(2, 1, 64, 64)
    found = thumbnails(x).unflatten(1, (3, 16, 16))
    for channel in range(3):
        torch.testing.assert_close(found[1, channel, 2, 5], x[1, 0, 8:12, 20:24].mean())


def test_ranks_count_the_images_that_are_nearer_than_the_wanted_one():
    """On a line, where distances are plain."""
    others = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    samples = torch.tensor([[0.1], [0.1], [9.0]])
    wanted = torch.tensor([[0.0], [2.0], [0.0]])
    assert ranks(samples, wanted, others).tolist() == [0, 2, 3]


def test_an_image_among_the_others_is_not_nearer_than_itself():
    """Also where rounding could make it so: large values, tiny differences, a copy in the set."""
    torch.manual_seed(0)
    others = 100 + torch.randn(500, 768)
    wanted = others[:64]
    samples = wanted + 1e-3 * torch.randn(64, 768)
    assert ranks(samples, wanted, others).max() == 0
    assert ranks(samples, wanted, others.repeat(2, 1)).max() == 0


def test_samples_that_are_not_numbers_are_right_about_nothing():
    samples = torch.full((2, 3), torch.nan)
    gallery = torch.randn(5, 3)
    assert ranks(samples, gallery[:2], gallery).tolist() == [5, 5]


def test_an_image_that_is_not_in_the_set_is_compared_with_it():
    """As a held-out one is: it need not be the nearest."""
    others = torch.tensor([[0.0], [3.0]])
    assert ranks(torch.tensor([[1.0]]), torch.tensor([[1.5]]), others).tolist() == [0]
    assert ranks(torch.tensor([[1.0]]), torch.tensor([[2.5]]), others).tolist() == [1]


def test_shares():
    rank = torch.tensor([0, 0, 1, 4, 5])
    assert share_within(rank, 1) == pytest.approx(2 / 5)
    assert share_within(rank, 5) == pytest.approx(4 / 5)


def test_samples_of_the_wrong_names_are_found_out():
    """Noisy copies of the images score 1; the same in another order nearly 0."""
    torch.manual_seed(0)
    images = torch.rand(40, 3, 32, 32) * 2 - 1
    samples = images + 0.2 * torch.randn_like(images)
    every = thumbnails(images)
    assert named_nearest(samples, images, every)["named_is_nearest"] == 1
    assert named_nearest(samples.roll(1, 0), images, every)["named_is_nearest"] < 0.1
