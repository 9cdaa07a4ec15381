"""The sample table: real and synthetic images in one Parquet schema that plain pyarrow can read.

Columns: `id` int64 (synthetic: the seed; real: index in the source), `image` fixed-shape tensor
uint8 [C, H, W], `label` int32 (-1: none), and optionally `weight` float32, the image's weight in training.
A table is a folder of Parquet files plus `manifest.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import atomic_path, read_manifest

SCHEMA_VERSION = 1
METADATA_KEY = b"sims_ray"
ROW_GROUP_BYTES = 8 << 20  # of raw pixels: larger groups cost memory in reading and writing, and save no space
NO_LABEL = -1


@dataclass(frozen=True)
class Samples:
    """Rows of a sample table in memory.

    Attributes:
        ids: int64 [N].
        images: uint8 [N, C, H, W].
        labels: int32 [N], -1 for none.
        weights: float32 [N], weights of the images in training; None for equal ones.
    """

    ids: NDArray[np.int64]
    images: NDArray[np.uint8]
    labels: NDArray[np.int32]
    weights: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.ids)


def write_samples(path: Path, samples: Samples, metadata: Mapping[str, Any]) -> None:
    """Write one Parquet file atomically; `metadata` lands in the file under the key `sims_ray` as JSON."""
    shape = samples.images.shape[1:]
    tensor_type = pa.fixed_shape_tensor(pa.uint8(), shape)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(samples.images.reshape(-1)), int(np.prod(shape)))
    columns = {
        "id": pa.array(samples.ids, pa.int64()),
        "image": pa.ExtensionArray.from_storage(tensor_type, flat),
        "label": pa.array(samples.labels, pa.int32()),
    }
    if samples.weights is not None:
        columns["weight"] = pa.array(samples.weights, pa.float32())
    table = pa.table(columns)
    facts = json.dumps({"schema_version": SCHEMA_VERSION, **metadata}, sort_keys=True)
    table = table.replace_schema_metadata({METADATA_KEY: facts.encode()})
    rows = max(1, ROW_GROUP_BYTES // int(np.prod(shape)))
    with atomic_path(path) as beside:
        pq.write_table(table, beside, row_group_size=rows, compression="zstd", store_schema=True)


def read_samples(path: Path) -> Samples:
    """Read one Parquet file of a sample table.

    Raises:
        SimsError: not Parquet, or not this schema.
    """
    try:
        table = pq.read_table(path)
        image_type = table.schema.field("image").type
        shape = tuple(image_type.shape)
        images = table["image"].combine_chunks().storage.flatten().to_numpy().reshape(-1, *shape)
        weights = table["weight"].to_numpy() if "weight" in table.column_names else None
        return Samples(table["id"].to_numpy(), images, table["label"].to_numpy(), weights)
    except (pa.ArrowException, KeyError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SimsError(
            f"{path} is not a file of a sample table ({reason}); import it with `sims data import`"
        ) from None


class SampleTable:
    """A committed folder of sample files.

    Args:
        folder: folder with `manifest.json`.

    Raises:
        SimsError: no manifest there, or its manifest lists no sample files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        files = self.manifest.get("files", {})
        self._rows = {name: f["rows"] for name, f in sorted(files.items()) if "rows" in f}
        if not self._rows:
            raise SimsError(f"{folder} lists no sample files; make a table with `sims data import`")

    def __len__(self) -> int:
        return sum(self._rows.values())

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
    def num_classes(self) -> int:
        """Number of classes K: largest label + 1, or 0 without labels."""
        return int(self.manifest["result"]["num_classes"])

    @property
    def unlabelled(self) -> int:
        """Rows without a label."""
        return int(self.manifest["result"]["unlabelled"])

    def files(self) -> Iterator[Samples]:
        """The files in order, one in memory at a time."""
        for name in self._rows:
            yield read_samples(self.folder / name)

    def head(self, n: int) -> Samples:
        """The first `n` rows.

        Raises:
            SimsError: the table has fewer rows.
        """
        if n > len(self):
            raise SimsError(f"{self.folder} has {len(self)} rows, {n} were asked for; synthesize or import more")
        parts, rows = [], 0
        for samples in self.files():
            parts.append(samples)
            rows += len(samples)
            if rows >= n:
                break
        return Samples(
            np.concatenate([p.ids for p in parts])[:n],
            np.concatenate([p.images for p in parts])[:n],
            np.concatenate([p.labels for p in parts])[:n],
            _weights(parts, n),
        )


def _weights(parts: Sequence[Samples], n: int) -> NDArray[np.float32] | None:
    """The weights of the first `n` rows; files without any count as 1."""
    if all(part.weights is None for part in parts):
        return None
    filled = [np.ones(len(p), np.float32) if p.weights is None else p.weights for p in parts]
    return np.concatenate(filled)[:n]


def table_result(shape: tuple[int, ...], labels: NDArray[np.int32], rows: int) -> dict[str, Any]:
    """The facts a table's manifest carries: rows, shape, number of classes, rows without a label."""
    num_classes = int(labels.max()) + 1 if len(labels) else 0
    unlabelled = int((labels == NO_LABEL).sum())
    return {"rows": rows, "shape": list(shape), "num_classes": max(num_classes, 0), "unlabelled": unlabelled}
