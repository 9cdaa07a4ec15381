"""Verification of sample tables: every byte against the manifest, and every row against what a table promises."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sims_ray.data.samples import read_metadata, to_samples
from sims_ray.data.synthetic import shard_seeds
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import MANIFEST

THREADS = 8  # hashing and decompression let go of the interpreter
READ_BYTES = 1 << 20  # of pixels at a time and thread; Parquet takes twenty times that to decode them
NAMED = 3  # examples in a message

Progress = Callable[[int], None]
Ids = dict[str, NDArray[np.int64]]  # by source, "" without one
Part = tuple[NDArray[np.int64], NDArray[Any] | None]  # ids and sources


@dataclass(frozen=True)
class Verified:
    """What a verification found.

    Attributes:
        rows, files, bytes: of the manifest.
        faults: one sentence each; empty for a table that is as its manifest says.
        left_over: names of files that the manifest does not list.
    """

    rows: int
    files: int
    bytes: int
    faults: tuple[str, ...]
    left_over: tuple[str, ...]


@dataclass
class _Found:
    """What one file holds."""

    rows: int = 0
    kind: str | None = None
    shape: tuple[int, ...] | None = None
    num_classes: int = 0
    unlabelled: int = 0
    unlike: int = 0  # labels below -1, or latents that are not finite
    ids: Ids = field(default_factory=dict)
    fault: str | None = None


def verify(table: SampleTable, on_progress: Progress | None = None) -> Verified:
    """Read every file of a table again, several at a time, and compare it with the manifest.

    Looked at: size and SHA-256; page checksums, by decoding; ids, unique in the table, and those of a file's name where
    it has seeds in it; rows, kind, shape, classes and unlabelled rows; that latents are finite. In memory are
    some megabytes per thread, and 8 bytes for each row of the table.

    Args:
        table: the table.
        on_progress: told the number of rows looked at, after each file.

    Raises:
        SimsError: the folder cannot be listed.
    """
    sizes, listed = table.folder.files(), table.manifest["files"]
    done, found = 0, {}
    with ThreadPoolExecutor(min(THREADS, 2 * (os.cpu_count() or 1))) as pool:
        checks = pool.map(lambda name: _check(table, name, sizes.get(name)), listed)
        for name, seen in zip(listed, checks, strict=True):
            found[name] = seen
            done += seen.rows
            if on_progress is not None:
                on_progress(done)
    faults = [f"{name} {seen.fault}" for name, seen in found.items() if seen.fault]
    whole = {name: seen for name, seen in found.items() if name in table.file_rows and not seen.fault}
    faults += _twice(whole)
    if len(whole) == len(table.file_rows):
        faults += _unlike_result(table, whole.values())
    total_bytes = sum(facts.get("bytes", 0) for facts in listed.values())
    left_over = tuple(name for name in sizes if name not in listed and name != MANIFEST)
    return Verified(len(table), len(listed), total_bytes, tuple(faults), left_over)


def _check(table: SampleTable, name: str, size: int | None) -> _Found:
    """One file, up to its first fault: what follows from that one would hide it."""
    facts = table.manifest["files"][name]
    if size is None:
        return _Found(fault="is missing")
    if size != facts.get("bytes"):
        return _Found(fault=f"is {size:,} bytes, the manifest says {facts.get('bytes')}")
    try:
        digest = table.folder.sha256(name)
        if digest != facts.get("sha256"):
            return _Found(fault=f"has SHA-256 {digest[:12]}..., the manifest says {str(facts.get('sha256'))[:12]}...")
        if name not in table.file_rows:
            return _Found()
        found = _read(table, name)
    except FileNotFoundError:
        return _Found(fault="was removed while it was read")
    except (SimsError, pa.ArrowException, KeyError, AttributeError, OSError, ValueError) as error:
        return _Found(fault=f"cannot be read ({' '.join(str(error).split())})")
    found.fault = next(_unlike(table, name, found), None)
    return found


def _read(table: SampleTable, name: str) -> _Found:
    """Decode a file, a few rows at a time."""
    found, parts = _Found(), list[Part]()
    with table.folder.open(name) as file:
        # Without pre_buffer, which would hold the whole file.
        parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
        for batch in parquet.iter_batches(max(1, READ_BYTES // table.row_bytes)):
            samples = to_samples(pa.Table.from_batches([batch]))
            found.rows += len(samples)
            found.kind, found.shape = samples.kind, samples.images.shape[1:]
            found.num_classes = max(found.num_classes, int(samples.labels.max(initial=-1)) + 1)
            found.unlabelled += int((samples.labels == -1).sum())
            found.unlike += int((samples.labels < -1).sum())
            if samples.kind == "latent":
                found.unlike += int((~np.isfinite(samples.images).all(axis=(1, 2, 3))).sum())
            parts.append((samples.ids, samples.sources))
    found.ids = _by_source(parts)
    return found


def _by_source(parts: Sequence[Part]) -> Ids:
    ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in parts)])
    if not parts or parts[0][1] is None:
        return {"": ids}
    sources = np.concatenate([np.asarray(names, dtype=str) for _, names in parts])
    return {str(source): ids[sources == source] for source in np.unique(sources)}


def _unlike(table: SampleTable, name: str, found: _Found) -> Iterator[str]:
    """In what a readable file is not as the manifest or its name says."""
    if found.rows != table.file_rows[name]:
        yield f"holds {found.rows:,} rows, the manifest says {table.file_rows[name]:,}"
    if found.rows and found.kind != table.kind:
        yield f"holds {found.kind}s, the manifest says {table.kind}s"
    if found.rows and found.shape != table.shape:
        yield f"holds {found.kind}s of shape {list(found.shape or ())}, the manifest says {list(table.shape)}"
    if found.unlike:
        yield f"has {found.unlike:,} rows with a label below -1 or a latent that is not finite"
    seeds = shard_seeds(name)
    if seeds is not None and not np.array_equal(found.ids.get("", np.empty(0)), np.arange(seeds.start, seeds.stop)):
        yield "holds other ids than its name says"
    made_as = read_metadata(f"{table.folder.location}/{name}").get("fingerprint")
    if made_as not in (None, table.fingerprint):
        yield f"was made for the table {made_as[:12]}..., this is {table.fingerprint[:12]}..."


def _twice(found: dict[str, _Found]) -> list[str]:
    """Ids that are there more than once, per source."""
    faults = []
    for source in sorted(set(chain.from_iterable(seen.ids for seen in found.values()))):
        parts = {name: seen.ids[source] for name, seen in found.items() if source in seen.ids}
        ids = np.sort(np.concatenate(list(parts.values())))
        twice = np.unique(ids[1:][ids[1:] == ids[:-1]])
        if not len(twice):
            continue
        files = [name for name, part in parts.items() if np.isin(twice[0], part)]
        of = f" of source {source}" if source else ""
        faults.append(f"{len(twice):,} ids{of} are there more than once, like {twice[0]} in {', '.join(files[:NAMED])}")
    return faults


def _unlike_result(table: SampleTable, files: Collection[_Found]) -> list[str]:
    """In what the rows together are not as the manifest's result says."""
    totals = {
        "rows": sum(seen.rows for seen in files),
        "num_classes": max(seen.num_classes for seen in files),
        "unlabelled": sum(seen.unlabelled for seen in files),
    }
    said = table.manifest.get("result", {})
    return [
        f"the table has {key} {total:,}, the manifest says {said[key]}"
        for key, total in totals.items()
        if said.get(key, total) != total
    ]
