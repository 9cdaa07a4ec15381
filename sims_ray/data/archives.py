"""Archives: zip and tar, whose members are checked before a byte of them is used, and read one at a time.

Nothing is unpacked to disk. A member's size is what its header says, within a limit, and no more than that is read.
"""

from __future__ import annotations

import gzip
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from sims_ray.data.entries import inner_path, is_hidden, one_line, shown
from sims_ray.errors import SimsError

MEMBER_BYTES = 256 << 20  # of one member; no image that is trained on comes near
HEADER_BYTES = 1 << 20  # of what a tar has beside a member's own header: long names, comments
RATIO = 500  # bytes from one compressed byte: bombs reach 1,000, images a few
RATIO_FROM_BYTES = 1 << 20  # small members are let off: a black thumbnail may shrink to nothing
CHUNK_BYTES = 64 << 10  # tarfile copies what is left of a chunk at every read
GZIP = b"\x1f\x8b"
EXTENDED = {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME}
EXTENDED |= {tarfile.GNUTYPE_LONGLINK}
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
DAMAGE = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, LookupError, OverflowError,
    NotImplementedError, RuntimeError,
)  # fmt: skip  # what the readers raise on damaged files; RecursionError is a RuntimeError


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, none at the end."""
        ...


class CheckedZip:
    """A zip whose members have all been checked; use it as a context.

    Args:
        path: the file.

    Attributes:
        members: its files by path, without folders and hidden files.

    Raises:
        SimsError: no zip, or a member that leads out of it, is no plain file, is encrypted, comes twice, or claims a
            size it cannot have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.members: dict[str, zipfile.ZipInfo] = {}
        with _readable(str(path), "zip"):
            self._file = zipfile.ZipFile(path)
        try:
            for info in self._file.infolist():
                self._add(info)
            if sum(info.compress_size for info in self._file.infolist()) > path.stat().st_size:
                raise SimsError(f"{path} has members that overlap; it may be hostile, do not open it with other tools")
        except SimsError:
            self.close()
            raise

    def __enter__(self) -> CheckedZip:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, info: zipfile.ZipInfo) -> None:
        name = _checked_name(self.path, info.filename)
        fault = _fault(info) or ("is there twice; keep one of them" if name in self.members else None)
        if fault is not None:
            raise SimsError(f"{self.path}: {shown(name)} {fault}")
        if not info.is_dir() and not is_hidden(name):
            self.members[name] = info

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """A member to read from start to end; what fails inside the block is told in one sentence."""
        with _readable(f"{self.path}: {shown(name)}", "member"), self._file.open(self.members[name]) as file:
            yield file

    def read(self, name: str, limit_bytes: int = MEMBER_BYTES) -> bytes:
        """All bytes of a member.

        Raises:
            SimsError: it is larger than the limit, or damaged.
        """
        held, where = self.members[name].file_size, f"{self.path}: {shown(name)}"
        _check_size(where, held, limit_bytes)
        with self.open(name) as file:
            content = file.read()
        if len(content) != held:
            raise SimsError(f"{where} has {len(content)} bytes of {held}; fetch or make the zip again")
        return content


def _fault(info: zipfile.ZipInfo) -> str | None:
    """What is wrong with a member of a zip."""
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):  # 0: a system without kinds
        return "is a link or a device; make the zip of plain files"
    if info.flag_bits & 1:
        return "is encrypted; make the zip without a password"
    if info.compress_type not in METHODS:
        return f"is compressed by method {info.compress_type}; make the zip stored or deflated"
    if info.file_size > max(RATIO_FROM_BYTES, RATIO * info.compress_size):
        return f"claims {info.file_size} bytes in {info.compress_size}; it may be a bomb"
    return None


@dataclass(frozen=True)
class Member:
    """A file in a tar.

    Attributes:
        name: its path in the tar.
        where: tar and name, for messages.
        read: all its bytes; only until the next member is asked for.
    """

    name: str
    where: str
    read: Callable[[], bytes]


