"""Floating-point operations: how many a network takes, counted from shapes, and how many a GPU can do.

A multiplication and an addition count as two. Where papers on diffusion models speak of the GFLOPs of an evaluation
(ADM at 64x64: 110, EDM2-S at 512x512: 102) they mean pairs of both, multiply-accumulates (MAC), half as many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from sims_ray.errors import SimsError
from sims_ray.nn.networks import describe_network

TRAINING_FACTOR = 3  # the backward pass takes a product for the inputs and one for the weights
FLOPS_PER_MAC = 2
GB = 10**9
TERA = 10**12


def flop_counter() -> FlopCounterMode:
    """A context that counts matrix products, convolutions and attention, on any device; see `get_total_flops`."""
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop}  # torch leaves this one out
    return FlopCounterMode(display=False, custom_mapping=on_cpu)


class NetworkFlops(NamedTuple):
    """Operations of one network evaluation per image.

    Attributes:
        shared: of the encoder and those decoder layers that an auxiliary may share with its base.
        own: of the rest.
    """

    shared: int
    own: int

    @property
    def forward(self) -> int:
        """Of the whole network."""
        return self.shared + self.own

    def training(self, trainable: str = "all") -> int:
        """Of a training step per image; of `trainable` 'decoder' the shared part has no backward pass."""
        return TRAINING_FACTOR * self.own + (self.shared if trainable == "decoder" else TRAINING_FACTOR * self.shared)


def network_flops(network: Mapping[str, Any], resolution: int = 0) -> NetworkFlops:
    """Operations of one evaluation per image, counted without memory for weights or images.

    Args:
        network: entry `network` of a checkpoint card.
        resolution: decoder layers below this resolution count as shared with the base (`trainable_resolution`).
    """
    net = describe_network(network).eval()
    layers = sum(int(name.partition("x")[0]) < resolution for name in net.network.dec)
    size = network["img_resolution"]
    x, sigma = torch.zeros(1, network["img_channels"], size, size, device="meta"), torch.ones(1, device="meta")
    with torch.no_grad():
        with flop_counter() as shared:
            features = net.encode(x, sigma, None, layers)
        with flop_counter() as own:
            net.decode(features)
    return NetworkFlops(shared.get_total_flops(), own.get_total_flops())


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, as its data sheet describes it.

    Attributes:
        name: in lower case.
        memory_bytes: of one GPU.
        peak_flops: operations per second by dtype, without sparsity: tf32, bfloat16 and float16 on tensor cores that
            sum in float32; float32 has all of its 24 bits.
        source: where these numbers are from.
    """

    name: str
    memory_bytes: int
    peak_flops: Mapping[str, float]
    source: str


def _gpu(name: str, memory_gb: int, float32: float, tf32: float, bfloat16: float, float16: float, source: str) -> Gpu:
    peaks = {"float32": float32, "tf32": tf32, "bfloat16": bfloat16, "float16": float16}
    return Gpu(name, memory_gb * GB, {dtype: peak * TERA for dtype, peak in peaks.items() if peak}, source)


GPUS = {
    gpu.name: gpu
    for gpu in (  # memory in GB; TFLOP/s in float32, tf32, bfloat16, float16
        _gpu("v100", 32, 15.7, 0, 0, 125, "NVIDIA V100 data sheet, SXM2"),
        _gpu("a100", 80, 19.5, 156, 312, 312, "NVIDIA A100 data sheet, SXM4, dense"),
        _gpu("h100", 80, 67, 494.7, 989.4, 989.4, "NVIDIA H100 data sheet, SXM, dense"),
        _gpu("h200", 141, 67, 494.7, 989.4, 989.4, "NVIDIA H200 data sheet, SXM, dense"),
        _gpu("l40s", 48, 91.6, 183, 362, 362, "NVIDIA L40S data sheet, dense"),
        _gpu("rtx4090", 24, 82.6, 82.6, 165.2, 165.2, "NVIDIA Ada architecture white paper, GeForce RTX 4090, dense"),
    )
}


def gpu_named(name: str) -> Gpu:
    """The kind of GPU of this name, in any case.

    Raises:
        SimsError: it is not in the table.
    """
    gpu = GPUS.get(name.lower().replace(" ", ""))
    if gpu is None:
        raise SimsError(f"GPU {name!r} is not in the table; known are {', '.join(GPUS)}")
    return gpu


def gpu_of_device(device_name: str) -> Gpu | None:
    """The kind of GPU that CUDA gives this name to, like "NVIDIA A100-SXM4-80GB"; None if it is not in the table."""
    plain = device_name.lower().replace(" ", "")
    return next((gpu for name, gpu in GPUS.items() if name in plain), None)
