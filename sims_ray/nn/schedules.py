"""The noise schedules that other people's networks were trained under, seen from EDM's sigma.

Every schedule mixes x_t = a x0 + b n and is variance exploding in disguise: x_t / a = x0 + sigma n, sigma = b / a
(EDM, arXiv 2206.00364, App. C). A network needs to be told its own time and be given x_t at its own scale a.
"""

import math
from typing import Self

import torch
from torch import Tensor, nn


class Schedule(nn.Module):
    """x_t = a x0 + b n with a, b and the network's time as functions of sigma = b / a; shapes in are shapes out."""

    def time(self, sigma: Tensor) -> Tensor:
        """What the network takes as its time input at noise level sigma."""
        raise NotImplementedError

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level at the network's time: the inverse of `time`."""
        raise NotImplementedError

    def scale(self, sigma: Tensor) -> Tensor:
        """The factor a of the clean image; that of the noise is b = sigma a."""
        raise NotImplementedError

    def velocity(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients (a', b') of the velocity v = a' x0 + b' n that a network of this schedule predicts."""
        raise NotImplementedError


class VariancePreserving(Schedule):
    """a^2 + b^2 = 1, and v = a n - b x0 (Salimans & Ho, arXiv 2202.00512, App. D)."""

    def scale(self, sigma: Tensor) -> Tensor:
        """a = 1 / sqrt(1 + sigma^2)."""
        return (1 + sigma**2).rsqrt()

    def velocity(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a', b') = (-b, a)."""
        a = self.scale(sigma)
        return -sigma * a, a


class DiscreteVP(VariancePreserving):
    """A chain of T steps, x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) n (DDPM, arXiv 2006.11239, eq. 4).

    The time is the index t in 0..T-1: the exact integer at a noise level of the grid, linear in ln sigma between two
    of them, clamped outside.

    Args:
        alphas_cumprod: alpha_bar [T], T >= 2, falling within (0, 1]; 1 stands for no noise.
        rounding: round to the nearest index, as int64, for a network that looks its time up in a table.

    Raises:
        ValueError: another alpha_bar.
    """

    sigmas: Tensor  # [T], rising; float64, so that a level given in any precision meets its index exactly

    def __init__(self, alphas_cumprod: Tensor, rounding: bool = False) -> None:
        super().__init__()
        alpha_bar = alphas_cumprod.detach().to(torch.float64)
        if alpha_bar.ndim != 1 or len(alpha_bar) < 2:
            raise ValueError(f"alphas_cumprod has shape {list(alpha_bar.shape)}; give a vector of 2 or more steps")
        if not (alpha_bar.diff() < 0).all() or alpha_bar[0] > 1 or alpha_bar[-1] <= 0:
            raise ValueError("alphas_cumprod must fall from step to step within (0, 1]; give the cumulative products")
        self.rounding = rounding
        self.register_buffer("sigmas", ((1 - alpha_bar) / alpha_bar).sqrt(), persistent=False)

    @classmethod
    def linear(
        cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, rounding: bool = False
    ) -> Self:
        """Betas in even steps (DDPM, arXiv 2006.11239, sec. 4)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64), rounding)

    @classmethod
    def scaled_linear(
        cls, num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012, rounding: bool = False
    ) -> Self:
        """Square roots of the betas in even steps (latent diffusion, arXiv 2112.10752)."""
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64)
        return cls.from_betas(roots**2, rounding)

    @classmethod
    def cosine(
        cls, num_steps: int = 1000, s: float = 0.008, noiseless_start: bool = False, rounding: bool = False
    ) -> Self:
        """alpha_bar = f(u) / f(0), f(u) = cos^2((u + s) / (1 + s) pi / 2) (arXiv 2102.09672, eq. 17).

        Step t has u = (t + 1) / T with betas clipped at 0.999, as published; with `noiseless_start`, u = t / T without
        clipping, so that alpha_bar_0 = 1 (the 2-D experiment of SIMS, arXiv 2408.16333).
        """
        u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
        alpha_bar = ((u + s) / (1 + s) * math.pi / 2).cos() ** 2
        if noiseless_start:
            return cls(alpha_bar[:-1] / alpha_bar[0], rounding)
        return cls.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999), rounding)

    @classmethod
    def from_betas(cls, betas: Tensor, rounding: bool = False) -> Self:
        """A chain given by beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}: [T]."""
        return cls((1 - betas.to(torch.float64)).cumprod(0), rounding)

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha_bar [T]."""
        return 1 / (1 + self.sigmas**2)

    @property
    def betas(self) -> Tensor:
        """beta_t = 1 - alpha_bar_t / alpha_bar_{t-1}, with alpha_bar_{-1} = 1: [T]."""
        alpha_bar = self.alphas_cumprod
        return 1 - alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])

    def time(self, sigma: Tensor) -> Tensor:
        """The index in 0..T-1; int64 with rounding."""
        sigmas = self.sigmas.to(sigma.dtype)
        sigma = torch.minimum(torch.maximum(sigma, sigmas[0]), sigmas[-1])
        below = self._interval(torch.searchsorted(sigmas, sigma.contiguous(), right=True) - 1)
        low, high = sigmas[below], sigmas[below + 1]
        # From a noiseless step ln sigma starts at -inf: the way to the next one is linear in sigma itself.
        step = torch.where(low > 0, (sigma / low).log() / (high / low).log(), sigma / high)
        time = below + step
        return time.round().long() if self.rounding else time

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level at an index, which may lie between two steps: float64."""
        time = time.to(torch.float64).clamp(0, len(self.sigmas) - 1)
        below = self._interval(time.long())
        low, high, step = self.sigmas[below], self.sigmas[below + 1], time - below
        between = torch.where(low > 0, low ** (1 - step) * high**step, high * step)
        return torch.where(step == 1, high, torch.where(step == 0, low, between))

    def _interval(self, below: Tensor) -> Tensor:
        """The index of the grid interval's lower end."""
        return below.clamp(0, len(self.sigmas) - 2)


