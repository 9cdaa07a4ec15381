"""Images from checkpoints, in this process: a grid or a folder of files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sims_ray.config import SamplerSettings, load_recipe, presets
from sims_ray.data.contact_sheet import contact_sheet
from sims_ray.data.decode import LatentDecoder
from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.noise import SEED_LIMIT
from sims_ray.errors import SimsError
from sims_ray.storage.latents import card_latents, choose_latents
from sims_ray.storage.models import SimsModel
from sims_ray.studies.inputs import IMAGE_CHANNELS
from sims_ray.studies.summary import RESULT


def model_of_run(out: Path, name: str) -> tuple[SimsModel, SamplerSettings]:
    """A model of a finished run by its name in the table, and the sampler it was measured with.

    Raises:
        SimsError: the folder holds no result, or no model of that name.
    """
    path = out / RESULT
    try:
        summary = json.loads(path.read_text())
        known = summary["models"]
    except (FileNotFoundError, KeyError, json.JSONDecodeError):
        raise SimsError(f"{path} is not the result of a run; finish `sims run` first, or give --base") from None
    if name not in known:
        raise SimsError(f"{out} has no model {name!r}; choose one of {', '.join(known)}")
    paths = known[name]
    base, aux = out / paths["base"], paths["aux"] and out / paths["aux"]
    model = SimsModel.of(base, aux, paths["omega"], paths["sigma_lo"], paths["sigma_hi"])
    return model, SamplerSettings(**summary["settings"]["sampler"])


def sampler_of_preset(name: str) -> SamplerSettings:
    """The sampler of a published model.

    Raises:
        SimsError: no such preset.
    """
    if name not in presets():
        raise SimsError(f"no preset {name!r}; `sims presets` lists them")
    return load_recipe(name).sampler


def sample_images(
    target: Path,
    model: SimsModel,
    seeds: range,
    sampler: SamplerSettings,
    vae: str | None = None,
    latents: str | None = None,
) -> float:
    """Write one image per seed: a grid if `target` ends in .png, else `<seed>.png` files in the folder `target`.

    Latents are decoded; `vae` and `latents` go before what the card of the base says of them, see `choose_latents`.

    Returns the network evaluations per image.

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
    options = sampler.model_dump()
    batches = generate(
        denoiser, shape, seeds, options, label_dim=network["label_dim"], device=device, latents=decoder is not None
    )
    try:
        made = [(decoder.decode(batch.images) if decoder else batch.images, batch.nfe) for batch in batches]
    except ValueError as error:
        if decoder is None:
            raise
        raise SimsError(f"{model.base}: {error}; take another sampler, or guide less") from None
    images, nfe = torch.cat([image for image, _ in made]).numpy(), made[0][1]
    if target.suffix.lower() == ".png":
        target.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images).save(target)
        return nfe
    target.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(target / f"{seed:010d}.png")
    return nfe


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
