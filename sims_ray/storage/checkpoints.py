"""Model and training-state files: safetensors with a JSON card inside, written atomically."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.nn.networks import build_network, describe_network
from sims_ray.nn.precond import Precond
from sims_ray.storage.folders import atomic_path

CARD = "card"
STATE_NAME = re.compile(r"state-(\d{12})\.safetensors")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write tensors and their card to `path` atomically."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as beside:
        save_file(plain, beside, metadata={CARD: json.dumps(card, sort_keys=True)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the card of a file.

    Raises:
        SimsError: the file is missing, torn, or has no card.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _card_of(file)  # noqa: SIM118


def read_card(path: Path) -> dict[str, Any]:
    """Read the card of a file, without its tensors.

    Raises:
        SimsError: as `load_tensors`.
    """
    with _opened(path) as file:
        return _card_of(file)


def _card_of(file: Any) -> dict[str, Any]:
    card = json.loads((file.metadata() or {})[CARD])
    if not isinstance(card, dict):
        raise KeyError("its card is not an object")
    if isinstance(card.get("network"), dict):
        card["network"].setdefault("label_dim", 0)
    return card


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what goes wrong with it becomes one sentence."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise SimsError(f"no checkpoint at {path}; give the path of a .safetensors file that sims_ray wrote") from None
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise SimsError(f"{path} is not a checkpoint of sims_ray ({error}); restore it or make it again") from None


def save_model(path: Path, net: torch.nn.Module, card: Mapping[str, Any]) -> None:
    """Write a network and its card (`network` settings, `role`, `nimg`, `parents`, ...)."""
    save_tensors(path, net.state_dict(), card)


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[Precond, dict[str, Any]]:
    """Read a denoiser for inference: in eval mode, without gradients.

    Raises:
        SimsError: the file is not a denoiser checkpoint, or its tensors do not fit its card.
    """
    tensors, card = load_tensors(path)
    described(path, card)
    try:
        net = build_network(card["network"])
        net.load_state_dict(tensors)
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SimsError(f"{path} does not fit the network of its own card ({reason}); make it again") from None
    return net.eval().requires_grad_(False).to(device), card


def described(path: Path, card: Mapping[str, Any]) -> Precond:
    """The network of a card, without memory for its weights; `path` is for messages.

    Raises:
        SimsError: the card has no network, or one that cannot be built.
    """
    if "network" not in card:
        raise SimsError(
            f"{path} holds a {card.get('role', 'file')}, not a denoiser; give a base or auxiliary checkpoint"
        )
    try:
        return describe_network(card["network"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise SimsError(f"{path} describes a network that cannot be built ({reason}); make it again") from None


def state_path(folder: Path, nimg: int) -> Path:
    """Path of the training state at `nimg` images seen."""
    return folder / f"state-{nimg:012d}.safetensors"


def newest_nimg(folder: Path) -> int:
    """Images seen at the newest training state in a folder, by its name; 0 without one."""
    names = (STATE_NAME.fullmatch(path.name) for path in folder.glob("state-*.safetensors"))
    return max((int(name[1]) for name in names if name), default=0)


def newest_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest readable training state in a folder, or None; unreadable ones are passed over."""
    for path in sorted(folder.glob("state-*.safetensors"), reverse=True):
        if not STATE_NAME.fullmatch(path.name):
            continue
        try:
            return load_tensors(path)
        except SimsError:
            continue
    return None
