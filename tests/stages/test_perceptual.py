"""LPIPS through its authors' package, with a stand-in for AlexNet's weights: the laws of a distance, and refusals."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sims_ray.config import FeatureSettings
from sims_ray.errors import SimsError
from sims_ray.metrics.memorisation import PerceptualDistance
from sims_ray.stages.perceptual import LEAST_SIDE, WEIGHTS, lpips_distance, lpips_takes
from sims_ray.storage.torchvision import import_torchvision
from sims_ray.studies.measure import measure_images
from sims_ray.studies.measure_request import Request
from tests.data.tables import commit, random_rows

PIXELS = FeatureSettings(kind="pixels")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of torch's hub that holds an AlexNet of random weights."""
    import_torchvision()
    from torchvision.models import alexnet

    folder = tmp_path_factory.mktemp("hub")
    (folder / "hub/checkpoints").mkdir(parents=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(alexnet().state_dict(), folder / "hub/checkpoints" / WEIGHTS)
    yield folder
    shutil.rmtree(folder)  # a quarter of a gigabyte


@pytest.fixture
def distance(hub: Path, monkeypatch: pytest.MonkeyPatch) -> PerceptualDistance:
    monkeypatch.setenv("TORCH_HOME", str(hub))
    return lpips_distance()


def images(n: int, shape: tuple[int, int, int], seed: int) -> torch.Tensor:
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("side", [LEAST_SIDE, 64])
def test_lpips_is_0_of_an_image_and_itself_symmetric_and_of_each_pair_alone(
    side: int, distance: PerceptualDistance
) -> None:
    a, b = (images(5, (3, side, side), seed) for seed in (0, 1))
    values = distance(a, b)
    assert values.shape == (5,) and values.min() > 1e-3
    assert torch.equal(distance(a, a), torch.zeros(5))
    assert torch.allclose(distance(b, a), values, rtol=1e-5)
    assert torch.allclose(torch.cat([distance(a[i : i + 1], b[i : i + 1]) for i in range(5)]), values, rtol=1e-5)


def test_a_grey_image_is_an_rgb_image_of_equal_channels(distance: PerceptualDistance) -> None:
    a, b = (images(3, (1, 32, 32), seed) for seed in (0, 1))
    assert torch.equal(distance(a, b), distance(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_what_lpips_takes_is_what_its_network_can_pool(distance: PerceptualDistance) -> None:
    assert lpips_takes((1, LEAST_SIDE, 64)) and not lpips_takes((2, 64, 64)) and not lpips_takes((3, 64, 30))
    with pytest.raises(RuntimeError, match="too small"):
        distance(images(1, (3, 64, LEAST_SIDE - 1), 0), images(1, (3, 64, LEAST_SIDE - 1), 1))


def test_lpips_of_a_set_is_the_mean_over_each_image_and_its_nearest_real_one(
    distance: PerceptualDistance, tmp_path: Path
) -> None:
    real, others = random_rows(40, (3, 32, 32)), random_rows(20, (3, 32, 32), first_id=100)
    tables = {name: str(commit(tmp_path / name, rows).folder) for name, rows in {"r": real, "o": others}.items()}

    def lpips(of: str) -> float:
        found = measure_images(Request(tables[of], tables["r"], PIXELS, copies=True, lpips=True, measures=()))
        (value,) = [v for v in found.values if v.metric.startswith("lpips_nearest_pixels@")]
        assert value.value is not None
        return value.value

    mine, theirs = others.images.reshape(20, -1).astype(float), real.images.reshape(40, -1).astype(float)
    nearest = ((mine[:, None] - theirs) ** 2).sum(-1).argmin(1)
    pair = (torch.from_numpy(np.ascontiguousarray(x)) / 127.5 - 1 for x in (others.images, real.images[nearest]))
    assert lpips("o") == pytest.approx(distance(*pair).mean().item(), rel=1e-5)
    assert lpips("r") == 0


@pytest.mark.parametrize(
    ("shape", "copies", "reason"),
    [
        ((3, 32, 32), False, "--lpips is of each image and its nearest real one; give --copies too"),
        ((1, 8, 8), True, "LPIPS compares images of one shape, grey or RGB, from 31 pixels on"),
    ],
)
def test_images_that_lpips_cannot_compare_are_refused(
    shape: tuple[int, int, int], copies: bool, reason: str, tmp_path: Path
) -> None:
    table = str(commit(tmp_path / "table", random_rows(20, shape)).folder)
    with pytest.raises(SimsError, match=reason):
        measure_images(Request(table, table, PIXELS, copies=copies, lpips=True))


@pytest.mark.parametrize("content", [None, b"no weights"])
def test_weights_that_are_not_there_or_broken_are_asked_for_in_one_sentence(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody answers: no network
    if content is not None:
        (tmp_path / "hub/checkpoints").mkdir(parents=True)
        (tmp_path / "hub/checkpoints" / WEIGHTS).write_bytes(content)
    with pytest.raises(SimsError) as error:
        lpips_distance()
    assert f"put {WEIGHTS} of torchvision into {tmp_path}" in str(error.value) and "\n" not in str(error.value)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(SimsError, match=r"LPIPS needs lpips and torchvision; pip install 'sims-ray\[lpips\]'"):
        lpips_distance()
