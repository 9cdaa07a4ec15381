"""Fréchet distance between Gaussian fits of features."""

import numpy as np

from sims_ray.metrics.moments import Array, Moments


def _sqrt_psd(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    root: Array = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    return root


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    The trace of the root is taken from the eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2), which has
    the spectrum of S_a S_b and stays real for rank-deficient covariances.

    Raises:
        ValueError: feature widths differ, or fewer than two images on a side.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of width {len(a.mean)} and {len(b.mean)} cannot be compared; use one feature extractor for both"
        )
    root = _sqrt_psd(a.covariance)
    spectrum = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace_root = np.sqrt(spectrum.clip(min=0)).sum()
    delta = a.mean - b.mean
    return float(delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2 * trace_root)
