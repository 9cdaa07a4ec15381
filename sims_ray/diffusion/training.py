"""One training run: its state, and a step that any number of workers compute alike.

Progress is counted in images seen. What a step is given is drawn for the whole global batch from (seed, nimg) and
sliced, dropout masks included, so the number of workers and the micro-batch never enter the mathematics.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sims_ray.diffusion.loss import DenoisingLoss
from sims_ray.diffusion.optimization import Optimization
from sims_ray.diffusion.order import TrainingData
from sims_ray.diffusion.steps import StepInputs, Steps
from sims_ray.nn.dropout import set_dropout_keys
from sims_ray.nn.ema import update_ema
from sims_ray.nn.networks import BLOCKS, trainable_parameters
from sims_ray.nn.precond import Precond

ADAM_EPS = 1e-8


class Training:
    """Network, weight averages, Adam and image count of one run.

    Args:
        net: network to train, on `device`, the same on every worker.
        settings: what a step depends on.
        data: this worker's slices of the global batches: uint8 images or float16 latents, on the host.
        rank, world_size: which slice of the global batch that is.
        channels_last: keep images and weights in that memory format, which the kernels of GPUs prefer.
        wrap: turns the module that computes the loss into one whose backward pass averages gradients (DDP).

    Raises:
        ValueError: the batch has fewer images than there are workers.
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
        channels_last: bool = False,
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        if settings.batch_size < world_size:
            raise ValueError(f"batch_size {settings.batch_size} is too small for {world_size} workers; change either")
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        net.to(memory_format=self._format)  # type: ignore[call-overload]
        self.net, self.settings, self.device = net, settings, device
        self.micro_batch: int | None = None  # most images per pass, whose gradients add up; None for all at once
        self._world_size = world_size
        self._steps = Steps(data, settings, net, device, rank, world_size)
        self.averages = {name: copy.deepcopy(net).eval().requires_grad_(False) for name in settings.averages}
        self._parameters = _train_only(
            net, trainable_parameters(net, settings.trainable, settings.trainable_resolution)
        )
        self.optimizer = torch.optim.Adam(
            self._parameters, lr=settings.lr, betas=settings.adam_betas, eps=ADAM_EPS, fused=True
        )
        self.nimg = 0
        self._module = DenoisingLoss(net.train())
        self._loss = wrap(self._module)
        self._losses = torch.zeros(2, dtype=torch.float64, device=device)  # sum and number of the finite ones

    @property
    def ema(self) -> Precond:
        """The weight average; of several the first."""
        return next(iter(self.averages.values()))

    def step(self) -> None:
        """Train on the next global batch; nothing here waits for the device."""
        s = self.settings
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(self._steps.at(self.nimg))
        self._apply_gradients()
        for std, average in zip(s.averages.values(), self.averages.values(), strict=True):
            update_ema(average, self.net, s.ema_decay(std, self.nimg))
        self.nimg += s.batch_size
        finite = losses.isfinite()
        self._losses += torch.stack([losses.where(finite, 0).sum(), finite.sum()])

    def compile(self, what: str) -> None:
        """Compile the residual 'blocks' or the 'whole' network on their next use, or nothing: 'off'."""
        if what == "whole":
            self._module.compile(dynamic=False)
        blocks = [module for module in self.net.modules() if what == "blocks" and isinstance(module, BLOCKS)]
        limits = torch._dynamo.config  # blocks share their code: each shape counts as another version of it
        limits.recompile_limit = max(limits.recompile_limit, 4 * len(blocks))
        for module in blocks:
            module.compile(dynamic=False)

    def warm_up(self, shape: tuple[int, ...], num_images: int) -> None:
        """Forward and backward passes on blank images [C, H, W], without effect; every worker must call it.

        Kernels are chosen and compiled now. DDP sums gradients in another order in its first step than in later ones:
        with this behind it, a run that goes on sums in the order of one that never stopped.
        """
        kept = {name: value.clone() for name, value in self.net.state_dict().items()}
        for _ in range(2):  # the second pass is the first in the final order
            self._backward(self._steps.blank(num_images, shape))
            self.optimizer.zero_grad(set_to_none=True)
        self.net.load_state_dict(kept)  # EDM2's networks normalise their weights in a forward pass

    def _backward(self, inputs: StepInputs) -> Tensor:
        """Add up the gradients of this worker's slice; returns the loss of each image, [B]."""
        scale = self.settings.loss_scale * self._world_size / self.settings.batch_size  # DDP averages over workers
        parts = list(inputs.parts(self.micro_batch))
        losses = []
        for number, part in enumerate(parts, 1):
            with nullcontext() if number == len(parts) else self._apart():
                losses.append(self._loss_of(part))
                (losses[-1].sum() * scale).backward()  # type: ignore[no-untyped-call]
        return torch.cat(losses).detach()

    def _apart(self) -> AbstractContextManager[Any]:
        """Backward passes in here are not averaged over the workers yet."""
        no_sync: Callable[[], AbstractContextManager[Any]] = getattr(self._loss, "no_sync", nullcontext)
        return no_sync()

    def _loss_of(self, part: StepInputs) -> Tensor:
        set_dropout_keys(self.net, part.dropout_keys)
        images, noise = (x.contiguous(memory_format=self._format) for x in (part.images, part.noise))
        losses: Tensor = self._loss(images, part.sigma, noise, part.labels, part.augment_labels)
        return losses if part.weights is None else losses * part.weights

    def _apply_gradients(self) -> None:
        s = self.settings
        for parameter in self._parameters:
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, 0.0, s.gradient_limit, -s.gradient_limit, out=parameter.grad)
        if s.gradient_clip:
            nn.utils.clip_grad_norm_(self._parameters, s.gradient_clip, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate(self.nimg)
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

    def load_moments(self, tensors: dict[str, Tensor]) -> None:
        """Go on with Adam's moments of another run, named as in `state`; a parameter that has none begins anew."""
        for name, parameter in self.net.named_parameters():
            moments = _with_prefix(tensors, f"adam.{name}.")
            if parameter.requires_grad and moments:
                self.optimizer.state[parameter] = {k: _like(v, parameter) for k, v in moments.items()}

    def load_state(self, tensors: dict[str, Tensor], nimg: int) -> None:
        """Go on from what `state` returned at `nimg` images seen."""
        self.net.load_state_dict(_with_prefix(tensors, "net."))
        for average, ema in self.averages.items():
            ema.load_state_dict(_with_prefix(tensors, f"{average}."))
        self.load_moments(tensors)
        self.nimg = nimg


def _like(moment: Tensor, parameter: nn.Parameter) -> Tensor:
    """A copy where the parameter is, in its memory format."""
    if moment.shape != parameter.shape:  # the count of steps
        return moment.to(parameter.device, copy=True)
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _train_only(net: Precond, names: set[str]) -> list[nn.Parameter]:
    """Freeze the other parameters; returns those named."""
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in names)
    return [parameter for parameter in net.parameters() if parameter.requires_grad]
