"""EDM's non-leaking augmentation: transformations that the network is told about (arXiv 2206.00364, App. F.2).

A network that gets the transformation as a label, and the zero label when it samples, does not draw transformed images.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NUM_PARAMETERS = 8
AUGMENT_DIM = 9  # width of the label
SCALE, ANISOTROPY, TRANSLATION = 2**0.2, 2**0.2, 1 / 8  # strength per unit of a2, a5, and (a6, a7): EDM table 6
# Low-pass filter of the sym6 wavelet (Daubechies 1992): orthonormal to its own even shifts.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
CENTRE = sum(n * h for n, h in enumerate(SYM6)) / sum(SYM6)  # pixel k of an image sits at 2 k + CENTRE when upsampled
REACH = 3  # whole pixels that the filter reaches to either side
PADDING = 2 * REACH  # up- and downsampling reach beyond the border once each; positions further out are folded back


def draw_augmentation(generator: torch.Generator, batch_size: int, probability: float) -> Tensor:
    """Draw the random parameters of one global batch: a [B, 8], 0 where a transformation is off.

    a0, a1 in {0, 1}: x-flip, y-flip; a2 ~ N(0, 1): log-scale; a3 ~ U(-pi, pi): rotation; a4 ~ U(-pi, pi) and
    a5 ~ N(0, 1): direction and strength of anisotropy; a6, a7 ~ N(0, 1): translation (EDM table 6). Each of the six is
    on with `probability`, independently; the x-flip is always on, so half of the images are mirrored.

    The number of draws depends on B alone; probability 0 takes none from the generator.

    Raises:
        ValueError: probability outside 0..1.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"augmentation probability {probability:g} is outside 0..1; choose one inside")
    if probability == 0:
        return torch.zeros(batch_size, NUM_PARAMETERS)
    flips = (torch.rand(batch_size, 2, generator=generator) < 0.5).float()
    angles = (2 * torch.rand(batch_size, 2, generator=generator) - 1) * math.pi
    normals = torch.randn(batch_size, 4, generator=generator)
    on = (torch.rand(batch_size, 5, generator=generator) < probability).float()
    y_flip, scale, rotation, anisotropy, translation = on.unbind(1)
    switches = [torch.ones(batch_size), y_flip, scale, rotation, anisotropy, anisotropy, translation, translation]
    raw = [*flips.unbind(1), normals[:, 0], *angles.unbind(1), *normals[:, 1:].unbind(1)]
    return torch.stack(raw, 1) * torch.stack(switches, 1)


def augment_label(a: Tensor) -> Tensor:
    """What the network is told: (a0, a1, a2, cos a3 - 1, sin a3, a5 cos a4, a5 sin a4, a6, a7), [B, 8] to [B, 9]."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a.unbind(1)
    return torch.stack([a0, a1, a2, a3.cos() - 1, a3.sin(), a5 * a4.cos(), a5 * a4.sin(), a6, a7], 1)


def augment(images: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Transform images by the parameters a [B, 8] of `draw_augmentation`: the images and their labels [B, 9].

    In this order: x-flip, y-flip, scale by 2^(0.2 a2), rotation by a3, scale by 2^(0.2 a5) along the direction a4 and
    by its inverse across it, translation by (a6, a7)/8 of the side. Angles are counter-clockwise as seen, a6 points
    right and a7 down. Beyond the border the image is reflected. An image whose label is zero comes back bit for bit.

    Args:
        images: square images [B, C, R, R], R >= 7; float, in any range.
        a: parameters on the device of the images; one row per image.

    Raises:
        ValueError: images that are not square, or smaller than 7 pixels.
    """
    height, width = images.shape[2:]
    if height != width or width <= PADDING:
        raise ValueError(
            f"images of {height}x{width} pixels cannot be augmented; crop them to a square of {PADDING + 1} or more"
        )
    label = augment_label(a)
    flip_x, flip_y, warped = (
        mask.reshape(-1, 1, 1, 1) for mask in (a[:, 0] != 0, a[:, 1] != 0, (label[:, 2:] != 0).any(1))
    )
    images = torch.where(flip_x, images.flip(3), images)
    images = torch.where(flip_y, images.flip(2), images)
    # Every image is warped and the result selected: a choice on the host would make it wait for the device.
    return torch.where(warped, _warp(images, a.to(images.dtype)), images), label.to(images.dtype)


def _warp(images: Tensor, a: Tensor) -> Tensor:
    """Apply the affine part of `a` [B, 8] to images [B, C, R, R], at twice their resolution."""
    batch, channels, side, _ = images.shape
    fine = _upsample(F.pad(images.flatten(0, 1)[:, None], [PADDING] * 4, mode="reflect"))
    fine = fine.reshape(batch, channels, *fine.shape[2:])
    target = (torch.arange(2 * side + len(SYM6) - 2, dtype=a.dtype, device=a.device) - CENTRE) / 2  # in pixels
    centre = (side - 1) / 2
    source = _reflect(_source_positions(a, target - centre, side) + centre, side - 1)
    grid = (2 * (source + PADDING) + CENTRE) * 2 / (fine.shape[3] - 1) - 1  # grid_sample's -1..1
    sampled = F.grid_sample(fine, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return _downsample(sampled.flatten(0, 1)[:, None]).reshape(images.shape)


def _source_positions(a: Tensor, target: Tensor, side: int) -> Tensor:
    """Where a grid of target positions comes from: [N] to [B, N, N, (x, y)], in pixels from the centre, y down."""
    a2, a3, a4, a5 = a[:, 2:6, None, None].unbind(1)
    shift = a[:, 6:, None, None] * (TRANSLATION * side)
    y, x = torch.meshgrid(target, target, indexing="ij")
    x, y = _turn(x - shift[:, 0], y - shift[:, 1], -a4)
    x, y = x * ANISOTROPY**-a5, y * ANISOTROPY**a5
    x, y = _turn(x, y, a4 - a3)
    return torch.stack([x, y], -1) * SCALE ** -a2[..., None]


def _turn(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Turn points counter-clockwise as seen, where y points down."""
    # Written out: a matrix product would be rounded to 10 bits where TF32 is allowed.
    return angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x


def _reflect(position: Tensor, last: int) -> Tensor:
    """Fold positions into -REACH..last + REACH as mirrors at 0 and `last` would, however far outside they lie."""
    folded = ((position + last).remainder(2 * last) - last).abs()
    outside = (position - last / 2).abs() > last / 2 + REACH
    return torch.where(outside, folded, position)


def _filter(like: Tensor) -> Tensor:
    """The wavelet filter as a vector of `like`'s type and device, scaled to sum 1."""
    return torch.tensor(SYM6, dtype=like.dtype).to(like.device, non_blocking=True) / math.sqrt(2)


def _upsample(images: Tensor) -> Tensor:
    """Double the resolution of [N, 1, R, R] with the wavelet filter: [N, 1, 2 R + 10, 2 R + 10]."""
    taps = 2 * _filter(images)
    rows = F.conv_transpose2d(images, taps.reshape(1, 1, -1, 1), stride=(2, 1))
    return F.conv_transpose2d(rows, taps.reshape(1, 1, 1, -1), stride=(1, 2))


def _downsample(images: Tensor) -> Tensor:
    """Undo `_upsample` exactly: the filter is orthonormal, so its transpose is its inverse."""
    taps = _filter(images)
    rows = F.conv2d(images, taps.reshape(1, 1, -1, 1), stride=(2, 1))
    return F.conv2d(rows, taps.reshape(1, 1, 1, -1), stride=(1, 2))
