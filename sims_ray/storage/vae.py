"""The autoencoder that turns latents into images, from the files that diffusers keeps it in."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sims_ray.errors import SimsError
from sims_ray.storage.artifacts import sha256_file
from sims_ray.storage.torchvision import import_torchvision

STOCK_SCALING = 0.18215  # diffusers' default, which old configurations leave out
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
KIND = "AutoencoderKL"
HUB_TIMEOUT_S = 10
ADVICE = "give --vae FOLDER, one that diffusers' AutoencoderKL.save_pretrained wrote"


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
        import_torchvision()
    except (ImportError, RuntimeError):
        # One that was built for another torch would break diffusers, although the autoencoder does without it.
        utils._torchvision_available = False
    return importlib.import_module("diffusers.models.autoencoders.autoencoder_kl").AutoencoderKL


def _no_diffusers() -> SimsError:
    return SimsError("latents are decoded by diffusers, which is not installed; pip install 'sims-ray[diffusers]'")
