"""How a training worker computes: what is compiled, the memory format, how many images go through at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sims_ray.config import ComputeSettings
from sims_ray.diffusion.training import Training
from sims_ray.nn.flops import gpu_of_device

LONG_NIMG = 1_000_000  # compiling takes minutes, which shorter runs do not win back
MEMORY_SHARE = 0.85  # the rest is for the allocator's gaps and the collective operations
PROBE_BATCH = 4


@dataclass(frozen=True)
class Choice:
    """A decision and its reason."""

    value: str
    reason: str


def choose_compile(setting: str, on_gpu: bool, stop_nimg: int) -> Choice:
    """What torch.compile gets in training: 'off', 'blocks' or 'whole'.

    Args:
        setting: one of these, or 'auto'.
        on_gpu: whether the network is on a GPU.
        stop_nimg: images of the whole run, so that one that goes on computes as it did before.
    """
    if setting != "auto":
        return Choice(setting, f"compute.compile_training={setting}")
    if not on_gpu:
        return Choice("off", "on a CPU it wins little and takes minutes")
    if stop_nimg < LONG_NIMG:
        return Choice("off", f"{stop_nimg:,} images are too few to win back the minutes it takes")
    return Choice(
        "blocks", "the residual blocks, which take minutes less than the whole network and win nearly as much"
    )


def choose_channels_last(setting: bool | None, on_gpu: bool) -> bool:
    """Whether images lie in memory with their channels last: as set, else on a GPU."""
    return on_gpu if setting is None else setting


def fit_memory(training: Training, shape: tuple[int, ...], share_nimg: int, compute: ComputeSettings) -> int:
    """Images per forward and backward pass of a worker; it is set in `training`. Every worker must call it.

    As set, else all of the worker's share on a CPU, and on a GPU the largest power of two that its memory holds.

    Args:
        training: the run, before its first step.
        shape: (C, H, W).
        share_nimg: images of a step that this worker computes.
        compute: settings.
    """
    size = compute.training_micro_batch or share_nimg
    if training.device.type == "cuda" and compute.training_micro_batch is None:
        image_bytes, fixed_bytes = _probe(training, shape)
        total = torch.cuda.get_device_properties(training.device).total_memory
        room = total * MEMORY_SHARE * min(compute.gpus_per_worker or 1, 1) - fixed_bytes
        size = 1 << max(0, int(room / max(image_bytes, 1)).bit_length() - 1)
    training.micro_batch = min(size, share_nimg)
    return training.micro_batch


def _probe(training: Training, shape: tuple[int, ...]) -> tuple[float, float]:
    """Bytes that a pass takes per image, and those that it takes in any case, Adam's moments among them."""
    peaks = []
    for batch in (PROBE_BATCH, 2 * PROBE_BATCH):
        training.micro_batch = batch
        torch.cuda.reset_peak_memory_stats(training.device)
        training.warm_up(shape, batch)
        peaks.append(torch.cuda.max_memory_allocated(training.device))
    image_bytes = (peaks[1] - peaks[0]) / PROBE_BATCH
    moments_bytes = 2 * sum(p.numel() * p.element_size() for p in training.net.parameters() if p.requires_grad)
    return image_bytes, peaks[0] - PROBE_BATCH * image_bytes + moments_bytes


def device_peak(device: torch.device, precision: torch.dtype) -> float:
    """Floating-point operations per second that a device could do at best; 0 where that is not known."""
    if device.type != "cuda":
        return 0.0
    gpu = gpu_of_device(torch.cuda.get_device_name(device))
    name = str(precision).removeprefix("torch.")
    if name == "float32" and torch.backends.cudnn.allow_tf32:
        name = "tf32"
    return gpu.peak_flops.get(name, 0.0) if gpu else 0.0


def speed_notes(compiled: Choice, channels_last: bool, micro_batch: int, share_nimg: int) -> Iterator[str]:
    """How training runs, in sentences for the log."""
    yield f"torch.compile: {compiled.value} ({compiled.reason})"
    passes = -(-share_nimg // micro_batch)
    yield (
        f"{share_nimg} images per worker and step in {passes} pass{'es' * (passes > 1)} of at most {micro_batch}"
        f"{', channels last' if channels_last else ''}"
    )
