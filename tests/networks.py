"""Small networks whose weights are far from their near-zero initial values, so that every input matters."""

from typing import Any

import torch

from sims_ray.nn.networks import build_network
from sims_ray.nn.precond import Precond

SETTINGS = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 0, "augment_dim": 0, "model_channels": 8,
    "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0, "sigma_data": 0.5,
}  # fmt: skip


def small_network(seed: int = 0, **settings: Any) -> Precond:
    """A denoiser of 8x8 grey images in eval mode; `settings` override `SETTINGS`."""
    net = build_network({**SETTINGS, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))
    return net.eval().requires_grad_(False)
