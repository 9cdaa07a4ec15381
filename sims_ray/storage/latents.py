"""Latents and pixels: the entry `latents` of a model's card, and the VAE that turns latents into images.

    {"vae": "stabilityai/sd-vae-ft-mse", "raw_mean": [...], "raw_std": [...], "final_mean": 0, "final_std": 0.5,
     "pixel_range": [0, 1], "rounding": "down"}
    {"vae": "models/vae", "scaling_factor": 0.18215, "shift": 0, "pixel_range": [-1, 1]}

The VAE makes and takes raw latents, the model final ones: final = (raw - raw_mean) / raw_std * final_std + final_mean,
or (raw - shift) * scaling_factor.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import Field, ValidationError
from torch import Tensor

from sims_ray.config.base import Positive, Settings
from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import sha256_file

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
STOCK_SCALING = 0.18215  # diffusers' default, which old configurations leave out
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
KIND = "AutoencoderKL"
HUB_TIMEOUT_S = 10
ADVICE = "give --vae FOLDER, one that diffusers' AutoencoderKL.save_pretrained wrote"


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


@dataclass(frozen=True)
class VaeFiles:
    """The files of an autoencoder as diffusers keeps them.

    Attributes:
        folder: where they lie.
        config: its architecture.
    """

    folder: Path
    config: Mapping[str, Any]

    @classmethod
    def find(cls, name: str) -> VaeFiles:
        """The files of a folder or a hub name; the hub is asked only for what this machine does not have.

        Raises:
            SimsError: they are not there, cannot be fetched, or are of another kind of network.
        """
        folder = Path(name).resolve() if Path(name).is_dir() else _from_hub(name)
        for file in (CONFIG, WEIGHTS):
            if not (folder / file).is_file():
                raise SimsError(f"{folder} has no {file}, so it holds no VAE in safetensors; {ADVICE}")
        try:
            config = json.loads((folder / CONFIG).read_text())
            kind = config["_class_name"]
        except (ValueError, KeyError, TypeError):
            raise SimsError(f"{folder / CONFIG} does not describe a network; {ADVICE}") from None
        if kind != KIND:
            raise SimsError(f"{folder} holds a network of the class {kind}, not {KIND}; {ADVICE}")
        return cls(folder, config)

    @property
    def identity(self) -> str:
        """SHA-256 over the weights and the architecture; names and versions of who wrote them are not in it."""
        kept = {key: value for key, value in self.config.items() if not key.startswith("_")}
        digest = sha256_file(self.folder / WEIGHTS)
        return hashlib.sha256(f"{digest} {json.dumps(kept, sort_keys=True)}".encode()).hexdigest()

    @property
    def stock_latents(self) -> dict[str, Any]:
        """The entry `latents` that holds where this autoencoder is used as diffusers does."""
        factor, shift = self.config.get("scaling_factor", STOCK_SCALING), self.config.get("shift_factor") or 0.0
        if mean := self.config.get("latents_mean"):
            normalisation = {"raw_mean": mean, "raw_std": self.config.get("latents_std"), "final_std": factor}
        else:
            normalisation = {"scaling_factor": factor, "shift": shift}
        return {"vae": str(self.folder), **normalisation}

    def image_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(C, H, W) of the images that latents (c, h, w) become.

        Raises:
            SimsError: it takes latents of another number of channels.
        """
        channels, height, width = latent_shape
        if channels != (expected := self.config.get("latent_channels", 4)):
            raise SimsError(
                f"the latents have {channels} channels, but the VAE in {self.folder} takes {expected}; {ADVICE}"
            )
        factor = 2 ** (len(self.config.get("block_out_channels", [64])) - 1)
        return self.config.get("out_channels", 3), height * factor, width * factor

    def load(self) -> torch.nn.Module:
        """The autoencoder, for inference in float32.

        Raises:
            SimsError: diffusers is not installed, or the weights are torn or of another architecture.
        """
        try:
            vae, found = _autoencoder().from_pretrained(
                self.folder,
                local_files_only=True,
                use_safetensors=True,  # the other format is pickle
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
                output_loading_info=True,
            )
        except SimsError:
            raise
        except Exception as error:  # whatever diffusers makes of a broken file
            reason = " ".join(str(error).split())[:300]
            raise SimsError(f"the VAE in {self.folder} cannot be loaded ({reason}); restore its files") from None
        if wrong := [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]:
            raise SimsError(f"the VAE in {self.folder} does not fit its {CONFIG} at {wrong[0]}; restore its files")
        module: torch.nn.Module = vae.eval().requires_grad_(False)
        return module


def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).reshape(1, -1, 1, 1)


def _parsed(text: str) -> Any:
    if text == "edm2":
        return EDM2_LATENTS
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise SimsError(f"--latents {text!r} is not YAML; give edm2, or like '{{scaling_factor: 0.18215}}'") from None


def _from_hub(name: str) -> Path:
    """Folder of a hub repository's files, from this machine's cache if it has them."""
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise _no_diffusers() from None
    wanted = {"repo_id": name, "allow_patterns": [CONFIG, WEIGHTS]}
    try:
        cached = Path(hub.snapshot_download(**wanted, local_files_only=True))
        if (cached / CONFIG).is_file() and (cached / WEIGHTS).is_file():
            return cached
    except ValueError:  # not of the form of a hub name
        raise SimsError(f"there is no folder {name}; {ADVICE}") from None
    except OSError:
        pass
    try:
        hub.HfApi().model_info(name, timeout=HUB_TIMEOUT_S)  # asks once, where a download would try for minutes
        return Path(hub.snapshot_download(**wanted))
    except Exception as error:  # of the client or of what it speaks HTTP with
        reason = " ".join(str(error).split())[:200]
        raise SimsError(
            f"the VAE {name} is neither a folder nor in the cache, and the hub cannot be asked ({reason}); {ADVICE}"
        ) from None


def _autoencoder() -> Any:
    """diffusers' AutoencoderKL."""
    try:
        utils: Any = importlib.import_module("diffusers.utils.import_utils")
    except ImportError:
        raise _no_diffusers() from None
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        # One that was built for another torch would break diffusers, although the autoencoder does without it.
        utils._torchvision_available = False
    return importlib.import_module("diffusers.models.autoencoders.autoencoder_kl").AutoencoderKL


def _no_diffusers() -> SimsError:
    return SimsError("latents are decoded by diffusers, which is not installed; pip install 'sims-ray[diffusers]'")
