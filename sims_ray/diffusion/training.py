"""One training run: its state, and a step that any number of workers compute alike.

Progress is counted in images seen. Noise and augmentation of a step are drawn for the whole global batch from
(seed, nimg) and sliced, so the number of workers never enters the mathematics. Dropout masks are the
exception: each worker draws those of its own slice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sims_ray.diffusion.augment import AUGMENT_DIM, augment, draw_augmentation
from sims_ray.diffusion.loss import DenoisingLoss, draw_noise
from sims_ray.diffusion.noise import step_generator, to_device
from sims_ray.diffusion.order import TrainingData
from sims_ray.nn.ema import ema_beta, power_beta, update_ema
from sims_ray.nn.networks import trainable_parameters
from sims_ray.nn.precond import Precond

ADAM_EPS = 1e-8
EMA = "ema"


@dataclass(frozen=True)
class Optimization:
    """What a step depends on, counts in images.

    Attributes:
        batch_size: global batch.
        lr: Adam learning rate after the ramp.
        lr_rampup_nimg: images of linear ramp from 0.
        ema_halflife_nimg: half-life of the weight average.
        ema_rampup_ratio: half-life over images seen while training is young; None for none.
        P_mean, P_std: ln sigma ~ N(P_mean, P_std^2).
        seed: seed of data order and noise.
        lr_decay_nimg: images after which the learning rate falls as 1 / sqrt(images); 0 for never.
        adam_betas: decay of Adam's moments.
        ema_stds: relative widths of power-function averages, which then take the place of the half-life.
        gradient_limit: infinite gradients become this large, NaN becomes zero (EDM: 1e5; EDM2: 0).
        loss_scale: factor of the loss, against underflow in float16; Adam does not depend on it.
        augment: probability of each of EDM's augmentations; 0 for none.
        trainable: 'all', or 'decoder' for an auxiliary that shares the base's encoder.
        trainable_resolution: with 'decoder', its layers below this resolution are shared as well.
    """

    batch_size: int
    lr: float
    lr_rampup_nimg: float
    ema_halflife_nimg: float
    ema_rampup_ratio: float | None
    P_mean: float
    P_std: float
    seed: int
    lr_decay_nimg: float = 0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    ema_stds: tuple[float, ...] = ()
    gradient_limit: float = 1e5
    loss_scale: float = 1.0
    augment: float = 0.0
    trainable: str = "all"
    trainable_resolution: int = 0

    def learning_rate(self, nimg: int) -> float:
        """Learning rate of the step that starts at `nimg` images seen (EDM2, arXiv 2312.02696, eq. 67)."""
        lr = self.lr
        if self.lr_decay_nimg:
            lr /= max(nimg / self.lr_decay_nimg, 1) ** 0.5
        return lr * min(nimg / self.lr_rampup_nimg, 1) if self.lr_rampup_nimg else lr

    @property
    def averages(self) -> dict[str, float | None]:
        """The weight averages by name, with their relative width; None for the one with a half-life."""
        return {f"{EMA}-{std:.3f}": std for std in self.ema_stds} or {EMA: None}

    def ema_decay(self, std: float | None, nimg: int) -> float:
        """Decay of one average in the step that starts at `nimg` images seen."""
        if std is not None:
            return power_beta(std, nimg + self.batch_size, self.batch_size)
        return ema_beta(nimg, self.batch_size, self.ema_halflife_nimg, self.ema_rampup_ratio)


class Training:
    """Network, weight averages, Adam and image count of one run.

    Args:
        net: network to train, on `device`, the same on every worker.
        settings: what a step depends on.
        data: this worker's slices of the global batches: uint8 images or float16 latents, on the host.
        rank, world_size: which slice of the global batch that is.
        wrap: turns the module that computes the loss into one whose backward pass averages gradients (DDP).
    """

    def __init__(
        self,
        net: Precond,
        settings: Optimization,
        data: TrainingData,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        if settings.batch_size % world_size:
            raise ValueError(f"batch_size {settings.batch_size} does not divide by {world_size} workers; change either")
        self.net, self.settings, self.device = net, settings, device
        self._data = data
        self._world_size = world_size
        self._rank = rank
        per_worker = settings.batch_size // world_size
        self._slice = slice(rank * per_worker, (rank + 1) * per_worker)
        self.averages = {name: copy.deepcopy(net).eval().requires_grad_(False) for name in settings.averages}
        self._parameters = _train_only(
            net, trainable_parameters(net, settings.trainable, settings.trainable_resolution)
        )
        self.optimizer = torch.optim.Adam(
            self._parameters, lr=settings.lr, betas=settings.adam_betas, eps=ADAM_EPS, fused=True
        )
        self.nimg = 0
        self._loss = wrap(DenoisingLoss(net.train()))
        self._losses = torch.zeros(2, dtype=torch.float64, device=device)  # sum and number of the finite ones

    @property
    def ema(self) -> Precond:
        """The weight average; of several the first."""
        return next(iter(self.averages.values()))

    def step(self) -> None:
        """Train on the next global batch; nothing here waits for the device."""
        s = self.settings
        images, labels, weights = self._batch()
        images, augment_labels = self._augment(images)
        draws = draw_noise(self._generator("noise"), s.batch_size, tuple(images.shape[1:]), s.P_mean, s.P_std)
        sigma, noise = (to_device(draw[self._slice], self.device) for draw in draws)
        torch.manual_seed(self._generator(f"dropout{self._rank}").initial_seed())

        losses = self._loss(images, sigma, noise, labels, augment_labels)
        if weights is not None:
            losses = losses * weights
        self.optimizer.zero_grad(set_to_none=True)
        (losses.mean() * s.loss_scale).backward()
        self._apply_gradients()
        for std, average in zip(s.averages.values(), self.averages.values(), strict=True):
            update_ema(average, self.net, s.ema_decay(std, self.nimg))
        self.nimg += s.batch_size
        finite = losses.detach().isfinite()
        self._losses += torch.stack([losses.detach().where(finite, 0).sum(), finite.sum()])

    def _batch(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Images as the network sees them, labels [B, K] and weights [B] of the next step, on the device."""

        def moved(column: NDArray[Any]) -> Tensor:
            return to_device(torch.from_numpy(column), self.device)

        rows = self._data.batch(self.nimg)
        images = moved(rows.images).to(torch.float32)
        if rows.images.dtype == np.uint8:  # latents come as they are
            images = images / 127.5 - 1
        labels = None
        if rows.labels is not None:
            labels = F.one_hot(moved(rows.labels).to(torch.int64), self.net.label_dim).to(torch.float32)
        return images, labels, None if rows.weights is None else moved(rows.weights)

    def _generator(self, stream: str) -> torch.Generator:
        return step_generator(self.settings.seed, self.nimg, stream)

    def _augment(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.settings.augment:  # a network that is told augmentations is told that there are none
            told = getattr(self.net.network, "map_augment", None) is not None
            return images, torch.zeros(len(images), AUGMENT_DIM, device=self.device) if told else None
        a = draw_augmentation(self._generator("augment"), self.settings.batch_size, self.settings.augment)
        return augment(images, to_device(a[self._slice], self.device))

    def _apply_gradients(self) -> None:
        limit = self.settings.gradient_limit
        for parameter in self._parameters:
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, 0.0, limit, -limit, out=parameter.grad)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(self.nimg)
        self.optimizer.step()

    def check_same_start(self) -> None:
        """Make sure that all workers go on from the same checkpoint; every worker must call it.

        Raises:
            RuntimeError: they do not, as shared storage may show a new file to one node before another.
        """
        if self._world_size > 1:
            ends = torch.tensor([self.nimg, -self.nimg], device=self.device)
            dist.all_reduce(ends, op=dist.ReduceOp.MIN)
            if int(ends[0]) != -int(ends[1]):
                raise RuntimeError("workers see different checkpoints; check the shared storage")

    def pop_loss(self) -> float:
        """Mean loss per image since the last call, over all workers; every worker must call it.

        Losses that are not finite are left out, as their gradients are; it is NaN if all were such.
        """
        if self._world_size > 1:
            dist.all_reduce(self._losses)
        total, number = self._losses.tolist()
        self._losses.zero_()
        return total / number if number else math.nan

    def state(self) -> dict[str, Tensor]:
        """Everything a later process needs to go on, as named tensors."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        for average, ema in self.averages.items():
            tensors |= {f"{average}.{k}": v for k, v in ema.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            tensors |= {f"adam.{name}.{k}": v for k, v in self.optimizer.state.get(parameter, {}).items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor], nimg: int) -> None:
        """Go on from what `state` returned at `nimg` images seen."""
        self.net.load_state_dict(_with_prefix(tensors, "net."))
        for average, ema in self.averages.items():
            ema.load_state_dict(_with_prefix(tensors, f"{average}."))
        for name, parameter in self.net.named_parameters():
            if not parameter.requires_grad:
                continue
            moments = _with_prefix(tensors, f"adam.{name}.")
            self.optimizer.state[parameter] = {k: v.to(self.device, copy=True) for k, v in moments.items()}
        self.nimg = nimg


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _train_only(net: Precond, names: set[str]) -> list[nn.Parameter]:
    """Freeze the other parameters; returns those named."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in names)
    return [parameter for parameter in net.parameters() if parameter.requires_grad]
