"""Distances between large sets of vectors in blocks: nearest neighbours, and who lies in whose ball.

Squared distances come from matrix products, |x|^2 + |y|^2 - 2 x.y, which lose digits where vectors nearly coincide.
So products only propose: neighbours, and pairs too close to a radius to call, are measured again from differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sims_ray.metrics.moments import Array

Features = NDArray[np.floating]  # [N, F], of any width
Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]

BLOCK = 2048  # rows: the product of two blocks takes 32 MiB, a block of 2048 float64 features as much
SPARE = 8  # neighbours proposed beyond k, so that rounding cannot lose one of k
PAIRS = 8192  # measured at a time


@dataclass(frozen=True)
class Neighbours:
    """The k nearest points of each query, nearest first; ties in the order of their indices.

    Attributes:
        indices: int64 [Q, k].
        squared: squared Euclidean distances [Q, k], the same bits whichever set asks.
    """

    indices: Indices
    squared: Array

    @property
    def distances(self) -> Array:
        """Euclidean distances [Q, k]."""
        return np.sqrt(self.squared)


def nearest_neighbours(queries: Features, points: Features, k: int, *, exclude_self: bool = False) -> Neighbours:
    """The k nearest points [P, F] of each query [Q, F], in bounded memory.

    With `exclude_self` the queries are the points themselves, and point i is no neighbour of query i (its duplicates
    are).

    Raises:
        ValueError: widths differ, fewer points than neighbours, or a number is not finite.
    """
    check_pair(queries, points, at_least=1)
    available = len(points) - exclude_self
    if not 1 <= k <= available:
        raise ValueError(f"{k} nearest neighbours among {available} others are not there; lower k or give more images")
    centre = centre_of(points)
    found = [
        _measured(queries[rows], points, _proposed(rows, x, points, centre, min(k + SPARE, available), exclude_self), k)
        for rows, x in float_blocks(queries, centre=centre)
    ]
    return Neighbours(np.concatenate([n.indices for n in found]), np.concatenate([n.squared for n in found]))


def _proposed(rows: slice, x: Array, points: Features, centre: Array, keep: int, exclude_self: bool) -> Indices:
    """Indices [rows, keep] of the nearest points by products."""
    best, indices = np.empty((len(x), 0)), np.empty((len(x), 0), np.int64)
    for columns, y in float_blocks(points, centre=centre):
        squared = product_distances(x, y)
        if exclude_self and columns == rows:
            np.fill_diagonal(squared, np.inf)
        nearest = _smallest(squared, keep)
        best = np.hstack([best, np.take_along_axis(squared, nearest, 1)])
        indices = np.hstack([indices, nearest + columns.start])
        chosen = _smallest(best, keep)
        best, indices = np.take_along_axis(best, chosen, 1), np.take_along_axis(indices, chosen, 1)
    return indices


def _smallest(values: Array, keep: int) -> Indices:
    if values.shape[1] <= keep:
        return np.broadcast_to(np.arange(values.shape[1]), values.shape)
    chosen: Indices = np.argpartition(values, keep - 1, axis=1)[:, :keep]
    return chosen


def _measured(queries: Features, points: Features, proposed: Indices, k: int) -> Neighbours:
    squared = np.stack([measured_distances(queries, points[column]) for column in proposed.T], axis=1)
    order = np.lexsort((proposed, squared), axis=1)[:, :k]
    return Neighbours(np.take_along_axis(proposed, order, 1), np.take_along_axis(squared, order, 1))


def product_distances(x: Array, y: Array) -> Array:
    """Squared distances [A, B] of rows [A, F] and [B, F] from their product; off by up to `product_error`."""
    squared: Array = x @ y.T
    squared *= -2
    squared += (x * x).sum(axis=1)[:, None]
    squared += (y * y).sum(axis=1)
    return squared


def product_error(x: Array, y: Array) -> float:
    """Bound of the rounding in `product_distances` (Higham, Accuracy and Stability, 2002, sec. 3.1)."""
    longest = np.sqrt((x * x).sum(axis=1).max()) + np.sqrt((y * y).sum(axis=1).max())
    return float(2 * (x.shape[1] + 4) * np.finfo(np.float64).eps * longest**2)


def measured_distances(a: Features, b: Features) -> Array:
    """Squared distances [N] between row i of a and row i of b [N, F]: exact to rounding, the same bits for (b, a)."""
    difference = a.astype(np.float64) - b.astype(np.float64)
    squared: Array = (difference * difference).sum(axis=1)
    return squared


def inside(squared: Array, error: float, radii: Array, a: Features, b: Features) -> Flags:
    """Whether pair (i, j) of rows of a [A, F] and b [B, F] is no further apart than its radius: bool [A, B].

    Args:
        squared: their distances from products [A, B].
        error: bound of the rounding in them.
        radii: squared radii, of a shape that broadcasts to [A, B].
        a: rows, not centred.
        b: rows, not centred.
    """
    flags: Flags = squared <= radii
    i, j = np.nonzero(np.abs(squared - radii) <= error)
    radii = np.broadcast_to(radii, squared.shape)
    for start in range(0, len(i), PAIRS):
        p, q = i[start : start + PAIRS], j[start : start + PAIRS]
        flags[p, q] = measured_distances(a[p], b[q]) <= radii[p, q]
    return flags


def float_blocks(features: Features, start: int = 0, centre: Array | float = 0.0) -> Iterator[tuple[slice, Array]]:
    """Blocks of rows as float64, less a centre, with where they are.

    Raises:
        ValueError: a number is not finite.
    """
    for first in range(start, len(features), BLOCK):
        rows = slice(first, min(first + BLOCK, len(features)))
        block = features[rows].astype(np.float64) - centre
        if not np.isfinite(block).all():
            raise ValueError("features hold NaN or infinity; look at the images and at the extractor")
        yield rows, block


def centre_of(features: Features) -> Array:
    """Mean [F] in float64: products of centred vectors round less."""
    return np.asarray(features.mean(axis=0, dtype=np.float64))


def check_pair(a: Features, b: Features, at_least: int) -> None:
    """Refuse sets of vectors that cannot be compared.

    Raises:
        ValueError: not [N, F] and [M, F], or fewer vectors than that.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features of shape {a.shape} and {b.shape} cannot be compared; both sides need [N, F]")
    if min(len(a), len(b)) < at_least:
        raise ValueError(f"{min(len(a), len(b))} feature vectors are too few; give at least {at_least} on each side")
