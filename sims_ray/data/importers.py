"""Importers: real images from elsewhere become a committed sample table.

A source is read twice. The first pass looks at headers and labels only, so that what can be seen without
decoding is refused before anything is written; the second decodes and writes part files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from sims_ray.data.table import METADATA_KEY, NO_LABEL, Samples, table_result, write_samples
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import MANIFEST, Artifact, write_json

PART_BYTES = 64 << 20  # raw pixels per part file: the most that is in memory at once
PROGRESS_NIMG = 1000
PARQUET_BATCH = 256
LABEL_LIMIT = 2**31  # labels are int32
EXTENSIONS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: it would start Ghostscript
GREY_MODES = frozenset({"1", "L", "LA", "La"})
DEEP_MODES = ("I", "F")  # 16- and 32-bit pixels; Pillow would clip them to 8 bits
DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)

Crop = Literal["none", "center"]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class ImportSummary:
    """What an import wrote.

    Attributes:
        folder: the sample table.
        rows: number of images.
        files: number of Parquet files.
        shape: (C, H, W) of the images.
        num_classes: largest label + 1, or 0 without labels.
        classes: class names by label, where the source names them.
        fingerprint: of the content, whatever it came from.
    """

    folder: Path
    rows: int
    files: int
    shape: tuple[int, int, int]
    num_classes: int
    classes: list[str] | None
    fingerprint: str


@dataclass(frozen=True)
class _Entry:
    """One encoded image; `name` is for messages."""

    id: int
    label: int
    name: str
    data: Path | bytes


@dataclass(frozen=True)
class _Source:
    """Images to import; every call of `entries` starts anew."""

    path: Path
    entries: Callable[[], Iterator[_Entry]]
    classes: list[str] | None


@dataclass(frozen=True)
class _Geometry:
    """What every image is brought to."""

    mode: Literal["L", "RGB"]
    side: int
    resize: bool
    crop: Crop

    @property
    def shape(self) -> tuple[int, int, int]:
        return (1 if self.mode == "L" else 3), self.side, self.side


def import_digits(artifact: Artifact) -> None:
    """Commit scikit-learn's embedded digits: 1,797 images [1, 8, 8] with labels 0..9, grey 0..16 scaled to 0..255."""
    if artifact.complete:
        return
    from sklearn.datasets import load_digits  # here because it takes a second

    digits = load_digits()
    images = np.rint(digits.images * 255 / 16).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int32)
    name = _part_name(0)
    write_samples(artifact.path / name, Samples(np.arange(len(images)), images, labels), {"source": "digits"})
    result = table_result(images.shape[1:], labels, len(images))
    artifact.commit({name: {"rows": len(images)}}, {**result, "source": "digits"})


def import_images(
    source: Path,
    out: Path,
    *,
    size: int | None = None,
    crop: Crop = "center",
    grey: bool = False,
    on_progress: Progress | None = None,
) -> ImportSummary:
    """Make the sample table `out` from a folder of images, or from Parquet with encoded images.

    A folder's classes are its sub-folders in sorted order, or come from EDM's `dataset.json`; without either
    the images have no label. Parquet needs a column `image` (bytes, or a struct with `bytes`); integer `label`
    and `index` (the id) are optional. Images become RGB, or grey if all are stored as grey (a palette counts
    as colour); EXIF orientation is applied, transparency dropped, and of several frames the first is taken.
    Hidden files are passed over.

    Args:
        source: folder or Parquet file.
        out: folder to make; it appears complete or not at all.
        size: height and width in pixels to resize to with Lanczos; none keeps every pixel.
        crop: with `size`, cut the central square first ("center") or squeeze the whole image ("none").
        grey: make colour images grey.
        on_progress: told the number of images done, every 1,000 and after each file.

    Raises:
        SimsError: `out` holds something, or a source, label, size or image that cannot be used.
    """
    if crop not in ("none", "center") or (size is not None and size < 1):
        raise SimsError(f"size={size}, crop={crop!r} is not possible; give a size of 1 or more, crop none or center")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SimsError(f"{out} exists and is not an empty folder; choose another name or remove it first")
    found = _find(source)
    labels, geometry = _survey(found, size, crop, grey)
    with _folder_beside(out) as folder:
        files = _write_parts(found, geometry, folder, on_progress or (lambda done: None))
        settings = {"source": source.resolve().name, "size": size, "crop": crop, "grey": grey}
        facts = table_result(geometry.shape, labels, len(labels))
        fingerprint = _commit_content(folder, settings, files, {**facts, "classes": found.classes})
    classes = facts["num_classes"]
    return ImportSummary(out, len(labels), len(files), geometry.shape, classes, found.classes, fingerprint)


def _find(source: Path) -> _Source:
    if source.is_dir():
        parquet, images = sorted(source.glob("*.parquet")), _image_names(source)
        if parquet and images:
            raise SimsError(f"{source} holds both {parquet[0].name} and {images[0]}; keep them in separate folders")
        return _Source(source, lambda: _parquet_entries(parquet), None) if parquet else _images(source, images)
    if source.is_file() and source.suffix == ".parquet":
        return _Source(source, lambda: _parquet_entries([source]), None)
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


def _images(folder: Path, names: Sequence[str]) -> _Source:
    index = folder / "dataset.json"
    labels, classes = (_indexed(index, names), None) if index.is_file() else _by_folder(folder, names)

    def entries() -> Iterator[_Entry]:
        for i, name in enumerate(sorted(labels)):
            yield _Entry(i, labels[name], str(folder / name), folder / name)

    return _Source(folder, entries, classes)


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


