"""One training run: its state, and a step that any number of workers compute alike.

Progress is counted in images seen. The noise of a step is drawn for the whole global batch from
(seed, nimg) and sliced, so the number of workers never enters the mathematics. Dropout masks are the
exception: each worker draws those of its own slice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sims_ray.diffusion.loss import draw_noise, edm_loss
from sims_ray.diffusion.noise import epoch_order, step_generator
from sims_ray.nn.ema import ema_beta, update_ema
from sims_ray.nn.precond import Precond

ADAM_BETAS = (0.9, 0.999)
ADAM_EPS = 1e-8
GRADIENT_LIMIT = 1e5  # infinite gradients become this large, NaN becomes zero (EDM, App. F.2)


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
    """

    batch_size: int
    lr: float
    lr_rampup_nimg: float
    ema_halflife_nimg: float
    ema_rampup_ratio: float | None
    P_mean: float
    P_std: float
    seed: int

    def learning_rate(self, nimg: int) -> float:
        """Learning rate of the step that starts at `nimg` images seen."""
        return self.lr * min(nimg / max(self.lr_rampup_nimg, 1e-8), 1.0) if self.lr_rampup_nimg else self.lr


class Training:
    """Network, EMA, Adam and image count of one run.

    Args:
        net: network to train, on `device`, the same on every worker.
        settings: what a step depends on.
        images: the whole training set, uint8 [N, C, H, W], on the host.
        labels: one-hot labels [N, K], or None for unconditional training.
        rank, world_size: this worker's slice of the global batch.
        wrap: turns the network into the one whose backward pass averages gradients (DDP).
    """

    def __init__(
        self,
        net: Precond,
        settings: Optimization,
        images: Tensor,
        labels: Tensor | None,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        if settings.batch_size % world_size:
            raise ValueError(f"batch_size {settings.batch_size} does not divide by {world_size} workers; change either")
        self.net, self.settings, self.device = net, settings, device
        self._images, self._labels = images, labels
        self._world_size = world_size
        self._rank = rank
        per_worker = settings.batch_size // world_size
        self._slice = slice(rank * per_worker, (rank + 1) * per_worker)
        self.ema = copy.deepcopy(net).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(net.parameters(), lr=settings.lr, betas=ADAM_BETAS, eps=ADAM_EPS, fused=True)
        self._parameters = list(net.parameters())
        self.nimg = 0
        self._forward = wrap(net.train())
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._loss_nimg = 0

    def step(self) -> None:
        """Train on the next global batch; nothing here waits for the device."""
        s = self.settings
        rows = epoch_order(s.seed, self.nimg, s.batch_size, len(self._images))[self._slice]
        images = self._images[rows].to(self.device).to(torch.float32) / 127.5 - 1
        labels = None if self._labels is None else self._labels[rows].to(self.device)
        draws = draw_noise(
            step_generator(s.seed, self.nimg, "noise"), s.batch_size, tuple(images.shape[1:]), s.P_mean, s.P_std
        )
        sigma, noise = (draw[self._slice].to(self.device) for draw in draws)
        torch.manual_seed(step_generator(s.seed, self.nimg, f"dropout{self._rank}").initial_seed())

        losses = edm_loss(self._forward, images, sigma, noise, labels, self.net.sigma_data)
        self.optimizer.zero_grad(set_to_none=True)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        self._apply_gradients()
        update_ema(self.ema, self.net, ema_beta(self.nimg, s.batch_size, s.ema_halflife_nimg, s.ema_rampup_ratio))
        self.nimg += s.batch_size
        self._loss_sum += losses.detach().sum()
        self._loss_nimg += s.batch_size

    def _apply_gradients(self) -> None:
        for parameter in self._parameters:
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, 0.0, GRADIENT_LIMIT, -GRADIENT_LIMIT, out=parameter.grad)
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
        """Mean loss per image since the last call, over all workers; every worker must call it."""
        if self._world_size > 1:
            dist.all_reduce(self._loss_sum)
        loss = float(self._loss_sum) / max(self._loss_nimg, 1)
        self._loss_sum.zero_()
        self._loss_nimg = 0
        return loss

    def state(self) -> dict[str, Tensor]:
        """Everything a later process needs to go on, as named tensors."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            tensors |= {f"adam.{name}.{k}": v for k, v in self.optimizer.state.get(parameter, {}).items()}
        return tensors

    def load_state(self, tensors: dict[str, Tensor], nimg: int) -> None:
        """Go on from what `state` returned at `nimg` images seen."""
        self.net.load_state_dict(_with_prefix(tensors, "net."))
        self.ema.load_state_dict(_with_prefix(tensors, "ema."))
        for name, parameter in self.net.named_parameters():
            moments = _with_prefix(tensors, f"adam.{name}.")
            self.optimizer.state[parameter] = {k: v.to(self.device, copy=True) for k, v in moments.items()}
        self.nimg = nimg


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
