"""What each training step is given: rows, noise and masks, a pure function of (seed, images seen).

All randomness of a step is drawn for the whole global batch and sliced, so that neither the number of workers nor the
micro-batch enters the mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sims_ray.diffusion.augment import AUGMENT_DIM, augment, draw_augmentation
from sims_ray.diffusion.loss import draw_noise
from sims_ray.diffusion.noise import step_generator
from sims_ray.diffusion.optimization import Optimization
from sims_ray.diffusion.order import TrainingData, share_of
from sims_ray.nn.dropout import KEY_LIMIT
from sims_ray.nn.precond import Precond


class StepInputs(NamedTuple):
    """What a worker's slice of a step is computed from, on the device.

    Attributes:
        images: as the network sees them, float32 [B, C, H, W].
        sigma: noise levels [B].
        noise: unit noise [B, C, H, W].
        dropout_keys: int32 [B].
        labels: one-hot [B, K], zero where they are hidden; None for a network that is not told them.
        augment_labels: what augmentation did [B, 9]; None for a network that is not told.
        weights: of the images in the loss [B]; None for equal ones.
    """

    images: Tensor
    sigma: Tensor
    noise: Tensor
    dropout_keys: Tensor
    labels: Tensor | None = None
    augment_labels: Tensor | None = None
    weights: Tensor | None = None

    def parts(self, size: int | None) -> Iterator[StepInputs]:
        """The same in parts of at most `size` images."""
        size = size or len(self.images)
        for start in range(0, len(self.images), size):
            yield StepInputs(*(None if t is None else t[start : start + size] for t in self))  # type: ignore[arg-type]


class _Drawn(NamedTuple):
    """A step's inputs on the host, the images as they are stored."""

    images: Tensor
    sigma: Tensor
    noise: Tensor
    dropout_keys: Tensor
    labels: Tensor | None
    augmentation: Tensor | None
    weights: Tensor | None


class Steps:
    """The inputs of each step.

    Args:
        data: this worker's slices of the global batches.
        settings: what a step depends on.
        net: the network, for what it wants to be told.
        device: where it lives; on a GPU the next step is drawn while one is computed.
        rank, world_size: which slice of the global batch.
    """

    def __init__(
        self,
        data: TrainingData,
        settings: Optimization,
        net: Precond,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._data, self._settings, self._device = data, settings, device
        share = share_of(settings.batch_size, rank, world_size)
        self._slice = slice(share.start, share.stop)
        self._label_dim = net.label_dim
        self._label_dropout = float(getattr(net.network, "label_dropout", 0.0))
        self._told = getattr(net.network, "map_augment", None) is not None
        self._thread = ThreadPoolExecutor(1, "next-step") if device.type == "cuda" else None
        self._ahead: tuple[int, Future[_Drawn]] | None = None

    def at(self, nimg: int) -> StepInputs:
        """The inputs of the step that starts at `nimg` images seen."""
        drawn = self._take(nimg)
        moved = _Drawn(*(None if t is None else t.to(self._device, non_blocking=True) for t in drawn))  # type: ignore[arg-type]
        images = moved.images.to(torch.float32)
        if moved.images.dtype == torch.uint8:  # latents come as they are
            images = images / 127.5 - 1
        augment_labels = None
        if moved.augmentation is not None:
            images, augment_labels = augment(images, moved.augmentation)
        elif self._told:  # a network that is told augmentations is told that there are none
            augment_labels = torch.zeros(len(images), AUGMENT_DIM, device=self._device)
        return StepInputs(
            images, moved.sigma, moved.noise, moved.dropout_keys, moved.labels, augment_labels, moved.weights
        )

    def blank(self, num_images: int, shape: tuple[int, ...]) -> StepInputs:
        """Inputs of the same kinds for images [C, H, W] that mean nothing."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(num_images, *size, device=self._device)

        keys = torch.zeros(num_images, dtype=torch.int32, device=self._device)
        labels = zeros(self._label_dim) if self._label_dim else None
        told = zeros(AUGMENT_DIM) if self._told or self._settings.augment else None
        return StepInputs(zeros(*shape), zeros() + 1, zeros(*shape), keys, labels, told)

    def _take(self, nimg: int) -> _Drawn:
        if self._thread is None:
            return self._drawn(nimg)
        ahead, self._ahead = self._ahead, None
        drawn = ahead[1].result() if ahead is not None and ahead[0] == nimg else self._pinned(nimg)
        following = nimg + self._settings.batch_size
        self._ahead = following, self._thread.submit(self._pinned, following)
        return drawn

    def _pinned(self, nimg: int) -> _Drawn:
        return _Drawn(*(None if t is None else t.pin_memory() for t in self._drawn(nimg)))  # type: ignore[arg-type]

    def _drawn(self, nimg: int) -> _Drawn:
        s, rows = self._settings, self._data.batch(nimg)

        def generator(stream: str) -> torch.Generator:
            return step_generator(s.seed, nimg, stream)

        images = torch.from_numpy(rows.images)
        sigma, noise = draw_noise(generator("noise"), s.batch_size, tuple(images.shape[1:]), s.P_mean, s.P_std)
        keys = torch.randint(KEY_LIMIT, (s.batch_size,), dtype=torch.int32, generator=generator("dropout"))
        labels = None
        if rows.labels is not None:
            labels = F.one_hot(torch.from_numpy(rows.labels).to(torch.int64), self._label_dim).to(torch.float32)
            if self._label_dropout:
                told = torch.rand(s.batch_size, 1, generator=generator("labels")) >= self._label_dropout
                labels = labels * told[self._slice]
        a = draw_augmentation(generator("augment"), s.batch_size, s.augment)[self._slice] if s.augment else None
        weights = None if rows.weights is None else torch.from_numpy(rows.weights)
        return _Drawn(images, sigma[self._slice], noise[self._slice], keys[self._slice], labels, a, weights)
