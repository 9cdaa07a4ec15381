"""Arrays: images and latents that lie in .npy and .npz files, read as a stream.

Images are uint8 [N, H, W, C], [N, C, H, W] or [N, H, W], where C = 1 or 3 and a last axis of 1 or 3 counts as C.
Latents are float16 or float32 [N, C, H, W]; they are stored as float16. Pickled objects are never read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from PIL import Image

from sims_ray.data.archives import CheckedZip
from sims_ray.data.entries import LABEL_LIMIT, Entry, Source, one_line, shown
from sims_ray.data.samples import NO_LABEL
from sims_ray.errors import SimsError

NPY = b"\x93NUMPY"
CHUNK_BYTES = 4 << 20  # read at a time, unless one row is larger
ROW_BYTES = 256 << 20
IMAGES = ("images", "arr_0", "x")
LABELS = ("labels", "arr_1", "y")
CHANNELS = (1, 3)
DAMAGE = (
    ValueError, TypeError, LookupError, OSError, EOFError, MemoryError, RecursionError, SyntaxError, TokenError,
)  # fmt: skip  # what numpy raises on headers that are none
LIKE = "give uint8 [N, H, W, C], [N, C, H, W] or [N, H, W] with 1 or 3 channels, or float latents [N, C, H, W]"


@dataclass(frozen=True)
class _Header:
    """What a .npy file says of its array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def array_source(path: Path) -> Source:
    """The rows of a .npy file, or of `images` (`arr_0`, `x`) in a .npz with `labels` (`arr_1`, `y`) or without."""
    if path.suffix.lower() != ".npz":
        return Source(path, lambda: _npy_entries(path), None)
    with CheckedZip(path) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.members}
        images = _member(path, members, IMAGES)
        labels = _labels(archive, members) if members.keys() & set(LABELS) else None
    return Source(path, lambda: _npz_entries(path, images, labels), None)


def read_array(content: bytes, where: str) -> NDArray[Any]:
    """One image or latent from the bytes of a .npy file: [C, H, W], uint8 or float16.

    Raises:
        SimsError: no array of an image or a latent.
    """
    file = BytesIO(content)
    header = _read_header(file, where, len(content))
    one = _Header((1, *header.shape), header.dtype)
    (row,) = _rows(file, one, where, lambda _: where)
    return row


def _npy_entries(path: Path) -> Iterator[Entry]:
    with _reading(str(path)), path.open("rb") as file:
        header = _read_header(file, str(path), path.stat().st_size)
        for i, row in enumerate(_rows(file, header, str(path), lambda i: f"{path} row {i}")):
            yield Entry(i, NO_LABEL, f"{path} row {i}", row)


def _npz_entries(path: Path, images: str, labels: NDArray[np.int32] | None) -> Iterator[Entry]:
    where = f"{path}: {shown(images)}"
    with CheckedZip(path) as archive, archive.open(images) as file:
        header = _read_header(file, where, archive.members[images].file_size)
        if labels is not None and len(labels) != header.shape[0]:
            raise SimsError(f"{where} has {header.shape[0]} rows but there are {len(labels)} labels; give one each")
        for i, row in enumerate(_rows(file, header, where, lambda i: f"{where} row {i}")):
            yield Entry(i, NO_LABEL if labels is None else int(labels[i]), f"{where} row {i}", row)


def _member(path: Path, members: Mapping[str, str], keys: tuple[str, ...]) -> str:
    found = [members[key] for key in keys if key in members]
    if len(found) != 1:
        held = shown(", ".join(members)) or "nothing"
        raise SimsError(f"{path} holds {held}; give it exactly one of the arrays {', '.join(keys)}")
    return found[0]


