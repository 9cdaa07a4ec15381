"""The metrics of a set of images from its features and the real images': overall, per group, near copies."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sims_ray.data.contact_sheet import read_rows
from sims_ray.data.samples import NO_LABEL
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.metrics.frechet import frechet_distance
from sims_ray.metrics.measures import MANIFOLD, Measure, measure
from sims_ray.metrics.memorisation import (
    CopyRule,
    NearCopies,
    PerceptualDistance,
    mean_perceptual_distance_to_nearest,
    mean_ssim_to_nearest,
    near_copies,
    training_copies,
)
from sims_ray.metrics.moments import Moments, grouped_moments
from sims_ray.metrics.neighbours import Features
from sims_ray.metrics.spread import MOST_PARTS, Spread, small_n_bias
from sims_ray.metrics.wasserstein import MOST_POINTS, sliced_squared_wasserstein, squared_wasserstein
from sims_ray.stages.extractors import FD, metric_name
from sims_ray.stages.table_features import FEWEST_KEPT, Reference, TableFeatures

logger = logging.getLogger("sims_ray")

Extra = Literal["kid", "manifold", "fd_inf", "w2"]
Column = Literal["label", "attribute"]

USUAL: tuple[Measure, ...] = ("kid", "manifold", "fd_inf")
WIDE = 512  # features; from here on fewer parts of the reference are compared: the time grows with F^3
PARTS_OF_WIDE = 3
GROUP_BYTES = 1 << 30  # of moments of groups at a time
SSIM_BYTES = 1 << 30  # of images on each side
BIAS_SHOWN = 0.01  # of the distance: less than that is told, but no warning
ALIKE = "at most a third as far from the nearest real image as from the next"
NEAREST = "mean, to the nearest real image"

Groups = NDArray[np.int32]


@dataclass(frozen=True)
class Value:
    """One number.

    Attributes:
        metric: its name, with features and number of images.
        value: None where there is none, for the reason in `note`.
        of: the images that it is of: 'all', or a class or attribute.
        reference_nimg: real images behind it; None where a file does not say.
        note: what one must know of it.
    """

    metric: str
    value: float | None
    of: str = "all"
    reference_nimg: int | None = None
    note: str = ""


def warn_of_few(metric: str, distance: float, real: Features, nimg: int) -> Spread | None:
    """What a Fréchet distance of so few images shows where it should show 0, told in the log.

    Args:
        metric: name of the distance.
        distance: its value.
        real: features of real images [M, F]; fewer than 2 `nimg` of them cannot say.
        nimg: images that the distance is of.

    Returns:
        The bias, as `small_n_bias` measures it; None where nothing can be told.
    """
    if len(real) < 2 * nimg:
        return None
    bias = small_n_bias(real, nimg, max_parts=MOST_PARTS if real.shape[1] <= WIDE else PARTS_OF_WIDE)
    logger.log(
        logging.WARNING if bias.mean > BIAS_SHOWN * distance else logging.INFO,
        "%s is %.4g, and as many real images are at about %.4g (standard error %.2g) from the others, which is the "
        "bias of few images; compare at equal numbers only, measure more images, or take fd_inf, at infinitely many",
        metric,
        distance,
        bias.mean,
        bias.standard_error or 0.0,
    )
    return bias


def overall_values(name: str, found: TableFeatures, reference: Reference, measures: Sequence[Extra]) -> Iterator[Value]:
    """The Fréchet distance, then what else was asked for.

    Args:
        name: of the features.
        found: of the set, with the features of all its images.
        reference: with features, unless there are no measures.
        measures: beside the distance.

    Raises:
        ValueError: too few images for a measure, or features that are not finite.
    """
    nimg, real = found.moments.n, reference.features
    distance = frechet_distance(found.moments, reference.moments)
    yield Value(metric_name(name, FD, nimg), distance, reference_nimg=reference.nimg)
    several, mine = real[: max(FEWEST_KEPT, nimg)], found.features
    # Where only some of them are taken, the first ones must be a fair choice.
    if nimg > len(several) or ("w2" in measures and nimg > MOST_POINTS):
        mine = mine[np.random.default_rng(0).permutation(nimg)]
    for key, value in measure([m for m in USUAL if m in measures], mine, several, reference.moments).items():
        shown = min(nimg, len(several)) if key in MANIFOLD else nimg
        behind = {"kid": len(several), "fd_inf": reference.nimg}.get(key, shown)
        yield Value(metric_name(name, key, shown), value, reference_nimg=behind)
    if "w2" in measures:
        pairs = min(nimg, len(real), MOST_POINTS)
        for key, take in (("w2", squared_wasserstein), ("sliced_w2", sliced_squared_wasserstein)):
            value = take(mine[:pairs], real[:pairs])
            yield Value(metric_name(name, key, pairs), value, reference_nimg=pairs, note="squared")


def group_values(name: str, found: TableFeatures, reference: Reference, column: Column) -> Iterator[Value]:
    """The Fréchet distance of each class or attribute to the same one of the real images.

    Args:
        name: of the features.
        found: of the set, grouped by `column`.
        reference: of a whole table, grouped likewise.
        column: what the groups are.

    Raises:
        SimsError: a side is not grouped.
    """
    theirs = reference.whole
    if found.groups is None or theirs is None or theirs.groups is None:
        raise SimsError(f"the images are not grouped by {column}; give a table with --against")
    width = found.features.shape[1]
    groups = np.union1d(found.groups, theirs.groups)
    at_once = max(1, GROUP_BYTES // (2 * 8 * width**2))
    for some in np.split(groups, range(at_once, len(groups), at_once)):
        mine = _moments_of(found.features, found.groups, some)
        real = _moments_of(theirs.features, theirs.groups, some)
        for group in map(int, some):
            of = f"{column} {'none' if group == NO_LABEL else group}"
            yield _group_value(name, of, width, mine.get(group), real.get(group))


def _moments_of(features: Features, groups: Groups, some: Groups) -> dict[int, Moments]:
    chosen = np.isin(groups, some)
    return grouped_moments(features[chosen], groups[chosen])


def _group_value(name: str, of: str, width: int, mine: Moments | None, real: Moments | None) -> Value:
    n, m = (0 if side is None else side.n for side in (mine, real))
    metric = metric_name(name, FD, n) if n else f"{FD}_{name}@0"
    if mine is None or real is None or min(n, m) < 2:
        return Value(metric, None, of, m, "fewer than 2 images on a side")
    note = f"rank-deficient, so far too high: wants more than {width:,} images on each side"
    return Value(metric, frechet_distance(mine, real, warn=False), of, m, note if min(n, m) <= width else "")


def copy_values(
    name: str,
    images: SampleTable,
    table: SampleTable,
    found: TableFeatures,
    reference: Reference,
    perceptual: PerceptualDistance | None = None,
) -> Iterator[Value]:
    """Near copies of real images by the usual rule, beside what the real images are among themselves.

    Args:
        name: of the features.
        images: the set.
        table: the real images.
        found: features of the set.
        reference: of the whole table of real images.
        perceptual: LPIPS, if it is wanted too.

    Raises:
        SimsError: the reference is not of a whole table.
    """
    if reference.whole is None:
        raise SimsError("near copies are of the images of a table; give one with --against")
    real, rule = reference.whole.features, CopyRule()
    copies, among = near_copies(found.features, real, rule), training_copies(real, rule)
    n, m, others = len(found.features), len(real), "each real image among the others"
    yield Value(metric_name(name, "copies", n), copies.share, reference_nimg=m, note=ALIKE)
    yield Value(metric_name(name, "copies_training", m), among.share, "reference", m - 1, others)
    yield Value(metric_name(name, "copy_distance", n), copies.mean_distance, reference_nimg=m, note=NEAREST)
    yield Value(metric_name(name, "copy_distance_training", m), among.mean_distance, "reference", m - 1, others)
    if images.kind == "image" and images.shape == table.shape:
        yield from _likenesses(name, images, table, found, copies, perceptual)


def _likenesses(
    name: str,
    images: SampleTable,
    table: SampleTable,
    found: TableFeatures,
    copies: NearCopies,
    perceptual: PerceptualDistance | None,
) -> Iterator[Value]:
    """Mean SSIM and LPIPS to the nearest real images, of as many images as memory holds."""
    count = min(len(found.rows), max(1, SSIM_BYTES // images.row_bytes))
    some = np.sort(np.random.default_rng(0).permutation(len(found.rows))[:count])
    nearest, at = np.unique(copies.nearest[some], return_inverse=True)
    mine, real = read_rows(images, found.rows[some]).images, read_rows(table, nearest).images
    values = {"ssim_nearest": mean_ssim_to_nearest(mine, real, at)}
    if perceptual is not None:
        values["lpips_nearest"] = mean_perceptual_distance_to_nearest(mine, real, at, perceptual)
    for key, value in values.items():
        yield Value(metric_name(name, key, count), value, reference_nimg=len(table), note=NEAREST)
