"""Reference statistics in files: those of EDM and clean-fid (`mu`, `sigma`), and our own moments."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sims_ray.metrics.frechet import Gaussian, Statistics
from sims_ray.metrics.moments import Array

ASYMMETRY = 1e-5  # of the largest entry: float32 files round
BROKEN = (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error)


def read_statistics(path: Path) -> Statistics:
    """Mean, covariance and, where it is there, count from an `.npz`; never unpickles.

    Reads EDM's reference files and clean-fid's custom statistics (arrays `mu` [F] and `sigma` [F, F], of any float
    type), what `write_statistics` wrote (also `n`), and what `Moments.save` wrote (`n`, `mean`, `scatter`).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or no mean and covariance: wrong shapes, not finite, not symmetric, a negative
            variance, or n below 2.
    """
    arrays = _load(path)
    if {"mu", "sigma"} <= arrays.keys():
        mean, covariance, n = arrays["mu"], arrays["sigma"], _count(path, arrays)
    elif {"n", "mean", "scatter"} <= arrays.keys():
        n = _count(path, arrays)
        mean, covariance = arrays["mean"], arrays["scatter"] / ((n or 2) - 1)
    else:
        found = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"{path} holds {found}; reference statistics are arrays mu and sigma, or n, mean and scatter")
    _check(path, mean, covariance)
    return Statistics(mean.astype(np.float64), covariance.astype(np.float64), n)


def write_statistics(path: Path, gaussian: Gaussian, n: int | None = None) -> None:
    """Write `mu` and `sigma` in float64, as EDM and clean-fid read them, and `n` where it is known.

    `n` is the Gaussian's own unless given. clean-fid finds the file in its `stats` folder under `cleanfid_name`.
    """
    count = getattr(gaussian, "n", None) if n is None else n
    arrays: dict[str, Any] = {"mu": np.float64(gaussian.mean), "sigma": np.float64(gaussian.covariance)}
    if count is not None:
        arrays["n"] = np.int64(count)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def cleanfid_name(name: str, mode: str = "clean") -> str:
    """File name under which clean-fid looks for the custom Inception statistics of a data set."""
    return f"{name}_{mode}_custom_na.npz".lower()


def _load(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give the file of reference statistics")
    try:
        arrays: Any = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            raise ValueError("it holds a single array")
        with arrays:
            return {name: np.asarray(arrays[name]) for name in arrays}
    except BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as an .npz of arrays ({reason}); write it again with numpy") from error


def _count(path: Path, arrays: Mapping[str, Array]) -> int | None:
    if "n" not in arrays:
        return None
    n = arrays["n"]
    if n.shape != () or n.dtype.kind not in "iu" or n < 2:
        raise ValueError(f"{path} has n = {n}; a covariance comes from a whole number of at least 2 images")
    return int(n)


def _check(path: Path, mean: Array, covariance: Array) -> None:
    problem = _problem(mean, covariance)
    if problem:
        raise ValueError(f"{path} holds no mean and covariance: {problem}; compute the statistics again")


def _problem(mean: Array, covariance: Array) -> str | None:
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean),) * 2:
        return f"shapes are {mean.shape} and {covariance.shape} instead of [F] and [F, F]"
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        return f"types are {mean.dtype} and {covariance.dtype} instead of floats"
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        return "there are NaN or infinite numbers"
    if np.abs(covariance - covariance.T).max() > ASYMMETRY * np.abs(covariance).max():
        return "the covariance is not symmetric"
    if covariance.diagonal().min() < 0:
        return "there are negative variances"
    return None
