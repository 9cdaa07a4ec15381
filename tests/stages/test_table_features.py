"""One pass over a table: moments, kept features, groups, and which rows stand for a table."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.metrics.features import pixel_features
from sims_ray.metrics.moments import Moments
from sims_ray.stages.extractors import load_extractor_of
from sims_ray.stages.table_features import Reference, check_column, first_or_random_rows, table_features
from tests.data.tables import commit, random_rows, synthetic_set

SHAPE = (1, 3, 4)


@pytest.fixture
def table(tmp_path: Path) -> SampleTable:
    """1,000 rows in three files, one of which is longer than a batch."""
    sizes = (130, 700, 170)
    parts = [random_rows(n, SHAPE, first_id=1000 * i, attributes=np.arange(n) % 3) for i, n in enumerate(sizes)]
    return commit(tmp_path / "table", *parts)


def direct(table: SampleTable) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    return pixel_features(torch.from_numpy(table.head(len(table)).images.copy())).numpy()


def test_a_pass_leaves_the_moments_and_the_features_of_all_rows(table: SampleTable) -> None:
    found, features = table_features(table, load_extractor_of("pixels"), "x"), direct(table)
    expected = Moments.of(features)
    np.testing.assert_array_equal(found.features, features)
    np.testing.assert_allclose(found.moments.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.moments.scatter, expected.scatter, rtol=1e-10, atol=1e-10)
    assert found.moments.n == 1000 and found.moments.mean.dtype == np.float64 and found.groups is None


def test_moments_are_of_the_rows_looked_at_and_features_of_those_kept(table: SampleTable) -> None:
    rows = np.array([0, 5, 129, 130, 131, 700, 829, 830, 999])
    keep = rows[[1, 3, 6, 8]]
    found = table_features(table, load_extractor_of("pixels"), "x", rows=rows, keep=keep, column="attribute")
    assert found.moments.n == 9
    np.testing.assert_allclose(found.moments.mean, direct(table)[rows].mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_array_equal(found.features, direct(table)[keep])
    attributes = table.head(1000).attributes
    assert attributes is not None and found.groups is not None
    np.testing.assert_array_equal(found.groups, attributes[keep])


def test_groups_are_the_labels_of_the_rows(table: SampleTable) -> None:
    found = table_features(table, load_extractor_of("pixels"), "x", column="label")
    assert found.groups is not None
    np.testing.assert_array_equal(found.groups, table.head(1000).labels)


def test_files_without_a_row_that_is_wanted_are_not_read(table: SampleTable) -> None:
    first, _, last = table.file_rows
    for name in (first, last):
        table.folder.delete(name)
    found = table_features(table, load_extractor_of("pixels"), "x", rows=np.arange(200, 300))
    assert found.moments.n == len(found.features) == 100


def test_a_pass_tells_its_speed(table: SampleTable, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sims_ray"):
        table_features(table, load_extractor_of("pixels"), "features of mine")
    assert "features of mine: 1,000 of 1,000 images" in caplog.text and "images/s" in caplog.text


def test_a_synthetic_set_is_stood_for_by_its_first_rows_and_other_tables_by_random_ones(
    table: SampleTable, tmp_path: Path
) -> None:
    made = synthetic_set(tmp_path / "set", [range(0, 20), range(20, 50)])
    assert first_or_random_rows(made, 25).tolist() == list(range(25))
    rows = first_or_random_rows(table, 100)
    assert len(set(rows.tolist())) == 100 and (np.diff(rows) > 0).all()
    assert 400 < rows.mean() < 600
    np.testing.assert_array_equal(rows, first_or_random_rows(table, 100))
    assert first_or_random_rows(table, 1000).tolist() == list(range(1000))


def test_what_cannot_be_grouped_is_refused_in_a_sentence(tmp_path: Path) -> None:
    unlabelled = commit(tmp_path / "a", random_rows(9, labels=np.full(9, -1, np.int32)))
    with pytest.raises(SimsError, match=r"has no labels; leave --per out"):
        check_column(unlabelled, "label")
    with pytest.raises(SimsError, match=r"has no column 'attribute'; group by label"):
        check_column(unlabelled, "attribute")
    some = [random_rows(9, attributes=np.zeros(9, np.int32)), random_rows(9, first_id=9)]
    mixed = commit(tmp_path / "b", *some)
    check_column(mixed, "label")
    with pytest.raises(SimsError, match="has no column 'attribute'"):
        check_column(mixed, "attribute")


def test_a_reference_takes_a_random_sample_in_random_order(table: SampleTable) -> None:
    found = table_features(table, load_extractor_of("pixels"), "x")
    reference = Reference.of_table(found, 300, whole=False)
    assert reference.features.shape == (300, 12) and reference.nimg == 1000 and reference.whole is None
    rows = [int(np.flatnonzero((found.features == f).all(1))[0]) for f in reference.features]
    assert len(set(rows)) == 300 and abs(np.mean(rows[:150]) - np.mean(rows[150:])) < 200 and np.std(rows) > 200
    assert Reference.of_table(found, 300, whole=True).whole is found


def test_statistics_that_are_none_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SimsError, match=r"there is no file .*a\.npz; give the statistics"):
        Reference.of_file(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", mu=np.zeros(3))
    with pytest.raises(SimsError, match="reference statistics are arrays mu and sigma"):
        Reference.of_file(str(tmp_path / "b.npz"))
