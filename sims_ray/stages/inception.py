"""Inception-v3 features as clean-fid takes them: its weights, its network, its resizing."""

from __future__ import annotations

import hashlib
import importlib
import os
import urllib.request
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.metrics.features import FeatureExtractor
from sims_ray.storage.folders import Folder, absolute
from sims_ray.storage.stores import is_uri, reason
from sims_ray.storage.torchvision import import_torchvision

Network = Callable[[Tensor], Tensor]

WEIGHTS = "inception-2015-12-05.pt"  # clean-fid's network reads a file of this name alone
SIDE = 299
BATCH = 64  # resized, 64 images take 69 MB
TIMEOUT_S = 10
ADVICE = f"give clean-fid's {WEIGHTS} with --set features.weights=FILE"


def import_cleanfid() -> Any:
    """The package clean-fid with its modules.

    Raises:
        SimsError: clean-fid or its torchvision cannot be imported.
    """
    try:
        import_torchvision()
        importlib.import_module("cleanfid.fid")
    except (ImportError, RuntimeError) as error:
        raise SimsError(
            f"clean-fid cannot be imported ({reason(error)}); pip install clean-fid, and the torchvision of this torch"
        ) from None
    return importlib.import_module("cleanfid")


def inception_features(
    weights: str | None, device: torch.device | str = "cpu", network: Network | None = None
) -> FeatureExtractor:
    """The function from uint8 images [B, C, H, W], grey ones repeated to RGB, to features [B, 2048] in float32.

    Args:
        weights: TorchScript file of the network, or its URI; None: clean-fid's own, downloaded once.
        device: where the network runs.
        network: another one in its place, from float32 [B, 3, 299, 299] in 0..255 to features.

    Raises:
        SimsError: clean-fid or the weights cannot be had, or the file is another or damaged.
    """
    run = load_inception(weights, device) if network is None else network

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        return torch.cat([run(clean_resize(part).to(device)) for part in torch.split(images, BATCH)])

    return features


def load_inception(weights: str | None, device: torch.device | str = "cpu") -> torch.nn.Module:
    """clean-fid's network, for inference; arguments and errors are those of `inception_features`."""
    wrapper = import_cleanfid().inception_torchscript.InceptionV3W
    path = _downloaded() if weights is None else local_weights(weights)
    try:
        with TemporaryDirectory() as folder:
            (Path(folder) / WEIGHTS).symlink_to(path.resolve())
            network: torch.nn.Module = wrapper(folder, download=False).eval().requires_grad_(False)
        with (
            torch.inference_mode()
        ):  # another network shows here; before it is on a GPU, which may fail for its own sake
            finite = bool(network(torch.zeros(1, 3, SIDE, SIDE)).isfinite().all())
    except (RuntimeError, AttributeError, ValueError) as error:
        raise SimsError(f"{path} does not hold the Inception network ({reason(error)}); {ADVICE}") from None
    if not finite:
        raise SimsError(f"the Inception network in {path} gives features that are not finite; {ADVICE}")
    return network.to(device)


def clean_resize(images: Tensor) -> Tensor:
    """clean-fid's resizing of uint8 images [B, C, H, W] to float32 [B, 3, 299, 299] in 0..255, on the host.

    Raises:
        SimsError: the images are neither grey nor RGB.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.dtype != torch.uint8:
        raise SimsError(
            f"Inception features are of uint8 images [B, 1 or 3, H, W], and these are {images.dtype} "
            f"{list(images.shape)}; choose other features"
        )
    resize = import_cleanfid().resize.build_resizer("clean")
    resized = np.empty((len(images), 3, SIDE, SIDE), np.float32)
    arrays = images.cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow resizes outside the interpreter's lock
        for row, array in zip(resized, pool.map(resize, arrays), strict=True):
            row[:] = array.transpose(2, 0, 1)
    return torch.from_numpy(resized)


def local_weights(location: str, advice: str = "give the weights with --set features.weights=FILE") -> Path:
    """A file of this machine with the weights, or other arrays, at a path or URI; of a URI it is a copy, made once.

    Raises:
        SimsError: there is no such file, or it cannot be read.
    """
    head, mark, query = location.partition("?") if is_uri(location) else (absolute(location), "", "")
    parent, _, name = head.rpartition("/")
    folder = Folder.at(f"{parent or '/'}{mark}{query}")
    size = folder.size(name)
    if size is None:
        raise SimsError(f"there is no file {head}; {advice}")
    if folder.local is not None:
        return folder.local / name
    # A file that is replaced by another of the same size is taken for the one that was copied.
    copy = _cache() / f"{hashlib.sha256(f'{location} {size}'.encode()).hexdigest()[:16]}-{name}"
    if not copy.is_file():
        Folder.at(copy.parent).put(copy.name, folder.read(name))
    return copy


def _downloaded() -> Path:
    """The weights where clean-fid has them from, once; beside and renamed, as several processes may ask for them."""
    path, helper = _cache() / WEIGHTS, import_cleanfid().downloads_helper
    if path.is_file():
        return path
    try:
        with urllib.request.urlopen(helper.inception_url, timeout=TIMEOUT_S):
            pass  # clean-fid itself would wait without end for a host that does not answer
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent) as beside:
            file = helper.check_download_inception(fpath=beside)
            if not zipfile.is_zipfile(file):  # whose directory comes last
                raise OSError("what came is not the whole file")
            os.replace(file, path)
    except (OSError, HTTPException) as error:
        raise SimsError(f"clean-fid's Inception weights cannot be downloaded ({reason(error)}); {ADVICE}") from None
    return path


def _cache() -> Path:
    """Where torch keeps weights; the environment variables TORCH_HOME and XDG_CACHE_HOME move it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "sims_ray"
