"""Attribute classifiers: one whole number per image, whatever batch the image is in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.nn.classifier import FeatureClassifier
from sims_ray.nn.resnet import CifarResNet
from sims_ray.storage.attributes import AttributeClassifier, AttributeSource, load_classifier
from sims_ray.storage.checkpoints import save_tensors

RESNET20 = Path(__file__).parents[3] / "shared" / "weights" / "resnet20-cifar10.safetensors"
ARCHITECTURE = {"width": 4, "feature_dim": 8, "img_channels": 1, "num_classes": 5}
METADATA = {
    "architecture": "CIFAR ResNet-8, option-A shortcuts",
    "input": "RGB/255, mean .485 .456 .406, std .229 .224 .225",
}
GROUPS = {0: (3, 1), 7: (0,)}  # classes 2 and 4 are in none


def random_images(n: int, channels: int = 1, side: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, channels, side, side), dtype=torch.uint8, generator=generator)


def decisive(net: torch.nn.Module, images: Tensor) -> None:
    """Change the last layer so that the classes are spread over the images."""
    *_, head = (module for module in net.modules() if isinstance(module, torch.nn.Linear))
    net.eval()
    with torch.no_grad():
        logits = net(images)
        scale = logits.std(dim=0)
        head.bias.copy_((head.bias - logits.mean(dim=0)) / scale)
        head.weight.div_(scale[:, None])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of 8x8 grey images as the features stage leaves it."""
    torch.manual_seed(0)
    net = FeatureClassifier(1, 5, width=4, feature_dim=8)
    decisive(net, random_images(500))
    path = tmp_path_factory.mktemp("features") / "classifier.safetensors"
    save_tensors(path, net.state_dict(), {"role": "feature classifier", "architecture": ARCHITECTURE})
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ResNet with the names and the metadata of the public ones, which count no training steps."""
    torch.manual_seed(1)
    net = CifarResNet(8, 10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    decisive(net, random_images(200, 3, 32))
    path = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    write_resnet(path, net, METADATA)
    return path


def write_resnet(path: Path, net: CifarResNet, metadata: dict[str, str]) -> None:
    kept = {name: value for name, value in net.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(kept, path, metadata=metadata)


def load(path: Path, groups: Any = None) -> AttributeClassifier:
    return AttributeClassifier.load(AttributeSource.of(path, groups))


@pytest.mark.parametrize("kind", ["trained", "resnet"])
def test_without_groups_the_attribute_is_the_most_likely_class(kind: str, request: pytest.FixtureRequest) -> None:
    classifier = load(request.getfixturevalue(kind))
    images = random_images(150, 1, 8, seed=2) if kind == "trained" else random_images(80, 3, 32, seed=2)
    with torch.inference_mode():
        expected = classifier.net(images).argmax(1)
    found = classifier(images)
    assert found.dtype == torch.int32 and torch.equal(found, expected.to(torch.int32))
    assert len(found.unique()) >= 4


def test_the_file_is_read_as_it_was_written(resnet: Path) -> None:
    torch.manual_seed(1)
    net = CifarResNet(8, 10, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    decisive(net, random_images(200, 3, 32))
    read, shape, num_classes = load_classifier(resnet)
    assert isinstance(read, CifarResNet) and shape == (3, 32, 32) and num_classes == 10
    images = random_images(3, 3, 32, seed=5)
    assert torch.equal(read.eval()(images), net.eval()(images))


def test_groups_map_classes_to_attributes_and_other_classes_to_none(trained: Path) -> None:
    images = random_images(200)
    classes, attributes = load(trained)(images), load(trained, GROUPS)(images)
    table = torch.tensor([7, 0, -1, 0, -1], dtype=torch.int32)
    assert torch.equal(attributes, table[classes.long()])
    assert {-1, 0, 7} == set(attributes.tolist())
    assert load(trained, GROUPS).attributes == [0, 7] and load(trained).attributes == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["trained", "resnet"])
def test_an_attribute_does_not_depend_on_the_batch_the_image_is_in(kind: str, request: pytest.FixtureRequest) -> None:
    classifier = load(request.getfixturevalue(kind))
    images = random_images(150, 1, 8, seed=3) if kind == "trained" else random_images(70, 3, 32, seed=3)
    sizes: set[int] = set()
    classifier.net.register_forward_pre_hook(lambda _, args: sizes.add(len(args[0])))
    whole = classifier(images)
    for size in (9, 40):
        parts = [classifier(part) for part in torch.split(images[:70], size)]
        assert torch.equal(torch.cat(parts), whole[:70])
    assert len(sizes) == 1  # or kernels may round otherwise
    assert classifier(images[:0]).shape == (0,)


def test_classifying_leaves_the_network_as_it_is(resnet: Path) -> None:
    classifier = load(resnet)
    assert not classifier.net.training and not any(p.requires_grad for p in classifier.net.parameters())
    before = {name: value.clone() for name, value in classifier.net.state_dict().items()}
    classifier(random_images(10, 3, 32))
    assert all(torch.equal(value, before[name]) for name, value in classifier.net.state_dict().items())


def test_a_source_survives_its_text_and_loads_from_it(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parent)
    source = AttributeSource.of(Path(trained.name), {7: [0], 0: [3, 1]})
    monkeypatch.chdir(tmp_path)  # workers run in folders of their own
    assert AttributeSource.from_json(source.to_json()) == source
    images = random_images(100)
    assert torch.equal(AttributeClassifier.load(source.to_json())(images), load(trained, GROUPS)(images))
    assert AttributeSource.from_json(AttributeSource.of(trained).to_json()).groups is None


def test_a_source_is_named_by_the_content_of_its_file_and_its_groups(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.safetensors"
    copy.write_bytes(trained.read_bytes())
    identity = AttributeSource.of(trained, GROUPS).identity()
    assert AttributeSource.of(copy, {7: [0], 0: [1, 3]}).identity() == identity
    assert json.loads(json.dumps(identity)) == identity
    assert AttributeSource.of(copy, {7: [0], 0: [1, 2]}).identity() != identity
    assert AttributeSource.of(copy).identity() != identity
    copy.write_bytes(trained.read_bytes() + b" ")
    assert AttributeSource.of(copy, GROUPS).identity() != identity


@pytest.mark.parametrize(
    ("kind", "shape", "sentence"),
    [
        ("trained", (3, 8, 8), "images of 1 x any x any and these are of 3 x 8 x 8"),
        ("resnet", (1, 32, 32), "images of 3 x 32 x 32 and these are of 1 x 32 x 32"),
        ("resnet", (3, 64, 64), "images of 3 x 32 x 32 and these are of 3 x 64 x 64"),
        ("resnet", (3, 32), "these are of 3 x 32"),
    ],
)
def test_images_of_another_shape_are_refused(
    kind: str, shape: tuple[int, ...], sentence: str, request: pytest.FixtureRequest
) -> None:
    classifier = load(request.getfixturevalue(kind))
    with pytest.raises(SimsError, match=sentence):
        classifier(torch.zeros(2, *shape, dtype=torch.uint8))


def test_a_card_that_knows_the_resolution_refuses_another(trained: Path, tmp_path: Path) -> None:
    net, _, _ = load_classifier(trained)
    path = tmp_path / "classifier.safetensors"
    save_tensors(path, net.state_dict(), {"architecture": ARCHITECTURE, "resolution": [8, 8]})
    assert len(load(path)(random_images(2))) == 2
    with pytest.raises(SimsError, match="images of 1 x 8 x 8 and these are of 1 x 16 x 16"):
        load(path)(random_images(2, side=16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_latents_and_other_numbers_are_refused(trained: Path, dtype: torch.dtype) -> None:
    with pytest.raises(SimsError, match=r"seen in uint8 images and these are torch\..*; decode latents first"):
        load(trained)(torch.zeros(2, 1, 8, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({0: [1, 5]}, "attribute 0 names class 5; the classifier has classes 0 to 4"),
        ({0: [-1]}, "attribute 0 names class -1"),
        ({0: [1, 2], 3: [2]}, "class 2 is in attributes 0 and 3; put it into one"),
        ({-2: [1]}, "attribute -2 is negative"),
    ],
)
def test_groups_that_do_not_fit_are_refused(trained: Path, groups: dict[int, list[int]], sentence: str) -> None:
    with pytest.raises(SimsError, match=sentence):
        load(trained, groups)


def test_files_that_hold_no_classifier_are_refused_in_a_sentence(trained: Path, resnet: Path, tmp_path: Path) -> None:
    net = load_classifier(resnet)[0]
    assert isinstance(net, CifarResNet)
    torn, denoiser, plain, deeper, other_input, uneven = (tmp_path / f"{i}.safetensors" for i in range(6))
    torn.write_bytes(trained.read_bytes()[:-20])
    save_tensors(denoiser, {"x": torch.zeros(1)}, {"role": "base", "network": {}})
    save_file({"x": torch.zeros(1)}, plain)
    write_resnet(deeper, net, {**METADATA, "architecture": "CIFAR ResNet-20"})
    write_resnet(other_input, net, {**METADATA, "input": "BGR"})
    write_resnet(uneven, net, {**METADATA, "input": "RGB/255, mean .485 .456 .406, std .229"})
    for path, sentence in [
        (tmp_path / "absent.safetensors", "no classifier at .*absent"),
        (torn, "is not a safetensors file"),
        (denoiser, "holds a base, not a classifier; give classifier.safetensors"),
        (plain, "holds no classifier; give classifier.safetensors of a features artifact, or a ResNet"),
        (deeper, "does not fit the classifier that it says it is .*Missing key"),
        (other_input, "its input 'BGR' is not"),
        (uneven, r"its input 'RGB/255, mean .485 .456 .406, std .229' is not"),
    ]:
        with pytest.raises(SimsError, match=sentence) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(SimsError, match="no classifier at"):
        AttributeSource.of(tmp_path / "absent.safetensors").identity()


@pytest.mark.skipif(not RESNET20.is_file(), reason="needs the public weights")
def test_the_public_weights_load_by_what_their_metadata_says() -> None:
    vehicles = load(RESNET20, {0: [0, 1, 8, 9], 1: [2, 3, 4, 5, 6, 7]})
    assert isinstance(vehicles.net, CifarResNet) and vehicles.shape == (3, 32, 32) and vehicles.attributes == [0, 1]
    assert sum(isinstance(module, torch.nn.Conv2d) for module in vehicles.net.modules()) == 19
    torch.testing.assert_close(vehicles.net.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(vehicles.net.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
