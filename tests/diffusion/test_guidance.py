import copy

import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.guidance import sims_guidance
from sims_ray.diffusion.sampler import heun_sampler, sigma_schedule
from tests.networks import small_network


def forbidden(x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
    raise AssertionError("called")


def noisy() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 4.0])


def test_omega_0_is_the_base_itself_and_never_calls_the_auxiliary() -> None:
    base = small_network()
    assert sims_guidance(base, forbidden, 0) is base
    assert sims_guidance(base, None, 0.0) is base


def test_omega_minus_1_is_the_auxiliary_and_never_calls_the_base() -> None:
    aux = small_network()
    assert sims_guidance(forbidden, aux, -1.0) is aux


@pytest.mark.parametrize("omega", [-1.0, -0.3, 0.7, 1.0, 13.0])
def test_two_identical_networks_sample_the_base_bit_for_bit_at_any_omega(omega: float) -> None:
    base = small_network()
    latents, sigmas = noisy()[0], sigma_schedule(4)
    guided = heun_sampler(sims_guidance(base, copy.deepcopy(base), omega), latents, sigmas=sigmas).images
    assert torch.equal(guided, heun_sampler(base, latents, sigmas=sigmas).images)


@pytest.mark.parametrize("omega", [-1.0, 0.5])
def test_guidance_without_an_auxiliary_is_refused(omega: float) -> None:
    with pytest.raises(ValueError, match=f"omega = {omega:g} needs an auxiliary"):
        sims_guidance(small_network(), None, omega)


@pytest.mark.parametrize("omega", [-0.5, 0.25, 1.0, 3.0])
def test_guidance_is_affine_in_omega_between_auxiliary_and_base(omega: float) -> None:
    base, aux, (x, sigma) = small_network(0), small_network(1), noisy()
    expected = (1 + omega) * base(x, sigma) - omega * aux(x, sigma)
    torch.testing.assert_close(sims_guidance(base, aux, omega)(x, sigma), expected, rtol=1e-5, atol=1e-5)
    assert (base(x, sigma) - aux(x, sigma)).abs().max() > 0.01


def test_guidance_extrapolates_the_scores_as_the_paper_does() -> None:
    base, aux, (x, sigma) = small_network(0), small_network(1), noisy()
    variance = sigma.reshape(-1, 1, 1, 1) ** 2
    score, base_score, aux_score = (
        (denoise(x, sigma) - x) / variance for denoise in (sims_guidance(base, aux, 1.5), base, aux)
    )
    torch.testing.assert_close(score, 2.5 * base_score - 1.5 * aux_score, rtol=1e-4, atol=1e-4)


def test_both_networks_are_told_the_labels() -> None:
    base, aux, (x, sigma) = small_network(0, label_dim=2), small_network(1, label_dim=2), noisy()
    guided = sims_guidance(base, aux, 1.0)
    labels = torch.eye(2)
    expected = 2 * base(x, sigma, labels) - aux(x, sigma, labels)
    torch.testing.assert_close(guided(x, sigma, labels), expected, rtol=1e-5, atol=1e-5)
