"""EDM preconditioning: a raw network becomes a denoiser D(x; sigma)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sims_ray.nn.song_unet import SongUNet


class EDMPrecond(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM, arXiv 2206.00364, eq. 7 and table 1).

    Args:
        model: raw network F(x, c_noise, labels, augment_labels).
        label_dim: number of classes K; 0 for unconditional.
        sigma_data: standard deviation of the training images, in [-1, 1] units.
    """

    def __init__(self, model: nn.Module, label_dim: int = 0, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.model = model
        self.label_dim = label_dim
        self.sigma_data = sigma_data

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Estimate the clean image from x [B, C, H, W] at sigma [B]; labels are one-hot [B, K]."""
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1).expand(x.shape[0], -1, -1, -1)
        if self.label_dim == 0:
            labels = None
        elif labels is None:
            labels = torch.zeros(x.shape[0], self.label_dim, device=x.device)
        else:
            labels = labels.to(torch.float32).reshape(-1, self.label_dim)
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        c_noise = sigma.flatten().log() / 4
        f_x: Tensor = self.model(c_in * x, c_noise, labels, augment_labels)
        return c_skip * x + c_out * f_x


def build_network(settings: Mapping[str, Any]) -> EDMPrecond:
    """Build the preconditioned network that `settings` (the `network` entry of a checkpoint card) describes.

    Keys: those of `SongUNet` plus `sigma_data`.
    """
    options = dict(settings)
    sigma_data = options.pop("sigma_data")
    return EDMPrecond(SongUNet(**options), options["label_dim"], sigma_data)
