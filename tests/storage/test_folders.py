"""Folders: whole files or none, on disks and in a real S3, and one sentence when the place is not there."""

import gzip
import hashlib
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow.fs import FileSystem

from sims_ray.errors import SimsError
from sims_ray.storage.beside import STALE_S
from sims_ray.storage.folders import Folder, absolute
from sims_ray.storage.stores import open_store

NAMES = ("plain.bin", "two words.bin", "grüße 文.bin", "50%25.bin", "a+b&c=d#e.bin", "packed.gz", "x.tmp")
PART_BYTES = 12 << 20  # more than S3 takes in one part of pyarrow's
REFUSED_S = 30.0

RACE = """
import sys, time
from pathlib import Path
from sims_ray.storage.folders import Folder
folder, start, me = Folder.at(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
while not start.exists():
    time.sleep(0.001)
print(*[i for i in range(40) if folder.create(f"file-{i}", me.encode() * 100_000)])
"""
DIES = """
import os, signal, sys
from pathlib import Path
from sims_ray.storage.beside import atomic_path
with atomic_path(Path(sys.argv[1]) / "a.bin") as beside:
    beside.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=["disk", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An absent folder whose name needs quoting, on a disk and in S3."""
    if request.param == "disk":
        return Folder.at(tmp_path / "größe 50% #1")
    return Folder.at(f"{request.getfixturevalue('s3_folder')}/größe 50%25 #1")


