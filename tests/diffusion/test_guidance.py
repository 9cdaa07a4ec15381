import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sims_ray.diffusion.evaluations import Denoiser, at_step
from sims_ray.diffusion.guidance import (
    autoguidance,
    classifier_free_guidance,
    encoder_difference,
    guidance_interval,
    shared_encoder_guidance,
    sims_guidance,
)
from sims_ray.diffusion.noise import SeedStreams
from sims_ray.diffusion.sampler import heun_sampler, sigma_schedule
from sims_ray.nn.networks import decoder_parameters
from sims_ray.nn.precond import Precond
from tests.networks import ARCHITECTURES, small_network

Wrap = Callable[[Denoiser], Denoiser]


class Factor:
    """x times a factor; keeps the noise levels it was called at."""

    def __init__(self, factor: float) -> None:
        self.factor, self.sigmas = factor, list[float]()

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, /) -> Tensor:
        self.sigmas.append(float(sigma[0]))
        return self.factor * x


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


# --- guidance in an interval of noise levels


def test_an_interval_is_open_below_and_closed_above() -> None:
    inside, outside = Factor(1), Factor(2)
    guided = guidance_interval(inside, outside, 0.25, 3.0)
    below, above = math.nextafter(0.25, 1), math.nextafter(3.0, 4)
    for sigma, expected in [(0.1, outside), (0.25, outside), (below, inside), (3.0, inside), (above, outside)]:
        assert at_step(guided, sigma) is expected, sigma


@pytest.mark.parametrize(("sigma_lo", "sigma_hi"), [(0.0, 1.0), (0.19, 1.61), (5.0, math.inf), (0.01, 80.0)])
def test_heun_evaluates_the_guide_twice_in_steps_that_start_inside_the_interval_and_nowhere_else(
    sigma_lo: float, sigma_hi: float
) -> None:
    base, aux, schedule = Factor(0.5), Factor(0.4), sigma_schedule(18)
    guided = guidance_interval(sims_guidance(base, aux, 1.0), base, sigma_lo, sigma_hi)
    heun_sampler(guided, noisy()[0], sigmas=schedule)
    pairs = list(itertools.pairwise(schedule.tolist()))
    everywhere = [sigma for t_cur, t_next in pairs for sigma in (t_cur, t_next) if sigma > 0]
    within = [sigma for t_cur, t_next in pairs if sigma_lo < t_cur <= sigma_hi for sigma in (t_cur, t_next) if sigma]
    assert aux.sigmas == within
    assert base.sigmas == everywhere
    assert 0 < len(within) < len(everywhere)


def test_the_step_decides_not_its_second_evaluation_nor_churn() -> None:
    """One step from inside to outside, one from outside to inside, each with noise added before it."""
    for schedule, called in [([2.0, 0.5], True), ([8.0, 2.0], False)]:
        base, aux = Factor(0.5), Factor(0.4)
        guided = guidance_interval(sims_guidance(base, aux, 1.0), base, 1.0, 2.0)
        streams = SeedStreams(range(2))
        heun_sampler(guided, noisy()[0], sigmas=torch.tensor(schedule).double(), streams=streams, S_churn=1.0)
        assert len(aux.sigmas) == 2 * called
        assert base.sigmas[0] > schedule[0]


@pytest.mark.parametrize("sigma_lo", [0.0, -1.0])
def test_the_whole_range_is_the_guided_denoiser_itself(sigma_lo: float) -> None:
    guided, base = Factor(1), Factor(2)
    assert guidance_interval(guided, base, sigma_lo) is guided
    assert guidance_interval(base, base, 0.5, 1.0) is base


@pytest.mark.parametrize(("sigma_lo", "sigma_hi"), [(2.0, 2.0), (3.0, 2.0), (math.inf, math.inf), (0.0, 0.0)])
def test_an_empty_interval_is_refused_in_one_sentence(sigma_lo: float, sigma_hi: float) -> None:
    with pytest.raises(ValueError, match=r"interval .* is empty") as error:
        guidance_interval(Factor(1), Factor(2), sigma_lo, sigma_hi)
    assert "\n" not in str(error.value)


