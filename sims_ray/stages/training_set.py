"""The rows that a run trains on: which they are, and how pieces of them are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sims_ray.data.samples import KINDS, row_group_rows
from sims_ray.data.table import SampleTable
from sims_ray.diffusion.order import Rows, TrainingOrder, mean_weight
from sims_ray.errors import SimsError

READ_THREADS = 4
LABEL, WEIGHT = "label", "weight"


@dataclass(frozen=True)
class TrainingSet:
    """The rows that a run trains on.

    Attributes:
        table: where they lie, from its first row on.
        order: how many they are, and in which order they are visited.
        labelled: whether the network is told their classes.
        mean_weight: mean of their weights; None where the table has none.
    """

    table: SampleTable
    order: TrainingOrder
    labelled: bool = False
    mean_weight: float | None = None

    @classmethod
    def of(cls, location: str | Path, num_rows: int | None, seed: int, label_dim: int) -> TrainingSet:
        """The first rows of a table, trained on with a seed; of the table, no more than a column or two is read.

        Args:
            location: folder of the table, or its URI.
            num_rows: rows of it; None for all.
            seed: seed of their order.
            label_dim: number of classes that the network knows; 0 if it is not told them.

        Raises:
            SimsError: the table has fewer rows, labels that the network does not know, or useless weights.
        """
        table = SampleTable(location)
        n = len(table) if num_rows is None else num_rows
        if not 0 < n <= len(table):
            raise SimsError(f"{table.folder} has {len(table)} rows, {n} were asked for; synthesize or import more")
        _check_labels(table, n, label_dim)
        order = TrainingOrder(seed, n, row_group_rows(table.shape, KINDS[table.kind]))
        return cls(table, order, label_dim > 0, _mean_weight(table, n))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        others = 8 + 4 * self.labelled + 4 * (self.mean_weight is not None)
        return self.order.num_rows * (self.table.row_bytes + others)

    @property
    def window_nbytes(self) -> int:
        """Bytes of the largest window of the order."""
        rows = min(self.order.window_chunks * self.order.chunk_rows, self.order.num_rows)
        return self.nbytes // self.order.num_rows * rows

    def read(self, chunks: Sequence[range], places: NDArray[Any] | None = None) -> Rows:
        """Rows of the table, each put in its place; without places, in the order of the table."""
        bounds = list(accumulate(map(len, chunks), initial=0))
        rows = self._room(bounds[-1])

        def fill(first: int, chunk: range) -> None:
            part = self.table.rows(chunk.start, chunk.stop)
            at = slice(first, first + len(chunk)) if places is None else places[first : first + len(chunk)]
            rows.ids[at], rows.images[at] = part.ids, part.images
            if rows.labels is not None:
                rows.labels[at] = part.labels
            if rows.weights is not None and part.weights is not None:
                rows.weights[at] = part.weights

        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(fill, bounds[:-1], chunks))
        return rows

    def between(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) in the order of the table, of which one chunk at a time is read."""
        step = self.order.chunk_rows
        return self.read([range(first, min(first + step, stop)) for first in range(start, stop, step)])

    def window(self, number: int) -> Rows:
        """The rows of a window of the order, as they are visited."""
        window = self.order.window(number)
        return self.read(window.chunks, np.argsort(window.rows))

    def _room(self, n: int) -> Rows:
        images = np.empty((n, *self.table.shape), KINDS[self.table.kind])
        labels = np.empty(n, np.int32) if self.labelled else None
        weights = None if self.mean_weight is None else np.ones(n, np.float32)  # 1 in a file that has none
        return Rows(np.empty(n, np.int64), images, labels, weights)


def to_arrow(rows: Rows) -> pa.Table:
    """The rows as an Arrow table, without a copy."""
    shape = rows.images.shape[1:]
    value_type = pa.from_numpy_dtype(rows.images.dtype)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(rows.images.reshape(-1)), math.prod(shape))
    columns = {"id": rows.ids, "label": rows.labels, "weight": rows.weights}
    arrays = {name: pa.array(column) for name, column in columns.items() if column is not None}
    arrays["image"] = pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(value_type, shape), flat)
    return pa.table(arrays)


def from_arrow(table: pa.Table) -> Rows:
    """The rows of an Arrow table, as views that cannot be written to of what is in one piece."""
    columns = {name: table[name] for name in table.column_names}
    pieces = {name: c.chunk(0) if c.num_chunks == 1 else c.combine_chunks() for name, c in columns.items()}
    images = pieces.pop("image")
    views = {name: piece.to_numpy() for name, piece in pieces.items()}
    tensor = images.storage.flatten().to_numpy().reshape(-1, *images.type.shape)
    return Rows(views["id"], tensor, views.get("label"), views.get("weight"))


def _check_labels(table: SampleTable, num_rows: int, label_dim: int) -> None:
    if not label_dim or (not table.unlabelled and table.num_classes <= label_dim):
        return
    ends = [(part.min(), part.max()) for part in _column(table, LABEL, num_rows) if len(part)]
    lowest, highest = min(low for low, _ in ends), max(high for _, high in ends)
    if lowest < 0 or highest >= label_dim:
        raise SimsError(
            f"{table.folder} has labels {lowest}..{highest} but the network knows "
            f"0..{label_dim - 1}; import labelled images or set network.conditional=false"
        )


def _mean_weight(table: SampleTable, num_rows: int) -> float | None:
    """Mean of the weights of the first rows, 1 in a file that has none; None if no file has."""
    with ThreadPoolExecutor(READ_THREADS) as pool:  # an object store takes its time for each file
        if not any(pool.map(lambda file: _read_column(table, file, WEIGHT, 0) is not None, table.file_rows)):
            return None
    mean = mean_weight(_column(table, WEIGHT, num_rows))
    if not 0 < mean < math.inf:
        raise SimsError(f"the weights of {table.folder} have the mean {mean:g}; give weights above 0")
    return mean


def _column(table: SampleTable, name: str, num_rows: int) -> Iterator[NDArray[Any]]:
    """One column of the first rows, file by file; 1 where a file does not have it."""
    for file, rows in table.file_rows.items():
        if num_rows <= 0:
            return
        column = _read_column(table, file, name, min(rows, num_rows))
        yield np.ones(min(rows, num_rows), np.float32) if column is None else column
        num_rows -= rows


def _read_column(table: SampleTable, file: str, name: str, num_rows: int) -> NDArray[Any] | None:
    """The first values of a column of one file; None if it has no such column."""
    try:
        with table.folder.open(file) as source, pq.ParquetFile(source) as parquet:
            if name not in parquet.schema_arrow.names:
                return None
            groups = range(parquet.num_row_groups if num_rows else 0)
            values: NDArray[Any] = parquet.read_row_groups(groups, [name])[name].to_numpy()[:num_rows]
            return values
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise SimsError(f"{table.folder}/{file} cannot be read ({reason}); make the table again") from None
