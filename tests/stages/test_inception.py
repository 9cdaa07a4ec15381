"""Inception features are clean-fid's: its resizing, its network, its distances; a small network stands in."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sims_ray.errors import SimsError
from sims_ray.metrics.frechet import frechet_distance
from sims_ray.metrics.kid import kid
from sims_ray.metrics.moments import Moments
from sims_ray.stages import inception
from sims_ray.stages.inception import (
    BATCH,
    WEIGHTS,
    clean_resize,
    import_cleanfid,
    inception_features,
    load_inception,
    local_weights,
)
from sims_ray.storage.folders import Folder
from tests.shared_data import CIFAR10, cifar10_batches, digits_rgb

HALF = 250
ROOT = Path(__file__).parents[2]


def standin(images: Tensor) -> Tensor:
    """A small network in Inception's place: float32 [B, 3, 299, 299] in 0..255 to features [B, 24]."""
    matrix = torch.randn(147, 24, generator=torch.Generator().manual_seed(0))
    return torch.tanh(F.adaptive_avg_pool2d(images / 255, 7).flatten(1) @ matrix / 4)


def random_images(n: int, channels: int = 3, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def save(folder: Path, images: Tensor, suffix: str) -> str:
    """Leave a file for each image, in order of their names."""
    folder.mkdir()
    for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
        if suffix == "npy":
            np.save(folder / f"{i:05d}.npy", pixels)
        else:
            Image.fromarray(pixels).save(folder / f"{i:05d}.{suffix}")
    return str(folder)


def sentence(error: pytest.ExceptionInfo[SimsError]) -> str:
    text = str(error.value)
    assert "\n" not in text and "; " in text
    return text


# --- parity with clean-fid, on 500 real images


class Both:
    """Features of the same two halves, ours and those that clean-fid takes of files for its own distance."""

    def __init__(self, images: Tensor, folder: Path) -> None:
        halves, taken = (images[:HALF], images[HALF:]), []
        ours = inception_features(None, network=standin)
        self.ours = [ours(half).numpy() for half in halves]

        def noted(resized: Tensor) -> Tensor:
            taken.append(standin(resized))
            return taken[-1]

        self.fid = import_cleanfid().fid
        self.distance = self.fid.compute_fid(
            *(save(folder / suffix, half, suffix) for suffix, half in zip(("png", "npy"), halves, strict=True)),
            mode="clean",
            custom_feat_extractor=noted,
            num_workers=0,
            device=torch.device("cpu"),
            use_dataparallel=False,
            verbose=False,
        )
        self.theirs = torch.cat(taken).numpy()


def real_images(name: str) -> Tensor:
    if name == "digits":
        return digits_rgb(2 * HALF)
    if not CIFAR10.is_dir():
        pytest.skip(f"CIFAR-10 is not in {CIFAR10}; set SIMS_RAY_SHARED to the folder that has data/cifar10")
    return next(cifar10_batches(2 * HALF))[0]


@pytest.fixture(scope="module", params=["digits", "cifar10"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    images = real_images(request.param)
    assert len(images) == 500
    return Both(images, tmp_path_factory.mktemp(request.param))


def test_features_of_real_images_are_those_that_cleanfid_takes_of_their_files(both: Both) -> None:
    ours = np.concatenate(both.ours)
    assert ours.shape == (500, 24) and ours.dtype == np.float32 and ours.std(axis=0).min() > 1e-3
    np.testing.assert_allclose(ours, both.theirs, rtol=0, atol=1e-6)


def test_the_frechet_distance_is_the_one_that_cleanfid_computes(both: Both) -> None:
    a, b = (Moments.of(features) for features in both.ours)
    distance = frechet_distance(a, b)
    assert distance > 1e-3
    assert distance == pytest.approx(both.distance, abs=1e-6)
    own = both.fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert distance == pytest.approx(own, abs=1e-6)


def test_the_kernel_distance_over_all_images_is_cleanfids(both: Both) -> None:
    a, b = (features.astype(np.float64) for features in both.ours)
    # With subsets as large as the sets it draws all of them, in another order.
    assert kid(a, b) == pytest.approx(both.fid.kernel_distance(a, b, num_subsets=2), abs=1e-8)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 32), (299, 299), (200, 640), (500, 301)])
