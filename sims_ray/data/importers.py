"""Importers: real images from elsewhere become a committed sample table.

A source is read twice. The first pass looks at headers and labels only, so that what can be seen without
decoding is refused before anything is written; the second decodes and writes part files.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sims_ray.data.sources import EXTENSIONS, Entry, Source, find_source, open_image
from sims_ray.data.table import Samples, table_result, write_samples
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import MANIFEST, Artifact, write_json

PART_BYTES = 64 << 20  # raw pixels per part file: the most that is in memory at once
PROGRESS_NIMG = 1000
GREY_MODES = frozenset({"1", "L", "LA", "La"})

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
    found = find_source(source)
    labels, geometry = _survey(found, size, crop, grey)
    with _folder_beside(out) as folder:
        files = _write_parts(found, geometry, folder, on_progress or (lambda done: None))
        settings = {"source": source.resolve().name, "size": size, "crop": crop, "grey": grey}
        facts = table_result(geometry.shape, labels, len(labels))
        fingerprint = _commit_content(folder, settings, files, {**facts, "classes": found.classes})
    classes = facts["num_classes"]
    return ImportSummary(out, len(labels), len(files), geometry.shape, classes, found.classes, fingerprint)


def _survey(source: Source, size: int | None, crop: Crop, grey: bool) -> tuple[NDArray[np.int32], _Geometry]:
    """First pass, over headers alone: labels int32 [N] and the geometry all images come to."""
    ids, labels, all_grey = [], [], True
    first: tuple[str, tuple[int, int]] | None = None
    for entry in source.entries():
        with open_image(entry) as image:
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


def _pixels(entry: Entry, geometry: _Geometry) -> NDArray[np.uint8]:
    """Decode one image to uint8 [C, H, W]."""
    with open_image(entry) as opened:
        image = ImageOps.exif_transpose(opened).convert(geometry.mode)
        if geometry.resize:
            if geometry.crop == "center":
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                image = image.crop((left, top, left + side, top + side))
            image = image.resize((geometry.side, geometry.side), Image.Resampling.LANCZOS)
        array = np.asarray(image)
    return array.reshape(geometry.side, geometry.side, -1).transpose(2, 0, 1)


def _write_parts(source: Source, geometry: _Geometry, folder: Path, on_progress: Progress) -> dict[str, dict[str, int]]:
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
