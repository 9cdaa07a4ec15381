"""Networks in half precision: bfloat16 keeps 8 bits of a number, float16 keeps 11, so errors are 1/256 and 1/2048."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.generate import generate
from sims_ray.diffusion.loss import DenoisingLoss
from sims_ray.nn.precond import Precond
from tests.networks import ARCHITECTURES, small_network

# Bounds are about three times what was measured over three networks of every architecture:
# denoised images 0.8 % and 0.09 % of their standard deviation, sampled ones 0.7 and 0.07 grey levels.
DENOISED = {torch.bfloat16: 0.024, torch.float16: 0.0027}
GREY_LEVELS = {torch.bfloat16: 2.0, torch.float16: 0.2}
UNTOLD = ("edm2", "augment_labels")  # EDM2 knows no augmentation
SAMPLER = {"num_steps": 8, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}

each_architecture = pytest.mark.parametrize("settings", ARCHITECTURES.values(), ids=ARCHITECTURES)
each_precision = pytest.mark.parametrize("precision", list(DENOISED), ids=str)


def network(settings: dict[str, Any], precision: torch.dtype) -> Precond:
    net = small_network(label_dim=3, **settings)
    net.precision = precision
    return net


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images with noise of their level, levels from the smallest to the largest, and labels."""
    sigma = torch.logspace(-2.7, 1.9, 16)
    noise = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return noise * (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1), sigma, torch.eye(3)[torch.arange(16) % 3]


def mean_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().mean() / expected.std())


@each_architecture
@each_precision
def test_half_precision_denoises_in_float32_finitely_and_nearly_as_float32_does(
    settings: dict[str, Any], precision: torch.dtype
) -> None:
    expected = network(settings, torch.float32)(*batch())
    denoised = network(settings, precision)(*batch())
    assert denoised.dtype == torch.float32
    assert denoised.isfinite().all()
    assert 0 < mean_error(denoised, expected) < DENOISED[precision]


@each_architecture
def test_three_bits_more_make_the_error_several_times_smaller(settings: dict[str, Any]) -> None:
    expected = network(settings, torch.float32)(*batch())
    coarse, fine = (
        mean_error(network(settings, precision)(*batch()), expected) for precision in (torch.bfloat16, torch.float16)
    )
    assert fine < coarse / 4  # 8 in the mean


@each_architecture
@each_precision
def test_features_are_in_half_precision_but_weights_and_the_embedding_stay_in_float32(
    settings: dict[str, Any], precision: torch.dtype
) -> None:
    net = network(settings, precision)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    features = net.encode(*batch())
    assert {skip.dtype for skip in (features.encoded.x, *features.encoded.skips)} == {precision}
    assert features.encoded.emb.dtype == torch.float32  # ln sigma / 4 needs more than 8 bits
    assert torch.equal(net.decode(features), net(*batch()))
    after = net.state_dict()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@each_precision
@pytest.mark.parametrize(
    ("name", "told"),
    [(name, told) for name in ARCHITECTURES for told in ("labels", "augment_labels") if (name, told) != UNTOLD],
)
def test_conditions_change_the_image_in_half_precision_as_they_do_in_float32(
    name: str, told: str, precision: torch.dtype
) -> None:
    net = small_network(**{**ARCHITECTURES[name], **({"label_dim": 3} if told == "labels" else {"augment_dim": 9})})
    x, sigma, _ = batch()
    # Ten times a label, for an effect well above the rounding of the whole image.
    conditions = (10 * torch.eye(3)[[0] * 16], None) if told == "labels" else (None, torch.full((16, 9), 10.0))

    def effect(precision: torch.dtype) -> Tensor:
        net.precision = precision
        return net(x, sigma, *conditions) - net(x, sigma)

    assert mean_error(effect(precision), effect(torch.float32)) < 10 * DENOISED[precision]


@each_architecture
@each_precision
def test_images_from_the_same_seeds_differ_by_a_few_grey_levels_at_most(
    settings: dict[str, Any], precision: torch.dtype
) -> None:
    expected, images = (
        next(generate(network(settings, dtype), (1, 8, 8), range(32), SAMPLER, label_dim=3)).images.float()
        for dtype in (torch.float32, precision)
    )
    assert expected.std() > 10
    assert 0 < float((images - expected).abs().mean()) < GREY_LEVELS[precision]
    assert float((images - expected).abs().max()) < 15 * GREY_LEVELS[precision]


@each_architecture
def test_gradients_come_back_in_float32_and_point_where_those_of_float32_do(settings: dict[str, Any]) -> None:
    def gradient(precision: torch.dtype) -> Tensor:
        net = network(settings, precision).requires_grad_(True)
        x, sigma, labels = batch()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        DenoisingLoss(net)(0.5 * noise.clamp(-1, 1), sigma, noise, labels).mean().backward()
        gradients = [parameter.grad for parameter in net.parameters()]
        assert all(g is not None and g.dtype == torch.float32 for g in gradients)
        return torch.cat([g.flatten() for g in gradients if g is not None])

    expected, actual = gradient(torch.float32), gradient(torch.bfloat16)
    assert actual.isfinite().all()
    assert float(torch.cosine_similarity(actual, expected, dim=0)) > 0.99
