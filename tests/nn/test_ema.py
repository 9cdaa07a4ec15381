import copy
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from sims_ray.nn.ema import (
    LONGEST_STD,
    ema_beta,
    posthoc_weights,
    power_beta,
    power_exponent,
    power_std,
    update_ema,
)

BATCH_SIZE = 32
REFERENCE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "power_function_ema.json").read_text())

Vector = NDArray[np.float64]


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
    ema = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in ema.parameters():
            parameter.add_(torch.randn_like(parameter))
    return ema, net


def flat(module: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("k", [1, 7, 100])
def test_after_k_steps_to_constant_weights_the_average_is_its_closed_form(k: int) -> None:
    ema, net = pair()
    start, target = flat(ema).double(), flat(net).double()
    beta = ema_beta(0, BATCH_SIZE, 1000, None)
    assert beta == 0.5 ** (BATCH_SIZE / 1000)
    for _ in range(k):
        update_ema(ema, net, beta)
    torch.testing.assert_close(flat(ema).double(), target + beta**k * (start - target), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 8, 320])
def test_the_distance_to_constant_weights_halves_with_every_half_life_of_images_whatever_the_batch_size(
    batch_size: int,
) -> None:
    ema, net = pair()
    start = flat(ema) - flat(net)
    for halving in (1, 2):
        for _ in range(320 // batch_size):
            update_ema(ema, net, ema_beta(0, batch_size, 320, None))
        torch.testing.assert_close(flat(ema) - flat(net), start / 2**halving, rtol=0, atol=1e-5)


def test_with_a_rampup_ratio_the_first_step_forgets_the_initial_weights() -> None:
    ema, net = pair()
    beta = ema_beta(0, BATCH_SIZE, 500_000, 0.05)
    assert beta == 0
    update_ema(ema, net, beta)
    assert torch.equal(flat(ema), flat(net))


@pytest.mark.parametrize("nimg", [32, 1000, 9_999, 10_000, 1_000_000])
def test_the_half_life_is_the_ratio_of_images_seen_until_it_reaches_its_limit(nimg: int) -> None:
    assert ema_beta(nimg, BATCH_SIZE, 500, 0.05) == pytest.approx(0.5 ** (BATCH_SIZE / min(500, 0.05 * nimg)))


def test_buffers_are_copied_not_averaged() -> None:
    ema, net = pair()
    net.train()(torch.randn(16, 5))
    update_ema(ema, net, 0.9)
    for averaged, source in zip(ema.buffers(), net.buffers(), strict=True):
        assert torch.equal(averaged, source)
    assert any(buffer.abs().sum() > 0 for buffer in net.buffers())


def test_an_update_leaves_the_network_as_it_is() -> None:
    ema, net = pair()
    before = flat(net).clone()
    update_ema(ema, net, 0.5)
    assert torch.equal(flat(net), before)


# --- power-function averages (EDM2, arXiv 2312.02696)


def test_the_exponent_of_a_width_equals_the_reference_to_1e9() -> None:
    assert len(REFERENCE["std_to_exp"]) == 5
    for std, gamma in REFERENCE["std_to_exp"].items():
        assert power_exponent(float(std)) == pytest.approx(gamma, rel=1e-9)


def test_the_decay_of_a_step_equals_the_reference_to_1e9() -> None:
    assert len(REFERENCE["beta"]) == 6
    for case in REFERENCE["beta"]:
        beta = power_beta(case["std"], case["t_next"], case["t_delta"])
        assert beta == pytest.approx(case["beta"], rel=0, abs=1e-9)


def test_post_hoc_weights_equal_the_reference_to_1e9() -> None:
    assert len(REFERENCE["posthoc"]) == 4
    for case in REFERENCE["posthoc"]:
        weights = posthoc_weights(case["in_nimg"], case["in_std"], case["out_nimg"], case["out_std"])
        expected = np.array(case["weights"])
        assert np.abs(weights - expected).max() < 1e-9 * min(1, np.abs(expected).max())


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.05, 0.1, 0.2, 0.25, LONGEST_STD])
def test_the_width_of_the_exponent_of_a_width_is_that_width(std: float) -> None:
    assert power_std(power_exponent(std)) == pytest.approx(std, rel=1e-9)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94, 30.0])
