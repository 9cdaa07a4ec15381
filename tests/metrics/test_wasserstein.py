from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from sims_ray.metrics.wasserstein import MOST_POINTS, sliced_squared_wasserstein, squared_wasserstein

SHIFT = np.array([3.0, -4.0])


def points(n: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(n, 2))


def test_a_translation_costs_its_squared_length_whatever_the_order() -> None:
    a = points(200)
    b = np.random.default_rng(1).permutation(a + SHIFT)
    assert squared_wasserstein(a, b) == pytest.approx(25, abs=1e-10)
    assert squared_wasserstein(a, np.random.default_rng(1).permutation(a)) == 0


def test_the_exact_distance_is_the_best_of_all_pairings() -> None:
    a, b = points(6), points(6, 1) * 2
    best = min(((a - b[list(order)]) ** 2).sum(axis=1).mean() for order in permutations(range(6)))
    assert squared_wasserstein(a, b) == pytest.approx(best, rel=1e-12)


def test_a_scaling_by_c_costs_c_minus_1_squared_times_the_mean_square() -> None:
    a = points(100)
    expected = 4 * (a**2).sum(axis=1).mean()  # the gradient of a convex function is the optimal map
    assert squared_wasserstein(a, 3 * a) == pytest.approx(expected, rel=1e-10)
    assert sliced_squared_wasserstein(a, 3 * a) == pytest.approx(expected / 2, rel=1e-10)


@pytest.mark.parametrize("num_directions", [1, 2, 7, 128])
def test_sliced_a_translation_costs_its_squared_length_over_the_dimension(num_directions: int) -> None:
    a = points(300)
    b = np.random.default_rng(1).permutation(a + SHIFT)
    assert sliced_squared_wasserstein(a, b, num_directions=num_directions) == pytest.approx(12.5, abs=1e-10)


def test_the_sliced_distance_is_the_integral_over_the_circle() -> None:
    a, b = points(50), points(50, 1) @ np.diag([3.0, 0.2])
    angles = np.linspace(0, np.pi, 2000, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)])
    expected = ((np.sort(a @ circle, axis=0) - np.sort(b @ circle, axis=0)) ** 2).mean()
    assert sliced_squared_wasserstein(a, b, num_directions=2000) == pytest.approx(expected, rel=0.02)


def test_the_sliced_distance_is_below_the_exact_over_the_dimension_and_a_function_of_the_seed() -> None:
    a, b = points(80), points(80, 1) @ np.array([[1.0, 2.0], [-1.0, 0.5]])
    few = [sliced_squared_wasserstein(a, b, num_directions=4, seed=seed) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    assert 0 < max(few) <= squared_wasserstein(a, b) / 2 + 1e-12


def test_points_that_cannot_be_paired_are_refused() -> None:
    for distance in (squared_wasserstein, sliced_squared_wasserstein):
        with pytest.raises(ValueError, match="cannot be paired"):
            distance(points(3), points(4))
        with pytest.raises(ValueError, match="cannot be paired"):
            distance(points(0), points(0))
        with pytest.raises(ValueError, match="NaN"):
            distance(points(3), points(3) * np.inf)
    with pytest.raises(ValueError, match="give at most 5000"):
        squared_wasserstein(points(MOST_POINTS + 1), points(MOST_POINTS + 1))
    with pytest.raises(ValueError, match="num_directions is 0"):
        sliced_squared_wasserstein(points(3), points(3), num_directions=0)
