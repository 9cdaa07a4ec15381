"""Extractors by kind, the names of metrics in them, and the public CIFAR-10 features."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.metrics.features import images_moments, pixel_features
from sims_ray.nn.classifier import FeatureClassifier
from sims_ray.nn.resnet import CifarResNet
from sims_ray.stages import dinov2
from sims_ray.stages.dinov2 import prepare
from sims_ray.stages.extractors import (
    CLASSIFIER,
    Extractor,
    check_comparable,
    identity_features,
    load_extractor_of,
    metric_name,
    parse_metric,
    weights_digest,
)
from sims_ray.storage.artifacts import sha256_file
from sims_ray.storage.checkpoints import save_tensors
from sims_ray.storage.torchvision import import_torchvision
from tests.shared_data import CIFAR10, WEIGHTS, cifar10_batches

ARCHITECTURE = {"width": 4, "feature_dim": 8, "img_channels": 1, "num_classes": 5}
METADATA = {
    "architecture": "CIFAR ResNet-8, option-A shortcuts",
    "input": "RGB/255, mean .485 .456 .406, std .229 .224 .225",
}
RESNET20 = WEIGHTS / "resnet20-cifar10.safetensors"
STATISTICS = WEIGHTS / "resnet20-cifar10-train-stats.npz"
TOLERANCE = 1e-3


def random_images(n: int, channels: int = 3, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def sentence(error: pytest.ExceptionInfo[SimsError]) -> str:
    text = str(error.value)
    assert "\n" not in text and "; " in text
    return text


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FeatureClassifier]:
    """A folder with the classifier of 8x8 grey images, as the features stage leaves it, and the classifier."""
    torch.manual_seed(0)
    net, folder = FeatureClassifier(1, 5, width=4, feature_dim=8).eval(), tmp_path_factory.mktemp("features")
    card = {"role": "feature classifier", "architecture": ARCHITECTURE, "resolution": [8, 8]}
    save_tensors(folder / CLASSIFIER, net.state_dict(), card)
    return folder, net


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CifarResNet]:
    """A small ResNet with the names and the metadata of the public ones, and its file."""
    torch.manual_seed(1)
    net = CifarResNet(8, 10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()
    path = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    kept = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(kept, path, METADATA)
    return path, net


# --- classifiers


def test_a_checkpoint_of_cifar_gives_64_features_of_what_is_before_its_last_layer(
    resnet: tuple[Path, CifarResNet],
) -> None:
    path, net = resnet
    extractor, images = load_extractor_of("checkpoint", str(path)), random_images(3)
    features = extractor.features(images)
    assert extractor.name == "resnet8" and features.shape == (3, 64) and not features.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(features, net.features(images))
        torch.testing.assert_close(net.linear(features), net(images))


def test_the_classifier_of_a_features_artifact_is_found_in_its_folder_and_by_its_file(
    artifact: tuple[Path, FeatureClassifier],
) -> None:
    folder, net = artifact
    images = random_images(3, 1, 8, 8)
    for weights in (folder, folder / CLASSIFIER):
        extractor = load_extractor_of("checkpoint", str(weights))
        assert extractor.name == "classifier"
        torch.testing.assert_close(extractor.features(images), net.features(images))


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (random_images(2, 3, 32, 31), "images of 3 x 32 x 32 and these are of 3 x 32 x 31; choose other"),
        (random_images(2, 1), "3 x 32 x 32 and these are of 1 x 32 x 32"),
        (random_images(2)[:, 0], "these are of 32 x 32"),
        (random_images(2).float(), "uint8 images and these are torch.float32; decode latents first"),
    ],
)
def test_a_checkpoint_refuses_images_of_another_shape_or_type(
    images: Tensor, found: str, resnet: tuple[Path, CifarResNet]
) -> None:
    with pytest.raises(SimsError, match=f"resnet8 features are of .*{found}") as error:
        load_extractor_of("checkpoint", str(resnet[0])).features(images)
    sentence(error)


def test_a_classifier_that_does_not_know_its_resolution_takes_any_but_not_other_channels(tmp_path: Path) -> None:
    net = FeatureClassifier(1, 5, width=4, feature_dim=8)
    save_tensors(tmp_path / "old.safetensors", net.state_dict(), {"role": "old", "architecture": ARCHITECTURE})
    extractor = load_extractor_of("checkpoint", str(tmp_path / "old.safetensors"))
    extractor.check((1, 16, 16))
    with pytest.raises(SimsError, match="of images of 1 x any x any and these are of 3 x 16 x 16"):
        extractor.check((3, 16, 16))


def test_a_checkpoint_that_is_not_there_or_not_named_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for weights, found in (
        (None, "features.kind=checkpoint has no file"),
        (str(tmp_path / "absent.safetensors"), "there is no file"),
        (str(tmp_path), f"there is no file .*{CLASSIFIER}"),
    ):
        with pytest.raises(SimsError, match=found) as error:
            load_extractor_of("checkpoint", weights)
        assert "features.weights=FILE" in sentence(error)


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(SimsError, match=r"features.kind='vgg' is not known; give inception, dinov2") as error:
        load_extractor_of("vgg")  # type: ignore[arg-type]
    sentence(error)


def test_networks_run_on_the_device_that_is_asked_for(artifact: tuple[Path, FeatureClassifier]) -> None:
    extractor = load_extractor_of("checkpoint", str(artifact[0]), "meta")
    assert extractor.features(random_images(2, 1, 8, 8)).device.type == "meta"


# --- without a network


def test_pixels_are_those_of_the_metrics() -> None:
    extractor, images = load_extractor_of("pixels"), random_images(3, 3, 8, 8)
    assert extractor.name == "pixels" and torch.equal(extractor.features(images), pixel_features(images))
    with pytest.raises(SimsError, match="decode latents first"):
        extractor.features(images.half())


@pytest.mark.parametrize("shape", [(5, 2), (5,), (5, 2, 3), (0, 2)])
def test_values_are_their_own_features_to_the_last_bit(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    features = load_extractor_of("identity").features(values)
    assert features.shape == (shape[0], int(np.prod(shape[1:]))) and features.dtype == torch.float64
    assert torch.equal(features.flatten(), values.flatten())
    assert load_extractor_of("identity").name == "identity"


# --- on every device the same


def precisions() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.fixture
def tf32() -> Iterator[None]:
    """TF32 is allowed, as far as torch has it."""
    before = precisions()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_features_are_taken_without_tf32_and_what_was_set_comes_back() -> None:
    seen: list[tuple[bool, bool]] = []

    def network(values: Tensor) -> Tensor:
        seen.append(precisions())
        return identity_features(values)

    extractor = Extractor("identity", network, ())
    extractor.features(torch.ones(2, 2))
    with pytest.raises(RuntimeError):
        Extractor("identity", lambda values: values.reshape(7), ()).features(torch.ones(2, 2))
    assert seen == [(False, False)] and precisions() == (True, True)


# --- DINOv2


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    """A DINOv2 of a few weights, and its folder."""
    with suppress(ImportError):
        import_torchvision()
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'sims-ray[dino]'")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    net, folder = transformers.Dinov2Model(config).eval(), str(tmp_path_factory.mktemp("dino") / "tiny")
    net.save_pretrained(folder)
    return folder, net


def by_pillow(pixels: Tensor) -> Tensor:
    """One channel [H, W] resized by Pillow, without rounding."""
    image = Image.fromarray(pixels.numpy().astype(np.float32))
    return torch.from_numpy(np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)).clip(0, 255))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 48), (224, 224), (300, 450)])
def test_dinov2_sees_images_resized_as_pillow_does_and_normalised_as_imagenet(height: int, width: int) -> None:
    images = random_images(1, 3, height, width)
    seen = prepare(images)
    assert seen.shape == (1, 3, 224, 224) and seen.dtype == torch.float32
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        expected = (by_pillow(images[0, channel]) / 255 - mean) / std
        torch.testing.assert_close(seen[0, channel], expected, rtol=0, atol=1e-4)


def test_dinov2_features_are_the_class_token_whatever_batch_an_image_is_in(dino: tuple[str, Any]) -> None:
    folder, net = dino
    extractor, images = load_extractor_of("dinov2", folder), random_images(dinov2.BATCH + 2, 3, 16, 16)
    features = extractor.features(images)
    with torch.no_grad():
        tokens = net(prepare(images[-3:])).last_hidden_state
    assert extractor.name == "dinov2" and features.shape == (len(images), 16) and not features.requires_grad
    torch.testing.assert_close(features[-3:], tokens[:, 0], rtol=1e-4, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 1e-4


def test_dinov2_loads_in_silence_and_leaves_the_progress_bars_as_they_were(
    dino: tuple[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    for switch, shown in ((logging.disable_progress_bar, False), (logging.enable_progress_bar, True)):
        switch()
        load_extractor_of("dinov2", dino[0])
        assert capfd.readouterr() == ("", "") and logging.is_progress_bar_enabled() == shown


def test_dinov2_takes_a_grey_image_for_the_rgb_image_that_repeats_it(dino: tuple[str, Any]) -> None:
    extractor, grey = load_extractor_of("dinov2", dino[0]), random_images(2, 1, 16, 16)
    assert torch.equal(extractor.features(grey), extractor.features(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(SimsError, match="of images of 1 x any x any or 3 x any x any and these are of 4 x 16 x 16"):
        extractor.features(random_images(2, 4, 16, 16))


def test_dinov2_that_is_damaged_or_another_network_is_refused_in_one_sentence(
    dino: tuple[str, Any], tmp_path: Path
) -> None:
    import transformers

    tensors, config = load_file(Path(dino[0]) / "model.safetensors"), dino[1].config
    incomplete, other, torn, empty = (tmp_path / name for name in ("incomplete", "other", "torn", "empty"))
    kept = {name: tensor for name, tensor in tensors.items() if name != "layernorm.bias"}
    for folder in (incomplete, torn):
        config.save_pretrained(folder)
    save_file(kept, incomplete / "model.safetensors", {"format": "pt"})
    (torn / "model.safetensors").write_bytes((Path(dino[0]) / "model.safetensors").read_bytes()[:-40])
    transformers.ViTConfig().save_pretrained(other)
    empty.mkdir()
    for folder, found in (
        (incomplete, "do not fit their configuration at layernorm.bias"),
        (other, "holds a network of the kind vit, not dinov2"),
        (torn, "cannot be loaded"),
        (empty, "cannot be loaded"),
    ):
        with pytest.raises(SimsError, match=found) as error:
            load_extractor_of("dinov2", str(folder))
        assert str(folder) in sentence(error) and "features.weights=FOLDER" in sentence(error)


def test_dinov2_weights_that_are_not_here_and_cannot_be_fetched_are_asked_for_in_one_sentence(
    dino: tuple[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub

    def unreachable(*_: Any, timeout: float, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for weights, named in ((None, "facebook/dinov2-large"), ("nobody/nothing", "nobody/nothing")):
        with pytest.raises(
            SimsError, match=rf"the DINOv2 weights {named} cannot be loaded \(no route to host\)"
        ) as error:
            load_extractor_of("dinov2", weights)
        assert "features.weights=FOLDER" in sentence(error)


def test_without_transformers_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SimsError, match=r"need transformers, which is not here; pip install 'sims-ray\[dino\]'"):
        load_extractor_of("dinov2")


# --- what features depend on


def test_the_digest_is_of_the_file_that_the_features_depend_on(
    artifact: tuple[Path, FeatureClassifier], resnet: tuple[Path, CifarResNet], tmp_path: Path
) -> None:
    (folder, _), (path, _) = artifact, resnet
    assert weights_digest("checkpoint", str(folder)) == sha256_file(folder / CLASSIFIER)
    assert weights_digest("checkpoint", str(path)) == weights_digest("inception", str(path)) == sha256_file(path)
    (tmp_path / "model.safetensors").write_bytes(path.read_bytes())
    assert weights_digest("dinov2", str(tmp_path)) == sha256_file(path)
    for kind in ("inception", "dinov2", "pixels", "identity"):
        assert weights_digest(kind, None) is None  # type: ignore[arg-type]
    assert weights_digest("dinov2", "nobody/nothing") is None


# --- names of metrics

NAMES = {
    ("inception", "fd", 50_000): "fid@50k",
    ("inception", "kid", 50_000): "kid@50k",
    ("inception", "precision", 50_000): "precision@50k",
    ("inception", "fd_inf", 1_017): "fid_inf@1017",
    ("resnet20", "fd", 10_000): "fd_resnet20@10k",
    ("resnet56", "kid", 10_000): "kid_resnet56@10k",
    ("resnet20", "precision", 10_500): "precision_resnet20@10500",
    ("dinov2", "fd", 50_000): "fd_dinov2@50k",
    ("dinov2", "fd_inf", 2_000): "fd_inf_dinov2@2k",
    ("classifier", "fd", 64): "fd_classifier@64",
    ("pixels", "near_copies", 1_000_000): "near_copies_pixels@1000k",
    ("identity", "sliced_w2", 1): "sliced_w2_identity@1",
}


@pytest.mark.parametrize(("said", "name"), NAMES.items(), ids=NAMES.values())
def test_a_metrics_name_says_its_measure_features_and_number_of_images(said: tuple[str, str, int], name: str) -> None:
    assert metric_name(*said) == name
    assert parse_metric(name) == said


def test_no_two_metrics_have_the_same_name() -> None:
    every = [
        (features, measure, nimg)
        for features in ("inception", "dinov2", "resnet20", "resnet56", "classifier", "pixels", "identity")
        for measure in ("fd", "kid", "precision", "recall", "density", "coverage", "fd_inf", "w2", "sliced_w2")
        for nimg in (1, 10, 64, 999, 1_000, 1_001, 10_000, 50_000)
    ]
    names = [metric_name(*said) for said in every]
    assert len(set(names)) == len(every) and [parse_metric(name) for name in names] == every


@pytest.mark.parametrize(
    "said",
    [
        ("resnet20", "fid", 10_000),  # FID is of Inception alone
        ("inception", "fid", 10_000),
        ("inception", "kid_resnet20", 10_000),
        ("vgg", "fd", 10_000),
        ("", "kid", 10_000),
        ("pixels", "", 10_000),
        ("pixels", "F D", 10_000),
        ("pixels", "fd", 0),
        ("pixels", "fd", -1_000),
    ],
)
def test_what_a_name_cannot_say_has_no_name(said: tuple[str, str, int]) -> None:
    with pytest.raises(ValueError, match="has no name"):
        metric_name(*said)


@pytest.mark.parametrize(
    "name", ["fid", "fid@", "fid@0", "fid@-1k", "fid@1M", "fid_resnet20@10k", "fd@50k", "fd_vgg@", "@50k", "fid@50k "]
)
def test_other_words_name_no_metric(name: str) -> None:
    with pytest.raises(SimsError, match="does not name a metric; write it like fid@50k") as error:
        parse_metric(name)
    sentence(error)


def test_distances_in_other_features_or_of_unequally_many_images_are_never_compared() -> None:
    check_comparable("fid@50k", "fid@50000")
    check_comparable("fd_resnet20@10k", "fd_resnet20@10k")
    for a, b, found in (
        ("fid@50k", "fid@10k", "of 50,000 images and 10,000 images; evaluate both on as many images"),
        ("fid@50k", "fd_dinov2@50k", "in the features inception and dinov2; measure both in the same features"),
        ("fd_resnet20@10k", "fd_resnet56@10k", "in the features resnet20 and resnet56"),
        ("fid@50k", "kid@50k", "the measures fd and kid"),
    ):
        for one, other in ((a, b), (b, a)):
            with pytest.raises(SimsError, match=f"{one} and {other} cannot be compared: they are") as error:
                check_comparable(one, other)
            assert (found in sentence(error)) == (one == a)


# --- the public features of CIFAR-10

needs_cifar10 = pytest.mark.skipif(
    not (RESNET20.is_file() and STATISTICS.is_file() and CIFAR10.is_dir()),
    reason="needs the CIFAR-10 images and ResNet-20: set SIMS_RAY_SHARED to the folder with data/ and weights/",
)


@needs_cifar10
@pytest.mark.slow
@pytest.mark.timeout(1500)  # two minutes on one core
def test_resnet20_features_of_all_training_images_have_the_published_mean_and_covariance() -> None:
    extractor, known = load_extractor_of("checkpoint", str(RESNET20)), np.load(STATISTICS)
    moments = images_moments(extractor.features, (images for images, _ in cifar10_batches(1_000)))
    assert extractor.name == "resnet20" and moments.n == int(known["train_n"]) == 50_000
    np.testing.assert_allclose(moments.mean, known["train_mu"], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(moments.covariance, known["train_sigma"], rtol=0, atol=TOLERANCE)


@needs_cifar10
def test_resnet20_features_of_each_class_scatter_around_the_published_mean_of_the_class() -> None:
    extractor, known = load_extractor_of("checkpoint", str(RESNET20)), np.load(STATISTICS)["train_class_mu"]
    images, labels = next(cifar10_batches(300))
    features = extractor.features(images).double().numpy()
    for label, mean in enumerate(known):
        of_class = features[labels.numpy() == label]
        error = of_class.std(axis=0) / len(of_class) ** 0.5
        assert (np.abs(of_class.mean(axis=0) - mean) < 5 * error + TOLERANCE).all()
