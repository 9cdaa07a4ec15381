"""FD at infinite n: the Fréchet distance extrapolated in 1/n, which takes out the bias of few images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress

from sims_ray.metrics.frechet import Gaussian, frechet_distance
from sims_ray.metrics.moments import Moments
from sims_ray.metrics.neighbours import Features

FEWEST_SIZES = 8


@dataclass(frozen=True)
class Extrapolation:
    """A line through distances against 1/n.

    Attributes:
        intercept: the distance at n -> infinity; within its error it may fall below 0.
        standard_error: of the intercept, from the residuals of the line. The subsets share images, so that it is
            rather too small.
        slope: bias times n.
        sizes: images in each subset.
        distances: the distance of each.
    """

    intercept: float
    standard_error: float
    slope: float
    sizes: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_infinity(features: Features, reference: Gaussian, *, num_sizes: int = 15, seed: int = 0) -> Extrapolation:
    """FD_infinity of features [N, F] to a reference (Chong and Forsyth 2020, arXiv 1911.07023, sec. 3).

    Distances of random subsets at evenly spaced sizes up to N, fitted by least squares in 1/n. The smallest is N / 10,
    but above F where N allows, since the law in 1/n does not hold for rank-deficient covariances. The bias of the
    reference's own n stays.

    Raises:
        ValueError: fewer than 8 sizes, fewer than 20 vectors, or as `frechet_distance`.
    """
    if num_sizes < FEWEST_SIZES:
        raise ValueError(f"num_sizes is {num_sizes}; the error of a line wants at least {FEWEST_SIZES} points")
    sizes = subset_sizes(len(features), features.shape[1], num_sizes)
    rng = np.random.default_rng(seed)
    distances = [
        frechet_distance(Moments.of(features[rng.choice(len(features), n, replace=False)]), reference) for n in sizes
    ]
    line = linregress(1 / np.array(sizes), distances)
    return Extrapolation(
        float(line.intercept), float(line.intercept_stderr), float(line.slope), tuple(sizes), tuple(distances)
    )


def subset_sizes(n: int, width: int, num_sizes: int) -> list[int]:
    """Evenly spaced sizes up to n.

    Raises:
        ValueError: fewer than 20 vectors, or fewer than twice as many as sizes.
    """
    if n < max(20, 2 * num_sizes):
        raise ValueError(f"{n} images are too few to extrapolate from; give at least {max(20, 2 * num_sizes)}")
    smallest = min(max(n // 10, 2 * width), n // 2)
    return [int(size) for size in np.linspace(smallest, n, num_sizes).round()]
