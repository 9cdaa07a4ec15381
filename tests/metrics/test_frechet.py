import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from sims_ray.metrics.frechet import frechet_distance
from sims_ray.metrics.moments import Moments

GOLDEN = Path(__file__).parents[1] / "golden"
N = 100
Array = NDArray[np.float64]


def gaussian(mean: Array, covariance: Array) -> Moments:
    return Moments(N, mean, covariance * (N - 1))


def random_covariance(width: int, rank: int, seed: int) -> Array:
    root = np.random.default_rng(seed).normal(size=(width, rank))
    return root @ root.T


def rotation(width: int) -> Array:
    return np.linalg.qr(np.random.default_rng(9).normal(size=(width, width)))[0]


def test_equal_covariances_are_apart_by_the_squared_distance_of_their_means() -> None:
    covariance, shift = random_covariance(5, 5, 0), np.arange(5.0)
    distance = frechet_distance(gaussian(np.zeros(5), covariance), gaussian(shift, covariance))
    assert distance == pytest.approx(30, abs=1e-8)


def test_diagonal_gaussians_have_the_closed_form() -> None:
    a, b, shift = np.array([1.0, 4.0, 0.25]), np.array([9.0, 4.0, 2.25]), np.array([0.5, 0.0, -2.0])
    distance = frechet_distance(gaussian(np.zeros(3), np.diag(a)), gaussian(shift, np.diag(b)))
    assert distance == pytest.approx(4.25 + 4 + 0 + 1, abs=1e-8)  # |shift|^2 + sum (sqrt a - sqrt b)^2


def test_commuting_covariances_have_the_closed_form() -> None:
    rng, basis = np.random.default_rng(1), rotation(6)
    a, b = rng.uniform(0.1, 5, 6), rng.uniform(0.1, 5, 6)
    distance = frechet_distance(gaussian(np.zeros(6), basis * a @ basis.T), gaussian(np.zeros(6), basis * b @ basis.T))
    assert distance == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-8)


def test_covariances_that_do_not_commute_agree_with_the_matrix_square_root() -> None:
    a, b = random_covariance(6, 9, 2), random_covariance(6, 9, 3)
    assert np.abs(a @ b - b @ a).max() > 1
    expected = np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(gaussian(np.zeros(6), a), gaussian(np.zeros(6), b)) == pytest.approx(expected, abs=1e-8)


def test_equal_moments_are_at_distance_0() -> None:
    moments = gaussian(np.arange(6.0), random_covariance(6, 6, 0))
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-8)


def test_the_distance_is_symmetric_and_the_same_in_every_rotated_and_shifted_frame() -> None:
    rng, turn = np.random.default_rng(4), rotation(6)
    a, b = rng.normal(size=(50, 6)), rng.normal(size=(70, 6)) @ rng.normal(size=(6, 6)) + 1
    distance = frechet_distance(Moments.of(a), Moments.of(b))
    assert distance > 1
    assert frechet_distance(Moments.of(b), Moments.of(a)) == pytest.approx(distance, rel=1e-8)
    assert frechet_distance(Moments.of(a @ turn + 3), Moments.of(b @ turn + 3)) == pytest.approx(distance, rel=1e-8)


def test_the_distance_grows_with_the_square_of_the_scale() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(50, 4)), rng.normal(size=(50, 4)) + 1
    expected = 9 * frechet_distance(Moments.of(a), Moments.of(b))
    assert frechet_distance(Moments.of(3 * a), Moments.of(3 * b)) == pytest.approx(expected, rel=1e-8)


def test_rank_deficient_covariances_give_the_finite_closed_form() -> None:
    a, b = np.array([4.0, 1.0, 0.0, 0.0]), np.array([0.0, 9.0, 1.0, 0.0])
    distance = frechet_distance(gaussian(np.zeros(4), np.diag(a)), gaussian(np.zeros(4), np.diag(b)))
    assert distance == pytest.approx(4 + 4 + 1, abs=1e-6)
    few, many = (Moments.of(np.random.default_rng(n).normal(size=(n, 64))) for n in (10, 200))
    assert np.isfinite(frechet_distance(few, many))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)


def test_the_distance_of_the_reference_features_is_the_reference_number() -> None:
    arrays = np.load(GOLDEN / "metrics.npz")
    expected = json.loads((GOLDEN / "metrics.json").read_text())["frechet"]
    distance = frechet_distance(Moments.of(arrays["real"]), Moments.of(arrays["fake"]))
    assert distance == pytest.approx(expected, abs=1e-8)


def test_features_of_different_width_are_refused() -> None:
    with pytest.raises(ValueError, match="width 3 and 4 cannot be compared"):
        frechet_distance(gaussian(np.zeros(3), np.eye(3)), gaussian(np.zeros(4), np.eye(4)))