def _labels(archive: CheckedZip, members: Mapping[str, str]) -> NDArray[np.int32]:
    """Labels int32 [N]."""
    name = _member(archive.path, members, LABELS)
    where, content = f"{archive.path}: {shown(name)}", archive.read(name)
    file = BytesIO(content)
    header = _read_header(file, where, len(content))
    if header.dtype.kind not in "iu" or len(header.shape) != 1:
        found = f"{header.dtype} {list(header.shape)}"
        raise SimsError(f"{where} is {found}; give whole numbers [N], -1 for none")
    values = np.frombuffer(content, header.dtype, offset=file.tell())
    wrong = (values < NO_LABEL) | (values >= LABEL_LIMIT)
    if wrong.any():
        row = int(wrong.argmax())
        raise SimsError(f"{where} row {row} has label {values[row]}; labels are whole numbers from 0, or -1 for none")
    return values.astype(np.int32)


def _read_header(file: IO[bytes], where: str, held_bytes: int) -> _Header:
    """Read the header of a file that has so many bytes; the file stays at the first row."""
    with _reading(where):
        version = npy_format.read_magic(file)
        if version != (1, 0):  # later ones exist for headers of more than 64 KB, which no array of numbers has
            raise SimsError(f"{where} is npy of version {version[0]}.{version[1]}; save it with numpy.save")
        shape, by_column, dtype = npy_format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise SimsError(f"{where} holds pickled objects, which are not read; save it as an array of numbers")
    if by_column:
        raise SimsError(f"{where} lies column by column; save numpy.ascontiguousarray of it")
    if not shape or min(shape) < 0:
        raise SimsError(f"{where} has shape {list(shape)}; {LIKE}")
    claimed = file.tell() + math.prod(shape) * dtype.itemsize
    if claimed != held_bytes:
        raise SimsError(f"{where} has {held_bytes} bytes but its header claims {claimed}; fetch or make it again")
    return _Header(shape, dtype)


def _rows(file: IO[bytes], header: _Header, where: str, name: Callable[[int], str]) -> Iterator[NDArray[Any]]:
    """The rows [C, H, W] of an array, uint8 or float16, checked chunk by chunk."""
    prepare = _latents if header.dtype.kind == "f" else _images
    _check_shape(header, where)
    count = max(1, CHUNK_BYTES // header.row_bytes)
    for start in range(0, header.shape[0], count):
        rows = min(count, header.shape[0] - start)
        with _reading(where):
            content = file.read(rows * header.row_bytes)
        if len(content) < rows * header.row_bytes:
            raise SimsError(f"{where} ends within row {start + len(content) // header.row_bytes}; fetch it again")
        chunk = np.frombuffer(content, header.dtype).reshape(rows, *header.shape[1:])
        yield from prepare(chunk, start, name)


def _check_shape(header: _Header, where: str) -> None:
    kinds = {"u1": (3, 4), "f2": (4,), "f4": (4,)}
    shape, dtype = header.shape, header.dtype
    if len(shape) not in kinds.get(dtype.str[1:], ()) or 0 in shape[1:]:
        raise SimsError(f"{where} is {dtype} {list(shape)}; {LIKE}")
    if dtype == np.uint8 and len(shape) == 4 and shape[1] not in CHANNELS and shape[3] not in CHANNELS:
        raise SimsError(f"{where} is {dtype} {list(shape)}, which has neither 1 nor 3 channels; {LIKE}")
    if header.row_bytes > min(ROW_BYTES, 3 * (Image.MAX_IMAGE_PIXELS or ROW_BYTES)):
        raise SimsError(f"{where} has rows of {header.row_bytes} bytes; shrink them")


def _images(rows: NDArray[np.uint8], start: int, name: Callable[[int], str]) -> NDArray[np.uint8]:
    if rows.ndim == 3:
        return rows[:, None]
    return rows.transpose(0, 3, 1, 2) if rows.shape[3] in CHANNELS else rows


def _latents(rows: NDArray[Any], start: int, name: Callable[[int], str]) -> NDArray[np.float16]:
    """Latents as float16, none of them beyond it."""
    wrong = ~(np.abs(rows) <= np.finfo(np.float16).max)  # so written, it holds for NaN
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0])
        where = name(start + int(place[0]))
        raise SimsError(f"{where} has the value {rows[place]}, which float16 cannot hold; correct or remove it")
    return rows.astype(np.float16)


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise SimsError(f"{where} is no readable array ({one_line(error)}); fetch or make it again") from None
