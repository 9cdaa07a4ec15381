"""Training as EDM2 does: its learning rate, its averages, its normalised weights."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sims_ray.config import presets
from sims_ray.diffusion.loss import DenoisingLoss, draw_noise
from sims_ray.diffusion.optimization import Optimization
from sims_ray.nn.ema import power_exponent
from sims_ray.nn.networks import build_network
from sims_ray.nn.precond import Precond
from sims_ray.storage.checkpoints import load_tensors, save_tensors
from tests.diffusion.runs import SETTINGS, trainable, training, weights
from tests.networks import ARCHITECTURES
from tests.networks import SETTINGS as NETWORK

STDS = (0.05, 0.1)
EDM2 = replace(SETTINGS, adam_betas=(0.9, 0.99), ema_stds=STDS, gradient_limit=0, P_mean=-0.4, P_std=1.0)
NAMES = ("ema-0.050", "ema-0.100")
# EDM2-S: alpha_ref 0.01, t_ref 70 000 batches of 2048, 10 million images of ramp.
EDM2_S = replace(EDM2, batch_size=2048, lr=0.01, lr_rampup_nimg=10e6, lr_decay_nimg=70_000 * 2048)


def fresh(seed: int = 0) -> Precond:
    """A small EDM2 network as training starts from it."""
    torch.manual_seed(seed)
    settings = {**NETWORK, **ARCHITECTURES["edm2"], "label_dim": 2}
    del settings["augment_dim"]
    return build_network(settings)


def matrices(net: Precond) -> list[Tensor]:
    return [parameter.detach() for parameter in net.parameters() if parameter.ndim > 1]


def row_sizes(weight: Tensor) -> Tensor:
    """Root mean square per output channel."""
    return weight.flatten(1).square().mean(1).sqrt()


# --- learning rate


@pytest.mark.parametrize(
    ("nimg", "lr"),
    [(0, 0.0), (5e6, 0.005), (10e6, 0.01), (143.36e6, 0.01), (500e6, 0.005355), (2147.5e6, 0.002584)],
)
def test_the_learning_rate_of_edm2_s_takes_the_published_values(nimg: float, lr: float) -> None:
    assert EDM2_S.learning_rate(int(nimg)) == pytest.approx(lr, abs=1e-6)


def test_four_times_the_images_halve_the_learning_rate_once_it_decays() -> None:
    for nimg in (143_360_000, 500_000_000):
        assert EDM2_S.learning_rate(4 * nimg) == pytest.approx(EDM2_S.learning_rate(nimg) / 2)


def test_without_a_decay_the_learning_rate_stays() -> None:
    assert replace(EDM2_S, lr_decay_nimg=0).learning_rate(10**10) == 0.01


def test_a_step_takes_the_decayed_learning_rate_of_the_images_seen_before_it() -> None:
    run = training(trainable(), replace(SETTINGS, lr=1e-3, lr_decay_nimg=100))
    run.nimg = 400
    before = weights(run.net)
    run.step()
    assert float((weights(run.net) - before).abs().max()) == pytest.approx(0.5e-3, rel=1e-3)


def test_edm2_presets_fine_tune_at_the_rate_their_base_ended_with() -> None:
    edm2 = {name: preset for name, preset in presets().items() if name.startswith("edm2")}
    assert len(edm2) == 12
    for name, preset in edm2.items():
        base, finetune = preset.recipe["train"], preset.recipe["finetune"]
        at_end = replace(EDM2, lr=base["lr"], lr_decay_nimg=base["lr_decay_kimg"] * 1000)
        assert finetune["lr"] == pytest.approx(at_end.learning_rate(int(base["duration_kimg"] * 1000)), rel=2e-3), name


# --- averages


def test_after_k_steps_each_average_is_the_power_function_of_the_weights_so_far() -> None:
    run, history = training(trainable(), EDM2), []
    assert tuple(run.averages) == NAMES
    for _ in range(5):
        run.step()
        history.append(weights(run.net).double())
    k = len(history)
    assert (history[0] - history[-1]).abs().max() > 1e-3
    for name, std in zip(NAMES, STDS, strict=True):
        # Decays of 1 - 1/i to the power gamma + 1 telescope: step j keeps (j/k)^(gamma + 1) - ((j - 1)/k)^(gamma + 1).
        exponent = power_exponent(std) + 1
        shares = [(j / k) ** exponent - ((j - 1) / k) ** exponent for j in range(1, k + 1)]
        assert sum(shares) == pytest.approx(1)
        expected = sum((share * at for share, at in zip(shares, history, strict=True)), torch.zeros_like(history[0]))
        torch.testing.assert_close(weights(run.averages[name]).double(), expected, rtol=0, atol=1e-6)
    short, long = (weights(run.averages[name]).double() for name in NAMES)
    assert (long - history[-1]).norm() > 1.5 * (short - history[-1]).norm()


@pytest.mark.parametrize(("std", "exponent"), [(0.05, 16.972), (0.1, 6.937)])
def test_the_widths_of_edm2_are_the_published_exponents(std: float, exponent: float) -> None:
    assert power_exponent(std) == pytest.approx(exponent, abs=1e-3)


def test_the_first_step_forgets_the_initial_weights() -> None:
    run = training(trainable(), EDM2)
    run.step()
    for average in run.averages.values():
        assert torch.equal(weights(average), weights(run.net))


def test_power_function_averages_take_the_place_of_the_half_life() -> None:
    assert list(training(trainable()).averages) == ["ema"]
    run = training(trainable(), EDM2)
    assert run.ema is run.averages[NAMES[0]]
    assert not any(average.training for average in run.averages.values())


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("ddpmpp", EDM2),
        ("edm2", EDM2),
        ("edm2", replace(EDM2, trainable="decoder")),
        ("adm", replace(EDM2, augment=0.3)),
    ],
    ids=["ddpmpp", "edm2", "edm2-decoder", "adm-augmented"],
)
def test_stopping_and_going_on_keeps_both_averages_bit_for_bit(
    tmp_path: Path, architecture: str, settings: Optimization
) -> None:
    base = trainable(architecture=architecture)  # an auxiliary is made anew from its base
    straight, first, second = (training(copy.deepcopy(base), settings) for _ in range(3))
    for _ in range(5):
        straight.step()
    for _ in range(2):
        first.step()
    save_tensors(tmp_path / "state.safetensors", first.state(), {"nimg": first.nimg})
    tensors, card = load_tensors(tmp_path / "state.safetensors")
    second.load_state(tensors, card["nimg"])
    for _ in range(3):
        second.step()
    expected, actual = straight.state(), second.state()
    assert actual.keys() == expected.keys()
    prefixes = ("net.", "adam.", *(f"{average}." for average in NAMES))
    assert all(name.startswith(prefixes) for name in expected)
    assert all(any(name.startswith(prefix) for name in expected) for prefix in prefixes)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# --- the whole recipe


def test_training_edm2_reduces_its_loss_and_keeps_its_weights_of_unit_magnitude() -> None:
    def loss(net: Precond) -> float:
        sigma, noise = draw_noise(torch.Generator().manual_seed(1), 20, (1, 8, 8), EDM2.P_mean, EDM2.P_std)
        with torch.no_grad():
            return float(DenoisingLoss(copy.deepcopy(net).eval())(flat / 127.5 - 1, sigma, noise, labels).mean())

    flat = torch.where(torch.arange(20) % 2 == 0, 40, 200).to(torch.uint8).reshape(-1, 1, 1, 1).expand(20, 1, 8, 8)
    labels = torch.eye(2)[torch.arange(20) % 2]
    run = training(fresh(), replace(EDM2, lr=1e-2, lr_rampup_nimg=40), images=flat)
    assert max(float((row_sizes(weight) - 1).abs().max()) for weight in matrices(run.net)) > 0.1
    before = loss(run.net)
    for _ in range(30):
        run.step()
    assert loss(run.net) < before - 40
    assert loss(run.averages[NAMES[0]]) < before - 40
    for weight in matrices(run.net):
        sizes = row_sizes(weight)  # a step has moved them since they were last normalised
        torch.testing.assert_close(sizes, torch.ones_like(sizes), rtol=0, atol=2e-2)
