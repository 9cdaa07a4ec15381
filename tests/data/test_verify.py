"""Verification finds whatever is not as the manifest says, and nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sims_ray.data.importers import import_digits
from sims_ray.data.merge import merge
from sims_ray.data.samples import encode_samples
from sims_ray.data.table import SampleTable
from sims_ray.data.verify import Verified, verify
from sims_ray.storage.artifacts import MANIFEST, Artifact, sha256_file
from tests.data.tables import commit, random_rows, synthetic_set

RANGES = [range(0, 5), range(5, 10), range(10, 15)]
FIRST, SECOND = "seeds-000000000000-000000000004.parquet", "seeds-000000000005-000000000009.parquet"

PEAK = """
import sys
import pyarrow as pa
from sims_ray.data.table import SampleTable
from sims_ray.data.verify import verify
assert not verify(SampleTable(sys.argv[1])).faults
print(pa.default_memory_pool().max_memory())
"""


def edited(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def listed_as_it_is(folder: Path, name: str, **facts: Any) -> None:
    """Let the manifest say what a file is now."""
    now = {"sha256": sha256_file(folder / name), "bytes": (folder / name).stat().st_size, **facts}
    edited(folder, lambda manifest: manifest["files"][name].update(now))


def faults(folder: Path) -> list[str]:
    return list(verify(SampleTable(folder)).faults)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A synthetic set of three files."""
    synthetic_set(tmp_path / "set", RANGES)
    return tmp_path / "set"


def test_whole_tables_have_no_faults(tmp_path: Path, folder: Path) -> None:
    import_digits(Artifact(tmp_path / "digits", "digits", {}, ()))
    tables = [
        SampleTable(folder),
        SampleTable(tmp_path / "digits"),
        commit(tmp_path / "images", random_rows(4), random_rows(3, first_id=9)),
        commit(tmp_path / "latents", random_rows(4, (4, 2, 2), kind="latent")),
        commit(tmp_path / "empty", random_rows(0)),
    ]
    tables.append(merge([tables[2], commit(tmp_path / "others", random_rows(5))], tmp_path / "merged"))
    for table in tables:
        seen: list[int] = []
        found = verify(table, seen.append)
        size = sum(path.stat().st_size for path in Path(table.folder.location).glob("*.parquet"))
        assert found == Verified(len(table), len(table.file_rows), size, (), ())
        assert len(seen) == len(table.file_rows) and seen == sorted(seen) and seen[-1] == len(table)


def test_a_table_in_an_object_store_is_verified_there(s3_folder: str) -> None:
    table = synthetic_set(s3_folder, RANGES)
    assert verify(table).faults == ()
    table.folder.put(SECOND, table.folder.read(SECOND)[:-1])
    table.folder.delete(FIRST)
    first, second = verify(table).faults
    assert first == f"{FIRST} is missing" and second.startswith(f"{SECOND} is ")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 0.9, 1.0])
def test_one_flipped_bit_is_found_wherever_it_is(folder: Path, share: float) -> None:
    data = bytearray((folder / SECOND).read_bytes())
    data[int(share * (len(data) - 1))] ^= 16
    (folder / SECOND).write_bytes(data)
    (fault,) = faults(folder)
    assert fault.startswith(f"{SECOND} has SHA-256 ") and "the manifest says" in fault


def test_a_page_that_decodes_wrongly_is_found_even_where_the_digest_is_right(folder: Path) -> None:
    synthetic_set(folder.parent / "larger", RANGES, (3, 32, 32))
    folder = folder.parent / "larger"
    data = bytearray((folder / SECOND).read_bytes())
    data[len(data) // 2] ^= 16  # of pixels, which decode to others
    (folder / SECOND).write_bytes(data)
    listed_as_it_is(folder, SECOND)
    (fault,) = faults(folder)
    assert fault.startswith(f"{SECOND} cannot be read (") and "CRC" in fault


def test_truncated_and_missing_files_are_found(folder: Path) -> None:
    size = (folder / FIRST).stat().st_size
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-7])
    (folder / SECOND).unlink()
    said = f"{FIRST} is {size - 7:,} bytes, the manifest says {size}", f"{SECOND} is missing"
    assert faults(folder) == list(said)


def test_swapped_files_are_found_by_digest_and_by_the_seeds_in_their_names(folder: Path) -> None:
    first, second = (folder / FIRST).read_bytes(), (folder / SECOND).read_bytes()
    (folder / FIRST).write_bytes(second)
    (folder / SECOND).write_bytes(first)
    found = faults(folder)
    assert [fault.split()[0] for fault in found] == [FIRST, SECOND]
    for name in (FIRST, SECOND):
        listed_as_it_is(folder, name)
    assert faults(folder) == [f"{name} holds other ids than its name says" for name in (FIRST, SECOND)]


