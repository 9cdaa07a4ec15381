"""LPIPS, the learnt perceptual distance of Zhang et al. (2018, arXiv 1801.03924), from its authors' package."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.metrics.memorisation import PerceptualDistance
from sims_ray.storage.stores import reason
from sims_ray.storage.torchvision import import_torchvision

LEAST_SIDE = 31  # pixels; of smaller images AlexNet's second pooling leaves nothing
WEIGHTS = "alexnet-owt-7be5be79.pth"


def lpips_takes(shape: tuple[int, ...]) -> bool:
    """Whether LPIPS can compare images of this shape [C, H, W]."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) >= LEAST_SIDE


def lpips_distance(device: torch.device | str = "cpu") -> PerceptualDistance:
    """LPIPS with AlexNet, version 0.1: from two batches in [-1, 1], [B, 1 or 3, H, W], to B distances.

    Grey images are repeated to RGB, as the network knows no others.

    Args:
        device: where the network runs.

    Raises:
        SimsError: the package is not installed, or the weights of AlexNet cannot be had.
    """
    net = _load().to(device)

    @torch.inference_mode()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        values: Tensor = net(*(images.to(device).expand(-1, 3, -1, -1) for images in (a, b)))
        return values.flatten().cpu()

    return distance


def _load() -> Any:
    try:
        import_torchvision()
        package = importlib.import_module("lpips")
    except (ImportError, RuntimeError):  # a torchvision that is broken
        raise SimsError("LPIPS needs lpips and torchvision; pip install 'sims-ray[lpips]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks torchvision for weights in the way of old
            net = package.LPIPS(net="alex", version="0.1", verbose=False)
    except Exception as error:  # of the download, or what is made of a broken file
        raise SimsError(
            f"the AlexNet weights of LPIPS cannot be loaded ({reason(error)}); put {WEIGHTS} of torchvision into "
            f"{torch.hub.get_dir()}/checkpoints"
        ) from None
    return net.eval().requires_grad_(False)
