from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sims_ray.nn.precond import EDMPrecond
from sims_ray.nn.song_unet import SongUNet
from tests.networks import small_network

RGB_CONDITIONAL = {"img_resolution": 32, "img_channels": 3, "label_dim": 10, "channel_mult": [1, 2, 2]}
CIFAR10 = {"img_resolution": 32, "channel_mult": (2, 2, 2)}
FFHQ64 = {"img_resolution": 64, "channel_mult": (1, 2, 2, 2)}


class Zero(nn.Module):
    """A raw network that answers 0."""

    def forward(self, x: Tensor, *conditions: Tensor | None) -> Tensor:
        return torch.zeros_like(x)


def noisy(batch: int = 3, channels: int = 1, resolution: int = 8) -> Tensor:
    return torch.randn(batch, channels, resolution, resolution, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("settings", [{}, {"img_resolution": 16}, RGB_CONDITIONAL])
def test_the_output_has_the_shape_of_the_input(settings: dict[str, Any]) -> None:
    net = small_network(**settings)
    x = noisy(2, settings.get("img_channels", 1), settings.get("img_resolution", 8))
    labels = torch.eye(10)[:2] if "label_dim" in settings else None
    denoised = net(x, torch.tensor([0.5, 2.0]), labels)
    assert denoised.shape == x.shape
    assert denoised.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "published"),
    [(CIFAR10, 55.734e6), ({**CIFAR10, "label_dim": 10}, 55.735e6), (FFHQ64, 61.806e6)],
    ids=["cifar10", "cifar10-conditional", "ffhq64"],
)
def test_the_parameter_count_is_the_published_one(settings: dict[str, Any], published: float) -> None:
    with torch.device("meta"):
        net = SongUNet(img_channels=3, augment_dim=9, model_channels=128, num_blocks=4, **settings)
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(published, rel=1e-3)


def test_the_denoiser_tends_to_the_identity_linearly_as_sigma_tends_to_0() -> None:
    net, x = small_network(), noisy()
    errors = [float((net(x, torch.tensor([sigma])) - x).abs().max()) for sigma in (1e-2, 1e-3, 1e-4)]
    assert errors[0] > 1e-4
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1] / 5


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_a_network_that_answers_0_is_the_wiener_filter_of_the_data_variance(sigma: float) -> None:
    x = noisy()
    denoised = EDMPrecond(Zero(), sigma_data=0.7)(x, torch.tensor([sigma]))
    torch.testing.assert_close(denoised, x * 0.7**2 / (0.7**2 + sigma**2))


def test_one_sigma_for_all_equals_the_same_sigma_for_each() -> None:
    net, x = small_network(), noisy()
    assert torch.equal(net(x, torch.tensor([0.7])), net(x, torch.full([3], 0.7)))


def test_every_image_is_denoised_at_its_own_sigma() -> None:
    net, x, sigma = small_network(), noisy(), torch.tensor([0.1, 1.0, 10.0])
    alone = torch.cat([net(x[i : i + 1], sigma[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(net(x, sigma), alone, rtol=1e-4, atol=1e-5)


def test_the_label_changes_the_output_of_a_conditional_network() -> None:
    net, x, sigma = small_network(label_dim=2), noisy(), torch.tensor([1.0])
    first, second, none = (
        net(x, sigma, labels) for labels in (torch.eye(2)[[0, 0, 0]], torch.eye(2)[[1, 1, 1]], torch.zeros(3, 2))
    )
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(net(x, sigma), none)


def test_an_unconditional_network_ignores_the_label() -> None:
    net, x, sigma = small_network(), noisy(), torch.tensor([1.0])
    assert torch.equal(net(x, sigma, torch.eye(3)), net(x, sigma))


def test_augment_labels_of_zeros_equal_no_augment_labels() -> None:
    net, x, sigma = small_network(augment_dim=9), noisy(), torch.tensor([1.0])
    assert torch.equal(net(x, sigma, None, torch.zeros(3, 9)), net(x, sigma))
    assert (net(x, sigma, None, torch.ones(3, 9)) - net(x, sigma)).abs().max() > 1e-3


def test_dropout_acts_in_training_mode_only() -> None:
    net, x, sigma = small_network(dropout=0.5), noisy(), torch.tensor([1.0])
    assert torch.equal(net(x, sigma), small_network(dropout=0.0)(x, sigma))
    net.train()
    assert not torch.equal(net(x, sigma), net(x, sigma))