def test_an_interval_that_holds_every_step_samples_the_guided_one_that_holds_none_the_base() -> None:
    base, aux = small_network(0), small_network(1)
    guided, sigmas = sims_guidance(base, aux, 0.7), sigma_schedule(4)
    everywhere, nowhere = guidance_interval(guided, base, 0.0, 80.0), guidance_interval(guided, base, 80.0, 90.0)
    for interval, expected in [(everywhere, guided), (nowhere, base)]:
        images = heun_sampler(interval, noisy()[0], sigmas=sigmas).images
        assert torch.equal(images, heun_sampler(expected, noisy()[0], sigmas=sigmas).images)


def test_called_directly_an_interval_decides_for_each_image_by_its_own_noise_level() -> None:
    inside, outside = Factor(1), Factor(2)
    x = torch.randn(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 1.0, 1.5, 2.0, 2.5, 80.0])
    factors = torch.tensor([2, 2, 1, 1, 2, 2]).reshape(-1, 1, 1, 1)
    assert torch.equal(guidance_interval(inside, outside, 1.0, 2.0)(x, sigma), factors * x)


@pytest.mark.parametrize(("sigma", "called"), [([1.5], 0), ([1.5, 2.0], 0), ([9.0], 1), ([0.1, 9.0], 1)])
def test_called_directly_an_interval_does_not_evaluate_what_no_image_needs(sigma: list[float], called: int) -> None:
    pair = (Factor(1), Factor(2))
    x = noisy()[0]
    assert torch.equal(guidance_interval(*pair, 1.0, 2.0)(x, torch.tensor(sigma)), pair[called].factor * x)
    assert [len(denoiser.sigmas) for denoiser in pair] == [1 - called, called]


# --- guidance of guided denoisers


@pytest.mark.parametrize("sigma", [0.5, 1.5])
def test_sims_of_autoguided_networks_in_an_interval_is_the_algebra_of_the_three(sigma: float) -> None:
    main, guide, aux = small_network(0), small_network(1), small_network(2)
    autoguided = autoguidance(main, guide, 2.1)
    guided = guidance_interval(sims_guidance(autoguided, aux, 0.8), main, 1.0, 2.0)
    x, sigmas = noisy()[0], torch.tensor([sigma, sigma])
    d_main, d_guide, d_aux = (denoise(x, sigmas) for denoise in (main, guide, aux))
    expected = 1.8 * (2.1 * d_main - 1.1 * d_guide) - 0.8 * d_aux if 1.0 < sigma <= 2.0 else d_main
    for denoise in (guided, at_step(guided, sigma)):
        torch.testing.assert_close(denoise(x, sigmas), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda part: sims_guidance(part, Factor(0.3), 1.0),
        lambda part: autoguidance(Factor(0.3), part, 3.0),
        lambda part: classifier_free_guidance(part, 3.0),
        lambda part: guidance_interval(part, Factor(0.3), 0.0, 50.0),
        lambda part: guidance_interval(Factor(0.3), part, 50.0),
    ],
    ids=[
        "main of SIMS",
        "guide of autoguidance",
        "both of classifier-free",
        "inside of interval",
        "outside of interval",
    ],
)
def test_a_part_that_depends_on_the_step_is_told_the_step_wherever_it_stands(wrap: Wrap) -> None:
    """A churned step starts inside the part's interval; its noise level, raised by the churn, lies outside."""
    inside = Factor(0.5)
    guided = wrap(guidance_interval(inside, forbidden, 1.0, 4.0))
    sigmas = torch.tensor([4.0, 2.0], dtype=torch.float64)
    heun_sampler(guided, noisy()[0], sigmas=sigmas, streams=SeedStreams(range(2)), S_churn=1.0)
    assert inside.sigmas[0] > 4.0


def test_an_interval_inside_an_interval_is_their_intersection() -> None:
    guided, base = Factor(1), Factor(2)
    nested = guidance_interval(guidance_interval(guided, base, 1.0, 5.0), base, 0.5, 3.0)
    for sigma in (0.7, 1.0, 1.1, 3.0, 3.1, 5.0, 6.0):
        assert at_step(nested, sigma) is (guided if 1.0 < sigma <= 3.0 else base), sigma


# --- autoguidance and classifier-free guidance


