import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.guidance import encoder_difference, shared_encoder_guidance
from sims_ray.diffusion.loss import DenoisingLoss, draw_noise
from sims_ray.diffusion.noise import step_generator
from sims_ray.nn.networks import decoder_parameters
from sims_ray.storage.checkpoints import load_tensors, save_tensors
from tests.diffusion.runs import (
    IMAGES,
    LABELS,
    ORDER,
    SETTINGS,
    Poisoned,
    gradients,
    trainable,
    training,
    weights,
    workers,
)
from tests.networks import ARCHITECTURES


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_gradients_of_all_workers_average_to_those_of_one(world_size: int) -> None:
    alone = training(trainable())
    team = workers(trainable, SETTINGS, world_size)
    for run in (alone, *team):
        run.nimg = 16  # the batch crosses the border of an epoch
        run.step()
    averaged = torch.stack([gradients(run) for run in team]).mean(0)
    torch.testing.assert_close(averaged, gradients(alone), rtol=1e-3, atol=1e-5 * float(gradients(alone).abs().max()))
    assert (gradients(team[0]) - gradients(team[1])).abs().max() > 0.01 * gradients(alone).abs().max()


def test_a_batch_of_fewer_images_than_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 8 is too small for 9 workers"):
        training(trainable(), world_size=9)


def test_the_reported_loss_is_the_mean_of_the_edm_loss_over_the_images_since_the_last_report() -> None:
    run, net = training(trainable(), replace(SETTINGS, lr=1e-30)), trainable()
    losses = []
    for nimg in (0, 8, 16):
        rows = ORDER.rows(nimg, 8)
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
    second = training(trainable(9, dropout=0.3), settings)
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
    run = training(trainable(), wrap=lambda loss: Poisoned(loss, factor))
    run.step()
    assert not math.isfinite(run.pop_loss())
    assert all(tensor.isfinite().all() for tensor in run.state().values())
    recovered = training(trainable())
    recovered.load_state(copy.deepcopy(run.state()), run.nimg)
    recovered.step()
    assert math.isfinite(recovered.pop_loss())


# --- Adam


def test_adam_s_moments_decay_by_the_betas_of_the_settings() -> None:
    beta1, beta2 = 0.8, 0.95
    run = training(trainable(), replace(SETTINGS, adam_betas=(beta1, beta2)))
    first, second = torch.zeros_like(weights(run.net)), torch.zeros_like(weights(run.net))
    for _ in range(3):
        run.step()
        g = gradients(run)
        first, second = beta1 * first + (1 - beta1) * g, beta2 * second + (1 - beta2) * g**2
    for name, expected in (("exp_avg", first), ("exp_avg_sq", second)):
        moments = [run.optimizer.state[parameter][name].flatten() for parameter in run.net.parameters()]
        torch.testing.assert_close(torch.cat(moments), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("loss_scale", [8.0, 100.0])
def test_the_scale_of_the_loss_scales_gradients_and_does_not_matter_to_adam(loss_scale: float) -> None:
    plain, scaled = training(trainable()), training(trainable(), replace(SETTINGS, loss_scale=loss_scale))
    start = weights(plain.net)
    plain.step()
    scaled.step()
    g = gradients(plain)
    torch.testing.assert_close(gradients(scaled), loss_scale * g, rtol=1e-3, atol=1e-5 * loss_scale * float(g.max()))
    meant = g.abs() > 1e-5 * g.max()  # not those that are 0 but for rounding, like that of a bias before a norm
    assert meant.double().mean() > 0.9
    moved, moved_scaled = ((weights(run.net) - start)[meant] for run in (plain, scaled))
    assert float((moved_scaled - moved).norm() / moved.norm()) < 1e-3
    assert plain.pop_loss() == scaled.pop_loss()  # the loss is reported without it


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_gradient_limit_of_0_drops_what_is_no_number(factor: float) -> None:
    run = training(trainable(), replace(SETTINGS, gradient_limit=0), wrap=lambda loss: Poisoned(loss, factor))
    before = weights(run.net)
    run.step()
    assert torch.equal(weights(run.net), before)
    assert not gradients(run).any()


@pytest.mark.parametrize(("limit", "moved"), [(0.0, 0.0), (1e5, -1e-3)])
def test_an_infinite_gradient_becomes_the_limit_and_finite_ones_stay(limit: float, moved: float) -> None:
    def with_one_infinite(gradient: Tensor) -> Tensor:
        return gradient.index_fill(0, torch.tensor([3]), math.inf)

    healthy, run = (training(trainable(), replace(SETTINGS, gradient_limit=limit)) for _ in range(2))
    bias = run.net.get_parameter("model.enc.8x8_block0.conv1.bias")
    bias.register_hook(with_one_infinite)
    before = bias.detach().clone()
    healthy.step()
    run.step()
    assert float(bias.grad[3]) == limit  # type: ignore[index]
    assert float((bias.detach() - before)[3]) == pytest.approx(moved, rel=1e-3, abs=1e-9)
    different = weights(run.net) != weights(healthy.net)
    assert int(different.sum()) == 1


# --- what trains


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("resolution", [0, 8])
def test_decoder_training_moves_all_of_the_decoder_from_a_resolution_up_and_leaves_the_rest_bit_for_bit(
    name: str, resolution: int
) -> None:
    net = trainable(architecture=name)
    base = copy.deepcopy(net).eval()
    run = training(net, replace(SETTINGS, trainable="decoder", trainable_resolution=resolution))
    for _ in range(3):
        run.step()
    decoder, before = decoder_parameters(base, resolution), base.state_dict()
    for trained in (run.net, run.ema):
        moved = {key for key, tensor in trained.state_dict().items() if not torch.equal(tensor, before[key])}
        assert {key for key in moved if not key.startswith("logvar_")} == decoder
        assert encoder_difference(base, trained) is None
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.ones(2), torch.eye(2)
    shared = shared_encoder_guidance(base, run.ema, 1.0)(x, sigma, labels)
    apart = 2 * base(x, sigma, labels) - run.ema(x, sigma, labels)
    torch.testing.assert_close(shared, apart, rtol=1e-4, atol=1e-5)


def test_a_part_to_train_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="trainable='encoder' is unknown; choose 'all' or 'decoder'"):
        training(trainable(), replace(SETTINGS, trainable="encoder"))
