"""Training runs of milliseconds: 20 grey images in two classes, eight of them per step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sims_ray.diffusion.optimization import Optimization
from sims_ray.diffusion.order import InMemory, Rows, Share, TrainingOrder
from sims_ray.diffusion.training import Training
from sims_ray.nn.precond import Precond
from tests.networks import ARCHITECTURES, small_network

SETTINGS = Optimization(
    batch_size=8,
    lr=1e-3,
    lr_rampup_nimg=0,
    ema_halflife_nimg=20,
    ema_rampup_ratio=None,
    P_mean=-1.2,
    P_std=1.2,
    seed=3,
)
CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.eye(2)[torch.arange(20) % 2]


class Recorder(nn.Module):
    """A loss that keeps what it is given."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.seen: list[tuple[Tensor | None, ...]] = []

    def forward(self, *arguments: Tensor | None) -> Tensor:
        self.seen.append(arguments)
        return self.loss(*arguments)


class Poisoned(nn.Module):
    """A loss that is multiplied by something that is no number."""

    def __init__(self, loss: nn.Module, factor: float) -> None:
        super().__init__()
        self.loss, self.factor = loss, factor

    def forward(self, *arguments: Tensor | None) -> Tensor:
        return self.loss(*arguments) * self.factor


def trainable(seed: int = 0, architecture: str = "ddpmpp", **settings: Any) -> Precond:
    """A conditional network, ready to train."""
    return small_network(seed, **{"label_dim": 2, **ARCHITECTURES[architecture], **settings}).requires_grad_(True)


ORDER = TrainingOrder(SETTINGS.seed, len(IMAGES), len(IMAGES))


def training(
    net: Precond,
    settings: Optimization = SETTINGS,
    images: Tensor = IMAGES,
    weights: Tensor | None = None,
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> Training:
    """A run on the images above."""
    told = None if weights is None else weights.numpy()
    rows = Rows(np.arange(len(images)), images.numpy(), LABELS.argmax(1).numpy(), told)
    data = InMemory([rows], Share(ORDER, settings.batch_size, rank, world_size))
    return Training(net, settings, data, **{"device": CPU, "rank": rank, "world_size": world_size, **options})


def recorded(net: Precond, settings: Optimization = SETTINGS, **options: Any) -> tuple[Training, Recorder]:
    """A run, and what its loss is given."""
    recorders: list[Recorder] = []

    def wrap(loss: nn.Module) -> nn.Module:
        recorders.append(Recorder(loss))
        return recorders[0]

    return training(net, settings, wrap=wrap, **options), recorders[0]


def workers(make: Callable[[], Precond], settings: Optimization, world_size: int, **options: Any) -> list[Training]:
    """The runs of all workers, before their first step."""
    return [training(make(), settings, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def gradients(run: Training) -> Tensor:
    """Gradients of the last step, in one vector."""
    return torch.cat([p.grad.flatten() for p in run.net.parameters() if p.grad is not None]).clone()


def weights(net: nn.Module) -> Tensor:
    """Weights in one vector."""
    return torch.cat([p.detach().flatten() for p in net.parameters()]).clone()
