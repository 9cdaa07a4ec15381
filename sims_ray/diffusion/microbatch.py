"""How many images go through a network at once: a fixed number, or what the device's memory holds."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser, at_step, uncounted

CPU_BATCH = 250
PROBE_BATCH = 8
MAX_BATCH = 4096
MEMORY_SHARE = 0.8  # the rest is for the sampler's state and the allocator's gaps


@dataclass(frozen=True)
class MicroBatched:
    """A denoiser that calls another with `size` images at a time, the last ones padded.

    Kernels may round otherwise for another batch size; with a fixed one an image does not depend on how many
    others are sampled with it.

    Attributes:
        denoiser: D(x, sigma, labels).
        size: images per call.
    """

    denoiser: Denoiser
    size: int

    def at_step(self, sigma: float) -> Denoiser:
        """The denoiser of the step that starts at `sigma`."""
        return MicroBatched(at_step(self.denoiser, sigma), self.size)

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise x [B, C, H, W] at noise level sigma [B] given one-hot labels [B, K]."""
        parts = []
        for start in range(0, len(x), self.size):
            rows = slice(start, start + self.size)
            with uncounted() if start else nullcontext():
                part = self.denoiser(
                    self._padded(x[rows]),
                    self._padded(sigma[rows]),
                    None if labels is None else self._padded(labels[rows]),
                )
            parts.append(part[: len(x) - start])
        return torch.cat(parts)

    def _padded(self, rows: Tensor) -> Tensor:
        missing = self.size - len(rows)
        return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


@torch.inference_mode()
def batch_for_memory(
    denoiser: Denoiser, shape: tuple[int, int, int], label_dim: int, device: torch.device | str, share: float = 1.0
) -> int:
    """Images per network call: as many as the device's memory holds, a power of two; a fixed number on a CPU.

    It is found from the memory of the whole device, not from what happens to be free, so that devices of one kind
    work alike.

    Args:
        denoiser: D(x, sigma, labels), on `device`.
        shape: (C, H, W).
        label_dim: K; 0 for an unconditional model.
        device: where the network lives.
        share: share of the device that this process may use.
    """
    if torch.device(device).type != "cuda":
        return CPU_BATCH
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    warm_up(denoiser, shape, label_dim, device, PROBE_BATCH)
    image_bytes = (torch.cuda.max_memory_allocated(device) - before) / PROBE_BATCH
    memory_bytes = torch.cuda.get_device_properties(device).total_memory * share * MEMORY_SHARE - before
    return power_of_two(memory_bytes / max(image_bytes, 1))


@torch.inference_mode()
def warm_up(
    denoiser: Denoiser, shape: tuple[int, int, int], label_dim: int, device: torch.device | str, batch_size: int
) -> None:
    """Call a denoiser once with blank images [B, C, H, W]: kernels are compiled and chosen now, not while timed."""
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    one_hot = F.one_hot(labels, label_dim).to(torch.float32) if label_dim else None
    denoiser(torch.zeros(batch_size, *shape, device=device), torch.ones(batch_size, device=device), one_hot)


def power_of_two(limit: float) -> int:
    """The largest power of two that is at most `limit`, between 1 and 4096."""
    return 1 << max(0, min(int(limit), MAX_BATCH).bit_length() - 1)
