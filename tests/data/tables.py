"""Small sample tables for tests: random rows, committed as importers and synthesis do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sims_ray.data.commits import new_table
from sims_ray.data.samples import Samples, concatenate, encode_samples
from sims_ray.data.synthetic import SyntheticSet, shard_facts, shard_name
from sims_ray.data.table import SampleTable, table_result
from sims_ray.storage.folders import Folder

SETTINGS = {"sampler": {"num_steps": 4}, "first_seed": 0}
PARENTS = ("0123abcd",)


def random_rows(
    n: int, shape: tuple[int, int, int] = (3, 8, 8), first_id: int = 0, kind: str = "image", **columns: Any
) -> Samples:
    """Rows with the ids from `first_id` on, a function of the ids; labels -1..3 unless given."""
    random = np.random.default_rng(first_id)
    size = (n, *shape)
    images = random.integers(0, 256, size, np.uint8) if kind == "image" else random.normal(size=size).astype(np.float16)
    labels = columns.pop("labels", random.integers(-1, 4, n, dtype=np.int32))
    return Samples(np.arange(first_id, first_id + n), images, labels, **columns)


def commit(out: Path | str, *parts: Samples, stage: str = "import", **result: Any) -> SampleTable:
    """A table with one file for each part, with a fingerprint of its content."""
    whole = concatenate(parts)
    with new_table(out) as made:
        for i, part in enumerate(parts):
            made.add(f"part-{i:05d}.parquet", part, {"stage": stage})
        facts = table_result(whole.images.shape[1:], whole.labels, len(whole), whole.kind)
        made.commit(stage, {"source": "test"}, {**facts, **result})
    return SampleTable(out)


def synthetic_set(out: Path | str, ranges: Sequence[range], shape: tuple[int, int, int] = (1, 8, 8)) -> SampleTable:
    """A committed synthetic set from seed 0 on; every file is a function of its seeds."""
    target = SyntheticSet(Folder.at(out), SETTINGS, PARENTS, shape, facts={"omega": 0.5})
    files = {}
    for seeds in ranges:
        samples = random_rows(len(seeds), shape, seeds.start)
        content = memoryview(encode_samples(samples, {"fingerprint": target.fingerprint}))
        target.folder.put(shard_name(seeds), content)
        files[shard_name(seeds)] = shard_facts(samples, content)
    target.commit(files)
    return SampleTable(out)


def part_of_set(whole: SampleTable, out: Path | str, names: Sequence[str]) -> SampleTable:
    """A table with some of the files of a set, and the set's fingerprint."""
    with new_table(out) as made:
        parts = []
        for name in names:
            made.copy(name, whole.folder, whole.manifest["files"][name])
            parts.append(whole.read(name))
        labels = np.concatenate([part.labels for part in parts])
        result = {**whole.manifest["result"], **table_result(whole.shape, labels, len(labels), whole.kind)}
        manifest = whole.manifest
        made.commit(manifest["stage"], manifest["settings"], result, manifest["parents"], by_content=False)
    return SampleTable(out)


def contents(location: Path | str) -> dict[str, bytes]:
    """All files of a folder with their bytes."""
    folder = Folder.at(location)
    return {name: folder.read(name) for name in folder.files()}
