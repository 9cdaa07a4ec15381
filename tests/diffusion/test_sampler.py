import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.guidance import sims_guidance
from sims_ray.diffusion.noise import SeedStreams
from sims_ray.diffusion.sampler import heun_sampler, sigma_schedule, to_uint8

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
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(2, abs=0.15)


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
    settings = {"S_churn": 40.0, "S_min": 100.0, "S_max": 200.0}
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
