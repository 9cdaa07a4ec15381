"""Any set of images against real ones: the Fréchet distance and its kin, from one pass of features over each.

What can be seen to be wrong beforehand is refused before any work; messages name the options of `sims measure`.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sims_ray.config import ComputeSettings, FeatureSettings, Recipe
from sims_ray.config.evaluation import FEWEST_TO_EXTRAPOLATE
from sims_ray.data.contact_sheet import random_rows
from sims_ray.data.table import KINDS, SampleTable
from sims_ray.errors import SimsError
from sims_ray.metrics.measures import NEIGHBOURS
from sims_ray.metrics.reference import write_statistics
from sims_ray.metrics.spread import Spread
from sims_ray.stages.extractors import Extractor, load_extractor_of
from sims_ray.stages.features import absolute_weights, load_extractor, make_features
from sims_ray.stages.table_features import (
    FEWEST_KEPT,
    Reference,
    check_column,
    first_or_random_rows,
    table_features,
)
from sims_ray.storage.artifacts import Artifact
from sims_ray.storage.folders import Folder, atomic_path
from sims_ray.studies.plan import Plan
from sims_ray.studies.set_metrics import (
    USUAL,
    Column,
    Extra,
    Value,
    copy_values,
    group_values,
    overall_values,
    warn_of_few,
)
from sims_ray.studies.summary import RESULT

logger = logging.getLogger("sims_ray")

FEWEST = {"kid": 2, "manifold": NEIGHBOURS + 1, "fd_inf": FEWEST_TO_EXTRAPOLATE, "w2": 2, "copies": 3}
NARROW = 8  # features; the error of W2 from n points shrinks with n^(-1/F) (Fournier and Guillin 2015, theorem 1)
STATISTICS = ".npz"


@dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        images: the set, a sample table; None to write the reference's statistics only.
        against: a sample table, or a file of statistics (.npz); None: the real images of `run`.
        features: what distances are measured in; None: those of `run`; of points, their coordinates; else a classifier
            that is trained on the real images' labels.
        run: folder of a finished run.
        nimg: images of the set; None: all.
        per: also the distance of each class, or of each attribute.
        copies: also near copies of real images.
        measures: beside the distance; None: those that can be had.
        statistics: file to write the reference's mean and covariance to.
    """

    images: str | None
    against: str | None = None
    features: FeatureSettings | None = None
    run: Path | None = None
    nimg: int | None = None
    per: Column | None = None
    copies: bool = False
    measures: tuple[Extra, ...] | None = None
    statistics: Path | None = None


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
    work = _Work(request)
    try:
        work.check()
        with TemporaryDirectory() as scratch:
            return _measured(work, Path(scratch))
    except ValueError as error:  # what the metrics refuse
        raise SimsError(str(error)) from error


def _measured(work: _Work, scratch: Path) -> Measured:
    request = work.request
    extractor, reference = work.reference(scratch)
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
        values += copy_values(name, work.images, work.table, found, reference)
    return Measured(name, tuple(values), bias, work.described)


