"""Precision, recall, density and coverage: balls around features stand for where a distribution lives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sims_ray.metrics.neighbours import (
    Features,
    centre_of,
    check_pair,
    float_blocks,
    inside,
    nearest_neighbours,
    product_distances,
    product_error,
)


@dataclass(frozen=True)
class ManifoldScores:
    """How far generated images stay among real ones, and how much of the real ones they reach.

    Attributes:
        precision: share of generated images inside some real ball.
        recall: share of real images inside some generated ball.
        density: real balls that hold a generated image, on average over k; may exceed 1.
        coverage: share of real balls that hold a generated image.
        k: a ball reaches to the k-th nearest neighbour of its centre within its own set.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int


def manifold_scores(real: Features, fake: Features, k: int) -> ManifoldScores:
    """Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), density and coverage (Naeem et al. 2020,
    arXiv 2002.09797) of features [N, F] and [M, F].

    Balls are closed: a point at the radius is inside. Distances are Euclidean, one pass in blocks over all pairs, and
    those too near a radius to call are measured again, so that the scores are those of exact distances. All depend on
    N, M and k: compare at equal ones only.

    Raises:
        ValueError: widths differ, no more than k images on a side, or a number is not finite.
    """
    check_pair(real, fake, at_least=k + 1)
    real_radii = nearest_neighbours(real, real, k, exclude_self=True).squared[:, -1]
    fake_radii = nearest_neighbours(fake, fake, k, exclude_self=True).squared[:, -1]
    holding = np.zeros(len(fake), np.int64)  # real balls that hold this image
    covered, recalled = np.zeros(len(real), np.bool_), np.zeros(len(real), np.bool_)
    centre = centre_of(real)
    for rows, x in float_blocks(real, centre=centre):
        for columns, y in float_blocks(fake, centre=centre):
            squared, error = product_distances(x, y), product_error(x, y)
            pair = real[rows], fake[columns]
            in_real = inside(squared, error, real_radii[rows, None], *pair)
            holding[columns] += in_real.sum(axis=0)
            covered[rows] |= in_real.any(axis=1)
            recalled[rows] |= inside(squared, error, fake_radii[None, columns], *pair).any(axis=1)
    return ManifoldScores(
        precision=float((holding > 0).mean()),
        recall=float(recalled.mean()),
        density=float(holding.sum() / (k * len(fake))),
        coverage=float(covered.mean()),
        k=k,
    )
