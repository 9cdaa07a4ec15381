import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sims_ray.diffusion.evaluations import Denoiser, at_step, count_evaluations, evaluate
from sims_ray.diffusion.guidance import Extrapolation, sims_guidance
from sims_ray.diffusion.sampler import heun_sampler, sigma_schedule
from sims_ray.errors import SimsError
from sims_ray.nn.networks import decoder_parameters
from sims_ray.nn.precond import Precond
from sims_ray.storage.checkpoints import save_model
from sims_ray.storage.models import SimsModel
from tests.networks import ARCHITECTURES, SETTINGS, small_network

CARD: dict[str, Any] = {"role": "base", "network": SETTINGS, "nimg": 150_000, "parents": []}
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a checkpoint; card entries override `CARD`."""

    def write(name: str, net: nn.Module, **card: Any) -> Path:
        path = tmp_path / f"{name}.safetensors"
        save_model(path, net, {**CARD, **card})
        return path

    return write


def decoder_tuned(base: Precond) -> Precond:
    """A copy whose decoder alone has moved."""
    aux, generator = copy.deepcopy(base), torch.Generator().manual_seed(0)
    for name in sorted(decoder_parameters(base)):
        weight = aux.get_parameter(name)
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return aux


def noisy() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 4.0])


def cost(denoiser: Denoiser) -> float:
    with count_evaluations() as tally:
        evaluate(denoiser, *noisy(), None)
    return tally.nfe


# --- which denoiser it is


def test_the_loaded_model_is_sims_of_the_two_networks_bit_for_bit(save: Save) -> None:
    base, aux = small_network(0), small_network(1)
    model = SimsModel.of(save("base", base), save("aux", aux, role="auxiliary"), 0.7)
    loaded, card = model.load()
    assert card == CARD
    assert torch.equal(loaded(*noisy()), sims_guidance(base, aux, 0.7)(*noisy()))


def test_omega_0_is_the_base_and_does_not_look_at_the_auxiliary(save: Save, tmp_path: Path) -> None:
    base = small_network()
    path = save("base", base)
    for aux in (None, tmp_path / "missing.safetensors"):
        loaded, card = SimsModel.of(path, aux, 0.0, sigma_lo=5.0, sigma_hi=1.0).load()
        assert torch.equal(loaded(*noisy()), base(*noisy()))
        assert (cost(loaded), card) == (1, CARD)


def test_omega_minus_1_is_the_auxiliary_with_the_card_of_the_base(save: Save) -> None:
    aux = small_network(1)
    model = SimsModel.of(save("base", small_network(0)), save("aux", aux, role="auxiliary", nimg=7), -1.0)
    loaded, card = model.load()
    assert torch.equal(loaded(*noisy()), aux(*noisy()))
    assert (cost(loaded), card) == (1, CARD)


@pytest.mark.parametrize(("sigma_lo", "sigma_hi"), [(0.5, 5.0), (0.5, None), (0.0, 5.0)])
def test_guidance_acts_in_the_interval_and_the_base_elsewhere(
    save: Save, sigma_lo: float, sigma_hi: float | None
) -> None:
    base, aux = small_network(0), small_network(1)
    model = SimsModel.of(save("base", base), save("aux", aux), 0.7, sigma_lo, sigma_hi)
    loaded, _ = model.load()
    guided, x = sims_guidance(base, aux, 0.7), noisy()[0]
    for sigma in (0.1, 0.5, 0.6, 5.0, 5.1, 80.0):
        within = sigma_lo < sigma <= (sigma_hi or torch.inf)
        sigmas = torch.tensor([sigma, sigma])
        assert torch.equal(at_step(loaded, sigma)(x, sigmas), (guided if within else base)(x, sigmas)), sigma


def test_without_limits_the_model_is_the_guided_denoiser_itself(save: Save) -> None:
    loaded, _ = SimsModel.of(save("base", small_network(0)), save("aux", small_network(1)), 0.7).load()
    assert isinstance(loaded, Extrapolation)


# --- a shared encoder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_auxiliary_whose_card_says_that_its_decoder_trained_shares_the_encoder_and_gives_the_same_images(
    save: Save, architecture: str
) -> None:
    base = small_network(**ARCHITECTURES[architecture])
    network = {**SETTINGS, **ARCHITECTURES[architecture]}
    if architecture == "edm2":
        del network["augment_dim"]
    aux = decoder_tuned(base)
    path = save("base", base, network=network)
    shared, _ = SimsModel.of(path, save("decoder", aux, network=network, trainable="decoder"), 1.5).load()
    plain, _ = SimsModel.of(path, save("all", aux, network=network, trainable="all"), 1.5).load()
    assert (cost(shared), cost(plain)) == (1.5, 2)
    images = [heun_sampler(model, noisy()[0], sigmas=sigma_schedule(3)) for model in (shared, plain)]
    assert torch.equal(images[0].images, images[1].images)
    assert [sampled.nfe for sampled in images] == [7.5, 10]


def test_the_shared_encoder_is_the_choice_of_the_auxiliary_s_card_alone(save: Save) -> None:
    base = small_network()
    paths = save("base", base, trainable="decoder"), save("aux", decoder_tuned(base))
    assert cost(SimsModel.of(*paths, 1.5).load()[0]) == 2


def test_a_shared_encoder_acts_in_an_interval_too(save: Save) -> None:
    base = small_network()
    aux = save("aux", decoder_tuned(base), trainable="decoder")
    loaded, _ = SimsModel.of(save("base", base), aux, 1.5, 1.0, 100.0).load()
    assert (cost(at_step(loaded, 2.0)), cost(at_step(loaded, 0.5))) == (1.5, 1)


def test_a_card_that_says_decoder_of_networks_that_differ_elsewhere_is_refused(save: Save) -> None:
    paths = save("base", small_network(0)), save("aux", small_network(1), trainable="decoder")
    message = refusal(SimsModel.of(*paths, 1.0))
    assert all(str(path) in message for path in paths)
    assert "model.enc.4x4_block0.affine.bias, outside their decoders" in message


# --- precision


@pytest.mark.parametrize("card", [{}, {"precision": "float16"}, {"precision": "bfloat16"}])
def test_on_the_cpu_networks_run_in_float32_by_default_whatever_the_card_says(save: Save, card: dict[str, Any]) -> None:
    base = small_network()
    loaded, _ = SimsModel.of(save("base", base, **card)).load("cpu")
    assert isinstance(loaded, Precond)
    assert loaded.precision == torch.float32
    assert torch.equal(loaded(*noisy()), base(*noisy()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_named_precision_is_that_of_both_networks(save: Save, precision: str) -> None:
    base, aux = small_network(0), small_network(1)
    loaded, _ = SimsModel.of(save("base", base), save("aux", aux), 0.7).load("cpu", precision)
    assert isinstance(loaded, Extrapolation)
    for net in (loaded.main, loaded.guide):
        assert isinstance(net, Precond)
        assert net.precision == getattr(torch, precision)
        assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


def test_bfloat16_gives_float32_images_near_those_of_float32(save: Save) -> None:
    path = save("base", small_network())
    exact, rounded = (SimsModel.of(path).load("cpu", precision)[0](*noisy()) for precision in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).norm() / exact.norm() < 0.02


# --- travel between processes, and loading twice


def test_a_model_travels_as_plain_values_with_absolute_paths(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = save("base", small_network(0)), save("aux", small_network(1))
    monkeypatch.chdir(tmp_path)
    model = SimsModel.of(Path(paths[0].name), Path(paths[1].name), 0.7, 0.1, 5.0)
    values = model.to_dict()
    assert values == {
        "base": str(paths[0].resolve()), "aux": str(paths[1].resolve()), "omega": 0.7, "sigma_lo": 0.1, "sigma_hi": 5.0,
        "space": "score",
    }  # fmt: skip
    assert SimsModel(**values) == model


def test_models_of_one_checkpoint_share_its_network(save: Save) -> None:
    base, aux = save("base", small_network(0)), save("aux", small_network(1))
    first, second = (SimsModel.of(base, aux, omega).load()[0] for omega in (0.5, 2.0))
    assert isinstance(first, Extrapolation)
    assert isinstance(second, Extrapolation)
    assert first.main is second.main is SimsModel.of(base).load()[0]
    assert first.guide is second.guide


# --- refusals


def refusal(model: SimsModel) -> str:
    with pytest.raises(SimsError) as error:
        model.load()
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("omega", [-1.0, 0.5])
def test_guidance_without_an_auxiliary_is_refused(save: Save, omega: float) -> None:
    assert f"omega={omega:g} needs an auxiliary" in refusal(SimsModel.of(save("base", small_network()), None, omega))


@pytest.mark.parametrize("settings", [{"model_channels": 16}, {"label_dim": 3}, {"sigma_data": 1.0}])
@pytest.mark.parametrize("omega", [-1.0, 0.5])
def test_two_different_networks_are_refused_by_name(save: Save, settings: dict[str, Any], omega: float) -> None:
    aux = save("aux", small_network(**settings), network={**SETTINGS, **settings})
    base = save("base", small_network())
    message = refusal(SimsModel.of(base, aux, omega))
    assert f"{aux} and {base} hold different networks" in message


def test_a_missing_base_or_auxiliary_is_refused_by_name(save: Save, tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    assert str(missing) in refusal(SimsModel.of(missing))
    assert str(missing) in refusal(SimsModel.of(save("base", small_network()), missing, 1.0))


def test_an_empty_interval_is_refused(save: Save) -> None:
    paths = save("base", small_network(0)), save("aux", small_network(1))
    assert "the guidance interval (5, 1] is empty" in refusal(SimsModel.of(*paths, 1.0, 5.0, 1.0))
