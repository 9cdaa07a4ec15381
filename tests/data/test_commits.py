"""New tables appear complete or not at all, and nobody's finished table is touched."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sims_ray.data.commits import atomic_folder, check_new, new_table
from sims_ray.data.table import SampleTable, table_result
from sims_ray.errors import SimsError
from sims_ray.storage.folders import Folder
from tests.data.tables import commit, contents, random_rows

DIES = """
import os, signal, sys
from pathlib import Path
from sims_ray.data.commits import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"1")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=["disk", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "new" / "table") if request.param == "disk" else request.getfixturevalue("s3_folder")


def test_a_table_is_there_once_its_block_ends(out: str) -> None:
    rows = random_rows(3)
    with new_table(out) as made:
        made.add("part-00000.parquet", rows, {})
        assert "manifest.json" not in Folder.at(out).files()
        printed = made.commit("import", {}, table_result((3, 8, 8), rows.labels, 3))
    assert SampleTable(out).fingerprint == printed and len(SampleTable(out)) == 3


@pytest.mark.parametrize("error", [SimsError("no"), KeyboardInterrupt()], ids=["fault", "Ctrl-C"])
def test_what_stops_the_work_leaves_nothing(out: str, error: BaseException) -> None:
    with pytest.raises(type(error)), new_table(out) as made:
        made.add("part-00000.parquet", random_rows(3), {})
        raise error
    folder = Folder.at(out)
    assert folder.files() == {}
    assert folder.local is None or not list(folder.local.parent.iterdir())


def test_who_comes_second_is_told_and_the_first_table_stays_whole(out: str) -> None:
    commit(f"{out}-elsewhere", random_rows(4))
    other = contents(f"{out}-elsewhere")
    with pytest.raises(SimsError, match="choose another name"), new_table(out) as made:
        made.add("part-00000.parquet", random_rows(3), {})
        for name, content in other.items():  # another process finishes meanwhile
            Folder.at(out).put(name, content)
        made.commit("import", {}, table_result((3, 8, 8), random_rows(3).labels, 3))
    assert contents(out) == other and len(SampleTable(out).head(4)) == 4


def test_what_is_there_is_refused_and_an_empty_folder_is_not(out: str, tmp_path: Path) -> None:
    assert check_new(out) == Folder.at(out)
    Folder.at(out).put("mine", b"1")
    with pytest.raises(SimsError, match="choose another name or remove it first"):
        check_new(out)
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(SimsError, match="is not an empty folder"):
        check_new(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert check_new(tmp_path / "empty").files() == {}


def test_what_a_killed_process_left_goes_with_the_next_attempt(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "out")], timeout=60)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "whole").write_bytes(b"1")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["out", "out/whole"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    with pytest.raises(SimsError, match="cannot be made"), atomic_folder(tmp_path / "file" / "out"):
        pass
