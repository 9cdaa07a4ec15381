"""EDM preconditioning: a raw network becomes a denoiser D(x; sigma)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sims_ray.nn.edm2_unet import EDM2UNet
from sims_ray.nn.layers import Encoded
from sims_ray.nn.mp_layers import MPConv, MPFourier

COMPILED = ("forward", "encode", "advance", "decode")


class RawNetwork(Protocol):
    """F(x, c_noise, labels, augment_labels), in two halves: the decoder on what the encoder returns."""

    dec: nn.ModuleDict

    def __call__(self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None, /) -> Tensor:
        """Evaluate the raw network."""
        ...

    def encode(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Encoded:
        """Run the embedding and the encoder."""
        ...

    def advance(self, encoded: Encoded, layers: int) -> Encoded:
        """Run the decoder until `layers` of its layers are done."""
        ...

    def decode(self, encoded: Encoded) -> Tensor:
        """Run what is left of the decoder."""
        ...


class _Inputs(NamedTuple):
    x: Tensor  # float32 [B, C, H, W]
    c_skip: Tensor  # [B, 1, 1, 1]
    c_out: Tensor
    x_in: Tensor  # in the network's precision
    c_noise: Tensor  # [B]
    labels: Tensor | None


class Features(NamedTuple):
    """The first part of one evaluation, which several networks may share.

    Attributes:
        inputs: what the preconditioning needs to finish.
        encoded: what the encoder returned.
    """

    inputs: _Inputs
    encoded: Encoded


class Precond(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM, arXiv 2206.00364, eq. 7 and table 1).

    Input and output are float32; `precision` is the dtype the raw network runs in.

    Args:
        label_dim: number of classes K; 0 for unconditional.
        sigma_data: standard deviation of the training images, in [-1, 1] units.
    """

    def __init__(self, label_dim: int = 0, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.label_dim = label_dim
        self.sigma_data = sigma_data
        self.precision = torch.float32

    @property
    def network(self) -> RawNetwork:
        """The raw network F."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, augment_labels: Tensor | None = None
    ) -> Tensor:
        """Estimate the clean image from x [B, C, H, W] at sigma [B]; labels are one-hot [B, K]."""
        inputs = self._inputs(x, sigma, labels)
        return _finish(inputs, self.network(inputs.x_in, inputs.c_noise, inputs.labels, augment_labels))

    def encode(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, decoder_layers: int = 0) -> Features:
        """The first part of `forward`: the encoder and the first `decoder_layers` layers of the decoder."""
        inputs = self._inputs(x, sigma, labels)
        encoded = self.network.encode(inputs.x_in, inputs.c_noise, inputs.labels)
        return Features(inputs, self.network.advance(encoded, decoder_layers) if decoder_layers else encoded)

    def decode(self, features: Features) -> Tensor:
        """The rest of `forward`, on features that may come from another network."""
        return _finish(features.inputs, self.network.decode(features.encoded))

    def run_in(self, precision: str) -> None:
        """Run the raw network in 'float32', 'bfloat16' or 'float16'.

        float32 means all of its 24 bits: TF32, which cuDNN would otherwise use, is switched off in this process.
        """
        self.precision = getattr(torch, precision)
        if self.precision == torch.float32:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def compile_network(self) -> None:
        """Compile the raw network and its halves on their next use, one graph per batch size."""
        for method in COMPILED:
            setattr(self.network, method, torch.compile(getattr(self.network, method), dynamic=False))

    def uncompile_network(self) -> None:
        """Undo `compile_network`; a copy of a compiled network needs it, as it would go on computing the original."""
        for method in COMPILED:
            vars(self.network).pop(method, None)

    def _inputs(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> _Inputs:
        x = x.to(torch.float32)
        sigma = sigma.to(torch.float32).reshape(-1, 1, 1, 1).expand(x.shape[0], -1, -1, -1)
        if self.label_dim == 0:
            labels = None
        elif labels is None:
            labels = torch.zeros(x.shape[0], self.label_dim, device=x.device)
        else:
            labels = labels.to(torch.float32).reshape(-1, self.label_dim)
        variance = sigma**2 + self.sigma_data**2
        x_in = (x / variance.sqrt()).to(self.precision)
        c_skip, c_out = self.sigma_data**2 / variance, sigma * self.sigma_data / variance.sqrt()
        return _Inputs(x, c_skip, c_out, x_in, sigma.flatten().log() / 4, labels)


def _finish(inputs: _Inputs, f_x: Tensor) -> Tensor:
    return inputs.c_skip * inputs.x + inputs.c_out * f_x.to(torch.float32)


class EDMPrecond(Precond):
    """Preconditioned network of EDM; the raw network lies in `model`.

    Args:
        model: raw network F(x, c_noise, labels, augment_labels).
        label_dim: number of classes K; 0 for unconditional.
        sigma_data: standard deviation of the training images.
    """

    def __init__(self, model: nn.Module, label_dim: int = 0, sigma_data: float = 0.5) -> None:
        super().__init__(label_dim, sigma_data)
        self.model = model

    @property
    def network(self) -> RawNetwork:
        """The raw network F."""
        return self.model  # type: ignore[return-value]


class EDM2Precond(Precond):
    """Preconditioned network of EDM2 (arXiv 2312.02696), with its learned uncertainty u(sigma).

    Args:
        unet: raw network.
        sigma_data: standard deviation of the training images.
        logvar_channels: Fourier features of the uncertainty.
    """

    def __init__(self, unet: EDM2UNet, sigma_data: float = 0.5, logvar_channels: int = 128) -> None:
        super().__init__(unet.label_dim, sigma_data)
        self.unet = unet
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1)

    @property
    def network(self) -> RawNetwork:
        """The raw network F."""
        return self.unet

    def logvar(self, sigma: Tensor) -> Tensor:
        """Log variance u(sigma) of the loss at sigma [B]: [B] (EDM2 eq. 23)."""
        c_noise = sigma.to(torch.float32).flatten().log() / 4
        out: Tensor = self.logvar_linear(self.logvar_fourier(c_noise))
        return out.flatten()
