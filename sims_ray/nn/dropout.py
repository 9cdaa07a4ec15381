"""Dropout whose masks belong to the images, not to the batch that they happen to be in.

A mask is a hash of (image's key, layer, position): the same whatever the micro-batch, the number of workers or the
kind of device, so that all of them train the same model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MULTIPLIERS = (0x7FEB352D, 0x846CA68B - (1 << 32))  # of a 32-bit finaliser with little bias, as signed integers
KEY_LIMIT = 1 << 31


class ImageDropout(nn.Module):
    """Zero a share of the values in training and scale the others up; without keys as torch does it.

    Args:
        probability: share that is zeroed.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        self.keys: Tensor | None = None  # int32 [B], of this layer

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, ...] to the same shape."""
        if not (self.training and self.probability):
            return x
        if self.keys is None:
            return F.dropout(x, self.probability)
        kept = keep_mask(self.keys, x[0].numel(), self.probability).reshape(x.shape)
        return x * (kept.to(x.dtype) / (1 - self.probability))


def keep_mask(keys: Tensor, num_values: int, probability: float) -> Tensor:
    """Which values are kept, bool [B, num_values], each with probability 1 - `probability`.

    Args:
        keys: int32 [B].
        num_values: values per image.
        probability: share that is not kept.
    """
    place = _mixed(torch.arange(num_values, dtype=torch.int32, device=keys.device))
    threshold = round(probability * (1 << 32)) - KEY_LIMIT  # signed integers are uniform from -2^31 on
    kept: Tensor = _mixed(place ^ keys[:, None]) >= threshold
    return kept


def set_dropout_keys(net: nn.Module, keys: Tensor) -> None:
    """Give every dropout layer of a network the masks of the next images.

    Args:
        net: the network.
        keys: int32 [B], one random number per image, on the network's device.
    """
    layers = [module for module in net.modules() if isinstance(module, ImageDropout) and module.probability]
    salts = _mixed(torch.arange(1, len(layers) + 1, dtype=torch.int32, device=keys.device))
    for layer, salt in zip(layers, salts, strict=True):
        layer.keys = _mixed(keys ^ salt)


def _mixed(x: Tensor) -> Tensor:
    """A permutation of the 32-bit integers that looks random."""
    x = (x ^ _shifted(x, 16)) * MULTIPLIERS[0]
    x = (x ^ _shifted(x, 15)) * MULTIPLIERS[1]
    return x ^ _shifted(x, 16)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right, zeros coming in."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
