"""Images of a model for a range of seeds, as actors make them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from sims_ray.config import ComputeSettings
from sims_ray.diffusion.evaluations import Denoiser
from sims_ray.diffusion.generate import Batch, generate
from sims_ray.diffusion.labels import class_of_seeds
from sims_ray.diffusion.microbatch import batch_for_memory, warm_up
from sims_ray.errors import SimsError
from sims_ray.storage.models import SimsModel


class ImageSampler:
    """Samples on one CPU slot or GPU; models stay loaded between units of work.

    Args:
        compute: threads, device, precision and batch sizes.
    """

    def __init__(self, compute: ComputeSettings) -> None:
        # In a process of its own, not in the caller's, where other work goes on.
        self._threads = max(1, int(compute.cpus_per_worker)) if compute.num_workers else None
        self._compute = compute
        self.device = "cuda" if compute.gpus_per_worker else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise SimsError(
                f"compute.gpus_per_worker={compute.gpus_per_worker:g}, but there is no CUDA device here; set it to 0"
            )
        self._batches: dict[SimsModel, int] = {}

    def prepare(self, model: SimsModel, nimg: int) -> int:
        """Load a model and find its batch size, so that what comes after is sampling alone; returns that size.

        Args:
            model: what to sample from.
            nimg: images that will be sampled from it at least.
        """
        if self._threads:
            torch.set_num_threads(self._threads)  # holds for the calling thread only, and Tune calls from many
        denoiser, shape, label_dim = self._load(model)
        if model not in self._batches:
            share = min(self._compute.gpus_per_worker or 1.0, 1.0)
            found = self._compute.sampling_batch
            self._batches[model] = found or batch_for_memory(denoiser, shape, label_dim, self.device, share)
            if self._compute.compile or self.device == "cuda":
                size = self._compute.micro_batch or min(self._batches[model], nimg)
                warm_up(denoiser, shape, label_dim, self.device, size)
        return self._batches[model]

    def batches(
        self,
        model: SimsModel,
        seeds: range,
        sampler: Mapping[str, Any],
        labels: Mapping[str, Any] | None = None,
        first_seed: int = 0,
        latents: bool = False,
    ) -> Iterator[Batch]:
        """Sample one image per seed.

        Args:
            model: what to sample from.
            seeds: consecutive seeds.
            sampler: sampler settings.
            labels: which class each seed gets; None for the draw from the image's own stream.
            first_seed: first seed of the set that the seeds are of.
            latents: the model makes latents.

        Raises:
            SimsError: the GPU's memory does not hold the batch, or an image is not finite.
        """
        batch_size = self.prepare(model, len(seeds))
        denoiser, shape, label_dim = self._load(model)
        try:
            yield from generate(
                denoiser,
                shape,
                seeds,
                sampler,
                label_dim=label_dim,
                classes=None if labels is None else class_of_seeds(labels, seeds, first_seed, label_dim),
                batch_size=batch_size,
                micro_batch=self._compute.micro_batch,
                device=self.device,
                latents=latents,
            )
        except ValueError as error:
            raise SimsError(f"{model.base}: {error}; take another sampler, or guide less") from None
        except torch.cuda.OutOfMemoryError:
            raise SimsError(
                f"the GPU has no memory for {batch_size} images at once; "
                f"set compute.sampling_batch to less, or compute.gpus_per_worker to more"
            ) from None

    def _load(self, model: SimsModel) -> tuple[Denoiser, tuple[int, int, int], int]:
        """The denoiser, the shape (C, H, W) of its images and its K."""
        denoiser, card = model.load(self.device, self._compute.precision, self._compute.compile)
        network = card["network"]
        shape = (network["img_channels"], network["img_resolution"], network["img_resolution"])
        return denoiser, shape, network["label_dim"]
