import numpy as np
import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.loss import DenoisingLoss, draw_noise
from sims_ray.nn.precond import EDM2Precond, Precond
from tests.networks import ARCHITECTURES, small_network

IMAGES = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
PIXELS = 64
SIGMA, NOISE = draw_noise(torch.Generator().manual_seed(0), 20, (1, 8, 8), -1.2, 1.2)


class Point(Precond):
    """The exact denoiser of a data set of one image."""

    def __init__(self, image: Tensor, sigma_data: float) -> None:
        super().__init__(sigma_data=sigma_data)
        self.image = image

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self.image.expand_as(x)


class UncertainPoint(EDM2Precond):
    """The same with a given uncertainty of each image in the batch."""

    def __init__(self, image: Tensor, sigma_data: float, logvar: Tensor) -> None:
        Precond.__init__(self, sigma_data=sigma_data)
        self.image, self.given = image, logvar

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self.image.expand_as(x)

    def logvar(self, sigma: Tensor) -> Tensor:
        return self.given.expand_as(sigma)


class Keep(Precond):
    """Returns the noisy image."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


class Recorder(Precond):
    """Keeps what it is asked."""

    def forward(self, x: Tensor, *conditions: Tensor | None) -> Tensor:  # type: ignore[override]
        self.asked = (x, *conditions)
        return x


def weight(sigma_data: float) -> Tensor:
    """EDM's lambda(sigma)."""
    return (SIGMA.double() ** 2 + sigma_data**2) / (SIGMA.double() * sigma_data) ** 2


def image(scale: float) -> Tensor:
    return scale * torch.linspace(-1, 1, PIXELS).reshape(1, 8, 8)


# --- EDM


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_edm_loss_equals_its_formula_for_the_exact_denoiser_of_a_point(scale: float) -> None:
    sigma_data = 0.7
    s, y = SIGMA.double().numpy(), IMAGES.double().numpy()
    squares = ((image(scale).double().numpy() - y) ** 2).sum((1, 2, 3))
    expected = (s**2 + sigma_data**2) / (s * sigma_data) ** 2 * squares
    losses = DenoisingLoss(Point(image(scale), sigma_data))(IMAGES, SIGMA, NOISE)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_a_denoiser_that_keeps_the_noise_is_charged_the_noise() -> None:
    losses = DenoisingLoss(Keep())(IMAGES, SIGMA, NOISE)
    expected = (SIGMA**2 + 0.25) / 0.25 * (NOISE**2).sum((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)


def test_the_network_is_shown_the_noisy_image_its_level_and_both_conditions() -> None:
    net, labels, augment_labels = Recorder(), torch.eye(20), torch.ones(20, 9)
    DenoisingLoss(net)(IMAGES, SIGMA, NOISE, labels, augment_labels)
    x, *conditions = net.asked
    torch.testing.assert_close(x, torch.stack([IMAGES[i] + SIGMA[i] * NOISE[i] for i in range(20)]))
    expected = (SIGMA, labels, augment_labels)
    assert all(actual is given for actual, given in zip(conditions, expected, strict=True))


def test_noise_levels_are_log_normal_and_noise_is_standard_normal() -> None:
    sigma, noise = draw_noise(torch.Generator().manual_seed(0), 100_000, (2,), -0.4, 1.7)
    assert float(sigma.log().mean()) == pytest.approx(-0.4, abs=0.02)
    assert float(sigma.log().std()) == pytest.approx(1.7, abs=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)


# --- EDM2


@pytest.mark.parametrize("sigma_data", [0.5, 0.7])
def test_edm2_loss_equals_its_formula_for_a_given_uncertainty(sigma_data: float) -> None:
    logvar = torch.linspace(-2, 3, 20)
    losses = DenoisingLoss(UncertainPoint(image(0.5), sigma_data, logvar))(IMAGES, SIGMA, NOISE)
    error = (image(0.5) - IMAGES).double() ** 2
    u = logvar.double().reshape(-1, 1, 1, 1)
    per_pixel = weight(sigma_data).reshape(-1, 1, 1, 1) / u.exp() * error + u  # EDM2 eq. 21
    torch.testing.assert_close(losses.double(), per_pixel.sum((1, 2, 3)), rtol=1e-5, atol=1e-4)


def test_edm2_loss_of_a_network_uses_its_own_uncertainty() -> None:
    net = small_network(**ARCHITECTURES["edm2"])
    assert isinstance(net, EDM2Precond)
    squares = ((net(IMAGES + SIGMA.reshape(-1, 1, 1, 1) * NOISE, SIGMA) - IMAGES) ** 2).sum((1, 2, 3)).double()
    u = net.logvar(SIGMA).double()
    assert u.std() > 0.1
    losses = DenoisingLoss(net)(IMAGES, SIGMA, NOISE)
    torch.testing.assert_close(losses.double(), weight(0.5) * squares / u.exp() + PIXELS * u, rtol=1e-4, atol=1e-3)


def test_without_uncertainty_edm2_loss_is_that_of_edm() -> None:
    certain = UncertainPoint(image(0.5), 0.5, torch.zeros(()))
    expected = DenoisingLoss(Point(image(0.5), 0.5))(IMAGES, SIGMA, NOISE)
    assert torch.equal(DenoisingLoss(certain)(IMAGES, SIGMA, NOISE), expected)
    net = small_network(**ARCHITECTURES["edm2"])
    assert isinstance(net, EDM2Precond)
    net.logvar_linear.weight.zero_()
    squares = ((net(IMAGES + SIGMA.reshape(-1, 1, 1, 1) * NOISE, SIGMA) - IMAGES) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(
        DenoisingLoss(net)(IMAGES, SIGMA, NOISE).double(), weight(0.5) * squares.double(), rtol=1e-4, atol=0
    )


def test_the_best_uncertainty_is_the_log_of_the_mean_weighted_squared_error_per_pixel() -> None:
    squares = ((image(0.5) - IMAGES).double() ** 2).mean((1, 2, 3))
    best = (weight(0.5) * squares).log()

    def loss_and_slope(logvar: Tensor) -> tuple[Tensor, Tensor]:
        logvar = logvar.clone().requires_grad_(True)
        losses = DenoisingLoss(UncertainPoint(image(0.5), 0.5, logvar))(IMAGES.double(), SIGMA.double(), NOISE.double())
        (slope,) = torch.autograd.grad(losses.sum(), logvar)
        return losses.detach(), slope

    least, slope = loss_and_slope(best)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-4 * PIXELS)
    torch.testing.assert_close(least, PIXELS * (1 + best), rtol=1e-5, atol=1e-3)
    for offset in (-1.0, -0.1, 0.1, 1.0):
        losses, slope = loss_and_slope(best + offset)
        assert (losses > least).all()
        assert (slope * offset > 0).all()


def test_at_the_best_uncertainty_gradients_of_the_error_have_one_scale_at_every_noise_level() -> None:
    squares = ((image(0.5) - IMAGES) ** 2).mean((1, 2, 3))
    net = UncertainPoint(image(0.5), 0.5, (weight(0.5) * squares.double()).log().float())
    target = IMAGES.clone().requires_grad_(True)
    DenoisingLoss(net)(target, SIGMA, NOISE).sum().backward()
    assert target.grad is not None
    # d/dy of |D - y|^2 / mean|D - y|^2 is 2 (y - D) / mean|D - y|^2, whatever sigma is
    expected = 2 * (IMAGES - image(0.5)) / squares.reshape(-1, 1, 1, 1)
    torch.testing.assert_close(target.grad, expected, rtol=1e-4, atol=1e-4)
