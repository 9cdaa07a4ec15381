import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sims_ray.metrics.frechet import Statistics, frechet_distance
from sims_ray.metrics.moments import Moments
from sims_ray.metrics.reference import cleanfid_name, read_statistics, write_statistics

MU, SIGMA = np.arange(3.0), np.diag([1.0, 2.0, 3.0]) + 0.5


def moments() -> Moments:
    return Moments.of(np.random.default_rng(0).normal(size=(60, 5)))


def written(folder: Path, **arrays: Any) -> Path:
    path = folder / "statistics.npz"
    np.savez(path, **arrays)
    return path


def test_what_was_written_is_read_back_exactly_with_its_count(tmp_path: Path) -> None:
    write_statistics(tmp_path / "a.npz", moments())
    read = read_statistics(tmp_path / "a.npz")
    assert (read.mean == moments().mean).all() and (read.covariance == moments().covariance).all() and read.n == 60
    write_statistics(tmp_path / "a.npz", moments(), n=7)
    assert read_statistics(tmp_path / "a.npz").n == 7


def test_statistics_without_a_count_are_written_as_edm_and_cleanfid_read_them(tmp_path: Path) -> None:
    write_statistics(tmp_path / "a.npz", Statistics(MU, SIGMA))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {"mu", "sigma"}
        assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
    assert read_statistics(tmp_path / "a.npz").n is None


def test_files_of_cleanfid_have_a_float32_mean_and_are_compressed(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", mu=MU.astype(np.float32), sigma=SIGMA)
    read = read_statistics(tmp_path / "a.npz")
    assert read.mean.dtype == np.float64 and (read.mean == MU).all() and (read.covariance == SIGMA).all()


def test_float32_rounding_of_a_covariance_is_no_asymmetry(tmp_path: Path) -> None:
    sigma = SIGMA.astype(np.float32)
    sigma[0, 1] = np.nextafter(sigma[0, 1], np.float32(1))
    assert read_statistics(written(tmp_path, mu=MU.astype(np.float32), sigma=sigma)).covariance.dtype == np.float64


def test_our_own_moments_are_statistics_too(tmp_path: Path) -> None:
    moments().save(tmp_path / "moments.npz", nfe=35.0)
    read = read_statistics(tmp_path / "moments.npz")
    assert read.n == 60
    assert frechet_distance(read, moments()) == pytest.approx(0, abs=1e-12)


def test_cleanfid_finds_its_own_file_names() -> None:
    assert cleanfid_name("CIFAR10-mine") == "cifar10-mine_clean_custom_na.npz"
    assert cleanfid_name("a", "legacy_pytorch") == "a_legacy_pytorch_custom_na.npz"


@pytest.mark.parametrize(
    ("arrays", "found"),
    [
        ({"mu": MU}, "holds mu;"),
        ({}, "holds nothing;"),
        ({"mu": MU, "sigma": SIGMA[:2]}, r"shapes are \(3,\) and \(2, 3\)"),
        ({"mu": MU[None], "sigma": SIGMA}, "shapes are"),
        ({"mu": MU.astype(int), "sigma": SIGMA}, "instead of floats"),
        ({"mu": MU, "sigma": SIGMA * np.nan}, "NaN"),
        ({"mu": MU + np.inf, "sigma": SIGMA}, "NaN"),
        ({"mu": MU, "sigma": SIGMA + np.eye(3, k=1)}, "not symmetric"),
        ({"mu": MU, "sigma": -SIGMA}, "negative variances"),
        ({"mu": MU, "sigma": SIGMA, "n": 1}, "n = 1"),
        ({"mu": MU, "sigma": SIGMA, "n": 50.5}, r"n = 50\.5"),
        ({"mean": MU, "scatter": SIGMA, "n": 1}, "n = 1"),
        ({"mu": np.array([{}], dtype=object), "sigma": SIGMA}, "cannot be read"),
    ],
)
def test_a_file_without_a_mean_and_a_covariance_is_refused(arrays: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=found) as caught:
        read_statistics(written(tmp_path, **arrays))
    assert "statistics.npz" in str(caught.value)


def test_a_file_that_is_no_npz_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return Path.touch, (tmp_path / "gone",)  # type: ignore[return-value]

    path = tmp_path / "a.npz"
    write_statistics(path, moments())
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    np.save(tmp_path / "single.npy", MU)
    single = (tmp_path / "single.npy").read_bytes()
    for content in (b"", b"text", whole[:-40], bytes(flipped), single, pickle.dumps(Bomb())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz cannot be read"):
            read_statistics(path)
    assert not (tmp_path / "gone").exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"b\.npz is not there"):
        read_statistics(tmp_path / "b.npz")
