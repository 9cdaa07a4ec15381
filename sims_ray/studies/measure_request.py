"""What to measure, opened and looked through: what cannot be done is refused before any work.

Messages name the options of `sims measure`.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sims_ray.config import FeatureSettings, Recipe
from sims_ray.config.evaluation import FEWEST_TO_EXTRAPOLATE
from sims_ray.data.samples import KINDS
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.metrics.measures import NEIGHBOURS
from sims_ray.metrics.memorisation import PerceptualDistance
from sims_ray.stages.extractors import Extractor, load_extractor_of
from sims_ray.stages.features import absolute_weights, load_extractor
from sims_ray.stages.perceptual import LEAST_SIDE, lpips_distance, lpips_takes
from sims_ray.stages.table_features import Reference, check_column
from sims_ray.storage.folders import Folder
from sims_ray.studies.plan import Plan
from sims_ray.studies.set_metrics import USUAL, Column, Extra
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
        lpips: with `copies`, also LPIPS to the nearest real image.
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
    lpips: bool = False
    measures: tuple[Extra, ...] | None = None
    statistics: Path | None = None


class OpenRequest:
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
        self.perceptual: PerceptualDistance | None = None

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
        request, device = self.request, _device()
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
        if self.request.lpips:
            self.perceptual = lpips_distance(_device())

    def _check_wishes(self) -> None:
        request = self.request
        if request.images is None and request.statistics is None:
            raise SimsError("there is nothing to do; give a set of images, or --write-statistics FILE.npz")
        if self.statistics is not None:
            tables_only = {
                f"--measures {','.join(request.measures or ())}": request.measures,
                "--copies": request.copies,
                "--lpips": request.lpips,
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
        if request.lpips:
            self._check_lpips()

    def _check_lpips(self) -> None:
        if not self.request.copies:
            raise SimsError("--lpips is of each image and its nearest real one; give --copies too")
        if self.table is None or self.images is None:
            return
        shapes = f"{self.images.folder} holds {self.images.shape} and {self.table.folder} {self.table.shape}"
        if self.images.shape != self.table.shape or not lpips_takes(self.images.shape):
            raise SimsError(
                f"LPIPS compares images of one shape, grey or RGB, from {LEAST_SIDE} pixels on: {shapes}; leave out "
                f"--lpips, or import both at one size"
            )

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


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _lack(name: str, nimg: int, real_nimg: int, width: int) -> str | None:
    """Why a measure cannot be had; None if it can."""
    if name == "w2" and width > NARROW:
        return (
            f"W2 between n points is off by about n^(-1/F), which at F = {width:,} features no n makes small, so that "
            f"F = {NARROW} is the most"
        )
    found = nimg if name == "fd_inf" else min(nimg, real_nimg)
    return f"it takes {FEWEST[name]} images and there are {found}" if found < FEWEST[name] else None
