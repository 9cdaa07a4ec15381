import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from sims_ray.config import NetworkSettings, load_recipe, presets
from sims_ray.config.architecture import network_entry
from sims_ray.nn.edm2_unet import EDM2UNet
from sims_ray.nn.embeddings import FourierEmbedding, PositionalEmbedding
from sims_ray.nn.layers import Encoded
from sims_ray.nn.mlp import MLP
from sims_ray.nn.networks import build_network, decoder_parameters, describe_network, num_parameters
from sims_ray.nn.precond import EDM2Precond, EDMPrecond, Precond
from sims_ray.nn.song_unet import SongUNet
from tests.networks import ARCHITECTURES, SETTINGS, small_network

PRESETS = presets()
# Every network with halves of its own, conditional and, where it can be, told augmentations.
VARIANTS: dict[str, dict[str, Any]] = {
    "ddpmpp": {**ARCHITECTURES["ddpmpp"], "augment_dim": 9},
    "ncsnpp": {**ARCHITECTURES["ncsnpp"], "augment_dim": 9},
    "encoder-skip": {**ARCHITECTURES["ddpmpp"], "encoder_type": "skip"},
    "decoder-skip": {**ARCHITECTURES["ddpmpp"], "decoder_type": "skip"},
    "adm": {**ARCHITECTURES["adm"], "augment_dim": 9},
    "edm2": ARCHITECTURES["edm2"],
}
each_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images, noise levels and labels."""
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.1, 1.0, 10.0]), torch.eye(3)[[1, 0, 2]]


def same(one: Encoded, other: Encoded) -> bool:
    tensors = [[e.x, e.emb, *e.skips, *([] if e.image is None else [e.image])] for e in (one, other)]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


def preset_network(name: str) -> dict[str, Any]:
    preset, recipe = PRESETS[name], load_recipe(name)
    return network_entry(recipe.network, preset.shape, preset.num_classes, bool(recipe.train.augment))


# --- the published models


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe_and_builds_a_network_of_the_published_size(name: str) -> None:
    preset, settings = PRESETS[name], preset_network(name)
    net = describe_network(settings)
    assert isinstance(net, Precond)
    assert net.label_dim == (preset.num_classes if load_recipe(name).network.conditional else 0)
    if published := preset.published["params_m"]:
        assert num_parameters(net) == pytest.approx(published * 1e6, rel=1e-3)
    assert all(parameter.is_meta for parameter in net.parameters())


def test_the_published_sizes_are_those_of_the_papers() -> None:
    sizes = {name: preset.published["params_m"] for name, preset in PRESETS.items()}
    edm = {"edm-cifar10-vp": 55.7, "edm-cifar10-cond-vp": 55.7, "edm-ffhq64-vp": 61.8, "edm-imagenet64-adm": 295.9}
    edm2 = {"xs": 124.7, "s": 280.2, "m": 497.8, "l": 777.5, "xl": 1119}
    for name, expected in edm.items():
        assert sizes[name] == expected
    for size, expected in edm2.items():
        assert sizes[f"edm2-img64-{size}"] == sizes[f"edm2-img512-{size}"] == expected
    assert sizes["edm2-img512-xxl"] == 1523
    assert len(sizes) == 4 + 5 + 7


def test_an_edm_network_is_told_augmentations_if_the_recipe_augments() -> None:
    assert preset_network("edm-cifar10-vp")["augment_dim"] == 9
    assert "augment_dim" not in preset_network("edm-imagenet64-adm")


# --- settings


def test_an_unknown_architecture_is_refused_with_those_that_exist() -> None:
    with pytest.raises(
        ValueError, match="architecture 'unet' is unknown; choose one of song_unet, adm_unet, edm2_unet"
    ):
        build_network({**SETTINGS, "architecture": "unet"})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_argument_that_the_architecture_does_not_have_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match="widht"):
        small_network(**ARCHITECTURES[name], widht=3)
    with pytest.raises(TypeError, match="augment_dim"):
        build_network({**SETTINGS, "architecture": "edm2_unet"})


@pytest.mark.parametrize("name", ["embedding_type", "encoder_type", "decoder_type"])
def test_song_unet_refuses_a_type_it_does_not_know_with_those_it_does(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}='random' is unknown; choose one of \w+, \w+"):
        SongUNet(8, 1, **{name: "random"})  # type: ignore[arg-type]


def test_the_recipe_s_architectures_are_built_as_the_papers_describe_them() -> None:
    def built(architecture: str) -> Precond:
        settings = NetworkSettings(architecture=architecture, model_channels=64, num_blocks=1)  # type: ignore[arg-type]
        return build_network(network_entry(settings, (3, 16, 16), 0, False))

    ddpmpp, ncsnpp, edm2 = built("ddpmpp"), built("ncsnpp"), built("edm2")
    assert isinstance(ddpmpp, EDMPrecond) and isinstance(ncsnpp, EDMPrecond) and isinstance(edm2, EDM2Precond)
    assert isinstance(ddpmpp.model.map_noise, PositionalEmbedding)
    assert isinstance(ncsnpp.model.map_noise, FourierEmbedding)
    assert len(ncsnpp.model.map_noise.freqs) == 64  # sine and cosine of each: twice the base width
    assert not [name for name in ddpmpp.model.enc if "aux" in name]
    assert [name for name in ncsnpp.model.enc if "aux" in name] == ["8x8_aux_residual", "4x4_aux_residual"]
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    torch.testing.assert_close(ncsnpp.model.enc["8x8_aux_residual"].resample_filter[0, 0], taps.outer(taps))
    assert isinstance(edm2.unet, EDM2UNet)


def test_sigma_data_and_the_labels_reach_the_denoiser() -> None:
    for settings in VARIANTS.values():
        net = small_network(**{**settings, "label_dim": 3, "sigma_data": 0.7})
        assert (net.label_dim, net.sigma_data) == (3, 0.7)


def test_logvar_channels_are_the_width_of_the_uncertainty_alone() -> None:
    wide, narrow = (small_network(**ARCHITECTURES["edm2"], logvar_channels=n) for n in (64, 16))
    assert num_parameters(wide) - num_parameters(narrow) == 64 - 16


# --- halves


@each_variant
def test_decoding_what_was_encoded_equals_the_whole_network_bit_for_bit_any_number_of_times(
    settings: dict[str, Any],
) -> None:
    net = small_network(**{**settings, "label_dim": 3, "attn_resolutions": [8, 4]})
    features = net.encode(*batch())
    whole = net(*batch())
    assert torch.equal(net.decode(features), whole)
    assert torch.equal(net.decode(features), whole)
    assert same(features.encoded, net.encode(*batch()).encoded)


@each_variant
def test_any_number_of_decoder_layers_may_run_beforehand(settings: dict[str, Any]) -> None:
    net = small_network(**{**settings, "label_dim": 3})
    whole, layers = net(*batch()), len(net.network.dec)
    assert layers >= 6
    for done in range(layers + 1):
        assert torch.equal(net.decode(net.encode(*batch(), decoder_layers=done)), whole)


@pytest.mark.parametrize(
    ("settings", "resolution"),
    [*((settings, 0) for settings in VARIANTS.values()), *((VARIANTS[name], 8) for name in ("decoder-skip", "edm2"))],
    ids=[*VARIANTS, "decoder-skip-from-8", "edm2-from-8"],
)
def test_the_decoder_s_parameters_from_a_resolution_up_change_the_image_but_nothing_before_it(
    settings: dict[str, Any], resolution: int
) -> None:
    net = small_network(**{**settings, "label_dim": 3})
    inputs = net.encode(*(part[:1] for part in batch())).inputs
    augment_labels = torch.ones(1, 9) if "augment_dim" in settings else None
    below = sum(int(name.partition("x")[0]) < resolution for name in net.network.dec)
    assert (below > 0) == (resolution > 0)

    def before() -> Encoded:
        encoded = net.network.encode(inputs.x_in, inputs.c_noise, inputs.labels, augment_labels)
        return net.network.advance(encoded, below)

    features = before()
    image = net.network.decode(features)
    changes: dict[str, set[str]] = {"features": set(), "image alone": set(), "nothing": set()}
    for name, parameter in net.named_parameters():
        kept = parameter.clone()
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        if not same(before(), features):
            changes["features"].add(name)
        else:
            changes["nothing" if torch.equal(net.network.decode(features), image) else "image alone"].add(name)
        parameter.copy_(kept)
    assert decoder_parameters(net, resolution) == changes["image alone"]
    assert changes["nothing"] == ({"logvar_linear.weight"} if isinstance(net, EDM2Precond) else set())


@each_variant
def test_a_decoder_may_work_on_another_network_s_features(settings: dict[str, Any]) -> None:
    base = small_network(**{**settings, "label_dim": 3})
    aux = copy.deepcopy(base)
    for name in decoder_parameters(aux):
        aux.get_parameter(name).mul_(1.1).add_(0.05)
    assert torch.equal(aux.decode(base.encode(*batch())), aux(*batch()))
    assert not torch.equal(aux(*batch()), base(*batch()))


def test_networks_of_one_shape_share_one_compiled_graph_without_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch.compiler.reset()
    counters.clear()
    for seed in range(3):
        net = small_network(seed, label_dim=3, **ARCHITECTURES["ddpmpp"])
        expected = net(*batch())
        net.compile_network()
        assert torch.equal(net(*batch()), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.compiler.reset()


# --- the 2-D network


@pytest.mark.parametrize(("dim", "hidden", "num_layers"), [(2, 64, 4), (2, 32, 4), (3, 16, 2)])
def test_the_mlp_has_the_size_of_the_notebooks(dim: int, hidden: int, num_layers: int) -> None:
    net = MLP(dim, hidden, num_layers)
    first, last = (dim + 1) * hidden + hidden, hidden * dim + dim
    assert num_parameters(net) == first + num_layers * (hidden * hidden + hidden) + last
    assert net(torch.zeros(5, dim), torch.zeros(5)).shape == (5, dim)
    assert (dim, hidden, num_layers) != (2, 64, 4) or num_parameters(net) == 3 * 64 + 64 + 4 * (
        64 * 64 + 64
    ) + 64 * 2 + 2


def test_the_mlp_is_told_the_time_as_it_is() -> None:
    torch.manual_seed(0)
    net, x = MLP(), torch.randn(6, 2)
    times = torch.arange(6)
    alone = torch.cat([net(x[i : i + 1], times[i]) for i in range(6)])
    torch.testing.assert_close(net(x, times), alone)
    assert (net(x, torch.zeros(6)) - net(x, torch.full([6], 20.0))).abs().max() > 1e-2
    by_hand = net.layers(torch.cat([x, times[:, None].float()], dim=1))
    assert torch.equal(net(x, times), by_hand)
