"""What is measured from one pass of features beside the Fréchet distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sims_ray.metrics.frechet import Gaussian
from sims_ray.metrics.infinity import frechet_infinity
from sims_ray.metrics.kid import kid
from sims_ray.metrics.manifold import manifold_scores
from sims_ray.metrics.neighbours import Features
from sims_ray.metrics.sampling_error import frechet_standard_error

Measure = Literal["kid", "manifold", "fd_inf", "fd_error"]
MANIFOLD = ("precision", "recall", "density", "coverage")
NEIGHBOURS = 5  # k of precision, recall, density and coverage, as in what was published


def measure(names: Sequence[Measure], features: Features, real: Features, reference: Gaussian) -> dict[str, float]:
    """Measures of features [N, F] against those of real images [M, F], by name.

    Args:
        names: `kid` (unbiased); `manifold`: precision, recall, density and coverage, of equally many images on both
            sides; `fd_inf`: the distance extrapolated to infinitely many images; `fd_error`: the distance's standard
            error, left out where the images are no more than the features.
        features: of the model's images.
        real: of real images.
        reference: moments of all real images.

    Raises:
        ValueError: too few images for a measure.
    """
    found: dict[str, float] = {}
    if "kid" in names:
        found["kid"] = kid(real, features)
    if "manifold" in names:
        n = min(len(real), len(features))
        scores = manifold_scores(real[:n], features[:n], NEIGHBOURS)
        found |= {name: getattr(scores, name) for name in MANIFOLD}
    if "fd_inf" in names:
        found["fd_inf"] = frechet_infinity(features, reference).intercept
    if "fd_error" in names and len(features) > features.shape[1]:
        found["fd_error"] = frechet_standard_error(features, reference)
    return found