class _Work:
    """A request with what it names opened."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.plan = None if request.run is None else _plan_of(request.run)
        against = request.against if self.plan is None else request.against or self.plan.inputs.table
        if against is None:
            raise SimsError("nothing to measure against; give --against TABLE, --against FILE.npz or --run FOLDER")
        is_file = against.endswith(STATISTICS) or Path(against).is_file()
        self.statistics = Reference.of_file(against) if is_file else None
        self.table = None if is_file else SampleTable(against)
        self.images = None if request.images is None else SampleTable(request.images)
        self.nimg = 0 if self.images is None else len(self.images) if request.nimg is None else request.nimg
        self.against = against
        self.measures: tuple[Extra, ...] = ()

    @property
    def tables(self) -> list[SampleTable]:
        """Those that features are to be taken of."""
        return [table for table in (self.images, self.table) if table is not None]

    @property
    def described(self) -> dict[str, Any]:
        """The request as plain values."""
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.request).items()}
        settings = self.request.features and self.request.features.model_dump(mode="json")
        prints = {str(table.folder): table.fingerprint for table in self.tables}
        return {**plain, "features": settings, "nimg": self.nimg or None, "fingerprints": prints}

    @cached_property
    def extractor(self) -> Extractor | None:
        """The extractor; None where it is to be trained on the real images."""
        request, device = self.request, "cuda" if torch.cuda.is_available() else "cpu"
        latents = next((table for table in self.tables if table.kind == "latent"), None)
        if latents is not None:
            if math.prod(latents.shape) > NARROW or request.features is not None or self.plan is not None:
                raise SimsError(
                    f"{latents.folder} holds latents of shape {latents.shape}, and only points of up to {NARROW} "
                    f"numbers are measured as they are, without --features; decode with `sims data decode` first"
                )
            return load_extractor_of("identity")
        if self.plan is not None:
            return load_extractor(self.plan.features.path, device)
        settings = request.features or FeatureSettings()
        if settings.kind == "classifier":
            return None
        return load_extractor_of(settings.kind, absolute_weights(settings), device)

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            SimsError: with the reason.
        """
        self._check_wishes()
        self._check_tables()
        width = self._width() if self.extractor is not None else self._width_of_training()
        self.measures = self._possible(width)

    def _check_wishes(self) -> None:
        request = self.request
        if request.images is None and request.statistics is None:
            raise SimsError("there is nothing to do; give a set of images, or --write-statistics FILE.npz")
        if self.statistics is not None:
            tables_only = {
                f"--measures {','.join(request.measures or ())}": request.measures,
                "--copies": request.copies,
                f"--per {request.per}": request.per,
                "--write-statistics": request.statistics,
            }
            if refused := [option for option, given in tables_only.items() if given]:
                raise SimsError(
                    f"{self.against} holds a mean and a covariance, which give the Fréchet distance alone; leave out "
                    f"{' and '.join(refused)}, or give a table with --against"
                )
        if request.statistics is not None:
            if request.statistics.exists():
                raise SimsError(f"{request.statistics} exists; choose another name or remove it first")
            Folder.at(request.statistics.parent).check_writable()

    def _check_tables(self) -> None:
        request = self.request
        for table in self.tables:
            if len(table) < 2:
                raise SimsError(
                    f"{table.folder} has too few images to measure, {len(table)}; import or synthesize some"
                )
        if len({table.kind for table in self.tables}) > 1:
            found = " and ".join(f"{table.folder} holds {table.kind}s" for table in self.tables)
            raise SimsError(f"{found}; decode the latents with `sims data decode` first")
        if self.images is not None and not 2 <= self.nimg <= len(self.images):
            raise SimsError(f"{self.images.folder} has {len(self.images)} images; give --n from 2 to that")
        if request.per is not None and self.images is not None:
            for table in self.tables:
                check_column(table, request.per)

    def _width(self) -> int:
        """Width of the features, which must be the same on both sides."""
        widths: dict[str, int] = {}
        for table in self.tables:
            black = torch.zeros((1, *table.shape), dtype=getattr(torch, KINDS[table.kind].name))
            if self.extractor is not None:
                widths[str(table.folder)] = self.extractor.features(black).shape[1]
        if self.statistics is not None:
            widths[self.against] = len(self.statistics.moments.mean)
        if len(set(widths.values())) > 1:
            found = " and ".join(f"{where} has {width:,}" for where, width in widths.items())
            raise SimsError(
                f"features differ in width: {found}; give images of one shape, and statistics of these features"
            )
        return next(iter(widths.values()))

    def _width_of_training(self) -> int:
        """Width of the features of a classifier that can be trained on the real images."""
        table, images = self.table, self.images
        if table is None:
            raise SimsError(f"{self.against} has no images to train a classifier on; give --features inception")
        if table.num_classes < 2 or table.unlabelled:
            raise SimsError(
                f"{table.folder} has {table.num_classes} classes and {table.unlabelled} images without a label, which "
                f"no classifier can be trained on; give --features pixels, inception or dinov2"
            )
        if images is not None and images.shape != table.shape:
            raise SimsError(
                f"{images.folder} has images of shape {images.shape} and {table.folder} of {table.shape}, but a "
                f"classifier takes one shape; import both at one size, or give --features inception"
            )
        return (self.request.features or FeatureSettings()).feature_dim

    def _possible(self, width: int) -> tuple[Extra, ...]:
        """The measures that were asked for, or those that can be had."""
        if self.table is None or self.images is None:
            return ()
        asked = self.request.measures
        wanted = asked if asked is not None else (*USUAL, *(("w2",) if width <= NARROW else ()))
        lacks = {name: lack for name in wanted if (lack := _lack(name, self.nimg, len(self.table), width))}
        for name, lack in lacks.items():
            if asked is not None:
                raise SimsError(f"--measures {name} is not possible: {lack}; leave it out")
            logger.info("%s is left out: %s", name, lack)
        if self.request.copies and (lack := _lack("copies", self.nimg + FEWEST["copies"], len(self.table), width)):
            raise SimsError(f"--copies is not possible: {lack}; leave it out")
        return tuple(name for name in wanted if name not in lacks)

    def reference(self, scratch: Path) -> tuple[Extractor, Reference]:
        """The extractor, trained if it has to be, and what it makes of the real images."""
        request, kept_nimg = self.request, max(FEWEST_KEPT, 2 * self.nimg)
        whole = request.per is not None or request.copies
        cached = self.plan.features.path if self.plan is not None and request.against is None else None
        extractor = self.extractor
        if extractor is None:
            settings = (request.features or FeatureSettings()).model_copy(update={"reference_nimg": kept_nimg})
            made = Artifact(scratch / "features", "features", {}, ())
            make_features(made, settings, self.against, ComputeSettings(num_workers=0))
            extractor, cached = load_extractor(made.path), made.path
        if self.statistics is not None or self.table is None:
            return extractor, self.statistics or Reference.of_file(self.against)
        if cached is not None and not whole:
            return extractor, Reference.of_artifact(cached)
        keep = None if whole else random_rows(self.table, kept_nimg, seed=0)
        found = table_features(self.table, extractor, "features of the reference", keep=keep, column=request.per)
        reference = Reference.of_table(found, kept_nimg, whole)
        if cached is not None:  # whose statistics may be others than those of its images
            known = Reference.of_artifact(cached)
            reference = replace(reference, moments=known.moments, nimg=known.nimg)
        return extractor, reference


def _plan_of(out: Path) -> Plan:
    """The plan of a finished run, whose features are there."""
    path = out / RESULT
    try:
        recipe = Recipe.model_validate(json.loads(path.read_text())["settings"])
    except (OSError, KeyError, TypeError, ValueError):  # those of JSON and pydantic are ValueErrors
        raise SimsError(f"{path} is not the result of a run; finish `sims run` first, or give --features") from None
    plan = Plan(recipe, out)
    if not plan.features.complete:
        raise SimsError(f"{plan.features.path} is not there any more; run `sims run` again, or give --features")
    return plan


def _lack(name: str, nimg: int, real_nimg: int, width: int) -> str | None:
    """Why a measure cannot be had; None if it can."""
    if name == "w2" and width > NARROW:
        return (
            f"W2 between n points is off by about n^(-1/F), which at F = {width:,} features no n makes small, so that "
            f"F = {NARROW} is the most"
        )
    found = nimg if name == "fd_inf" else min(nimg, real_nimg)
    return f"it takes {FEWEST[name]} images and there are {found}" if found < FEWEST[name] else None
