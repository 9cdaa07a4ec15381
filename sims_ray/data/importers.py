"""Importers: images and latents from elsewhere become a committed sample table.

A source is read twice. The first pass looks at headers and labels only, so that what can be seen without
decoding is refused before anything is written; the second decodes and writes part files.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sims_ray.data.commits import NewTable, check_new, new_table
from sims_ray.data.entries import EXTENSIONS, Source
from sims_ray.data.pixels import Crop, Geometry, Look, decode, look_at
from sims_ray.data.samples import Samples, write_samples
from sims_ray.data.sources import find_source
from sims_ray.data.table import table_result
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import Artifact

PART_BYTES = 64 << 20  # raw pixels per part file: the most that is in memory at once
PROGRESS_NIMG = 1000

Progress = Callable[[int], None]


@dataclass(frozen=True)
class ImportSummary:
    """What an import wrote.

    Attributes:
        folder: the sample table, as it was asked for.
        rows: number of images.
        files: number of Parquet files.
        kind: 'image' or 'latent'.
        shape: (C, H, W) of the images.
        num_classes: largest label + 1, or 0 without labels.
        classes: class names by label, where the source names them.
        fingerprint: of the content, whatever it came from.
    """

    folder: Path | str
    rows: int
    files: int
    kind: str
    shape: tuple[int, int, int]
    num_classes: int
    classes: list[str] | None
    fingerprint: str


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
    out: Path | str,
    *,
    size: int | None = None,
    crop: Crop = "center",
    grey: bool = False,
    on_progress: Progress | None = None,
) -> ImportSummary:
    """Make the sample table `out` from images or latents as people have them.

    A folder's classes are its sub-folders in sorted order, or come from EDM's `dataset.json`; without either the
    images have no label. A zip is read like a folder. Parquet needs a column `image` (bytes, or a struct with
    `bytes`); integer `label` and `index` (the id) are optional. Of CIFAR-10's tar the training batches are taken.
    Other tars, one or a folder of them, are WebDataset: `key.png`, with `key.cls` or `key.json` for its label.
    The layouts of .npy and .npz are those of `sims_ray.data.arrays`; float arrays are latents.

    Images become RGB, or grey if all are stored as grey (a palette counts as colour); EXIF orientation is applied,
    transparency dropped, and of several frames the first is taken. Hidden files are passed over.

    Args:
        source: folder or file.
        out: folder to make; it appears complete or not at all. Or its URI: there the manifest, written last, makes it a
            table, and files without one are removed.
        size: height and width in pixels to resize to with Lanczos; none keeps every pixel.
        crop: with `size`, cut the central square first ("center") or squeeze the whole image ("none").
        grey: make colour images grey.
        on_progress: told the number of images done, every 1,000 and after each file.

    Raises:
        SimsError: `out` holds something, or a source, label, size or image that cannot be used.
    """
    if crop not in ("none", "center") or (size is not None and size < 1):
        raise SimsError(f"size={size}, crop={crop!r} is not possible; give a size of 1 or more, crop none or center")
    check_new(out)
    found = find_source(source)
    labels, geometry = _survey(found, size, crop, grey)
    with new_table(out) as table:
        _write_parts(found, geometry, table, on_progress or (lambda done: None))
        if sum(file["rows"] for file in table.files.values()) != len(labels):
            raise SimsError(f"{source} has changed while it was read; import it again when it is complete")
        settings = {"source": source.resolve().name, "size": size, "crop": crop, "grey": grey}
        facts = table_result(geometry.shape, labels, len(labels), geometry.kind)
        fingerprint = table.commit("import", settings, {**facts, "classes": found.classes})
    classes = facts["num_classes"]
    return ImportSummary(
        out, len(labels), len(table.files), geometry.kind, geometry.shape, classes, found.classes, fingerprint
    )


def _survey(source: Source, size: int | None, crop: Crop, grey: bool) -> tuple[NDArray[np.int32], Geometry]:
    """First pass, over headers alone: labels int32 [N] and the geometry all entries come to."""
    ids, labels, all_grey = array("q"), array("i"), True
    first: Look | None = None
    for entry in source.entries():
        seen = look_at(entry)
        first = first or seen
        _check_alike(first, seen, size, grey)
        all_grey = all_grey and seen.grey
        ids.append(entry.id)
        labels.append(entry.label)
    if first is None:
        images = ", ".join(sorted(EXTENSIONS))
        raise SimsError(f"{source.path} holds no images; give it some ({images}), or latents as .npy")
    unique, counts = np.unique(np.array(ids, np.int64), return_counts=True)
    if len(unique) < len(ids):
        twice = unique[counts > 1][0]
        raise SimsError(f"{source.path} has index {twice} more than once; number the rows or drop the column `index`")
    channels = first.sides[2] if first.kind == "latent" else 1 if grey or all_grey else 3
    side = size or first.sides[0]
    return np.array(labels, np.int32), Geometry(first.kind, (channels, side, side), size is not None, crop)


def _check_alike(first: Look, seen: Look, size: int | None, grey: bool) -> None:
    if seen.kind != first.kind:
        names = f"{first.name} is of kind {first.kind} but {seen.name} of kind {seen.kind}"
        raise SimsError(f"{names}; import images and latents apart")
    if seen.kind == "latent" and (size is not None or grey):
        raise SimsError(f"{seen.name} is a latent, which cannot be resized or made grey; leave out --size and --grey")
    if size is not None:
        return
    advice = "give --size to bring all images to one size" if seen.kind == "image" else "make all latents alike"
    if seen.sides != first.sides:
        raise SimsError(f"{first} but {seen}; {advice}")
    if seen.sides[0] != seen.sides[1]:  # a square also keeps its size under every EXIF orientation
        raise SimsError(f"{seen}, not square; {advice}")


def _write_parts(source: Source, geometry: Geometry, table: NewTable, on_progress: Progress) -> None:
    """Second pass: decode and write part files."""
    row_bytes = math.prod(geometry.shape) * geometry.dtype.itemsize
    rows = np.empty((max(1, PART_BYTES // row_bytes), *geometry.shape), geometry.dtype)
    entries, done = source.entries(), 0
    while True:
        ids, labels = [], []
        for row, entry in enumerate(islice(entries, len(rows))):
            rows[row] = decode(entry, geometry)
            ids.append(entry.id)
            labels.append(entry.label)
            done += 1
            if done % PROGRESS_NIMG == 0:
                on_progress(done)
        if not ids:
            return
        part = Samples(np.array(ids, np.int64), rows[: len(ids)], np.array(labels, np.int32))
        table.add(_part_name(len(table.files)), part, {"stage": "import"})  # no origin: equal content, equal bytes
        on_progress(done)


def _part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"
