"""What Ray adds to the making of a synthetic set, against a bare loop that samples and writes the same, in one run.

    python -m benchmarks.synthesize digits --base runs/digits/artifacts/train-*/ema-100kimg.safetensors
    python -m benchmarks.synthesize million

`digits`: 50,000 images of the demo's base at 18 Heun steps, one actor against one process. `million`: a million 8x8
rows from a stand-in that is no network, so that nothing but the machinery is measured. The two take turns; start-up,
which ends with the first file, is apart. The digests of both sets must be equal.
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sims_ray.config import ComputeSettings, SamplerSettings
from sims_ray.data.synthetic import SyntheticSet
from sims_ray.data.table import SampleTable
from sims_ray.stages.cluster import start_ray, stop_ray
from sims_ray.stages.pool import run_on_pool
from sims_ray.stages.synthesize import Shard, ShardWorker, SynthesisJob
from sims_ray.storage.folders import Folder
from sims_ray.storage.models import SimsModel
from sims_ray.studies.console import align
from sims_ray.studies.synthetic import synthesis_job

POLL_S = 0.5
BARE, RAY = ComputeSettings(num_workers=0), ComputeSettings(num_workers=1)
SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class StandIn(SimsModel):
    """A model without a network: the image shrinks towards 0."""

    def load(self, *_: Any) -> tuple[Any, dict[str, Any]]:
        """A denoiser that costs next to nothing, and a card."""
        network = {"img_channels": 1, "img_resolution": 8, "label_dim": 0}
        return _shrink, {"network": network}


def _shrink(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
    return x * (0.25 / (0.25 + sigma**2)).reshape(-1, 1, 1, 1).to(x.dtype)


def digits_job(base: Path, out: Path, n: int) -> SynthesisJob:
    """The demo's base at its 18 steps."""
    return synthesis_job(str(out), SimsModel.of(base), SamplerSettings(), range(n), shard_nimg=2500)


def million_job(out: Path, n: int) -> SynthesisJob:
    """The stand-in, in one step."""
    settings = {"sampler": SamplerSettings(num_steps=1).model_dump(mode="json"), "first_seed": 0, "stand-in": True}
    target = SyntheticSet(Folder.at(out), settings, (), SHAPE)
    return SynthesisJob(target, StandIn("stand-in"), n, 20_000)


@dataclass
class Watch:
    """The most that Ray's object store held, and this process, in MB."""

    store_mb: float = 0.0
    spilled_mb: float = 0.0
    rss_mb: float = 0.0

    def look(self) -> None:
        """Note the present figures."""
        self.rss_mb = max(self.rss_mb, rss_mb())
        import ray
        from ray._private.internal_api import memory_summary

        text = memory_summary(ray.get_runtime_context().gcs_address, stats_only=True)
        if found := re.search(r"Plasma memory usage (\d+) MiB", text):
            self.store_mb = max(self.store_mb, float(found[1]))
        if found := re.search(r"Spilled (\d+) MiB", text):
            self.spilled_mb = max(self.spilled_mb, float(found[1]))


def rss_mb() -> float:
    """Resident memory of this process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1000 if found else 0.0


@contextmanager
def watching(watch: Watch, on: bool) -> Iterator[None]:
    """Look again and again while the block runs."""
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(POLL_S):
            watch.look()

    thread = threading.Thread(target=follow)
    if on:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if on:
            thread.join()


def make(job: SynthesisJob, compute: ComputeSettings, watch: Watch) -> tuple[float, float]:
    """Make a set; returns the seconds to the first file, and the images per second from then on."""
    nimg = int(job.shard_nimg or job.n)
    shards = [Shard(job, seeds) for seeds in job.set.missing([], job.n, nimg)]
    files, started_s = {}, time.monotonic()
    first_s = started_s
    with watching(watch, on=compute.num_workers > 0):
        for shard, facts in run_on_pool(shards, ShardWorker, compute, "sampling"):
            facts.pop("images_per_s", None)
            if not files:
                first_s = time.monotonic()
            files[shard.name] = facts
    ended_s = time.monotonic()
    job.set.commit(files)
    return first_s - started_s, (job.n - nimg) / (ended_s - first_s)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["digits", "million"])
    parser.add_argument("--base", type=Path, help="for digits: the demo's base")
    parser.add_argument("--n", type=int)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    n = options.n or {"digits": 50_000, "million": 1_000_000}[options.which]
    torch.set_num_threads(1)
    start_ray(RAY)
    watch, before_mb = Watch(), rss_mb()
    rates: dict[str, list[tuple[float, float]]] = {"bare loop": [], "Ray, 1 actor": []}
    folder = Path(tempfile.mkdtemp())
    try:
        for turn in range(options.turns):
            digests = []
            for name, compute in zip(rates, (BARE, RAY), strict=True):
                out = folder / f"{name}-{turn}"
                job = digits_job(options.base, out, n) if options.which == "digits" else million_job(out, n)
                rates[name].append(make(job, compute, watch))
                files = SampleTable(out).manifest["files"]
                digests.append({file: facts["sha256"] for file, facts in files.items()})
                shutil.rmtree(out)
            if digests[0] != digests[1]:
                raise SystemExit("the two sets differ")
    finally:
        stop_ray()
        shutil.rmtree(folder, ignore_errors=True)
    best = {name: max(rate for _, rate in turns) for name, turns in rates.items()}
    rows = [("loop", "images/s, each turn", "best", "ratio", "first file after (s)")]
    for name, turns in rates.items():
        each, firsts = (", ".join(f"{turn[i]:,.1f}" for turn in turns) for i in (1, 0))
        rows.append((name, each, f"{best[name]:,.0f}", f"{best[name] / best['bare loop']:.3f}", firsts))
    print(f"{options.which}, n = {n:,}\n{align(rows)}")
    print(f"object store at most {watch.store_mb:.0f} MiB, spilled {watch.spilled_mb:.0f} MiB, ", end="")
    print(f"driver grew by {watch.rss_mb - before_mb:.0f} MB; the digests of both sets are equal")


if __name__ == "__main__":
    main()
