"""The synthesize stage: one Parquet file per seed range, exactly once, then the manifest."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sims_ray.config import ComputeSettings
from sims_ray.data.samples import KINDS, NO_LABEL, Samples, encode_samples
from sims_ray.data.synthetic import OtherSetError, SyntheticSet, TornFileError, shard_facts, shard_name
from sims_ray.diffusion.microbatch import CPU_BATCH
from sims_ray.errors import SimsError
from sims_ray.stages.pool import run_on_pool
from sims_ray.stages.progress import Progress
from sims_ray.stages.sampling import ImageSampler
from sims_ray.storage.artifacts import sha256_file, to_json
from sims_ray.storage.attributes import AttributeClassifier, AttributeSource
from sims_ray.storage.models import SimsModel

logger = logging.getLogger("sims_ray")

SHARD_S = 150.0  # what one unit of work takes by default
SHARD_BYTES = 256 << 20  # of raw pixels: a unit of work is in memory as a whole
SHARDS_PER_WORKER = 4  # at least, so that workers end at about the same time
PLAN = ".plan.json"  # hidden, so that readers of the folder see tables alone
ROUNDS = 3
RATE = "images_per_s"


@dataclass(frozen=True)
class SynthesisJob:
    """One synthetic set to make.

    Attributes:
        set: what it is and where it lands.
        model: what to sample from.
        n: number of images.
        shard_nimg: images per file; None for what a worker makes in 150 s.
        attributes: classifier of the column `attribute`; None for no such column.
    """

    set: SyntheticSet
    model: SimsModel
    n: int
    shard_nimg: int | None = None
    attributes: AttributeSource | None = None

    @property
    def seeds(self) -> range:
        """The seeds, one image each."""
        return range(self.set.first_seed, self.set.first_seed + self.n)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the set, which does not depend on the number of images."""
        return self.set.fingerprint

    @property
    def complete(self) -> bool:
        """Whether the set is committed with at least `n` images."""
        return self.set.complete(self.n)


@dataclass(frozen=True)
class Shard:
    """One unit of work: one file of a set."""

    job: SynthesisJob
    seeds: range

    @property
    def name(self) -> str:
        """Name of the file."""
        return shard_name(self.seeds)


class ShardWorker:
    """Makes one file of a set at a time."""

    def __init__(self, compute: ComputeSettings) -> None:
        self._sampler = ImageSampler(compute)
        self._device = "cuda" if compute.gpus_per_worker else "cpu"

    def run(self, shard: Shard) -> dict[str, Any]:
        """Leave the file of one seed range, unless another worker did meanwhile; returns its facts and the speed."""
        target, name = shard.job.set, shard.name
        try:
            return target.check(name)
        except (FileNotFoundError, TornFileError) as error:  # absent, or torn and to be replaced
            logger.debug("%s: %s", name, error)
        samples, nfe, rate = self._sample(shard)
        data = memoryview(encode_samples(samples, {**_metadata(target), "nfe": nfe}))
        target.folder.put(name, data)
        return {**shard_facts(samples, data), RATE: rate}

    def _sample(self, shard: Shard) -> tuple[Samples, float, float]:
        """The rows, the network evaluations per image, and the images per second."""
        job, settings = shard.job, shard.job.set.settings
        self._sampler.prepare(job.model, len(shard.seeds))
        started_s = time.monotonic()
        samples, nfe, done = _empty(job, len(shard.seeds)), 0.0, 0
        samples.ids[:] = shard.seeds
        for batch in self._sampler.batches(
            job.model,
            shard.seeds,
            settings["sampler"],
            settings.get("labels"),
            job.set.first_seed,
            job.set.kind == "latent",
        ):
            rows = slice(done, done + len(batch.seeds))
            samples.images[rows] = batch.images.numpy()
            if batch.classes is not None:
                samples.labels[rows] = batch.classes.numpy()
            if job.attributes is not None and samples.attributes is not None:
                samples.attributes[rows] = _classifier(job.attributes.to_json(), self._device)(batch.images).numpy()
            nfe, done = batch.nfe, rows.stop
        return samples, nfe, done / max(time.monotonic() - started_s, 1e-9)


def _empty(job: SynthesisJob, nimg: int) -> Samples:
    """Rows to fill: a file is in memory once."""
    return Samples(
        np.empty(nimg, np.int64),
        np.empty((nimg, *job.set.shape), KINDS[job.set.kind]),
        np.full(nimg, NO_LABEL, np.int32),
        attributes=None if job.attributes is None else np.empty(nimg, np.int32),
    )


def synthesize(jobs: Sequence[SynthesisJob], compute: ComputeSettings, label: str = "synthesize") -> None:
    """Make every set that is not complete yet, sampling only the seeds that no whole file holds.

    Several drivers may work on one set: a file is made by whoever comes first, and all of them end with the set.

    Raises:
        SimsError: a folder cannot be written, or holds another set.
    """
    for _ in range(ROUNDS):  # more than one where another driver cut a set into other files, or lost some
        todo = [job for job in jobs if not job.complete]
        if not todo:
            return
        _make(todo, compute, label, sum(job.n for job in jobs))
    if late := [job for job in jobs if not job.complete]:
        raise SimsError(f"{late[0].set.folder} is changed by others again and again; end them and run again")


