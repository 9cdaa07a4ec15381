"""Randomness that is a pure function of seeds: per-image streams for sampling, per-step draws for training."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SEED_LIMIT = 2**32  # the per-image generators take 32-bit seeds: a larger one would repeat a smaller one's image


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor from the host to where the network lives, without waiting for the device."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait
    return tensor.to(device)


class SeedStreams:
    """One CPU random stream per image, so that an image's noise does not depend on its batch.

    Draw in this order: latents, label, then the churn noise of each step (the order of EDM's reference code).
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        if bad := [seed for seed in seeds if not 0 <= seed < SEED_LIMIT]:
            raise ValueError(f"seed {bad[0]} is outside 0..{SEED_LIMIT - 1}; choose seeds in that range")
        self._generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]

    def randn(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Standard normal noise [B, *shape]."""
        noise = torch.stack([torch.randn(*shape, generator=g, dtype=dtype) for g in self._generators])
        return to_device(noise, device)

    def randint(self, high: int) -> Tensor:
        """One integer in [0, high) per image: int64 [B]."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self._generators])


def step_generator(seed: int, nimg: int, stream: str) -> torch.Generator:
    """A CPU generator for one training step, a pure function of (seed, images seen, stream name)."""
    words = np.random.SeedSequence([seed, nimg, *stream.encode()]).generate_state(2, np.uint32)
    return torch.Generator("cpu").manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
