"""Squared Wasserstein-2 distance between equally many points: exact, and sliced. For 2-D data."""

from __future__ import annotations

from math import ceil

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from sims_ray.metrics.moments import Array
from sims_ray.metrics.neighbours import Features

MOST_POINTS = 5000  # a minute of assignment and 200 MB


def squared_wasserstein(a: Features, b: Features) -> float:
    """W2^2 between the empirical distributions of points [N, D]: least mean squared distance over all pairings.

    In squared units of the data. Time grows with N^3, memory with N^2.

    Raises:
        ValueError: not equally many points of one dimension, none, not finite, or more than 5000.
    """
    x, y = _points(a, b)
    if len(x) > MOST_POINTS:
        raise ValueError(
            f"{len(x)} points are too many for the exact distance; give at most {MOST_POINTS} or take the sliced one"
        )
    costs = cdist(x, y, "sqeuclidean")
    return float(costs[linear_sum_assignment(costs)].mean())


def sliced_squared_wasserstein(a: Features, b: Features, *, num_directions: int = 128, seed: int = 0) -> float:
    """Mean of W2^2 between projections of points [N, D] onto directions (Bonneel et al. 2015, definition 5).

    In squared units of the data; at most W2^2 / D. Directions come as random orthonormal frames, rounded up to whole
    ones, so that a translation by t gives |t|^2 / D exactly.

    Raises:
        ValueError: not equally many points of one dimension, none, not finite, or no direction.
    """
    x, y = _points(a, b)
    if num_directions < 1:
        raise ValueError(f"num_directions is {num_directions}; give at least 1")
    width, rng = x.shape[1], np.random.default_rng(seed)
    frames = [_frame(width, rng) for _ in range(ceil(num_directions / width))]
    return float(np.mean([np.square(np.sort(x @ f, axis=0) - np.sort(y @ f, axis=0)).mean() for f in frames]))


def _frame(width: int, rng: np.random.Generator) -> Array:
    """Orthonormal columns [D, D]; each is uniform on the sphere up to its sign, which a projection does not feel."""
    frame: Array = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return frame


def _points(a: Features, b: Features) -> tuple[Array, Array]:
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise ValueError(f"points of shape {a.shape} and {b.shape} cannot be paired; both sides need the same [N, D]")
    x, y = a.astype(np.float64), b.astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("points hold NaN or infinity; look at the sampler")
    return x, y
