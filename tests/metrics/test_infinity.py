import numpy as np
import pytest
from numpy.typing import NDArray

from sims_ray.metrics.frechet import Statistics, frechet_distance
from sims_ray.metrics.infinity import frechet_infinity, subset_sizes
from sims_ray.metrics.moments import Moments

F, N, SHIFT = 24, 2000, 0.2
REFERENCE = Statistics(np.zeros(F), np.eye(F))
TRUTH = F * SHIFT**2


def features(seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(N, F)) + SHIFT


def test_the_intercept_is_nearer_the_truth_than_the_distance_at_all_images() -> None:
    extrapolated = [frechet_infinity(features(seed), REFERENCE, seed=seed).intercept for seed in range(12)]
    plain = [frechet_distance(Moments.of(features(seed)), REFERENCE) for seed in range(12)]
    assert np.mean(plain) - TRUTH > 0.05
    assert abs(np.mean(extrapolated) - TRUTH) < abs(np.mean(plain) - TRUTH) / 3


def test_the_bias_falls_like_1_over_n() -> None:
    lines = [frechet_infinity(features(seed), Statistics(np.full(F, SHIFT), np.eye(F))) for seed in range(8)]
    sizes, bias = lines[0].sizes, np.mean([line.distances for line in lines], axis=0)
    assert np.polyfit(np.log(sizes), np.log(bias), 1)[0] == pytest.approx(-1, abs=0.1)
    assert np.mean([line.slope for line in lines]) == pytest.approx(np.mean(bias * sizes), rel=0.1)


def test_the_error_is_that_of_least_squares() -> None:
    line = frechet_infinity(features(0), REFERENCE, num_sizes=10)
    design = np.stack([np.ones(10), 1 / np.array(line.sizes)], axis=1)
    solution, residuals, *_ = np.linalg.lstsq(design, np.array(line.distances), rcond=None)
    covariance = np.linalg.inv(design.T @ design) * residuals.item() / 8
    assert (line.intercept, line.slope) == pytest.approx(tuple(solution), rel=1e-8)
    assert line.standard_error == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-6)


def test_the_last_distance_is_that_of_all_images_and_the_rest_a_function_of_the_seed() -> None:
    a, b, c = (frechet_infinity(features(0), REFERENCE, num_sizes=8, seed=seed) for seed in (1, 1, 2))
    assert a == b and a != c
    assert a.sizes[-1] == N
    assert a.distances[-1] == pytest.approx(frechet_distance(Moments.of(features(0)), REFERENCE), rel=1e-10)


def test_sizes_are_evenly_spaced_from_a_tenth_or_twice_the_width() -> None:
    assert subset_sizes(50_000, 2048, 15)[0] == 5000
    assert subset_sizes(30_000, 2048, 15)[0] == 4096
    assert subset_sizes(5_000, 2048, 15)[0] == 2500
    steps = np.diff(subset_sizes(50_000, 2048, 15))
    assert len(steps) == 14 and steps.max() - steps.min() <= 1


def test_too_little_for_a_line_is_refused() -> None:
    with pytest.raises(ValueError, match="num_sizes is 7"):
        frechet_infinity(features(0), REFERENCE, num_sizes=7)
    with pytest.raises(ValueError, match="25 images are too few"):
        frechet_infinity(features(0)[:25], REFERENCE)
