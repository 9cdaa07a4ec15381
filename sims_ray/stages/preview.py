"""What training shows of itself while it runs: images from fixed seeds, and if wanted their distance to the real ones.

With Ray it is a validation task of Ray Train, so that training goes on meanwhile.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sims_ray.config import ComputeSettings
from sims_ray.data.contact_sheet import contact_sheet, save_sheet
from sims_ray.diffusion.generate import Batch
from sims_ray.metrics.features import images_moments
from sims_ray.metrics.frechet import frechet_distance
from sims_ray.stages.extractors import FD, metric_name
from sims_ray.stages.features import feature_name, load_extractor, load_reference
from sims_ray.stages.sampling import ImageSampler
from sims_ray.storage.models import SimsModel

PREVIEWS = "previews.jsonl"
SHEETS = "samples-*.png"
MODEL = "model.safetensors"
SHEET_NIMG = 64


@dataclass(frozen=True)
class Preview:
    """What to show.

    Attributes:
        every_kimg: images of training between two previews.
        sampler: sampler settings.
        seeds: one image each; the first 64 are shown.
        features: folder of the features artifact that the distance of all of them is measured in; None for no distance.
        compute: how to sample.
    """

    every_kimg: float
    sampler: Mapping[str, Any]
    seeds: range
    features: Path | None
    compute: ComputeSettings


def sheet_name(nimg: int) -> str:
    """File name of the images at `nimg` images seen."""
    return f"samples-{nimg:012d}.png"


def show(preview: Preview, model: Path, folder: Path, nimg: int) -> dict[str, float]:
    """Sample, leave the images in `folder` and a line with the distance; returns the line.

    Args:
        preview: what to show.
        model: checkpoint to sample from.
        folder: the training artifact's.
        nimg: images seen by the checkpoint.
    """
    shown: list[Batch] = []
    batches = ImageSampler(preview.compute).batches(SimsModel.of(model), preview.seeds, preview.sampler)
    row = {"nimg": float(nimg), **_distance(preview, _noted(batches, shown))}
    images = np.concatenate([batch.images.numpy() for batch in shown])[:SHEET_NIMG]
    if images.dtype == np.uint8:  # latents cannot be seen
        save_sheet(contact_sheet(images), folder / sheet_name(nimg))
    with (folder / PREVIEWS).open("a") as file:
        file.write(json.dumps(row) + "\n")
    return row


def read_previews(folder: Path) -> list[dict[str, float]]:
    """What `show` left in a folder, in order of images seen; of repeated previews the last one counts."""
    path = folder / PREVIEWS
    rows: dict[float, dict[str, float]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(json.JSONDecodeError):  # a line that is being written
            row = json.loads(line)
            rows[row["nimg"]] = row
    return [rows[nimg] for nimg in sorted(rows)]


def _distance(preview: Preview, batches: Iterator[Batch]) -> dict[str, float]:
    """The Fréchet distance by its name, where it is wanted; goes through all batches in any case."""
    if preview.features is None:
        for _ in batches:
            pass
        return {}
    moments = images_moments(load_extractor(preview.features).features, (batch.images for batch in batches))
    name = metric_name(feature_name(preview.features), FD, len(preview.seeds))
    return {name: frechet_distance(moments, load_reference(preview.features))}


def _noted(batches: Iterator[Batch], shown: list[Batch]) -> Iterator[Batch]:
    """The batches; those that will be shown are kept."""
    for batch in batches:
        if sum(len(kept.seeds) for kept in shown) < SHEET_NIMG:
            shown.append(batch)
        yield batch


def validate(checkpoint: Any, preview: Preview, folder: str, nimg: int) -> dict[str, float]:
    """`show`, as a validation function of Ray Train."""
    with checkpoint.as_directory() as directory:
        return show(preview, Path(directory) / MODEL, Path(folder), nimg)
