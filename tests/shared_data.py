"""Real images for tests: the embedded digits, and CIFAR-10 where the folder of shared data is."""

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

SHARED = Path(os.environ.get("SIMS_RAY_SHARED", Path(__file__).parents[2] / "shared"))
WEIGHTS = SHARED / "weights"
CIFAR10 = SHARED / "data" / "cifar10"


def digits_rgb(n: int) -> Tensor:
    """The first digits, uint8 [n, 3, 8, 8], tinted so that no two channels are the same."""
    from sklearn.datasets import load_digits

    grey = np.rint(load_digits().images[:n] * 255 / 16)
    return torch.from_numpy(np.stack([grey, 255 - grey, grey // 2], axis=1).astype(np.uint8))


def cifar10_batches(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """CIFAR-10's training images in order, uint8 [B, 3, 32, 32], and their labels [B]."""
    for path in sorted(CIFAR10.glob("train-*.parquet")):
        for rows in pq.ParquetFile(path).iter_batches(size):
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in rows["image"].to_pylist()])
            yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), torch.tensor(rows["label"].to_pylist())