def test_resizing_is_cleanfids_to_the_pixel(height: int, width: int, tmp_path: Path) -> None:
    images = random_images(3, 3, height, width)
    save(tmp_path / "in", images, "png")
    import_cleanfid()
    from cleanfid.utils import ResizeDataset

    files = sorted((tmp_path / "in").iterdir())
    theirs = torch.stack([ResizeDataset(files, mode="clean")[i] for i in range(3)])
    ours = clean_resize(images)
    assert ours.shape == (3, 3, 299, 299) and ours.dtype == torch.float32 and ours.min() >= 0 and ours.max() <= 255
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_grey_image_has_the_features_of_the_rgb_image_that_repeats_it() -> None:
    grey = random_images(3, 1)
    assert torch.equal(clean_resize(grey), clean_resize(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("images", [random_images(2, 4), random_images(2, 2), random_images(2).float()])
def test_other_channels_and_types_are_refused(images: Tensor) -> None:
    with pytest.raises(SimsError, match=r"uint8 images .B, 1 or 3, H, W., and these are torch") as error:
        inception_features(None, network=standin)(images)
    sentence(error)


def test_the_network_sees_bounded_batches_and_every_image_once() -> None:
    seen: list[int] = []

    def network(images: Tensor) -> Tensor:
        seen.append(len(images))
        return standin(images)

    images = random_images(BATCH + 9)
    features = inception_features(None, network=network)(images)
    assert seen == [BATCH, 9] and len(features) == BATCH + 9
    torch.testing.assert_close(features[-2:], standin(clean_resize(images[-2:])), rtol=0, atol=1e-6)
    assert not features.requires_grad


def test_the_network_runs_on_the_device_that_is_asked_for(weights: Path) -> None:
    assert inception_features(None, "meta", lambda x: x.mean((2, 3)))(random_images(2)).device.type == "meta"
    if torch.cuda.is_available():
        assert {parameter.device.type for parameter in load_inception(str(weights), "cuda").parameters()} == {"cuda"}
        return
    with pytest.raises((RuntimeError, AssertionError), match=r"CUDA|NVIDIA"):  # and not that the file is damaged
        load_inception(str(weights), "cuda")


# --- the weights


class Layers(nn.Module):
    """Named and shaped as in the published network, from [B, 3, 299, 299] to features."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 32).flatten(1)[:, : self.width] * self.scale


class Published(nn.Module):
    """A network of the same interface as the published one."""

    def __init__(self, width: int = 2048, scale: float = 2.0) -> None:
        super().__init__()
        self.layers = Layers(width, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script(Published(), tmp_path_factory.mktemp("weights") / "ours.pt")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's cache, in a folder of its own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


def script(net: nn.Module, path: Path) -> Path:
    torch.jit.script(net).save(str(path))
    return path


def by_formula(images: Tensor) -> Tensor:
    return 2 * F.adaptive_avg_pool2d((clean_resize(images) - 128) / 128, 32).flatten(1)[:, :2048]


def published_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clean-fid take the weights from there."""
    monkeypatch.setattr(import_cleanfid().downloads_helper, "inception_url", url)


def test_a_local_file_of_any_name_runs_in_cleanfids_network(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(3)
    torch.testing.assert_close(inception_features(str(weights))(images), by_formula(images))
    monkeypatch.chdir(weights.parent)
    torch.testing.assert_close(inception_features(weights.name)(images), by_formula(images))
    assert isinstance(load_inception(str(weights)), import_cleanfid().inception_torchscript.InceptionV3W)


def test_a_uri_is_copied_once_and_again_when_the_file_there_has_another_size(
    weights: Path, s3_folder: str, cache: Path
) -> None:
    folder, uri = Folder.at(s3_folder), f"{s3_folder}/inception.pt"
    folder.put("inception.pt", weights.read_bytes())
    assert local_weights(uri).read_bytes() == weights.read_bytes() and cache in local_weights(uri).parents
    images = random_images(2)
    torch.testing.assert_close(inception_features(uri)(images), by_formula(images))
    folder.put("inception.pt", bytes(weights.stat().st_size))
    assert local_weights(uri).read_bytes() == weights.read_bytes()  # not read again
    folder.put("inception.pt", b"new")
    assert local_weights(uri).read_bytes() == b"new"
    with pytest.raises(SimsError, match=r"there is no file s3://.*other.pt") as error:
        local_weights(f"{s3_folder}/other.pt")
    assert "features.weights=FILE" in sentence(error)


def test_without_a_file_cleanfids_own_is_downloaded_once(
    weights: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = tmp_path / "remote.pt"
    remote.write_bytes(weights.read_bytes())
    published_at(remote.as_uri(), monkeypatch)
    images = random_images(2)
    torch.testing.assert_close(inception_features(None)(images), by_formula(images))
    remote.unlink()
    torch.testing.assert_close(inception_features(None)(images), by_formula(images))
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [WEIGHTS]


def test_a_download_that_breaks_off_leaves_nothing(
    weights: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torn = tmp_path / "torn.pt"
    torn.write_bytes(weights.read_bytes()[:-100])
    published_at(torn.as_uri(), monkeypatch)
    with pytest.raises(SimsError, match=r"cannot be downloaded .*not the whole file") as error:
        inception_features(None)
    assert "features.weights=FILE" in sentence(error)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_offline_one_sentence_says_how_to_supply_the_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    published_at(f"http://127.0.0.1:{port}/{WEIGHTS}", monkeypatch)  # nobody listens there any more
    with pytest.raises(SimsError, match=r"cannot be downloaded .*refused") as error:
        inception_features(None)
    assert f"give clean-fid's {WEIGHTS} with --set features.weights=FILE" in sentence(error)


def test_a_host_that_does_not_answer_is_not_waited_for_without_end(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(inception, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        published_at(f"http://127.0.0.1:{silent.getsockname()[1]}/{WEIGHTS}", monkeypatch)
        with pytest.raises(SimsError, match=r"cannot be downloaded .*timed out"):
            inception_features(None)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: path.write_text("not weights"), "does not hold the Inception network"),
        (lambda path: script(Layers(2048, 1.0), path), "does not hold the Inception network .*layers"),
        (lambda path: script(Published(width=64), path), "does not hold the Inception network .*shape"),
        (lambda path: script(Published(scale=float("nan")), path), "not finite"),
        (lambda path: script(Published(), path).write_bytes(path.read_bytes()[:-50]), "does not hold the Inception"),
        (lambda path: None, "there is no file"),
        (lambda path: path.mkdir(), "there is no file"),
    ],
    ids=["text", "no layers", "64 features", "nan", "torn", "absent", "folder"],
)
def test_a_damaged_or_other_file_is_named_in_one_sentence(
    make: Callable[[Path], object], found: str, tmp_path: Path
) -> None:
    path = tmp_path / "file.pt"
    make(path)
    with pytest.raises(SimsError, match=found) as error:
        inception_features(str(path))
    assert str(path) in sentence(error) and "features.weights=FILE" in sentence(error)


# --- torchvision beside a torch that it was not built for

BUILDS = {
    "works": "from torchvision import part",
    "fails": "from torchvision import part\nraise RuntimeError('no libjpeg')",
    "misses operators": """
import torch
from torchvision import part
torch.library.register_fake("torchvision::nms")(lambda dets, scores, threshold: dets)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, threshold: dets)
""",
}
PROGRAM = """
import gc, json, sys
import torch
from sims_ray.storage.torchvision import import_torchvision
printed = {}
for folder in sys.argv[1:]:
    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    sys.times = 0
    try:
        import_torchvision()
        import_torchvision()
        error = None
    except RuntimeError as caught:
        error = str(caught)
    gc.collect()
    declared = [name for name in ("nms", "qnms") if hasattr(torch.ops.torchvision, name)]
    printed[folder.rpartition("/")[2]] = [error, sys.times, declared]
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Of each build of torchvision: the error, how many times a part of it was imported, which operators are declared.

    One process imports them all, the one that misses operators last.
    """
    root = tmp_path_factory.mktemp("builds")
    for name, source in BUILDS.items():
        package = root / name / "torchvision"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(source)
        (package / "part.py").write_text("import sys\nsys.times += 1\n")
    folders = [str(root / name) for name in BUILDS]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders], cwd=ROOT, capture_output=True, text=True, check=True
    )
    printed: dict[str, list[Any]] = json.loads(done.stdout)
    return printed


def test_a_torchvision_whose_operators_are_missing_is_imported_anew_with_them_declared(
    imports: dict[str, list[Any]],
) -> None:
    assert imports["misses operators"] == [None, 2, ["nms", "qnms"]]


def test_a_torchvision_that_imports_is_left_as_it_is(imports: dict[str, list[Any]]) -> None:
    assert imports["works"] == [None, 1, []]


def test_a_torchvision_that_fails_for_another_reason_fails(imports: dict[str, list[Any]]) -> None:
    assert imports["fails"] == ["no libjpeg", 1, []]


@pytest.mark.parametrize("missing", ["cleanfid.fid", "torchvision"])
def test_without_cleanfid_one_sentence_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SimsError, match=r"clean-fid cannot be imported .*; pip install clean-fid") as error:
        inception_features(None)
    sentence(error)


def test_cleanfid_is_ready_with_all_that_is_used_of_it() -> None:
    fid = import_cleanfid().fid
    features: NDArray[np.float64] = np.random.default_rng(0).normal(size=(20, 3))
    assert fid.fid_from_feats(features, features) == pytest.approx(0, abs=1e-6)
