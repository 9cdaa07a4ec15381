import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sims_ray.metrics import neighbours
from sims_ray.metrics.kid import kid, subset_kid

GOLDEN = Path(__file__).parents[1] / "golden"
Array = NDArray[np.float64]


def golden() -> tuple[Array, Array]:
    arrays = np.load(GOLDEN / "metrics.npz")
    return arrays["real"], arrays["fake"]


def normal(n: int, seed: int, width: int = 4) -> Array:
    return np.random.default_rng(seed).normal(size=(n, width))


def by_pairs(a: Array, b: Array) -> float:
    def k(x: Array, y: Array) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def within(s: Array) -> float:
        return float(np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]))

    return within(a) + within(b) - 2 * float(np.mean([k(x, y) for x in a for y in b]))


@pytest.mark.parametrize("block", [7, 100, 300, 2048])
def test_kid_of_the_reference_features_is_the_reference_number_in_blocks_of_any_size(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", block)
    expected = json.loads((GOLDEN / "metrics.json").read_text())["kid_unbiased_all"]
    assert kid(*golden()) == pytest.approx(expected, abs=1e-8)


def test_kid_is_the_mean_over_pairs_without_a_vector_and_itself() -> None:
    a, b = normal(9, 0), normal(13, 1) + 0.5
    assert kid(a, b) == pytest.approx(by_pairs(a, b), abs=1e-12)
    assert kid(b, a) == pytest.approx(kid(a, b), abs=1e-12)


def test_kid_between_sets_of_one_distribution_is_0_on_average() -> None:
    values = [kid(normal(20, 2 * i), normal(20, 2 * i + 1)) for i in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 300**0.5
    assert min(values) < 0


def test_subsets_as_large_as_both_sets_are_kid_without_error() -> None:
    a, b = normal(50, 0), normal(50, 1) + 1
    result = subset_kid(a, b, num_subsets=3)
    assert result.mean == pytest.approx(kid(a, b), abs=1e-10)
    assert result.standard_error == pytest.approx(0, abs=1e-10)
    assert (result.num_subsets, result.subset_size) == (3, 50)


def test_the_mean_over_subsets_is_within_its_error_of_kid_over_all_and_a_function_of_the_seed() -> None:
    a, b = golden()
    result = subset_kid(a, b, num_subsets=60, subset_size=100, seed=1)
    assert 0 < result.standard_error < 0.01
    assert abs(result.mean - kid(a, b)) < 4 * result.standard_error
    assert result == subset_kid(a, b, num_subsets=60, subset_size=100, seed=1)
    assert result != subset_kid(a, b, num_subsets=60, subset_size=100, seed=2)


def test_the_error_falls_with_the_root_of_the_number_of_subsets() -> None:
    few, many = (subset_kid(*golden(), num_subsets=n, subset_size=50) for n in (50, 450))
    assert few.standard_error / many.standard_error == pytest.approx(3, rel=0.35)


def test_sets_without_a_kid_are_refused() -> None:
    with pytest.raises(ValueError, match="too few; give at least 2"):
        kid(normal(1, 0), normal(5, 1))
    with pytest.raises(ValueError, match="cannot be compared"):
        kid(normal(5, 0, 3), normal(5, 1, 4))
    with pytest.raises(ValueError, match="NaN"):
        kid(np.full((5, 3), np.nan), normal(5, 1, 3))
    with pytest.raises(ValueError, match="num_subsets is 1"):
        subset_kid(normal(5, 0), normal(5, 1), num_subsets=1)
