import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.guidance import sims_guidance
from sims_ray.diffusion.noise import SeedStreams
from sims_ray.diffusion.sampler import (
    Sampler,
    ancestral_sampler,
    ddim_sampler,
    euler_sampler,
    heun_sampler,
    sigma_schedule,
    to_uint8,
)
from sims_ray.nn.schedules import DiscreteVP

EDM_18_STEPS = (
    "80.0000 57.586 40.7856 28.3746 19.3525 12.9101 8.4009 5.3152 3.2568 1.9233 1.0882 "
    "0.58535 0.29644 0.13952 0.05995 0.02293 0.00753 0.002 0"
)


class Gaussian:
    """The exact denoiser of N(0, variance), counting its calls."""

    def __init__(self, variance: float) -> None:
        self.variance, self.calls = variance, 0

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        self.calls += 1
        return x * (self.variance / (self.variance + sigma.reshape(-1, 1, 1, 1) ** 2))


def order_of(steps: Sequence[int], errors: Sequence[float]) -> float:
    """The power of 1 / steps that the errors follow."""
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def pixels(n: int) -> Tensor:
    return torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_18_step_schedule_is_that_of_edm() -> None:
    for sigma, expected in zip(sigma_schedule(18).tolist(), EDM_18_STEPS.split(), strict=True):
        decimals = len(expected.partition(".")[2])
        assert f"{sigma:.{decimals}f}" == expected


@pytest.mark.parametrize("num_steps", [1, 2, 3, 40])
def test_a_schedule_falls_from_sigma_max_to_0_evenly_in_the_rho_th_root(num_steps: int) -> None:
    sigmas = sigma_schedule(num_steps, 0.1, 10.0, 3.0)
    assert len(sigmas) == num_steps + 1
    assert sigmas[0] == pytest.approx(10)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    if num_steps > 1:
        assert sigmas[-2] == pytest.approx(0.1)
        roots = sigmas[:-1] ** (1 / 3)
        torch.testing.assert_close(roots.diff(), roots.diff()[:1].expand(num_steps - 1))


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_heun_converges_at_order_2_on_a_linear_ode(rho: float) -> None:
    a, sigma_max, sigma_min = 0.25, 5.0, 0.5
    exact = math.sqrt((a + sigma_min**2) / (a + sigma_max**2)) * sigma_max
    steps, errors = [16, 32, 64, 128, 256], []
    for n in steps:
        sigmas = sigma_schedule(n + 1, sigma_min, sigma_max, rho)[:-1]
        x = heun_sampler(Gaussian(a), torch.ones(1, 1, 1, 1), sigmas=sigmas).images
        errors.append(abs(float(x) - exact))
    assert order_of(steps, errors) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 18])
def test_n_steps_cost_2n_minus_1_denoiser_calls(num_steps: int) -> None:
    denoiser = Gaussian(0.25)
    heun_sampler(denoiser, pixels(2), sigmas=sigma_schedule(num_steps))
    assert denoiser.calls == 2 * num_steps - 1


def test_a_single_step_returns_the_denoised_noise() -> None:
    x = heun_sampler(Gaussian(0.25), pixels(4), sigmas=sigma_schedule(1)).images
    torch.testing.assert_close(x, Gaussian(0.25)(80 * pixels(4), torch.full([4], 80.0, dtype=torch.float64)))


@pytest.mark.parametrize("omega", [-1.0, 0.0, 0.7, 2.0])
def test_guided_gaussians_have_the_closed_form_variance(omega: float) -> None:
    a, b, sigma_max = 0.25, 0.4, 80.0
    denoiser = sims_guidance(Gaussian(a), Gaussian(b), omega)
    samples = heun_sampler(denoiser, pixels(100_000), sigmas=sigma_schedule(200, sigma_max=sigma_max)).images
    shrink_a, shrink_b = a / (a + sigma_max**2), b / (b + sigma_max**2)
    expected = sigma_max**2 * shrink_a ** (1 + omega) * shrink_b**-omega  # tends to a^(1 + omega) b^-omega
    assert float(samples.var()) == pytest.approx(expected, rel=0.02)


def test_churn_keeps_the_variance_of_the_data() -> None:
    streams = SeedStreams(range(3))
    latents = streams.randn([1, 100, 100], torch.float64)
    sigmas = sigma_schedule(60, sigma_max=20.0)
    samples = heun_sampler(Gaussian(0.25), latents, sigmas=sigmas, streams=streams, S_churn=20.0).images
    assert float(samples.var()) == pytest.approx(0.25, rel=0.03)
    plain = heun_sampler(Gaussian(0.25), latents, sigmas=sigmas).images
    assert (samples - plain).abs().mean() > 0.1


