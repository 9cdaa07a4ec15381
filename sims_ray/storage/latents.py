"""Latents and pixels: the entry `latents` of a model's card.

    {"vae": "stabilityai/sd-vae-ft-mse", "raw_mean": [...], "raw_std": [...], "final_mean": 0, "final_std": 0.5,
     "pixel_range": [0, 1], "rounding": "down"}
    {"vae": "models/vae", "scaling_factor": 0.18215, "shift": 0, "pixel_range": [-1, 1]}

The VAE makes and takes raw latents, the model final ones: final = (raw - raw_mean) / raw_std * final_std + final_mean,
or (raw - shift) * scaling_factor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError
from torch import Tensor

from sims_ray.config.base import Positive, Settings
from sims_ray.errors import SimsError
from sims_ray.storage.vae import VaeFiles

# What EDM2's StabilityVAEEncoder has where it is not told otherwise (arXiv 2312.02696, App. B).
EDM2_LATENTS: dict[str, Any] = {
    "vae": "stabilityai/sd-vae-ft-mse",
    "raw_mean": [5.81, 3.25, 0.12, -2.15],
    "raw_std": [4.17, 4.62, 3.71, 3.28],
    "final_mean": 0.0,
    "final_std": 0.5,
    "pixel_range": [0, 1],
    "rounding": "down",
}
EDM2_ENCODER = "StabilityVAEEncoder"


class _Entry(Settings):
    """What every entry may have."""

    vae: Annotated[str, Field(min_length=1, max_length=1000)]
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    rounding: Literal["nearest", "down"] = "nearest"


class _Factor(_Entry):
    """One factor and one shift for all channels."""

    scaling_factor: Positive
    shift: float = 0.0

    def affine(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scale and bias."""
        return (self.scaling_factor,), (-self.shift * self.scaling_factor,)


class _Statistics(_Entry):
    """Mean and standard deviation of each channel, before and after."""

    raw_mean: tuple[float, ...]
    raw_std: Annotated[tuple[Positive, ...], Field(min_length=1)]
    final_mean: float = 0.0
    final_std: Positive = 0.5

    def affine(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Scale and bias, one per channel."""
        scale = tuple(self.final_std / std for std in self.raw_std)
        return scale, tuple(self.final_mean - mean * s for mean, s in zip(self.raw_mean, scale, strict=True))


@dataclass(frozen=True)
class LatentSpace:
    """How a model's latents relate to pixels.

    Attributes:
        vae: folder or hub name of the autoencoder.
        scale, bias: final = raw * scale + bias, one value per channel or one for all.
        pixel_range: the autoencoder's values of black and white.
        rounding: how pixels become whole numbers: "nearest", or "down" as EDM2 does.
    """

    vae: str
    scale: tuple[float, ...]
    bias: tuple[float, ...]
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    rounding: str = "nearest"

    @classmethod
    def of(cls, entry: Any, where: str) -> LatentSpace:
        """Read an entry `latents`; `where` is for messages.

        Raises:
            SimsError: it is no such entry, or a value in it is not possible.
        """
        if not isinstance(entry, Mapping):
            raise SimsError(
                f"{where}: latents is {entry!r}; give a mapping with raw_mean and raw_std, or scaling_factor"
            )
        try:
            read = (_Statistics if "raw_std" in entry else _Factor).model_validate(dict(entry))
        except ValidationError as error:
            wrong = error.errors()[0]
            name = ".".join(["latents", *map(str, wrong["loc"])])
            raise SimsError(f"{where}: {name} is not possible ({wrong['msg']}); correct it") from None
        if isinstance(read, _Statistics) and len(read.raw_mean) != len(read.raw_std):
            counts = f"{len(read.raw_mean)} values, raw_std {len(read.raw_std)}"
            raise SimsError(f"{where}: latents.raw_mean has {counts}; give one of each per channel")
        if read.pixel_range[0] >= read.pixel_range[1]:
            raise SimsError(f"{where}: latents.pixel_range is {list(read.pixel_range)}; give black first, like [-1, 1]")
        return cls(read.vae, *read.affine(), read.pixel_range, read.rounding)

    def settings(self) -> dict[str, Any]:
        """What decoded pixels depend on beside the autoencoder's weights, as plain values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        del plain["vae"]
        return plain

    def to_final(self, raw: Tensor) -> Tensor:
        """The model's latents from the autoencoder's [B, C, h, w]; float32."""
        return raw.to(torch.float32) * _column(self.scale, raw) + _column(self.bias, raw)

    def to_raw(self, final: Tensor) -> Tensor:
        """The autoencoder's latents from the model's [B, C, h, w]; float32."""
        return (final.to(torch.float32) - _column(self.bias, final)) / _column(self.scale, final)

    def to_uint8(self, decoded: Tensor) -> Tensor:
        """Images uint8 from what the autoencoder decoded [B, C, H, W]; what is beyond black or white is cut off."""
        black, white = self.pixel_range
        levels = ((decoded - black) / (white - black)).clamp(0, 1) * 255
        return (levels.round() if self.rounding == "nearest" else levels).to(torch.uint8)


def card_latents(card: Mapping[str, Any]) -> dict[str, Any] | None:
    """The entry `latents` of a model's card; EDM2's for its encoder, None for a model of images."""
    entry: dict[str, Any] | None = card.get("latents")
    if entry is None and card.get("encoder") == EDM2_ENCODER and card["network"]["img_channels"] == 4:
        return EDM2_LATENTS
    return entry


def choose_latents(stored: Any, given: str | None, vae: str | None, where: str) -> LatentSpace:
    """How latents relate to pixels, from what is stored with them and what the user says.

    Args:
        stored: entry `latents` of a card or a table; None without one.
        given: goes before it: "edm2", or an entry as YAML.
        vae: goes before the autoencoder of the entry; without an entry its own scaling holds, as in diffusers.
        where: the card or table, for messages.

    Raises:
        SimsError: nothing says it, or an entry is not possible.
    """
    entry = stored if given is None else _parsed(given)
    if entry is None:
        if vae is None:
            raise SimsError(
                f"{where} does not say how its latents relate to pixels; give --vae, and --latents if needed"
            )
        entry = VaeFiles.find(vae).stock_latents
    if vae is not None and isinstance(entry, Mapping):
        entry = {**entry, "vae": vae}
    return LatentSpace.of(entry, where if given is None else "--latents")


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).reshape(1, -1, 1, 1)


def _parsed(text: str) -> Any:
    if text == "edm2":
        return EDM2_LATENTS
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise SimsError(f"--latents {text!r} is not YAML; give edm2, or like '{{scaling_factor: 0.18215}}'") from None
