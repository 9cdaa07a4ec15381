"""Networks from the settings in a checkpoint card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sims_ray.nn.adm_unet import DhariwalUNet
from sims_ray.nn.edm2_unet import Block, EDM2UNet
from sims_ray.nn.layers import UNetBlock
from sims_ray.nn.precond import EDM2Precond, EDMPrecond, Precond
from sims_ray.nn.song_unet import SongUNet

UNCERTAINTY = "logvar_"
BLOCKS = (UNetBlock, Block)  # what most of a network consists of
ARCHITECTURES = ("song_unet", "adm_unet", "edm2_unet")


def build_network(settings: Mapping[str, Any]) -> Precond:
    """Build the denoiser that `settings` (the `network` entry of a checkpoint card) describes.

    Keys: `architecture` (one of `ARCHITECTURES`), `sigma_data`, for EDM2 `logvar_channels`, and the arguments of
    `SongUNet`, `DhariwalUNet` or `EDM2UNet`.

    Raises:
        ValueError: an unknown architecture.
        TypeError: an argument that the architecture does not have.
    """
    options = dict(settings)
    architecture = options.pop("architecture", "song_unet")
    sigma_data = options.pop("sigma_data", 0.5)
    if architecture == "edm2_unet":
        logvar_channels = options.pop("logvar_channels", 128)
        return EDM2Precond(EDM2UNet(**options), sigma_data, logvar_channels)
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    network = SongUNet if architecture == "song_unet" else DhariwalUNet
    return EDMPrecond(network(**options), options.get("label_dim", 0), sigma_data)


def describe_network(settings: Mapping[str, Any]) -> Precond:
    """The network of `settings` without memory for its weights, to look at names, shapes and counts."""
    with torch.device("meta"):
        return build_network(settings)


def num_parameters(net: nn.Module) -> int:
    """Learned values of a network; buffers do not count."""
    return sum(parameter.numel() for parameter in net.parameters())


def trainable_parameters(net: Precond, which: str = "all", resolution: int = 0) -> set[str]:
    """Names of the parameters that train: 'all', or those of the 'decoder' from `resolution` pixels up.

    EDM2's learned uncertainty trains in any case; it plays no part in denoising.

    Raises:
        ValueError: another word.
    """
    if which not in ("all", "decoder"):
        raise ValueError(f"trainable={which!r} is unknown; choose 'all' or 'decoder'")
    decoder = decoder_parameters(net, resolution)
    return {
        name for name, _ in net.named_parameters() if which == "all" or name in decoder or name.startswith(UNCERTAINTY)
    }


def decoder_parameters(net: Precond, resolution: int = 0) -> set[str]:
    """Names of the parameters after the last encoder layer, of the decoder's layers from `resolution` pixels up."""
    prefix = "unet." if isinstance(net, EDM2Precond) else "model."
    layers = tuple(f"{prefix}dec.{name}." for name in net.network.dec if int(name.partition("x")[0]) >= resolution)
    return {name for name, _ in net.named_parameters() if name.startswith((*layers, f"{prefix}out_"))}