def test_churn_outside_its_window_changes_nothing() -> None:
    settings: dict[str, Any] = {"S_churn": 40.0, "S_min": 100.0, "S_max": 200.0}
    plain = heun_sampler(Gaussian(0.25), pixels(2), sigmas=sigma_schedule(5)).images
    churned = heun_sampler(
        Gaussian(0.25), pixels(2), sigmas=sigma_schedule(5), streams=SeedStreams(range(2)), **settings
    ).images
    assert torch.equal(plain, churned)


def test_churn_without_streams_is_refused() -> None:
    with pytest.raises(ValueError, match="SeedStreams"):
        heun_sampler(Gaussian(0.25), pixels(2), sigmas=sigma_schedule(5), S_churn=1.0)


def test_without_churn_nothing_is_drawn_from_the_streams() -> None:
    used, fresh = SeedStreams(range(2)), SeedStreams(range(2))
    heun_sampler(Gaussian(0.25), pixels(2), sigmas=sigma_schedule(5), streams=used, S_churn=0.0)
    assert torch.equal(used.randn([7], torch.float64), fresh.randn([7], torch.float64))


def test_every_grey_level_survives_the_way_to_unit_range_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(to_uint8(levels.to(dtype) / 127.5 - 1), levels)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


# --- Euler and DDIM


@pytest.mark.parametrize("rho", [1.0, 7.0])
def test_euler_converges_at_order_1_on_a_linear_ode(rho: float) -> None:
    a, sigma_max, sigma_min = 0.25, 5.0, 0.5
    exact = math.sqrt((a + sigma_min**2) / (a + sigma_max**2)) * sigma_max
    steps, errors = [64, 128, 256, 512], []
    for n in steps:
        sigmas = sigma_schedule(n + 1, sigma_min, sigma_max, rho)[:-1]
        errors.append(abs(float(euler_sampler(Gaussian(a), torch.ones(1, 1, 1, 1), sigmas=sigmas).images) - exact))
    assert order_of(steps, errors) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("sigma_max", [0.5, 80.0])
def test_ddim_is_euler_from_noise_of_variance_1_plus_sigma_squared(sigma_max: float) -> None:
    sigmas = sigma_schedule(12, 0.002, sigma_max)
    ddim = ddim_sampler(curved, pixels(5), sigmas=sigmas).images
    longer = pixels(5) * math.sqrt(1 + sigma_max**2) / sigma_max
    torch.testing.assert_close(ddim, euler_sampler(curved, longer, sigmas=sigmas).images, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", [euler_sampler, ddim_sampler, heun_sampler])
def test_a_deterministic_sampler_draws_nothing_from_its_streams(sampler: Sampler) -> None:
    used, fresh = SeedStreams(range(2)), SeedStreams(range(2))
    sampler(curved, pixels(2), sigmas=sigma_schedule(5), streams=used)
    assert torch.equal(used.randn([7], torch.float64), fresh.randn([7], torch.float64))


# --- ancestral sampling

ETAS = [(0.0, "posterior"), (0.4, "posterior"), (1.0, "posterior"), (1.0, "beta")]


def toy_chain() -> DiscreteVP:
    """The 40 steps of the 2-D experiment of SIMS (arXiv 2408.16333)."""
    return DiscreteVP.cosine(40, noiseless_start=True)


def curved(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
    """A denoiser that is not linear and does not saturate."""
    return torch.tanh(x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2).sqrt())


def ddpm_textbook(chain: DiscreteVP, latents: Tensor, streams: SeedStreams, variance: str) -> Tensor:
    """Algorithm 2 of DDPM (arXiv 2006.11239) in its own scale, t = T - 1 ... 1, with either of its variances."""
    alpha_bar, beta = chain.alphas_cumprod.tolist(), chain.betas.tolist()
    x = latents
    for t in range(len(beta) - 1, 0, -1):
        sigma = torch.full((len(x),), math.sqrt((1 - alpha_bar[t]) / alpha_bar[t]), dtype=torch.float64)
        clean = curved(x / math.sqrt(alpha_bar[t]), sigma)
        epsilon = (x - math.sqrt(alpha_bar[t]) * clean) / math.sqrt(1 - alpha_bar[t])
        x = (x - beta[t] / math.sqrt(1 - alpha_bar[t]) * epsilon) / math.sqrt(1 - beta[t])
        if t > 1:
            smaller = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t]
            scale = math.sqrt(beta[t] if variance == "beta" else smaller)
            x = x + scale * streams.randn(x.shape[1:], torch.float64)
    return x


