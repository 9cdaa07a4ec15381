"""Images from checkpoints, in this process: a grid or a folder of files."""

import json
from pathlib import Path

from PIL import Image

from sims_ray.config import SamplerSettings, load_recipe, presets
from sims_ray.data.contact_sheet import contact_sheet
from sims_ray.errors import SimsError
from sims_ray.stages.images import images_of
from sims_ray.storage.models import SCORE, SimsModel
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
    space = paths.get("space", SCORE)
    model = SimsModel.of(base, aux, paths["omega"], paths["sigma_lo"], paths["sigma_hi"], space)
    steps = {"num_steps": paths["num_steps"]} if "num_steps" in paths else {}
    return model, SamplerSettings(**{**summary["settings"]["sampler"], **steps})


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

    Returns the network evaluations per image.

    Raises:
        SimsError: as `images_of`.
    """
    images, nfe = images_of(model, seeds, sampler.model_dump(), vae, latents)
    if target.suffix.lower() == ".png":
        target.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(images).save(target)
        return nfe
    target.mkdir(parents=True, exist_ok=True)
    for seed, image in zip(seeds, images, strict=True):
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(target / f"{seed:010d}.png")
    return nfe
