"""Counted operations: against real passes, by hand, and against what papers report."""

import pytest
import torch

from sims_ray.config import preset_network
from sims_ray.diffusion.loss import DenoisingLoss
from sims_ray.errors import SimsError
from sims_ray.nn.flops import FLOPS_PER_MAC, GPUS, flop_counter, gpu_named, gpu_of_device, network_flops
from sims_ray.nn.networks import describe_network, trainable_parameters
from tests.networks import ARCHITECTURES, SETTINGS, small_network

BATCH = 2


def settings(architecture: str, **changes: object) -> dict[str, object]:
    found = {**SETTINGS, "label_dim": 3, **ARCHITECTURES[architecture], **changes}
    if architecture == "edm2":
        del found["augment_dim"]
    return found


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_the_count_without_memory_is_that_of_a_real_pass_attention_included(architecture: str) -> None:
    net = small_network(label_dim=3, **ARCHITECTURES[architecture])
    x, sigma, labels = torch.randn(BATCH, 1, 8, 8), torch.ones(BATCH), torch.eye(3)[:BATCH]
    with torch.inference_mode(), flop_counter() as counter:
        net(x, sigma, labels)
    assert counter.get_total_flops() == BATCH * network_flops(settings(architecture)).forward


def test_an_attention_layer_counts_its_projections_and_both_of_its_products() -> None:
    with_it, without = (network_flops(settings("ddpmpp", attn_resolutions=some)).forward for some in ([4], []))
    tokens, channels, layers = 4 * 4, 8, 2  # the encoder's block and the decoder's last one; the middle has one anyway
    projections = 4 * tokens * channels**2
    products = 2 * tokens**2 * channels
    assert with_it - without == layers * FLOPS_PER_MAC * (projections + products)


@pytest.mark.parametrize(
    ("name", "gmac"),
    [
        ("edm-cifar10-vp", 21.3),
        ("edm-imagenet64-adm", 110),
        ("edm2-img512-s", 102),
    ],
)
def test_what_papers_call_gflops_are_multiply_accumulates(name: str, gmac: float) -> None:
    assert network_flops(preset_network(name)).forward / FLOPS_PER_MAC / 1e9 == pytest.approx(gmac, rel=0.02)


@pytest.mark.parametrize("name", ["edm-cifar10-vp", "edm2-img64-xs"])
@pytest.mark.parametrize(("trainable", "resolution"), [("all", 0), ("decoder", 0), ("decoder", 32)])
def test_training_takes_what_a_forward_and_a_backward_pass_take(name: str, trainable: str, resolution: int) -> None:
    network = {**preset_network(name), "num_blocks": 1, "channel_mult": [1, 2]}
    net = describe_network(network).train()
    trained = trainable_parameters(net, trainable, resolution)
    for parameter_name, parameter in net.named_parameters():
        parameter.requires_grad_(parameter_name in trained)
    size = network["img_resolution"]
    with torch.device("meta"), flop_counter() as counter:
        images = torch.zeros(1, network["img_channels"], size, size)
        DenoisingLoss(net)(images, torch.ones(1), images).sum().backward()
    assert network_flops(network, resolution).training(trainable) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_two_parts_of_a_network_are_its_encoder_and_its_decoder() -> None:
    network = preset_network("edm-cifar10-vp")
    encoder, upper = network_flops(network), network_flops(network, 32)
    assert encoder.forward == upper.forward == sum(encoder)
    assert encoder.shared < encoder.own < 2.2 * encoder.shared  # the decoder is the larger half
    assert encoder.shared < upper.shared < encoder.forward
    assert encoder.training() == 3 * encoder.forward
    assert encoder.training("decoder") == encoder.shared + 3 * encoder.own


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("Tesla V100-SXM2-32GB", "v100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_cuda_gives_it(device: str, gpu: str | None) -> None:
    found = gpu_of_device(device)
    assert (found and found.name) == gpu


def test_a_gpu_that_is_not_known_is_told_which_are() -> None:
    assert gpu_named("RTX 4090") is GPUS["rtx4090"]
    with pytest.raises(SimsError, match=r"'abacus'.*v100, a100, h100, h200, l40s, rtx4090") as refused:
        gpu_named("abacus")
    assert "\n" not in str(refused.value)


def test_less_precision_is_never_slower_and_every_number_has_a_source() -> None:
    for gpu in GPUS.values():
        peaks = [gpu.peak_flops[dtype] for dtype in ("float32", "tf32", "float16") if dtype in gpu.peak_flops]
        assert peaks == sorted(peaks)
        assert "NVIDIA" in gpu.source