def ddim_textbook(chain: DiscreteVP, latents: Tensor, streams: SeedStreams, eta: float) -> Tensor:
    """Equations 12 and 16 of DDIM (arXiv 2010.02502) in its own scale, which it shares with DDPM."""
    alpha_bar = chain.alphas_cumprod.tolist()
    x = latents
    for t in range(len(alpha_bar) - 1, 0, -1):
        now, then = alpha_bar[t], alpha_bar[t - 1]
        sigma = torch.full((len(x),), math.sqrt((1 - now) / now), dtype=torch.float64)
        clean = curved(x / math.sqrt(now), sigma)
        epsilon = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
        scale = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        x = math.sqrt(then) * clean + math.sqrt(1 - then - scale**2) * epsilon
        if scale > 0:
            x = x + scale * streams.randn(x.shape[1:], torch.float64)
    return x


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ddpm_equals_the_textbook_loop_in_the_variance_preserving_scale(variance: str) -> None:
    chain, seeds = toy_chain(), range(4)
    streams = SeedStreams(seeds)
    latents = streams.randn([1, 3, 3], torch.float64)
    images = ancestral_sampler(curved, latents, sigmas=chain.sigmas.flip(0), streams=streams, variance=variance).images
    same = SeedStreams(seeds)
    expected = ddpm_textbook(chain, same.randn([1, 3, 3], torch.float64), same, variance)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-9)
    assert torch.equal(streams.randn([5], torch.float64), same.randn([5], torch.float64))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_eta_interpolates_as_the_textbook_loop_of_ddim(eta: float) -> None:
    chain, seeds = toy_chain(), range(4)
    streams = SeedStreams(seeds)
    latents = streams.randn([1, 3, 3], torch.float64)
    images = ancestral_sampler(curved, latents, sigmas=chain.sigmas.flip(0), streams=streams, eta=eta).images
    same = SeedStreams(seeds)
    expected = ddim_textbook(chain, same.randn([1, 3, 3], torch.float64), same, eta)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-9)


def test_the_two_variances_of_ddpm_and_every_eta_sample_different_images() -> None:
    chain, images = toy_chain(), []
    for eta, variance in ETAS:
        streams = SeedStreams(range(4))
        latents = streams.randn([1, 8, 8], torch.float64)
        images.append(
            ancestral_sampler(
                curved, latents, sigmas=chain.sigmas.flip(0), streams=streams, eta=eta, variance=variance
            ).images
        )
    for one, other in itertools.combinations(images, 2):
        assert (one - other).abs().max() > 0.01


def gaussian_variance(schedule: list[float], a: float, variance: str) -> float:
    """Variance of DDPM's samples of N(0, a) with the exact denoiser.

    The posterior of x_s given x_t and the clean image has mean r x_t + (1 - r) D and variance s^2 (1 - r),
    r = s^2 / t^2; D is a / (a + t^2) of x_t, so every step maps the variance affinely.
    """
    total = 1 + schedule[0] ** 2
    for t, s in itertools.pairwise(schedule):
        r = s**2 / t**2
        beta = 1 - (1 + s**2) / (1 + t**2)  # 1 - alpha_bar_t / alpha_bar_s
        added = {"posterior": s**2 * (1 - r), "beta": beta * (1 + s**2) * (s > 0)}[variance]
        total = (r + (1 - r) * a / (a + t**2)) ** 2 * total + added
    return total


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize(("num_steps", "sigma_max"), [(8, 80.0), (20, 5.0)])
def test_ddpm_samples_of_gaussian_data_have_the_variance_of_its_recursion(
    num_steps: int, sigma_max: float, variance: str
) -> None:
    a, sigmas = 0.25, sigma_schedule(num_steps, 0.1, sigma_max)
    streams = SeedStreams(range(10))
    latents = streams.randn([1, 100, 100], torch.float64)
    samples = ancestral_sampler(Gaussian(a), latents, sigmas=sigmas, streams=streams, variance=variance).images
    assert float(samples.var()) == pytest.approx(gaussian_variance(sigmas.tolist(), a, variance), rel=0.02)


