"""Feature extractors by name, and the names that metrics have in their features and number of images."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.metrics.features import FeatureExtractor, pixel_features
from sims_ray.nn.resnet import CifarResNet
from sims_ray.stages.dinov2 import dinov2_features
from sims_ray.stages.inception import inception_features, local_weights
from sims_ray.storage.artifacts import sha256_file
from sims_ray.storage.attributes import load_classifier

Kind = Literal["inception", "dinov2", "checkpoint", "pixels", "identity"]
Sides = tuple[int | None, ...]

CLASSIFIER = "classifier.safetensors"  # in a features artifact
INCEPTION, FD, FID = "inception", "fd", "fid"
COLOURS: tuple[Sides, ...] = ((1, None, None), (3, None, None))
METRIC = re.compile(
    r"(?P<measure>[a-z][a-z0-9_]*?)(?:_(?P<features>dinov2|resnet\d+|classifier|pixels|identity))?"
    r"@(?P<count>[1-9]\d*)(?P<thousands>k?)"
)


@dataclass(frozen=True)
class Extractor:
    """Features of images, under the name that metrics in them carry.

    Attributes:
        name: `inception`, `dinov2`, `resnet20`, `classifier`, `pixels`, `identity`, ...
        network: from images to features [B, F]; it moves images to its device itself.
        shapes: (C, H, W) of the images it takes, None for any; of values that are no uint8 images, none at all.
    """

    name: str
    network: FeatureExtractor
    shapes: tuple[Sides, ...]

    def features(self, images: Tensor) -> Tensor:
        """Features [B, F] of images [B, C, H, W], in full float32 on every device.

        Raises:
            SimsError: images of another kind or shape.
        """
        self.check(images.shape[1:], images.dtype)
        with _full_float32():
            return self.network(images)

    def check(self, shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> None:
        """Check the shape (C, H, W) of images before any work.

        Raises:
            SimsError: these features are of images of another kind or shape.
        """
        if not self.shapes:
            return
        if dtype != torch.uint8:
            raise SimsError(f"{self.name} features are of uint8 images and these are {dtype}; decode latents first")
        if not any(_fits(shape, sides) for sides in self.shapes):
            takes = " or ".join(_words(sides) for sides in self.shapes)
            raise SimsError(
                f"{self.name} features are of images of {takes} and these are of {_words(shape)}; "
                f"choose other features with --set features.kind=KIND"
            )


def load_extractor_of(kind: Kind, weights: str | None = None, device: torch.device | str = "cpu") -> Extractor:
    """The extractor of a kind.

    Args:
        kind: `inception` (clean-fid's), `dinov2`, `checkpoint` (a classifier's features before its last layer),
            `pixels`, or `identity` for values that are their own features, like points of the plane.
        weights: where the first three have them from; None: where `inception` and `dinov2` are published. A checkpoint
            is a safetensors file, its URI, or the folder of a features artifact.
        device: where the network runs.

    Raises:
        SimsError: the weights are missing, damaged or of something else, or a package that reads them is missing.
    """
    if kind == "inception":
        return Extractor(INCEPTION, inception_features(weights, device), COLOURS)
    if kind == "dinov2":
        return Extractor("dinov2", dinov2_features(weights, device), COLOURS)
    if kind == "checkpoint":
        return _of_checkpoint(_checkpoint(weights), device)
    if kind == "pixels":
        return Extractor("pixels", pixel_features, ((None, None, None),))
    if kind == "identity":
        return Extractor("identity", identity_features, ())
    raise SimsError(f"features.kind={kind!r} is not known; give inception, dinov2, checkpoint, pixels or identity")


def identity_features(values: Tensor) -> Tensor:
    """Values [B, ...] as they are, as [B, F]."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def weights_digest(kind: Kind, weights: str | None) -> str | None:
    """SHA-256 of the file that an extractor depends on; None where its kind and the name of its weights say it all.

    Raises:
        SimsError: the file is missing.
    """
    if kind == "checkpoint":
        return sha256_file(_checkpoint(weights))
    if kind == "inception" and weights is not None:
        return sha256_file(local_weights(weights))
    if kind == "dinov2" and weights is not None and Path(weights).is_dir():
        return sha256_file(local_weights(f"{weights}/model.safetensors"))
    return None


