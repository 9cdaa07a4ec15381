"""What `sims checkpoint` does: describe, verify and convert checkpoints; merge two of them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sims_ray.config import load_recipe, preset_network, presets
from sims_ray.errors import SimsError
from sims_ray.nn.merge import merge
from sims_ray.nn.networks import num_parameters
from sims_ray.storage.artifacts import MANIFEST, read_manifest, sha256_file
from sims_ray.storage.checkpoints import described, load_model, load_tensors, save_tensors
from sims_ray.storage.latents import EDM2_LATENTS

SUFFIX = ".safetensors"
KEPT = ("network", "precision", "nimg", "ema", "encoder", "latents", "source")  # of the base's card, in a merged one
LATENT_PRESETS = "edm2-img512-"
ADVICE = "save one with torch.save(net.state_dict(), path)"


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """The card of a checkpoint and the size of its tensors, as plain values."""
    tensors, card = load_tensors(path)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    facts: dict[str, Any] = {"file": str(path), "bytes": path.stat().st_size, "tensors": len(tensors)}
    if "network" in card:
        facts["parameters"] = num_parameters(described(path, card))
    return {**facts, "dtypes": sorted(dtypes), **card}


def verify_checkpoint(path: Path) -> str:
    """Check a checkpoint from its header to its last value; returns what was found, in words.

    Raises:
        SimsError: it is torn, its tensors do not fit its card's network, a value is not finite, or its digest is
            not that of the manifest beside it.
    """
    tensors, card = load_tensors(path)
    if "network" in card and card.get("role") != "training state":
        load_model(path)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise SimsError(f"{path}: tensor {name} has values that are not finite; restore the file or make it again")
    digest = sha256_file(path)
    known = read_manifest(path.parent)["files"].get(path.name) if (path.parent / MANIFEST).is_file() else None
    if known and known["sha256"] != digest:
        raise SimsError(f"{path} has SHA-256 {digest[:12]}..., its manifest says {known['sha256'][:12]}...; restore it")
    return f"{card.get('role', 'tensors')}, {len(tensors)} tensors, all finite, SHA-256 {digest}" + (
        ", as in its manifest" if known else ""
    )


def convert_checkpoint(source: Path, target: Path, dtype: str | None, preset: str | None) -> None:
    """Store a checkpoint in another dtype, or make one from a bare state dict of a preset's network.

    Buffers keep their precision.

    Raises:
        SimsError: the source is neither, its tensors do not fit the network, or the target exists.
    """
    tensors, card = _bare(source, preset) if preset is not None else load_tensors(source)
    net = described(source, card)
    _check_fit(source, tensors, net)
    if dtype is not None:
        weights = {name for name, _ in net.named_parameters()}
        tensors = {name: t.to(getattr(torch, dtype)) if name in weights else t for name, t in tensors.items()}
    new_checkpoint(target, tensors, card)


def merge_checkpoints(base: Path, aux: Path, target: Path, w: float) -> dict[str, Any]:
    """Write Neon's merge of two checkpoints; returns its card, which names both as parents.

    Raises:
        SimsError: a file is no denoiser, the networks differ, or the target exists.
    """
    (net, card), (other, aux_card) = load_model(base), load_model(aux)
    if card["network"] != aux_card["network"]:
        raise SimsError(f"the networks differ in {aux} and {base}; merge a base with an auxiliary fine-tuned from it")
    try:
        merged = merge(net, other, w)
    except ValueError as error:
        raise SimsError(f"{base} and {aux}: {error}") from None
    digests = [sha256_file(base), sha256_file(aux)]
    merged_card: dict[str, Any] = {key: card[key] for key in KEPT if key in card}
    if licence := card.get("licence") or aux_card.get("licence"):
        merged_card["licence"] = licence
    merged_card |= {"role": "neon", "w": w, "parents": digests}
    new_checkpoint(target, merged.state_dict(), merged_card)
    return merged_card


def new_checkpoint(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write a checkpoint where none is yet.

    Raises:
        SimsError: the path exists, or does not end in .safetensors.
    """
    if path.suffix != SUFFIX:
        raise SimsError(f"{path} does not end in {SUFFIX}, which checkpoints are; choose such a name")
    if path.exists():
        raise SimsError(f"{path} exists and is not overwritten; choose another name, or remove it")
    save_tensors(path, tensors, card)


def _bare(source: Path, preset: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A bare state dict, and the card of the preset's network."""
    known = presets()
    if preset not in known:
        raise SimsError(f"no preset {preset!r}; `sims presets` lists them")
    card = {
        "role": "base",
        "network": preset_network(preset),
        "precision": load_recipe(preset).network.precision,
        "source": source.name,
    }
    if preset.startswith(LATENT_PRESETS):
        card["latents"] = EDM2_LATENTS
    try:
        if source.suffix == SUFFIX:
            return load_file(source), card
        content = torch.load(source, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise SimsError(f"there is no file {source}; give the path of a state dict") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise SimsError(f"{source} is not a plain state dict ({_reason(error)}); {ADVICE}") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise SimsError(f"{source} is not a plain state dict; {ADVICE}")
    return content, card


def _check_fit(source: Path, tensors: Mapping[str, Tensor], net: torch.nn.Module) -> None:
    expected = net.state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else "absent"
        wanted = tuple(expected[name].shape) if name in expected else "absent"
        if found != wanted:
            raise SimsError(f"{source}: tensor {name} is {found}, the network has {wanted}; it is of another network")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0]
