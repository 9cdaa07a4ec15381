"""Noise schedules and samplers: Heun and Euler on the probability-flow ODE, DDIM and DDPM ancestral sampling.

All share one calling convention: unit noise and noise levels in, images and their cost out. The loops never
wait for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser, at_step, count_evaluations, evaluate
from sims_ray.diffusion.noise import SeedStreams


class Sampled(NamedTuple):
    """What a sampler returns.

    Attributes:
        images: [B, C, H, W] in the dtype of the noise levels.
        nfe: network evaluations per image, as counted; a pass through half a network counts one half.
    """

    images: Tensor
    nfe: float


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
    correct: bool = True,
) -> Sampled:
    """Integrate the probability-flow ODE with Heun's method, optionally churned (EDM, Algorithms 1 and 2).

    Args:
        denoiser: D(x, sigma, labels).
        latents: standard normal noise [B, C, H, W].
        labels: one-hot [B, K] or None.
        sigmas: noise levels [N + 1], the last one 0; their dtype is the dtype of the sampler's state.
        streams: source of the churn noise; needed when S_churn > 0.
        S_churn, S_min, S_max, S_noise: stochasticity as in EDM table 5.
        correct: whether to make the second-order correction; without, this is Euler's method.

    Returns:
        The images and their cost: 2N - 1 calls of `denoiser`, N without the correction.
    """
    if S_churn > 0 and streams is None:
        raise ValueError("S_churn > 0 draws noise in every step; pass the SeedStreams of the images")
    num_steps = len(sigmas) - 1
    schedule = [float(t) for t in sigmas]  # on the host: the loop never waits for the device
    x = latents.to(sigmas.dtype) * schedule[0]

    def slope(denoise: Denoiser, x: Tensor, t: float) -> Tensor:
        return (x - _denoised(denoise, x, t, labels)) / t  # dx/dt, EDM eq. 3

    with count_evaluations() as tally:
        for t_cur, t_next in itertools.pairwise(schedule):
            denoise = at_step(denoiser, t_cur)
            t_hat = t_cur
            if S_churn > 0 and streams is not None:
                noise = streams.randn(x.shape[1:], x.dtype, x.device)
                if S_min <= t_cur <= S_max:
                    t_hat = t_cur * (1 + min(S_churn / num_steps, 2**0.5 - 1))
                    x = x + (t_hat**2 - t_cur**2) ** 0.5 * S_noise * noise
            d_cur = slope(denoise, x, t_hat)
            x_next = x + (t_next - t_hat) * d_cur
            if correct and t_next > 0:  # no correction in the last step
                d_prime = slope(denoise, x_next, t_next)
                x_next = x + (t_next - t_hat) * (d_cur + d_prime) / 2
            x = x_next
    return Sampled(x, tally.nfe)


def euler_sampler(denoiser: Denoiser, latents: Tensor, labels: Tensor | None = None, **options: Any) -> Sampled:
    """`heun_sampler` without the second-order correction, with the same options: N calls of `denoiser`."""
    return heun_sampler(denoiser, latents, labels, correct=False, **options)


@torch.no_grad()
def ancestral_sampler(
    denoiser: Denoiser,
    latents: Tensor,
    labels: Tensor | None = None,
    *,
    sigmas: Tensor,
    streams: SeedStreams | None = None,
    eta: float = 1.0,
    variance: str = "posterior",
) -> Sampled:
    """Sample a discrete variance-preserving model: DDPM (arXiv 2006.11239) at eta 1, DDIM (2010.02502) at eta 0.

    Written in EDM's scale, x / sqrt(alpha_bar), where sigma^2 = (1 - alpha_bar) / alpha_bar. DDIM eq. 12 there
    reads x_s = D + sqrt(s^2 - v) (x - D) / t + sqrt(v) z, with v = eta^2 s^2 (t^2 - s^2) / t^2 from t to s.

    Args:
        denoiser: D(x, sigma, labels).
        latents: standard normal noise [B, C, H, W]: the model's prior in its own scale.
        labels: one-hot [B, K] or None.
        sigmas: noise levels [N + 1], the last one 0; their dtype is the dtype of the sampler's state.
        streams: source of the noise; needed when eta > 0.
        eta: share of the ancestral noise.
        variance: 'posterior', or 'beta' for DDPM with the larger variance beta_t (eta 1 only).

    Returns:
        The images and their cost: N calls of `denoiser`.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta:g} is no share of the ancestral noise; choose one from 0 to 1")
    if eta > 0 and streams is None:
        raise ValueError("eta > 0 draws noise in every step; pass the SeedStreams of the images")
    if variance not in ("posterior", "beta") or (variance == "beta" and eta != 1):
        raise ValueError(f"variance={variance!r} at eta={eta:g} is unknown; choose 'posterior', or 'beta' at eta 1")
    schedule = [float(t) for t in sigmas]
    x = latents.to(sigmas.dtype) * (1 + schedule[0] ** 2) ** 0.5
    with count_evaluations() as tally:
        for t, s in itertools.pairwise(schedule):
            denoised = _denoised(at_step(denoiser, t), x, t, labels)
            v = eta**2 * s**2 * (t**2 - s**2) / t**2
            x = denoised + max(s**2 - v, 0) ** 0.5 / t * (x - denoised)  # not below 0 by rounding
            if v > 0 and streams is not None:
                if variance == "beta":  # beta_t / alpha_bar_s, the same mean
                    v = (1 + s**2) * (t**2 - s**2) / (1 + t**2)
                x = x + v**0.5 * streams.randn(x.shape[1:], x.dtype, x.device)
    return Sampled(x, tally.nfe)


def ddim_sampler(denoiser: Denoiser, latents: Tensor, labels: Tensor | None = None, **options: Any) -> Sampled:
    """`ancestral_sampler` without noise, with the same options."""
    return ancestral_sampler(denoiser, latents, labels, eta=0.0, **options)


def _denoised(denoiser: Denoiser, x: Tensor, t: float, labels: Tensor | None) -> Tensor:
    sigma = torch.full((x.shape[0],), t, dtype=x.dtype, device=x.device)
    return evaluate(denoiser, x, sigma, labels).to(x.dtype)


Sampler = Callable[..., Sampled]
SAMPLERS: dict[str, Sampler] = {
    "heun": heun_sampler,
    "euler": euler_sampler,
    "ddim": ddim_sampler,
    "ddpm": ancestral_sampler,
}
CHURNED = ("heun", "euler")


def to_uint8(images: Tensor) -> Tensor:
    """Map images in [-1, 1] to uint8, rounding to the nearest grey level as x -> 127.5 x + 128, truncated (EDM)."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
