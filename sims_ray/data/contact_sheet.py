"""Looking at images and tables: a grid to see, and the figures that describe a table."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError

CELL_PIXELS = 32  # smaller images are magnified to at least this
GAP_PIXELS = 1
NEUTRAL = 128
COUNT_CHUNK = 1 << 22  # np.bincount widens its input to int64


def contact_sheet(images: NDArray[np.uint8], columns: int | None = None, scale: int | None = None) -> Image.Image:
    """Lay images out in a grid, row by row, with a grey line between them.

    Args:
        images: uint8 [N, C, H, W], C = 1 (grey) or 3 (RGB).
        columns: images per row; none makes the grid about square.
        scale: whole-number magnification without smoothing; none brings small images to about 32 pixels.

    Raises:
        SimsError: no images, another shape or type, or columns or scale below 1.
    """
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


def describe(table: SampleTable) -> dict[str, Any]:
    """Figures of a table, one file in memory at a time.

    Returns `rows`, `files`, `shape` (C, H, W), `num_classes`, `label_counts` (label -> rows, -1: none),
    `pixel_mean` and `pixel_std` over all pixels scaled to [-1, 1], and `fingerprint`.

    Raises:
        SimsError: a file is missing or unreadable.
    """
    labels: Counter[int] = Counter()
    levels, files = np.zeros(256, np.int64), 0
    for samples in table.files():
        files += 1
        labels.update(samples.labels.tolist())
        levels += _levels(samples.images)
    mean, std = _moments(levels)
    return {
        "rows": len(table),
        "files": files,
        "shape": list(table.shape),
        "num_classes": table.num_classes,
        "label_counts": dict(sorted(labels.items())),
        "pixel_mean": mean,
        "pixel_std": std,
        "fingerprint": table.fingerprint,
    }


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