def test_a_wrong_row_count_in_the_manifest_is_found(folder: Path) -> None:
    listed_as_it_is(folder, FIRST, rows=6)
    assert faults(folder) == [f"{FIRST} holds 5 rows, the manifest says 6"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rows", 14, "the table has rows 15, the manifest says 14"),
        ("num_classes", 9, "the table has num_classes 4, the manifest says 9"),
        ("unlabelled", 99, ", the manifest says 99"),
    ],
)
def test_totals_that_are_not_those_of_the_rows_are_found(folder: Path, key: str, value: int, said: str) -> None:
    edited(folder, lambda manifest: manifest["result"].update({key: value}))
    (fault,) = faults(folder)
    assert fault.endswith(said) and key in fault


@pytest.mark.parametrize(("key", "value"), [("shape", [1, 4, 16]), ("kind", "latent")])
def test_another_shape_or_kind_than_the_manifest_says_is_found(folder: Path, key: str, value: Any) -> None:
    edited(folder, lambda manifest: manifest["result"].update({key: value}))
    found = faults(folder)
    assert len(found) == 3 and all("holds images" in fault and "the manifest says" in fault for fault in found)


def test_ids_that_are_there_twice_are_found_within_a_file_and_between_files(tmp_path: Path) -> None:
    rows = random_rows(4)
    commit(tmp_path / "between", rows, random_rows(3, first_id=2))
    said = "2 ids are there more than once, like 2 in part-00000.parquet, part-00001.parquet"
    assert faults(tmp_path / "between") == [said]
    commit(tmp_path / "within", random_rows(2, first_id=9), replace(rows, ids=np.array([3, 1, 2, 3])))
    assert faults(tmp_path / "within") == ["1 ids are there more than once, like 3 in part-00001.parquet"]


def test_ids_of_different_sources_may_be_equal_and_those_of_one_may_not(tmp_path: Path) -> None:
    one, other = (random_rows(4, sources=np.array([name] * 4)) for name in ("one", "other"))
    commit(tmp_path / "fine", one, other)
    assert not faults(tmp_path / "fine")
    mixed = random_rows(3, first_id=3, sources=np.array(["one", "other", "other"]))
    commit(tmp_path / "not", one, other, replace(mixed, ids=np.array([9, 3, 10])))
    (fault,) = faults(tmp_path / "not")
    assert fault == "1 ids of source other are there more than once, like 3 in part-00001.parquet, part-00002.parquet"


def test_a_file_of_another_set_is_found(tmp_path: Path, folder: Path) -> None:
    (folder / SECOND).write_bytes(encode_samples(random_rows(5, (1, 8, 8), 5), {"fingerprint": "f" * 64}))
    listed_as_it_is(folder, SECOND)
    (fault,) = faults(folder)
    assert f"{SECOND} was made for the table ffffffffffff..." in fault


def test_values_that_no_table_may_hold_are_found(tmp_path: Path) -> None:
    latents = random_rows(3, (4, 2, 2), kind="latent")
    latents.images[1, 0, 0, 0] = np.nan
    commit(tmp_path / "latents", latents)
    commit(tmp_path / "labels", random_rows(3, labels=np.array([0, -2, 1], np.int32)))
    for name in ("latents", "labels"):
        (fault,) = faults(tmp_path / name)
        assert "part-00000.parquet has 1 rows with a label below -1 or a latent that is not finite" in fault


def test_all_faults_are_listed_and_what_is_left_over_is_none(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / SECOND).write_bytes(b"PAR1")
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").write_text("mine")
    found = verify(SampleTable(folder))
    assert [fault.split()[0] for fault in found.faults] == [FIRST, SECOND] and found.left_over == ("notes.txt",)


def test_other_files_of_the_manifest_are_hashed_too(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    edited(folder, lambda manifest: manifest["files"].update({"notes.txt": {}}))
    listed_as_it_is(folder, "notes.txt")
    assert not faults(folder) and not verify(SampleTable(folder)).left_over
    (folder / "notes.txt").write_text("mind")
    assert [fault.split()[0] for fault in faults(folder)] == ["notes.txt"]


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    peaks = []
    for n in (150, 450):
        commit(tmp_path / str(n), random_rows(n, (3, 128, 128)))
        command = [sys.executable, "-c", PEAK, str(tmp_path / str(n))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    assert peaks[1] < 1.2 * peaks[0] and peaks[1] < 48 << 20  # of Arrow's; rows alone are 21 MiB, decoding takes more
