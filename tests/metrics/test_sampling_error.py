import numpy as np
import pytest
from numpy.typing import NDArray

from sims_ray.metrics.frechet import Statistics, frechet_distance
from sims_ray.metrics.moments import Moments
from sims_ray.metrics.sampling_error import frechet_standard_error

REAL = Statistics(np.zeros(3), np.diag([1.0, 2.0, 0.5]))


def draw(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Features that are not normal, nor centred on the reference."""
    mix = np.array([[1.0, 0.3, 0.0], [0.0, 0.8, 0.5], [0.2, 0.0, 1.5]])
    return (rng.exponential(size=(n, 3)) - 0.7) @ mix


def test_the_error_is_the_deviation_of_the_distance_over_many_sets() -> None:
    rng = np.random.default_rng(0)
    sets = [draw(rng, 500) for _ in range(400)]
    distances = [frechet_distance(Moments.of(features), REAL) for features in sets]
    errors = [frechet_standard_error(features, REAL) for features in sets]
    # The deviation of 400 draws is known within 1/sqrt(800) = 3.5 %.
    assert np.mean(errors) == pytest.approx(np.std(distances, ddof=1), rel=0.1)


def test_in_one_dimension_it_is_the_closed_form() -> None:
    x = np.random.default_rng(1).normal(0.4, 1.5, size=(1000, 1))
    mean, deviation = float(x.mean()), float(x.std(ddof=1))
    # d = (m - a)^2 + (s - b)^2, and s moves by ((x - m)^2 - s^2) / 2 s.
    influence = 2 * (mean - 1.0) * (x - mean) + (deviation - 2.0) * ((x - mean) ** 2 - deviation**2) / deviation
    wanted = influence.std(ddof=1) / np.sqrt(1000)
    assert frechet_standard_error(x, Statistics(np.ones(1), np.full((1, 1), 4.0))) == pytest.approx(wanted, rel=1e-9)


def test_it_falls_with_the_root_of_n() -> None:
    features = draw(np.random.default_rng(2), 2000)
    once, four_times = (frechet_standard_error(np.tile(features, (k, 1)), REAL) for k in (1, 4))
    assert four_times == pytest.approx(once / 2, rel=1e-3)


def test_it_is_the_same_in_any_orthonormal_frame() -> None:
    features = draw(np.random.default_rng(3), 300)
    frame, _ = np.linalg.qr(np.random.default_rng(4).normal(size=(3, 3)))
    turned = Statistics(frame.T @ REAL.mean, frame.T @ REAL.covariance @ frame)
    assert frechet_standard_error(features @ frame, turned) == pytest.approx(frechet_standard_error(features, REAL))


def test_a_reference_of_less_rank_has_an_error_all_the_same() -> None:
    flat = Statistics(np.zeros(3), np.diag([1.0, 0.0, 0.0]))
    assert np.isfinite(frechet_standard_error(draw(np.random.default_rng(5), 100), flat))


def test_a_feature_that_no_image_varies_in_adds_nothing() -> None:
    features = draw(np.random.default_rng(6), 200)
    wider = np.column_stack([features[:, :1], np.full(200, 0.3), features[:, 1:]])
    mean, deviations = np.insert(REAL.mean, 1, 0.1), np.insert(np.diag(REAL.covariance), 1, 0.7)
    error = frechet_standard_error(wider, Statistics(mean, np.diag(deviations)))
    assert error == pytest.approx(frechet_standard_error(features, REAL), rel=1e-9)


def test_no_more_images_than_features_are_refused() -> None:
    with pytest.raises(ValueError, match="3 images in 3 features"):
        frechet_standard_error(np.eye(3), REAL)
