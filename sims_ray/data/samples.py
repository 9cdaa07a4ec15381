"""Rows of a sample table: in memory, and in one Parquet file that plain pyarrow can read.

Columns: `id` int64 (synthetic: the seed; real: index in the source), `image` fixed-shape tensor uint8 [C, H, W]
or `latent` float16 [C, H, W], `label` int32 (-1: none), and optionally `weight` float32, the image's weight in
training, `attribute` int32, what a classifier sees in it, and `source` string, the table it came from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sims_ray.errors import SimsError
from sims_ray.storage.folders import Folder

SCHEMA_VERSION = 1
METADATA_KEY = b"sims_ray"
ROW_GROUP_BYTES = 4 << 20  # of raw pixels: larger groups cost memory in reading and writing, and save no space
NO_LABEL = -1
IMAGE_CHANNELS = (1, 3)  # grey and RGB; what has other channels is no image
KINDS: dict[str, np.dtype[Any]] = {"image": np.dtype(np.uint8), "latent": np.dtype(np.float16)}
OPTIONAL = {"weights": ("weight", pa.float32()), "attributes": ("attribute", pa.int32()), "sources": ("source", None)}


@dataclass(frozen=True)
class Samples:
    """Rows of a sample table in memory.

    Attributes:
        ids: int64 [N].
        images: uint8 [N, C, H, W], or float16 for latents.
        labels: int32 [N], -1 for none.
        weights: float32 [N], weights of the images in training; None for equal ones.
        attributes: int32 [N], what a classifier sees in the images; None where none looked.
        sources: [N] strings, the tables that merged rows came from; None for one source.
    """

    ids: NDArray[np.int64]
    images: NDArray[Any]
    labels: NDArray[np.int32]
    weights: NDArray[np.float32] | None = None
    attributes: NDArray[np.int32] | None = None
    sources: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | NDArray[Any]) -> Samples:
        """Some of the rows."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: column[rows] for name, column in columns.items() if column is not None})

    @property
    def kind(self) -> str:
        """'image' or 'latent'.

        Raises:
            SimsError: images of another type.
        """
        for kind, dtype in KINDS.items():
            if self.images.dtype == dtype:
                return kind
        raise SimsError(f"images are {self.images.dtype}; a table holds uint8 images or float16 latents")


def encode_samples(samples: Samples, metadata: Mapping[str, Any]) -> pa.Buffer:
    """One Parquet file as bytes; `metadata` lands in it under the key `sims_ray` as JSON."""
    shape = samples.images.shape[1:]
    value_type = pa.from_numpy_dtype(samples.images.dtype)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(samples.images.reshape(-1), value_type), math.prod(shape))
    columns = {
        "id": pa.array(samples.ids, pa.int64()),
        samples.kind: pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(value_type, shape), flat),
        "label": pa.array(samples.labels, pa.int32()),
    }
    for field, (column, column_type) in OPTIONAL.items():
        if (values := getattr(samples, field)) is not None:
            columns[column] = pa.array(values, column_type or pa.string())
    facts = json.dumps({"schema_version": SCHEMA_VERSION, **metadata}, sort_keys=True)
    table = pa.table(columns).replace_schema_metadata({METADATA_KEY: facts.encode()})
    sink = pa.BufferOutputStream()
    rows = row_group_rows(shape, samples.images.dtype)
    # Page checksums tell a torn or flipped page even before a manifest holds the file's digest.
    pq.write_table(table, sink, row_group_size=rows, compression="zstd", store_schema=True, write_page_checksum=True)
    return sink.getvalue()


