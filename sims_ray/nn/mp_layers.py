"""Magnitude-preserving layers of EDM2 (Karras et al. 2024, arXiv 2312.02696).

Every layer keeps the expected magnitude of its input; weights are normalised in every forward pass (eq. 47, 66).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-4
SILU_MAGNITUDE = 0.596  # root mean square of silu of a standard normal


def normalize(x: Tensor, dim: Sequence[int] | None = None, eps: float = NORM_EPS) -> Tensor:
    """Divide by the root mean square over `dim`, by default all axes but the first (EDM2 eq. 53)."""
    axes = list(range(1, x.ndim)) if dim is None else list(dim)
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=torch.float32)
    norm = eps + norm * math.sqrt(norm.numel() / max(x.numel(), 1))
    unit: Tensor = x / norm.to(x.dtype)
    return unit


def mp_silu(x: Tensor) -> Tensor:
    """Magnitude-preserving SiLU (EDM2 eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Magnitude-preserving mix of two tensors, with share `t` of the second (EDM2 eq. 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Magnitude-preserving concatenation of channels, with share `t` of the second (EDM2 eq. 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale / math.sqrt(n_a) * (1 - t)), b * (scale / math.sqrt(n_b) * t)], dim=1)


class MPFourier(nn.Module):
    """Magnitude-preserving random Fourier features of a scalar: [B] to [B, channels] (EDM2 eq. 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels) * bandwidth)
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Embed c_noise [B], in float32."""
        return (x.to(torch.float32).outer(self.freqs) + self.phases).cos() * math.sqrt(2)


class MPConv(nn.Module):
    """Convolution or linear map without bias whose weight rows act with unit magnitude (EDM2 eq. 47, 66).

    In training mode a weight that requires gradients is normalised in place before use, so that its gradient
    steps keep their relative size; a frozen one is left alone.

    Args:
        in_channels, out_channels: widths.
        kernel: () for a linear map, (k, k) for a convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Sequence[int] = ()) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Map [B, in_channels, ...] to [B, out_channels, ...]."""
        w = self.weight.to(torch.float32)
        if self.training and self.weight.requires_grad:
            with torch.no_grad():
                self.weight.copy_(normalize(w))
        w = normalize(w) * (gain / math.sqrt(w[0].numel()))
        w = w.to(x.dtype)
        if w.ndim == 2:
            return F.linear(x, w)
        return F.conv2d(x, w, padding=w.shape[-1] // 2)