def _parquet_entries(files: Sequence[Path]) -> Iterator[_Entry]:
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


def _parquet_entry(name: str, running: int, values: dict[str, Any]) -> _Entry:
    image = values["image"]
    data = image["bytes"] if isinstance(image, dict) else image
    if data is None:
        raise SimsError(f"{name} has no image bytes; embed them or remove the row")
    row_id = values.get("index", running)
    if row_id is None or not 0 <= row_id < 2**63:
        raise SimsError(f"{name} has index {row_id}; number the rows from 0 or drop the column")
    label = values.get("label")
    return _Entry(row_id, NO_LABEL if label is None else _label(label, name), name, data)


def _label(value: object, where: str) -> int:
    if type(value) is not int or not NO_LABEL <= value < LABEL_LIMIT:  # type(): True and 1.0 are no labels
        raise SimsError(f"{where} has label {str(value)[:80]}; labels are whole numbers from 0, or -1 for none")
    return value


def _survey(source: _Source, size: int | None, crop: Crop, grey: bool) -> tuple[NDArray[np.int32], _Geometry]:
    """First pass, over headers alone: labels int32 [N] and the geometry all images come to."""
    ids, labels, all_grey = [], [], True
    first: tuple[str, tuple[int, int]] | None = None
    for entry in source.entries():
        with _opened(entry) as image:
            found, all_grey = image.size, all_grey and image.mode in GREY_MODES
        first = first or (entry.name, found)
        if size is None:
            _check_size(*first, entry.name, found)
        ids.append(entry.id)
        labels.append(entry.label)
    if first is None:
        raise SimsError(f"{source.path} holds no images; give Parquet, or a folder of {', '.join(sorted(EXTENSIONS))}")
    unique, counts = np.unique(np.array(ids, np.int64), return_counts=True)
    if len(unique) < len(ids):
        twice = unique[counts > 1][0]
        raise SimsError(f"{source.path} has index {twice} more than once; number the rows or drop the column `index`")
    mode: Literal["L", "RGB"] = "L" if grey or all_grey else "RGB"
    return np.array(labels, np.int32), _Geometry(mode, size or first[1][0], size is not None, crop)


def _check_size(first_name: str, first: tuple[int, int], name: str, found: tuple[int, int]) -> None:
    if found != first:
        sizes = f"{first_name} is {first[0]}x{first[1]} but {name} is {found[0]}x{found[1]}"
        raise SimsError(f"{sizes}; give --size to bring all images to one size")
    if found[0] != found[1]:  # a square also keeps its size under every EXIF orientation
        raise SimsError(f"{name} is {found[0]}x{found[1]}, not square; give --size to bring all images to one size")


@contextmanager
def _opened(entry: _Entry) -> Iterator[Image.Image]:
    """The image, lazily decoded; what fails in Pillow inside the block becomes a SimsError naming the entry."""
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


def _pixels(entry: _Entry, geometry: _Geometry) -> NDArray[np.uint8]:
    """Decode one image to uint8 [C, H, W]."""
    with _opened(entry) as opened:
        image = ImageOps.exif_transpose(opened).convert(geometry.mode)
        if geometry.resize:
            if geometry.crop == "center":
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                image = image.crop((left, top, left + side, top + side))
            image = image.resize((geometry.side, geometry.side), Image.Resampling.LANCZOS)
        array = np.asarray(image)
    return array.reshape(geometry.side, geometry.side, -1).transpose(2, 0, 1)


def _write_parts(
    source: _Source, geometry: _Geometry, folder: Path, on_progress: Progress
) -> dict[str, dict[str, int]]:
    """Second pass: decode and write part files; returns their names and rows."""
    pixels = np.empty((max(1, PART_BYTES // math.prod(geometry.shape)), *geometry.shape), np.uint8)
    files: dict[str, dict[str, int]] = {}
    entries, done = source.entries(), 0
    while True:
        ids, labels = [], []
        for row, entry in enumerate(islice(entries, len(pixels))):
            pixels[row] = _pixels(entry, geometry)
            ids.append(entry.id)
            labels.append(entry.label)
            done += 1
            if done % PROGRESS_NIMG == 0:
                on_progress(done)
        if not ids:
            return files
        name = _part_name(len(files))
        part = Samples(np.array(ids, np.int64), pixels[: len(ids)], np.array(labels, np.int32))
        write_samples(folder / name, part, {"stage": "import"})  # no origin: equal content, equal bytes
        files[name] = {"rows": len(ids)}
        on_progress(done)


def _part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"


def _commit_content(
    folder: Path, settings: dict[str, Any], files: dict[str, dict[str, int]], result: dict[str, Any]
) -> str:
    """Commit the folder with a fingerprint of its content, so that origin and settings do not matter."""
    artifact = Artifact(folder, "import", settings, ())
    artifact.commit(files, result)
    manifest = artifact.manifest
    digests = "".join(entry["sha256"] for _, entry in sorted(manifest["files"].items()))
    manifest["fingerprint"] = hashlib.sha256(digests.encode()).hexdigest()
    write_json(folder / MANIFEST, manifest)
    return str(manifest["fingerprint"])


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A folder beside `out` to fill; renamed onto `out` on success, removed on failure."""
    out = out.resolve()
    beside = out.with_name(f".{out.name}.{platform.node()}-{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)  # what a killed process of the same id left
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise SimsError(f"{out} cannot be made ({error.strerror}); choose a folder you can write to") from None
    try:
        yield beside
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
