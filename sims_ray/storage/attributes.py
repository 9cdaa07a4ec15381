"""Attribute classifiers: what a trained classifier sees in synthetic images, as one whole number per image."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.nn.classifier import FeatureClassifier
from sims_ray.nn.resnet import RESOLUTION, CifarResNet
from sims_ray.storage.artifacts import sha256_file
from sims_ray.storage.checkpoints import CARD, load_tensors

NO_ATTRIBUTE = -1  # of images whose class is in no group
BATCH = 64
RESNET = re.compile(r"\bCIFAR ResNet-(\d+)\b")
NORMALISATION = re.compile(r"RGB/255, mean ([\d. ]+), std ([\d. ]+)")

Classifier = FeatureClassifier | CifarResNet
Groups = Mapping[int, Sequence[int]]
Shape = tuple[int, int | None, int | None]


@dataclass(frozen=True)
class AttributeSource:
    """Which classifier fills the column `attribute`, in a form that travels between processes.

    Attributes:
        classifier: path of its safetensors file.
        groups: classes of each attribute; None for every class an attribute of its own.
    """

    classifier: str
    groups: Mapping[int, tuple[int, ...]] | None = None

    @classmethod
    def of(cls, classifier: Path, groups: Groups | None = None) -> AttributeSource:
        """The source as workers on any node find it: with an absolute path."""
        ordered = None if groups is None else {a: tuple(sorted(groups[a])) for a in sorted(groups)}
        return cls(str(classifier.resolve()), ordered)

    def identity(self) -> dict[str, Any]:
        """What the attributes depend on beside the images: the file's content and the groups, as plain values.

        Raises:
            SimsError: the file is missing.
        """
        path = Path(self.classifier)
        if not path.is_file():
            raise SimsError(f"no classifier at {path}; give the path of a .safetensors file")
        return {"classifier": sha256_file(path), "groups": self._plain_groups()}

    def to_json(self) -> str:
        """As text."""
        return json.dumps({"classifier": self.classifier, "groups": self._plain_groups()})

    @classmethod
    def from_json(cls, text: str) -> AttributeSource:
        """Undo `to_json`."""
        values = json.loads(text)
        groups = values["groups"]
        ordered = None if groups is None else {int(a): tuple(classes) for a, classes in groups.items()}
        return cls(values["classifier"], ordered)

    def _plain_groups(self) -> dict[str, list[int]] | None:
        return None if self.groups is None else {str(a): list(classes) for a, classes in self.groups.items()}


class AttributeClassifier:
    """The attribute of each image: the group that its most likely class is in.

    Args:
        net: classifier of uint8 images.
        shape: (C, H, W) of the images it was trained on; H and W None where they are not known.
        num_classes: its K.
        groups: classes of each attribute; None for every class an attribute of its own.
        device: where it runs.

    Raises:
        SimsError: a group names a class that is not there, or that another group has.
    """

    def __init__(
        self,
        net: Classifier,
        shape: Shape,
        num_classes: int,
        groups: Groups | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.net = net.eval().requires_grad_(False).to(device)
        self.shape, self._device = shape, device
        self._attribute_of_class = _attribute_of_class(groups, num_classes)

    @classmethod
    def load(cls, source: AttributeSource | str, device: torch.device | str = "cpu") -> AttributeClassifier:
        """Read the classifier of a features artifact, or a ResNet for CIFAR whose metadata says what it is.

        Args:
            source: its file and groups, also as the text that `AttributeSource.to_json` makes of them.
            device: where it runs.

        Raises:
            SimsError: the file is neither or is damaged, or the groups do not fit its classes.
        """
        if isinstance(source, str):
            source = AttributeSource.from_json(source)
        return cls(*load_classifier(Path(source.classifier)), source.groups, device)

    @property
    def attributes(self) -> list[int]:
        """The attributes that an image can have, in order; -1, for none, is not among them."""
        return sorted(set(self._attribute_of_class.tolist()) - {NO_ATTRIBUTE})

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Attributes of uint8 images [B, C, H, W]: int32 [B] on the host, -1 for a class in no group.

        An image's attribute does not depend on the others that are given with it.

        Raises:
            SimsError: images of another kind or shape.
        """
        if images.dtype != torch.uint8:
            raise SimsError(f"attributes are seen in uint8 images and these are {images.dtype}; decode latents first")
        self.check(images.shape[1:])
        classes = torch.empty(len(images), dtype=torch.int64)
        for start in range(0, len(images), BATCH):
            part = images[start : start + BATCH]
            # Always as many at once: kernels may round otherwise for another batch size.
            padded = torch.cat([part, part[-1:].expand(BATCH - len(part), *part.shape[1:])])
            logits = self.net(padded.to(self._device))
            classes[start : start + BATCH] = logits[: len(part)].argmax(dim=1).cpu()
        return self._attribute_of_class[classes]

    def check(self, shape: Sequence[int]) -> None:
        """Check the shape (C, H, W) of images.

        Raises:
            SimsError: it is not that of the images the classifier was trained on.
        """
        known = [(want, have) for want, have in zip(self.shape, shape, strict=False) if want is not None]
        if len(shape) != len(self.shape) or any(want != have for want, have in known):
            raise SimsError(
                f"the attribute classifier was trained on images of {_words(self.shape)} and these are of "
                f"{_words(shape)}; take a classifier of such images"
            )


