"""The cost of guidance in floating-point operations, on networks without memory for their weights."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sims_ray.config import preset_network, presets
from sims_ray.diffusion.evaluations import Denoiser
from sims_ray.diffusion.guidance import SharedEncoder, sims_guidance
from sims_ray.nn.networks import describe_network
from sims_ray.nn.precond import Precond

NETWORKS = ("edm-cifar10-vp", "edm-ffhq64-vp", "edm-imagenet64-adm", "edm2-img64-s")


def flops(denoiser: Denoiser, shape: tuple[int, int, int]) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        denoiser(torch.zeros(1, *shape), torch.ones(1), None)
    return int(counter.get_total_flops())


def network(name: str) -> Precond:
    return describe_network(preset_network(name)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_shared_encoder_costs_less_than_two_networks_and_what_is_shared_besides_less_still(name: str) -> None:
    net, shape = network(name), presets()[name].shape
    layers = [int(layer.partition("x")[0]) for layer in net.network.dec].index(shape[1])
    base, sims = flops(net, shape), flops(sims_guidance(net, copy.deepcopy(net), 1.0), shape)
    decoder, upper = (flops(SharedEncoder(net, net, 1.0, shared), shape) for shared in (0, layers))
    assert sims == 2 * base
    assert 1.6 < decoder / base < 1.75  # the decoder is the larger half
    assert base < upper < decoder < sims


def test_with_the_lower_decoder_shared_too_sims_on_cifar10_costs_at_most_1_6_times_the_base() -> None:
    net, shape = network("edm-cifar10-vp"), presets()["edm-cifar10-vp"].shape
    layers = [int(layer.partition("x")[0]) for layer in net.network.dec].index(32)
    assert flops(SharedEncoder(net, net, 1.0, layers), shape) / flops(net, shape) <= 1.6
