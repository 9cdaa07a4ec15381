"""Model and training-state files: safetensors with a JSON card and a digest inside, written atomically.

The library reads them. Its writer is not used: it puts metadata in an order of chance, so that equal content gives
other bytes, keeps them from other users of the folder, and what it leaves when it is killed no sweep knows.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.nn.networks import build_network, describe_network
from sims_ray.nn.precond import Precond
from sims_ray.storage.beside import atomic_path

CARD = "card"
DIGEST = "sha256"
DIGEST_CHARS = 12  # of a digest in a message
FULL = (errno.ENOSPC, errno.EDQUOT)
DTYPES = {  # names in the format, https://huggingface.co/docs/safetensors
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class CorruptFile(SimsError):
    """A file that is there and is not what was written; `reason` says in a few words what is wrong with it."""

    def __init__(self, sentence: str, reason: str = "") -> None:
        super().__init__(sentence)
        self.reason = reason


class UnreadableFile(SimsError):
    """A file that is absent or that the system cannot read, which says nothing about its content."""


def save_tensors(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write tensors, their card and the digest of both to `path` atomically; equal content gives equal bytes.

    Raises:
        SimsError: the disk is full or cannot be written to; what was at `path` is as it was.
    """
    try:
        write_tensors(path, tensors, card)
    except OSError as error:
        raise unwritten(path, error, tensors) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """As `save_tensors`, for those who try again.

    Raises:
        OSError: the system's own.
        SimsError: a tensor is of a kind that the format has no name for.
    """
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in sorted(tensors.items())}
    text = json.dumps(card, sort_keys=True)
    metadata = {CARD: text, DIGEST: _digest(text, plain.items())}
    aligned = dict(sorted(plain.items(), key=lambda item: -item[1].element_size()))  # every tensor starts at its size
    header = _header(path, aligned, metadata)
    with atomic_path(path) as beside, beside.open("wb") as file:
        file.write(header)
        for tensor in aligned.values():
            file.write(_raw(tensor))
        file.flush()
        os.fsync(file.fileno())  # or a node that loses power leaves a name without its content


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the card of a file, and check both against its digest if it has one.

    Raises:
        CorruptFile: it is torn, changed since it was written, or has no card.
        UnreadableFile: it is absent, or the system cannot read it.
    """
    with _opened(path) as (file, metadata):
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return tensors, _verified(path, metadata, tensors.items())


def verify_tensors(path: Path) -> dict[str, Any]:
    """Check a file as `load_tensors` does, with one tensor in memory at a time; returns its card."""
    with _opened(path) as (file, metadata):
        return _verified(path, metadata, ((name, file.get_tensor(name)) for name in sorted(file.keys())))


def read_card(path: Path) -> dict[str, Any]:
    """Read the card of a file, without its tensors and unchecked.

    Raises:
        SimsError: as `load_tensors`.
    """
    with _opened(path) as (_, metadata):
        return _card_of(metadata)


def unwritten(path: Path, error: OSError, tensors: Mapping[str, Tensor], intact: str = "") -> SimsError:
    """What to tell of a file that could not be written; `intact` is what the user need not worry about."""
    found = error.strerror or str(error)
    if error.errno not in FULL:
        return SimsError(f"{path} cannot be written ({found}); {intact}make {path.parent} writable and run again")
    needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    try:
        free = f"{shutil.disk_usage(path.parent).free:,}"
    except OSError:
        free = "an unknown number of"
    return SimsError(
        f"{path.parent} is full ({found}): {path.name} needs {needed_bytes:,} bytes and {free} bytes are free; "
        f"{intact}free space and run the same command again"
    )


def _header(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file whose data are these tensors, one after the other."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise SimsError(f"{path}: tensor {name} is {tensor.dtype}, which safetensors does not hold; convert it")
        start, end = end, end + tensor.nbytes
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _digest(card: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over a card and over name, dtype, shape and bytes of tensors in the order of their names."""
    digest = hashlib.sha256(card.encode())
    for name, tensor in tensors:
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, not copied; NumPy has no bfloat16, so as uint8."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _verified(path: Path, metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """The card, once card and tensors have the digest in the metadata; files of other origin have none."""
    card = _card_of(metadata)
    stored = metadata.get(DIGEST)
    if stored is not None and (found := _digest(metadata[CARD], tensors)) != stored:
        digests = f"SHA-256 {found[:DIGEST_CHARS]}..., its header says {stored[:DIGEST_CHARS]}..."
        raise _corrupt(path, f"its content has {digests}")
    return card


def _card_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    if CARD not in metadata:
        raise ValueError("it has no card")
    card = json.loads(metadata[CARD])
    if not isinstance(card, dict):
        raise ValueError("its card is not an object")
    if isinstance(card.get("network"), dict):
        card["network"].setdefault("label_dim", 0)
    return card


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """A safetensors file and its metadata; what goes wrong with it becomes one sentence."""
    try:
        with path.open("rb") as plain:  # the library calls every error of opening an absent file
            empty = not plain.read(1)
        if empty:
            raise _corrupt(path, "it is empty")
        with safe_open(path, framework="pt") as file:
            yield file, file.metadata() or {}
    except (FileNotFoundError, NotADirectoryError):
        sentence = f"no checkpoint at {path}; give the path of a .safetensors file that sims_ray wrote"
        raise UnreadableFile(sentence) from None
    except (OSError, RuntimeError) as error:  # torch has no other for memory that cannot be mapped
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UnreadableFile(f"{path} cannot be read ({reason}); make it accessible") from None
    except (SafetensorError, LookupError, ValueError, TypeError) as error:
        raise _corrupt(path, " ".join(str(error).split())) from None


def _corrupt(path: Path, reason: str) -> CorruptFile:
    sentence = f"{path} is not a checkpoint of sims_ray, or no longer ({reason}); restore it or make it again"
    return CorruptFile(sentence, reason)


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