class Metric(NamedTuple):
    """What the name of a metric says.

    Attributes:
        features: the extractor's name.
        measure: `fd`, `kid`, `precision`, ...
        nimg: number of images.
    """

    features: str
    measure: str
    nimg: int


def metric_name(features: str, measure: str, nimg: int) -> str:
    """Name of a metric, like `fid@50k`, `kid@50k`, `fd_resnet20@10k`, `kid_resnet20@10k`, `precision_resnet20@500`.

    Only a Fréchet distance (`fd`) in Inception features is called `fid`.

    Raises:
        ValueError: no metric is called so.
    """
    count = f"{nimg // 1000}k" if nimg % 1000 == 0 else str(nimg)
    if features == INCEPTION:
        head, _, rest = measure.partition("_")
        name = f"{FID if head == FD else head}{'_' * bool(rest)}{rest}@{count}"
    else:
        name = f"{measure}_{features}@{count}"
    if _said_by(name) != (features, measure, nimg):
        raise ValueError(f"{measure!r} in {features!r} over {nimg} images has no name; {name!r} would not say that")
    return name


def parse_metric(name: str) -> Metric:
    """Undo `metric_name`.

    Raises:
        SimsError: this is no such name.
    """
    said = _said_by(name)
    if said is None:
        raise SimsError(f"{name!r} does not name a metric; write it like fid@50k or fd_resnet20@10k")
    return said


def check_comparable(a: str, b: str) -> None:
    """Check that the values of two metrics, given by name, may be compared.

    Raises:
        SimsError: they are of other features, of unequally many images, or other measures.
    """
    first, second = parse_metric(a), parse_metric(b)
    for what, one, other, remedy in (
        ("in the features", first.features, second.features, "measure both in the same features"),
        ("of", f"{first.nimg:,} images", f"{second.nimg:,} images", "evaluate both on as many images"),
        ("the measures", first.measure, second.measure, "compare like with like"),
    ):
        if one != other:
            raise SimsError(f"{a} and {b} cannot be compared: they are {what} {one} and {other}; {remedy}")


def _said_by(name: str) -> Metric | None:
    match = METRIC.fullmatch(name)
    head = match["measure"].partition("_")[0] if match else ""
    if match is None or head == (FD if match["features"] is None else FID):  # fid is said of Inception alone
        return None
    measure = match["measure"].replace(FID, FD, 1) if head == FID else match["measure"]
    nimg = int(match["count"]) * (1000 if match["thousands"] else 1)
    return Metric(match["features"] or INCEPTION, measure, nimg)


def _checkpoint(weights: str | None) -> Path:
    if weights is None:
        raise SimsError("features.kind=checkpoint has no file; give a classifier with --set features.weights=FILE")
    return local_weights(f"{weights}/{CLASSIFIER}" if Path(weights).is_dir() else weights)


def _of_checkpoint(path: Path, device: torch.device | str) -> Extractor:
    net, shape, _ = load_classifier(path)
    net = net.eval().requires_grad_(False).to(device)
    name = f"resnet{6 * len(net.layer1) + 2}" if isinstance(net, CifarResNet) else "classifier"

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        return net.features(images.to(device))

    return Extractor(name, features, (shape,))


def _fits(shape: Sequence[int], sides: Sides) -> bool:
    return len(shape) == len(sides) and all(want in (None, have) for want, have in zip(sides, shape, strict=True))


def _words(sides: Sequence[int | None]) -> str:
    return " x ".join("any" if side is None else str(side) for side in sides)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Without TF32, whose 10 bits cuDNN uses unless told otherwise: a distance must not depend on the device."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
