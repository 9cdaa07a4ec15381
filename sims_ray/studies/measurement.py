"""How fast this machine trains and samples: a few real steps of a run's own network, timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from sims_ray.config import ComputeSettings
from sims_ray.data.samples import KINDS
from sims_ray.diffusion.microbatch import batch_for_memory
from sims_ray.diffusion.order import Rows, share_of
from sims_ray.diffusion.training import Training
from sims_ray.errors import SimsError
from sims_ray.nn.flops import NetworkFlops
from sims_ray.nn.networks import build_network
from sims_ray.nn.precond import Precond
from sims_ray.stages.train_job import AUTO, TrainJob
from sims_ray.stages.training_speed import choose_channels_last, choose_compile, fit_memory
from sims_ray.studies.footprint import Footprint
from sims_ray.studies.plan import Plan
from sims_ray.studies.throughput import Fact, Throughput

STEPS = 3  # at least
MEASURED_S = 10.0
LONGEST_S = 10.0  # of one step; a larger batch is measured with fewer images


class RandomImages:
    """Training data that means nothing: in every step the same images.

    Args:
        shape: (C, H, W).
        kind: 'image' or 'latent'.
        label_dim: K; 0 for no labels.
        nimg: images of one worker's slice of a step.
    """

    def __init__(self, shape: tuple[int, int, int], kind: str, label_dim: int, nimg: int) -> None:
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (nimg, *shape)).astype(KINDS[kind])
        labels = random.integers(0, label_dim, nimg) if label_dim else None
        self._rows = Rows(np.arange(nimg), images, labels)

    def batch(self, nimg: int) -> Rows:
        """The slice of any step."""
        return self._rows


@dataclass(frozen=True)
class Timing:
    """Some steps that were timed.

    Attributes:
        steps: how many.
        nimg: images in each.
        planned_nimg: images that a step of the run has.
        elapsed_s: seconds for all.
        image_flops: operations per image.
    """

    steps: int
    nimg: int
    planned_nimg: int
    elapsed_s: float
    image_flops: float

    @property
    def flops_per_s(self) -> float:
        """Operations per second."""
        return self.steps * self.nimg * self.image_flops / self.elapsed_s

    def fact(self, what: str, device: str) -> Fact:
        """What was measured, for people."""
        rate = self.steps * self.nimg / self.elapsed_s
        fewer = "" if self.nimg == self.planned_nimg else f" in place of {self.planned_nimg}"
        return Fact(
            what,
            f"{self.flops_per_s / 1e9:.4g} GFLOP/s, {rate:.4g} images/s",
            f"measured on {device}: {self.steps} times {self.nimg} images{fewer} in {self.elapsed_s:.1f} s",
        )


def measured_throughput(plan: Plan, flops: NetworkFlops, memory: Footprint) -> Throughput:
    """Time training steps and network evaluations as one worker makes them, with its threads.

    Raises:
        SimsError: the memory of this machine does not hold the training of one image.
    """
    compute = plan.recipe.compute
    device = torch.device("cuda" if compute.gpus_per_worker and torch.cuda.is_available() else "cpu")
    memory_bytes = _memory_bytes(device, compute)
    most_nimg = memory.most_images(memory_bytes)
    if most_nimg < 1:
        raise SimsError(
            f"training on one image takes {memory.total_bytes(1) / 1e9:.1f} GB and this machine has "
            f"{memory_bytes / 1e9:.1f} GB, so that nothing can be measured; name a GPU with --gpu"
        )
    with worker_threads(compute) as threads:
        net = build_network(plan.inputs.network).to(device)
        forced = compute.precision
        net.run_in((plan.inputs.precision if device.type == "cuda" else "float32") if forced == AUTO else forced)
        training = _time_training(plan, net, device, flops, most_nimg)
        sampling = _time_sampling(plan, net, device, flops)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this machine's CPU, threads: {threads}"
    facts = (training.fact("training, one worker", name), sampling.fact("network evaluations, one worker", name))
    if device.type == "cpu":  # workers of a local cluster share it
        memory_bytes /= max(1, compute.num_workers)
    return Throughput(name, device.type == "cuda", training.flops_per_s, sampling.flops_per_s, memory_bytes, facts)


@contextmanager
def worker_threads(compute: ComputeSettings) -> Iterator[int]:
    """As many threads as a worker has, as far as there are processors; without Ray those of this process."""
    before = torch.get_num_threads()
    threads = min(max(1, int(compute.cpus_per_worker)), os.cpu_count() or 1) if compute.num_workers else before
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def _memory_bytes(device: torch.device, compute: ComputeSettings) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory * min(compute.gpus_per_worker, 1)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _time_training(plan: Plan, net: Precond, device: torch.device, flops: NetworkFlops, most_nimg: int) -> Timing:
    """Real steps, but for the exchange of gradients with other workers."""
    job = plan.base_job or plan.finetune_job(max(plan.recipe.tune.n_s))
    share_nimg = len(share_of(job.settings.batch_size, 0, max(1, plan.recipe.compute.num_workers)))
    one = _training(plan, job, net, device, 1)
    one.step()
    nimg = _fitting(share_nimg, _elapsed_s(one.step, device), most_nimg)
    del one
    training = _training(plan, job, net, device, nimg)
    training.compile(choose_compile(plan.recipe.compute.compile_training, device.type == "cuda", job.stop_nimg).value)
    fit_memory(training, plan.inputs.shape, nimg, plan.recipe.compute)
    training.step()
    steps, elapsed_s = _repeated(training.step, device)
    return Timing(steps, nimg, share_nimg, elapsed_s, flops.training(job.trainable))


def _training(plan: Plan, job: TrainJob, net: Precond, device: torch.device, nimg: int) -> Training:
    """The job as one worker trains it, with `nimg` images of each step its own."""
    compute = plan.recipe.compute
    workers = max(1, compute.num_workers)
    return Training(
        net,
        replace(job.optimization(), batch_size=nimg * workers),
        RandomImages(plan.inputs.shape, plan.inputs.kind, net.label_dim, nimg),
        device=device,
        world_size=workers,
        channels_last=choose_channels_last(compute.channels_last, device.type == "cuda"),
    )


@torch.inference_mode()
def _time_sampling(plan: Plan, net: Precond, device: torch.device, flops: NetworkFlops) -> Timing:
    """Evaluations of the denoiser; guidance is so many more of them."""
    compute, shape = plan.recipe.compute, plan.inputs.shape
    net.eval().requires_grad_(False)
    most_nimg = compute.sampling_batch or batch_for_memory(
        net, shape, net.label_dim, device, min(compute.gpus_per_worker or 1, 1)
    )
    most_nimg = compute.micro_batch or min(most_nimg, plan.synthesis_job.n)
    if compute.compile:
        net.compile_network()
    dtype = getattr(torch, plan.recipe.sampler.state_dtype)

    def evaluation(nimg: int) -> Callable[[], object]:
        x, sigma = torch.randn(nimg, *shape, dtype=dtype, device=device), torch.ones(nimg, dtype=dtype, device=device)
        classes = torch.zeros(nimg, dtype=torch.int64, device=device)
        labels = F.one_hot(classes, net.label_dim).to(torch.float32) if net.label_dim else None
        return lambda: net(x, sigma, labels).to(dtype)

    one = evaluation(1)
    one()
    nimg = _fitting(most_nimg, _elapsed_s(one, device))
    call = evaluation(nimg)
    call()
    steps, elapsed_s = _repeated(call, device)
    return Timing(steps, nimg, most_nimg, elapsed_s, flops.forward)


def _fitting(planned_nimg: int, one_s: float, most_nimg: int | None = None) -> int:
    """Images per step, as planned if a step does not get too long or too large with them."""
    return max(1, min(planned_nimg, int(LONGEST_S / one_s), most_nimg or planned_nimg))


def _repeated(call: Callable[[], object], device: torch.device) -> tuple[int, float]:
    """Steps done, and the seconds they took."""
    steps, elapsed_s = 0, 0.0
    while steps == 0 or elapsed_s < MEASURED_S:

        def several() -> None:
            for _ in range(STEPS):
                call()

        elapsed_s += _elapsed_s(several, device)
        steps += STEPS
    return steps, elapsed_s


def _elapsed_s(call: Callable[[], object], device: torch.device) -> float:
    started_s = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s