def test_scale_1_is_the_main_model_itself_and_never_calls_the_guide() -> None:
    main = Factor(1)
    assert autoguidance(main, forbidden, 1.0) is main
    assert autoguidance(main, None, 1) is main
    assert classifier_free_guidance(main, 1.0) is main
    assert classifier_free_guidance(main, 1.0, forbidden) is main


@pytest.mark.parametrize("scale", [0.5, 2.1, 3.0])
def test_autoguidance_of_scale_w_is_sims_of_omega_w_minus_1_bit_for_bit(scale: float) -> None:
    main, guide, (x, sigma) = small_network(0), small_network(1), noisy()
    guided = autoguidance(main, guide, scale)(x, sigma)
    assert torch.equal(guided, sims_guidance(main, guide, scale - 1)(x, sigma))
    expected = scale * main(x, sigma) + (1 - scale) * guide(x, sigma)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


def test_scale_0_is_the_guide() -> None:
    main, guide, (x, sigma) = small_network(0), small_network(1), noisy()
    torch.testing.assert_close(autoguidance(main, guide, 0.0)(x, sigma), guide(x, sigma), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_autoguidance_without_a_guide_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=f"guidance scale of {scale:g} needs a guide"):
        autoguidance(small_network(), None, scale)


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_classifier_free_guidance_steers_away_from_the_same_model_without_its_label(scale: float) -> None:
    net, (x, sigma), labels = small_network(0, label_dim=2), noisy(), torch.eye(2)
    labelled, unlabelled = net(x, sigma, labels), net(x, sigma)
    expected = scale * labelled + (1 - scale) * unlabelled
    guided = classifier_free_guidance(net, scale)(x, sigma, labels)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)
    assert (labelled - unlabelled).abs().max() > 0.01


@pytest.mark.parametrize("label_dim", [0, 2])
def test_classifier_free_guidance_never_tells_the_unconditional_model_the_label(label_dim: int) -> None:
    conditional, unconditional = small_network(0, label_dim=2), small_network(1, label_dim=label_dim)
    (x, sigma), labels = noisy(), torch.eye(2)
    expected = 3 * conditional(x, sigma, labels) - 2 * unconditional(x, sigma, None)
    guided = classifier_free_guidance(conditional, 3.0, unconditional)(x, sigma, labels)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.5, 7.0])
def test_classifier_free_guidance_of_an_image_without_label_changes_nothing(scale: float) -> None:
    net, (x, sigma) = small_network(0, label_dim=2), noisy()
    assert torch.equal(classifier_free_guidance(net, scale)(x, sigma), net(x, sigma))


# --- a shared encoder


def decoder_tuned(base: Precond, seed: int = 0) -> Precond:
    """A copy whose decoder alone has moved."""
    aux, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    for name in sorted(decoder_parameters(base)):
        weight = aux.get_parameter(name)
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return aux


