"""What enters the loss of a training step: weights of the images, and their augmentation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.augment import augment, augment_label, draw_augmentation
from sims_ray.diffusion.loss import DenoisingLoss, draw_noise
from sims_ray.diffusion.noise import step_generator
from sims_ray.diffusion.optimization import Optimization
from sims_ray.diffusion.training import Training
from tests.diffusion.runs import (
    IMAGES,
    LABELS,
    ORDER,
    SETTINGS,
    gradients,
    recorded,
    trainable,
    training,
    workers,
)
from tests.networks import ARCHITECTURES

WEIGHTS = torch.linspace(0.0, 2.0, 20)
AUGMENTED = replace(SETTINGS, augment=0.5)
ROWS = ORDER.rows(0, 8)  # of the first step


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


# --- weights of the images


def test_images_of_weight_0_have_no_influence() -> None:
    mine = torch.ones(20)
    mine[ROWS[::2]] = 0
    others = IMAGES.clone()
    others[ROWS[::2]] = 255 - others[ROWS[::2]]
    one, other = training(trainable(), weights=mine), training(trainable(), images=others, weights=mine)
    one.step()
    other.step()
    assert torch.equal(gradients(one), gradients(other))
    without, different = training(trainable()), training(trainable(), images=others)
    without.step()
    different.step()
    assert (gradients(without) - gradients(different)).abs().max() > 0.01 * gradients(without).abs().max()


@pytest.mark.parametrize("scale", [1e-3, 0.3, 100.0])
def test_the_scale_of_the_weights_does_not_matter(scale: float) -> None:
    one, other = training(trainable(), weights=WEIGHTS), training(trainable(), weights=scale * WEIGHTS)
    one.step()
    other.step()
    close(gradients(other), gradients(one))
    assert other.pop_loss() == pytest.approx(one.pop_loss(), rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.3, 7.0])
def test_equal_weights_are_no_weights(weight: float) -> None:
    none, equal = training(trainable()), training(trainable(), weights=torch.full([20], weight))
    none.step()
    equal.step()
    close(gradients(equal), gradients(none))
    assert equal.pop_loss() == pytest.approx(none.pop_loss(), rel=1e-5)


def test_gradients_are_those_of_the_weighted_mean_of_the_losses() -> None:
    run, net = training(trainable(), weights=WEIGHTS), trainable()
    run.step()
    sigma, noise = draw_noise(step_generator(SETTINGS.seed, 0, "noise"), 8, (1, 8, 8), -1.2, 1.2)
    losses = DenoisingLoss(net)(IMAGES[ROWS] / 127.5 - 1, sigma, noise, LABELS[ROWS])
    weighted = sum(WEIGHTS[row] * loss for row, loss in zip(ROWS, losses, strict=True)) / (8 * WEIGHTS.mean())
    assert isinstance(weighted, Tensor)
    weighted.backward()
    close(gradients(run), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
    assert run.pop_loss() == pytest.approx(float(weighted.detach()), rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 4])
def test_weighted_and_augmented_gradients_of_all_workers_average_to_those_of_one(world_size: int) -> None:
    alone = training(trainable(augment_dim=9), AUGMENTED, weights=WEIGHTS)
    team = workers(lambda: trainable(augment_dim=9), AUGMENTED, world_size, weights=WEIGHTS)
    for run in (alone, *team):
        run.nimg = 16  # the batch crosses the border of an epoch
        run.step()
    close(torch.stack([gradients(run) for run in team]).mean(0), gradients(alone))


# --- latents


def test_latents_enter_as_they_are_in_float32() -> None:
    latents = (torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 3).to(torch.float16)
    run, recorder = recorded(trainable(), images=latents)
    run.step()
    images = recorder.seen[0][0]
    assert images is not None and images.dtype == torch.float32
    assert torch.equal(images, latents[torch.from_numpy(ROWS)].to(torch.float32))


# --- augmentation


@pytest.mark.parametrize("augment_dim", [0, 9])
def test_without_augmentation_images_come_as_they_are_and_a_network_that_asks_is_told_so(augment_dim: int) -> None:
    run, recorder = recorded(trainable(augment_dim=augment_dim))
    run.step()
    images, _, _, labels, augment_labels = recorder.seen[0]
    assert images is not None and labels is not None
    assert torch.equal(images, IMAGES[ROWS] / 127.5 - 1)
    assert torch.equal(labels, LABELS[ROWS])
    if augment_dim == 0:
        assert augment_labels is None
    else:
        assert augment_labels is not None
        assert torch.equal(augment_labels, torch.zeros(8, 9))


def test_a_network_told_of_no_augmentation_trains_like_one_that_is_not_told() -> None:
    told = trainable(augment_dim=9)
    untold = trainable()
    untold.load_state_dict({k: v for k, v in told.state_dict().items() if "map_augment" not in k})
    one, other = training(told), training(untold)
    for run in (one, other):
        run.step()
        run.step()
    for name, weight in other.net.named_parameters():
        assert torch.equal(one.net.get_parameter(name), weight), name


def test_augmented_images_and_their_labels_are_those_of_the_step_s_own_draws() -> None:
    run, recorder = recorded(trainable(augment_dim=9), AUGMENTED)
    run.nimg = 16
    run.step()
    rows = ORDER.rows(16, 8)
    a = draw_augmentation(step_generator(SETTINGS.seed, 16, "augment"), 8, 0.5)
    images, labels = augment(IMAGES[rows] / 127.5 - 1, a)
    seen, _, _, _, told = recorder.seen[0]
    assert seen is not None and told is not None
    assert torch.equal(seen, images) and torch.equal(told, labels)
    assert torch.equal(told, augment_label(a))
    assert (seen - (IMAGES[rows] / 127.5 - 1)).abs().amax((1, 2, 3)).gt(0.1).sum() >= 4


def test_augmentation_leaves_noise_and_levels_as_they_are() -> None:
    (plain, of_plain), (augmented, of_augmented) = (
        recorded(trainable(augment_dim=9), s) for s in (SETTINGS, AUGMENTED)
    )
    plain.step()
    augmented.step()
    for one, other in zip(of_plain.seen[0][1:4], of_augmented.seen[0][1:4], strict=True):
        assert one is not None and other is not None
        assert torch.equal(one, other)  # noise levels, noise, labels
    assert not torch.equal(gradients(plain), gradients(augmented))


@pytest.mark.parametrize("world_size", [2, 8])
def test_every_worker_augments_its_slice_of_the_global_batch(world_size: int) -> None:
    def seen(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
        run, recorder = recorded(trainable(augment_dim=9), AUGMENTED, rank=rank, world_size=world_size)
        run.step()
        images, _, _, _, told = recorder.seen[0]
        assert images is not None and told is not None
        return images, told

    whole = seen(0, 1)
    parts = [seen(rank, world_size) for rank in range(world_size)]
    for expected, slices in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(slices), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp", "adm"])
@pytest.mark.parametrize("settings", [SETTINGS, AUGMENTED], ids=["plain", "augmented"])
def test_every_parameter_of_a_network_that_asks_for_augmentations_receives_a_gradient_with_and_without(
    name: str, settings: Optimization
) -> None:
    assert_all_receive_gradients(training(trainable(architecture=name, augment_dim=9), settings))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("which", ["all", "decoder"])
def test_every_parameter_that_trains_receives_a_gradient_as_distributed_training_needs(name: str, which: str) -> None:
    assert_all_receive_gradients(training(trainable(architecture=name), replace(SETTINGS, trainable=which)))


def assert_all_receive_gradients(run: Training) -> None:
    run.step()
    for name, parameter in run.net.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
