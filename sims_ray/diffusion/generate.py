"""Images from seeds: each one a pure function of (model, sampler settings, seed)."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sims_ray.diffusion.noise import SeedStreams
from sims_ray.diffusion.sampler import Denoiser, heun_sampler, sigma_schedule, to_uint8

SCHEDULE_KEYS = ("num_steps", "sigma_min", "sigma_max", "rho")


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
) -> Iterator[tuple[range, Tensor, Tensor | None]]:
    """Sample one image per seed, in batches of consecutive seeds.

    Args:
        denoiser: D(x, sigma, labels).
        shape: (C, H, W).
        seeds: consecutive seeds.
        sampler: schedule (`num_steps`, `sigma_min`, `sigma_max`, `rho`) and churn settings.
        label_dim: K; a conditional model draws each image's class from the image's own seed.
        batch_size: images per network call.
        device: where the network lives.

    Yields:
        The seeds of a batch, its images uint8 [B, C, H, W] on the host, its labels int64 [B] or None.
    """
    sigmas = sigma_schedule(**{key: sampler[key] for key in SCHEDULE_KEYS})
    churn = {key: value for key, value in sampler.items() if key not in SCHEDULE_KEYS}
    for start in range(seeds.start, seeds.stop, batch_size):
        batch = range(start, min(start + batch_size, seeds.stop))
        streams = SeedStreams(batch)
        latents = streams.randn(shape, torch.float32, device)
        classes = streams.randint(label_dim) if label_dim else None
        labels = None if classes is None else F.one_hot(classes, label_dim).to(device, torch.float32)
        images = heun_sampler(denoiser, latents, labels, sigmas=sigmas, streams=streams, **churn)
        yield batch, to_uint8(images).cpu(), classes
