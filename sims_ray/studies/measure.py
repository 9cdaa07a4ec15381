"""Any set of images against real ones: the Fréchet distance and its kin, from one pass of features over each."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sims_ray.config import ComputeSettings, FeatureSettings
from sims_ray.data.contact_sheet import random_rows
from sims_ray.errors import SimsError
from sims_ray.metrics.reference import write_statistics
from sims_ray.metrics.spread import Spread
from sims_ray.stages.extractors import Extractor
from sims_ray.stages.features import load_extractor, make_features
from sims_ray.stages.table_features import FEWEST_KEPT, Reference, first_or_random_rows, table_features
from sims_ray.storage.artifacts import Artifact
from sims_ray.storage.beside import atomic_path
from sims_ray.studies.measure_request import OpenRequest, Request
from sims_ray.studies.set_metrics import Value, copy_values, group_values, overall_values, warn_of_few

logger = logging.getLogger("sims_ray")


@dataclass(frozen=True)
class Measured:
    """What was found.

    Attributes:
        features: name of the features.
        values: the distance first; empty without a set.
        bias: the distance that as few real images have to the others; None where the reference cannot say.
        settings: the request, and the tables' fingerprints.
    """

    features: str
    values: tuple[Value, ...]
    bias: Spread | None
    settings: dict[str, Any]

    @property
    def plain(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return asdict(self)


def measure_images(request: Request) -> Measured:
    """Measure a set of images, and write the reference's statistics where that is asked for.

    In memory are the features of the set; of twice as many real images, of all of them for groups and near copies.

    Raises:
        SimsError: a request that cannot be met, before any work; or images or features that cannot be used.
    """
    work = OpenRequest(request)
    try:
        work.check()
        with TemporaryDirectory() as scratch:
            return _measured(work, Path(scratch))
    except ValueError as error:  # what the metrics refuse
        raise SimsError(str(error)) from error


def _measured(work: OpenRequest, scratch: Path) -> Measured:
    request = work.request
    extractor, reference = _reference(work, scratch)
    name = extractor.name
    if request.statistics is not None:
        with atomic_path(request.statistics) as beside:
            write_statistics(beside, reference.moments)
    if work.images is None:
        return Measured(name, (), None, work.described)
    rows = first_or_random_rows(work.images, work.nimg)
    found = table_features(work.images, extractor, "features of the set", rows=rows, column=request.per)
    more = [*work.measures, *([request.per] if request.per else []), *(["copies"] if request.copies else [])]
    logger.info("measuring %s", ", ".join(["fd", *more]))
    values = list(overall_values(name, found, reference, work.measures))
    bias = warn_of_few(values[0].metric, values[0].value or 0.0, reference.features, work.nimg)
    if request.per is not None:
        values += group_values(name, found, reference, request.per)
    if request.copies and work.table is not None:
        values += copy_values(name, work.images, work.table, found, reference, work.perceptual)
    return Measured(name, tuple(values), bias, work.described)


def _reference(work: OpenRequest, scratch: Path) -> tuple[Extractor, Reference]:
    """The extractor, trained if it has to be, and what it makes of the real images."""
    request, kept_nimg = work.request, max(FEWEST_KEPT, 2 * work.nimg)
    whole = request.per is not None or request.copies
    cached = work.plan.features.path if work.plan is not None and request.against is None else None
    extractor = work.extractor
    if extractor is None:
        settings = (request.features or FeatureSettings()).model_copy(update={"reference_nimg": kept_nimg})
        made = Artifact(scratch / "features", "features", {}, ())
        make_features(made, settings, work.against, ComputeSettings(num_workers=0))
        extractor, cached = load_extractor(made.path), made.path
    if work.statistics is not None or work.table is None:
        return extractor, work.statistics or Reference.of_file(work.against)
    if cached is not None and not whole:
        return extractor, Reference.of_artifact(cached)
    keep = None if whole else random_rows(work.table, kept_nimg, seed=0)
    found = table_features(work.table, extractor, "features of the reference", keep=keep, column=request.per)
    reference = Reference.of_table(found, kept_nimg, whole)
    if cached is not None:  # whose statistics may be others than those of its images
        known = Reference.of_artifact(cached)
        reference = replace(reference, moments=known.moments, nimg=known.nimg)
    return extractor, reference
