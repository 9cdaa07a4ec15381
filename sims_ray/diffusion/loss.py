"""EDM's training objective."""

import torch
from torch import Tensor, nn


def draw_noise(
    generator: torch.Generator, batch_size: int, shape: tuple[int, ...], P_mean: float, P_std: float
) -> tuple[Tensor, Tensor]:
    """Noise levels [B], ln sigma ~ N(P_mean, P_std^2), and unit noise [B, *shape] for one global batch."""
    sigma = (torch.randn(batch_size, generator=generator) * P_std + P_mean).exp()
    return sigma, torch.randn(batch_size, *shape, generator=generator)


def edm_loss(
    net: nn.Module, images: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor | None, sigma_data: float
) -> Tensor:
    """Weighted denoising error per image: lambda(sigma) |D(y + sigma n; sigma) - y|^2, summed over pixels: [B].

    lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (EDM, arXiv 2206.00364, eq. 8 and table 1).

    Args:
        net: the preconditioned denoiser.
        images: clean images y in [-1, 1], [B, C, H, W].
        sigma: noise levels [B].
        noise: unit noise n [B, C, H, W].
        labels: one-hot [B, K] or None.
        sigma_data: standard deviation of the data.
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    denoised = net(images + sigma.reshape(-1, 1, 1, 1) * noise, sigma, labels)
    error: Tensor = ((denoised - images) ** 2).flatten(1).sum(1)
    return weight * error
