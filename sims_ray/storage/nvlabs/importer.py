"""Public snapshots of EDM and EDM2 (NVIDIA) become checkpoints of this package.

`sims import-nvlabs FILE OUT` reads the pickle without running it, rebuilds the network's settings from the
arguments of its constructor, checks every tensor against that network and keeps the licence in the card.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sims_ray.errors import SimsError
from sims_ray.nn.networks import describe_network, num_parameters
from sims_ray.storage.artifacts import sha256_file
from sims_ray.storage.checkpoints import save_tensors
from sims_ray.storage.latents import EDM2_ENCODER, EDM2_LATENTS, LatentSpace
from sims_ray.storage.nvlabs.objects import Array, Record, read_objects
from sims_ray.storage.nvlabs.reader import Refusal, shown
from sims_ray.storage.nvlabs.settings import network_settings

LICENCE = "CC BY-NC-SA 4.0 (NVIDIA; non-commercial)"
SUFFIX = ".safetensors"
MAX_NAME = 200  # characters; also limits how deep modules may nest
MAX_CHANNELS = 64  # of latents
PICKLE, ZIP = b"\x80", b"PK"
PUBLISHED = "give the .pkl file of a network that NVIDIA published"
ENCODER_ARGUMENTS = {  # of EDM2's encoder in their order, and what they are called in a card
    "vae_name": "vae",
    "raw_mean": "raw_mean",
    "raw_std": "raw_std",
    "final_mean": "final_mean",
    "final_std": "final_std",
}
FILE_NAME = re.compile(r".+-(?P<kimg>\d{6,7})(?:-(?P<std>\d\.\d{3}))?\.pkl")  # of EDM, then of EDM2 with its EMA


def import_nvlabs(source: Path, target: Path) -> dict[str, Any]:
    """Convert a snapshot of EDM or EDM2 to a checkpoint; its tensors keep their dtype bit for bit.

    No code of the snapshot is run, and nothing is written unless all of it is in order.

    Args:
        source: the `.pkl` file.
        target: `.safetensors` file to make.

    Returns:
        The card of the checkpoint.

    Raises:
        SimsError: `target` exists or has another suffix, or `source` is not a snapshot that can be read.
    """
    if target.suffix != SUFFIX:
        raise SimsError(f"{target} does not end in {SUFFIX}; give the name of the checkpoint to make")
    if target.exists():
        raise SimsError(f"{target} exists and nothing is overwritten; choose another name or remove it first")
    try:
        snapshot = _read(source)
        network = _network(snapshot)
        settings, precision = network_settings(network)
        tensors = _tensors(network, source.stat().st_size)
        count = _check(tensors, settings)
        encoder = _encoder(snapshot, settings["img_channels"])
    except Refusal as refusal:
        raise SimsError(f"{source} {refusal}") from None
    card = {
        "role": "base",
        "network": settings,
        "precision": precision,
        "num_parameters": count,
        "licence": LICENCE,
        "source": {"file": source.name, "sha256": sha256_file(source), "class": network.kind},
        "parents": [],
        **_facts_of_name(source.name),
        **encoder,
    }
    save_tensors(target, tensors, card)
    return card


def _read(source: Path) -> Any:
    try:
        with source.open("rb") as file:
            start = file.read(2)
            _check_start(start)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return read_objects(view)
    except FileNotFoundError:
        raise SimsError(f"no snapshot at {source}; {PUBLISHED}") from None
    except OSError as error:
        raise SimsError(f"{source} cannot be read ({error.strerror}); {PUBLISHED}") from None


def _check_start(start: bytes) -> None:
    if not start:
        raise Refusal("is empty; download it again")
    if start == ZIP:
        raise Refusal(f"is a zip archive, as torch.save writes, and no snapshot of EDM or EDM2; {PUBLISHED}")
    if start[:1] != PICKLE:
        raise Refusal(f"is not a pickle; {PUBLISHED}")


def _network(snapshot: Any) -> Record:
    if type(snapshot) is not dict or "ema" not in snapshot:
        raise Refusal(f"has no entry `ema`, where a snapshot holds its network; {PUBLISHED}")
    network = snapshot["ema"]
    if not isinstance(network, Record):
        raise Refusal(f"holds {shown(network)} instead of a network in its entry `ema`; {PUBLISHED}")
    return network


def _tensors(network: Record, file_bytes: int) -> dict[str, Tensor]:
    """Parameters and buffers by the names that `state_dict` would give them; no two share a storage."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in _walk(network):
        passing = _part(prefix, module, "_non_persistent_buffers_set", set)
        buffers = _part(prefix, module, "_buffers", dict)
        kept = {name: buffer for name, buffer in buffers.items() if name not in passing}
        for name, tensor in (_part(prefix, module, "_parameters", dict) | kept).items():
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                raise Refusal(f"has no tensor of floating-point numbers at {shown(f'{prefix}{name}')}; {PUBLISHED}")
            tensors[f"{prefix}{name}"] = tensor
    declared = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if declared > file_bytes:
        raise Refusal(f"declares tensors of {declared} bytes but has {file_bytes} bytes; it may be hostile")
    return _apart(tensors)


