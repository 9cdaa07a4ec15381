"""The sample table: exact, plain Parquet, readable in order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sims_ray.data.samples import Samples, read_samples, write_samples
from sims_ray.data.table import SampleTable, table_result
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import Artifact

PLAIN_READ = """
import json, sys
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
table = pq.read_table(sys.argv[1])
image = table.schema.field("image").type
assert isinstance(image, pa.FixedShapeTensorType) and image.value_type == pa.uint8()
tensor = table["image"].combine_chunks().to_numpy_ndarray()
facts = json.loads(table.schema.metadata[b"sims_ray"])
types = {name: str(table.schema.field(name).type) for name in ("id", "label")}
print(json.dumps({"facts": facts, "types": types, "shape": tensor.shape, "sum": int(tensor.astype(np.int64).sum())}))
assert "sims_ray" not in sys.modules
"""


def samples(n: int, shape: tuple[int, int, int] = (3, 4, 5), first_id: int = 0) -> Samples:
    random = np.random.default_rng(first_id)
    images = random.integers(0, 256, (n, *shape), dtype=np.uint8)
    return Samples(np.arange(first_id, first_id + n), images, random.integers(-1, 3, n, dtype=np.int32))


def commit(folder: Path, *parts: Samples) -> SampleTable:
    for i, part in enumerate(parts):
        write_samples(folder / f"part-{i:05d}.parquet", part, {})
    labels = np.concatenate([part.labels for part in parts])
    artifact = Artifact(folder, "import", {"source": "test"}, ())
    files = {f"part-{i:05d}.parquet": {"rows": len(part)} for i, part in enumerate(parts)}
    artifact.commit(files, table_result(parts[0].images.shape[1:], labels, len(labels)))
    return SampleTable(folder)


def assert_equal(a: Samples, b: Samples) -> None:
    for ours, theirs in ((a.ids, b.ids), (a.images, b.images), (a.labels, b.labels)):
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (3, 4, 5), (3, 32, 32)])
@pytest.mark.parametrize("n", [0, 1, 7])
def test_table_round_trip_is_exact(tmp_path: Path, shape: tuple[int, int, int], n: int) -> None:
    written = samples(n, shape, first_id=2**32 - 8)
    write_samples(tmp_path / "a.parquet", written, {})
    assert_equal(read_samples(tmp_path / "a.parquet"), written)


def test_a_slice_of_a_larger_array_is_written_exactly(tmp_path: Path) -> None:
    whole = samples(9)
    part = Samples(whole.ids[3:6], whole.images[3:6], whole.labels[3:6])
    write_samples(tmp_path / "a.parquet", part, {})
    assert_equal(read_samples(tmp_path / "a.parquet"), part)


def test_equal_content_makes_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_samples(tmp_path / name, samples(5), {"y": 1, "x": 2} if name == "a" else {"x": 2, "y": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_plain_pyarrow_reads_a_shard_without_sims_ray(tmp_path: Path) -> None:
    written = samples(6)
    write_samples(tmp_path / "a.parquet", written, {"model": "abc"})
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", PLAIN_READ, str(tmp_path / "a.parquet")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "facts": {"schema_version": 1, "model": "abc"},
        "types": {"id": "int64", "label": "int32"},
        "shape": [6, 3, 4, 5],
        "sum": int(written.images.astype(np.int64).sum()),
    }


def test_head_is_a_prefix(tmp_path: Path) -> None:
    parts = samples(3), samples(2, first_id=3), samples(4, first_id=5)
    table = commit(tmp_path, *parts)
    whole = table.head(9)
    assert len(table) == 9 and whole.ids.tolist() == list(range(9))
    assert np.array_equal(whole.images, np.concatenate([part.images for part in parts]))
    for n in range(1, 9):
        assert_equal(table.head(n), Samples(whole.ids[:n], whole.images[:n], whole.labels[:n]))


def test_head_beyond_the_end_says_how_many_rows_there_are(tmp_path: Path) -> None:
    with pytest.raises(SimsError, match="has 3 rows, 4 were asked for"):
        commit(tmp_path, samples(3)).head(4)


def test_files_come_in_order(tmp_path: Path) -> None:
    parts = [samples(1, first_id=i) for i in range(12)]
    assert [part.ids[0] for part in commit(tmp_path, *parts).files()] == list(range(12))


def test_a_table_knows_its_shape_classes_and_fingerprint(tmp_path: Path) -> None:
    part = samples(3)
    table = commit(tmp_path, Samples(part.ids, part.images, np.array([0, 4, -1], np.int32)))
    assert (table.shape, table.num_classes) == ((3, 4, 5), 5)
    assert table.fingerprint == Artifact(tmp_path, "import", {"source": "test"}, ()).fingerprint


@pytest.mark.parametrize("labels", [[], [-1, -1]])
def test_a_table_without_labels_has_no_classes(labels: list[int]) -> None:
    assert table_result((1, 2, 2), np.array(labels, np.int32), len(labels))["num_classes"] == 0


@pytest.mark.parametrize("kind", ["missing", "text", "other columns", "plain bytes"])
def test_a_file_that_is_no_sample_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.parquet"
    if kind == "text":
        path.write_text("not Parquet")
    elif kind != "missing":
        pa.parquet.write_table(pa.table({"x" if kind == "other columns" else "image": [b"1"]}), path)
    with pytest.raises(SimsError, match=r"a.parquet is not a file of a sample table"):
        read_samples(path)


def test_a_folder_without_manifest_or_files_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(SimsError, match=r"no manifest.json"):
        SampleTable(tmp_path)
    Artifact(tmp_path, "import", {}, ()).commit({})
    with pytest.raises(SimsError, match="lists no sample files"):
        SampleTable(tmp_path)


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_samples(tmp_path / "a.parquet", samples(2), {"not JSON": object()})
    assert not list(tmp_path.iterdir())
