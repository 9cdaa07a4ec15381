"""Small networks whose weights are far from their near-zero initial values, so that every input matters."""

from typing import Any

import torch

from sims_ray.nn.networks import build_network
from sims_ray.nn.precond import Precond

SETTINGS = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 0, "augment_dim": 0, "model_channels": 8,
    "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.0, "sigma_data": 0.5,
}  # fmt: skip
NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
# Every architecture by name: what `small_network` takes.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ddpmpp": {"architecture": "song_unet"},
    "ncsnpp": {"architecture": "song_unet", **NCSNPP},
    "adm": {"architecture": "adm_unet", "channels_per_head": 4},
    "edm2": {"architecture": "edm2_unet", "channels_per_head": 4},
}


def small_network(seed: int = 0, **settings: Any) -> Precond:
    """A denoiser of 8x8 grey images in eval mode; `settings` override `SETTINGS`."""
    settings = {**SETTINGS, **settings}
    if settings.get("architecture") == "edm2_unet":  # it knows no augmentation
        del settings["augment_dim"]
    net = build_network(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator) + (parameter.ndim <= 1))
        for buffer in net.buffers():  # random frequencies and phases come from the global stream
            if buffer.ndim == 1:
                buffer.copy_(4 * torch.randn(buffer.shape, generator=generator))
    return net.eval().requires_grad_(False)