def conditional(architecture: str) -> Precond:
    return small_network(label_dim=2, **ARCHITECTURES[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("omega", [-1.0, 0.7, 3.0])
def test_a_shared_encoder_gives_ordinary_sims_bit_for_bit(architecture: str, omega: float) -> None:
    base = conditional(architecture)
    aux, (x, sigma), labels = decoder_tuned(base), noisy(), torch.eye(2)
    shared = shared_encoder_guidance(base, aux, omega)(x, sigma, labels)
    assert torch.equal(shared, sims_guidance(base, aux, omega)(x, sigma, labels))
    assert (shared - base(x, sigma, labels)).abs().max() > 0.001
    assert (shared - shared_encoder_guidance(base, aux, omega)(x, sigma)).abs().max() > 0.001


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shared_encoder_runs_once_and_both_decoders_once(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = conditional(architecture)
    aux, calls = decoder_tuned(base), list[str]()
    for name, net in (("base", base), ("aux", aux)):
        for half in ("encode", "decode"):
            monkeypatch.setattr(net, half, counted(getattr(net, half), f"{name} {half}", calls))
    shared_encoder_guidance(base, aux, 1.0)(*noisy(), torch.eye(2))
    assert calls == ["base encode", "base decode", "aux decode"]


def counted(function: Callable[..., Any], name: str, calls: list[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls.append(name)
        return function(*args)

    return call


PYRAMID = {**ARCHITECTURES, "with image pyramid": {"architecture": "song_unet", "decoder_type": "skip"}}


def layers_of(net: Precond) -> list[str]:
    """Names of the decoder's layers; the norm before an output layer is part of that one."""
    return [name for name in net.network.dec if not name.endswith("aux_norm")]


def layers_called(guided: Denoiser, net: Precond) -> list[str]:
    """Those that one call of the denoiser runs."""
    called: list[str] = []

    def record_as(name: str) -> Callable[..., None]:
        return lambda *_: called.append(name)

    hooks = [net.network.dec[name].register_forward_hook(record_as(name)) for name in layers_of(net)]
    guided(*noisy(), torch.eye(2))
    for hook in hooks:
        hook.remove()
    return called


@pytest.mark.parametrize("architecture", PYRAMID)
def test_decoder_layers_that_are_equal_from_the_lowest_resolution_on_run_once_and_change_nothing(
    architecture: str,
) -> None:
    """For every first layer that differs; the last case is an auxiliary equal to the base."""
    base = small_network(label_dim=2, **PYRAMID[architecture])
    names = layers_of(base)
    first_ones = [i for i, name in enumerate(names) if list(base.network.dec[name].parameters())]
    for first in [*first_ones, len(names)]:
        aux = copy.deepcopy(base)
        for name in names[first:]:
            for parameter in aux.network.dec[name].parameters():
                parameter.add_(0.1)
        shared = shared_encoder_guidance(base, aux, 0.7)
        expected = sims_guidance(base, aux, 0.7)(*noisy(), torch.eye(2))
        assert torch.equal(shared(*noisy(), torch.eye(2)), expected), names[first:]
        assert layers_called(shared, base) == names
        assert layers_called(shared, aux) == names[first:]
    assert len(first_ones) > 5


def test_a_layer_that_is_equal_after_one_that_differs_runs_in_both_networks() -> None:
    base = conditional("ddpmpp")
    aux, names = copy.deepcopy(base), layers_of(base)
    aux.get_parameter(f"model.dec.{names[2]}.conv0.weight").add_(0.1)
    assert layers_called(shared_encoder_guidance(base, aux, 0.7), aux) == names[2:]


def test_a_shared_encoder_at_omega_0_is_the_base_itself_and_at_minus_1_the_auxiliary() -> None:
    base = small_network()
    aux = decoder_tuned(base)
    assert shared_encoder_guidance(base, aux, 0) is base
    assert shared_encoder_guidance(base, aux, -1.0) is aux


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tensor_that_differs_outside_the_decoder_is_named_in_the_refusal(architecture: str) -> None:
    """Each of them, the buffers too; but for the uncertainty of EDM2, which takes no part in denoising."""
    base = conditional(architecture)
    aux = decoder_tuned(base)
    assert encoder_difference(base, aux) is None
    outside = aux.state_dict().keys() - decoder_parameters(base)
    for name in sorted(outside):
        tensor = aux.state_dict()[name]
        tensor.flatten()[0].add_(1.0)
        if name.startswith("logvar_"):
            assert encoder_difference(base, aux) is None
        else:
            with pytest.raises(ValueError, match=r"differ in .* outside their decoders") as error:
                shared_encoder_guidance(base, aux, 1.0)
            assert f" {name}," in str(error.value)
            assert "\n" not in str(error.value)
        tensor.copy_(base.state_dict()[name])
    assert any("enc." in name for name in outside)


def test_of_several_differences_the_first_in_the_alphabet_is_named() -> None:
    base, aux = small_network(0), small_network(1)
    outside = aux.state_dict().keys() - decoder_parameters(base)
    assert encoder_difference(base, aux) == min(name for name in outside if not name.endswith("resample_filter"))


def test_a_tensor_that_one_network_lacks_is_a_difference() -> None:
    without, labelled = small_network(), small_network(label_dim=2)
    labelled.load_state_dict(without.state_dict(), strict=False)
    assert encoder_difference(without, labelled) == encoder_difference(labelled, without) == "model.map_label.bias"


def test_a_shared_encoder_of_networks_with_other_preconditioning_is_refused() -> None:
    base, aux = small_network(), small_network(sigma_data=0.7)
    with pytest.raises(ValueError, match="differ in sigma_data"):
        shared_encoder_guidance(base, aux, 1.0)
