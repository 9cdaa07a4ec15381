"""Streaming mean and covariance of features, in float64, mergeable across workers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of feature vectors.

    Attributes:
        n: number of vectors.
        mean: mean vector [F].
        scatter: sum of (f - mean)(f - mean)^T, [F, F].
    """

    n: int
    mean: Array
    scatter: Array

    @classmethod
    def of(cls, features: NDArray[np.floating]) -> Moments:
        """Moments of one batch of features [N, F].

        Raises:
            ValueError: the batch is empty.
        """
        batch = np.asarray(features, dtype=np.float64)
        if not len(batch):
            raise ValueError("no features to take moments of; give at least one image")
        mean = batch.mean(axis=0)
        centred = batch - mean
        return cls(len(batch), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint batches (Chan, Golub, LeVeque 1979, eq. 2.1)."""
        n = self.n + other.n
        delta = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(delta, delta) * (self.n * other.n / n)
        return Moments(n, self.mean + delta * (other.n / n), scatter)

    @property
    def covariance(self) -> Array:
        """Unbiased covariance [F, F], scatter / (n - 1).

        Raises:
            ValueError: fewer than two vectors.
        """
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, found {self.n}; evaluate more images")
        return self.scatter / (self.n - 1)

    def save(self, path: Path, **facts: Any) -> None:
        """Write to an uncompressed `.npz` with arrays `n`, `mean`, `scatter`, and further facts by name."""
        with path.open("wb") as file:
            np.savez(file, n=np.int64(self.n), mean=self.mean, scatter=self.scatter, **facts)

    @classmethod
    def load(cls, path: Path) -> Moments:
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(int(arrays["n"]), arrays["mean"], arrays["scatter"])


def merge_all(parts: Iterable[Moments]) -> Moments:
    """Merge moments in the given order; the order fixes the last bits of the result.

    Raises:
        ValueError: no parts.
    """
    total: Moments | None = None
    for part in parts:
        total = part if total is None else total.merge(part)
    if total is None:
        raise ValueError("no moments to merge; evaluate at least one image")
    return total


def grouped_moments(features: NDArray[np.floating], groups: NDArray[np.integer]) -> dict[int, Moments]:
    """Moments of the features [N, F] of each group [N], a class or an attribute, by its number in rising order.

    Group -1, of images without label, is a group like others. Holds F^2 numbers per group.

    Raises:
        ValueError: not one whole number per vector.
    """
    if groups.shape != (len(features),) or groups.dtype.kind not in "iu":
        raise ValueError(
            f"groups of type {groups.dtype} and shape {groups.shape} do not fit {len(features)} feature vectors; "
            f"give one integer for each"
        )
    return {int(group): Moments.of(features[groups == group]) for group in np.unique(groups)}


def merge_groups(parts: Iterable[Mapping[int, Moments]]) -> dict[int, Moments]:
    """Merge moments by group in the given order; a group may be missing in some parts."""
    total: dict[int, Moments] = {}
    for part in parts:
        for group, moments in part.items():
            total[group] = total[group].merge(moments) if group in total else moments
    return dict(sorted(total.items()))
