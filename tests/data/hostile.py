"""Makers of damaged and hostile files."""

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import make_tar, make_zip, pickled_batch, pixels, png, save, stack

IMAGE = png(pixels(0))
BATCH = pickled_batch(stack(2, side=32), [0, 1])
Make = Callable[[Path], object]


def zipped(*members: tuple[str, bytes], **options: Any) -> Make:
    return lambda path: make_zip(path, dict(members), **options)


def tarred(*members: tuple[str, bytes]) -> Make:
    return lambda path: make_tar(path, members)


def npz(**columns: Any) -> Make:
    return lambda path: np.savez(path, **columns)


def array(values: Any, **options: Any) -> Make:
    return lambda path: np.save(path, values, **options)


def cut(make: Make, share: float) -> Make:
    """The first part of what `make` makes."""

    def made(path: Path) -> None:
        make(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return made


def changed(make: Make, old: bytes, new: bytes) -> Make:
    """What `make` makes with some bytes replaced."""

    def made(path: Path) -> None:
        make(path)
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))

    return made


def zip_entry(name: str, content: bytes = IMAGE, **facts: Any) -> Make:
    """A zip with one member that has these facts in its header."""

    def made(path: Path) -> None:
        info = zipfile.ZipInfo(name)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(info, content)
            for fact, value in facts.items():
                setattr(info, fact, value)

    return made


def tar_entry(name: str, **facts: Any) -> Make:
    """A tar with an image, and a member of another kind."""

    def made(path: Path) -> None:
        with tarfile.open(path, "w") as archive:
            info = tarfile.TarInfo("0.png")
            info.size = len(IMAGE)
            archive.addfile(info, io.BytesIO(IMAGE))
            info = tarfile.TarInfo(name)
            for fact, value in facts.items():
                setattr(info, fact, value)
            archive.addfile(info)

    return made


def twice_in_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for _ in range(2):
            archive.writestr("a/0.png", IMAGE)


def overlapping(path: Path) -> None:
    """A second entry in the directory of a zip for the bytes of the first."""
    name, other = "a/0.png", "b/0.png"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, IMAGE)
        for i in range(3):
            info = zipfile.ZipInfo(f"{i}{other[1:]}")
            first = archive.getinfo(name)
            info.CRC, info.header_offset = first.CRC, first.header_offset
            info.file_size, info.compress_size = first.file_size, first.compress_size
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info


def bomb(path: Path) -> None:
    """A tar.gz in which a few kilobytes become 30 MB."""
    with gzip.open(path, "wb") as file, tarfile.open(fileobj=file, mode="w|") as archive:
        for name, content in (("0.png", IMAGE), ("1.txt", bytes(30 << 20))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def long_name(path: Path) -> None:
    """A tar that gives 64 MB as the length of a name."""
    tar_entry("x" * 200)(path)
    content = bytearray(path.read_bytes())
    at = content.index(b"././@LongLink") if b"././@LongLink" in content else content.index(b"././@PaxHeader")
    header = content[at : at + 512]
    header[124:136] = b"%011o\0" % (64 << 20)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    content[at : at + 512] = header
    path.write_bytes(content)


def two_tars(path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        make_tar(path.with_name(name), [(name.replace("tar", "png"), IMAGE)])
    path.write_bytes(b"".join(path.with_name(name).read_bytes() for name in ("a.tar", "b.tar")))
    for name in ("a.tar", "b.tar"):
        path.with_name(name).unlink()


def header_of(path: Path, text: bytes, version: bytes = b"\x01\x00", more: bytes = b"") -> None:
    width = "<H" if version == b"\x01\x00" else "<I"
    path.write_bytes(b"\x93NUMPY" + version + struct.pack(width, len(text)) + text + more)


def claims(text: str, more: bytes = b"", version: bytes = b"\x01\x00") -> Make:
    return lambda path: header_of(path, text.encode(), version, more)


def damaged_header(path: Path) -> None:
    make_tar(path, [("0.png", IMAGE), ("1.png", IMAGE), ("2.png", IMAGE)])
    content = bytearray(path.read_bytes())
    content[content.index(b"1.png") + 110] ^= 1
    path.write_bytes(content)


def tars_with_cifar(path: Path) -> None:
    path.mkdir()
    for name in ("a.tar", "b.tar"):
        make_tar(path / name, [("data_batch_1", BATCH)])


def mixed_folder(path: Path) -> None:
    save(path / "0.png", pixels(0))
    make_tar(path / "a.tar", [("0.png", IMAGE)])


def png_of(width: int, height: int) -> bytes:
    """The start of a PNG of this size."""
    header = b"IHDR" + struct.pack(">II", width, height) + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\x40IDAT" + bytes(99)