def error_of(action: Callable[[], Any]) -> str:
    with pytest.raises(SimsError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def everything(folder: Folder) -> dict[str, Callable[[], Any]]:
    return {
        "listed": folder.files,
        "size": lambda: folder.size("a"),
        "read": lambda: folder.read("a"),
        "written": lambda: folder.put("a", b"1"),
        "created": lambda: folder.create("b", b"1"),
        "removed": lambda: folder.delete("a"),
        "checked": folder.check_writable,
    }


def test_what_is_put_is_read_back_whatever_the_name(folder: Folder) -> None:
    contents = {name: name.encode() * 9 for name in NAMES}
    for name, data in contents.items():
        folder.put(name, data)
    assert folder.files() == {name: len(contents[name]) for name in sorted(NAMES)}
    assert list(folder.files()) == sorted(NAMES)
    for name, data in contents.items():
        assert folder.read(name) == data and folder.size(name) == len(data)
        assert folder.sha256(name) == hashlib.sha256(data).hexdigest()
        with folder.open(name) as file:
            file.seek(5)
            assert file.read(4) == data[5:9]


def test_the_name_of_a_folder_is_taken_as_it_is_written(s3_folder: str) -> None:
    Folder.at(f"{s3_folder}/a b ü#").put("x", b"1")
    assert Folder.at(f"{s3_folder}/a%20b%20%C3%BC%23").files() == {"x": 1}


def test_bytes_are_kept_as_they_are_whatever_the_suffix(folder: Folder) -> None:
    packed = gzip.compress(b"1" * 1000)
    folder.put("a.gz", packed)
    assert folder.read("a.gz") == packed


def test_what_is_absent_is_told_from_what_fails(folder: Folder) -> None:
    assert folder.files() == {} and folder.size("a") is None
    folder.delete("a")
    for action in (folder.read, folder.open, folder.sha256):
        with pytest.raises(FileNotFoundError):
            action("a")
    assert folder.files() == {}


def test_only_the_files_of_the_folder_itself_are_listed(folder: Folder) -> None:
    for name in ("b", "a", ".hidden"):
        folder.put(name, b"1")
    Folder.at(f"{folder.location}/inner").put("c", b"1")
    assert list(folder.files()) == ["a", "b"]


def test_a_file_is_replaced_and_removed(folder: Folder) -> None:
    folder.put("a", b"longer than the next")
    folder.put("a", b"next")
    assert folder.read("a") == b"next"
    folder.delete("a")
    assert folder.files() == {}


def test_a_writable_folder_is_left_as_it_was(folder: Folder) -> None:
    folder.put("a", b"1")
    folder.check_writable()
    assert folder.files() == {"a": 1}


def test_a_file_larger_than_one_part_of_an_upload_is_whole(s3_folder: str) -> None:
    data, folder = os.urandom(PART_BYTES) * 2, Folder.at(s3_folder)
    folder.put("a", memoryview(data))
    assert folder.sha256("a") == hashlib.sha256(data).hexdigest()


def test_a_reader_sees_one_whole_file_or_the_other(folder: Folder) -> None:
    versions = [bytes([digit]) * (1 << 20) for digit in (1, 2)]
    folder.put("a", versions[0])
    done = threading.Event()

    def write() -> None:
        for i in range(20):
            folder.put("a", versions[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    while not done.is_set() or not seen:
        assert folder.read("a") in versions
        assert folder.files() == {"a": 1 << 20}
        seen += 1
    writer.join()


@pytest.mark.parametrize("data", ["text", None, 3, [1]], ids=["text", "none", "number", "list"])
def test_what_is_not_bytes_leaves_nothing(folder: Folder, data: Any) -> None:
    with pytest.raises(TypeError):
        folder.put("a", data)
    assert folder.files() == {}
    assert folder.local is None or not list(folder.local.iterdir())


def test_an_upload_that_breaks_off_leaves_nothing(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moto.s3.responses import S3Response

    answer = S3Response._key_response_put

    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "partNumber" in self.querystring and self.querystring["partNumber"] != ["1"]:
            return 400, {}, "<Error><Code>EntityTooLarge</Code><Message>no</Message></Error>"
        return answer(self, *args, **kwargs)

    monkeypatch.setattr(S3Response, "_key_response_put", broken)
    folder = Folder.at(s3_folder)
    assert "cannot be written" in error_of(lambda: folder.put("a", bytes(PART_BYTES * 2)))
    assert folder.files() == {} and folder.size("a") is None


def test_a_copy_is_byte_for_byte(folder: Folder, tmp_path: Path) -> None:
    data = os.urandom(PART_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    source, back = Folder.at(tmp_path / "source"), Folder.at(tmp_path / "back")
    source.put("a", data)
    source.put("empty", b"")
    folder.copy("a", source, digest)
    folder.copy("empty", source, hashlib.sha256().hexdigest())
    back.copy("a", folder, digest)
    assert folder.files() == {"a": len(data), "empty": 0} and back.read("a") == data


def test_a_copy_with_another_digest_or_of_nothing_is_refused_and_leaves_nothing(folder: Folder, tmp_path: Path) -> None:
    source = Folder.at(tmp_path / "source")
    source.put("a", b"1")
    assert f"{source}/a has SHA-256 6b86b273ff34..." in error_of(lambda: folder.copy("a", source, "0" * 64))
    assert f"{source}/b is missing" in error_of(lambda: folder.copy("b", source, "0" * 64))
    assert folder.files() == {}
    assert folder.local is None or not list(folder.local.iterdir())


def test_create_says_whether_it_wrote(folder: Folder) -> None:
    assert folder.create("a", b"first") and not folder.create("a", b"second")
    assert folder.read("a") == b"first" and list(folder.files()) == ["a"]


def test_create_has_one_winner_among_eight_processes(tmp_path: Path) -> None:
    folder, start = tmp_path / "folder", tmp_path / "start"
    command = [sys.executable, "-c", RACE, str(folder), str(start)]
    racers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(8)]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    start.touch()
    won = {str(i): racer.communicate(timeout=60)[0].split() for i, racer in enumerate(racers)}
    assert sorted(int(name) for names in won.values() for name in names) == list(range(40))
    for me, names in won.items():
        for name in names:
            assert (folder / f"file-{name}").read_bytes() == me.encode() * 100_000
    assert len(list(folder.iterdir())) == 40


def test_what_a_killed_writer_leaves_is_not_seen_and_is_swept(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 1
    folder = Folder.at(tmp_path)
    assert folder.files() == {} and folder.size("a.bin") is None
    folder.sweep()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("node", [platform.node(), "gpu-7", "gpu-7.cluster.example"])
def test_sweep_removes_what_dead_processes_left_and_nothing_else(
    tmp_path: Path, node: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait(timeout=60)
    monkeypatch.setattr(platform, "node", lambda: node)
    stale = time.time() - STALE_S - 60
    dead = [f".a.b.{node}-{gone.pid}-0123abcd.tmp", ".a.elsewhere-1-0123abcd.tmp"]
    kept = [
        f".a.{node}-{os.getpid()}-0123abcd.tmp",
        f".a.{node}-1-0123abcd.tmp",  # alive, and of another user
        f".a.elsewhere-{gone.pid}-0123abcd.tmp",
        f"a.{node}-{gone.pid}-0123abcd.tmp",
        f".{node}-{gone.pid}.tmp",
        ".notes.tmp",
        "a",
    ]
    for name in (*dead, *kept):
        (tmp_path / name).write_bytes(b"1")
    making = tmp_path / f".set.{node}-{gone.pid}-0123abcd.tmp"
    making.mkdir()
    (making / "part").write_bytes(b"1")
    os.utime(tmp_path / dead[1], (stale, stale))
    os.utime(tmp_path / kept[0], (stale, stale))
    Folder.at(tmp_path).sweep()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_sweeping_an_absent_folder_or_a_bucket_does_nothing(folder: Folder) -> None:
    folder.sweep()
    assert folder.files() == {}


def test_a_file_where_a_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    folder = Folder.at(tmp_path / "file" / "inner")
    for name in ("written", "created", "checked"):
        assert f"{folder}/" in (said := error_of(everything(folder)[name])) and "choose another folder" in said
    assert folder.size("a") is None
    with pytest.raises(FileNotFoundError):
        folder.read("a")


def test_locations_are_absolute_and_file_uris_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../b") == str(tmp_path / "b") and absolute("s3://bucket/a/") == "s3://bucket/a"
    folder = Folder.at(f"file://{tmp_path}/two%20words")
    folder.put("a", b"1")
    assert folder.local == tmp_path / "two words" and (tmp_path / "two words" / "a").read_bytes() == b"1"
    assert Folder.at(folder) is folder and folder.name == "two words"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:Zk9Wq7@bucket/a",
        "s3://AKIA:Zk9/Wq7@bucket/a",
        "s3://AKIA:Zk9%2FWq7@bucket/a",
        "s3://Zk9Wq7@bucket",
        "gs://anonymous:Zk9Wq7@bucket/a",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    said = error_of(lambda: Folder.at(uri))
    assert "AWS_SECRET_ACCESS_KEY" in said and not any(word in said for word in ("Zk9", "Wq7", "AKIA"))


def test_an_at_sign_in_the_name_of_a_file_is_no_credential(s3_folder: str) -> None:
    folder = Folder.at(f"{s3_folder}/me@home")
    folder.put("a", b"1")
    assert folder.files() == {"a": 1}


@pytest.mark.parametrize("uri", ["s3://", "s3:///a", "s3://[a", "gs://?region=x", "s3://two words/a"])
def test_a_uri_without_a_bucket_is_refused(uri: str) -> None:
    assert "names no bucket; write it like s3://bucket/folder" in error_of(lambda: Folder.at(uri))


@pytest.mark.parametrize("uri", ["http://host/a", "ftp://host/a", "s3://bucket/a?secret_key=hidden"])
def test_what_is_no_store_is_refused_without_its_query(uri: str) -> None:
    said = error_of(Folder.at(uri).files)
    assert "is no place to keep files" in said and "give a path, s3:// or gs://" in said and "hidden" not in said


def test_settings_in_a_uri_count_and_are_not_shown(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    folder = Folder.at(f"{s3_folder}?endpoint_override={endpoint}&scheme=http&region=eu-west-1")
    folder.put("a", b"1")
    assert folder.files() == {"a": 1} and str(folder) == s3_folder and folder.name == s3_folder.rpartition("/")[2]


def test_the_endpoint_of_s3_alone_goes_before_the_common_one(s3_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", os.environ["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    folder = Folder.at(f"{s3_folder}/other")
    folder.put("a", b"1")
    assert folder.files() == {"a": 1}


@pytest.mark.parametrize("wrong", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
@pytest.mark.usefixtures("s3_checks_credentials")
def test_wrong_credentials_are_one_sentence(s3_folder: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder.at(s3_folder)
    folder.put("a", b"1")
    monkeypatch.setenv(wrong, "mistyped")
    open_store.cache_clear()
    for name, action in everything(folder).items():
        said = error_of(action)
        assert said.startswith(s3_folder) and "bucket sims-tests" in said, name
        assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment" in said, name
        assert "mistyped" not in said and "Request ID" not in said


def test_a_missing_bucket_is_one_sentence(s3: str) -> None:
    folder = Folder.at("s3://no-such-bucket/a")
    assert folder.files() == {} and folder.size("a") is None
    for name in ("written", "created", "checked"):
        said = error_of(everything(folder)[name])
        assert "make the bucket no-such-bucket, or correct its name or AWS_ENDPOINT_URL" in said


def test_an_endpoint_that_is_away_is_one_sentence_in_seconds(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    started_s = time.monotonic()
    said = error_of(Folder.at(f"{s3}/away").check_writable)
    assert time.monotonic() - started_s < REFUSED_S
    assert "check AWS_ENDPOINT_URL in the environment" in said and "bucket is sims-tests" in said


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer_is_one_sentence_in_well_under_a_minute(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen(64)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{mute.getsockname()[1]}")
        started_s = time.monotonic()
        said = error_of(Folder.at(f"{s3}/mute").check_writable)
    assert time.monotonic() - started_s < 50 and "check AWS_ENDPOINT_URL" in said


def test_google_storage_gives_up_after_seconds() -> None:
    store, path = open_store("gs://bucket/a b")
    assert path == "bucket/a b"
    assert store.equals(FileSystem.from_uri("gs://bucket/a?retry_limit_seconds=10")[0])
    assert not store.equals(FileSystem.from_uri("gs://bucket/a")[0])
    assert open_store("gs://bucket/a?retry_limit_seconds=3")[0].equals(
        FileSystem.from_uri("gs://bucket/a?retry_limit_seconds=3")[0]
    )


@pytest.mark.slow
def test_google_storage_without_credentials_is_one_sentence_in_well_under_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    monkeypatch.setenv("GCE_METADATA_ROOT", "127.0.0.1:1")
    started_s = time.monotonic()
    said = error_of(Folder.at("gs://bucket/a").check_writable)
    assert time.monotonic() - started_s < 50 and "GOOGLE_APPLICATION_CREDENTIALS" in said and "bucket bucket" in said
