"""Seconds that the metrics take on features as wide as Inception's.

python -m benchmarks.metrics [--nimg 10000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from sims_ray.metrics.frechet import frechet_distance
from sims_ray.metrics.kid import kid
from sims_ray.metrics.manifold import manifold_scores
from sims_ray.metrics.moments import Moments

WIDTH = 2048


def timed(name: str, work: Callable[[], object]) -> None:
    """Print the seconds that some work takes."""
    started_s = time.perf_counter()
    work()
    print(f"{name:32s} {time.perf_counter() - started_s:8.2f} s", flush=True)


def main() -> None:
    """Time each metric once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nimg", type=int, default=10_000, help="images on each side")
    nimg = parser.parse_args().nimg
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, 1e-3, WIDTH, dtype=np.float32)  # variances over six orders, as of real features
    a, b = (rng.standard_normal((nimg, WIDTH), dtype=np.float32) * scales for _ in range(2))
    moments = Moments.of(a), Moments.of(b)
    timed(f"frechet_distance {WIDTH}", lambda: frechet_distance(*moments))
    timed(f"kid {nimg} x {WIDTH}", lambda: kid(a, b))
    timed(f"manifold_scores {nimg} x {WIDTH}", lambda: manifold_scores(a, b, 5))


if __name__ == "__main__":
    main()
