"""What a denoiser is, and how its evaluations are counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


class Denoiser(Protocol):
    """D(x, sigma, labels): the estimate of the clean image, [B, C, H, W] to [B, C, H, W]."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """Denoise x [B, C, H, W] at noise level sigma [B] given one-hot labels [B, K]."""
        ...


@runtime_checkable
class Stepwise(Protocol):
    """A denoiser that depends on the solver's step, like guidance that acts in an interval only."""

    def at_step(self, sigma: float, /) -> Denoiser:
        """The denoiser of every evaluation in the step that starts at noise level `sigma`."""
        ...


def at_step(denoiser: Denoiser, sigma: float) -> Denoiser:
    """The denoiser of the step that starts at `sigma`; most are the same in every step."""
    return denoiser.at_step(sigma) if isinstance(denoiser, Stepwise) else denoiser


@dataclass
class Evaluations:
    """Network evaluations of one batch; every image of the batch takes part in each.

    Attributes:
        encoders, decoders: passes through each half of a network.
    """

    encoders: int = 0
    decoders: int = 0

    @property
    def nfe(self) -> float:
        """Network evaluations per image; a pass through half a network counts one half."""
        return (self.encoders + self.decoders) / 2

    def record(self, encoders: int = 1, decoders: int = 1) -> None:
        """Count passes."""
        self.encoders += encoders
        self.decoders += decoders


_counted: ContextVar[Evaluations | None] = ContextVar("evaluations", default=None)


@contextmanager
def count_evaluations() -> Iterator[Evaluations]:
    """Count the network evaluations that `evaluate` makes inside the block, in this thread.

    Blocks add up: what a sampler counts, a block around it counts too.
    """
    tally = Evaluations()
    token = _counted.set(tally)
    try:
        yield tally
    finally:
        _counted.reset(token)
        record(tally.encoders, tally.decoders)


@contextmanager
def uncounted() -> Iterator[None]:
    """Count nothing inside the block: for more of a pass that was counted already."""
    token = _counted.set(None)
    try:
        yield
    finally:
        _counted.reset(token)


def evaluate(denoiser: Denoiser, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
    """Call a denoiser and count it: as one network, unless it counts its networks itself through this function."""
    tally = _counted.get()
    before = tally.nfe if tally else 0.0
    denoised = denoiser(x, sigma, labels)
    if tally is not None and tally.nfe == before:
        tally.record()
    return denoised


def record(encoders: int, decoders: int) -> None:
    """Count passes through halves of a network that were made without `evaluate`."""
    if (tally := _counted.get()) is not None:
        tally.record(encoders, decoders)
