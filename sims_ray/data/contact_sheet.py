"""Looking at images and tables: a grid to see, and the figures that describe a table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sims_ray.data.samples import KINDS, Samples, concatenate, row_group_rows
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.storage.beside import atomic_path

CELL_PIXELS = 32  # smaller images are magnified to at least this
GAP_PIXELS = 1
NEUTRAL = 128
COUNT_CHUNK = 1 << 22  # np.bincount widens its input to int64
LATENT_ROWS = 64  # in float64 at a time


def contact_sheet(images: NDArray[np.uint8], columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Lay images out in a grid, row by row, with a grey line between them.

    Args:
        images: uint8 [N, C, H, W], C = 1 (grey) or 3 (RGB).
        columns: images per row; none makes the grid about square.
        scale: whole-number magnification without smoothing; none brings small images to about 32 pixels.

    Raises:
        SimsError: latents, no images, another shape or type, or columns or scale below 1.
    """
    if images.dtype == np.float16:
        raise SimsError("a contact sheet cannot show latents; decode the table first with sims data decode")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        found = f"{images.dtype} {list(images.shape)}"
        raise SimsError(f"a contact sheet cannot show {found}; give uint8 [N, C, H, W] with N >= 1 and C = 1 or 3")
    n, channels, height, width = images.shape
    columns = min(n, math.ceil(math.sqrt(n)) if columns is None else columns)
    scale = math.ceil(CELL_PIXELS / max(height, width)) if scale is None else scale
    if columns < 1 or scale < 1:
        raise SimsError(f"a contact sheet cannot have columns={columns}, scale={scale}; give 1 or more")
    step_y, step_x = height * scale + GAP_PIXELS, width * scale + GAP_PIXELS
    rows = math.ceil(n / columns)
    sheet = np.full((channels, rows * step_y - GAP_PIXELS, columns * step_x - GAP_PIXELS), NEUTRAL, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * step_y, i % columns * step_x
        cell = image.repeat(scale, axis=1).repeat(scale, axis=2)
        sheet[:, y : y + cell.shape[1], x : x + cell.shape[2]] = cell
    return Image.fromarray(sheet[0] if channels == 1 else np.ascontiguousarray(sheet.transpose(1, 2, 0)))


def random_rows(table: SampleTable, n: int, seed: int) -> NDArray[np.int64]:
    """`n` different rows of a table in their order, or all if it has no more: a function of `seed` and its size."""
    if n >= len(table):
        return np.arange(len(table))
    return np.sort(np.random.default_rng(seed).choice(len(table), n, replace=False))


def read_rows(table: SampleTable, rows: Sequence[int] | NDArray[np.int64]) -> Samples:
    """Rows of a table, given in rising order; only the row groups they lie in are read, one in memory at a time.

    Raises:
        SimsError: there are no rows, or a file is missing or unreadable.
    """
    if not len(rows):
        raise SimsError(f"{table.folder} has no rows to show; make a table with some")
    parts, first, rows = [], 0, np.asarray(rows)
    group = row_group_rows(table.shape, KINDS[table.kind])
    for name, count in table.file_rows.items():
        inside = rows[(rows >= first) & (rows < first + count)] - first
        for near in np.split(inside, np.flatnonzero(np.diff(inside // group)) + 1):
            if len(near):
                start = int(near[0])
                parts.append(table.read(name, start, int(near[-1]) + 1)[near - start])
        first += count
    return concatenate(parts)


def describe(table: SampleTable) -> dict[str, Any]:
    """Figures of a table, one file in memory at a time.

    Returns `rows`, `files`, `kind`, `shape` (C, H, W), `num_classes`, `label_counts` (label -> rows, -1: none) and
    `fingerprint`; of images `pixel_mean` and `pixel_std` over all pixels scaled to [-1, 1]; of latents `channel_mean`
    and `channel_std`, one of each per channel.

    Raises:
        SimsError: a file is missing or unreadable.
    """
    labels: Counter[int] = Counter()
    figures = _Latents(table.shape[0]) if table.kind == "latent" else _Pixels()
    for samples in table.files():
        labels.update(samples.labels.tolist())
        figures.add(samples.images)
    return {
        "rows": len(table),
        "files": len(table.file_rows),
        "kind": table.kind,
        "shape": list(table.shape),
        "num_classes": table.num_classes,
        "label_counts": dict(sorted(labels.items())),
        **figures.result(),
        "fingerprint": table.fingerprint,
    }


class _Pixels:
    """Mean and spread of pixels."""

    def __init__(self) -> None:
        self._levels = np.zeros(256, np.int64)

    def add(self, images: NDArray[np.uint8]) -> None:
        self._levels += _levels(images)

    def result(self) -> dict[str, Any]:
        mean, std = _moments(self._levels)
        return {"pixel_mean": mean, "pixel_std": std}


class _Latents:
    """Mean and spread of each channel, by sums in float64: latents are of the order of 1."""

    def __init__(self, channels: int) -> None:
        self._n, self._sum, self._squares = 0, np.zeros(channels), np.zeros(channels)

    def add(self, latents: NDArray[np.float16]) -> None:
        for start in range(0, len(latents), LATENT_ROWS):
            part = latents[start : start + LATENT_ROWS].astype(np.float64)
            self._n += part[:, 0].size
            self._sum += part.sum(axis=(0, 2, 3))
            self._squares += (part**2).sum(axis=(0, 2, 3))

    def result(self) -> dict[str, Any]:
        mean = self._sum / self._n
        std = np.sqrt(np.maximum(self._squares / self._n - mean**2, 0))
        return {"channel_mean": mean.tolist(), "channel_std": std.tolist()}


def _levels(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often each of the 256 grey levels occurs: exact however many pixels there are."""
    flat = images.reshape(-1)
    chunks = range(0, len(flat), COUNT_CHUNK)
    return sum((np.bincount(flat[i : i + COUNT_CHUNK], minlength=256) for i in chunks), np.zeros(256, np.int64))


def _moments(levels: NDArray[np.int64]) -> tuple[float, float]:
    values = np.arange(256) / 127.5 - 1
    weights = levels / levels.sum()
    mean = float(weights @ values)
    return mean, math.sqrt(float(weights @ (values - mean) ** 2))


def save_sheet(sheet: Image.Image, out: Path) -> None:
    """Write an image as PNG, whole or not at all.

    Raises:
        SimsError: it cannot be written there.
    """
    try:
        with atomic_path(out) as beside:
            sheet.save(beside, "PNG")
    except OSError as error:
        raise SimsError(f"{out} cannot be written ({error.strerror or error}); choose another place") from None
