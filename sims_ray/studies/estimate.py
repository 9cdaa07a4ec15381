"""What a run costs, and whether it fits: the work of its stages at the speed of its workers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from sims_ray.diffusion.order import share_of
from sims_ray.nn.flops import Gpu
from sims_ray.stages.train_job import AUTO
from sims_ray.stages.training_speed import MEMORY_SHARE
from sims_ray.studies.cost import Work, Workload, storage_bytes
from sims_ray.studies.footprint import Footprint, footprint
from sims_ray.studies.measurement import measured_throughput
from sims_ray.studies.plan import Plan
from sims_ray.studies.throughput import HOUR_S, Throughput, published_cost, table_throughput


@dataclass(frozen=True)
class Estimate:
    """The cost of a plan.

    Attributes:
        plan: the run.
        workload: what its stages do.
        stages: their work.
        throughput: of one worker.
        precision: dtype of the network.
        memory: of one worker in training.
    """

    plan: Plan
    workload: Workload
    stages: tuple[Work, ...]
    throughput: Throughput
    precision: str
    memory: Footprint

    @property
    def workers(self) -> int:
        """Workers that train and sample."""
        return max(1, self.plan.recipe.compute.num_workers)

    @property
    def gpus(self) -> float:
        """GPUs in all; workers, on a CPU."""
        return self.workers * (self.plan.recipe.compute.gpus_per_worker if self.throughput.on_gpu else 1)

    def elapsed_s(self, work: Work) -> float:
        """Seconds for a stage, or for several, whose work divides evenly among the workers."""
        speed = self.throughput
        return work.flops / (
            self.workers * (speed.training_flops_per_s if work.training else speed.sampling_flops_per_s)
        )

    def device_hours(self, work: Work) -> float:
        """GPU-hours of a stage; worker-hours, on a CPU."""
        return self.elapsed_s(work) * self.gpus / HOUR_S

    @cached_property
    def share_nimg(self) -> int:
        """Images of a training step that a worker computes."""
        recipe = self.plan.recipe
        batches = [recipe.finetune.batch_size, *([recipe.train.batch_size] if self.plan.base_job else [])]
        return max(len(share_of(size, 0, self.workers)) for size in batches)

    @property
    def most_nimg(self) -> int:
        """Images per pass that a worker's memory holds."""
        return self.memory.most_images(self.throughput.memory_bytes * MEMORY_SHARE)

    @property
    def pass_nimg(self) -> int:
        """Images per pass of a training step: as set, else all of them, on a GPU as many as fit."""
        if (size := self.plan.recipe.compute.training_micro_batch) is None:
            size = self.share_nimg
            if self.throughput.on_gpu and self.most_nimg < size:
                size = 1 << max(0, self.most_nimg.bit_length() - 1)
        return min(size, self.share_nimg)

    def warnings(self) -> Iterator[str]:
        """What does not fit, in sentences."""
        recipe = self.plan.recipe
        yield from self._memory_warnings()
        yield from self._storage_warnings()
        if self.plan.inputs.kind == "latent":
            yield "distances of latents cannot be measured yet: `sims tune`, `report` and `run` refuse them"
        if recipe.compute.gpus_per_worker and not self.throughput.on_gpu:
            yield "the recipe asks for GPUs and this machine has none: the times are of its CPU; name one by --gpu"
        cpus, wanted = os.cpu_count() or 1, recipe.compute.num_workers * max(1, int(recipe.compute.cpus_per_worker))
        if not self.throughput.on_gpu and wanted > cpus:
            yield (
                f"the workers take {wanted} processors and this machine has {cpus}: one worker was measured alone, and "
                f"the times are those of as many machines like this one"
            )

    def _memory_warnings(self) -> Iterator[str]:
        memory, speed = self.memory, self.throughput
        held = f"{speed.memory_bytes / 1e9:.1f} GB, of which {MEMORY_SHARE:.0%} can be used"
        if self.most_nimg < 1:
            yield (
                f"training does not fit: one image per pass takes {memory.total_bytes(1) / 1e9:.1f} GB, a worker "
                f"has {held}; take devices with more memory or a smaller network"
            )
        elif self.pass_nimg > self.most_nimg:
            yield (
                f"training does not fit: {self.pass_nimg} images per pass take "
                f"{memory.total_bytes(self.pass_nimg) / 1e9:.1f} GB, and a worker has {held}; set "
                f"compute.training_micro_batch to {self.most_nimg} or less"
            )

    def _storage_warnings(self) -> Iterator[str]:
        folder = next(path for path in (self.plan.out, *self.plan.out.parents) if path.is_dir())
        most_bytes, free_bytes = storage_bytes(self.stages)[1], shutil.disk_usage(folder).free
        if most_bytes > free_bytes:
            yield (
                f"the run does not fit on the disk: it takes up to {most_bytes / 1e9:.1f} GB, and {folder} has "
                f"{free_bytes / 1e9:.1f} GB free; choose another --out"
            )


def estimate(plan: Plan, gpu: Gpu | None = None) -> Estimate:
    """The cost of a plan on a GPU of the table, or on this machine, which is measured then for half a minute.

    Raises:
        SimsError: the GPU does not know the dtype, or this machine cannot train the network.
    """
    compute, inputs = plan.recipe.compute, plan.inputs
    on_gpu = gpu is not None or (compute.gpus_per_worker > 0 and torch.cuda.is_available())
    auto = inputs.precision if on_gpu else "float32"
    precision = auto if compute.precision == AUTO else compute.precision
    job = plan.base_job or plan.finetune_job(max(plan.recipe.tune.n_s))
    memory = footprint(inputs.network, job.optimization(), precision, max(1, compute.num_workers))
    workload = Workload(plan)
    if gpu is None:
        throughput = measured_throughput(plan, workload.flops, memory)
    else:
        cost = published_cost(plan.recipe.name, precision)
        throughput = table_throughput(gpu, cost, precision, compute.gpus_per_worker)
    return Estimate(plan, workload, tuple(workload.stages()), throughput, precision, memory)
