"""How fast a training worker reads, and what memory a second one adds, in one run.

    python -m benchmarks.reading --gb 1

Random pixels: they do not compress, so that decoding costs no less than real images do. Memory is the proportional set
size of all processes of the cluster, against what it was before the set was loaded; what the second worker adds is
given in percent of the set.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sims_ray.config import ComputeSettings
from sims_ray.data.samples import NO_LABEL, Samples, write_samples
from sims_ray.data.table import table_result
from sims_ray.diffusion.order import Rows, Share, TrainingData
from sims_ray.stages.cluster import start_ray, stop_ray
from sims_ray.stages.reading import open_source
from sims_ray.stages.training_set import TrainingSet, from_arrow, to_arrow
from sims_ray.storage.artifacts import Artifact
from sims_ray.studies.console import align

SHAPES = ((1, 8, 8), (3, 64, 64))
BATCHES = (256, 1024)
FILE_BYTES = 64 << 20
MEASURED_S = 3.0
SEED = 0


def make_table(folder: Path, shape: tuple[int, int, int], nbytes: int) -> Path:
    """A table of random images."""
    random, per_file = np.random.default_rng(SEED), FILE_BYTES // math.prod(shape)
    files: dict[str, dict[str, Any]] = {}
    first, labels = 0, np.full(per_file, NO_LABEL, np.int32)
    while first * math.prod(shape) < nbytes:
        name = f"part-{len(files):04d}.parquet"
        images = random.integers(0, 256, (per_file, *shape), dtype=np.uint8)
        write_samples(folder / name, Samples(np.arange(first, first + per_file), images, labels), {})
        files[name], first = {"rows": per_file}, first + per_file
    Artifact(folder, "import", {}, ()).commit(files, table_result(shape, labels, first))
    return folder


class Worker:
    """Reads as a training worker does; in a process of its own."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.data: TrainingData
        nothing = Rows(np.empty(0, np.int64), np.empty((0, 1, 8, 8), np.uint8))
        from_arrow(to_arrow(nothing))  # loads what conversions need

    def open(self, source: Any, batch_size: int) -> None:
        """Get at the set; the worker's slice of a batch is of this size."""
        order = source.training_set.order
        self.batch_size, self.num_rows = batch_size * self.world_size, order.num_rows
        self.data = source.open(Share(order, self.batch_size, self.rank, self.world_size))

    def visit(self) -> float:
        """Images per second over as many epochs as show this worker the whole set."""
        return self._rate(range(0, self.world_size * self.num_rows, self.batch_size))

    def rate(self, start_nimg: int) -> float:
        """Images per second, in the middle of an epoch."""
        return self._rate(range(start_nimg, start_nimg + 1000 * self.num_rows, self.batch_size), MEASURED_S)

    def _rate(self, steps: range, at_most_s: float = math.inf) -> float:
        self.data.batch(steps.start)
        started_s, seen = time.perf_counter(), 0
        for nimg in steps[1:]:
            seen += len(self.data.batch(nimg).ids)
            if (elapsed_s := time.perf_counter() - started_s) > at_most_s:
                break
        return seen / elapsed_s


def cluster_bytes() -> int:
    """Proportional set size of this process and of all that it started."""
    parents = {int(path.name): _parent(path) for path in Path("/proc").iterdir() if path.name.isdigit()}
    family, found = set(), {Path("/proc/self").resolve().name}
    members = {int(name) for name in found}
    while members != family:
        family = set(members)
        members |= {pid for pid, parent in parents.items() if parent in members}
    return sum(_pss(pid) for pid in family)


def _parent(path: Path) -> int:
    try:
        return int((path / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # ended
        return 0


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    except OSError:
        return 0


def measure(ray: Any, folder: Path, shape: tuple[int, int, int]) -> Iterator[tuple[str, ...]]:
    """Rows of the table for one set."""
    found, name = TrainingSet.of(folder, None, SEED, 0), "x".join(map(str, shape[1:] + shape[:1]))
    compute = ComputeSettings(num_workers=1)
    positions = range(2 * found.order.num_rows)
    workers = [ray.remote(num_cpus=0)(Worker).remote(rank, 2) for rank in range(2)]
    ray.get([worker.__ray_ready__.remote() for worker in workers])
    before = cluster_bytes()
    with open_source(found, "resident", positions, compute) as source:
        ray.get(workers[0].open.remote(source, BATCHES[-1]))
        ray.get(workers[0].visit.remote())
        one = cluster_bytes() - before
        ray.get(workers[1].open.remote(source, BATCHES[-1]))
        ray.get(workers[1].visit.remote())
        two = cluster_bytes() - before
        for batch in BATCHES:
            ray.get([worker.open.remote(source, batch) for worker in workers])
            alone = ray.get(workers[0].rate.remote(found.order.num_rows // 2))
            both = ray.get([worker.rate.remote(found.order.num_rows // 2) for worker in workers])
            rates = (f"{alone:,.0f}", f"{min(both):,.0f}")
            memory = (f"{one / 1e6:,.0f}", f"{two / 1e6:,.0f}", f"{(two - one) / found.nbytes * 100:.1f} %")
            yield (name, f"{found.nbytes / 1e6:,.0f}", "resident", str(batch), *rates, *memory)
    for worker in workers:
        ray.kill(worker)
    with open_source(found, "streaming", positions, compute) as source:
        worker = ray.remote(num_cpus=0)(Worker).remote(0, 1)
        ray.get(worker.open.remote(source, BATCHES[0]))
        streamed = f"{ray.get(worker.visit.remote()):,.0f}"
        yield (name, f"{found.nbytes / 1e6:,.0f}", "streaming", str(BATCHES[0]), streamed, "", "", "", "")
        ray.kill(worker)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0, help="size of each set")
    options = parser.parse_args()
    ray = start_ray(ComputeSettings(num_workers=2, object_store_mb=round(options.gb * 4000)))
    rows = [("images", "MB", "reading", "batch", "images/s", "of two", "MB, one worker", "MB, two", "added")]
    try:
        for shape in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                make_table(Path(folder), shape, round(options.gb * 1e9))
                rows += measure(ray, Path(folder), shape)
    finally:
        stop_ray()
    print(align(rows))


if __name__ == "__main__":
    main()
