"""The evaluate stage: Fréchet distance of a model's images to the real ones; only moments travel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sims_ray.config import ComputeSettings
from sims_ray.diffusion.generate import Batch
from sims_ray.errors import SimsError
from sims_ray.metrics.features import FeatureExtractor, images_moments
from sims_ray.metrics.frechet import frechet_distance
from sims_ray.metrics.moments import Moments, merge_all
from sims_ray.stages.features import load_extractor, load_reference
from sims_ray.stages.pool import run_on_pool
from sims_ray.stages.progress import Progress
from sims_ray.stages.sampling import ImageSampler
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

    def parts(self) -> list[Part]:
        """The units of work, in the order in which their moments are merged."""
        starts = range(self.seeds.start, self.seeds.stop, self.part_nimg)
        return [Part(self, range(start, min(start + self.part_nimg, self.seeds.stop))) for start in starts]

    @property
    def metric(self) -> str:
        """Name of the distance: after its features, and the number of images."""
        return metric_name(self.features, len(self.seeds))


@dataclass(frozen=True)
class Part:
    """One unit of work: the moments of some of the images' features."""

    evaluation: Evaluation
    seeds: range

    @property
    def path(self) -> Path:
        """The file to leave."""
        name = f"part-{self.seeds.start:012d}-{self.seeds.stop - 1:012d}.npz"
        return self.evaluation.artifact.path.resolve() / name


class MomentsWorker:
    """Samples images and keeps the moments of their features only."""

    def __init__(self, compute: ComputeSettings) -> None:
        self._sampler = ImageSampler(compute)

    def run(self, part: Part) -> dict[str, Any]:
        """Leave the file of one seed range, unless it is there."""
        if part.path.is_file():
            return {}
        evaluation = part.evaluation
        nfe: list[float] = []
        batches = self._sampler.batches(evaluation.model, part.seeds, evaluation.sampler)
        moments = images_moments(_extractor(str(evaluation.features.resolve())), _images(batches, nfe))
        with atomic_path(part.path) as beside:
            moments.save(beside, nfe=nfe[0])
        return {}


def metric_name(features: Path, nimg: int) -> str:
    """Name of the Fréchet distance in these features over `nimg` images, like `fd_classifier@10k`."""
    count = f"{nimg / 1000:g}k" if nimg >= 1000 else str(nimg)
    return f"fd_{read_manifest(features)['result']['kind']}@{count}"


def evaluate(evaluations: Sequence[Evaluation], compute: ComputeSettings, label: str = "evaluate") -> None:
    """Measure every distance that is not there yet, on one pool of sampling actors."""
    open_ones = [e for e in evaluations if not e.artifact.complete]
    parts = _prepare(open_ones)
    todo = [part for part in parts if not part.path.is_file()]
    total_nimg, todo_nimg = (sum(len(part.seeds) for part in some) for some in (parts, todo))
    progress = Progress(label, total_nimg, total_nimg - todo_nimg)
    for part, _ in run_on_pool(todo, MomentsWorker, compute, "sampling"):
        progress.add(len(part.seeds))
    for evaluation in open_ones:
        _commit(evaluation)


def evaluate_here(evaluation: Evaluation, worker: MomentsWorker) -> None:
    """Measure one distance in this process, sampling only the parts that are missing."""
    for part in _prepare([evaluation]):
        worker.run(part)
    _commit(evaluation)


def _prepare(evaluations: Sequence[Evaluation]) -> list[Part]:
    for evaluation in evaluations:
        evaluation.artifact.path.mkdir(parents=True, exist_ok=True)
    return [part for evaluation in evaluations for part in evaluation.parts()]


def _images(batches: Iterable[Batch], nfe: list[float]) -> Iterator[torch.Tensor]:
    """The images of each batch; notes its network evaluations per image on the way."""
    for batch in batches:
        nfe.append(batch.nfe)
        yield batch.images


@lru_cache(maxsize=2)
def _extractor(folder: str) -> FeatureExtractor:
    return load_extractor(Path(folder))


def _commit(evaluation: Evaluation) -> None:
    parts = [part.path for part in evaluation.parts()]
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
