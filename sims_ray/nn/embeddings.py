"""Embeddings of the noise level."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PositionalEmbedding(nn.Module):
    """Sinusoidal embedding of a scalar: [B] to [B, channels], cosines before sines.

    `endpoint` makes the slowest frequency exactly 1 / max_positions.
    """

    def __init__(self, channels: int, max_positions: int = 10000, endpoint: bool = False) -> None:
        super().__init__()
        self.channels, self.max_positions, self.endpoint = channels, max_positions, endpoint

    def forward(self, x: Tensor) -> Tensor:
        """Embed c_noise [B]."""
        half = self.channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=x.device) / (half - self.endpoint)
        angles = x.to(torch.float32).outer((1 / self.max_positions) ** exponent)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Random Fourier features of a scalar: [B] to [B, channels], cosines before sines."""

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, x: Tensor) -> Tensor:
        """Embed c_noise [B]."""
        angles = x.to(torch.float32).outer(2 * math.pi * self.freqs)
        return torch.cat([angles.cos(), angles.sin()], dim=1)
