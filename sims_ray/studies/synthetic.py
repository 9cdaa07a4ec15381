"""A synthetic set of any model: what `sims data synthesize` makes, outside of a recipe's run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sims_ray.config import SamplerSettings
from sims_ray.config.labels import LabelSettings
from sims_ray.data.samples import IMAGE_CHANNELS
from sims_ray.data.synthetic import SyntheticSet
from sims_ray.diffusion.labels import check_labels
from sims_ray.diffusion.noise import SEED_LIMIT
from sims_ray.errors import SimsError
from sims_ray.stages.synthesize import SynthesisJob
from sims_ray.storage.artifacts import fingerprint, sha256_file
from sims_ray.storage.attributes import AttributeClassifier, AttributeSource
from sims_ray.storage.checkpoints import described, read_card
from sims_ray.storage.folders import Folder
from sims_ray.storage.latents import card_latents
from sims_ray.storage.models import SCORE, SimsModel
from sims_ray.studies.model_plan import label_content


def synthesis_job(
    out: str,
    model: SimsModel,
    sampler: SamplerSettings,
    seeds: range,
    *,
    labels: LabelSettings | None = None,
    attributes: AttributeSource | None = None,
    shard_nimg: int | None = None,
    precision: str = "auto",
) -> SynthesisJob:
    """The job that makes, goes on with, or extends the set at `out`.

    The set is named by the content of the checkpoints, not by their paths, and by what else its images depend on.

    Args:
        out: folder or URI of the set.
        model: what to sample from.
        sampler: sampler settings.
        seeds: one image each; the first one belongs to what the set is, their number does not.
        labels: which class each image gets; none for the draw from its own stream.
        attributes: classifier of a column `attribute`; none for no such column.
        shard_nimg: images per file; none for what a worker makes in 150 s.
        precision: dtype that the networks are forced to run in; 'auto' for none.

    Raises:
        SimsError: a checkpoint is missing, a seed is out of range, or labels or attributes do not fit the model.
    """
    if seeds.stop > SEED_LIMIT:
        raise SimsError(f"seed {seeds.stop - 1} is beyond {SEED_LIMIT - 1}; start lower, or make fewer images")
    card = read_card(Path(model.base))
    described(Path(model.base), card)
    network, latents = card["network"], card_latents(card)
    shape = (network["img_channels"], network["img_resolution"], network["img_resolution"])
    content: dict[str, Any] = {"sampler": sampler.model_dump(mode="json"), "first_seed": seeds.start}
    if labels is not None and labels.kind != "seed":
        content["labels"] = label_content(labels)
        check_labels(content["labels"], network["label_dim"])
    if attributes is not None:
        content["attributes"] = attributes.identity()
        AttributeClassifier.load(attributes).check(shape)
    if precision != "auto":
        content["forced_precision"] = precision
    parents = [fingerprint("base", {"sha256": sha256_file(Path(model.base))}, ())]
    if model.omega != 0 and model.aux is not None:
        aux = read_card(Path(model.aux))
        described(Path(model.aux), aux)
        if aux["network"] != network:
            raise SimsError(f"{model.aux} and {model.base} hold different networks; give an auxiliary of this base")
        content |= {"omega": model.omega}
        if model.omega != -1 and model.space != SCORE:
            content |= {"space": model.space}
        if model.omega != -1:
            content["guidance"] = {"sigma_lo": model.sigma_lo, "sigma_hi": model.sigma_hi}
        parents.append(fingerprint("auxiliary", {"sha256": sha256_file(Path(model.aux))}, ()))
    kind = "image" if shape[0] in IMAGE_CHANNELS and latents is None else "latent"
    settings = json.loads(json.dumps(content))  # as a manifest gives them back
    facts = {"latents": latents} if latents else {}
    target = SyntheticSet(Folder.at(out), settings, tuple(parents), shape, kind, facts)
    return SynthesisJob(target, model, len(seeds), shard_nimg, attributes)
