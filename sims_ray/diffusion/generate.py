"""Images from seeds: each one a pure function of (model, sampler settings, seed)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser
from sims_ray.diffusion.noise import SeedStreams, to_device
from sims_ray.diffusion.sampler import CHURNED, SAMPLERS, sigma_schedule, to_uint8

SCHEDULE_KEYS = ("num_steps", "sigma_min", "sigma_max", "rho")
CHURN_KEYS = ("S_churn", "S_min", "S_max", "S_noise")


@dataclass(frozen=True)
class Batch:
    """One batch of sampled images.

    Attributes:
        seeds: one per image, consecutive.
        images: uint8 [B, C, H, W], on the host.
        classes: the label each image was conditioned on, int64 [B]; None for an unconditional model.
        nfe: network evaluations per image.
    """

    seeds: range
    images: Tensor
    classes: Tensor | None
    nfe: float


@torch.inference_mode()
def generate(
    denoiser: Denoiser,
    shape: tuple[int, int, int],
    seeds: range,
    sampler: Mapping[str, Any],
    *,
    label_dim: int = 0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Iterator[Batch]:
    """Sample one image per seed, in batches of consecutive seeds.

    Args:
        denoiser: D(x, sigma, labels).
        shape: (C, H, W).
        seeds: consecutive seeds.
        sampler: schedule (`num_steps`, `sigma_min`, `sigma_max`, `rho`), `solver` (a key of `SAMPLERS`; default
            heun), `state_dtype` (float64 or float32) and the churn settings of those solvers that have any.
        label_dim: K; a conditional model draws each image's class from the image's own seed.
        batch_size: images per network call.
        device: where the network lives.
    """
    solver = sampler.get("solver", "heun")
    state_dtype = getattr(torch, sampler.get("state_dtype", "float64"))
    sigmas = sigma_schedule(**{key: sampler[key] for key in SCHEDULE_KEYS}, dtype=state_dtype)
    churn = {key: sampler[key] for key in CHURN_KEYS if key in sampler and solver in CHURNED}
    for start in range(seeds.start, seeds.stop, batch_size):
        batch = range(start, min(start + batch_size, seeds.stop))
        streams = SeedStreams(batch)
        latents = streams.randn(shape, torch.float32, device)
        classes = streams.randint(label_dim) if label_dim else None
        labels = None if classes is None else to_device(F.one_hot(classes, label_dim), device).to(torch.float32)
        sampled = SAMPLERS[solver](denoiser, latents, labels, sigmas=sigmas, streams=streams, **churn)
        yield Batch(batch, to_uint8(sampled.images).cpu(), classes, sampled.nfe)
