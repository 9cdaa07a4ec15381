import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from sims_ray.metrics import neighbours
from sims_ray.metrics.neighbours import inside, nearest_neighbours, product_distances, product_error


def normal(n: int, seed: int, width: int = 6) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(n, width))


@pytest.mark.parametrize("block", [3, 16, 2048])
def test_neighbours_are_those_of_a_full_sort_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    queries, points = normal(40, 0), normal(90, 1)
    distances = cdist(queries, points)
    found = nearest_neighbours(queries, points, 5)
    assert (found.indices == np.argsort(distances, axis=1)[:, :5]).all()
    np.testing.assert_allclose(found.distances, np.sort(distances, axis=1)[:, :5], rtol=1e-12)


@pytest.mark.parametrize("block", [7, 2048])
def test_a_point_is_not_its_own_neighbour_but_its_duplicate_is(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    points = normal(30, 0)
    points[17] = points[4]
    found = nearest_neighbours(points, points, 29, exclude_self=True)
    assert (np.sort(found.indices, axis=1) == [[j for j in range(30) if j != i] for i in range(30)]).all()
    assert found.indices[4, 0] == 17 and found.indices[17, 0] == 4
    assert found.distances[4, 0] == 0


def test_near_coincidence_far_from_the_origin_keeps_its_digits() -> None:
    points = 1e6 + normal(20, 0)
    queries = points + 1e-7
    found = nearest_neighbours(queries, points, 1)
    assert (found.indices[:, 0] == np.arange(20)).all()
    assert (found.squared[:, 0] == ((queries - points) ** 2).sum(axis=1)).all()


def test_ties_come_in_the_order_of_their_indices() -> None:
    points = np.array([[1.0], [-1.0], [0.0], [1.0]])
    assert nearest_neighbours(np.zeros((1, 1)), points, 4).indices.tolist() == [[2, 0, 1, 3]]


def test_images_of_bytes_do_not_wrap_around() -> None:
    found = nearest_neighbours(np.array([[0]], np.uint8), np.array([[255], [200]], np.uint8), 2)
    assert found.distances.tolist() == [[200, 255]]


def test_rounding_of_products_stays_within_its_bound() -> None:
    x, y = normal(60, 0, 300) * 100, normal(50, 1, 300)
    error = np.abs(product_distances(x, y) - cdist(x, y, "sqeuclidean")).max()
    assert 0 < error < product_error(x, y) < 1e-6


def test_a_pair_at_its_radius_is_inside_whatever_the_product_says() -> None:
    a, b = normal(10, 0), normal(12, 1)
    radii = ((a[:, None] - b) ** 2).sum(axis=2)
    error = product_error(a, b)
    assert inside(radii - error / 2, error, radii, a, b).all() and inside(radii + error / 2, error, radii, a, b).all()
    assert not inside(radii - error / 2, error, np.nextafter(radii, 0), a, b).any()
    assert not inside(radii + 2 * error, error, radii, a, b).any()


def test_what_has_no_neighbours_is_refused() -> None:
    with pytest.raises(ValueError, match="5 nearest neighbours among 4 others"):
        nearest_neighbours(normal(5, 0), normal(5, 0), 5, exclude_self=True)
    with pytest.raises(ValueError, match="0 nearest"):
        nearest_neighbours(normal(5, 0), normal(5, 0), 0)
    with pytest.raises(ValueError, match="cannot be compared"):
        nearest_neighbours(normal(5, 0, 3), normal(5, 0, 4), 1)
    with pytest.raises(ValueError, match="NaN"):
        nearest_neighbours(np.full((2, 6), np.inf), normal(5, 0), 1)
