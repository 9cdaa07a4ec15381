"""Standard error of a Fréchet distance from the features of one set of images."""

from __future__ import annotations

import numpy as np

from sims_ray.metrics.frechet import NOISE, Gaussian
from sims_ray.metrics.moments import Moments
from sims_ray.metrics.neighbours import Features


def frechet_standard_error(features: Features, reference: Gaussian) -> float:
    """How far the distance of n images lies from its mean over all sets of n images, by the delta method.

    To first order an image at x moves the distance by its influence over n,

        psi(x) = 2 (mu - mu_r)^T (x - mu) + (x - mu)^T (I - T) (x - mu) + const,

    where T is the optimal map between the two Gaussians, T S T = S_r: the derivative of tr (S S_r)^(1/2) by S is T/2
    (Dowson and Landau 1982; van der Vaart 1998, Asymptotic Statistics, chapter 20). The error is the deviation of psi
    over sqrt(n). It says nothing of the bias of few images, and two distances on the same seeds differ by less.

    Args:
        features: of the images [N, F]; N must exceed F.
        reference: moments of the real images, which are taken as exact.

    Raises:
        ValueError: N <= F, where the covariance is of less rank than F whatever the images are.
    """
    n, width = features.shape
    if n <= width:
        raise ValueError(
            f"{n} images in {width} features give no standard error of a distance; use more than {width} images"
        )
    moments = Moments.of(features)
    centred = features.astype(np.float64) - moments.mean
    variances, axes = np.linalg.eigh(moments.covariance)
    kept = variances > NOISE * variances[-1]  # along the others no image differs from another
    root = axes[:, kept] * np.sqrt(variances[kept])  # [F, r], S = root root^T
    values, vectors = np.linalg.eigh(root.T @ reference.covariance @ root)
    whitened = (axes[:, kept] / np.sqrt(variances[kept])).T @ centred.T  # [r, N]
    mapped = (np.sqrt(values.clip(min=0.0))[:, None] * (vectors.T @ whitened) ** 2).sum(0)  # (x - mu)^T T (x - mu)
    influence = 2 * centred @ (moments.mean - reference.mean) + (centred**2).sum(1) - mapped
    return float(np.std(influence, ddof=1) / np.sqrt(n))
