"""Export of sample tables to what other programs read: a folder or zip of PNG in EDM's layout, or one .npz."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sims_ray.data.commits import atomic_folder, check_new_local
from sims_ray.data.samples import NO_LABEL, Samples
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.storage.beside import atomic_path

INDEX = "dataset.json"
FOLDER_ROWS = 1000  # images per sub-folder, as EDM's dataset tool has them
PNG_MODES = {1: "L", 3: "RGB"}

Format = Literal["png", "zip", "npz"]
Progress = Callable[[int], None]
Write = Callable[[str, Iterable[bytes]], None]


def export(table: SampleTable, out: Path | str, format: Format, on_progress: Progress | None = None) -> Path:
    """Write the rows of a table in their order; one of its files is in memory at a time.

    Args:
        table: on a disk or in an object store.
        out: what to make, on a disk; it appears complete or not at all.
        format: "png" for a folder with `00000/img00000000.png` and so on and EDM's `dataset.json`, whose `labels` is a
            list of [name, class], or null where no row has a label; "zip" for the same as a zip without compression;
            "npz" for `arr_0`, uint8 [N, H, W, C] or for latents float16 [N, C, H, W], and, where a row has a label,
            `arr_1`, int64 [N].
        on_progress: told the number of rows done, after each file.

    Returns:
        What was made.

    Raises:
        SimsError: `out` exists or is no path; latents, or images that are neither grey nor RGB, as PNG; a file that
            cannot be read.
    """
    if format not in get_args(Format):
        raise SimsError(f"format={format!r} is not known; choose {', '.join(get_args(Format))}")
    if format != "npz" and table.kind == "latent":
        raise SimsError(f"{table.folder} holds latents, which are no {format}; decode first with sims data decode")
    if format != "npz" and table.shape[0] not in PNG_MODES:
        raise SimsError(f"{table.folder} has images of {table.shape[0]} channels, which PNG cannot hold; export npz")
    path = check_new_local(out, "an export")
    if format != "png" and path.exists():
        raise SimsError(f"{path} exists; choose another name or remove it first")
    try:
        {"png": _to_folder, "zip": _to_zip, "npz": _to_npz}[format](table, path, on_progress or (lambda done: None))
    except OSError as error:
        raise SimsError(f"{path} cannot be written ({error.strerror or error}); choose another place") from None
    return path


def _to_folder(table: SampleTable, out: Path, on_progress: Progress) -> None:
    with atomic_folder(out) as folder:

        def write(name: str, pieces: Iterable[bytes]) -> None:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            with path.open("wb") as file:
                file.writelines(pieces)

        _write_images(table, write, on_progress)


def _to_zip(table: SampleTable, out: Path, on_progress: Progress) -> None:
    with atomic_path(out) as beside, zipfile.ZipFile(beside, "w") as archive:

        def write(name: str, pieces: Iterable[bytes]) -> None:
            with archive.open(zipfile.ZipInfo(name), "w") as member:  # stored, and dated alike
                member.writelines(pieces)

        _write_images(table, write, on_progress)


def _write_images(table: SampleTable, write: Write, on_progress: Progress) -> None:
    """Write PNGs and the index; equal tables give equal bytes."""
    labels, row = np.empty(len(table), np.int32), 0
    for samples in _files(table):
        for image, label in zip(samples.images, samples.labels, strict=True):
            write(_image_name(row), [_png(image)])
            labels[row] = label
            row += 1
        on_progress(row)
    write(INDEX, _index(labels))


def _image_name(row: int) -> str:
    return f"{row // FOLDER_ROWS:05d}/img{row:08d}.png"


def _index(labels: NDArray[np.int32]) -> Iterator[bytes]:
    """EDM's `dataset.json`, piece by piece."""
    if (labels == NO_LABEL).all():
        yield b'{"labels": null}'
        return
    before = '{"labels": [\n'
    for row, label in enumerate(labels.tolist()):
        yield f"{before}{json.dumps([_image_name(row), label])}".encode()
        before = ",\n"
    yield b"\n]}\n"


def _files(table: SampleTable) -> Iterator[Samples]:
    """The files in order, each with the rows that the manifest says: the sizes of arrays come from there."""
    for name, rows in table.file_rows.items():
        samples = table.read(name)
        if len(samples) != rows or samples.kind != table.kind or samples.images.shape[1:] != table.shape:
            raise SimsError(f"{table.folder}/{name} is not as its manifest says; see `sims data verify {table.folder}`")
        yield samples


def _png(image: NDArray[np.uint8]) -> bytes:
    """A PNG of an image uint8 [C, H, W], C = 1 or 3."""
    pixels = image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    content = BytesIO()
    Image.fromarray(pixels).save(content, "PNG", compress_level=1)  # photos hardly shrink at higher levels
    return content.getvalue()


def _to_npz(table: SampleTable, out: Path, on_progress: Progress) -> None:
    """Arrays go into the zip file by file, behind the header that numpy's own format has."""
    (c, h, w), is_latent = table.shape, table.kind == "latent"
    shape, dtype = ((c, h, w), np.dtype("<f2")) if is_latent else ((h, w, c), np.dtype("u1"))
    labels, done = np.empty(len(table), "<i8"), 0
    with atomic_path(out) as beside, zipfile.ZipFile(beside, "w") as archive:
        with _member(archive, "arr_0", dtype, (len(table), *shape)) as member:
            for samples in _files(table):
                rows = samples.images if is_latent else samples.images.transpose(0, 2, 3, 1)
                member.write(np.ascontiguousarray(rows, dtype).data.cast("B"))
                labels[done : done + len(samples)] = samples.labels
                done += len(samples)
                on_progress(done)
        if table.unlabelled < len(table):
            with _member(archive, "arr_1", labels.dtype, labels.shape) as member:
                member.write(labels.data.cast("B"))


def _member(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> IO[bytes]:
    """An array of an .npz, open behind its header."""
    member = archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    return member
