"""Feature extractors: functions from uint8 images [B, C, H, W] to features [B, F]."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sims_ray.metrics.moments import Moments, merge_all

FeatureExtractor = Callable[[Tensor], Tensor]
BATCH = 512
MAX_PIXELS = 4096


def pixel_features(images: Tensor) -> Tensor:
    """Raw pixels in [-1, 1]: [B, C * H * W], averaged over squares where that is more than a covariance can hold."""
    x = images.to(torch.float32) / 127.5 - 1
    while x[0].numel() > MAX_PIXELS:
        x = F.avg_pool2d(x, 2)
    return x.flatten(1)


@torch.inference_mode()
def image_features(extractor: FeatureExtractor, images: NDArray[np.uint8] | Tensor) -> NDArray[np.float32]:
    """Features [N, F] of uint8 images [N, C, H, W], a batch at a time."""
    batches = torch.split(torch.as_tensor(images), BATCH)
    return np.concatenate([extractor(batch).cpu().to(torch.float32).numpy() for batch in batches])


@torch.inference_mode()
def feature_moments(extractor: FeatureExtractor, images: NDArray[np.uint8] | Tensor) -> Moments:
    """Moments of the features of uint8 images [N, C, H, W]."""
    batches = torch.split(torch.as_tensor(images), BATCH)
    return merge_all(Moments.of(extractor(batch).cpu().numpy()) for batch in batches)


def images_moments(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> Moments:
    """Moments over a stream of image batches; only one batch of features is alive at a time."""
    return merge_all(feature_moments(extractor, batch) for batch in batches)