def tar_members(path: Path) -> Iterator[Member]:
    """The files in a .tar or .tar.gz as they come, without folders and hidden files.

    Raises:
        SimsError: it is damaged or cut off, or a member leads out of it, is no plain file, comes twice, or is larger
            than any image.
    """
    names: set[str] = set()
    last = "start"
    try:
        with _unpacked(path) as stream, _open_tar(stream) as archive:
            while (info := archive.next()) is not None:
                archive.members = []  # or it keeps every header
                if (member := _checked_member(path, archive, info)) is None:
                    continue
                if member.name in names:
                    raise SimsError(f"{member.where} is there twice; keep one of them")
                names.add(member.name)
                last = shown(member.name)
                yield member
            while rest := archive.fileobj.read(CHUNK_BYTES):  # to the end of gz: its CRC
                if rest.strip(b"\0"):
                    raise SimsError(f"{path} goes on after its end; make one tar of what was put together")
    except DAMAGE as error:
        raise SimsError(f"{path} is no whole tar after {last} ({one_line(error)}); fetch or make it again") from None


def _open_tar(stream: Readable) -> Any:
    """The tar as tarfile reads it from a stream; `members` and `fileobj` of it are in no stub."""
    options: dict[str, Any] = {"fileobj": stream, "bufsize": CHUNK_BYTES, "tarinfo": _CheckedHeader}
    return tarfile.open(mode="r|", **options)


def _checked_member(path: Path, archive: Any, info: tarfile.TarInfo) -> Member | None:
    name = _checked_name(path, info.name)
    where = f"{path}: {shown(name)}"
    if not info.isdir() and (not info.isreg() or info.issparse()):
        raise SimsError(f"{where} is a link, a device or sparse; make the tar of plain files")
    _check_size(where, info.size, MEMBER_BYTES)  # again: an extended header may have changed it
    if info.isdir() or is_hidden(name):
        return None

    def read() -> bytes:
        with _readable(where, "member"), archive.extractfile(info) as file:
            content: bytes = file.read()
        return content

    return Member(name, where, read)


class _CheckedHeader(tarfile.TarInfo):
    """A header that is refused where tarfile would take damage for the end, or read without limit."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _CheckedHeader:
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):
            return super().frombuf(buf, encoding, errors)  # raises what ends the tar
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(one_line(error)) from None
        if not 0 <= header.size <= (HEADER_BYTES if header.type in EXTENDED else MEMBER_BYTES):
            raise tarfile.ReadError(f"{shown(header.name)} claims {header.size} bytes")
        return header


class _Expanded:
    """What a gz file expands to, as long as that stays in proportion."""

    def __init__(self, path: Path, packed: IO[bytes]) -> None:
        self.path, self.packed = path, packed
        self.stream, self.expanded = gzip.GzipFile(fileobj=packed), 0

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes."""
        content = self.stream.read(size)
        self.expanded += len(content)
        if self.expanded > max(RATIO_FROM_BYTES, RATIO * self.packed.tell()):
            raise SimsError(f"{self.path} expands more than {RATIO}-fold; it may be a bomb")
        return content


@contextmanager
def _unpacked(path: Path) -> Iterator[Readable]:
    with path.open("rb") as file:
        yield _Expanded(path, file) if file.peek(2)[:2] == GZIP else file


def _checked_name(archive: Path, name: str) -> str:
    path = inner_path(name)
    if path is None and name not in (".", "./"):  # the folder that a tar may begin with
        raise SimsError(f"{archive} has the member {shown(name)}, which leads out of it; it may be hostile")
    return path or "."


def _check_size(where: str, held: int, limit_bytes: int) -> None:
    if held > limit_bytes:
        raise SimsError(f"{where} has {held} bytes, more than the {limit_bytes} that are read; shrink or remove it")


@contextmanager
def _readable(where: str, kind: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise SimsError(f"{where} is no whole {kind} ({one_line(error)}); fetch or make it again") from None