def _walk(network: Record) -> Iterator[tuple[str, Record]]:
    """All modules with the prefixes of their tensors' names."""
    waiting = [("", network)]
    seen = {id(network)}
    while waiting:
        prefix, module = waiting.pop()
        yield prefix, module
        for key, child in _part(prefix, module, "_modules", dict).items():
            name = f"{prefix}{key}"
            if child is None:
                continue
            if not isinstance(child, Record):
                raise Refusal(f"has {shown(child)} instead of a module at {shown(name)}; {PUBLISHED}")
            if id(child) in seen or len(name) > MAX_NAME:
                raise Refusal(f"has a module inside itself, twice or too deep, at {shown(name)}; it may be hostile")
            seen.add(id(child))
            waiting.append((f"{name}.", child))


def _part(prefix: str, module: Record, name: str, kind: type) -> Any:
    part = module.state.get(name, kind())
    if type(part) is not kind:
        raise Refusal(f"has {shown(part)} as {name} of the module {shown(prefix) or 'ema'}; {PUBLISHED}")
    return part


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with copies where a storage is shared, which safetensors does not write; all must be finite."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise Refusal(f"has values that are not finite in the tensor {shown(name)}; download it again")
        address = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return own


def _check(tensors: dict[str, Tensor], settings: dict[str, Any]) -> int:
    """Compare names and shapes with the network of the settings; returns its number of parameters."""
    try:
        net = describe_network(settings)
    except (ArithmeticError, LookupError, RuntimeError, SimsError, StopIteration, TypeError, ValueError) as error:
        reason = shown(" ".join(str(error).split()))
        raise Refusal(f"describes a network that cannot be built ({reason}); {PUBLISHED}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing = [f"{name} is missing" for name in expected if name not in found]
    surplus = [f"{shown(name)} is not expected" for name in found if name not in expected]
    misshapen = [
        f"{name} is {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if missing or surplus or misshapen:
        raise Refusal(
            f"does not fit the network it describes: {(missing + surplus + misshapen)[0]} ({len(missing)} tensors "
            f"missing, {len(surplus)} not expected, {len(misshapen)} of another shape); {PUBLISHED}"
        )
    return num_parameters(net)


def _facts_of_name(name: str) -> dict[str, Any]:
    """Training length and EMA width, which stand in the file's name alone."""
    match = FILE_NAME.fullmatch(name)
    facts: dict[str, Any] = {"nimg": int(match["kimg"]) * 1000 if match else None}
    if match and match["std"]:
        facts["ema"] = {"kind": "power", "std": float(match["std"])}
    return facts


def _encoder(snapshot: dict[str, Any], channels: int) -> dict[str, Any]:
    """The encoder's class, and how a VAE's latents relate to pixels where the network works on such latents."""
    encoder = snapshot.get("encoder")
    if not isinstance(encoder, Record):
        return {}
    facts: dict[str, Any] = {"encoder": shown(encoder.kind)}
    if encoder.kind == EDM2_ENCODER:
        entry = _latents(encoder)
        if len(entry["raw_mean"]) == channels:
            facts["latents"] = entry
    return facts


def _latents(encoder: Record) -> dict[str, Any]:
    """Entry `latents` of the card: what the encoder computes with, or was made with, or has by default."""
    positional, named = encoder.state.get("_init_args", ()), encoder.state.get("_init_kwargs", {})
    if not isinstance(positional, tuple | list) or not isinstance(named, dict):
        raise Refusal(f"does not tell the constructor arguments of its encoder; {PUBLISHED}")
    given = {**dict(zip(ENCODER_ARGUMENTS, positional, strict=False)), **named}
    given["vae_name"] = encoder.state.get("vae_name", given.get("vae_name", EDM2_LATENTS["vae"]))
    entry = {**EDM2_LATENTS, **{key: given[name] for name, key in ENCODER_ARGUMENTS.items() if name in given}}
    entry = {key: list(value) if isinstance(value, tuple) else value for key, value in entry.items()}
    space = _space(entry)
    scale, bias = _numbers(encoder.state.get("scale")), _numbers(encoder.state.get("bias"))
    if scale is None or bias is None or len(scale) != len(bias) or _close(space, scale, bias):
        return entry
    entry["raw_std"] = [entry["final_std"] / s if s else 0.0 for s in scale]
    entry["raw_mean"] = [(entry["final_mean"] - b) / s if s else 0.0 for b, s in zip(bias, scale, strict=True)]
    _space(entry)
    return entry


def _space(entry: dict[str, Any]) -> LatentSpace:
    try:
        return LatentSpace.of(entry, "encoder")
    except SimsError as error:
        reason = shown(str(error).partition("; ")[0])
        raise Refusal(f"describes latents that are not possible, {reason}; {PUBLISHED}") from None


def _close(space: LatentSpace, scale: list[float], bias: list[float]) -> bool:
    """Whether these are the numbers of the space, up to rounding to float32."""
    return len(scale) == len(space.scale) and np.allclose([scale, bias], [space.scale, space.bias], rtol=1e-5)


def _numbers(array: Any) -> list[float] | None:
    """The values of an array of numbers [C]; None if it is none."""
    try:
        values = array.values() if isinstance(array, Array) else np.empty(0)
    except (ValueError, TypeError):
        return None
    return [float(v) for v in values] if values.ndim == 1 and 0 < len(values) <= MAX_CHANNELS else None
