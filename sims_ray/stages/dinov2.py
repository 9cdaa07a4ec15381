"""DINOv2 features, as Stein et al. (2023, arXiv 2306.04675) take them to compare generative models."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sims_ray.errors import SimsError
from sims_ray.metrics.features import FeatureExtractor
from sims_ray.storage.stores import reason
from sims_ray.storage.torchvision import import_torchvision

DEFAULT = "facebook/dinov2-large"  # ViT-L/14, as in the paper: 1024 features
KIND = "dinov2"
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
BATCH = 32
HUB_TIMEOUT_S = 10
ADVICE = "give the folder of a DINOv2 model in safetensors with --set features.weights=FOLDER"


def dinov2_features(weights: str | None, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The function from uint8 images [B, C, H, W], grey ones repeated to RGB, to the class token [B, F] in float32.

    Args:
        weights: folder that `save_pretrained` of transformers wrote, or hub name; None: the ViT-L/14 of the paper.
        device: where the network runs.

    Raises:
        SimsError: transformers is not installed, or the weights are not there, damaged or of another network.
    """
    net = _load(weights or DEFAULT).to(device)

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        parts = torch.split(images, BATCH)
        # After the last normalisation, first of the tokens: what the reference implementation returns for an image.
        return torch.cat([net(prepare(part.to(device))).last_hidden_state[:, 0] for part in parts])

    return features


def prepare(images: Tensor) -> Tensor:
    """Map uint8 images [B, 1 or 3, H, W] to the network's input: float32 [B, 3, 224, 224], normalised.

    The resizing is bicubic and averages where it makes images smaller, like Pillow's; only it rounds to no levels.
    """
    x = F.interpolate(images.to(torch.float32), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean, std = (torch.tensor(values, device=x.device).reshape(3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


def _load(name: str) -> nn.Module:
    transformers = _transformers()
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    try:
        config = _local_or_asked(name, transformers.AutoConfig.from_pretrained)
        if config.model_type != KIND:
            raise SimsError(f"{name} holds a network of the kind {config.model_type}, not {KIND}; {ADVICE}")
        with _no_bars(transformers.utils.logging):
            net, found = _local_or_asked(name, transformers.Dinov2Model.from_pretrained, **options)
    except SimsError:
        raise
    except Exception as error:  # of the hub's client, of what it speaks HTTP with, or what is made of a broken file
        raise SimsError(f"the DINOv2 weights {name} cannot be loaded ({reason(error)}); {ADVICE}") from None
    if wrong := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise SimsError(f"the DINOv2 weights {name} do not fit their configuration at {wrong[0]}; {ADVICE}")
    module: nn.Module = net.eval().requires_grad_(False)
    return module


def _local_or_asked(name: str, load: Callable[..., Any], **options: Any) -> Any:
    """Load from a folder or this machine's cache; the hub is asked only for what is not there, and only once."""
    try:
        return load(name, local_files_only=True, **options)
    except OSError:
        if Path(name).is_dir():
            raise
    importlib.import_module("huggingface_hub").HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    return load(name, **options)


@contextmanager
def _no_bars(logging: Any) -> Iterator[None]:
    """Without the progress bars of transformers, which every worker would print."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _transformers() -> Any:
    with suppress(ImportError, RuntimeError):  # it does without torchvision, but not with one that does not import
        import_torchvision()
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise SimsError("DINOv2 features need transformers, which is not here; pip install 'sims-ray[dino]'") from None
