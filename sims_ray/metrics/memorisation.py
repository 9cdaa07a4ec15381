"""Memorisation: how near generated images come to single training images, in features, in pixels and to the eye."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sims_ray.metrics.moments import Array
from sims_ray.metrics.neighbours import Features, Flags, Indices, nearest_neighbours

Images = NDArray[np.uint8]  # [N, C, H, W]
PerceptualDistance = Callable[[Tensor, Tensor], Tensor]

WINDOW, SIGMA = 11, 1.5  # Wang et al. 2004, sec. III.B
K1, K2, DATA_RANGE = 0.01, 0.03, 255.0
BATCH = 256


@dataclass(frozen=True)
class CopyRule:
    """When a sample counts as a near copy of its nearest training sample; every bound that is given must hold.

    The defaults are those of Yoon et al. (2023) and Gu et al. (2023, arXiv 2310.02664): at most a third as far from the
    nearest as from the second nearest. Carlini et al. (2023, arXiv 2301.13188, sec. 5) take half the mean distance to
    50 neighbours: `CopyRule(max_ratio=0.5, next_neighbours=50)`, there with the nearest among the 50.

    Attributes:
        max_ratio: bound of the distance to the nearest over the mean distance to the next; None: no such bound.
        next_neighbours: how many come next.
        max_distance: bound of the distance itself, in units of the features; None: no such bound.
    """

    max_ratio: float | None = 1 / 3
    next_neighbours: int = 1
    max_distance: float | None = None

    def __post_init__(self) -> None:
        if self.max_ratio is None and self.max_distance is None:
            raise ValueError("a copy rule has neither max_ratio nor max_distance; give at least one of them")
        if self.next_neighbours < 1:
            raise ValueError(f"next_neighbours is {self.next_neighbours}; a ratio needs at least 1")

    def flags(self, distances: Array, ratios: Array) -> Flags:
        """Which samples are near copies: bool [N], from distances [N] and ratios [N]."""
        flags: Flags = np.ones(len(distances), np.bool_)
        if self.max_ratio is not None:
            flags &= ratios <= self.max_ratio
        if self.max_distance is not None:
            flags &= distances <= self.max_distance
        return flags


@dataclass(frozen=True)
class NearCopies:
    """The nearest training sample of each sample.

    Attributes:
        nearest: its index, int64 [N].
        distances: Euclidean distance to it [N], in units of the features.
        ratios: that distance over the mean distance to the next neighbours [N]; 0 where all of them coincide.
        flags: which samples are near copies, bool [N].
        rule: by which rule.
    """

    nearest: Indices
    distances: Array
    ratios: Array
    flags: Flags
    rule: CopyRule

    @property
    def share(self) -> float:
        """Share of near copies."""
        return float(self.flags.mean())

    @property
    def mean_distance(self) -> float:
        """Mean distance to the nearest training sample."""
        return float(self.distances.mean())


def near_copies(generated: Features, training: Features, rule: CopyRule) -> NearCopies:
    """Nearest training sample of each generated one, by features [N, F] and [M, F] or by flattened pixels.

    Raises:
        ValueError: widths differ, a number is not finite, or the training set is smaller than the rule's neighbourhood.
    """
    return _near_copies(generated, training, rule, exclude_self=False)


def training_copies(training: Features, rule: CopyRule) -> NearCopies:
    """The baseline: each training sample [M, F] against the others, which is what a perfect sampler would score.

    Raises:
        ValueError: a number is not finite, or there are fewer others than the rule's neighbourhood.
    """
    return _near_copies(training, training, rule, exclude_self=True)


def _near_copies(queries: Features, training: Features, rule: CopyRule, exclude_self: bool) -> NearCopies:
    found = nearest_neighbours(queries, training, 1 + rule.next_neighbours, exclude_self=exclude_self)
    first, next_mean = found.distances[:, 0], found.distances[:, 1:].mean(axis=1)
    ratios = np.divide(first, next_mean, out=np.zeros_like(first), where=next_mean > 0)
    return NearCopies(found.indices[:, 0], first, ratios, rule.flags(first, ratios), rule)


def ssim(a: Images, b: Images) -> Array:
    """Structural similarity [N] of image i of a to image i of b, uint8 [N, C, H, W] (Wang et al. 2004, eq. 13).

    Gaussian window of 11 x 11 and sigma 1.5 where it fits, K1 = 0.01, K2 = 0.03, range 255; the mean over positions and
    channels. Images smaller than 11 pixels get the largest odd window that fits, with the same sigma: their values
    compare among themselves only.

    Raises:
        ValueError: shapes differ, or not uint8 [N, C, H, W].
    """
    _check_images(a, b)
    if a.shape != b.shape:
        raise ValueError(f"images of shape {a.shape} and {b.shape} cannot be compared one by one; give as many of each")
    pairs = zip(_batches(a), _batches(b), strict=True)
    return np.concatenate([_ssim(x, y).numpy() for x, y in pairs]) if len(a) else np.empty(0)


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    c1, c2 = (K1 * DATA_RANGE) ** 2, (K2 * DATA_RANGE) ** 2
    a, b = a.double(), b.double()
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return (likeness / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(dim=(1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    """Weighted means over the windows that lie wholly inside: [B, C, H, W] -> [B, C, H', W']."""
    side = min(*images.shape[2:], WINDOW)
    offsets = torch.arange(side - 1 + side % 2, dtype=torch.float64)  # an odd number
    weights = torch.exp(-((offsets - offsets.mean()) ** 2) / (2 * SIGMA**2))
    weights /= weights.sum()
    planes = images.flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(planes, weights[None, None, :, None]), weights[None, None, None, :])
    return blurred[:, 0].reshape(*images.shape[:2], *blurred.shape[2:])


def mean_ssim_to_nearest(generated: Images, training: Images, nearest: Indices) -> float:
    """Mean SSIM of generated images to their nearest training images, as Table 3 of CASD reports memorisation.

    Args:
        generated: uint8 [N, C, H, W].
        training: uint8 [M, C, H, W].
        nearest: index of the training image of each, as `NearCopies` holds it [N].

    Raises:
        ValueError: shapes do not match.
    """
    return _mean_over_pairs(generated, training, nearest, lambda a, b: ssim(a.numpy(), b.numpy()))


def mean_perceptual_distance_to_nearest(
    generated: Images, training: Images, nearest: Indices, distance: PerceptualDistance
) -> float:
    """Mean of a learnt distance, such as LPIPS (Zhang et al. 2018), of generated images to their nearest training ones.

    Args:
        generated: uint8 [N, C, H, W].
        training: uint8 [M, C, H, W].
        nearest: index of the training image of each [N].
        distance: from two batches of float32 images in [-1, 1], [B, C, H, W], to B distances in any shape.

    Raises:
        ValueError: shapes do not match.
    """

    def scaled(a: Tensor, b: Tensor) -> Array:
        with torch.inference_mode():
            values = distance(a.float() / 127.5 - 1, b.float() / 127.5 - 1)
        return np.asarray(values.detach().cpu().double().flatten().numpy())

    return _mean_over_pairs(generated, training, nearest, scaled)


def _mean_over_pairs(
    generated: Images, training: Images, nearest: Indices, measure: Callable[[Tensor, Tensor], Array]
) -> float:
    _check_images(generated, training)
    if generated.shape[1:] != training.shape[1:] or len(nearest) != len(generated) or not len(generated):
        raise ValueError(
            f"{len(generated)} images of shape {generated.shape[1:]} with {len(nearest)} neighbours of shape "
            f"{training.shape[1:]} are no pairs; give images of one shape and a neighbour of each"
        )
    # The training images of one batch at a time: all of them at once would double the memory.
    indices = np.split(nearest, range(BATCH, len(nearest), BATCH))
    pairs = zip(_batches(generated), indices, strict=True)
    return float(np.concatenate([measure(batch, torch.from_numpy(training[at])) for batch, at in pairs]).mean())


def _batches(images: Images) -> Iterator[Tensor]:
    return (torch.from_numpy(images[i : i + BATCH]) for i in range(0, len(images), BATCH))


def _check_images(*sets: Images) -> None:
    for images in sets:
        if images.ndim != 4 or images.dtype != np.uint8:
            raise ValueError(f"images of type {images.dtype} and shape {images.shape} are not uint8 [N, C, H, W]")
