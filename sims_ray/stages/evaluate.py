"""The evaluate stage: Fréchet distance of a model's images to the real ones; only moments travel.

The distance may be taken on the way, at fewer images of the same seeds (fidelities); an evaluation that is left there
goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sims_ray.config import ComputeSettings
from sims_ray.diffusion.generate import Batch
from sims_ray.errors import SimsError
from sims_ray.metrics.features import image_features
from sims_ray.metrics.frechet import Statistics, frechet_distance
from sims_ray.metrics.measures import Measure, measure
from sims_ray.metrics.moments import Moments, merge_all
from sims_ray.stages.extractors import FD, Extractor, metric_name
from sims_ray.stages.features import feature_name, load_extractor, load_real_features, load_reference
from sims_ray.stages.pool import run_on_pool
from sims_ray.stages.progress import Progress
from sims_ray.stages.sampling import ImageSampler
from sims_ray.storage.artifacts import Artifact, write_json
from sims_ray.storage.beside import atomic_path
from sims_ray.storage.models import SimsModel

MOMENTS = "moments.npz"
CURVE = "curve.json"  # the distances so far, in the making
FACTS = ("nfe", "worker_s")  # of a part, beside its moments

Point = dict[str, Any]


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
        fidelities: numbers of images, increasing, at which the distance is taken on the way to all of them.
        measures: what is measured besides, over all images.
    """

    artifact: Artifact
    model: SimsModel
    sampler: dict[str, Any]
    seeds: range
    features: Path
    part_nimg: int
    fidelities: tuple[int, ...] = ()
    measures: tuple[Measure, ...] = ()

    def parts(self, nimg: int | None = None) -> list[Part]:
        """The units of work of the first `nimg` images, in the order in which their moments are merged."""
        total = len(self.seeds)
        edges = sorted({*range(0, total, self.part_nimg), *self.stops})
        return [Part(self, self.seeds[a:b]) for a, b in pairwise(edges) if nimg is None or b <= nimg]

    @property
    def stops(self) -> tuple[int, ...]:
        """The numbers of images at which the distance is taken, all of them last."""
        total = len(self.seeds)
        return (*(n for n in self.fidelities if n < total), total)

    @property
    def metric(self) -> str:
        """Name of the distance: after its features, and the number of images."""
        return self.metric_at(len(self.seeds))

    def metric_at(self, nimg: int) -> str:
        """Name of the distance over the first `nimg` images, like `fd_classifier@10k`."""
        return metric_name(feature_name(self.features), FD, nimg)

    @property
    def curve(self) -> list[Point]:
        """The distances taken so far: `nimg` and `distance`."""
        if self.artifact.complete:
            curve: list[Point] = self.artifact.result["curve"]
        else:
            path = self.artifact.path / CURVE
            curve = json.loads(path.read_text()) if path.is_file() else []
        return [point for point in curve if point["nimg"] in self.stops]


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
        evaluation, started_s = part.evaluation, time.monotonic()
        nfe: list[float] = []
        batches = self._sampler.batches(evaluation.model, part.seeds, evaluation.sampler)
        extractor = _extractor(str(evaluation.features.resolve()), self._sampler.device)
        features = [image_features(extractor.features, images) for images in _images(batches, nfe)]
        facts: dict[str, Any] = {"nfe": nfe[0], "worker_s": time.monotonic() - started_s}
        if evaluation.measures:
            facts["features"] = np.concatenate(features)
        with atomic_path(part.path) as beside:
            merge_all(map(Moments.of, features)).save(beside, **facts)
        return {}


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
        for nimg in evaluation.stops:
            _take(evaluation, nimg)
        _commit(evaluation)


def evaluate_here(
    evaluation: Evaluation, worker: MomentsWorker, on_distance: Callable[[Point], None] = lambda point: None
) -> None:
    """Measure one distance in this process, sampling only the parts that are missing.

    `on_distance` is called with each distance on the way as soon as it is there, and may leave by an exception.
    """
    if not evaluation.artifact.complete:
        _prepare([evaluation])
        for nimg in evaluation.stops:
            for part in evaluation.parts(nimg):
                worker.run(part)
            point = _take(evaluation, nimg)
            if nimg == len(evaluation.seeds):
                _commit(evaluation)
            on_distance(point)
        return
    for point in evaluation.curve:
        on_distance(point)


def spent(evaluation: Evaluation) -> dict[str, float]:
    """What was sampled for an evaluation so far: `nimg`, `nfe` per image and the workers' seconds."""
    if evaluation.artifact.complete:
        return {name: evaluation.artifact.result[name] for name in ("nimg", *FACTS)}
    done = [part for part in evaluation.parts() if part.path.is_file()]
    return {"nimg": sum(len(part.seeds) for part in done), **_facts(done)}


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
def _extractor(folder: str, device: str) -> Extractor:
    return load_extractor(Path(folder), device)


@lru_cache(maxsize=2)
def _reference(folder: str) -> Statistics:
    return load_reference(Path(folder))


def _merged(evaluation: Evaluation, nimg: int) -> Moments:
    moments = merge_all(Moments.load(part.path) for part in evaluation.parts(nimg))
    if moments.n != nimg:
        raise SimsError(
            f"{evaluation.artifact.path} holds moments of {moments.n} images instead of {nimg}; "
            f"delete that folder and run again"
        )
    return moments


def _take(evaluation: Evaluation, nimg: int) -> Point:
    """The distance of the first `nimg` images, noted in the curve."""
    curve = evaluation.curve
    known = next((point for point in curve if point["nimg"] == nimg), None)
    if known is not None:
        return known
    distance = frechet_distance(_merged(evaluation, nimg), _reference(str(evaluation.features.resolve())))
    point = {"nimg": nimg, "distance": distance}
    write_json(evaluation.artifact.path / CURVE, [*curve, point])
    return point


def _commit(evaluation: Evaluation) -> None:
    parts = evaluation.parts()
    with atomic_path(evaluation.artifact.path / MOMENTS) as beside:
        _merged(evaluation, len(evaluation.seeds)).save(beside)
    curve = evaluation.curve
    facts = {"metric": evaluation.metric, **curve[-1], "curve": curve, **_facts(parts)}
    if evaluation.measures:
        facts["measures"] = _measured(evaluation, parts)
    evaluation.artifact.commit({MOMENTS: {}}, facts)
    for path in (*evaluation.artifact.path.glob("part-*.npz"), evaluation.artifact.path / CURVE):
        path.unlink(missing_ok=True)


def _measured(evaluation: Evaluation, parts: Sequence[Part]) -> dict[str, float]:
    found = []
    for part in parts:
        with np.load(part.path, allow_pickle=False) as arrays:
            found.append(arrays["features"])
    real, reference = load_real_features(evaluation.features), _reference(str(evaluation.features.resolve()))
    try:
        return measure(evaluation.measures, np.concatenate(found), real, reference)
    except ValueError as error:
        raise SimsError(f"{evaluation.artifact.path}: {error}; or measure less with evaluate.measures=[]") from None


def _facts(parts: Sequence[Part]) -> dict[str, float]:
    """Network evaluations per image, as the sampler counted them, and the seconds that workers spent."""
    found: list[dict[str, float]] = []
    for part in parts:
        with np.load(part.path, allow_pickle=False) as arrays:
            found.append({name: float(arrays[name]) for name in FACTS})
    return {"nfe": found[0]["nfe"] if found else 0.0, "worker_s": sum(facts["worker_s"] for facts in found)}
