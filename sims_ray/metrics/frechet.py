"""Fréchet distance between Gaussian fits of features."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from scipy.linalg import eigvalsh, svdvals
from scipy.linalg.lapack import dpstrf

from sims_ray.metrics.moments import Array

ROUNDING = 1e-8  # of the trace of the root: what the fast way may lose
MOST_EXACT = 512  # width up to which the slow way takes no more than a second
NOISE = 1e-13  # of the largest entry of a side: less than that is rounding, not variance


class Gaussian(Protocol):
    """A mean [F] and a covariance [F, F]; `Moments` and `Statistics` are two."""

    @property
    def mean(self) -> Array:
        """Mean vector [F]."""
        ...

    @property
    def covariance(self) -> Array:
        """Covariance [F, F]."""
        ...


@dataclass(frozen=True)
class Statistics:
    """A Gaussian as files of other systems hold it.

    Attributes:
        mean: mean vector [F].
        covariance: unbiased covariance [F, F].
        n: number of feature vectors behind it, where that is known.
    """

    mean: Array
    covariance: Array
    n: int | None = None


def frechet_distance(a: Gaussian, b: Gaussian, *, warn: bool = True) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    With S = R R^T for both sides, the trace of the root is the sum of the singular values of R_a^T R_b: no root of a
    matrix is taken, and rank-deficient covariances stay exact. Rounding below 0 is given as 0. Warns, once for each
    n and F, where n <= F images make a side rank-deficient, unless `warn` is false.

    Raises:
        ValueError: feature widths differ, a covariance is not [F, F], a number is not finite, or fewer than two images.
    """
    covariance_a, covariance_b = a.covariance, b.covariance
    _check(a.mean, covariance_a, b.mean, covariance_b)
    root_a, root_b = _root(covariance_a), _root(covariance_b)
    for side, root in ((a, root_a), (b, root_b)) if warn else ():
        _warn_if_deficient(getattr(side, "n", None), *root.shape)
    delta = a.mean - b.mean
    total = delta @ delta + np.trace(covariance_a) + np.trace(covariance_b) - 2 * _nuclear_norm(root_a.T @ root_b)
    return max(float(total), 0.0)


def _check(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> None:
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"features of width {len(mean_a)} and {len(mean_b)} cannot be compared; use one feature extractor for both"
        )
    width = len(mean_a)
    for mean, covariance in ((mean_a, covariance_a), (mean_b, covariance_b)):
        if covariance.shape != (width, width):
            raise ValueError(f"a covariance of features of width {width} has shape {covariance.shape}; it needs F x F")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("moments of features hold NaN or infinity; look at the images and at the extractor")


def _root(covariance: Array) -> Array:
    """R [F, r] with covariance = R R^T and r its rank, by Cholesky factorisation, if need be with complete pivoting."""
    packed = np.array(covariance, dtype=np.float64, order="F")
    noise = NOISE * max(float(packed.diagonal().max()), 0.0)
    with suppress(np.linalg.LinAlgError):  # which is many times as fast
        plain: Array = np.linalg.cholesky(packed).astype(np.float64, copy=False)
        if float(plain.diagonal().min()) ** 2 > noise:
            return plain
    factor, pivots, rank, _ = dpstrf(packed, tol=noise, lower=1, overwrite_a=1)
    root = np.empty((len(packed), rank))
    root[pivots - 1] = np.tril(factor)[:, :rank]
    return root


def _nuclear_norm(matrix: Array) -> float:
    """Sum of the singular values.

    As roots of the eigenvalues of the Gram matrix, which is several times as fast, unless squaring costs too many
    digits and the matrix is small: an eigenvalue is exact to about eps times the largest, and the error of its root is
    that over twice it.
    """
    if not all(matrix.shape):
        return 0.0
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares = eigvalsh(wide @ wide.T, overwrite_a=True, check_finite=False)
    error = np.finfo(np.float64).eps * squares[-1]
    values = np.sqrt(squares.clip(min=error))
    if (error / (2 * values)).sum() < ROUNDING * values.sum() or len(wide) > MOST_EXACT:
        return float(values.sum())
    return float(svdvals(matrix, check_finite=False).sum())


def _warn_if_deficient(n: int | None, width: int, rank: int) -> None:
    if n is not None and n <= width:
        _warn_once(
            f"Fréchet distance from n = {n} images in F = {width} features: the covariance is rank-deficient and the "
            f"distance far too high; use more than {width} images, and compare at equal n only"
        )
    elif n is None and rank < width:
        _warn_once(
            f"Fréchet distance from statistics of unknown n: a covariance of F = {width} features has rank {rank}; "
            f"if it comes from {width} images or fewer the distance is far too high, so use more"
        )


@lru_cache(maxsize=1024)
def _warn_once(text: str) -> None:
    logging.getLogger("sims_ray").warning(text)
