"""Memory of a training worker, estimated without any: from shapes, and from what autograd keeps of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sims_ray.diffusion.augment import AUGMENT_DIM
from sims_ray.diffusion.loss import DenoisingLoss
from sims_ray.diffusion.optimization import Optimization
from sims_ray.nn.dropout import set_dropout_keys
from sims_ray.nn.networks import describe_network, trainable_parameters
from sims_ray.nn.precond import Precond

ADAM_MOMENTS = 2


@dataclass(frozen=True)
class Footprint:
    """Memory that training takes on each worker.

    Attributes:
        parts: bytes by what they are for, whatever the batch.
        image_bytes: what the backward pass needs of each image of a pass.
    """

    parts: Mapping[str, float]
    image_bytes: float

    @property
    def fixed_bytes(self) -> float:
        """Bytes whatever the batch."""
        return sum(self.parts.values())

    def total_bytes(self, pass_nimg: int) -> float:
        """Bytes with so many images per pass."""
        return self.fixed_bytes + pass_nimg * self.image_bytes

    def most_images(self, memory_bytes: float) -> int:
        """Images per pass that a memory holds."""
        return max(0, int((memory_bytes - self.fixed_bytes) / self.image_bytes))


def footprint(network: Mapping[str, Any], settings: Optimization, precision: str, workers: int) -> Footprint:
    """Memory of one of several workers.

    What is kept for the backward pass is what autograd saves in a pass of one and of two images on the meta device:
    the second adds what an image takes, and the rest is copies of the weights. The matrices of attention are among it,
    as kernels keep them that are not fused. Workspaces of kernels, activations that are not kept and the allocator's
    gaps are not counted.

    Args:
        network: entry `network` of a checkpoint card.
        settings: what a step depends on.
        precision: dtype the network runs in.
        workers: how many train together.
    """
    net = describe_network(network).train()
    net.precision = getattr(torch, precision)
    trained = trainable_parameters(net, settings.trainable, settings.trainable_resolution)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in trained)
    one, two = (_kept_bytes(net, network, nimg) for nimg in (1, 2))
    weights = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    gradients = sum(p.numel() * p.element_size() for p in net.parameters() if p.requires_grad)
    parts = {
        "weights": weights,
        "weight averages": weights * len(settings.averages),
        "gradients": gradients,
        "gradients on their way": gradients if workers > 1 else 0,
        "Adam": ADAM_MOMENTS * gradients,
        "copies of weights": 2 * one - two,
    }
    return Footprint(parts, two - one)


def _kept_bytes(net: Precond, network: Mapping[str, Any], nimg: int) -> int:
    """What autograd saves of a pass, beside the parameters themselves; each storage once."""
    own = {tensor.untyped_storage()._cdata for tensor in net.state_dict(keep_vars=True).values()}
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # held on to, or another would get its number
        kept[storage._cdata] = storage
        return tensor

    size = network["img_resolution"]
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        images = torch.zeros(nimg, network["img_channels"], size, size)
        labels = torch.zeros(nimg, network["label_dim"]) if network["label_dim"] else None
        augment_labels = torch.zeros(nimg, AUGMENT_DIM) if network.get("augment_dim") else None
        set_dropout_keys(net, torch.zeros(nimg, dtype=torch.int32))
        loss = DenoisingLoss(net)(images, torch.ones(nimg), images, labels, augment_labels)
    del loss
    return sum(storage.nbytes() for number, storage in kept.items() if number not in own)
