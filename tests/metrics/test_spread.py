import numpy as np
import pytest

from sims_ray.metrics.frechet import Statistics, frechet_distance
from sims_ray.metrics.moments import Moments, merge_all
from sims_ray.metrics.spread import Spread, bias_of_parts, paired_difference, small_n_bias


def test_a_spread_has_the_unbiased_deviation_and_the_error_of_the_mean() -> None:
    spread = Spread.of([2.0, 4.0, 9.0])
    assert (spread.mean, spread.minimum, spread.num_blocks) == (5, 2, 3)
    assert spread.standard_deviation == pytest.approx(13**0.5)
    assert spread.standard_error == pytest.approx((13 / 3) ** 0.5)


def test_one_block_has_neither_error_nor_interval() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, None, None, 1)
    difference = paired_difference([1.0], [3.0])
    assert (difference.mean, difference.low, difference.high, difference.num_blocks) == (-2, None, None, 1)


def test_the_interval_of_three_pairs_is_students() -> None:
    difference = paired_difference([5.0, 7.0, 6.0], [6.0, 9.0, 9.0])  # -1, -2, -3
    t = 0.95 * (2 / (4 * 0.975 * 0.025)) ** 0.5  # closed form of 2 degrees of freedom
    half = t / 3**0.5  # standard deviation 1
    assert difference.mean == -2
    assert (difference.low, difference.high) == pytest.approx((-2 - half, -2 + half), rel=1e-10)
    assert difference.confidence == 0.95 and difference.num_blocks == 3


def test_what_blocks_have_in_common_leaves_the_paired_interval() -> None:
    common = np.random.default_rng(0).normal(size=5) * 100
    difference = paired_difference((common + 1).tolist(), common.tolist())
    assert (difference.low, difference.high) == pytest.approx((1, 1), abs=1e-10)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    pairs = np.random.default_rng(0).normal(size=(2000, 2, 3))
    found = [paired_difference(a.tolist(), b.tolist(), 0.8) for a, b in pairs]
    assert np.mean([f.low <= 0 <= f.high for f in found if f.low is not None and f.high is not None]) == pytest.approx(
        0.8, abs=0.03
    )


def test_the_bias_is_that_of_fresh_images_at_n() -> None:
    rng, truth = np.random.default_rng(0), Statistics(np.zeros(8), np.eye(8))
    measured = small_n_bias(rng.normal(size=(4000, 8)), 100)
    fresh = [frechet_distance(Moments.of(rng.normal(size=(100, 8))), truth) for _ in range(200)]
    assert measured.num_blocks == 8
    assert measured.mean == pytest.approx(np.mean(fresh), rel=0.2)


def test_the_bias_of_sorted_data_is_that_of_shuffled() -> None:
    data = np.sort(np.random.default_rng(0).normal(size=(1600, 1)), axis=0)
    assert small_n_bias(data, 200).mean < 0.05
    assert small_n_bias(data, 200) == small_n_bias(data, 200)
    assert small_n_bias(data, 200) != small_n_bias(data, 200, seed=1)


@pytest.mark.parametrize(("total", "parts"), [(200, 2), (299, 2), (310, 3), (2000, 8)])
def test_as_many_parts_as_fit_are_measured_but_no_more_than_8(total: int, parts: int) -> None:
    assert small_n_bias(np.random.default_rng(0).normal(size=(total, 3)), 100).num_blocks == parts


def test_the_bias_of_parts_compares_each_with_all_others() -> None:
    a, b, c = (Moments.of(np.random.default_rng(seed).normal(size=(50, 4))) for seed in range(3))
    expected = [frechet_distance(a, merge_all([b, c])), frechet_distance(b, merge_all([a, c]))]
    assert bias_of_parts([a, b], [c]).mean == pytest.approx(np.mean(expected), rel=1e-10)


def test_what_has_no_spread_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        Spread.of([])
    with pytest.raises(ValueError, match="2 and 1 blocks"):
        paired_difference([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        paired_difference([1.0, 2.0], [1.0, 2.0], 95)
    with pytest.raises(ValueError, match="200 images or more, not 199"):
        small_n_bias(np.zeros((199, 3)), 100)
