"""The evaluate stage: Fréchet distance of a model's images to the real ones; only moments travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sims_ray.config import ComputeSettings
from sims_ray.errors import SimsError
from sims_ray.metrics.frechet import frechet_distance
from sims_ray.metrics.moments import Moments, merge_all
from sims_ray.stages.features import load_reference
from sims_ray.stages.sampling import SeedRange, SeedRangeWorker, fill
from sims_ray.storage.artifacts import Artifact, read_manifest
from sims_ray.storage.folders import atomic_path
from sims_ray.storage.models import SimsModel

MOMENTS = "moments.npz"


@dataclass(frozen=True)
class Evaluation:
    """One distance to measure.

    Attributes:
        artifact: where it lands.
        model: what to sample from.
        sampler: sampler settings.
        seeds: one image each.
        features: folder of the features artifact.
        part_nimg: images per unit of work.
    """

    artifact: Artifact
    model: SimsModel
    sampler: dict[str, Any]
    seeds: range
    features: Path
    part_nimg: int

    def ranges(self) -> list[SeedRange]:
        """The units of work, in the order in which their moments are merged."""
        folder = self.artifact.path.resolve()
        return [
            SeedRange(
                self.model,
                self.sampler,
                start,
                stop := min(start + self.part_nimg, self.seeds.stop),
                str(folder / f"part-{start:012d}-{stop - 1:012d}.npz"),
                "moments",
                features=str(self.features.resolve()),
            )
            for start in range(self.seeds.start, self.seeds.stop, self.part_nimg)
        ]

    @property
    def metric(self) -> str:
        """Name of the distance: after its features, and the number of images."""
        return metric_name(self.features, len(self.seeds))


def metric_name(features: Path, nimg: int) -> str:
    """Name of the Fréchet distance in these features over `nimg` images, like `fd_classifier@10k`."""
    count = f"{nimg / 1000:g}k" if nimg >= 1000 else str(nimg)
    return f"fd_{read_manifest(features)['result']['kind']}@{count}"


def evaluate(evaluations: Sequence[Evaluation], compute: ComputeSettings, label: str = "evaluate") -> None:
    """Measure every distance that is not there yet, on one pool of sampling actors."""
    open_ones = [e for e in evaluations if not e.artifact.complete]
    fill(_prepare(open_ones), compute, label)
    for evaluation in open_ones:
        _commit(evaluation)


def evaluate_here(evaluation: Evaluation, worker: SeedRangeWorker) -> None:
    """Measure one distance in this process, sampling only the parts that are missing."""
    for work in _prepare([evaluation]):
        if not Path(work.path).is_file():
            worker.run(work)
    _commit(evaluation)


def _prepare(evaluations: Sequence[Evaluation]) -> list[SeedRange]:
    for evaluation in evaluations:
        evaluation.artifact.path.mkdir(parents=True, exist_ok=True)
    return [work for evaluation in evaluations for work in evaluation.ranges()]


def _commit(evaluation: Evaluation) -> None:
    parts = [Path(work.path) for work in evaluation.ranges()]
    moments = merge_all(Moments.load(path) for path in parts)
    if moments.n != len(evaluation.seeds):
        raise SimsError(
            f"{evaluation.artifact.path} holds moments of {moments.n} images instead of {len(evaluation.seeds)}; "
            f"delete that folder and run again"
        )
    with atomic_path(evaluation.artifact.path / MOMENTS) as beside:
        moments.save(beside)
    distance = frechet_distance(moments, load_reference(evaluation.features))
    facts = {"metric": evaluation.metric, "distance": distance, "nimg": moments.n, "nfe": _nfe(parts[0])}
    evaluation.artifact.commit({MOMENTS: {}}, facts)
    for path in evaluation.artifact.path.glob("part-*.npz"):
        path.unlink(missing_ok=True)


def _nfe(part: Path) -> float:
    """Network evaluations per image, as the sampler counted them."""
    with np.load(part, allow_pickle=False) as arrays:
        return float(arrays["nfe"])
