import json
import logging
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import sqrtm

from sims_ray.metrics.frechet import Statistics, frechet_distance
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


def test_a_covariance_over_n_instead_of_n_minus_1_would_miss_the_reference_number() -> None:
    arrays = np.load(GOLDEN / "metrics.npz")
    expected = json.loads((GOLDEN / "metrics.json").read_text())["frechet"]
    a, b = (Statistics(x.mean(0, np.float64), np.cov(x, rowvar=False, bias=True)) for x in arrays.values())
    assert abs(frechet_distance(a, b) - expected) > 1e-4


def test_statistics_and_moments_of_the_same_features_are_at_distance_0() -> None:
    moments = Moments.of(np.random.default_rng(0).normal(size=(90, 6)))
    assert frechet_distance(Statistics(moments.mean, moments.covariance), moments) == pytest.approx(0, abs=1e-12)


def test_a_common_factor_of_low_rank_keeps_every_digit() -> None:
    basis = rotation(30)[:, :4]
    a, b = np.array([4.0, 1.0, 9.0, 0.25]), np.array([1.0, 1.0, 4.0, 4.0])
    distance = frechet_distance(
        gaussian(np.zeros(30), basis * a @ basis.T), gaussian(np.zeros(30), basis * b @ basis.T)
    )
    assert distance == pytest.approx(1 + 0 + 1 + 2.25, abs=1e-10)


@pytest.mark.parametrize("least", [1e-3, 1e-6, 1e-9, 1e-11])
def test_small_variances_along_common_directions_do_not_spoil_the_distance(least: float) -> None:
    basis, a = rotation(60), np.geomspace(1, least, 60)
    sides = [gaussian(np.zeros(60), basis * variances @ basis.T) for variances in (a, 4 * a)]
    assert frechet_distance(*sides) == pytest.approx(a.sum(), abs=1e-8)


def test_a_side_without_variance_is_as_far_as_the_variance_of_the_other() -> None:
    distance = frechet_distance(gaussian(np.zeros(4), np.zeros((4, 4))), gaussian(np.ones(4), 2 * np.eye(4)))
    assert distance == pytest.approx(4 + 8, abs=1e-12)


def test_no_more_images_than_features_is_warned_of_once_for_each_n(caplog: pytest.LogCaptureFixture) -> None:
    few = {n: Moments.of(np.random.default_rng(n).normal(size=(n, 23))) for n in (11, 12, 23, 24)}
    with caplog.at_level(logging.WARNING, "sims_ray"):
        assert np.isfinite(frechet_distance(few[11], few[24], warn=False)) and not caplog.records
        for n in (11, 11, 12, 23, 24):
            assert np.isfinite(frechet_distance(few[n], few[24]))
    found = [record.getMessage() for record in caplog.records if record.name == "sims_ray"]
    assert len(found) == 3
    assert "n = 11 images in F = 23 features" in found[0] and "use more than 23 images" in found[0]
    assert "n = 23 " in found[2]


def test_deficient_statistics_of_unknown_n_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    covariance = random_covariance(21, 9, 0)
    with caplog.at_level(logging.WARNING, "sims_ray"):
        frechet_distance(Statistics(np.zeros(21), covariance), Statistics(np.zeros(21), np.eye(21)))
    assert "F = 21 features has rank 9" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_moments_that_are_not_finite_are_refused(broken: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(gaussian(np.zeros(2), np.full((2, 2), broken)), gaussian(np.zeros(2), np.eye(2)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        frechet_distance(gaussian(np.zeros(2), np.eye(2)), gaussian(np.full(2, broken), np.eye(2)))


def test_a_covariance_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="needs F x F"):
        frechet_distance(Statistics(np.zeros(3), np.eye(4)), gaussian(np.zeros(3), np.eye(3)))


def test_a_side_of_rank_one_has_the_closed_form_beside_one_of_full_rank() -> None:
    a, u = random_covariance(6, 9, 2), np.random.default_rng(7).normal(size=6)
    expected = np.trace(a) + u @ u - 2 * np.sqrt(u @ a @ u)  # as the root of a^(1/2) u u^T a^(1/2) has one eigenvalue
    for one, other in ((a, np.outer(u, u)), (np.outer(u, u), a)):
        assert frechet_distance(gaussian(np.zeros(6), one), gaussian(np.zeros(6), other)) == pytest.approx(expected)
