import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from sims_ray.metrics.memorisation import (
    CopyRule,
    mean_perceptual_distance_to_nearest,
    mean_ssim_to_nearest,
    near_copies,
    ssim,
    training_copies,
)

Images = NDArray[np.uint8]


def images(n: int, side: int = 16, channels: int = 3, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (n, channels, side, side), dtype=np.uint8)


def by_filters(a: Images, b: Images) -> float:
    x, y = a.astype(float), b.astype(float)

    def blur(z: NDArray[np.float64]) -> NDArray[np.float64]:
        return gaussian_filter(z, 1.5, radius=5, mode="constant")[5:-5, 5:-5]

    vx, vy, cov = blur(x * x) - blur(x) ** 2, blur(y * y) - blur(y) ** 2, blur(x * y) - blur(x) * blur(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * blur(x) * blur(y) + c1) * (2 * cov + c2)
    return float((top / ((blur(x) ** 2 + blur(y) ** 2 + c1) * (vx + vy + c2))).mean())


def test_ssim_is_that_of_scipys_gaussian_filter_averaged_over_channels() -> None:
    a = images(3, 20)
    b = np.clip(a.astype(int) + images(3, 20, seed=1) // 8, 0, 255).astype(np.uint8)
    expected = [np.mean([by_filters(p, q) for p, q in zip(x, y, strict=True)]) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(a, b), expected, atol=1e-10)


@pytest.mark.parametrize("side", [1, 2, 8, 10, 11, 32])
def test_ssim_of_an_image_and_itself_is_1_at_any_size_and_symmetric(side: int) -> None:
    a, b = images(2, side), images(2, side, seed=1)
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-12)
    np.testing.assert_allclose(ssim(a, b), ssim(b, a), atol=1e-12)
    assert (ssim(a, b) < 0.99).all()


def test_ssim_of_flat_images_is_its_luminance_term() -> None:
    a, b = np.full((1, 1, 8, 8), 100, np.uint8), np.full((1, 1, 8, 8), 200, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b).item() == pytest.approx((2 * 100 * 200 + c1) / (100**2 + 200**2 + c1), abs=1e-10)


def test_ssim_of_many_images_is_that_of_each() -> None:
    a, b = images(600, 4, 1), images(600, 4, 1, seed=1)
    np.testing.assert_allclose(ssim(a, b)[555:], ssim(a[555:], b[555:]), atol=1e-12)
    assert ssim(a[:0], b[:0]).shape == (0,)


def test_copies_are_found_with_their_originals_and_nothing_else_is_a_copy() -> None:
    rng = np.random.default_rng(0)
    training, fresh = rng.normal(size=(200, 20)), rng.normal(size=(30, 20))
    generated = np.vstack([training[[7, 90, 7]] + 1e-3, fresh])
    found = near_copies(generated, training, CopyRule())
    assert found.nearest[:3].tolist() == [7, 90, 7]
    assert found.flags.tolist() == [True] * 3 + [False] * 30
    assert found.share == 3 / 33
    assert found.mean_distance == pytest.approx(found.distances.mean())


def test_the_ratio_is_the_nearest_over_the_mean_of_the_next() -> None:
    training = np.array([[1.0], [3.0], [5.0], [100.0]])
    one = near_copies(np.zeros((1, 1)), training, CopyRule())
    assert one.ratios.item() == pytest.approx(1 / 3) and one.flags.all()
    two = near_copies(np.zeros((1, 1)), training, CopyRule(max_ratio=0.25, next_neighbours=2))
    assert two.ratios.item() == 0.25 and two.flags.all()
    assert not near_copies(np.zeros((1, 1)), training, CopyRule(max_ratio=0.24, next_neighbours=2)).flags.any()


def test_both_bounds_must_hold_and_a_distance_alone_will_do() -> None:
    training, generated = np.array([[0.0], [10.0]]), np.array([[1.0], [2.0], [4.9]])
    assert near_copies(generated, training, CopyRule(max_distance=1.5)).flags.tolist() == [True, False, False]
    alone = CopyRule(max_ratio=None, max_distance=4.9)
    assert near_copies(generated, training, alone).flags.tolist() == [True, True, True]


def test_the_training_set_s_own_share_leaves_each_image_out() -> None:
    training = np.random.default_rng(0).normal(size=(100, 20))
    assert near_copies(training, training, CopyRule()).share == 1
    assert training_copies(training, CopyRule()).share == 0
    training[3] = training[70] + 1e-6
    found = training_copies(training, CopyRule())
    assert found.share == 0.02 and found.nearest[3] == 70


def test_an_image_that_the_training_set_holds_many_times_is_a_copy() -> None:
    found = near_copies(np.zeros((1, 2)), np.zeros((5, 2)), CopyRule())
    assert found.ratios.item() == 0 and found.share == 1


def test_mean_ssim_to_the_nearest_takes_each_image_s_own_neighbour() -> None:
    training, nearest = images(300), np.random.default_rng(1).integers(0, 300, 270)
    assert mean_ssim_to_nearest(training[nearest], training, nearest) == pytest.approx(1, abs=1e-12)
    assert mean_ssim_to_nearest(training[nearest], training, (nearest + 1) % 300) < 0.2


def test_a_perceptual_distance_sees_pairs_in_unit_range_and_is_averaged() -> None:
    generated, training = images(300, 4), images(3, 4, seed=1)
    nearest = np.arange(300) % 3

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        assert a.dtype == torch.float32 and -1 <= a.min() < -0.9 and 0.9 < a.max() <= 1
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    expected = np.abs(generated.astype(float) - training[nearest]).mean() / 127.5
    value = mean_perceptual_distance_to_nearest(generated, training, nearest, distance)
    assert value == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_judged_is_refused() -> None:
    with pytest.raises(ValueError, match="neither max_ratio nor max_distance"):
        CopyRule(max_ratio=None)
    with pytest.raises(ValueError, match="next_neighbours is 0"):
        CopyRule(next_neighbours=0)
    with pytest.raises(ValueError, match="one by one"):
        ssim(images(2), images(3))
    with pytest.raises(ValueError, match="not uint8"):
        ssim(images(2).astype(np.float32), images(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="are no pairs"):
        mean_ssim_to_nearest(images(2), images(3), np.array([0]))