def _make(jobs: Sequence[SynthesisJob], compute: ComputeSettings, label: str, total_nimg: int) -> None:
    """Sample what is missing, and commit."""
    kept = [_begin(job) for job in jobs]
    pairs = list(zip(jobs, kept, strict=True))
    missing_nimg = sum(len(gap) for job, files in pairs for gap in job.set.missing(files, job.n, job.n))
    progress = Progress(label, total_nimg, total_nimg - missing_nimg)
    sizes = [_shard_nimg(job, files, compute, progress) for job, files in pairs]
    shards = [
        Shard(job, seeds)
        for (job, files), nimg in zip(pairs, sizes, strict=True)
        for seeds in job.set.missing(files, job.n, nimg)
    ]
    start = random.randrange(len(shards)) if shards else 0  # so that two drivers do not make the same file at once
    by_job = {id(job): files for job, files in pairs}
    for shard, facts in run_on_pool([*shards[start:], *shards[:start]], ShardWorker, compute, "sampling"):
        facts.pop(RATE, None)
        by_job[id(shard.job)][shard.name] = facts
        progress.add(len(shard.seeds))
    for job, files in pairs:
        job.set.commit(files)


def _begin(job: SynthesisJob) -> dict[str, dict[str, Any]]:
    """Look at what is there; returns the facts of the files to keep."""
    folder = job.set.folder
    folder.check_writable()
    folder.sweep()
    plan = _read_plan(job)
    if plan is not None and plan["model"] != _model_digest(job.model):
        raise OtherSetError(f"{folder} was begun with other weights of this model; choose another folder")
    sizes, survey = folder.files(), job.set.survey()
    for name, fault in survey.torn.items():
        logger.warning("%s is made again: %s", name, fault)
        if name in sizes:  # or another driver may have made it meanwhile
            folder.delete(name)
    for name in survey.left_over:
        folder.delete(name)  # its images are in other files: a reader of the whole folder would see them twice
    return survey.kept


def _shard_nimg(
    job: SynthesisJob, kept: dict[str, dict[str, Any]], compute: ComputeSettings, progress: Progress
) -> int:
    """Images per file: as set, as planned when the set was begun, or from the measured speed of one worker."""
    if not job.set.missing(kept, job.n, job.n):
        return job.n
    if job.shard_nimg is not None:
        return _agreed(job, job.shard_nimg)
    plan = _read_plan(job)
    if plan is not None and plan["n"] >= job.n:
        return int(plan["shard_nimg"])
    balanced = math.ceil(job.n / (SHARDS_PER_WORKER * max(1, compute.sampling_workers[1])))
    if balanced <= 2 * CPU_BATCH:
        return _agreed(job, min(_most_images(job), balanced))
    return _agreed(job, min(balanced, _measure(job, kept, compute, progress)))


def _measure(job: SynthesisJob, kept: dict[str, dict[str, Any]], compute: ComputeSettings, progress: Progress) -> int:
    """Make the first file that is missing, a small one, and plan the others from how long it took."""
    most = _most_images(job)
    pilot_nimg = min(most, 2 * (compute.sampling_batch or CPU_BATCH))
    pilot = Shard(job, job.set.missing(kept, job.n, job.n)[0][:pilot_nimg])
    rate = None
    for shard, facts in run_on_pool([pilot], ShardWorker, compute, "sampling"):
        rate = facts.pop(RATE, None)
        kept[shard.name] = facts
        progress.add(len(shard.seeds))
    if rate is None:  # another driver made it
        return pilot_nimg
    nimg = max(pilot_nimg, min(most, int(rate * SHARD_S) // pilot_nimg * pilot_nimg))
    logger.info("synthesize: a worker makes %.0f images/s, so a file gets at most %s images", rate, f"{nimg:,}")
    return nimg


def _agreed(job: SynthesisJob, nimg: int) -> int:
    """Leave a plan for other drivers; returns the size that it has, which is another driver's if that was first."""
    folder, mine = job.set.folder, {"model": _model_digest(job.model), "shard_nimg": nimg, "n": job.n}
    plan = _read_plan(job)
    if plan is None and folder.create(PLAN, to_json(mine).encode()):
        return nimg
    plan = _read_plan(job)
    if plan is None or plan["n"] < job.n or job.shard_nimg is not None:  # torn, of a smaller set, or overruled
        folder.put(PLAN, to_json(mine).encode())
        return nimg
    return int(plan["shard_nimg"])


def _read_plan(job: SynthesisJob) -> dict[str, Any] | None:
    """What the set was begun with: digest of the checkpoints, images per file, images in all; None if it is torn."""
    try:
        plan = json.loads(job.set.folder.read(PLAN))
    except (FileNotFoundError, ValueError):
        return None
    known = isinstance(plan, dict) and isinstance(plan.get("model"), str)
    counts = known and all(isinstance(plan.get(key), int) and plan[key] > 0 for key in ("shard_nimg", "n"))
    return plan if counts else None


def _model_digest(model: SimsModel) -> str:
    """Of the content of its checkpoints."""
    paths = [model.base, *([model.aux] if model.aux is not None and model.omega != 0 else [])]
    return " ".join(sha256_file(Path(path)) for path in paths)


def _most_images(job: SynthesisJob) -> int:
    item_bytes = 2 if job.set.kind == "latent" else 1
    return max(1, SHARD_BYTES // (math.prod(job.set.shape) * item_bytes))


def _metadata(target: SyntheticSet) -> Mapping[str, Any]:
    facts = {"fingerprint": target.fingerprint, "settings": target.settings, "parents": list(target.parents)}
    return {**facts, **target.facts}


@lru_cache(maxsize=2)
def _classifier(source: str, device: str) -> AttributeClassifier:
    return AttributeClassifier.load(source, device)
