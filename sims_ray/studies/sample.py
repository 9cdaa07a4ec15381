"""Images from checkpoints, in this process: a grid or a folder of files."""

import json
from pathlib import Path

import torch
from PIL import Image

from sims_ray.config import SamplerSettings, load_recipe, presets
from sims_ray.data.contact_sheet import contact_sheet
from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.noise import SEED_LIMIT
from sims_ray.errors import SimsError
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


def sample_images(target: Path, model: SimsModel, seeds: range, sampler: SamplerSettings) -> float:
    """Write one image per seed: a grid if `target` ends in .png, else `<seed>.png` files in the folder `target`.

    Returns the network evaluations per image.

    Raises:
        SimsError: a checkpoint is missing or does not fit, or a seed is out of range.
    """
    if seeds.stop > SEED_LIMIT:
        raise SimsError(f"seed {seeds.stop - 1} is beyond {SEED_LIMIT - 1}; start lower")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    denoiser, card = model.load(device)
    network = card["network"]
    shape = (network["img_channels"], network["img_resolution"], network["img_resolution"])
    if shape[0] not in IMAGE_CHANNELS:
        raise SimsError(
            f"{model.base} makes {shape[0]} channels, not grey or RGB images; latents cannot be decoded here"
        )
    options = sampler.model_dump()
    batches = list(generate(denoiser, shape, seeds, options, label_dim=network["label_dim"], device=device))
    images, nfe = torch.cat([batch.images for batch in batches]).numpy(), batches[0].nfe
    if target.suffix.lower() == ".png":
        target.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images).save(target)
        return nfe
    target.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(target / f"{seed:010d}.png")
    return nfe
