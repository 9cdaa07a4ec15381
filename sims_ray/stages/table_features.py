"""Features of sample tables from one pass: the moments of all rows and the features of some; and what they meet."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sims_ray.data.contact_sheet import random_rows
from sims_ray.data.samples import Samples
from sims_ray.data.synthetic import shard_seeds
from sims_ray.data.table import SampleTable
from sims_ray.errors import SimsError
from sims_ray.metrics.features import BATCH, image_features
from sims_ray.metrics.frechet import Gaussian
from sims_ray.metrics.moments import Moments
from sims_ray.metrics.reference import read_statistics
from sims_ray.stages.extractors import Extractor
from sims_ray.stages.features import load_real_features, load_reference
from sims_ray.stages.inception import local_weights
from sims_ray.stages.progress import Progress

Rows = NDArray[np.int64]
FEWEST_KEPT = 10_000  # features of a reference, where it has as many: for what moments do not say
ADVICE = "give the statistics of real images with --against FILE.npz, or a table of them"
COLUMNS = {"label": "labels", "attribute": "attributes"}  # of a table, and what `Samples` calls them


@dataclass(frozen=True)
class TableFeatures:
    """What one pass over a table leaves.

    Attributes:
        moments: of the features of all rows that were looked at.
        rows: the rows whose features were kept, rising, int64 [K].
        features: theirs, float32 [K, F].
        groups: the class or the attribute of each of them, int32 [K]; None where nobody asked.
    """

    moments: Moments
    rows: Rows
    features: NDArray[np.float32]
    groups: NDArray[np.int32] | None


@dataclass(frozen=True)
class Reference:
    """What a set is measured against.

    Attributes:
        moments: mean and covariance of the real images' features.
        nimg: how many images those are of; None where a file does not say.
        features: those of some real images in random order, so that the first ones are a fair choice, float32 [M, F];
            none for a file.
        whole: those of all real images in their table's order; None where nobody asked.
    """

    moments: Gaussian
    nimg: int | None
    features: NDArray[np.float32]
    whole: TableFeatures | None = None

    @classmethod
    def of_file(cls, location: str) -> Reference:
        """Statistics as EDM, clean-fid or `write_statistics` left them, at a path or URI.

        Raises:
            SimsError: there are none.
        """
        try:
            found = read_statistics(local_weights(location, ADVICE))
        except ValueError as error:
            raise SimsError(str(error)) from None
        return cls(found, found.n, np.empty((0, len(found.mean)), np.float32))

    @classmethod
    def of_artifact(cls, folder: Path) -> Reference:
        """What a features artifact holds of the real images; its statistics may be others that the user gave."""
        moments = load_reference(folder)
        return cls(moments, moments.n, load_real_features(folder))

    @classmethod
    def of_table(cls, found: TableFeatures, nimg: int, whole: bool) -> Reference:
        """A pass over a table, of whose kept features `nimg` at most are taken to compare with."""
        order = np.random.default_rng(0).permutation(len(found.features))[:nimg]
        return cls(found.moments, found.moments.n, found.features[order], found if whole else None)


def first_or_random_rows(table: SampleTable, n: int) -> Rows:
    """Which `n` rows stand for a table, rising: a synthetic set's first ones, of other tables a random choice.

    The rows of a synthetic set are in the order of their seeds; other tables may be sorted by class.
    """
    if all(shard_seeds(name) is not None for name in table.file_rows):
        return np.arange(min(n, len(table)))
    return random_rows(table, n, seed=0)


def check_column(table: SampleTable, column: str) -> None:
    """Check, before any work, that a table's rows can be grouped by a column, `label` or `attribute`.

    Raises:
        SimsError: they cannot.
    """
    if column == "label" and table.unlabelled == len(table):
        raise SimsError(f"{table.folder} has no labels; leave --per out, or import images whose folders are classes")
    for name in table.file_rows:
        _groups(table, table.read(name, 0, 0), column)


def table_features(
    table: SampleTable,
    extractor: Extractor,
    label: str,
    *,
    rows: Rows | None = None,
    keep: Rows | None = None,
    column: str | None = None,
) -> TableFeatures:
    """Look at rows of a table once; in memory are one of its files, one batch's features and those that are kept.

    Args:
        table: the table.
        extractor: what makes the features.
        label: what the lines of progress call it.
        rows: which rows, rising; None: all.
        keep: those of them whose features are kept, rising; None: all of them.
        column: `label` or `attribute`, kept beside the features.

    Raises:
        SimsError: images of another shape than the extractor's, a file that cannot be read, or no such column.
    """
    rows = np.arange(len(table)) if rows is None else rows
    keep = rows if keep is None else keep
    progress = Progress(label, len(rows))
    progress.update(0)  # the speed is counted from here
    total: Moments | None = None
    kept: list[NDArray[np.float32]] = []
    groups: list[NDArray[np.int32]] = []
    edges = np.cumsum([0, *table.file_rows.values()])
    for name, (first, end) in zip(table.file_rows, pairwise(edges), strict=True):
        here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, end)]
        if not len(here):
            continue
        part = table.read(name, int(here[0] - first), int(here[-1] - first) + 1)[here - here[0]]
        chosen = np.isin(here, keep, assume_unique=True)
        if column is not None:
            groups.append(_groups(table, part, column)[chosen])
        for start in range(0, len(part), BATCH):
            batch = slice(start, start + BATCH)
            features = image_features(extractor.features, torch.from_numpy(part.images[batch]))
            moments = Moments.of(features)
            total = moments if total is None else total.merge(moments)
            kept.append(features[chosen[batch]])
            progress.add(len(features))
    if total is None:
        raise SimsError(f"{table.folder} has no images to measure; import or synthesize some")
    return TableFeatures(total, keep, np.concatenate(kept), np.concatenate(groups) if groups else None)


def _groups(table: SampleTable, samples: Samples, column: str) -> NDArray[np.int32]:
    found: NDArray[np.int32] | None = getattr(samples, COLUMNS[column])
    if found is None:
        raise SimsError(
            f"{table.folder} has no column {column!r}; group by label, or give a table that has it, as "
            f"`sims data synthesize --classifier` makes it"
        )
    return found
