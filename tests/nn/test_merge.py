import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sims_ray.diffusion.guidance import sims_guidance
from sims_ray.nn.merge import merge
from sims_ray.nn.precond import Precond
from tests.networks import ARCHITECTURES, small_network


class LinearInWeights(nn.Module):
    """A raw network that is not linear in its input, but linear in its parameters."""

    freqs: Tensor

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(0.2 * torch.randn(1, 3, 3, 3, generator=generator))
        self.bias = nn.Parameter(0.2 * torch.randn(1, generator=generator))
        self.register_buffer("freqs", torch.randn(2, generator=generator))

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        told = c_noise.reshape(-1, 1, 1, 1).expand_as(x)
        features = torch.cat([x.tanh(), (3 * x).sin(), told * x.cos()], dim=1)
        return nn.functional.conv2d(features, self.weight, self.bias, padding=1)


class LinearPrecond(Precond):
    """A denoiser that is linear in its parameters, up to a part that has none."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.model = LinearInWeights(seed)
        self.eval().requires_grad_(False)

    @property
    def network(self) -> LinearInWeights:  # type: ignore[override]
        return self.model


def noisy() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 4.0])


def parameters(net: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def moved(base: Precond, distance: float, seed: int = 0) -> Precond:
    """A copy at a distance from the base, in a direction that the seed alone decides."""
    aux, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    for parameter in aux.parameters():
        parameter.add_(distance * torch.randn(parameter.shape, generator=generator))
    return aux


# --- the weights


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_w_0_is_the_base_bit_for_bit(architecture: str) -> None:
    base, aux = (small_network(seed, **ARCHITECTURES[architecture]) for seed in (0, 1))
    merged = merge(base, aux, 0.0)
    assert merged is not base
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in merged.state_dict().items())
    assert torch.equal(merged(*noisy()), base(*noisy()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_w_minus_1_is_the_auxiliary_bit_for_bit(architecture: str) -> None:
    base, aux = (small_network(seed, **ARCHITECTURES[architecture]) for seed in (0, 1))
    for name, buffer in aux.named_buffers():
        buffer.copy_(base.get_buffer(name))
    merged = merge(base, aux, -1.0)
    assert all(torch.equal(value, aux.state_dict()[name]) for name, value in merged.state_dict().items())
    assert torch.equal(merged(*noisy()), aux(*noisy()))


@pytest.mark.parametrize("w", [0.0, -1.0])
def test_what_is_not_wanted_may_even_be_infinite(w: float) -> None:
    """A base and an auxiliary whose training diverged, or the other way round."""
    finite, infinite = small_network(0), small_network(1)
    for parameter in infinite.parameters():
        parameter.fill_(torch.inf)
    base, aux = (finite, infinite) if w == 0 else (infinite, finite)
    merged = parameters(merge(base, aux, w))
    assert all(torch.equal(merged[name], weight) for name, weight in parameters(finite).items())


@pytest.mark.parametrize("w", [-1.0, -0.4, 0.7, 2.0, 50.0])
def test_an_auxiliary_equal_to_the_base_merges_to_the_base_bit_for_bit_at_any_w(w: float) -> None:
    base = small_network()
    merged = parameters(merge(base, copy.deepcopy(base), w))
    assert all(torch.equal(merged[name], weight) for name, weight in parameters(base).items())


@pytest.mark.parametrize("w", [-0.5, 0.25, 1.0, 3.0])
def test_every_parameter_is_affine_in_w_through_auxiliary_and_base(w: float) -> None:
    base, aux = small_network(0), small_network(1)
    merged, ours, theirs = parameters(merge(base, aux, w)), parameters(base), parameters(aux)
    for name, weight in merged.items():
        expected = (1 + w) * ours[name].double() - w * theirs[name].double()
        torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_merging_changes_neither_network() -> None:
    base, aux = small_network(0), small_network(1)
    before = [parameters(net) for net in (base, aux)]
    merge(base, aux, 1.5)
    for net, kept in zip((base, aux), before, strict=True):
        assert all(torch.equal(parameter, kept[name]) for name, parameter in net.named_parameters())


@pytest.mark.parametrize("w", [-1.0, 0.0, 1.5])
@pytest.mark.parametrize("architecture", ["ncsnpp", "edm2"])
def test_frequencies_and_phases_come_from_the_base_even_if_the_auxiliary_has_others(
    architecture: str, w: float
) -> None:
    base, aux = (small_network(seed, **ARCHITECTURES[architecture]) for seed in (0, 1))
    merged = dict(merge(base, aux, w).named_buffers())
    random = [name for name in merged if name.endswith(("freqs", "phases"))]
    assert len(random) == {"ncsnpp": 1, "edm2": 4}[architecture]
    for name, buffer in base.named_buffers():
        assert torch.equal(merged[name], buffer)
    assert not any(torch.equal(merged[name], aux.get_buffer(name)) for name in random)


# --- weight space against score space


@pytest.mark.parametrize("w", [-1.0, -0.5, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 10.0, 80.0])
def test_for_a_network_linear_in_its_parameters_neon_is_sims_of_the_same_strength(sigma: float, w: float) -> None:
    base, aux = LinearPrecond(0), LinearPrecond(1)
    aux.model.freqs.copy_(base.model.freqs)
    x = noisy()[0] * max(sigma, 0.5)
    sigmas = torch.tensor([sigma, sigma])
    merged = merge(base, aux, w)(x, sigmas)
    torch.testing.assert_close(merged, sims_guidance(base, aux, w)(x, sigmas), rtol=1e-6, atol=1e-6)
    assert (merged - base(x, sigmas)).abs().max() > 1e-4


def gap(base: Precond, distance: float, w: float) -> float:
    """How far Neon lies from SIMS."""
    aux = moved(base, distance)
    return float((merge(base, aux, w)(*noisy()) - sims_guidance(base, aux, w)(*noisy())).norm())


def test_for_a_u_net_neon_and_sims_part_with_the_square_of_the_drift() -> None:
    base, distances = small_network(), [0.0025, 0.005, 0.01, 0.02]
    gaps = [gap(base, distance, 1.0) for distance in distances]
    order = np.polyfit(np.log(distances), np.log(gaps), 1)[0]
    assert order == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("w", [-0.5, 0.5, 2.0])
def test_for_a_u_net_neon_and_sims_part_with_w_times_w_plus_1(w: float) -> None:
    """The second-order term of D(base - w d) - (1 + w) D(base) + w D(base + d) is w (1 + w) D'' d^2 / 2."""
    base = small_network()
    assert gap(base, 0.005, w) / gap(base, 0.005, 1.0) == pytest.approx(abs(w * (1 + w)) / 2, rel=0.1)


# --- EDM2, whose weights are normalised in every pass


def edm2(seed: int, scale: float = 1.0) -> Precond:
    net = small_network(seed, **ARCHITECTURES["edm2"])
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.mul_(scale)
    return net


@pytest.mark.parametrize("w", [-1.0, 0.5, 2.0])
def test_of_a_merged_edm2_weight_the_direction_of_each_output_channel_alone_counts(w: float) -> None:
    """At weights large enough that the 1e-4 which the norm adds does not show."""
    merged = merge(edm2(0, scale=1000), edm2(1, scale=1000), w)
    expected, generator = merged(*noisy()), torch.Generator().manual_seed(0)
    for parameter in merged.parameters():
        if parameter.ndim > 1:
            factors = 1 + 2 * torch.rand(len(parameter), generator=generator)
            factors[0] = 3
            parameter.mul_(factors.reshape(-1, *[1] * (parameter.ndim - 1)))
    torch.testing.assert_close(merged(*noisy()), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("w", [-1.0, 0.5, 2.0])
def test_a_merged_edm2_network_depends_on_the_direction_of_every_weight_but_the_uncertainty(w: float) -> None:
    merged = merge(edm2(0), edm2(1), w)
    expected = merged(*noisy())
    for name, parameter in merged.named_parameters():
        if parameter.ndim > 1:
            kept = parameter.clone()
            parameter[0, 0] += 1
            assert torch.equal(merged(*noisy()), expected) == name.startswith("logvar_"), name
            parameter.copy_(kept)


@pytest.mark.parametrize("w", [-0.5, 0.5, 2.0])
def test_the_gains_of_a_merged_edm2_network_are_extrapolated_linearly_and_count(w: float) -> None:
    base, aux = edm2(0), edm2(1)
    merged = merge(base, aux, w)
    gains = [name for name, parameter in merged.named_parameters() if parameter.ndim == 0]
    assert len(gains) > 5
    expected = merged(*noisy())
    for name in gains:
        gain, own, other = (float(net.get_parameter(name)) for net in (merged, base, aux))
        assert gain == pytest.approx((1 + w) * own - w * other, rel=1e-5, abs=1e-6)
        merged.get_parameter(name).mul_(3)
        assert not torch.equal(merged(*noisy()), expected), name
        merged.get_parameter(name).fill_(gain)


# --- half precision


@pytest.mark.parametrize("w", [-0.3, 0.7, 3.0])
def test_float16_parameters_are_merged_in_float32_and_rounded_once(w: float) -> None:
    base, aux = small_network(0).half(), small_network(1).half()
    merged = parameters(merge(base, aux, w))
    exact = parameters(merge(base.float(), aux.float(), w))
    for name, weight in merged.items():
        assert weight.dtype == torch.float16
        assert torch.equal(weight, exact[name].half())


def test_float16_parameters_near_the_largest_number_do_not_overflow_on_the_way() -> None:
    base, aux = LinearPrecond(0), LinearPrecond(1)
    base.model.bias.fill_(60_000.0)
    aux.model.bias.fill_(59_000.0)
    merged = merge(base.half(), aux.half(), 2.0)
    torch.testing.assert_close(merged.get_parameter("model.bias"), torch.tensor([62_000.0]).half(), rtol=1e-3, atol=0)


# --- refusals


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"model_channels": 16}, "model.dec.4x4_block0.affine.bias"),
        ({"num_blocks": 2}, "model.dec.4x4_block1.norm2.bias"),
        ({"label_dim": 3}, "model.map_label.bias"),
        (ARCHITECTURES["adm"], "model.dec.4x4_block0.affine.bias"),
        (ARCHITECTURES["edm2"], "logvar_linear.weight"),
    ],
)
def test_different_networks_are_refused_in_one_sentence_that_names_a_parameter(
    settings: dict[str, Any], name: str, reverse: bool
) -> None:
    networks = [small_network(), small_network(**settings)]
    base, aux = reversed(networks) if reverse else networks
    with pytest.raises(ValueError, match=f"the networks differ: {name} is ") as error:
        merge(base, aux, 1.0)
    assert "\n" not in str(error.value)
    ours, theirs = (parameters(net).get(name) for net in (base, aux))
    for weight in (ours, theirs):
        assert ("absent" if weight is None else str(tuple(weight.shape))) in str(error.value)


def test_merging_a_compiled_base_computes_with_the_merged_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiled methods stay bound to the network they were made for, so that a copy would compute the original.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    base, aux = small_network(0), small_network(1)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 4.0])
    expected = merge(base, aux, 0.5)(x, sigma)
    base.compile_network()
    assert torch.equal(merge(base, aux, 0.5)(x, sigma), expected)
    assert not torch.equal(base(x, sigma), expected)
