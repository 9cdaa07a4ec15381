"""Images from seeds: each one a pure function of (model, sampler settings, seed)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser
from sims_ray.diffusion.microbatch import MicroBatched
from sims_ray.diffusion.noise import SeedStreams, to_device
from sims_ray.diffusion.sampler import CHURNED, SAMPLERS, sigma_schedule, to_uint8

SCHEDULE_KEYS = ("num_steps", "sigma_min", "sigma_max", "rho")
CHURN_KEYS = ("S_churn", "S_min", "S_max", "S_noise")


@dataclass(frozen=True)
class Batch:
    """One batch of sampled images or latents.

    Attributes:
        seeds: one per image, consecutive.
        images: uint8 [B, C, H, W], or float16 for latents; on the host.
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
    classes: Tensor | None = None,
    batch_size: int = 256,
    micro_batch: int | None = None,
    device: torch.device | str = "cpu",
    latents: bool = False,
) -> Iterator[Batch]:
    """Sample one image per seed, in batches of consecutive seeds.

    Args:
        denoiser: D(x, sigma, labels).
        shape: (C, H, W).
        seeds: consecutive seeds.
        sampler: schedule (`num_steps`, `sigma_min`, `sigma_max`, `rho`), `solver` (a key of `SAMPLERS`; default
            heun), `state_dtype` (float64 or float32) and the churn settings of those solvers that have any.
        label_dim: K; a conditional model draws each image's class from the image's own seed.
        classes: class of each image instead, int64 [N]; the image's noise stays what it is.
        batch_size: images sampled at once.
        micro_batch: images per network call; then batch_size does not change a bit. None for whole batches.
        device: where the network lives.
        latents: the network makes latents, which stay as they are, in float16.

    Raises:
        ValueError: an image, or a latent in float16, is not finite; names its seed.
    """
    solver = sampler.get("solver", "heun")
    state_dtype = getattr(torch, sampler.get("state_dtype", "float64"))
    sigmas = sigma_schedule(**{key: sampler[key] for key in SCHEDULE_KEYS}, dtype=state_dtype)
    churn = {key: sampler[key] for key in CHURN_KEYS if key in sampler and solver in CHURNED}
    network = denoiser if micro_batch is None else MicroBatched(denoiser, micro_batch)
    for start in range(seeds.start, seeds.stop, batch_size):
        batch = range(start, min(start + batch_size, seeds.stop))
        streams = SeedStreams(batch)
        noise = streams.randn(shape, torch.float32, device)
        chosen = streams.randint(label_dim) if label_dim else None
        if chosen is not None and classes is not None:
            chosen = classes[start - seeds.start :][: len(batch)]
        labels = None if chosen is None else to_device(F.one_hot(chosen, label_dim), device).to(torch.float32)
        sampled = SAMPLERS[solver](network, noise, labels, sigmas=sigmas, streams=streams, **churn)
        images = sampled.images.to(torch.float16) if latents else sampled.images
        _check_finite(images, batch)
        images = images if latents else to_uint8(images)
        yield Batch(batch, images.cpu(), chosen, sampled.nfe)


def _check_finite(images: Tensor, seeds: range) -> None:
    """Images or latents, float [B, C, H, W], none of which overflowed or is nan."""
    if images.isfinite().all():
        return
    finite = images.isfinite().flatten(1).all(dim=1).tolist()
    raise ValueError(f"the image or latent of seed {seeds[finite.index(False)]} has values that are not finite")
