"""Parquet with encoded images, as datasets on the Hugging Face hub have it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sims_ray.data.entries import Entry, Source, check_label, one_line, shown
from sims_ray.data.samples import METADATA_KEY, NO_LABEL
from sims_ray.errors import SimsError

BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20  # read at a time; without it a whole row group's column is


def parquet_source(path: Path, files: Sequence[Path]) -> Source:
    """The rows of Parquet files with a column `image`: bytes, or a struct with `bytes`.

    Integer columns `label` and `index` (the id) are optional; other columns are passed over.
    """
    return Source(path, lambda: _entries(files), None)


def _entries(files: Sequence[Path]) -> Iterator[Entry]:
    running = 0
    for path in files:
        try:
            with pq.ParquetFile(path, buffer_size=BUFFER_BYTES) as file:
                columns, row = _columns(path, file.schema_arrow), 0
                for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                    for values in batch.to_pylist():
                        yield _entry(f"{path} row {row}", running, values)
                        running, row = running + 1, row + 1
        except (pa.ArrowException, OSError, ValueError, LookupError) as error:
            raise SimsError(f"{path} is not readable Parquet ({one_line(error)}); make or fetch it again") from None


def _columns(path: Path, schema: pa.Schema) -> list[str]:
    if METADATA_KEY in (schema.metadata or {}):
        raise SimsError(f"{path} is already part of a sample table; use its folder as it is")
    if "image" not in schema.names:
        names = shown(", ".join(schema.names))
        raise SimsError(f"{path} has no column `image`, only {names}; rename the one with the images")
    kind = schema.field("image").type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise SimsError(f"{path}: column `image` is {shown(str(kind))}; store encoded images (PNG, JPEG) as binary")
    for name in ("label", "index"):
        if name in schema.names and not pa.types.is_integer(schema.field(name).type):
            raise SimsError(f"{path}: column `{name}` is {schema.field(name).type}; make it an integer or drop it")
    return [name for name in ("image", "label", "index") if name in schema.names]


def _entry(name: str, running: int, values: dict[str, Any]) -> Entry:
    image = values["image"]
    data = image["bytes"] if isinstance(image, dict) else image
    if data is None:
        raise SimsError(f"{name} has no image bytes; embed them or remove the row")
    row_id = values.get("index", running)
    if row_id is None or not 0 <= row_id < 2**63:
        raise SimsError(f"{name} has index {row_id}; number the rows from 0 or drop the column")
    label = values.get("label")
    return Entry(row_id, NO_LABEL if label is None else check_label(label, name), name, data)