class ContinuousVP(VariancePreserving):
    """The VP SDE, sigma^2 = exp(beta_min t + (beta_max - beta_min) t^2 / 2) - 1, t in 0..1 (arXiv 2011.13456, eq. 33).

    Args:
        beta_min, beta_max: noise rate at t = 0 and t = 1.
        time_scale: factor from t to the network's time input (the networks of arXiv 2011.13456 take 999 t).
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, time_scale: float = 1.0) -> None:
        super().__init__()
        self.beta_min, self.beta_max, self.time_scale = beta_min, beta_max, time_scale

    def time(self, sigma: Tensor) -> Tensor:
        """t = (-b0 + sqrt(b0^2 + 2 (b1 - b0) ln(1 + sigma^2))) / (b1 - b0), times the time scale (EDM, App. C.1)."""
        integral = torch.log1p(sigma**2)
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt()
        return self.time_scale * 2 * integral / (self.beta_min + root)  # the same fraction, without cancellation

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level at the network's time."""
        t = time / self.time_scale
        return torch.expm1(self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2).sqrt()


class RectifiedFlow(Schedule):
    """A straight line, x_t = (1 - t) x0 + t n, t in 0..1, and v = n - x0 (arXiv 2209.03003; noise at t = 1).

    Args:
        time_scale: factor from t to the network's time input (1000 in many published models).
    """

    def __init__(self, time_scale: float = 1.0) -> None:
        super().__init__()
        self.time_scale = time_scale

    def time(self, sigma: Tensor) -> Tensor:
        """t = sigma / (1 + sigma), times the time scale."""
        return self.time_scale * sigma / (1 + sigma)

    def sigma(self, time: Tensor) -> Tensor:
        """The noise level at the network's time; infinite at the end."""
        t = time / self.time_scale
        return t / (1 - t)

    def scale(self, sigma: Tensor) -> Tensor:
        """a = 1 - t = 1 / (1 + sigma)."""
        return 1 / (1 + sigma)

    def velocity(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a', b') = (-1, 1)."""
        return -torch.ones_like(sigma), torch.ones_like(sigma)
