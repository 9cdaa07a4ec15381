"""Merged tables hold every row once, and the parts of a set make the set."""

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sims_ray.data.commits import content_fingerprint
from sims_ray.data.importers import import_images
from sims_ray.data.merge import merge
from sims_ray.data.samples import Samples
from sims_ray.data.table import SampleTable
from sims_ray.data.verify import verify
from sims_ray.errors import SimsError
from sims_ray.storage.folders import Folder
from tests.data.tables import commit, contents, part_of_set, random_rows, synthetic_set

RANGES = [range(0, 4), range(4, 9), range(9, 10), range(10, 16)]


def refused(tables: Sequence[SampleTable], out: Path | str) -> str:
    """The sentence of a merge that is refused and leaves nothing."""
    folder = Folder.at(out)
    before = folder.files(), list(folder.local.parent.iterdir()) if folder.local else None
    with pytest.raises(SimsError) as caught:
        merge(tables, out)
    assert (folder.files(), list(folder.local.parent.iterdir()) if folder.local else None) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def whole(table: SampleTable) -> Samples:
    return table.head(len(table))


def assert_rows(merged: SampleTable, *parts: Samples) -> Samples:
    rows = whole(merged)
    for name in ("ids", "images", "labels"):
        expected = np.concatenate([getattr(part, name) for part in parts])
        assert getattr(rows, name).dtype == expected.dtype and np.array_equal(getattr(rows, name), expected)
    return rows


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_the_parts_of_a_set_make_the_whole_set_file_for_file(
    place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    where = str(tmp_path) if place == "disk" else request.getfixturevalue("s3_folder")
    whole_set = synthetic_set(tmp_path / "whole", RANGES)
    names = list(whole_set.file_rows)
    halves = [part_of_set(whole_set, f"{where}/{i}", half) for i, half in enumerate((names[:2], names[2:]))]
    seen: list[int] = []
    merged = merge(halves, f"{where}/out", seen.append)
    assert contents(f"{where}/out") == contents(tmp_path / "whole")
    assert merged.fingerprint == whole_set.fingerprint and seen == [4, 9, 10, 16]


def test_parts_may_come_in_any_order_and_number_and_interleaved(tmp_path: Path) -> None:
    whole_set = synthetic_set(tmp_path / "whole", RANGES)
    a, b, c, d = whole_set.file_rows
    parts = [part_of_set(whole_set, tmp_path / str(i), names) for i, names in enumerate(([a, c], [d], [b]))]
    for i, order in enumerate(itertools.permutations(parts)):
        merge(order, tmp_path / f"out{i}")
        assert contents(tmp_path / f"out{i}") == contents(tmp_path / "whole")


def test_parts_of_a_set_that_overlap_or_leave_seeds_out_are_refused(tmp_path: Path) -> None:
    whole_set = synthetic_set(tmp_path / "whole", RANGES)
    a, b, c, d = whole_set.file_rows
    part = {name: part_of_set(whole_set, tmp_path / name, [name]) for name in (a, b, c, d)}
    out = tmp_path / "out"
    assert "hold the same ids" in (said := refused([part[a], whole_set], out)) and f"{tmp_path / 'whole'}/{a}" in said
    assert "no table holds seeds 4 to 8 of the set" in refused([part[a], part[c]], out)
    assert "no table holds seeds 0 to 3 of the set" in refused([part[c], part[b]], out)


def test_a_part_that_is_not_as_its_manifest_says_is_refused(tmp_path: Path) -> None:
    whole_set = synthetic_set(tmp_path / "whole", RANGES)
    a, *others = whole_set.file_rows
    parts = [part_of_set(whole_set, tmp_path / "a", [a]), part_of_set(whole_set, tmp_path / "b", others)]
    path = tmp_path / "b" / others[1]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert f"{path} has SHA-256" in refused(parts, tmp_path / "out")
    path.unlink()
    assert f"{path} is missing" in refused(parts, tmp_path / "out")


def test_other_tables_follow_each_other_with_their_source(tmp_path: Path) -> None:
    a, b = [random_rows(3), random_rows(2, first_id=3)], [random_rows(4)]
    real, synthetic = commit(tmp_path / "real", *a, classes=["cat", "dog", "owl", "cow"]), commit(tmp_path / "new", *b)
    seen: list[int] = []
    merged = merge([real, synthetic], tmp_path / "out", seen.append)
    rows = assert_rows(merged, *a, *b)
    assert rows.sources is not None and rows.sources.tolist() == ["real"] * 5 + ["new"] * 4
    assert rows.weights is None and rows.attributes is None and seen == [3, 5, 9]
    result, labels = merged.manifest["result"], rows.labels
    assert result["unlabelled"] == (labels == -1).sum() and result["num_classes"] == labels.max() + 1
    assert result["classes"] == ["cat", "dog", "owl", "cow"] and merged.shape == (3, 8, 8)
    assert merged.manifest["parents"] == [real.fingerprint, synthetic.fingerprint]
    assert merged.manifest["settings"]["sources"] == [
        {"source": "real", "rows": 5, "fingerprint": real.fingerprint},
        {"source": "new", "rows": 4, "fingerprint": synthetic.fingerprint},
    ]
    assert not verify(merged).faults


def test_the_fingerprint_is_of_the_content_wherever_the_tables_lie(tmp_path: Path) -> None:
    tables = [commit(tmp_path / "x" / name, random_rows(3, first_id=i)) for i, name in enumerate("ab")]
    merged = merge(tables, tmp_path / "out")
    shutil.move(tmp_path / "x", tmp_path / "y")
    moved = merge([SampleTable(tmp_path / "y" / name) for name in "ab"], tmp_path / "other")
    assert merged.fingerprint == moved.fingerprint == content_fingerprint(merged.manifest["files"])
    assert contents(tmp_path / "out") == contents(tmp_path / "other")
    turned = merge([SampleTable(tmp_path / "y" / name) for name in "ba"], tmp_path / "turned")
    assert turned.fingerprint != merged.fingerprint


def test_latents_and_tables_in_object_stores_are_merged_too(tmp_path: Path, s3_folder: str) -> None:
    parts = [random_rows(3, (4, 2, 2), first_id=first, kind="latent") for first in (0, 5)]
    tables = [commit(f"{s3_folder}/a", parts[0]), commit(tmp_path / "b", parts[1])]
    merged = merge(tables, f"{s3_folder}/out")
    assert_rows(merged, *parts)
    assert merged.kind == "latent" and not verify(merged).faults
    assert set(contents(f"{s3_folder}/out")) == {"manifest.json", "part-00000.parquet", "part-00001.parquet"}


def test_weights_and_attributes_survive_and_are_filled_where_a_table_has_none(tmp_path: Path) -> None:
    weights, attributes = np.array([0.5, 2, 0], np.float32), np.array([1, 0, 1], np.int32)
    parts = [
        random_rows(3, weights=weights),
        random_rows(3, first_id=3, attributes=attributes),
        random_rows(2, first_id=6),
    ]
    tables = [commit(tmp_path / name, part) for name, part in zip("abc", parts, strict=True)]
    rows = assert_rows(merge(tables, tmp_path / "out"), *parts)
    assert rows.weights is not None and rows.weights.tolist() == [0.5, 2, 0] + [1] * 5
    assert rows.attributes is not None and rows.attributes.tolist() == [-1] * 3 + [1, 0, 1] + [-1] * 2
    assert rows.weights.dtype == np.float32 and rows.attributes.dtype == np.int32


def test_sources_of_one_name_are_told_apart_and_those_of_merged_tables_are_kept(tmp_path: Path) -> None:
    a, b = (commit(tmp_path / parent / "set", random_rows(2, first_id=i)) for i, parent in enumerate("ab"))
    merged = merge([a, b], tmp_path / "both")
    names = [f"set-{table.fingerprint[:8]}" for table in (a, b)]
    assert whole(merged).sources.tolist() == [names[0]] * 2 + [names[1]] * 2  # type: ignore[union-attr]
    again = merge([merged, commit(tmp_path / "c", random_rows(1))], tmp_path / "all")
    expected = [*(f"both/{name}" for name in names for _ in range(2)), "c"]
    assert whole(again).sources.tolist() == expected and not verify(again).faults  # type: ignore[union-attr]


def test_ids_that_come_twice_from_one_origin_are_refused(tmp_path: Path) -> None:
    rows = random_rows(3)
    table, other = commit(tmp_path / "a", rows), commit(tmp_path / "other", random_rows(9))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    out = tmp_path / "out"
    assert f"id 0 is more than once in {tmp_path}/a and {tmp_path}/copy" in refused(
        [table, other, SampleTable(tmp_path / "copy")], out
    )
    torn = commit(tmp_path / "torn", replace(rows, ids=np.array([4, 7, 7])))
    assert f"id 7 is more than once in {tmp_path}/torn;" in refused([table, torn], out)
    whole_set = synthetic_set(tmp_path / "set", RANGES, (3, 8, 8))
    part = part_of_set(whole_set, tmp_path / "part", list(whole_set.file_rows)[1:2])
    assert "id 4 is more than once in" in refused([whole_set, table, part], out)


@pytest.mark.parametrize(
    ("second", "result", "said"),
    [
        (random_rows(2, (3, 4, 4), 9), {}, "holds images [3, 8, 8], "),
        (random_rows(2, (3, 8, 8), 9, "latent"), {}, "merge tables of one kind and shape"),
        (random_rows(2, first_id=9), {"classes": ["dog", "cat"]}, "name their classes differently"),
        (random_rows(2, first_id=9), {"latents": {"vae": "other"}}, "hold latents of different kinds"),
    ],
    ids=["shape", "kind", "classes", "latents"],
)
def test_tables_that_do_not_fit_are_refused(tmp_path: Path, second: Samples, result: dict[str, Any], said: str) -> None:
    first = commit(tmp_path / "a", random_rows(2), classes=["cat", "dog"], latents={"vae": "one"})
    found = refused([first, commit(tmp_path / "b", second, **result)], tmp_path / "out")
    assert said in found and str(tmp_path / "a") in found and str(tmp_path / "b") in found


def test_fewer_than_two_tables_and_an_output_that_is_there_are_refused(tmp_path: Path, s3_folder: str) -> None:
    tables = [commit(tmp_path / name, random_rows(2, first_id=i)) for i, name in enumerate("ab")]
    for some in ([], tables[:1]):
        assert "merging takes two or more tables" in refused(some, tmp_path / "out")
    assert "is not an empty folder" in refused(tables, tmp_path / "a")
    Folder.at(s3_folder).put("mine", b"1")
    assert f"{s3_folder} holds mine" in refused(tables, s3_folder)
    (tmp_path / "empty").mkdir()
    assert len(merge(tables, tmp_path / "empty")) == 4


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_file_that_cannot_be_read_leaves_nothing(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    out = tmp_path / "out" if place == "disk" else request.getfixturevalue("s3_folder")
    first, second, third = (random_rows(2, (3, 32, 32), first_id=2 * i) for i in range(3))
    tables = [commit(tmp_path / "a", first), commit(tmp_path / "b", second, third)]
    path = tmp_path / "b" / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # of the pixels
    path.write_bytes(data)
    assert f"{path} is not a file of a sample table" in refused(tables, out)


def test_what_is_merged_is_imported_no_more(tmp_path: Path) -> None:
    tables = [commit(tmp_path / name, random_rows(2, first_id=i)) for i, name in enumerate("ab")]
    merge(tables, tmp_path / "out")
    with pytest.raises(SimsError, match="already part of a sample table"):
        import_images(tmp_path / "out", tmp_path / "imported")
