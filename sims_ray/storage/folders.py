"""Folders on local disks and in object stores: the one layer between the tables and where they lie.

A location is a path, or a URI that pyarrow can open, like `s3://bucket/sets/a` or `gs://bucket/sets/a`.
Credentials come from the environment alone (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, a node's role, ...).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sims_ray.errors import SimsError

T = TypeVar("T")

CHUNK_BYTES = 8 << 20
STALE_S = 24 * 3600.0  # a file beside that is older was left by a process that is gone, on whatever node
SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
BESIDE = re.compile(r"^\..+\.(?P<node>[^/]+)-(?P<pid>\d+)-[0-9a-f]{8}\.tmp$")


def is_uri(location: str | Path) -> bool:
    """Whether a location names an object store and not a path."""
    return isinstance(location, str) and SCHEME.match(location) is not None


def absolute(location: str | Path) -> str:
    """The location as workers on any node find it: URIs as they are, paths made absolute."""
    return str(location).rstrip("/") if is_uri(location) else str(Path(location).resolve())


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed onto `path` on success, removed on failure."""
    beside = _beside(path)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


@dataclass(frozen=True)
class Folder:
    """A folder of files, none of which is ever seen half-written.

    Args:
        location: absolute path or URI; make it with `Folder.at`.
    """

    location: str

    @classmethod
    def at(cls, location: str | Path | Folder) -> Folder:
        """The folder at a path or URI; nothing is touched.

        Raises:
            SimsError: a URI that carries credentials.
        """
        if isinstance(location, Folder):
            return location
        if is_uri(location) and "@" in urlsplit(str(location)).netloc:
            raise SimsError(
                "a URI must not carry credentials; leave out what is before the @ and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment"
            )
        return cls(absolute(location))

    def __str__(self) -> str:
        return self.location.partition("?")[0]

    @property
    def local(self) -> Path | None:
        """Its path, if it lies on a file system of this machine."""
        return None if is_uri(self.location) else Path(self.location)

    @property
    def name(self) -> str:
        """Last part of the location."""
        return str(self).rpartition("/")[2]

    def files(self) -> dict[str, int]:
        """Names and sizes in bytes of the files in it, in order, without those being written; empty if it is absent."""

        def listed() -> dict[str, int]:
            from pyarrow.fs import FileSelector, FileType

            store, path = _store(self.location)
            found = store.get_file_info(FileSelector(path, allow_not_found=True))
            files = [entry for entry in found if entry.type == FileType.File and not entry.base_name.startswith(".")]
            return {entry.base_name: entry.size for entry in sorted(files, key=lambda entry: entry.base_name)}

        return self._doing("listed", listed)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is absent."""

        def looked() -> int | None:
            from pyarrow.fs import FileType

            store, path = _store(self.location)
            entry = store.get_file_info(f"{path}/{name}")
            return int(entry.size) if entry.type == FileType.File else None

        return self._doing("read", looked, name)

    def open(self, name: str) -> Any:
        """A file for random access, as a pyarrow NativeFile.

        Raises:
            FileNotFoundError: it is absent.
        """
        store, path = _store(self.location)
        return self._doing("read", lambda: store.open_input_file(f"{path}/{name}"), name)

    def read(self, name: str) -> bytes:
        """All bytes of a file.

        Raises:
            FileNotFoundError: it is absent.
        """
        with self.open(name) as file:
            return self._doing("read", lambda: bytes(file.read()), name)

    def sha256(self, name: str) -> str:
        """SHA-256 of a file, as hex."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            while chunk := self._doing("read", lambda: file.read(CHUNK_BYTES), name):
                digest.update(chunk)
        return digest.hexdigest()

    def put(self, name: str, data: Any) -> None:
        """Write a file whole: beside and renamed on a disk, in one upload to an object store."""
        if self.local is not None:
            self._doing("written", lambda: self._put_beside(name, data), name)
            return

        def upload() -> None:
            store, path = _store(self.location)
            with store.open_output_stream(f"{path}/{name}") as stream:  # appears when it is closed
                stream.write(data)

        self._doing("written", upload, name)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless it is there; whether this call wrote it.

        On a disk one of several writers wins. An object store is asked first, which leaves a moment for a race.
        """
        if self.local is None:
            if self.size(name) is not None:
                return False
            self.put(name, data)
            return True
        target = self.local / name

        def linked() -> bool:
            beside = _beside(target)
            try:
                beside.write_bytes(data)
                os.link(beside, target)  # fails where a rename would replace
            except FileExistsError:
                return False
            finally:
                beside.unlink(missing_ok=True)
            return True

        return self._doing("written", linked, name)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

        def removed() -> None:
            store, path = _store(self.location)
            with suppress(FileNotFoundError):
                store.delete_file(f"{path}/{name}")

        self._doing("removed", removed, name)

    def check_writable(self) -> None:
        """Write, read and remove a small file.

        Raises:
            SimsError: that is not possible.
        """
        probe = f"probe-{uuid.uuid4().hex[:8]}.tmp"
        self.put(probe, b"sims")
        self.read(probe)
        self.delete(probe)

    def sweep(self) -> None:
        """Remove what processes that are gone were writing on this disk."""
        if self.local is None or not self.local.is_dir():
            return
        for path in self.local.glob(".*.tmp"):
            match = BESIDE.match(path.name)
            if match and _gone(match["node"], int(match["pid"]), path):
                path.unlink(missing_ok=True)

    def _put_beside(self, name: str, data: Any) -> None:
        with atomic_path(Path(self.location) / name) as beside, beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a node that loses power leaves a name without its content

    def _doing(self, done: str, action: Callable[[], T], name: str = "") -> T:
        """Run an action; what fails in it becomes one sentence."""
        try:
            return action()
        except FileNotFoundError as error:
            if done == "read":
                raise
            raise self._sentence(done, error, name) from None
        except OSError as error:
            raise self._sentence(done, error, name) from None

    def _sentence(self, done: str, error: OSError, name: str) -> SimsError:
        where = f"{self}/{name}" if name else str(self)
        advice = "make it writable or choose another folder"
        if self.local is None:
            advice = "check the bucket, and the credentials and the endpoint in the environment"
        return SimsError(f"{where} cannot be {done} ({' '.join(str(error).split())}); {advice}")


@lru_cache(maxsize=64)
def _store(location: str) -> tuple[Any, str]:
    """pyarrow's file system of a location, and the path in it."""
    from pyarrow.fs import FileSystem, LocalFileSystem

    if not is_uri(location):
        return LocalFileSystem(), location
    try:
        store, path = FileSystem.from_uri(location)
    except (ValueError, OSError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise SimsError(f"{location} is no place to keep files ({reason}); give a path, s3:// or gs://") from None
    return store, path


def _gone(node: str, pid: int, path: Path) -> bool:
    if node == platform.node():
        return not Path(f"/proc/{pid}").exists()
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > STALE_S
    return False
