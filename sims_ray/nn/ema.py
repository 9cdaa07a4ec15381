"""Exponential moving average of weights with a half-life counted in images."""

import torch
from torch import nn


def ema_beta(nimg: int, batch_size: int, halflife_nimg: float, rampup_ratio: float | None) -> float:
    """Decay of one step: 0.5**(batch_size / h), h = min(halflife_nimg, rampup_ratio * nimg).

    With a ramp-up ratio the average is short while training is young, so that the random initial weights
    are forgotten (EDM, arXiv 2206.00364, App. F.2; `nimg` counts the images before this step).
    """
    if rampup_ratio is not None:
        halflife_nimg = min(halflife_nimg, nimg * rampup_ratio)
    return float(0.5 ** (batch_size / max(halflife_nimg, 1e-8)))


@torch.no_grad()
def update_ema(ema: nn.Module, net: nn.Module, beta: float) -> None:
    """Move every parameter of `ema` to beta * ema + (1 - beta) * net; copy the buffers."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - beta)
    for target, source in zip(ema.buffers(), net.buffers(), strict=True):
        target.copy_(source)
