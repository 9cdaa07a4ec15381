"""The synthesize stage: one Parquet file per seed range, then the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sims_ray.config import ComputeSettings
from sims_ray.data.table import table_result
from sims_ray.stages.sampling import SeedRange, fill
from sims_ray.storage.artifacts import Artifact
from sims_ray.storage.checkpoints import read_card
from sims_ray.storage.models import SimsModel


@dataclass(frozen=True)
class SynthesisJob:
    """One synthetic table to make.

    Attributes:
        artifact: where it lands.
        model: what to sample from.
        sampler: sampler settings.
        seeds: one image each.
        shard_nimg: images per file.
    """

    artifact: Artifact
    model: SimsModel
    sampler: dict[str, Any]
    seeds: range
    shard_nimg: int

    def ranges(self) -> list[SeedRange]:
        """The units of work, one file each."""
        metadata = {
            "fingerprint": self.artifact.fingerprint,
            "model": {"parents": list(self.artifact.parents), "omega": self.model.omega},
            "sampler": self.sampler,
        }
        return [
            SeedRange(
                self.model,
                self.sampler,
                start,
                stop := min(start + self.shard_nimg, self.seeds.stop),
                str(self.artifact.path.resolve() / f"seeds-{start:012d}-{stop - 1:012d}.parquet"),
                "samples",
                metadata=metadata,
            )
            for start in range(self.seeds.start, self.seeds.stop, self.shard_nimg)
        ]


def synthesize(jobs: Sequence[SynthesisJob], compute: ComputeSettings, label: str = "synthesize") -> None:
    """Make every table that is not complete yet, sampling only the seed ranges that are missing."""
    jobs = [job for job in jobs if not job.artifact.complete]
    for job in jobs:
        job.artifact.path.mkdir(parents=True, exist_ok=True)
    ranges = [work for job in jobs for work in job.ranges()]
    fill(ranges, compute, label)
    for job in jobs:
        _commit(job)


def _commit(job: SynthesisJob) -> None:
    files, labels = {}, []
    for work in job.ranges():
        labels.append(pq.read_table(work.path, columns=["label"])["label"].to_numpy())
        files[Path(work.path).name] = {"rows": len(labels[-1])}
    network = read_card(Path(job.model.base))["network"]
    shape = (network["img_channels"], network["img_resolution"], network["img_resolution"])
    job.artifact.commit(files, table_result(shape, np.concatenate(labels), len(job.seeds)))
