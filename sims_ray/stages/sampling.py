"""Sampling actors: seed ranges in, sample files or feature moments out, one unit of work at a time.

`synthesize` and `evaluate` are the same map over seed ranges with another sink. A range whose file is
there is not sampled again, whoever made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sims_ray.config import ComputeSettings
from sims_ray.data.table import NO_LABEL, Samples, write_samples
from sims_ray.diffusion.generate import Batch, generate
from sims_ray.metrics.features import FeatureExtractor, images_moments
from sims_ray.stages.cluster import as_sentence, start_ray
from sims_ray.stages.features import load_extractor
from sims_ray.stages.progress import Progress
from sims_ray.storage.folders import atomic_path
from sims_ray.storage.models import SimsModel


@dataclass(frozen=True)
class SeedRange:
    """One unit of work.

    Attributes:
        model: what to sample from.
        sampler: sampler settings.
        start, stop: the seeds.
        path: the file to leave.
        sink: "samples" leaves a Parquet file of images, "moments" the moments of their features.
        features: folder of the features artifact; for moments.
        metadata: facts for the Parquet file.
    """

    model: SimsModel
    sampler: Mapping[str, Any]
    start: int
    stop: int
    path: str
    sink: Literal["samples", "moments"]
    features: str | None = None
    metadata: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """As text, the form in which it travels through Ray Data."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> SeedRange:
        """Undo `to_json`."""
        values = json.loads(text)
        return cls(**{**values, "model": SimsModel(**values["model"])})


class SeedRangeWorker:
    """Samples seed ranges on one CPU slot or GPU; models and extractors stay loaded between ranges."""

    def __init__(self, compute: ComputeSettings) -> None:
        # In a process of its own, not in the caller's, where other work goes on.
        self._threads = max(1, int(compute.cpus_per_worker)) if compute.num_workers else None
        self._batch_size = compute.sampling_batch
        self._device = "cuda" if compute.gpus_per_worker else "cpu"
        self._precision, self._compile = compute.precision, compute.compile

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Ray Data's calling convention around `run`."""
        work = SeedRange.from_json(row["work"])
        self.run(work)
        return {"path": work.path, "nimg": work.stop - work.start}

    def run(self, work: SeedRange) -> None:
        """Leave the file of one range, atomically."""
        if self._threads:
            torch.set_num_threads(self._threads)  # holds for the calling thread only, and Tune calls from many
        denoiser, card = work.model.load(self._device, self._precision, self._compile)
        network = card["network"]
        shape = (network["img_channels"], network["img_resolution"], network["img_resolution"])
        batches = generate(
            denoiser,
            shape,
            range(work.start, work.stop),
            work.sampler,
            label_dim=network["label_dim"],
            batch_size=self._batch_size,
            device=self._device,
        )
        if work.sink == "moments":
            nfe: list[float] = []
            moments = images_moments(_extractor(str(work.features)), _images(batches, nfe))
            with atomic_path(Path(work.path)) as beside:
                moments.save(beside, nfe=nfe[0])
            return
        parts = list(batches)
        samples = Samples(
            np.arange(work.start, work.stop, dtype=np.int64),
            torch.cat([part.images for part in parts]).numpy(),
            np.concatenate([_labels(part) for part in parts]),
        )
        write_samples(Path(work.path), samples, {**(work.metadata or {}), "nfe": parts[0].nfe})


def _images(batches: Iterable[Batch], nfe: list[float]) -> Iterator[torch.Tensor]:
    """The images of each batch; notes its network evaluations per image on the way."""
    for batch in batches:
        nfe.append(batch.nfe)
        yield batch.images


def _labels(batch: Batch) -> NDArray[np.int32]:
    if batch.classes is None:
        return np.full(len(batch.seeds), NO_LABEL, dtype=np.int32)
    return batch.classes.numpy().astype(np.int32)


@lru_cache(maxsize=2)
def _extractor(folder: str) -> FeatureExtractor:
    return load_extractor(Path(folder))


def fill(ranges: Sequence[SeedRange], compute: ComputeSettings, label: str) -> None:
    """Sample the ranges whose file is not there yet, showing progress over all of them."""
    todo = [work for work in ranges if not Path(work.path).is_file()]
    total, left = (sum(work.stop - work.start for work in works) for works in (ranges, todo))
    progress = Progress(label, total, total - left)
    for work in _sample(todo, compute):
        progress.add(work.stop - work.start)


def _sample(ranges: Sequence[SeedRange], compute: ComputeSettings) -> Iterator[SeedRange]:
    """Sample on an actor pool, or in this process with `num_workers` 0; yields each range when done."""
    by_path = {work.path: work for work in ranges}
    if not compute.num_workers or not ranges:
        worker = SeedRangeWorker(compute)
        for work in ranges:
            worker.run(work)
            yield work
        return
    start_ray(compute)
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    dataset = ray.data.from_items([{"work": work.to_json()} for work in ranges], override_num_blocks=len(ranges))
    done = dataset.map(
        SeedRangeWorker,
        fn_constructor_args=(compute,),
        compute=ray.data.ActorPoolStrategy(size=min(compute.num_workers, len(ranges))),
        num_cpus=compute.cpus_per_worker,
        num_gpus=compute.gpus_per_worker,
    )
    try:
        for row in done.iter_rows():
            yield by_path[row["path"]]
    except ray.exceptions.RayError as error:
        raise as_sentence(error, "sampling") from error
