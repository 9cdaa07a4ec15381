import json
from pathlib import Path

import pytest

from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import (
    MANIFEST,
    Artifact,
    Store,
    fingerprint,
    read_manifest,
    sha256_file,
    write_json,
)
from sims_ray.storage.beside import atomic_path

SETTINGS = {"lr": 1e-3, "budgets": [1, 2], "network": {"width": 16, "mult": [1, 2]}}


def committed(tmp_path: Path) -> Artifact:
    artifact = Store(tmp_path).artifact("train", SETTINGS, ["parent"])
    artifact.path.mkdir()
    (artifact.path / "data.bin").write_bytes(b"12345")
    artifact.commit({"data.bin": {"rows": 5}}, {"shape": [1, 8, 8]})
    return artifact


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_fingerprint_depends_on_stage_settings_and_parents_in_order() -> None:
    prints = [
        fingerprint("train", SETTINGS, ["a", "b"]),
        fingerprint("tune", SETTINGS, ["a", "b"]),
        fingerprint("train", {**SETTINGS, "lr": 2e-3}, ["a", "b"]),
        fingerprint("train", {**SETTINGS, "network": {"width": 16, "mult": [2, 1]}}, ["a", "b"]),
        fingerprint("train", {**SETTINGS, "more": None}, ["a", "b"]),
        fingerprint("train", SETTINGS, ["b", "a"]),
        fingerprint("train", SETTINGS, ["ab"]),
        fingerprint("train", SETTINGS, []),
    ]
    assert len(set(prints)) == len(prints)
    assert all(len(value) == 64 for value in prints)


def test_a_fingerprint_does_not_depend_on_key_order_or_on_tuple_or_list() -> None:
    other = {"network": {"mult": (1, 2), "width": 16}, "budgets": (1, 2), "lr": 1e-3}
    assert fingerprint("train", other, ("a",)) == fingerprint("train", SETTINGS, ["a"])


def test_equal_settings_and_parents_give_the_same_directory_and_others_another(tmp_path: Path) -> None:
    store = Store(tmp_path)
    parent = store.artifact("data", {})
    artifact = store.artifact("train", SETTINGS, [parent])
    assert artifact == store.artifact("train", {**SETTINGS, "budgets": (1, 2)}, [parent.fingerprint])
    assert artifact.path.parent == tmp_path
    assert artifact.path != store.artifact("train", {**SETTINGS, "lr": 0.1}, [parent]).path
    assert artifact.path != store.artifact("train", SETTINGS, [store.artifact("data", {"n": 1})]).path


def test_without_a_manifest_nothing_is_complete_or_readable(tmp_path: Path) -> None:
    artifact = committed(tmp_path)
    (artifact.path / MANIFEST).unlink()
    assert not artifact.complete
    with pytest.raises(SimsError, match="not a finished artifact"):
        _ = artifact.manifest
    assert not Store(tmp_path).artifact("train", {}).complete


def test_what_is_committed_can_be_read_back(tmp_path: Path) -> None:
    artifact = committed(tmp_path)
    assert artifact.complete
    assert artifact.result == {"shape": [1, 8, 8]}
    manifest = read_manifest(artifact.path)
    assert manifest["files"] == {"data.bin": {"bytes": 5, "rows": 5, "sha256": sha256_file(artifact.path / "data.bin")}}
    assert manifest["settings"] == SETTINGS
    assert manifest["parents"] == ["parent"]
    assert manifest["fingerprint"] == artifact.fingerprint == fingerprint("train", SETTINGS, ["parent"])
    assert Store(tmp_path).artifact("train", SETTINGS, ["parent"]).complete


@pytest.mark.parametrize(("content", "found"), [(b"1234", "4 bytes"), (b"123456", "6 bytes"), (None, "missing")])
def test_a_committed_file_of_another_size_is_an_error_that_names_it(
    tmp_path: Path, content: bytes | None, found: str
) -> None:
    artifact = committed(tmp_path)
    file = artifact.path / "data.bin"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SimsError, match=f"{file} is {found} but its manifest says 5 bytes"):
        _ = artifact.complete


def test_a_file_that_is_not_there_cannot_be_committed(tmp_path: Path) -> None:
    artifact = Store(tmp_path).artifact("train", SETTINGS)
    artifact.path.mkdir()
    with pytest.raises(FileNotFoundError):
        artifact.commit({"absent.bin": {}})
    assert not artifact.complete


@pytest.mark.parametrize("torn", ["", "{", '{"files": {'])
def test_a_torn_manifest_is_refused_by_name(tmp_path: Path, torn: str) -> None:
    artifact = committed(tmp_path)
    (artifact.path / MANIFEST).write_text(torn)
    with pytest.raises(SimsError, match=MANIFEST):
        _ = artifact.complete


def test_a_writer_that_raises_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_path(tmp_path / "file") as beside:
        beside.write_bytes(b"half")
        raise KeyError
    assert contents(tmp_path) == {}


def test_a_writer_that_raises_leaves_the_old_file_as_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"old": 1})
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "file") as beside:
        beside.write_bytes(b"half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == before


def test_until_the_writer_is_done_the_path_holds_the_old_file_and_then_the_new_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"old": 1})
    with atomic_path(path) as beside:
        beside.write_text('{"new": 2}')
        assert json.loads(path.read_text()) == {"old": 1}
    assert contents(path.parent) == {"file.json": b'{"new": 2}'}