class Impulses(SeedStreams):
    """Noise of which the k-th draw reaches image k + 1 alone, so that variances are sums of squares over images."""

    def __init__(self, num_steps: int) -> None:
        self.num_images, self.draws = num_steps + 1, 0

    def randn(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        self.draws += 1
        return self.unit(self.draws)

    def unit(self, image: int) -> Tensor:
        return torch.eye(self.num_images, dtype=torch.float64)[image].reshape(-1, 1, 1, 1)


def exact_variance(denoiser: Gaussian, sigmas: Tensor, eta: float, variance: str) -> float:
    """Variance of the samples of a linear denoiser, without sampling error: from the response to each noise."""
    streams = Impulses(len(sigmas) - 1)
    images = ancestral_sampler(
        denoiser, streams.unit(0), sigmas=sigmas, streams=streams, eta=eta, variance=variance
    ).images
    return float(images.square().sum())


@pytest.mark.parametrize("variance", ["posterior", "beta"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 40])
def test_the_response_to_each_noise_sums_to_the_recursion_to_1e12(num_steps: int, variance: str) -> None:
    sigmas = sigma_schedule(num_steps)
    expected = gaussian_variance(sigmas.tolist(), 0.25, variance)
    assert exact_variance(Gaussian(0.25), sigmas, 1.0, variance) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_at_every_eta_the_variance_converges_to_that_of_the_noisy_data_at_order_1(eta: float) -> None:
    """Data of variance 1, for which the start's variance 1 + sigma^2 is exact."""
    steps, errors = [64, 128, 256, 512], []
    for n in steps:
        sigmas = sigma_schedule(n + 1, 0.5, 4.0)[:-1]
        errors.append(abs(exact_variance(Gaussian(1.0), sigmas, eta, "posterior") - (1 + 0.5**2)))
    assert order_of(steps, errors) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("num_steps", [2, 3, 9])
def test_variance_beta_is_exact_for_data_of_unit_variance_in_any_number_of_steps(num_steps: int) -> None:
    """The one of the two extremes of DDPM (arXiv 2006.11239, sec. 3.2); the other is the next test."""
    sigmas = sigma_schedule(num_steps, 0.5, 80.0)[:-1]
    assert exact_variance(Gaussian(1.0), sigmas, 1.0, "beta") == pytest.approx(1 + 0.5**2, rel=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("num_steps", [2, 3, 9])
def test_the_posterior_variance_is_exact_for_a_single_point_at_any_eta_in_any_number_of_steps(
    num_steps: int, eta: float
) -> None:
    """The start's variance 1 + sigma^2 is too large by 1, which is 1e-12 of it here and shrinks."""
    sigmas = sigma_schedule(num_steps, 0.5, 1e6)[:-1]
    assert exact_variance(Gaussian(0.0), sigmas, eta, "posterior") == pytest.approx(0.5**2, rel=1e-11)


@pytest.mark.parametrize(("eta", "variance"), ETAS)
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_the_last_step_adds_no_noise(num_steps: int, eta: float, variance: str) -> None:
    seen: list[Tensor] = []

    def recorded(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        seen.append(curved(x, sigma))
        return seen[-1]

    streams = Impulses(num_steps)
    sampled = ancestral_sampler(
        recorded, streams.unit(0), sigmas=sigma_schedule(num_steps), streams=streams, eta=eta, variance=variance
    )
    assert torch.equal(sampled.images, seen[-1])
    assert len(seen) == sampled.nfe == num_steps
    assert streams.draws == (num_steps - 1 if eta > 0 else 0)


def test_an_image_of_ddpm_does_not_depend_on_its_batch() -> None:
    def sample(seeds: range) -> Tensor:
        streams = SeedStreams(seeds)
        latents = streams.randn([1, 3, 3], torch.float64)
        return ancestral_sampler(curved, latents, sigmas=sigma_schedule(6), streams=streams).images

    assert torch.equal(sample(range(5)), torch.cat([sample(range(2)), sample(range(2, 5))]))


def test_a_schedule_that_falls_by_more_than_the_precision_of_a_float_gives_real_images() -> None:
    for sigma_max in range(50, 150):
        sigmas = torch.tensor([sigma_max, 1e-8, 0.0], dtype=torch.float64)
        images = ancestral_sampler(curved, pixels(1), sigmas=sigmas, streams=SeedStreams(range(1))).images
        assert images.dtype == torch.float64
        assert images.isfinite().all()


@pytest.mark.parametrize("sampler", [heun_sampler, euler_sampler, ddim_sampler, ancestral_sampler])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_come_in_the_dtype_of_the_noise_levels(sampler: Sampler, dtype: torch.dtype) -> None:
    sampled = sampler(curved, pixels(2), sigmas=sigma_schedule(3, dtype=dtype), streams=SeedStreams(range(2)))
    assert sampled.images.dtype == dtype


@pytest.mark.parametrize(
    ("sampler", "settings", "reason"),
    [
        (euler_sampler, {"S_churn": 1.0}, "S_churn > 0 .* SeedStreams"),
        (ancestral_sampler, {}, "eta > 0 .* SeedStreams"),
        (ancestral_sampler, {"eta": 0.5}, "eta > 0 .* SeedStreams"),
        (ancestral_sampler, {"eta": 0.0, "variance": "gamma"}, "variance='gamma' .* choose 'posterior', or 'beta'"),
        (ancestral_sampler, {"eta": 0.0, "variance": "beta"}, "variance='beta' at eta=0 is unknown"),
        (ancestral_sampler, {"eta": 1.5}, "eta=1.5 .* from 0 to 1"),
        (ancestral_sampler, {"eta": -0.5}, "eta=-0.5 .* from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_sentence(
    sampler: Sampler, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        sampler(forbidden, pixels(2), sigmas=sigma_schedule(5), **settings)
    assert "\n" not in str(error.value)


def forbidden(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
    raise AssertionError("called")
