"""The training objectives of EDM and EDM2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sims_ray.nn.precond import EDM2Precond, Precond


def draw_noise(
    generator: torch.Generator, batch_size: int, shape: tuple[int, ...], P_mean: float, P_std: float
) -> tuple[Tensor, Tensor]:
    """Noise levels [B], ln sigma ~ N(P_mean, P_std^2), and unit noise [B, *shape] for one global batch."""
    sigma = (torch.randn(batch_size, generator=generator) * P_std + P_mean).exp()
    return sigma, torch.randn(batch_size, *shape, generator=generator)


class DenoisingLoss(nn.Module):
    """Denoising error of a network, per image; a module, so that it can be wrapped for distributed training.

    EDM (arXiv 2206.00364, eq. 8): lambda |D(y + sigma n; sigma) - y|^2 summed over pixels, with
    lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2. A network with a learned uncertainty u(sigma) has
    every pixel's term divided by e^u and increased by u (EDM2, arXiv 2312.02696, eq. 21).

    Args:
        net: the preconditioned denoiser.
    """

    def __init__(self, net: Precond) -> None:
        super().__init__()
        self.net = net

    def forward(
        self,
        images: Tensor,
        sigma: Tensor,
        noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of each image: [B].

        Args:
            images: clean images y in [-1, 1], [B, C, H, W].
            sigma: noise levels [B].
            noise: unit noise n [B, C, H, W].
            labels: one-hot [B, K] or None.
            augment_labels: what augmentation did to each image [B, 9], or None.
        """
        sigma_data = self.net.sigma_data
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        denoised = self.net(images + sigma.reshape(-1, 1, 1, 1) * noise, sigma, labels, augment_labels)
        error: Tensor = weight * ((denoised - images) ** 2).flatten(1).sum(1)
        if not isinstance(self.net, EDM2Precond):
            return error
        logvar = self.net.logvar(sigma)
        return error / logvar.exp() + logvar * images[0].numel()