def test_the_width_is_the_standard_deviation_of_the_profile(gamma: float) -> None:
    """By moments: the profile (gamma + 1) t^gamma on [0, 1] has E t^k = (gamma + 1) / (gamma + k + 1)."""
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert power_std(gamma) == pytest.approx(math.sqrt(square - mean**2), rel=1e-9)


def test_a_wider_average_has_a_smaller_exponent() -> None:
    gammas = [power_exponent(std) for std in np.linspace(0.01, LONGEST_STD, 30)]
    assert all(wider < narrower for narrower, wider in itertools.pairwise(gammas))
    assert gammas[-1] > 0


@pytest.mark.parametrize("std", [-0.1, 0.0, 0.2801, 0.3, 1.0, math.nan])
def test_a_width_that_no_profile_has_is_refused_in_one_sentence(std: float) -> None:
    for call in (
        lambda: power_exponent(std),
        lambda: power_beta(std, 1000, 10),
        lambda: posthoc_weights([100], [0.1], 100, std),
        lambda: posthoc_weights([100], [std], 100, 0.1),
    ):
        with pytest.raises(ValueError, match=r"does not exist; choose one above 0, up to 0\.28") as error:
            call()
        assert "\n" not in str(error.value)


Trajectory = Callable[[float], Vector]


def tracked(theta: Trajectory, std: float, steps: int, ends: Sequence[int]) -> list[Vector]:
    """Averages of weights theta(t), t in (0, 1], as training tracks them: one decay a step, kept at the ends."""
    average, kept = np.full_like(theta(0), 123.0), {}  # what was there before the first step must not matter
    for step in range(1, steps + 1):
        beta = power_beta(std, step * BATCH_SIZE, BATCH_SIZE)
        average = beta * average + (1 - beta) * theta(step / steps)
        kept[step] = average
    return [kept[end] for end in ends]


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("power", [1, 2, 5])
def test_the_tracked_average_tends_to_the_integral_over_its_profile_at_order_1_in_the_step(
    std: float, power: int
) -> None:
    """For theta(t) = t^k the integral is (gamma + 1) / (gamma + k + 1)."""
    gamma = power_exponent(std)
    steps, errors = [100, 200, 400], []
    for n in steps:
        [average] = tracked(lambda t: np.array([t**power]), std, n, [n])
        errors.append(abs(float(average[0]) - (gamma + 1) / (gamma + power + 1)))
        assert errors[-1] < power / n
    order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("std", [0.05, 0.25])
def test_the_tracked_average_of_constant_weights_is_those_weights_whatever_it_started_from(std: float) -> None:
    averages = tracked(lambda t: np.array([7.0, -1.0]), std, 50, [1, 2, 50])
    np.testing.assert_allclose(averages, [[7.0, -1.0]] * 3, rtol=1e-12)


# --- post-hoc reconstruction

STDS = (0.05, 0.1)


def stored(number: int, nimg: float = 1e6) -> tuple[list[float], list[float]]:
    """Ends and widths of averages of both lengths at even intervals."""
    ends = [nimg * (i + 1) / number for i in range(number)]
    return ends * len(STDS), [std for std in STDS for _ in ends]


@pytest.mark.parametrize("number", [1, 4, 8])
def test_the_reconstruction_of_a_stored_average_is_that_one_alone(number: int) -> None:
    ends, stds = stored(number)
    for i, (end, std) in enumerate(zip(ends, stds, strict=True)):
        weights = posthoc_weights(ends, stds, end, std)
        np.testing.assert_allclose(weights, np.eye(len(ends))[i], atol=1e-6)


