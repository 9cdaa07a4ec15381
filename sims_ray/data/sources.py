"""Sources of images: a folder or Parquet becomes a stream of encoded, labelled entries."""

from __future__ import annotations

import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from sims_ray.data.table import METADATA_KEY, NO_LABEL
from sims_ray.errors import SimsError

PARQUET_BATCH = 256
LABEL_LIMIT = 2**31  # labels are int32
EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: it would start Ghostscript
DEEP_MODES = ("I", "F")  # 16- and 32-bit pixels; Pillow would clip them to 8 bits
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)


@dataclass(frozen=True)
class Entry:
    """One encoded image.

    Attributes:
        id: row number, or the source's own index.
        label: class, or -1 for none.
        name: where it comes from, for messages.
        data: its file, or its bytes.
    """

    id: int
    label: int
    name: str
    data: Path | bytes


@dataclass(frozen=True)
class Source:
    """Images to import.

    Attributes:
        path: folder or Parquet file.
        entries: the images in order; every call starts anew.
        classes: class names by label, where the source names them.
    """

    path: Path
    entries: Callable[[], Iterator[Entry]]
    classes: list[str] | None


def find_source(source: Path) -> Source:
    """What a folder of images, or Parquet with a column `image`, holds; reads names and labels only.

    Raises:
        SimsError: neither of the two, or labels that cannot be used; Parquet is checked as its entries are read.
    """
    if source.is_dir():
        parquet, images = sorted(source.glob("*.parquet")), _image_names(source)
        if parquet and images:
            raise SimsError(f"{source} holds both {parquet[0].name} and {images[0]}; keep them in separate folders")
        return Source(source, lambda: _parquet_entries(parquet), None) if parquet else _images(source, images)
    if source.is_file() and source.suffix == ".parquet":
        return Source(source, lambda: _parquet_entries([source]), None)
    found = "is neither a folder nor a .parquet file" if source.exists() else "does not exist"
    raise SimsError(f"{source} {found}; give a folder of images, or Parquet with a column `image`")


def _image_names(folder: Path) -> list[str]:
    def unreadable(error: OSError) -> None:
        raise SimsError(f"{error.filename} cannot be listed ({error.strerror}); make it readable")

    names = []
    for root, folders, files in os.walk(folder, onerror=unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = [n for n in files if not n.startswith(".") and os.path.splitext(n)[1].lower() in EXTENSIONS]
        names += [(Path(root) / name).relative_to(folder).as_posix() for name in images]
    return sorted(names)


def _images(folder: Path, names: Sequence[str]) -> Source:
    index = folder / "dataset.json"
    labels, classes = (_indexed(index, names), None) if index.is_file() else _by_folder(folder, names)

    def entries() -> Iterator[Entry]:
        for i, name in enumerate(sorted(labels)):
            yield Entry(i, labels[name], str(folder / name), folder / name)

    return Source(folder, entries, classes)


def _by_folder(folder: Path, names: Sequence[str]) -> tuple[dict[str, int], list[str] | None]:
    classes = sorted({name.split("/")[0] for name in names if "/" in name})
    flat = [name for name in names if "/" not in name]
    if flat and classes:
        raise SimsError(f"{folder} has images beside its sub-folders, like {flat[0]}; move them into a class's folder")
    if flat:
        return dict.fromkeys(flat, NO_LABEL), None
    return {name: classes.index(name.split("/")[0]) for name in names}, classes or None


def _indexed(index: Path, names: Sequence[str]) -> dict[str, int]:
    """Labels from EDM's dataset.json: {"labels": [["rel/path.png", 3], ...]} or {"labels": null}."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["labels"]
    except (ValueError, LookupError, TypeError, OSError):
        raise SimsError(f'{index} is not JSON of the form {{"labels": [["a.png", 3], ...]}}; correct it') from None
    if listed is None:
        return dict.fromkeys(names, NO_LABEL)
    labels: dict[str, int] = {}
    for item in listed if isinstance(listed, list) else [listed]:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
            raise SimsError(f'{index} lists {str(item)[:80]!r} in "labels"; write each as ["rel/path.png", 3]')
        path = PurePosixPath(item[0].replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise SimsError(f"{index} names {item[0]}, outside its folder; list paths relative to {index.parent}")
        if str(path) in labels:
            raise SimsError(f"{index} names {item[0]} twice; keep one entry")
        if not (index.parent / path).is_file():
            raise SimsError(f"{index} names {item[0]}, which is not there; add the file or remove the entry")
        labels[str(path)] = _label(item[1], f"{index}: {item[0]}")
    if unlisted := sorted(set(names) - labels.keys()):
        raise SimsError(f"{index} has no entry for {unlisted[0]}; give it a label (-1: none) or move the file away")
    return labels


def _parquet_entries(files: Sequence[Path]) -> Iterator[Entry]:
    running = 0
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                columns, row = _columns(path, file.schema_arrow), 0
                for batch in file.iter_batches(PARQUET_BATCH, columns=columns):
                    for values in batch.to_pylist():
                        yield _parquet_entry(f"{path} row {row}", running, values)
                        running, row = running + 1, row + 1
        except (pa.ArrowException, OSError) as error:
            raise SimsError(f"{path} is not readable Parquet ({_one_line(error)}); make or fetch it again") from None


def _columns(path: Path, schema: pa.Schema) -> list[str]:
    if METADATA_KEY in (schema.metadata or {}):
        raise SimsError(f"{path} is already part of a sample table; use its folder as it is")
    if "image" not in schema.names:
        raise SimsError(f"{path} has no column `image`, only {', '.join(schema.names)}; rename the one with the images")
    kind = schema.field("image").type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise SimsError(f"{path}: column `image` is {kind}; store encoded images (PNG, JPEG) as binary")
    for name in ("label", "index"):
        if name in schema.names and not pa.types.is_integer(schema.field(name).type):
            raise SimsError(f"{path}: column `{name}` is {schema.field(name).type}; make it an integer or drop it")
    return [name for name in ("image", "label", "index") if name in schema.names]


def _parquet_entry(name: str, running: int, values: dict[str, Any]) -> Entry:
    image = values["image"]
    data = image["bytes"] if isinstance(image, dict) else image
    if data is None:
        raise SimsError(f"{name} has no image bytes; embed them or remove the row")
    row_id = values.get("index", running)
    if row_id is None or not 0 <= row_id < 2**63:
        raise SimsError(f"{name} has index {row_id}; number the rows from 0 or drop the column")
    label = values.get("label")
    return Entry(row_id, NO_LABEL if label is None else _label(label, name), name, data)


def _label(value: object, where: str) -> int:
    if type(value) is not int or not NO_LABEL <= value < LABEL_LIMIT:  # type(): True and 1.0 are no labels
        raise SimsError(f"{where} has label {str(value)[:80]}; labels are whole numbers from 0, or -1 for none")
    return value


@contextmanager
def open_image(entry: Entry) -> Iterator[Image.Image]:
    """The image of an entry, lazily decoded.

    Raises:
        SimsError: what fails in Pillow, here or inside the block, with the entry's name.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            data = BytesIO(entry.data) if isinstance(entry.data, bytes) else entry.data
            with Image.open(data, formats=FORMATS) as image:
                if image.mode.startswith(DEEP_MODES):
                    raise SimsError(f"{entry.name} has more than 8 bits per channel ({image.mode}); convert it to 8")
                yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS
        raise SimsError(f"{entry.name} claims to have more than {limit} pixels; shrink or remove it") from None
    except DAMAGE as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else _one_line(error)
        raise SimsError(f"{entry.name} is not a readable image ({reason}); repair or remove it") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
