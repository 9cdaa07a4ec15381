"""The sample table: real and synthetic images in one schema, a folder of Parquet files plus `manifest.json`.

It lies on a disk or in an object store; the columns of its files are told in `sims_ray.data.samples`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims_ray.data.samples import KINDS, NO_LABEL, Samples, concatenate, read_samples
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import read_manifest
from sims_ray.storage.folders import Folder


class SampleTable:
    """A committed folder of sample files.

    Args:
        folder: folder with `manifest.json`, or its URI.

    Raises:
        SimsError: no manifest there, or its manifest lists no sample files.
    """

    def __init__(self, folder: Path | str | Folder) -> None:
        self.folder = Folder.at(folder)
        self.manifest = read_manifest(self.folder)
        files = self.manifest.get("files", {})
        self.file_rows: dict[str, int] = {name: f["rows"] for name, f in sorted(files.items()) if "rows" in f}
        if not self.file_rows:
            raise SimsError(f"{self.folder} lists no sample files; make a table with `sims data import`")

    def __len__(self) -> int:
        return sum(self.file_rows.values())

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the table's content."""
        return str(self.manifest["fingerprint"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        c, h, w = self.manifest["result"]["shape"]
        return c, h, w

    @property
    def kind(self) -> str:
        """'image' or 'latent'."""
        return str(self.manifest["result"].get("kind", "image"))

    @property
    def num_classes(self) -> int:
        """Number of classes K: largest label + 1, or 0 without labels."""
        return int(self.manifest["result"]["num_classes"])

    @property
    def unlabelled(self) -> int:
        """Rows without a label."""
        return int(self.manifest["result"]["unlabelled"])

    @property
    def row_bytes(self) -> int:
        """Bytes of one image in memory."""
        return math.prod(self.shape) * KINDS[self.kind].itemsize

    def files(self) -> Iterator[Samples]:
        """The files in order, one in memory at a time."""
        for name in self.file_rows:
            yield self.read(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Samples:
        """Rows of one of its files."""
        return read_samples(f"{self.folder.location}/{name}", start, stop)

    def rows(self, start: int, stop: int) -> Samples:
        """Rows [start, stop) in the order of the files.

        Raises:
            SimsError: the table has fewer rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise SimsError(f"{self.folder} has {len(self)} rows, {stop} were asked for; synthesize or import more")
        parts, first = [], 0
        for name, rows in self.file_rows.items():
            if first < stop and first + rows > start:
                parts.append(self.read(name, max(start - first, 0), min(stop - first, rows)))
            first += rows
        return concatenate(parts) if parts else self.read(next(iter(self.file_rows)), 0, 0)

    def head(self, n: int) -> Samples:
        """The first `n` rows.

        Raises:
            SimsError: the table has fewer rows.
        """
        return self.rows(0, n)


def table_result(shape: tuple[int, ...], labels: NDArray[np.int32], rows: int, kind: str = "image") -> dict[str, Any]:
    """The facts a table's manifest carries: rows, shape, kind, number of classes, rows without a label."""
    num_classes = int(labels.max()) + 1 if len(labels) else 0
    unlabelled = int((labels == NO_LABEL).sum())
    return {
        "rows": rows,
        "shape": list(shape),
        "kind": kind,
        "num_classes": max(num_classes, 0),
        "unlabelled": unlabelled,
    }