@pytest.mark.parametrize(("end", "std"), [(1e6, 0.02), (1e6, 0.07), (7e5, 0.1), (1e6, 0.25)])
def test_reconstruction_weights_sum_to_1(end: float, std: float) -> None:
    assert posthoc_weights(*stored(4), end, std).sum() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("factor", [1e-6, 0.5, 2048.0])
def test_reconstruction_weights_do_not_depend_on_the_unit_of_time(factor: float) -> None:
    (ends, stds), std = stored(4), 0.07
    scaled = posthoc_weights([factor * end for end in ends], stds, factor * 1e6, std)
    np.testing.assert_allclose(scaled, posthoc_weights(ends, stds, 1e6, std), rtol=1e-6, atol=1e-9)


def test_reconstruction_weights_follow_the_order_of_the_stored_averages() -> None:
    (ends, stds), order = stored(4), [5, 0, 3, 7, 1, 6, 2, 4]
    shuffled = posthoc_weights([ends[i] for i in order], [stds[i] for i in order], 1e6, 0.07)
    np.testing.assert_allclose(shuffled, posthoc_weights(ends, stds, 1e6, 0.07)[order], atol=1e-9)


def random_trajectory(seed: int) -> Trajectory:
    """Smooth: eight weights, five sines of up to five periods each."""
    generator = np.random.default_rng(seed)
    frequency, phase = generator.uniform(0.2, 5, (8, 5)), generator.uniform(0, 2 * np.pi, (8, 5))
    amplitude = generator.normal(size=(8, 5))
    return lambda t: (amplitude * np.sin(2 * np.pi * frequency * t + phase)).sum(1)


@pytest.mark.parametrize("std", [0.06, 0.08, 0.12, 0.15])
def test_a_reconstruction_equals_the_average_tracked_at_that_length_to_1e3(std: float) -> None:
    theta, steps = random_trajectory(0), 400
    ends = [steps * (i + 1) // 16 for i in range(16)]
    snapshots = np.array([average for stored_std in STDS for average in tracked(theta, stored_std, steps, ends)])
    weights = posthoc_weights(ends * 2, [s for s in STDS for _ in ends], steps, std)
    [expected] = tracked(theta, std, steps, [steps])
    error = np.linalg.norm(weights @ snapshots - expected) / np.linalg.norm(expected)
    assert error < 1e-3
    assert min(np.linalg.norm(row - expected) for row in snapshots) > 10 * error * np.linalg.norm(expected)


@pytest.mark.parametrize("std", [0.06, 0.15])
def test_more_snapshots_reconstruct_more_closely(std: float) -> None:
    theta, steps, errors = random_trajectory(1), 320, []
    [expected] = tracked(theta, std, steps, [steps])
    for number in (2, 4, 8, 16):
        ends = [steps * (i + 1) // number for i in range(number)]
        snapshots = np.array([average for stored_std in STDS for average in tracked(theta, stored_std, steps, ends)])
        weights = posthoc_weights(ends * 2, [s for s in STDS for _ in ends], steps, std)
        errors.append(np.linalg.norm(weights @ snapshots - expected))
    assert all(more < fewer / 2 for fewer, more in itertools.pairwise(errors[1:]))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(
    ("in_nimg", "in_std", "out_nimg", "reason"),
    [
        ([100, 200], [0.05, 0.1], 200.5, "no stored average reaches"),
        ([100, 200, 100], [0.1, 0.1, 0.1], 200, "given twice"),
        ([100, 200], [0.1], 200, "give one of each"),
        ([[100, 200]], [[0.1, 0.1]], 200, "give one of each"),
        ([], [], 200, "give one of each"),
        (100, 0.1, 100, "give one of each"),
    ],
)
def test_averages_that_reconstruct_nothing_are_refused_in_one_sentence(
    in_nimg: Any, in_std: Any, out_nimg: float, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        posthoc_weights(in_nimg, in_std, out_nimg, 0.07)
    assert "\n" not in str(error.value)
