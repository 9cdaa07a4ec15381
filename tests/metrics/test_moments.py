import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from sims_ray.metrics.features import feature_moments, images_moments, pixel_features
from sims_ray.metrics.moments import Moments, grouped_moments, merge_all, merge_groups


def features(n: int = 500, width: int = 7, seed: int = 0) -> NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width) * 10


def assert_equal_to(actual: Moments, expected: Moments, tolerance: float = 1e-10) -> None:
    assert actual.n == expected.n
    np.testing.assert_allclose(actual.mean, expected.mean, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(actual.covariance, expected.covariance, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parts", [1, 7, 64])
def test_moments_merged_from_parts_equal_numpy_s_over_all(parts: int) -> None:
    batch = features()
    merged = merge_all(Moments.of(part) for part in np.array_split(batch, parts))
    assert merged.n == len(batch)
    np.testing.assert_allclose(merged.mean, batch.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(merged.covariance, np.cov(batch, rowvar=False), rtol=1e-10, atol=1e-10)


def test_moments_of_single_vectors_merge_to_those_of_all() -> None:
    batch = features(20)
    assert_equal_to(merge_all(Moments.of(row[None]) for row in batch), Moments.of(batch))


def test_a_large_common_offset_does_not_spoil_the_covariance() -> None:
    batch = features()
    merged = merge_all(Moments.of(part) for part in np.array_split(batch + 1e6, 7))
    np.testing.assert_allclose(merged.covariance, np.cov(batch, rowvar=False), rtol=1e-6, atol=1e-6)


def test_merging_is_commutative_and_associative() -> None:
    a, b, c = (Moments.of(features(n, seed=n)) for n in (2, 30, 111))
    whole = a.merge(b).merge(c)
    for x, y, z in itertools.permutations((a, b, c)):
        assert_equal_to(x.merge(y).merge(z), whole)
        assert_equal_to(x.merge(y.merge(z)), whole)


def test_the_covariance_is_unbiased() -> None:
    assert Moments.of(np.array([[0.0], [2.0]])).covariance.item() == 2  # n - 1 = 1; n would give 1
    pairs = features(4000, 2).reshape(2000, 2, 2)
    mean_of_pairs = np.mean([Moments.of(pair).covariance for pair in pairs], axis=0)
    np.testing.assert_allclose(mean_of_pairs, np.cov(pairs.reshape(-1, 2), rowvar=False), rtol=0.1, atol=0.1)


def test_float32_features_are_accumulated_in_float64() -> None:
    batch = features().astype(np.float32)
    np.testing.assert_allclose(Moments.of(batch).covariance, np.cov(batch.astype(np.float64), rowvar=False), rtol=1e-10)


def test_saving_and_loading_is_exact(tmp_path: Path) -> None:
    saved = Moments.of(features())
    saved.save(tmp_path / "moments.npz")
    loaded = Moments.load(tmp_path / "moments.npz")
    assert loaded.n == saved.n
    assert (loaded.mean == saved.mean).all()
    assert (loaded.scatter == saved.scatter).all()


def test_a_covariance_of_one_vector_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 feature vectors, found 1"):
        _ = Moments.of(features(1)).covariance


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no moments to merge"):
        merge_all([])


def test_pixel_moments_are_those_of_the_images_in_unit_range_however_they_are_batched() -> None:
    images = np.random.default_rng(0).integers(0, 256, (600, 1, 2, 3), dtype=np.uint8)
    direct = Moments.of((images.reshape(600, 6) / 127.5 - 1).astype(np.float32))
    assert_equal_to(feature_moments(pixel_features, images), direct, 1e-6)
    assert_equal_to(images_moments(pixel_features, torch.from_numpy(images).split(90)), direct, 1e-6)


def test_an_empty_batch_is_refused_rather_than_turned_into_nan() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        Moments.of(np.zeros((0, 3)))


def test_moments_of_groups_are_those_of_their_rows_and_merge_to_those_of_all() -> None:
    batch, groups = features(200), np.random.default_rng(0).integers(-1, 4, 200)
    grouped = grouped_moments(batch, groups)
    assert list(grouped) == [-1, 0, 1, 2, 3]
    for group, moments in grouped.items():
        assert_equal_to(moments, Moments.of(batch[groups == group]))
    assert_equal_to(merge_all(grouped.values()), Moments.of(batch))


def test_groups_of_parts_merge_to_the_groups_of_all_where_some_are_missing() -> None:
    batch, groups = features(60), np.repeat([7, 2, 5], 20).astype(np.int32)
    merged = merge_groups(grouped_moments(batch[a:b], groups[a:b]) for a, b in ((0, 30), (30, 35), (35, 60)))
    assert list(merged) == [2, 5, 7]
    for group, moments in grouped_moments(batch, groups).items():
        assert_equal_to(merged[group], moments)


@pytest.mark.parametrize("groups", [np.zeros(9, int), np.zeros(10), np.zeros((10, 1), int)])
def test_groups_that_do_not_fit_the_features_are_refused(groups: NDArray[np.int64]) -> None:
    with pytest.raises(ValueError, match="do not fit 10 feature vectors"):
        grouped_moments(features(10), groups)
