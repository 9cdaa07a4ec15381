"""Folders on local disks and in object stores: the one layer between the tables and where they lie.

A location is a path, or a URI that pyarrow can open, like `s3://bucket/sets/a` or `gs://bucket/sets/a`.
Credentials come from the environment alone (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, a node's role, ...).
"""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import unquote

from sims_ray.errors import SimsError
from sims_ray.storage.beside import atomic_path, hidden_path, is_abandoned
from sims_ray.storage.stores import advice, check_bucket, open_store, reason
from sims_ray.storage.stores import is_uri as is_uri

T = TypeVar("T")

CHUNK_BYTES = 8 << 20


def absolute(location: str | Path) -> str:
    """The location as workers on any node find it: URIs as they are, paths, file:// too, made absolute."""
    if is_uri(location):
        return str(location).rstrip("/")
    path = str(location)
    return str(Path(unquote(path.removeprefix("file://")) if path.startswith("file://") else path).resolve())


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
            SimsError: a URI that carries credentials, or names no bucket.
        """
        if isinstance(location, Folder):
            return location
        if is_uri(location):
            check_bucket(str(location))
        return cls(absolute(location))

    def __str__(self) -> str:
        return self.location.partition("?")[0]

    @property
    def local(self) -> Path | None:
        """Its path, if it lies on a file system of this machine."""
        return None if is_uri(self.location) else Path(self.location)

    def child(self, name: str) -> Folder:
        """A folder in this one; the options of a URI stay with it."""
        head, mark, query = self.location.partition("?") if self.local is None else (self.location, "", "")
        return Folder(f"{head}/{name}{mark}{query}")

    @property
    def name(self) -> str:
        """Last part of the location."""
        return str(self).rpartition("/")[2]

    def files(self) -> dict[str, int]:
        """Names and sizes in bytes of the files in it, in order, without those being written; empty if it is absent."""

        def listed() -> dict[str, int]:
            from pyarrow.fs import FileSelector, FileType

            store, path = open_store(self.location)
            try:
                found = store.get_file_info(FileSelector(path, allow_not_found=True))
            except FileNotFoundError:  # pyarrow looks twice, and it may come or go in between
                return {}
            files = [entry for entry in found if entry.type == FileType.File and not entry.base_name.startswith(".")]
            return {entry.base_name: entry.size for entry in sorted(files, key=lambda entry: entry.base_name)}

        return self._doing("listed", listed)

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is absent."""

        def looked() -> int | None:
            from pyarrow.fs import FileType

            store, path = open_store(self.location)
            entry = store.get_file_info(f"{path}/{name}")
            return int(entry.size) if entry.type == FileType.File else None

        return self._doing("read", looked, name)

    def open(self, name: str) -> Any:
        """A file for random access, as a pyarrow NativeFile.

        Raises:
            FileNotFoundError: it is absent.
        """
        store, path = open_store(self.location)
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
            self._doing("written", lambda: self._fill_beside(name, lambda file: file.write(data)), name)
            return

        def upload() -> None:
            from pyarrow import py_buffer

            store, path = open_store(self.location)
            whole = py_buffer(data)  # before the stream is there: closing it would make an empty file
            # Not compressed, whatever the name ends with. The file appears when the stream is closed.
            with store.open_output_stream(f"{path}/{name}", compression=None) as stream:
                stream.write(whole)

        self._doing("written", upload, name)

    def copy(self, name: str, source: Folder, sha256: str) -> None:
        """Copy a file of another folder, piece by piece; it appears whole and with this digest, or not at all.

        Raises:
            SimsError: it is absent there, or has another digest.
        """
        if self.local is not None:
            pour = partial(_pour, source, name, sha256)
            self._doing("written", lambda: self._fill_beside(name, pour), name)
            return

        def through_disk() -> None:  # an upload cannot be taken back once the digest is known
            with tempfile.TemporaryFile() as spool:
                _pour(source, name, sha256, spool)
                spool.flush()
                self.put(name, mmap.mmap(spool.fileno(), 0, access=mmap.ACCESS_READ) if spool.tell() else b"")

        self._doing("written", through_disk, name)

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
            beside = hidden_path(target)
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
            store, path = open_store(self.location)
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
        """Remove what processes that are gone were writing on this disk: files, and folders in the making."""
        if self.local is None or not self.local.is_dir():
            return
        for path in self.local.glob(".*.tmp"):
            if not is_abandoned(path):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _fill_beside(self, name: str, fill: Callable[[IO[bytes]], Any]) -> None:
        with atomic_path(Path(self.location) / name) as beside, beside.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())  # or a node that loses power leaves a name without its content

    def _doing(self, done: str, action: Callable[[], T], name: str = "") -> T:
        """Run an action; what fails in it becomes one sentence."""
        from pyarrow import ArrowException

        try:
            return action()
        except (FileNotFoundError, NotADirectoryError) as error:
            if done == "read":
                raise FileNotFoundError(*error.args) from None
            raise self._sentence(done, error, name) from None
        except (OSError, ArrowException) as error:  # Google's client has errors of no other class
            raise self._sentence(done, error, name) from None

    def _sentence(self, done: str, error: Exception, name: str) -> SimsError:
        where = f"{self}/{name}" if name else str(self)
        hint = advice(error, self.location) if self.local is None else "make it writable or choose another folder"
        return SimsError(f"{where} cannot be {done} ({reason(error)}); {hint}")


def _pour(source: Folder, name: str, sha256: str, target: IO[bytes]) -> None:
    """Write a file of a folder into an open one, and check its digest on the way."""
    digest = hashlib.sha256()
    try:
        with source.open(name) as file:
            while chunk := source._doing("read", lambda: file.read(CHUNK_BYTES), name):
                digest.update(chunk)
                target.write(chunk)
    except FileNotFoundError:
        raise SimsError(f"{source}/{name} is missing; restore it or make {source} again") from None
    if digest.hexdigest() != sha256:
        found = f"SHA-256 {digest.hexdigest()[:12]}..., its manifest says {sha256[:12]}..."
        raise SimsError(f"{source}/{name} has {found}; restore it or make {source} again")
