import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sims_ray.diffusion.loss import DenoisingLoss, draw_noise
from sims_ray.diffusion.noise import epoch_order, step_generator
from sims_ray.diffusion.training import Optimization, Training
from sims_ray.nn.precond import Precond
from sims_ray.storage.checkpoints import load_tensors, save_tensors
from tests.networks import small_network

SETTINGS = Optimization(
    batch_size=8,
    lr=1e-3,
    lr_rampup_nimg=0,
    ema_halflife_nimg=20,
    ema_rampup_ratio=None,
    P_mean=-1.2,
    P_std=1.2,
    seed=3,
)
CPU = torch.device("cpu")
IMAGES = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.eye(2)[torch.arange(20) % 2]


class Point(Precond):
    """The exact denoiser of a data set of one image."""

    def __init__(self, image: Tensor, sigma_data: float) -> None:
        super().__init__(sigma_data=sigma_data)
        self.image = image

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return self.image.expand_as(x)


class Keep(Precond):
    """Returns the noisy image."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


class Poisoned(nn.Module):
    """A loss that is multiplied by something that is no number."""

    def __init__(self, loss: nn.Module, factor: float) -> None:
        super().__init__()
        self.loss, self.factor = loss, factor

    def forward(self, *arguments: Tensor | None) -> Tensor:
        return self.loss(*arguments) * self.factor


def trainable(seed: int = 0, dropout: float = 0.0) -> Precond:
    return small_network(seed, label_dim=2, dropout=dropout).requires_grad_(True)


def training(net: Precond, settings: Optimization = SETTINGS, rank: int = 0, world_size: int = 1) -> Training:
    return Training(net, settings, IMAGES, LABELS, device=CPU, rank=rank, world_size=world_size)


def gradients(run: Training) -> Tensor:
    return torch.cat([p.grad.flatten() for p in run.net.parameters() if p.grad is not None]).clone()


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()]).clone()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_gradients_of_all_workers_average_to_those_of_one(world_size: int) -> None:
    alone = training(trainable())
    workers = [training(trainable(), rank=rank, world_size=world_size) for rank in range(world_size)]
    for run in (alone, *workers):
        run.nimg = 16  # the batch crosses the border of an epoch
        run.step()
    averaged = torch.stack([gradients(run) for run in workers]).mean(0)
    torch.testing.assert_close(averaged, gradients(alone), rtol=1e-3, atol=1e-5 * float(gradients(alone).abs().max()))
    assert (gradients(workers[0]) - gradients(workers[1])).abs().max() > 0.01 * gradients(alone).abs().max()


def test_a_batch_that_does_not_divide_by_the_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 8 does not divide by 3 workers"):
        training(trainable(), world_size=3)


def test_the_reported_loss_is_the_mean_of_the_edm_loss_over_the_images_since_the_last_report() -> None:
    run, net = training(trainable(), replace(SETTINGS, lr=1e-30)), trainable()
    losses = []
    for nimg in (0, 8, 16):
        rows = epoch_order(SETTINGS.seed, nimg, 8, 20)
        sigma, noise = draw_noise(step_generator(SETTINGS.seed, nimg, "noise"), 8, (1, 8, 8), -1.2, 1.2)
        losses.append(DenoisingLoss(net)(IMAGES[rows] / 127.5 - 1, sigma, noise, LABELS[rows]).detach())
    run.step()
    run.step()
    assert run.pop_loss() == pytest.approx(float(torch.cat(losses[:2]).mean()), rel=1e-5)
    run.step()
    assert run.pop_loss() == pytest.approx(float(losses[2].mean()), rel=1e-5)


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_stopping_and_going_on_equals_going_straight_bit_for_bit(tmp_path: Path, stop: int) -> None:
    settings = replace(SETTINGS, lr_rampup_nimg=30, ema_rampup_ratio=0.05)
    straight, first = (training(trainable(dropout=0.3), settings) for _ in range(2))
    for _ in range(6):
        straight.step()
    for _ in range(stop):
        first.step()
    save_tensors(tmp_path / "state.safetensors", first.state(), {"nimg": first.nimg})
    tensors, card = load_tensors(tmp_path / "state.safetensors")
    torch.randn(5)  # another process would be elsewhere in the global stream
    second = training(trainable(seed=9, dropout=0.3), settings)
    second.load_state(tensors, card["nimg"])
    for _ in range(6 - stop):
        second.step()
    assert second.nimg == straight.nimg == 48
    expected, actual = straight.state(), second.state()
    assert actual.keys() == expected.keys()
    assert {name.split(".")[0] for name in expected} == {"net", "ema", "adam"}
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_dropout_matters_in_training_and_is_a_function_of_the_seed() -> None:
    runs = [training(trainable(dropout=dropout)) for dropout in (0.0, 0.3, 0.3)]
    for run in runs:
        torch.randn(3)
        run.step()
    none, some, again = (gradients(run) for run in runs)
    assert torch.equal(some, again)
    assert not torch.equal(none, some)


@pytest.mark.parametrize("nimg", [0, 1, 500, 999, 1000, 10**9])
def test_the_learning_rate_rises_linearly_and_stays(nimg: int) -> None:
    ramped = replace(SETTINGS, lr_rampup_nimg=1000)
    assert ramped.learning_rate(nimg) == pytest.approx(1e-3 * min(nimg / 1000, 1))
    assert SETTINGS.learning_rate(nimg) == 1e-3


def test_the_first_step_of_adam_moves_weights_by_the_learning_rate_of_the_images_seen() -> None:
    for nimg, moved in ((0, 0.0), (250, 2.5e-4), (5000, 1e-3)):
        run = training(trainable(), replace(SETTINGS, lr_rampup_nimg=1000))
        before, run.nimg = weights(run.net), nimg
        run.step()
        assert float((weights(run.net) - before).abs().max()) == pytest.approx(moved, rel=1e-3)


def test_the_average_follows_the_weights_by_one_minus_beta() -> None:
    run = training(trainable())
    start = weights(run.net)
    run.step()
    beta = 0.5 ** (8 / 20)
    torch.testing.assert_close(weights(run.ema), beta * start + (1 - beta) * weights(run.net), rtol=0, atol=1e-6)
    assert not run.ema.training
    assert not any(p.requires_grad for p in run.ema.parameters())


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_gradients_that_are_no_numbers_leave_finite_weights_and_training_goes_on(factor: float) -> None:
    run = Training(trainable(), SETTINGS, IMAGES, LABELS, device=CPU, wrap=lambda net: Poisoned(net, factor))
    run.step()
    assert not math.isfinite(run.pop_loss())
    assert all(tensor.isfinite().all() for tensor in run.state().values())
    recovered = training(trainable())
    recovered.load_state(copy.deepcopy(run.state()), run.nimg)
    recovered.step()
    assert math.isfinite(recovered.pop_loss())


def test_edm_loss_equals_its_formula_for_the_exact_denoiser_of_a_point() -> None:
    sigma_data, (sigma, noise) = 0.7, draw_noise(torch.Generator().manual_seed(0), 20, (1, 8, 8), -1.2, 1.2)
    images, point = IMAGES / 127.5 - 1, torch.linspace(-1, 1, 64).reshape(1, 8, 8)
    s, y = sigma.double().numpy(), images.double().numpy()
    weight = (s**2 + sigma_data**2) / (s * sigma_data) ** 2
    for target in (torch.zeros(1, 8, 8), point):
        expected = weight * ((target.double().numpy() - y) ** 2).sum((1, 2, 3))
        losses = DenoisingLoss(Point(target, sigma_data))(images, sigma, noise)
        np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)


def test_a_denoiser_that_keeps_the_noise_is_charged_the_noise() -> None:
    sigma, noise = draw_noise(torch.Generator().manual_seed(0), 20, (1, 8, 8), -1.2, 1.2)
    losses = DenoisingLoss(Keep())(IMAGES / 127.5 - 1, sigma, noise)
    expected = (sigma**2 + 0.25) / 0.25 * (noise**2).sum((1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)


def test_noise_levels_are_log_normal_and_noise_is_standard_normal() -> None:
    sigma, noise = draw_noise(torch.Generator().manual_seed(0), 100_000, (2,), -0.4, 1.7)
    assert float(sigma.log().mean()) == pytest.approx(-0.4, abs=0.02)
    assert float(sigma.log().std()) == pytest.approx(1.7, abs=0.02)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
