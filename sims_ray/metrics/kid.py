"""Kernel Inception Distance: unbiased squared MMD between feature sets under the cubic kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sims_ray.metrics.moments import Array
from sims_ray.metrics.neighbours import Features, check_pair, float_blocks


@dataclass(frozen=True)
class SubsetKID:
    """KID as the mean over random subsets.

    Attributes:
        mean: the estimate; unbiased, so that it may fall below 0.
        standard_error: of that mean over the draws. The subsets share one set of images, so that it says nothing of
            how another set would differ: for that, take disjoint blocks of seeds.
        num_subsets: how many.
        subset_size: images of each side in one.
    """

    mean: float
    standard_error: float
    num_subsets: int
    subset_size: int


def kid(a: Features, b: Features) -> float:
    """Unbiased squared MMD between features [N, F] and [M, F] over all of them (Binkowski et al. 2018, 1801.01401).

    The kernel is (x.y / F + 1)^3; N and M may differ. Works in blocks of float64, and the order of a and b does not
    matter.

    Raises:
        ValueError: widths differ, fewer than two vectors on a side, or a number is not finite.
    """
    check_pair(a, b, at_least=2)
    n, m = len(a), len(b)
    return _sum_within(a) / (n * (n - 1)) + _sum_within(b) / (m * (m - 1)) - 2 * _sum_between(a, b) / (n * m)


def subset_kid(
    a: Features, b: Features, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> SubsetKID:
    """Mean of the unbiased KID over random subsets drawn without replacement, as clean-fid reports it.

    Both sides give `subset_size` vectors, or as many as the smaller has.

    Raises:
        ValueError: fewer than two subsets, or as `kid`.
    """
    if num_subsets < 2:
        raise ValueError(f"num_subsets is {num_subsets}; a standard error needs at least 2")
    size = min(len(a), len(b), subset_size)
    rng = np.random.default_rng(seed)
    values = [kid(_draw(a, size, rng), _draw(b, size, rng)) for _ in range(num_subsets)]
    error = float(np.std(values, ddof=1)) / num_subsets**0.5
    return SubsetKID(float(np.mean(values)), error, num_subsets, size)


def _draw(features: Features, size: int, rng: np.random.Generator) -> Features:
    return features[rng.choice(len(features), size, replace=False)]


def _kernel(x: Array, y: Array) -> Array:
    base: Array = x @ y.T
    base /= x.shape[1]
    base += 1
    return base * base * base


def _sum_between(a: Features, b: Features) -> float:
    return sum(float(_kernel(x, y).sum()) for _, x in float_blocks(a) for _, y in float_blocks(b))


def _sum_within(a: Features) -> float:
    """Sum of the kernel over ordered pairs of different vectors; each pair of blocks is computed once."""
    total = 0.0
    for rows, x in float_blocks(a):
        own = _kernel(x, x)
        total += float(own.sum()) - float(np.trace(own))
        total += 2 * sum(float(_kernel(x, y).sum()) for _, y in float_blocks(a, rows.stop))
    return total
