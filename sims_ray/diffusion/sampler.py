"""EDM's noise schedule and second-order sampler."""

import itertools
from typing import Protocol

import torch
from torch import Tensor

from sims_ray.diffusion.noise import SeedStreams


class Denoiser(Protocol):
    """D(x, sigma, labels): the estimate of the clean image, [B, C, H, W] to [B, C, H, W]."""

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        """Denoise x [B, C, H, W] at noise level sigma [B] given one-hot labels [B, K]."""
        ...


def sigma_schedule(
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Noise levels t_0 = sigma_max > ... > t_{N-1} = sigma_min, t_N = 0: [N + 1] (EDM eq. 5)."""
    if num_steps == 1:
        return torch.tensor([sigma_max, 0.0], dtype=dtype)
    ramp = torch.arange(num_steps, dtype=dtype) / (num_steps - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=dtype)])


@torch.no_grad()
def heun_sampler(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None = None,
    *,
    sigmas: Tensor,
    streams: SeedStreams | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = float("inf"),
    S_noise: float = 1.0,
) -> Tensor:
    """Integrate the probability-flow ODE with Heun's method, optionally churned (EDM, Algorithms 1 and 2).

    Args:
        denoiser: D(x, sigma, labels).
        latents: standard normal noise [B, C, H, W].
        labels: one-hot [B, K] or None.
        sigmas: noise levels [N + 1], the last one 0; their dtype is the dtype of the sampler's state.
        streams: source of the churn noise; needed when S_churn > 0.
        S_churn, S_min, S_max, S_noise: stochasticity as in EDM table 5.

    Returns:
        Images [B, C, H, W] in the dtype of `sigmas`. Costs 2N - 1 calls of `denoiser`.
    """
    if S_churn > 0 and streams is None:
        raise ValueError("S_churn > 0 draws noise in every step; pass the SeedStreams of the images")
    num_steps = len(sigmas) - 1
    schedule = [float(t) for t in sigmas]  # on the host: the loop never waits for the device
    x = latents.to(sigmas.dtype) * schedule[0]

    def slope(x: Tensor, t: float) -> Tensor:
        sigma = torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)
        return (x - denoiser(x, sigma, labels).to(x.dtype)) / t  # dx/dt, EDM eq. 3

    for t_cur, t_next in itertools.pairwise(schedule):
        t_hat = t_cur
        if S_churn > 0 and streams is not None:
            noise = streams.randn(x.shape[1:], x.dtype, x.device)
            if S_min <= t_cur <= S_max:
                t_hat = t_cur * (1 + min(S_churn / num_steps, 2**0.5 - 1))
                x = x + (t_hat**2 - t_cur**2) ** 0.5 * S_noise * noise
        d_cur = slope(x, t_hat)
        x_next = x + (t_next - t_hat) * d_cur
        if t_next > 0:  # no correction in the last step
            d_prime = slope(x_next, t_next)
            x_next = x + (t_next - t_hat) * (d_cur + d_prime) / 2
        x = x_next
    return x


def to_uint8(images: Tensor) -> Tensor:
    """Map images in [-1, 1] to uint8, rounding to the nearest grey level as x -> 127.5 x + 128, truncated (EDM)."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