def load_classifier(path: Path) -> tuple[Classifier, Shape, int]:
    """A classifier, the shape (C, H, W) of its images (H and W None if not known) and its number of classes.

    Raises:
        SimsError: the file is no classifier that is known here, or its tensors do not fit.
    """
    metadata = _metadata(path)
    try:
        if CARD in metadata:
            return _feature_classifier(path)
        if RESNET.search(metadata.get("architecture", "")):
            return _resnet(path, metadata)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SimsError(f"{path} does not fit the classifier that it says it is ({reason}); restore it") from None
    raise SimsError(
        f"{path} holds no classifier; give classifier.safetensors of a features artifact, or a ResNet for CIFAR with "
        f"`architecture` and `input` in its metadata"
    )


def _feature_classifier(path: Path) -> tuple[Classifier, Shape, int]:
    tensors, card = load_tensors(path)
    if "architecture" not in card:
        raise SimsError(f"{path} holds a {card.get('role', 'file')}, not a classifier; give classifier.safetensors")
    architecture = card["architecture"]
    net = FeatureClassifier(**architecture)
    net.load_state_dict(tensors)
    height, width = card.get("resolution", (None, None))
    return net, (architecture["img_channels"], height, width), architecture["num_classes"]


def _resnet(path: Path, metadata: Mapping[str, str]) -> tuple[Classifier, Shape, int]:
    with safe_open(path, framework="pt") as file:
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    depth, numbers = RESNET.search(metadata["architecture"]), NORMALISATION.search(metadata.get("input", ""))
    if depth is None or numbers is None or len(numbers[1].split()) != len(numbers[2].split()):
        raise ValueError(f"its input {metadata.get('input')!r} is not 'RGB/255, mean r g b, std r g b'")
    mean, std = ([float(word) for word in group.split()] for group in numbers.groups())
    num_classes = len(tensors["linear.bias"])
    net = CifarResNet(int(depth[1]), num_classes, mean, std)
    # Counters of training steps, which inference does not need, may be there or not.
    counters = {name: value for name, value in net.state_dict().items() if name.endswith("num_batches_tracked")}
    net.load_state_dict(counters | tensors)
    return net, (len(mean), RESOLUTION, RESOLUTION), num_classes


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except FileNotFoundError:
        raise SimsError(f"no classifier at {path}; give the path of a .safetensors file") from None
    except (SafetensorError, OSError) as error:
        raise SimsError(f"{path} is not a safetensors file ({error}); restore it or make it again") from None


def _attribute_of_class(groups: Groups | None, num_classes: int) -> Tensor:
    if groups is None:
        return torch.arange(num_classes, dtype=torch.int32)
    table = torch.full((num_classes,), NO_ATTRIBUTE, dtype=torch.int32)
    for attribute, classes in groups.items():
        if attribute < 0:
            raise SimsError(f"attribute {attribute} is negative, which stands for none; number them from 0")
        for label in classes:
            if not 0 <= label < num_classes:
                raise SimsError(
                    f"attribute {attribute} names class {label}; the classifier has classes 0 to {num_classes - 1}"
                )
            if table[label] != NO_ATTRIBUTE:
                raise SimsError(f"class {label} is in attributes {int(table[label])} and {attribute}; put it into one")
            table[label] = attribute
    return table


def _words(shape: Sequence[int | None]) -> str:
    return " x ".join("any" if side is None else str(side) for side in shape)
