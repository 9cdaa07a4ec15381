"""Images of a model in this process, as a person sees them: latents are decoded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sims_ray.data.decode import LatentDecoder
from sims_ray.data.samples import IMAGE_CHANNELS
from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.noise import SEED_LIMIT
from sims_ray.errors import SimsError
from sims_ray.storage.latents import card_latents, choose_latents
from sims_ray.storage.models import SimsModel


def images_of(
    model: SimsModel,
    seeds: range,
    sampler: Mapping[str, Any],
    vae: str | None = None,
    latents: str | None = None,
) -> tuple[NDArray[np.uint8], float]:
    """One image per seed, uint8 [N, C, H, W], and the network evaluations that each of them took.

    Latents are decoded; `vae` and `latents` go before what the card of the base says of them, see `choose_latents`.

    Raises:
        SimsError: a checkpoint or the VAE is missing or does not fit, or a seed is out of range.
    """
    if seeds.stop > SEED_LIMIT:
        raise SimsError(f"seed {seeds.stop - 1} is beyond {SEED_LIMIT - 1}; start lower")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser, card = model.load(device)
    network = card["network"]
    shape = (network["img_channels"], network["img_resolution"], network["img_resolution"])
    decoder = _decoder(model.base, card, vae, latents, device)
    batches = generate(
        denoiser, shape, seeds, sampler, label_dim=network["label_dim"], device=device, latents=decoder is not None
    )
    try:
        made = [(decoder.decode(batch.images) if decoder else batch.images, batch.nfe) for batch in batches]
    except ValueError as error:
        if decoder is None:
            raise
        raise SimsError(f"{model.base}: {error}; take another sampler, or guide less") from None
    return torch.cat([image for image, _ in made]).numpy(), made[0][1]


def _decoder(
    base: str, card: Mapping[str, Any], vae: str | None, latents: str | None, device: str
) -> LatentDecoder | None:
    """What turns the model's latents into images; None for a model of images."""
    channels, stored = card["network"]["img_channels"], card_latents(card)
    if channels in IMAGE_CHANNELS and stored is None and vae is None and latents is None:
        return None
    if stored is None and vae is None and latents is None:
        raise SimsError(
            f"{base} makes {channels} channels, not grey or RGB images, and its card does not say how to decode them; "
            f"give --vae"
        )
    decoder = LatentDecoder(choose_latents(stored, latents, vae, base), device)
    decoder.files.image_shape((channels, 1, 1))
    return decoder
