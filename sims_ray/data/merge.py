"""Merging of sample tables: the parts of one synthetic set become that set, other tables one table with sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sims_ray.data.commits import NewTable, new_table
from sims_ray.data.samples import NO_LABEL, Samples
from sims_ray.data.synthetic import shard_seeds
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError

STAGE = "merge"
PRINT_CHARS = 8  # of a fingerprint, where it tells two tables of one name apart

Progress = Callable[[int], None]


def merge(tables: Sequence[SampleTable], out: Path | str, on_progress: Progress | None = None) -> SampleTable:
    """Make one table of several, on a disk or in an object store; one file is in memory at a time.

    Parts of one synthetic set (equal fingerprints, files named by seeds) become that set with the same fingerprint:
    their files are copied byte for byte. Other tables are put one after the other, with their ids, and a column
    `source` that names each row's table: by its folder, and by its fingerprint too where folders have one name. Rows of
    a table without weights get the weight 1, and without attributes the attribute -1, if others have some.

    Args:
        tables: two or more.
        out: folder to make, or its URI; it appears complete or not at all.
        on_progress: told the number of rows done, after each file.

    Returns:
        The new table.

    Raises:
        SimsError: fewer than two tables, of different kinds, shapes or class names; ids of one origin more than once;
            parts of a set that leave seeds out; a file that is not as its manifest says; `out` holds something.
    """
    if len(tables) < 2:
        raise SimsError(f"merging takes two or more tables, {len(tables)} was given; name the others too")
    _check_alike(tables)
    is_set = len({table.fingerprint for table in tables}) == 1 and all(map(_is_by_seed, tables))
    if not is_set:
        _check_ids(tables)
    with new_table(out) as made:
        (_join_set if is_set else _append)(tables, made, on_progress or (lambda done: None))
    return SampleTable(out)


def _check_alike(tables: Sequence[SampleTable]) -> None:
    first = tables[0]
    for table in tables[1:]:
        if (table.kind, table.shape) != (first.kind, first.shape):
            found = f"{first.folder} holds {first.kind}s {list(first.shape)}, {table.folder} {table.kind}s"
            raise SimsError(f"{found} {list(table.shape)}; merge tables of one kind and shape")
    for key, what in (("classes", "name their classes differently"), ("latents", "hold latents of different kinds")):
        telling = [table for table in tables if table.manifest["result"].get(key)]
        for one, other in pairwise(telling):
            if one.manifest["result"][key] != other.manifest["result"][key]:
                raise SimsError(f"{one.folder} and {other.folder} {what}; make them alike first")


def _is_by_seed(table: SampleTable) -> bool:
    return all(shard_seeds(name) is not None for name in table.file_rows)


def _join_set(tables: Sequence[SampleTable], made: NewTable, on_progress: Progress) -> None:
    """Copy the files of the parts of one set."""
    first, done = tables[0].manifest, 0
    for name, table in _seeds_in_a_row(tables):
        made.copy(name, table.folder, table.manifest["files"][name])
        done += table.file_rows[name]
        on_progress(done)
    result = {**first["result"], **_totals(tables)}
    made.commit(first["stage"], first["settings"], result, first["parents"], by_content=False)


def _totals(tables: Sequence[SampleTable]) -> dict[str, int]:
    return {
        "rows": sum(map(len, tables)),
        "num_classes": max(table.num_classes for table in tables),
        "unlabelled": sum(table.unlabelled for table in tables),
    }


def _seeds_in_a_row(tables: Sequence[SampleTable]) -> list[tuple[str, SampleTable]]:
    """The files of all parts in the order of their seeds, which must follow each other."""
    files = [(shard_seeds(name) or range(0), name, table) for table in tables for name in table.file_rows]
    files.sort(key=lambda file: (file[0].start, file[1]))
    at, before = tables[0].manifest["settings"].get("first_seed", files[0][0].start), "the table"
    for seeds, name, table in files:
        where = f"{table.folder}/{name}"
        if seeds.start < at:
            raise SimsError(f"{before} and {where} hold the same ids; merge tables with different seeds")
        if seeds.start > at:
            raise SimsError(f"no table holds seeds {at} to {seeds.start - 1} of the set; merge the one with them too")
        at, before = seeds.stop, where
    return [(name, table) for _, name, table in files]


def _check_ids(tables: Sequence[SampleTable]) -> None:
    """Refuse ids that come more than once from one origin: a table, or two of one fingerprint."""
    by_print = sorted(tables, key=lambda table: table.fingerprint)
    for _, group in groupby(by_print, key=lambda table: table.fingerprint):
        same = list(group)
        rows = [row for table in same for row in _ids(table)]
        for source in sorted({source for source, _ in rows}):
            unique, counts = np.unique(np.concatenate([ids for of, ids in rows if of == source]), return_counts=True)
            if len(unique) < counts.sum():
                where = " and ".join(str(table.folder) for table in same)
                raise SimsError(
                    f"id {unique[counts > 1][0]} is more than once in {where}; merge tables with different ids"
                )


def _ids(table: SampleTable) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """The ids of each file, by source where there is one."""
    for name in table.file_rows:
        try:
            with table.folder.open(name) as file:
                parquet = pq.ParquetFile(file)
                columns = [column for column in ("id", "source") if column in parquet.schema_arrow.names]
                read = parquet.read(columns)
        except (pa.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise SimsError(f"{table.folder}/{name} cannot be read ({reason}); restore it or make it again") from None
        ids = read["id"].to_numpy()
        if "source" not in columns:
            yield "", ids
            continue
        sources = read["source"].to_numpy().astype(str)
        yield from ((str(source), ids[sources == source]) for source in np.unique(sources))


def _append(tables: Sequence[SampleTable], made: NewTable, on_progress: Progress) -> None:
    """Rewrite the files of one table after the other, with their source."""
    names = _source_names(tables)
    columns = set[str]()
    for table in tables:
        first = table.read(next(iter(table.file_rows)), 0, 0)
        columns |= {column for column in ("weights", "attributes") if getattr(first, column) is not None}
    done = 0
    for table, source in zip(tables, names, strict=True):
        for part in table.files():
            made.add(f"part-{len(made.files):05d}.parquet", _with_source(part, source, columns), {"stage": STAGE})
            done += len(part)
            on_progress(done)
    results = [table.manifest["result"] for table in tables]
    result = {"shape": list(tables[0].shape), "kind": tables[0].kind, **_totals(tables)}
    result["classes"] = next((facts["classes"] for facts in results if facts.get("classes")), None)
    if all(facts.get("latents") for facts in results):  # what one table does not say is not known of the new one
        result["latents"] = results[0]["latents"]
    sources = [
        {"source": source, "rows": len(table), "fingerprint": table.fingerprint}
        for table, source in zip(tables, names, strict=True)
    ]
    made.commit(STAGE, {"sources": sources}, result, [table.fingerprint for table in tables])


def _source_names(tables: Sequence[SampleTable]) -> list[str]:
    """The folders' names, made unique."""
    often = Counter(table.folder.name for table in tables)
    return [
        f"{table.folder.name}-{table.fingerprint[:PRINT_CHARS]}" if often[table.folder.name] > 1 else table.folder.name
        for table in tables
    ]


def _with_source(part: Samples, source: str, columns: set[str]) -> Samples:
    """The rows with all the columns that the new table has."""
    inner = part.sources
    sources = np.full(len(part), source) if inner is None else np.array([f"{source}/{name}" for name in inner], str)
    filled: dict[str, Any] = {"sources": sources}
    if part.weights is None and "weights" in columns:
        filled["weights"] = np.ones(len(part), np.float32)
    if part.attributes is None and "attributes" in columns:
        filled["attributes"] = np.full(len(part), NO_LABEL, np.int32)
    return replace(part, **filled)