def row_group_rows(shape: Sequence[int], dtype: np.dtype[Any]) -> int:
    """Rows per row group, for images of one shape [C, H, W]."""
    return max(1, ROW_GROUP_BYTES // (math.prod(shape) * dtype.itemsize))


def write_samples(path: Path, samples: Samples, metadata: Mapping[str, Any]) -> None:
    """Write one Parquet file atomically; `metadata` lands in the file under the key `sims_ray` as JSON."""
    Folder.at(path.parent).put(path.name, encode_samples(samples, metadata))


def read_samples(
    source: Path | str | BinaryIO,
    start: int = 0,
    stop: int | None = None,
    columns: Sequence[str] | None = None,
    where: str = "",
) -> Samples:
    """Read rows of one Parquet file of a sample table; only their row groups are fetched.

    Args:
        source: file, its URI, or an open file.
        start, stop: rows.
        columns: optional columns to read beside `id`, the images and `label`; none for all there are.
        where: name of an open file, for messages.

    Raises:
        SimsError: not Parquet, or not this schema.
    """
    with _parquet(source, where) as file:
        table, first = _row_groups(file, start, stop, columns)
        return to_samples(table)[slice(start - first, None if stop is None else stop - first)]


def read_metadata(source: Path | str | BinaryIO, where: str = "") -> dict[str, Any]:
    """The facts that were written into a Parquet file of a sample table.

    Raises:
        SimsError: not Parquet, or not of a sample table.
    """
    with _parquet(source, where) as file:
        facts: dict[str, Any] = json.loads((file.schema_arrow.metadata or {})[METADATA_KEY])
        return facts


@contextmanager
def _parquet(source: Path | str | BinaryIO, where: str) -> Iterator[pq.ParquetFile]:
    """An open Parquet file; what fails in it becomes a sentence."""
    with ExitStack() as stack:
        try:
            if isinstance(source, (str, Path)):
                folder, _, name = str(source).rpartition("/")
                where = str(source)
                source = stack.enter_context(Folder.at(folder or ".").open(name))
            yield stack.enter_context(pq.ParquetFile(source, page_checksum_verification=True))
        except (pa.ArrowException, KeyError, AttributeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise SimsError(
                f"{where} is not a file of a sample table ({reason}); import it with `sims data import`"
            ) from None


def to_samples(table: pa.Table) -> Samples:
    """The rows of an Arrow table with the columns of a sample table, without a copy where it is in one piece.

    Raises:
        KeyError, AttributeError: it has other columns.
    """
    names = table.column_names
    kind = next((kind for kind in KINDS if kind in names), "image")
    shape = tuple(table.schema.field(kind).type.shape)
    column = table[kind]
    whole = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # which copies in any case
    images = whole.storage.flatten().to_numpy(zero_copy_only=False).reshape(-1, *shape)
    optional = {field: table[column].to_numpy() for field, (column, _) in OPTIONAL.items() if column in names}
    return Samples(table["id"].to_numpy(), images, table["label"].to_numpy(), **optional)


def _row_groups(
    file: pq.ParquetFile, start: int, stop: int | None, columns: Sequence[str] | None
) -> tuple[pa.Table, int]:
    """The row groups that rows [start, stop) lie in, and the row they begin with."""
    meta = file.metadata
    bounds = list(accumulate((meta.row_group(i).num_rows for i in range(meta.num_row_groups)), initial=0))
    stop = bounds[-1] if stop is None else stop
    groups = [i for i in range(meta.num_row_groups) if bounds[i] < stop and bounds[i + 1] > start]
    names = file.schema_arrow.names
    if columns is not None:
        names = [name for name in names if name in ("id", "label", *KINDS, *columns)]
    table = file.read_row_groups(groups, names)
    return table, bounds[groups[0]] if groups else start


def concatenate(parts: Sequence[Samples]) -> Samples:
    """Rows of several parts in one; where only some have weights, the others' count as 1."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {}
    for field in fields(Samples):
        values = [getattr(part, field.name) for part in parts]
        if field.name == "weights" and any(value is not None for value in values):
            values = [np.ones(len(p), np.float32) if v is None else v for p, v in zip(parts, values, strict=True)]
        columns[field.name] = None if any(value is None for value in values) else np.concatenate(values)
    return Samples(**columns)
